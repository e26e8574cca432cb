"""How pictures look: colours that colour-blind readers tell apart, thin frames, PNG and SVG files.

The eight colours are those of Okabe and Ito (Color Universal Design, 2008); curves differ by their dashes too.
Surfaces are drawn in cividis, which has the same order for every kind of colour vision and in grey.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from ray_jobs.errors import ConfigError, RunError

try:
    import matplotlib
except ModuleNotFoundError as error:
    raise ConfigError("pictures need matplotlib: pip install 'phisam[service]'") from error

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1)), "-", "-", "--")
SURFACE = "cividis"
FORMATS = ("png", "svg")

_SETTINGS: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "phisam",  # the same picture is the same file
    "savefig.dpi": 160,
}


@contextmanager
def styled() -> Iterator[None]:
    """Figures made inside look alike; matplotlib's own settings come back afterwards."""
    with matplotlib.rc_context(cast(Any, _SETTINGS)):  # its stubs list every setting's name
        yield


def look(index: int) -> dict[str, Any]:
    """Colour and dashes of curve 0, 1, ..."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index % len(DASHES)]}


def figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches. It belongs to no window system."""
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Figure, folder: Path, name: str) -> list[Path]:
    """Writes folder/name.png and .svg, which are the same bytes for the same picture.

    Raises:
        RunError: the folder cannot be written.
    """
    paths = [folder / f"{name}.{ending}" for ending in FORMATS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with styled():
            for path in paths:
                metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
                drawn.savefig(path, metadata=metadata)
    except OSError as error:
        raise RunError(f"{error.filename or folder} cannot be written ({error.strerror})") from None
    return paths


def title(panel: Axes, text: str) -> None:
    """A panel's title, at its left."""
    panel.set_title(text, loc="left")
