"""What trials of a sweep may differ in beside the numbers that are searched: workers, data."""

from __future__ import annotations

import itertools
import math

from ray_jobs.config import RunConfig
from ray_jobs.errors import ConfigError
from ray_jobs.sweep.search import make_search
from ray_jobs.sweep.sections import SweepConfig
from ray_jobs.sweep.space import RUN, values_of
from ray_jobs.sweep.trials import data_title


def variety(sweep: SweepConfig, section: str) -> list[RunConfig]:
    """Runs that have between them all that trials may have in a section of a run, such as scaling or data.

    One for each content of the section, of the trials that are known beforehand and the corners of the space.
    """
    search = make_search(sweep, 1)
    first = sweep.trial(search.suggest(0, {}), 0)
    if not any(key == RUN or key.partition(".")[0] == section for key in sweep.space):
        return [first]
    settings = range(0, search.n_trials, max(1, len(sweep.seeds)))
    known = (search.suggest(index, {}) for index in settings if not search.needs(index))
    found: dict[str, RunConfig] = {}
    for values in itertools.chain(known, map(values_of, sweep.corners())):
        config = sweep.trial(values, 0)
        found.setdefault(getattr(config, section).model_dump_json(), config)
    return list(found.values())


def cpus_at_once(sweep: SweepConfig, max_concurrent: int | None) -> int:
    """CPUs that a local Ray needs, so that as many of the largest trials as were asked for share this machine."""
    cpus = [config.scaling.most_workers * config.scaling.cpus_per_worker for config in variety(sweep, "scaling")]
    return math.ceil(max(cpus) * (max_concurrent or 1))


def data_titles(sweep: SweepConfig) -> list[str]:
    """The data sets that trials are on; there is a winner on each."""
    return list(dict.fromkeys(data_title(config.data) for config in variety(sweep, "data")))


def check_one_winner(sweep: SweepConfig, name: str | None) -> None:
    """A sweep that registers its winner has one.

    Raises:
        ConfigError: it will have one on each of several data sets.
    """
    titles = data_titles(sweep)
    if name is not None and len(titles) > 1:
        raise ConfigError(
            f"--register {name}: the trials are on {len(titles)} data sets ({', '.join(titles)}), each with a winner "
            "of its own: register from a sweep over one of them"
        )
