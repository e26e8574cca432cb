"""What a step allocates and sends: counted, not computed.

On the CPU torch's profiler records every allocation of torch's allocator, also those inside an operator, and every
collective with the shape and type of what it sends, DDP's own included. On CUDA the allocator keeps the peak itself.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

ITEM_SIZES = {
    "float": 4,
    "double": 8,
    "c10::Half": 2,
    "c10::BFloat16": 2,
    "int": 4,
    "long int": 8,
    "bool": 1,
    "unsigned char": 1,
}
COLLECTIVE = re.compile(r"(?:gloo|nccl):(\w+)")
COUNTED = "counted step"

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Counts:
    """peak_bytes: the most that was allocated at once, beyond what was there before. The others: of the counted step.

    all_reduced_bytes: the summed size of the tensors that went into all-reduces; other_bytes: into other collectives.
    """

    peak_bytes: int
    all_reduces: int
    all_reduced_bytes: int
    other_collectives: int
    other_bytes: int


def count(prepare: Callable[[], None], step: Callable[[], object], device: torch.device) -> Counts:
    """The peak over prepare() and step(); the collectives of step()."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=not on_cuda, record_shapes=True) as profiled:
        prepare()
        with record_function(COUNTED):
            step()
            if on_cuda:
                torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    peak = torch.cuda.max_memory_allocated(device) - before if on_cuda else peak_of(events)
    return Counts(peak, *collectives_of(events))


def peak_of(events: Iterable[Event]) -> int:
    """The most that was alive at once on the CPU, of what was allocated since the profiler began.

    gloo's threads may free a tensor last, unseen by the profiler: it is over at the latest when its address is used
    again.
    """
    changes = sorted(
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"], event["args"]["Addr"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    )
    alive: dict[int, int] = {}
    total = peak = 0
    for *_, change, address in changes:
        total -= alive.pop(address, 0)
        if change > 0:
            alive[address] = change
            total += change
        peak = max(peak, total)
    return peak


def collectives_of(events: Iterable[Event]) -> tuple[int, int, int, int]:
    """(all-reduces, their bytes, other collectives, their bytes) inside the counted step."""
    events = [event for event in events if "dur" in event and not str(event.get("cat", "")).startswith("gpu")]
    (counted,) = (event for event in events if event["name"] == COUNTED)
    start, end = counted["ts"], counted["ts"] + counted["dur"]
    reduced: list[int] = []
    other: list[int] = []
    for event in events:
        match = COLLECTIVE.fullmatch(event["name"])
        if match and start <= event["ts"] <= end:
            (reduced if match[1] in ("all_reduce", "allreduce") else other).append(bytes_of(event))
    return len(reduced), sum(reduced), len(other), sum(other)


def bytes_of(event: Event) -> int:
    """The size of a collective's input tensors."""
    arguments = event["args"]
    return sum(
        math.prod(shape) * ITEM_SIZES[kind]
        for shape, kind in zip(arguments["Input Dims"], arguments["Input type"], strict=True)
        if kind in ITEM_SIZES
    )
