"""Pictures and the numbers behind them; slices that go on where they were."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from math import exp, log, sqrt
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ray_jobs.errors import ConfigError
from ray_jobs.figures import landscape, slice_file, style
from ray_jobs.figures.curves import band
from ray_jobs.figures.figure1 import ADAM, METHODS, STRENGTHS, frob, settings
from ray_jobs.figures.figure1_pictures import pictures
from ray_jobs.figures.figure1_table import LOSS, NORM, Curves, norms_at, table, write_csv
from ray_jobs.figures.figure2 import reproduce_figure2, saddle_losses
from ray_jobs.figures.slice_file import POINTS, Slice, SliceFile
from ray_jobs.figures.slices import plane_figure
from ray_jobs.results import Curve, RunRecord

PLANE = Slice("random", 2, points=5, radius=0.5, seed=0)


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_band_is_mean_and_standard_error_over_the_seeds_that_have_the_epoch() -> None:
    drawn = band([{1: 1.0, 2: 4.0}, {1: 3.0}, {1: 5.0}])
    assert drawn.epochs == (1, 2)
    assert drawn.seeds == (3, 1)
    assert drawn.mean == (3.0, 4.0)
    assert drawn.high[0] - drawn.mean[0] == pytest.approx(2 / sqrt(3))
    assert drawn.low[1] == drawn.high[1] == 4.0


def test_a_geometric_band_is_that_of_the_logarithms() -> None:
    drawn = band([{1: 1.0}, {1: 100.0}], geometric=True)
    assert drawn.mean[0] == pytest.approx(10)
    assert drawn.high[0] == pytest.approx(10 * exp(log(10)))
    assert drawn.low[0] == pytest.approx(1)


def test_norms_are_compared_where_the_training_loss_first_falls_to_a_level() -> None:
    losses = [{1: 1.0, 2: 0.01, 3: 0.2, 4: 0.001}, {1: 0.05, 2: 0.04}, {1: 1.0, 2: 0.5}]
    norms = [{1: 100.0, 2: 1.0, 3: 50.0, 4: 7.0}, {1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0}]
    assert norms_at(0.1, losses, norms) == [pytest.approx(10)]  # half way in logarithms; the others never cross it


def test_both_panels_share_their_curves() -> None:
    keys = [setting.key for setting in settings(STRENGTHS)]
    assert len(keys) == len(set(keys)) == len(METHODS) + len(STRENGTHS) - 1
    assert keys[0] == frob(1e-6).key
    assert ADAM.key in keys


def record(seed: int, scale: float) -> RunRecord:
    epochs = (1, 2, 3)
    curves = {
        NORM: Curve(epochs, (100.0 * scale, 40.0 * scale, 10.0 * scale)),
        f"{NORM}.standard_error": Curve(epochs, (5.0, 2.0, 1.0)),
        LOSS: Curve(epochs, (1.0, 0.2, 0.05)),
        "loss/test": Curve(epochs, (1.0, 0.4, 0.3)),
        "accuracy/test": Curve(epochs, (0.5, 0.9, 0.95)),
    }
    params = {"training.seed": str(seed), "measure": "frobenius", "strength": "1e-06"}
    return RunRecord(f"run{seed}", "figure1", "FINISHED", None, params, {}, curves)


def curves(scale: float = 1.0) -> Curves:
    return Curves(frob(1e-6), [record(0, scale), record(1, 4 * scale)])


def test_of_one_seed_the_band_is_that_of_its_probes() -> None:
    alone = Curves(frob(1e-6), [record(0, 1.0)]).band("hessian/frobenius_squared")
    assert alone.mean[0] == pytest.approx(100)
    assert (alone.low[0], alone.high[0]) == (pytest.approx(95), pytest.approx(105))
    over_seeds = curves().band("hessian/frobenius_squared")
    assert over_seeds.low[0] == pytest.approx(100)  # geometric mean 200, and the error of log 100 and log 400 is log 2
    assert over_seeds.high[0] == pytest.approx(400)


def test_the_csv_has_a_line_for_each_seed_and_epoch(tmp_path: Path) -> None:
    write_csv([curves()], tmp_path / "figure1.csv")
    with (tmp_path / "figure1.csv").open() as file:
        rows = list(csv.DictReader(file))
    row = rows[0]
    assert len(rows) == 2 * 3
    assert (row["seed"], row["epoch"], row["frobenius_squared"], row["measure"]) == ("0", "1", "100", "frobenius")
    assert row["frobenius_squared_standard_error"] == "5"


def test_the_table_says_geometric_means_over_seeds() -> None:
    line = table([curves()]).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "2"
    assert cells[2] == "200"
    assert cells[3] == "200 (epoch 1)"
    assert cells[5].startswith("20 (10 to 40)")
    assert cells[8] == "95.0%"


def test_figure1_is_written_as_png_and_svg_with_every_label(tmp_path: Path) -> None:
    runs = {setting.key: curves() for setting in settings(STRENGTHS)}
    paths = pictures(runs, STRENGTHS, "mnist5k", tmp_path)
    assert [path.name for path in paths] == [
        "figure1-mnist5k.png",
        "figure1-mnist5k.svg",
        "figure1-mnist5k-loss.png",
        "figure1-mnist5k-loss.svg",
    ]
    check_pictures(paths)
    before = [path.read_bytes() for path in paths]
    assert before == [path.read_bytes() for path in pictures(runs, STRENGTHS, "mnist5k", tmp_path)]


def check_pictures(paths: list[Path]) -> None:
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20  # something is drawn
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_curves_differ_by_colour_and_neighbours_by_dashes_too() -> None:
    looks = [style.look(index) for index in range(7)]
    assert len({look["color"] for look in looks}) == 7
    assert len({str(look["linestyle"]) for look in looks[:5]}) == 5


def test_figure2_is_the_saddle(tmp_path: Path) -> None:
    axis = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    assert torch.equal(saddle_losses(axis), (axis[:, None] ** 2 - axis[None] ** 2) / 2)
    paths = reproduce_figure2(tmp_path)
    assert [path.name for path in paths] == ["figure2.png", "figure2.svg"]
    check_pictures(paths)


@pytest.mark.parametrize("filled", [0.0, 3.0, float("nan"), float("inf")])
def test_planes_without_a_range_or_with_losses_that_are_no_numbers_are_drawn(filled: float) -> None:
    losses = torch.full((3, 3), filled, dtype=torch.float64)
    axis = torch.linspace(-1, 1, 3)
    assert plane_figure(axis, axis, losses, "flat", ("a", "b")).axes


def test_a_density_is_drawn(tmp_path: Path) -> None:
    from phisam.sharpness import Density
    from ray_jobs.figures.density import density_figure

    nodes = torch.tensor([[-0.1, 0.0, 5.0], [-0.2, 0.1, 4.0]], dtype=torch.float64)
    weights = torch.tensor([[0.1, 0.89, 0.01], [0.1, 0.89, 0.01]], dtype=torch.float64)
    density = Density(nodes, weights, torch.tensor([3, 3]), torch.zeros(2), 100, 0, True)
    check_pictures(style.save(density_figure(density, "spectrum"), tmp_path, "density"))


def model_and_batches() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return model, [(torch.randn(8, 3), torch.randint(2, (8,)))]


def evaluate(folder: Path, wanted: Slice = PLANE, workers: int = 1) -> Tensor:
    model, batches = model_and_batches()
    file = landscape.opened(folder, wanted, model, batches)
    return landscape.evaluate(model, batches, wanted, file, workers, quiet())


def test_a_slice_that_was_cut_short_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(tmp_path / "whole")
    monkeypatch.setattr(landscape, "LOT", 4)
    write, written = slice_file.write, []

    def dies_in_the_third_lot(file: io.TextIOBase, losses: Mapping[int, float]) -> None:
        written.append(losses)
        if len(written) == 3:
            file.write("8,0.1")  # half a line
            raise KeyboardInterrupt
        write(file, losses)  # type: ignore[arg-type]

    monkeypatch.setattr(landscape, "write", dies_in_the_third_lot)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "cut")
    monkeypatch.setattr(landscape, "write", lambda file, losses: (written.append(losses), write(file, losses)))
    assert torch.equal(evaluate(tmp_path / "cut"), whole)
    assert sorted(index for losses in written[3:] for index in losses) == list(range(8, 25))
    assert torch.equal(evaluate(tmp_path / "cut"), whole)  # from the file alone
    (folder,) = (tmp_path / "cut").iterdir()
    assert len((folder / POINTS).read_text().splitlines()) == 25


def test_a_folder_with_another_slice_is_refused(tmp_path: Path) -> None:
    SliceFile(tmp_path, PLANE, "a model")
    with pytest.raises(ConfigError, match="another"):
        SliceFile(tmp_path, PLANE, "another model")


def test_eigenvectors_are_those_of_the_dense_hessian(tmp_path: Path) -> None:
    from torch.nn.functional import cross_entropy

    from phisam import sharpness

    model, batches = model_and_batches()
    wanted = Slice("eigenvectors", 2, points=3, radius=0.5, seed=0)
    H = sharpness.Hessian(model, cross_entropy, batches).dense()
    exact = torch.linalg.eigh(H).eigenvectors.flip(1)
    for number, found in enumerate(landscape.find_directions(model, batches, wanted)):
        assert abs(float(found @ exact[:, number])) == pytest.approx(1, abs=1e-6)


def test_pictures_of_a_slice(tmp_path: Path) -> None:
    for wanted in (PLANE, Slice("random", 1, points=5, radius=0.5, seed=0)):
        paths = landscape.draw(wanted, evaluate(tmp_path, wanted), "a model", tmp_path / "pictures")
        check_pictures(paths)
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        f"landscape-random-{end}" for end in ("1d.png", "1d.svg", "2d.png", "2d.svg")
    }


def test_workers_on_ray_give_what_one_process_gives(tmp_path: Path) -> None:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        shared = evaluate(tmp_path / "ray", workers=2)
    finally:
        ray.shutdown()
    assert torch.equal(shared, evaluate(tmp_path / "here"))
