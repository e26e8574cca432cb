"""A module for each command of `phisam`: `add` declares it, `run` does it.

Modules that take seconds to import (torch, ray, mlflow) are imported by the `run` that needs them.
"""
