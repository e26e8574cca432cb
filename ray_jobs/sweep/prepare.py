"""What must be known before trials start: whether data, models and the cluster can give what is asked."""

from __future__ import annotations

import math
from collections.abc import Iterable

import ray

from ray_jobs.cluster import checked_resources
from ray_jobs.config import RunConfig
from ray_jobs.data import Dataset, load_dataset
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.journal import Event
from ray_jobs.sweep.config import SweepConfig
from ray_jobs.sweep.search import Search
from ray_jobs.sweep.variety import variety
from ray_jobs.tracking import provenance
from ray_jobs.train import check_fit
from ray_jobs.user_code import OwnCode, changed


class Checks:
    """Of trials, one after the other; what they share is looked at once."""

    def __init__(self) -> None:
        self._datasets: dict[str, Dataset] = {}
        self._fits: set[str] = set()
        self._provenance: dict[str, dict[str, str]] = {}
        self._gpu: dict[str, bool] = {}

    def dataset(self, config: RunConfig) -> Dataset:
        """The data set, loaded (and downloaded) once for all trials that have the same.

        Raises:
            ConfigError: it is not there, or damaged.
        """
        key = f"{config.data.model_dump_json()} {config.training.seed}"
        if key not in self._datasets:
            self._datasets[key] = load_dataset(config.data, config.training.seed)
        return self._datasets[key]

    def use_gpu(self, config: RunConfig) -> bool:
        """Whether a trial's workers use GPUs.

        Raises:
            ConfigError: the cluster cannot hold them.
        """
        if len(config.scaling.sizes) > 1:
            raise ConfigError("scaling.num_workers must be a number in a sweep: its trials share what the cluster has")
        key = config.scaling.model_dump_json()
        if key not in self._gpu:
            self._gpu[key] = checked_resources(config)
        return self._gpu[key]

    def tags(self, config: RunConfig) -> dict[str, str]:
        """A trial's provenance.

        Raises:
            ConfigError: its model, batch, data or workers do not fit each other.
        """
        use_gpu, dataset = self.use_gpu(config), self.dataset(config)
        optimizer = config.optimizer
        parts = (config.data, config.model, config.scaling, config.training, optimizer.measure)
        words = (dataset.fingerprint, optimizer.n_samples, config.sharpness)
        fit = " ".join([*map(str, words), *(part.model_dump_json() for part in parts)])
        if fit not in self._fits:
            check_fit(config, dataset)
            self._fits.add(fit)
        if dataset.fingerprint not in self._provenance:
            self._provenance[dataset.fingerprint] = provenance(dataset.fingerprint)
        own = OwnCode.of(config).tags()
        return {**self._provenance[dataset.fingerprint], **own, "device": "cuda" if use_gpu else "cpu"}

    def data(self, sweep: SweepConfig) -> list[str]:
        """The fingerprints of all data that trials may be on, by their first seed; looked at before the first starts.

        Raises:
            ConfigError: some are not there, or damaged; names all of them.
        """
        fingerprints: dict[str, None] = {}
        missing: dict[str, None] = {}
        for config in variety(sweep, "data"):
            try:
                fingerprints[self.dataset(config).fingerprint] = None
            except ConfigError as error:
                missing[str(error)] = None
        if missing:
            raise ConfigError("\n".join([f"sweep {sweep.name}: not all of its data is there", *missing]))
        return list(fingerprints)

    def same_data(self, sweep: SweepConfig, events: Iterable[Event]) -> None:
        """A sweep goes on with what it began with.

        Raises:
            ConfigError: a data set is not there any more.
            RunError: one has changed since a trial began.
        """
        for event in events:
            if event["event"] != "start" or event.get("data") is None:
                continue
            config = sweep.trial(event["values"], event["trial"])
            now = self.dataset(config).fingerprint
            if now != event["data"]:
                raise RunError(
                    f"trial {event['trial']} of {sweep.name} began on data with fingerprint {event['data']}, but "
                    f"{config.data.name} is {now} now: the data files changed, so the sweep cannot go on as if they "
                    "had not"
                )

    def changed_code(self, sweep: SweepConfig, events: Iterable[Event]) -> str | None:
        """What there is to say where the user's own code is not what trials began with."""
        for event in events:
            if event["event"] == "start" and event.get("code"):
                config = sweep.trial(event["values"], event["trial"])
                if told := changed(event["code"], OwnCode.of(config).fingerprint):
                    return f"trial {event['trial']}: {told}"
        return None

    def known_trials(self, sweep: SweepConfig, search: Search) -> None:
        """Every trial whose values do not wait for results, before the first starts.

        Raises:
            ConfigError: one of them cannot run.
        """
        for index in range(search.n_trials):
            if search.needs(index):
                break
            config = sweep.trial(search.suggest(index, {}), index)
            try:
                self.tags(config)
            except ConfigError as error:
                raise ConfigError(f"trial {index} of {sweep.name}: {error}") from error


def concurrency(configs: Iterable[RunConfig], checks: Checks, asked: int | None) -> int:
    """How many trials run at once: what was asked for, else what the cluster has place for.

    Raises:
        ConfigError: the cluster has no place for so many.
    """
    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    places = math.inf
    needs = ""
    for config in configs:
        scaling, use_gpu = config.scaling, checks.use_gpu(config)
        wants = {"CPU": scaling.most_workers * scaling.cpus_per_worker}
        if use_gpu:
            wants["GPU"] = scaling.most_workers * scaling.gpus_per_worker
        for kind, amount in wants.items():
            fit = math.floor(have.get(kind, 0) / amount)
            if fit < places:
                places, needs = fit, f"{amount:g} {kind}s, and the cluster has {have.get(kind, 0):g}"
    if asked is not None and asked > places:
        raise ConfigError(
            f"{asked} trials at once: a trial needs {needs}, which is place for {places}; lower --max-concurrent"
        )
    return int(places) if asked is None else asked
