"""The paper's Figure 1 as run descriptions: the recipe figure1 with a method, a strength, data and a seed set.

Left: Frob-SAM beside the other methods, each with the settings of its recipe mnist5k-NAME, but one sample where the
paper says one (Trace-SAM, Det-SAM). Right: Frob-SAM at several strengths. The paper gives neither rho, lam nor n for
this figure; what acts is the strength s = lam rho^2, so curves are named by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ray_jobs import config
from ray_jobs.config import RunConfig

RECIPE = "figure1"
DATA = ("mnist5k", "fashion_mnist", "mnist")
STRENGTHS = (1e-7, 1e-6, 1e-5, 1e-4)
FROB_STRENGTH = 1e-6  # of the left panel
FROB_RHO = 0.03

QUICK = ("training.epochs=2", "data.fraction=0.1", "sharpness.probes=5", "sharpness.examples=128")


class Setting(NamedTuple):
    """One curve. label: in the legend; overrides: of the recipe."""

    key: str
    label: str
    overrides: tuple[str, ...]


def frob(strength: float) -> Setting:
    """Frob-SAM at a strength s = lam rho^2."""
    return Setting(
        f"frob-{strength:g}",
        f"Frob-SAM, s = {strength:g}",
        (
            "optimizer.measure=frobenius",
            f"optimizer.rho={FROB_RHO}",
            f"optimizer.lam={strength / FROB_RHO**2:.6g}",
            "optimizer.n_samples=3",
        ),
    )


ADAM = Setting("adam", "Adam", ("optimizer.measure=sgd",))

METHODS = (
    frob(FROB_STRENGTH)._replace(label="Frob-SAM"),
    Setting("sam", "SAM", ("optimizer.measure=sam", "optimizer.rho=0.05")),
    Setting("asam", "ASAM", ("optimizer.measure={name: asam, eta: 0.01}", "optimizer.rho=0.5")),
    Setting("ssam", "SSAM", ("optimizer.measure={name: ssam, sparsity: 0.5}", "optimizer.rho=0.1")),
    Setting(
        "trace",
        "Trace-SAM",
        ("optimizer.measure=trace", "optimizer.noise=gaussian", "optimizer.rho=0.03", "optimizer.n_samples=1"),
    ),
    Setting(
        "det",
        "Det-SAM",
        (
            "optimizer.measure=determinant",
            "optimizer.noise={name: hypercube, half_width: 0.01}",
            "optimizer.rho=1.0",
            "optimizer.lam=0.1",
            "optimizer.n_samples=1",
        ),
    ),
    ADAM,
)


def strengths_panel(strengths: Sequence[float]) -> tuple[Setting, ...]:
    """The right panel: plain Adam, which is s = 0, then Frob-SAM at each strength."""
    return (ADAM._replace(label="Adam, s = 0"), *(frob(strength) for strength in sorted(strengths)))


def settings(strengths: Sequence[float]) -> list[Setting]:
    """Every curve of both panels once."""
    curves: dict[str, Setting] = {}
    for setting in (*METHODS, *strengths_panel(strengths)):
        curves.setdefault(setting.key, setting)
    return list(curves.values())


def description(setting: Setting, data: str, seed: int, overrides: Sequence[str], quick: bool) -> RunConfig:
    """The run behind one curve and seed; overrides are the user's, and have the last word.

    Raises:
        ConfigError: an override that the run description does not take.
    """
    return config.load(
        RECIPE,
        [
            f"name={RECIPE}/{data}/{setting.key}",
            f"data.name={data}",
            *setting.overrides,
            *(QUICK if quick else ()),
            f"training.seed={seed}",
            *overrides,
        ],
    )
