"""The report: one file without a network, figures that Plotly takes, numbers that add up, 500 trials."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest

from ray_jobs.report import content, page, plots, space_plots, summary_plots, tables
from ray_jobs.report.page import _width
from ray_jobs.results import settings
from tests.ray_jobs import synthetic

METRIC = "accuracy/validation"
LARGEST = 5_800_000  # bytes of a page with 500 trials; 4.8 of them are Plotly's


@pytest.fixture(scope="module")
def large() -> str:
    return page(synthetic.parent(), synthetic.search(500), METRIC, "max", "name: <b>\n")


def figures(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    drawn: dict[str, Any] = json.loads(found.group(1))
    return drawn


def own(text: str) -> str:
    """The page without Plotly's script, which mentions addresses that it does not load."""
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    return text.replace(max(scripts, key=len), "")


class Page(HTMLParser):
    """Ids, links within the page, what is loaded from elsewhere, and the tags that are open."""

    VOID = ("meta", "input", "br", "line", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self._open.append(tag)
        for name, value in attrs:
            self.ids += [str(value)] if name == "id" else []
            self.links += [str(value)] if name == "href" else []
            self.loaded += [str(value)] if name == "src" or tag == "link" else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)  # <line/>: of VOID

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(large: str) -> None:
    read = Page(own(large))
    assert read.loaded == []
    assert len(read.ids) == len(set(read.ids))
    assert {link.removeprefix("#") for link in read.links} <= set(read.ids)
    assert figures(large).keys() <= set(read.ids)
    assert "default-src 'none'" in large  # the browser itself refuses the network
    assert "connect-src" not in large
    assert len(large.encode()) < LARGEST


def test_every_figure_is_one_that_plotly_takes(large: str) -> None:
    def painted(value: Any) -> Any:
        """Its colours in place of the names of the page's."""
        if isinstance(value, str):
            return "#000000" if value.startswith("--") else value
        if isinstance(value, list):
            return [painted(part) for part in value]
        return {key: painted(part) for key, part in value.items()} if isinstance(value, dict) else value

    drawn = figures(large)
    kinds = {trace["type"] for figure in drawn.values() for trace in figure["data"]}
    assert kinds == {"scatter", "heatmap", "parcoords"}
    for figure in drawn.values():
        plotly.graph_objects.Figure(painted(figure))  # raises for a property that it does not know


