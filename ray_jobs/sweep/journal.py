"""A sweep's memory in its folder: how it was described, and all that has happened since (`ray_jobs.journal`)."""

from __future__ import annotations

DESCRIPTION, JOURNAL = "sweep.yaml", "journal.jsonl"
