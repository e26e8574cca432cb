"""requirements.py EXTRA: what an extra of pyproject.toml needs, a line each; extras of phisam itself are followed."""

import re
import sys
import tomllib
from pathlib import Path


def needs(extras: dict[str, list[str]], name: str) -> list[str]:
    """The requirements of an extra."""
    found = []
    for line in extras[name]:
        own = re.fullmatch(r"phisam\[(\w+)\]", line)
        found += needs(extras, own[1]) if own else [line]
    return found


if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    print(*project["dependencies"], *needs(project["optional-dependencies"], sys.argv[1]), sep="\n")