def test_colours_are_those_of_the_style_in_both_themes(large: str) -> None:
    css = (Path(plots.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    used = {name.split("/")[0] for name in re.findall(r'"(--[a-z0-9-]+(?:/[0-9.]+)?)"', json.dumps(figures(large)))}
    assert used
    for theme in (light, dark):
        assert used <= set(re.findall(r"--[a-z0-9-]+(?=:)", theme))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_and_lines_stand_out_in_both_themes() -> None:
    css = (Path(plots.__file__).parent / "page.css").read_text(encoding="utf-8")
    for theme in re.findall(r":root \{(.*?)\}", css, re.DOTALL):
        colours = dict(re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]{6})", theme))
        surface = luminance(colours["--surface"])
        words = [
            "--ink",
            "--ink-soft",
            "--accent",
            *(f"--series-{i}" for i in range(content.SERIES)),
        ]  # lines are named
        for name in words:
            light, dark = sorted([surface, luminance(colours[name])], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name  # WCAG AA for text


def test_what_people_wrote_is_text_not_markup(large: str) -> None:
    assert "<b>" not in own(large)
    assert "&lt;b&gt;" in large
    run = synthetic.run(failed="</script><script>alert(1)</script>", index=0)
    evil = page(synthetic.parent("</title>"), [run, synthetic.run("sam", index=1)], METRIC, "max")
    named = dataclasses.replace(run, params={**run.params, "measure": "</script><script>alert(2)"}, status="FINISHED")
    evil += page(synthetic.parent(), [named, synthetic.run("sam", index=1)], METRIC, "max")
    assert "<script>alert" not in own(own(evil))


def test_methods_are_measures_at_each_n_and_their_best_settings(large: str) -> None:
    records = synthetic.search(500)
    found = content.methods(records, METRIC, "max")
    assert {method.label for method in found} >= {"sgd", "sam", "frobenius n=2", "trace n=8"}
    assert len({method.series for method in found}) == len(found) <= content.SERIES
    means = [content.mean_of(method.setting, METRIC) for method in found]
    assert means == sorted(means, reverse=True)
    assert [method.label for method in content.methods(synthetic.grid(), METRIC, "max")][-1] == "determinant"


def test_methods_are_the_base_runs_where_a_sweep_has_several() -> None:
    """Two of them have one measure, and more than a plot has lines: the best are shown."""
    records = []
    for number in range(content.SERIES + 2):
        run = synthetic.run("trace" if number % 2 else "sam", rho=0.01 * (1 + number), index=number, lift=0.01 * number)
        records.append(dataclasses.replace(run, params={**run.params, "run": f"run-{number}"}))
    found = content.methods(records, METRIC, "max")
    assert len(found) == content.SERIES
    assert {method.label for method in found} >= {f"run-{content.SERIES}", f"run-{content.SERIES + 1}"}
    assert [setting.label for setting in settings(records)] == [f"run-{number}" for number in range(content.SERIES + 2)]


def test_the_winner_is_the_one_that_the_sweep_chose() -> None:
    records = synthetic.grid()
    told = dataclasses.replace(synthetic.parent(), tags={"phisam.winner": records[0].run_id})
    chosen = content.winner(told, records, METRIC, "max")
    own_choice = content.winner(synthetic.parent(), records, METRIC, "max")
    assert chosen is not None
    assert own_choice is not None
    assert (chosen.measure, own_choice.measure) == ("sgd", "trace")
    cards = tables.winner(chosen, METRIC, 5), tables.winner(own_choice, METRIC, 5)
    assert [card and card["where"] for card in cards] == [
        "5 seeds",
        "rho = 0.03, lam = 0.001, n = 2, strength = 9e-07; 5 seeds",
    ]
    both = dataclasses.replace(told, tags={"phisam.winner": f"other,{records[0].run_id}"})  # one on each data set
    assert content.winner(both, records, METRIC, "max") == chosen


def test_savings_and_cost_add_up() -> None:
    whole = synthetic.run("sam", seed=0, epochs=20)  # 28 steps of 2 evaluations
    stopped = synthetic.run("sam", seed=1, epochs=20, stopped=3)  # and trained one epoch more
    saved = content.savings([whole, stopped])
    assert saved.gradient_evaluations == pytest.approx((20 - 4) * 56)
    assert saved.overrun == pytest.approx(56)
    assert content.cost([whole, stopped]).gradient_evaluations == pytest.approx((20 + 4) * 56)
    assert saved.part == pytest.approx(16 / 40)
    seconds = whole.spent["seconds"] + stopped.spent["seconds"]
    assert content.cost([whole, stopped]).device_hours == pytest.approx(2 * seconds / 3600)  # two workers
    assert tables.stopping_text([whole]) == "No trial was stopped early."


def test_a_band_is_the_interval_over_seeds_at_each_epoch() -> None:
    records = [synthetic.run("sam", seed=seed) for seed in range(4)] + [synthetic.run("sam", seed=4, stopped=3)]
    (method,) = content.methods([*records], METRIC, "max")
    drawn = content.band(method.setting, METRIC, "gradient_evaluations")
    assert drawn.x == tuple(56.0 * epoch for epoch in range(1, 21))  # the stopped one takes no part
    values = [run.curves[METRIC].values[6] for run in records[:4]]
    assert drawn.intervals[6].mean == pytest.approx(sum(values) / 4)
    assert drawn.intervals[6].n == 4


def test_maps_are_heat_maps_of_grids_and_dots_of_draws() -> None:
    grid = [synthetic.run(rho=rho, lam=lam) for rho in (0.01, 0.1) for lam in (1e-3, 1e-2, 1e-1)]
    (drawn,) = space_plots.maps(grid, METRIC, "max")
    heat = drawn.figure["data"][0]
    assert (heat["type"], heat["x"], heat["y"]) == ("heatmap", ["0.01", "0.1"], ["0.001", "0.01", "0.1"])
    assert heat["z"][1][0] == pytest.approx(grid[1].at(METRIC), rel=1e-4)
    draws = [synthetic.run(rho=0.01 * 1.3**i, lam=1e-3 * 2**i) for i in range(9)]
    (cloud,) = space_plots.maps(draws, METRIC, "max")
    assert cloud.figure["data"][-1]["mode"] == "markers"
    (line,) = space_plots.maps(grid[:1] + grid[3:4], METRIC, "max")
    assert line.figure["data"][0]["x"] == [0.01, 0.1]
    assert space_plots.maps(grid[:1], METRIC, "max") == []


def test_parallel_coordinates_have_a_place_for_what_a_trial_lacks() -> None:
    runs = [synthetic.run("sgd"), synthetic.run("sam"), *(synthetic.run(lam=lam) for lam in (1e-4, 1e-2, 1.0))]
    figure = space_plots.parallel(runs, ["measure", "lam"], METRIC, "max")
    assert figure is not None
    measure, lam, _ = figure["data"][0]["dimensions"]
    assert measure["ticktext"] == ["frobenius", "sam", "sgd"]
    assert lam["values"][0] < -4 == lam["values"][2]  # lam = 0 lies below the logarithms


@pytest.mark.parametrize("count", [1, 2])
def test_a_sweep_that_has_hardly_begun_has_a_page(count: int) -> None:
    begun = [dataclasses.replace(synthetic.run(index=i, seed=i), status="RUNNING") for i in range(count)]
    empty = dataclasses.replace(begun[0], curves={}, spent={})
    for records in ([], [empty], begun, [*begun, empty]):
        assert "Trials" in page(synthetic.parent(), records, METRIC, "max")


def test_a_loss_is_to_be_small() -> None:
    records = [synthetic.run("sam", seed=s, lift=0.02) for s in range(2)] + [synthetic.run("sgd", lift=-0.02)]
    chosen = content.winner(synthetic.parent(), records, "loss/validation", "min")
    assert chosen is not None
    assert chosen.measure == "sam"
    assert "test accuracy" in page(synthetic.parent(), records, "loss/validation", "min")


def test_pictures_are_written(tmp_path: Path) -> None:
    records = [*synthetic.grid(range(3)), *synthetic.grid(range(3), data="fashion_mnist")]
    written = summary_plots(synthetic.parent(), records, METRIC, "max", tmp_path)
    assert sorted(path.name for path in written) == sorted(expected())
    assert all(path.stat().st_size > 5_000 for path in written)


def expected() -> Iterator[str]:
    for kind in ("curves", "methods"):
        for data in ("mnist5k", "fashion-mnist"):
            yield from (f"{kind}-{data}.png", f"{kind}-{data}.svg")


def test_methods_are_compared_first_at_equal_shares_of_what_the_sweep_dealt_out() -> None:
    records = synthetic.grid(range(2))
    for resource, first in (("epochs", "epochs"), ("gradient_evaluations", "gradient evaluations")):
        parent = dataclasses.replace(synthetic.parent(), params={"resource": resource})
        text = page(parent, records, METRIC, "max")
        assert re.findall(r'value="table-0-\w+" checked><label[^>]*>equal ([\w ]+)<', text) == [first]


def test_what_a_measure_always_has_is_told_by_the_measure() -> None:
    records = [
        dataclasses.replace(run, params={**run.params, "eta": eta, "lr": lr})
        for run, eta, lr in zip(synthetic.grid(range(2)), "aabbccddee", "1212121212", strict=True)
    ]
    keys = content.trial_parameters(records)
    assert "lr" in keys
    assert "lam" in keys  # though each measure has one here
    assert "eta" not in keys


def test_every_line_is_named_inside_of_its_axis() -> None:
    """Plotly leaves out a name that lies beyond the axis by a rounding."""
    for case in range(20):
        measures = "abcdefgh"[: content.SERIES]  # so many that end alike push each other up to the axis's end
        records = [synthetic.run(name, lift=case / 700) for name in measures]
        drawn = plots.curves(content.methods(records, METRIC, "max"), METRIC, "seconds")
        low, high = drawn["layout"]["yaxis"]["range"]
        names = drawn["layout"]["annotations"]
        assert sorted(name["text"] for name in names) == list(measures)
        assert all(low <= name["y"] <= high for name in names)


def test_metrics_have_names_that_people_say() -> None:
    names = ["accuracy/test", "loss/early_validation", "hessian/trace", "sharpness", "ece/test"]
    said = ["test accuracy", "early-stopped validation loss", "Hessian: trace", "R_rho", "ece/test"]
    assert list(map(plots.title, names)) == said


def test_a_map_of_many_digits_has_short_names_and_none_twice() -> None:
    def columns(*rhos: float) -> list[str]:
        records = [synthetic.run(rho=rho, lam=lam) for rho in rhos for lam in (1e-3, 1e-2)]
        (drawn,) = space_plots.maps(records, METRIC, "max")
        names: list[str] = drawn.figure["data"][0]["x"]
        return names

    assert columns(0.0257733, 0.0692128) == ["0.0258", "0.0692"]
    assert columns(0.0257733, 0.0257744) == ["0.0257733", "0.0257744"]


def test_the_axes_are_those_that_differ_most_and_the_base_optimizer_has_no_rho() -> None:
    records = [
        dataclasses.replace(run, params={**run.params, "a": str(i % 2), "b": str(i), "c": str(i % 3)})
        for i, run in enumerate(synthetic.grid(range(2)))
    ]
    keys = ["measure", "rho", "lam", "n_samples", "a", "b", "c"]
    assert content.most_varied(records, keys, 6) == ["measure", "rho", "lam", "n_samples", "b", "c"]
    assert [content.parameter(records[0], key) for key in ("measure", "rho", "b")] == ["sgd", None, "0"]
    head, _, rows = tables.trials(records, METRIC)
    assert [rows[i][head.index("lam")].text for i in (0, 2)] == ["-", "0.001"]


def test_a_short_logarithmic_axis_has_three_ticks_and_a_long_one_its_decades() -> None:
    assert plots.log_axis([0.0161, 0.02, 0.0289])["tickvals"] == [0.016, 0.022, 0.029]
    assert plots.log_axis([0.1, 0.1])["tickvals"] == [0.1]
    assert [plots.log_axis([1e-3, high])["dtick"] for high in (0.02, 0.1, 1e8)] == ["D2", 1, 2]


def test_names_of_neighbouring_axes_have_room() -> None:
    records = [synthetic.run(lam=lam) for lam in (1e-3, 1e-2, 1e-1)]
    text = page(synthetic.parent(), records, "loss/early_validation", "min")
    assert 'id="parallel-0"' not in text  # nobody reports it
    widths = []
    for metric in ("loss/train", "accuracy/validation"):
        text = page(synthetic.parent(), records, metric, "max")
        widths += re.findall(r'id="parallel-0" style="min-width:(\d+)px"', text)
    assert widths == [str(2 * 96), str(2 * 96)]
    figure = space_plots.parallel(records, ["lam", "n_samples"], "accuracy/validation", "max")
    assert figure is not None
    figure["data"][0]["dimensions"][0]["label"] = "a_very_long_name_of_a_setting"
    assert _width(figure) == 3 * 8 * (29 + 1) // 2
