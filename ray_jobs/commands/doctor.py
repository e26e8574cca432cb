"""`phisam doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ray_jobs.commands.arguments import add_head, command, set_environment


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "doctor",
        run,
        "look whether a cluster, or this machine, can do what runs ask of it",
        """\
Looks, before a GPU is spent: storage that all nodes share, versions, an all-reduce and its speed, MLflow, tokens and
file modes, free disk and /dev/shm, clocks. A line each: pass, warn or fail, with what to do. A cluster is looked at by
a job on it; without one, the Ray that phisam train would start here. Exit code 1 if anything fails.""",
    )
    parser.add_argument("--home", metavar="FOLDER", help="where on the cluster runs lie; default: its PHISAM_HOME")
    parser.add_argument("--json", action="store_true", help="for programs; docs/cluster.md describes it")
    add_head(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    set_environment(arguments.address, verbose=False)
    from ray_jobs.doctor.findings import Finding, as_json, exit_code
    from ray_jobs.doctor.run import examined

    def say(line: str) -> None:
        print(f"phisam: {line}", file=sys.stderr)

    address, found = examined(arguments.address, arguments.home, say)
    if arguments.json:
        print(json.dumps(as_json(address, found), indent=1))
        return exit_code(found)

    def line(finding: Finding) -> str:
        told = f"{finding.verdict}  {finding.check}: {finding.told}"
        return f"{told}\n      {finding.remedy}" if finding.remedy else told

    counts = [f"{sum(f.verdict == verdict for f in found)} {verdict}" for verdict in ("pass", "warn", "fail")]
    print("\n".join([*map(line, found), f"\n{address}: {', '.join(counts)}"]))
    return exit_code(found)
