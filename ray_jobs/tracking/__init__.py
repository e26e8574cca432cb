"""MLflow: one run per run, also across restarts; each epoch once. The only package that imports mlflow.

Metrics carry the worker's timestamp, and a checkpoint carries the metrics of all epochs behind it. MLflow's key of a
measurement is (run, name, timestamp, value, step), so that writing an epoch again writes nothing, and `Outbox` can
fill in whatever a killed process had not sent.
"""

from __future__ import annotations

from ray_jobs.tracking.provenance import provenance
from ray_jobs.tracking.server import find_run, open_store, tracking_uri
from ray_jobs.tracking.tracker import Tracker, parameters

__all__ = ["Tracker", "find_run", "open_store", "parameters", "provenance", "tracking_uri"]
