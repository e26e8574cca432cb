"""What `phisam landscape` does: evaluates the points of a slice that no earlier call did, on any number of workers.

Points do not depend on each other, so they are dealt out in small lots, as they are asked for: a slow worker holds
nobody up, one that dies has its lot done again, and the driver alone writes them down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from phisam import sharpness
from phisam.sharpness import landscape
from ray_jobs.data import load_dataset
from ray_jobs.errors import ConfigError
from ray_jobs.figures import style
from ray_jobs.figures.slice_file import POINTS, Slice, SliceFile, fingerprint, write
from ray_jobs.figures.slices import line_figure, plane_figure
from ray_jobs.paths import runs_folder
from ray_jobs.sharpness.measuring import has_batch_norm, measuring_batches
from ray_jobs.tracking import Tracker
from ray_jobs.tracking.models import Found

Batches = Sequence[tuple[Tensor, Tensor]]

FOLDER = "landscape"  # of the run's artifacts
LOT = 16  # points that a worker takes at once
AXES = {
    "random": ("filter-normalised direction 1", "filter-normalised direction 2"),
    "eigenvectors": ("top eigenvector", "second eigenvector"),
}


def find_directions(model: nn.Module, batches: Batches, wanted: Slice) -> list[Tensor]:
    """The slice's directions, (d,) float64 each.

    Raises:
        Unmeasurable: eigenvectors of a model that cannot be differentiated twice.
    """
    if wanted.directions == "random":
        return landscape.random_directions(model, wanted.dimensions, wanted.seed)
    hessian = sharpness.Hessian(model, cross_entropy, batches)
    found = sharpness.top_eigenvalues(hessian, k=wanted.dimensions, seed=wanted.seed)
    return list(found.vectors.T)


def evaluate(
    model: nn.Module, batches: Batches, wanted: Slice, file: SliceFile, workers: int, console: Console
) -> Tensor:
    """Losses of all points, (len(coordinates),) float64; those that the file knows are not evaluated.

    workers: 1: in this process. More: as tasks of a Ray that `cluster.connected` started or joined.
    """
    directions = file.directions(lambda: find_directions(model, batches, wanted))
    known, points = file.known(), wanted.coordinates
    todo = [index for index in range(len(points)) if index not in known]
    lots = [todo[start : start + LOT] for start in range(0, len(todo), LOT)]
    if known:
        console.print(f"{len(known)} of {len(points)} points are in {file.folder / POINTS} already", highlight=False)
    done = (
        _here(model, batches, directions, points, lots)
        if workers == 1
        else _on_ray(model, batches, directions, points, lots, workers)
    )
    with file.open() as opened, _bar(console) as bar:
        task = bar.add_task("points", total=len(points), completed=len(known))
        for losses in done:
            write(opened, losses)
            known |= losses
            bar.advance(task, len(losses))
    return torch.tensor([known[index] for index in range(len(points))], dtype=torch.float64)


def _losses(
    model: nn.Module, batches: Batches, directions: Sequence[Tensor], points: Sequence[landscape.Point], lot: list[int]
) -> dict[int, float]:
    losses = landscape.slice_losses(model, cross_entropy, batches, directions, [points[index] for index in lot])
    return dict(zip(lot, losses.tolist(), strict=True))


def _here(
    model: nn.Module, batches: Batches, directions: Sequence[Tensor], points: Sequence[landscape.Point], lots: Any
) -> Iterator[Mapping[int, float]]:
    for lot in lots:
        yield _losses(model, batches, directions, points, lot)


def _on_ray(
    model: nn.Module,
    batches: Batches,
    directions: Sequence[Tensor],
    points: Sequence[landscape.Point],
    lots: Sequence[list[int]],
    workers: int,
) -> Iterator[Mapping[int, float]]:
    """Lots as Ray tasks, `workers` of them at a time, in the order in which they end."""
    import ray

    @ray.remote(num_cpus=1, max_retries=3)
    def task(*arguments: Any) -> dict[int, float]:
        torch.set_num_threads(1)
        return _losses(*arguments)

    shared = [ray.put(value) for value in (model, list(batches), list(directions), list(points))]
    waiting, running = list(reversed(lots)), list[Any]()
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(task.remote(*shared, waiting.pop()))
        done, running = ray.wait(running)
        yield from ray.get(done)


def draw(wanted: Slice, losses: Tensor, name: str, folder: Path) -> list[Path]:
    """The pictures of a slice: a line, or a plane and the two lines through its middle."""
    first, second = AXES[wanted.directions]
    axis, kind = wanted.axis, f"landscape-{wanted.directions}"
    if wanted.dimensions == 1:
        return style.save(line_figure({first: (axis, losses)}, name), folder, f"{kind}-1d")
    plane = losses.view(wanted.points, wanted.points)
    paths = style.save(plane_figure(axis, axis, plane, name, (first, second)), folder, f"{kind}-2d")
    if wanted.points % 2:
        middle = wanted.points // 2
        lines = {first: (axis, plane[:, middle]), second: (axis, plane[middle])}
        paths += style.save(line_figure(lines, name), folder, f"{kind}-1d")
    return paths


def opened(folder: Path, wanted: Slice, model: nn.Module, batches: Batches) -> SliceFile:
    """The slice's folder inside `folder`: its name tells it from other slices, and of other models."""
    of = fingerprint(model, batches)
    size = "x".join([str(wanted.points)] * wanted.dimensions)
    name = f"{of[:8]}-{wanted.directions}-{size}-r{wanted.radius:g}-s{wanted.seed}"
    return SliceFile(folder / name, wanted, of)


def landscape_of(
    found: Found, wanted: Slice, examples: int, folder: Path | None, workers: int, console: Console
) -> list[Path]:
    """The whole command: evaluates, draws, logs to the model's run if it has one, and says where everything lies.

    Args:
        workers: more than 1: a Ray is there.

    Raises:
        ConfigError: the Hessian that eigenvectors need does not exist, or the folder holds another slice.
        RunError: the data is not what the model was trained on, or MLflow does not take the files.
    """
    config = found.config
    dataset = load_dataset(config.data, config.training.seed)
    found.check_data(dataset)
    model = found.model(dataset)
    batches = measuring_batches(dataset, examples, config.training.seed, next(model.parameters()).dtype)
    file = opened(folder or runs_folder() / "landscapes", wanted, model, batches)
    if has_batch_norm(model):
        console.print("BatchNorm uses its running statistics at every point (docs/landscape.md)")
    try:
        losses = evaluate(model, batches, wanted, file, workers, console)
    except sharpness.Unmeasurable as error:
        raise ConfigError(f"--directions eigenvectors: {error}") from None
    except KeyboardInterrupt as error:
        error.add_note("the same command again goes on with the points that are missing")
        raise
    epoch = "" if found.epoch is None else f", epoch {found.epoch}"
    files = [*draw(wanted, losses, f"{config.name}{epoch}", file.folder), *file.files]
    if found.uri is not None and found.run_id is not None:
        Tracker(found.uri, found.run_id).log_files(files, FOLDER)
        console.print(f"Logged to run {found.run_id}, artifacts {FOLDER}/", highlight=False)
    console.print("\n".join(["Written:", *map(str, files)]), highlight=False, soft_wrap=True)
    return files


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
