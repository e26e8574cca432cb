"""Which settings are tried, in which order: grid, random, and Optuna's TPE.

Settings are numbered from 0, and each is run with each of the sweep's seeds: trial = setting * n_seeds + k. Where some
dimensions are a grid and others are drawn, each combination of the grid gets as many draws, by turns, and TPE learns
for each combination from its own results.

A suggestion is a function of the sweep, the setting's number and, for TPE, the results of the trials that `needs`
says: all but the last of those before it, as many as run at once. A sweep that is resumed, or whose trials end in
another order, tries the same settings.
"""

from __future__ import annotations

import math
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray_jobs.sweep.sections import SEED, GridSearch, RandomSearch, SweepConfig, TpeSearch
from ray_jobs.sweep.space import Dimension, Entry, Pick, Picks, rounded, values_of

if TYPE_CHECKING:
    import optuna

Results = Mapping[int, float | None]


class Search(ABC):
    """The trials of a sweep: n_cells combinations of grids, n_settings with the draws for each, n_trials with seeds."""

    def __init__(self, sweep: SweepConfig, cells: Sequence[Picks], draws: int) -> None:
        self._walk = sweep.walk
        self._seeds = sweep.seeds
        self._cells = cells
        self.n_cells = len(cells)
        self.n_settings = self.n_cells * draws
        self.n_trials = self.n_settings * max(1, len(self._seeds))

    def setting(self, index: int) -> int:
        """The setting of a trial."""
        return index // max(1, len(self._seeds))

    def seed(self, index: int) -> int | None:
        """training.seed of a trial; None where it is the run's own."""
        return self._seeds[index % len(self._seeds)] if self._seeds else None

    def needs(self, index: int) -> range:
        """The trials that must be over, and their results known, before `suggest(index)`."""
        return range(0)

    def suggest(self, index: int, results: Results) -> dict[str, Any]:
        """Dotted key -> value of trial `index`.

        results: the metric of trials that are over, None for one without a value; those that `needs` does not name are
        not looked at.

        Raises:
            ValueError: a result that `needs` names is missing, or there is no such trial.
        """
        if not 0 <= index < self.n_trials:
            raise ValueError(f"trial {index} of {self.n_trials}: they are counted from 0")
        missing = [trial for trial in self.needs(index) if trial not in results]
        if missing:
            raise ValueError(f"trial {index} needs the result of trial {missing[0]} first")
        visible = [results[trial] for trial in self.needs(index)]
        values = values_of(self.picks(self.setting(index), visible))
        seed = self.seed(index)
        return values if seed is None else {**values, SEED: seed}

    @abstractmethod
    def picks(self, setting: int, visible: Sequence[float | None]) -> Picks:
        """A setting, given the results of the first trials."""


class Grid(Search):
    """All combinations of all values."""

    def __init__(self, sweep: SweepConfig) -> None:
        super().__init__(sweep, list(sweep.walk.everything()), draws=1)

    def picks(self, setting: int, visible: Sequence[float | None]) -> Picks:
        return self._cells[setting]


class Random(Search):
    """Independent draws: a value depends on (seed, draw, key) alone. A new dimension leaves the others as they are."""

    def __init__(self, sweep: SweepConfig, trials: int, seed: int) -> None:
        super().__init__(sweep, list(sweep.walk.grid()), trials)
        self._seed = seed

    def picks(self, setting: int, visible: Sequence[float | None]) -> Picks:
        draw, cell = divmod(setting, len(self._cells))

        def choose(entry: Entry, alternative: int) -> Pick:
            if entry.alternatives[alternative].kind == "grid":
                return self._cells[cell][entry.key]
            u = random.Random(f"{self._seed}/{draw}/{entry.key}").random()
            return entry.alternatives[alternative].draw(u)

        return self._walk.settle(choose)


