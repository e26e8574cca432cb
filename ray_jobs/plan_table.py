"""`phisam plan` in words: a table for one W and n, or one line for each of several."""

from __future__ import annotations

from collections.abc import Sequence

from ray_jobs import config
from ray_jobs.errors import ConfigError
from ray_jobs.plan import Model, Option, Plan
from ray_jobs.plan_hardware import Hardware
from ray_jobs.plan_workload import ITEM_BYTES, Workload, configured, described

HEAD = ["GPUs", "n", "S", "D", "examples", "rounds", "step", "efficiency", "x SGD", "sent", "memory", "collectives"]
HEAD += ["limited by", ""]
RANKS_SHOWN = 4

NOTES = """\
examples: in a pass on one GPU, x micro-batches. efficiency: against n + 1 evaluations that the GPUs share perfectly.
x SGD: over a step of the base optimizer on the same GPUs. sent: by a GPU in a step. collectives: all-reduces of d
numbers + gathers of losses. limited by: the largest loss, and its part of the step.
Not counted: reading data, validation, slow ranks; in memory the device's context, workspaces and temporaries."""


def plan_text(
    source: str,
    overrides: Sequence[str],
    gpus: Sequence[int],
    n_samples: Sequence[int],
    hardware: Hardware,
    parameters: float | None = None,
    flops_per_example: float | None = None,
    activations_gb: float | None = None,
    seconds_per_evaluation: float | None = None,
) -> str:
    """What `phisam plan` prints.

    Args:
        n_samples: none: the description's.
        parameters, flops_per_example, activations_gb (of an example): in place of the description's model.
        seconds_per_evaluation: measured, of a forward and a backward over the whole global batch on one GPU.

    Raises:
        ConfigError: a description or an option that cannot be.
    """
    if (parameters is None) != (flops_per_example is None):
        raise ConfigError(
            "plan: --parameters and --flops-per-example go together (FLOPs of a forward and a backward of one example; "
            "for a transformer 6 x parameters x tokens)"
        )
    if activations_gb is not None and parameters is None:
        raise ConfigError("plan: --activations-gb goes with --parameters; those of the description's model are counted")
    asked: list[list[str]] = [[f"optimizer.n_samples={n}"] for n in n_samples] or [[]]
    configs = [config.load(source, [*overrides, f"scaling.num_workers={W}", *each]) for W in gpus for each in asked]
    configs = list({(c.scaling.most_workers, c.optimizer.n_samples): c for c in configs}.values())  # sam has one n
    first = configs[0]
    assumed = ""
    if parameters is not None and flops_per_example is not None:
        item_bytes = ITEM_BYTES[first.training.precision]
        saved = None if activations_gb is None else activations_gb * 1e9 / item_bytes
        workload = described(round(parameters), flops_per_example, saved)
        name = f"a model of {parameters:.3g} parameters"
    else:
        workload, assumed = configured(first.model, first.data, first.training.seed)
        name = f"{first.model.name}, {workload.parameters:,} parameters"
    if seconds_per_evaluation is not None:
        workload = workload.timed(seconds_per_evaluation / first.training.batch_size)
    plans = [Model(each, workload, hardware).plan() for each in configs]
    about = _about(first, name, workload, hardware, seconds_per_evaluation is not None)
    if assumed:
        about.append(assumed)
    lines = _one(plans[0]) if len(plans) == 1 else _several(plans)
    return "\n".join([*about, "", *lines, "", NOTES])


def _about(
    described_run: config.RunConfig, name: str, workload: Workload, hardware: Hardware, measured: bool
) -> list[str]:
    training, settings = described_run.training, described_run.optimizer
    micro_batches = f" in {training.micro_batches} micro-batches" if training.micro_batches > 1 else ""
    tflops = hardware.flops[training.precision] / 1e12
    source = "measured" if measured else f"at {hardware.utilisation:.0%} of {tflops:g} TFLOP/s, or memory-bound"
    evaluation = workload.device_seconds(training.batch_size, hardware, training.precision) / training.batch_size
    return [
        f"{described_run.name}: {settings.measure.name} on {name}",
        f"global batch {training.batch_size:,}{micro_batches}, {training.precision}",
        f"{hardware.name}: {hardware.about}",
        f"an evaluation of one example: {workload.flops_each:.3g} FLOP, {_seconds(evaluation)} ({source})",
    ]


def _one(plan: Plan) -> list[str]:
    """All S, and who evaluates what in the best."""
    lines = _aligned([HEAD, *(_row(plan, option) for option in plan.options)])
    lines += _remarks(plan)
    if plan.best:
        lines += ["", *_dealt(plan.best)]
    return lines


def _several(plans: Sequence[Plan]) -> list[str]:
    """The best S of each."""
    rows = [_row(plan, plan.best) for plan in plans if plan.best]
    return _aligned([HEAD, *rows]) + [remark for plan in plans if not plan.best for remark in _remarks(plan)]


def _row(plan: Plan, option: Option) -> list[str]:
    seconds, layout = option.seconds, option.layout
    marks = ["best"] if option is plan.best else []
    marks += ["does not fit"] if not option.fits else []
    marks += ["auto or as configured"] if option.chosen and option is not plan.best else []
    return [
        str(plan.world_size),
        str(layout.measure.n_points(plan.n_samples) if len(layout.evaluations) > 1 else 0),
        str(layout.sample_size),
        str(layout.data_size),
        f"{option.examples:g}" + (f" x {layout.micro_batches}" if layout.micro_batches > 1 else ""),
        str(layout.deal.rounds),
        _seconds(seconds.total),
        f"{seconds.efficiency:.0%}",
        "-" if plan.sgd is None else f"{seconds.total / plan.sgd:.2f}",
        _bytes(option.sent),
        _bytes(option.memory) + ("" if option.activations_known else " + activations"),
        f"{option.all_reduces} + {option.gathers}",
        seconds.limit(),
        ", ".join(marks),
    ]


def _remarks(plan: Plan) -> list[str]:
    remarks = []
    if plan.refused:
        sizes = ", ".join(f"{size} (D = {plan.world_size // size})" for size in plan.refused)
        remarks.append(
            f"{plan.world_size} GPUs: left out, since data ranks x micro-batches cannot share the batch equally: "
            f"S = {sizes}; see training.batch_size"
        )
    if plan.options and not plan.best:
        remarks.append(
            f"{plan.world_size} GPUs, n = {plan.n_samples}: no S fits the memory; raise training.micro_batches, "
            "or shard the parameters (FSDP2, in a loop of your own)"
        )
    if not plan.options:
        remarks.append(f"{plan.world_size} GPUs: no S is left")
    return remarks


def _dealt(option: Option) -> list[str]:
    layout = option.layout
    lines = [f"S = {layout.sample_size}: a data rank's points, round by round (0 is x itself)"]
    for rank in range(min(layout.sample_size, RANKS_SHOWN)):
        points = ["-" if point is None else str(point) for point in layout.points(rank)]
        lines.append(f"  sample rank {rank}: {' '.join(points)}")
    return lines if layout.sample_size <= RANKS_SHOWN else [*lines, "  ..."]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