class Tpe(Random):
    """Optuna's TPE, asked anew for each setting and told what the setting may know.

    The value of a setting is the mean over its seeds; a setting without one counts for nothing, one whose value is NaN
    is worse than all others. Parameters are modelled together (multivariate), as lam rho^2 is what acts.
    """

    def __init__(self, sweep: SweepConfig, search: TpeSearch, max_concurrent: int) -> None:
        super().__init__(sweep, search.trials, search.seed)
        self._lag = max_concurrent
        self._startup = search.startup
        self._maximize = sweep.mode == "max"
        self._known: dict[tuple[int, tuple[str, ...]], Picks] = {}

    def needs(self, index: int) -> range:
        n_seeds = max(1, len(self._seeds))
        return range(max(0, self.setting(index) * n_seeds - self._lag + 1))

    def picks(self, setting: int, visible: Sequence[float | None]) -> Picks:
        key = setting, tuple(map(repr, visible))
        if key not in self._known:
            self._known[key] = self._asked(setting, visible)
        return self._known[key]

    def _asked(self, setting: int, visible: Sequence[float | None]) -> Picks:
        n_seeds = max(1, len(self._seeds))
        cell = setting % len(self._cells)
        past = []
        for earlier in range(cell, len(visible) // n_seeds, len(self._cells)):
            loss = self._loss(visible[earlier * n_seeds : (earlier + 1) * n_seeds])
            if loss is not None:
                past.append((self.picks(earlier, visible[: len(self.needs(earlier * n_seeds))]), loss))
        if len(past) < self._startup:
            return super().picks(setting, visible)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls what we use experimental
            trial = self._study(setting, past).ask()

        def choose(entry: Entry, alternative: int) -> Pick:
            dimension = entry.alternatives[alternative]
            if dimension.kind == "grid":
                return self._cells[cell][entry.key]
            return _suggested(trial, f"{entry.key}/{alternative}", dimension)

        return self._walk.settle(choose)

    def _loss(self, values: Sequence[float | None]) -> float | None:
        """Mean over seeds, smaller is better."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        mean = sum(known) / len(known)
        if math.isnan(mean):
            return math.inf
        return -mean if self._maximize else mean

    def _study(self, setting: int, past: Sequence[tuple[Picks, float]]) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = random.Random(f"tpe/{self._seed}/{setting}").getrandbits(31)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, multivariate=True, group=True)
        study = optuna.create_study(sampler=sampler)
        entries = {entry.key: entry for entry in self._walk.entries}
        for picks, loss in past:
            params, distributions = {}, {}
            for key, pick in picks.items():
                dimension = entries[key].alternatives[pick.alternative]
                if dimension.kind != "grid":
                    name = f"{key}/{pick.alternative}"
                    params[name] = pick.value if pick.position is None else pick.position
                    distributions[name] = _distribution(dimension)
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=loss))
        return study


def make_search(sweep: SweepConfig, max_concurrent: int) -> Search:
    """The search that a sweep file names. max_concurrent: trials at once, fixed when the sweep begins."""
    match sweep.search:
        case GridSearch():
            return Grid(sweep)
        case RandomSearch(trials=trials, seed=seed):
            return Random(sweep, trials, seed)
        case TpeSearch() as search:
            return Tpe(sweep, search, max_concurrent)


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    from optuna import distributions

    if dimension.finite:
        return distributions.CategoricalDistribution(list(range(len(dimension.finite))))
    low, high = dimension.ends
    if dimension.kind == "int_uniform":
        return distributions.IntDistribution(int(low), int(high))
    return distributions.FloatDistribution(low, high, log=dimension.kind == "log_uniform")


def _suggested(trial: optuna.Trial, name: str, dimension: Dimension) -> Pick:
    if dimension.finite:
        position = trial.suggest_categorical(name, list(range(len(dimension.finite))))
        return Pick(dimension.finite[position], position)
    low, high = dimension.ends
    if dimension.kind == "int_uniform":
        return Pick(trial.suggest_int(name, int(low), int(high)))
    return Pick(rounded(trial.suggest_float(name, low, high, log=dimension.kind == "log_uniform"), low, high))
