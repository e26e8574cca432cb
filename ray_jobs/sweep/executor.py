"""Ray Tune carries out what the ledger decides: a searcher that hands out legs, a scheduler that stops them.

A leg is one run of a trial's process: from its start, or its newest checkpoint, to its end, or to its generation's. To
Tune each leg is a trial of its own; which of ours it belongs to, and all that must outlast a driver, the journal says.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol

from ray import PlacementGroupID, tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup, remove_placement_group

from ray_jobs.sweep.trial import TrainTrial

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files beside MLflow
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the driver's
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",  # the journal is the state
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
RESOURCES = {"node:__internal_head__": 0.001}  # a leg's own process asks for next to nothing; its workers for the rest


def train_environment() -> dict[str, str]:
    """What Ray Train's controller reads; on a cluster a leg's process does not have the driver's environment."""
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}


class Conductor(Protocol):
    """What the driver is to Tune."""

    board: Any  # the handle that workers tell progress to

    @property
    def over(self) -> bool:
        """No leg will be needed any more."""

    def next_leg(self) -> dict[str, Any] | None:
        """Settings of the next leg that may start now, as JSON values; see `TrainTrial`."""

    def told(self, trial: int, event: dict[str, Any]) -> bool:
        """Takes an event of a leg; whether the leg goes on."""

    def died(self, trial: int, cause: str) -> None:
        """A leg's process is gone."""


def free(placement_group: str) -> None:
    """Gives back what the workers of a dead process held: Ray does so only when the whole job ends."""
    remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(placement_group)))


def run(conductor: Conductor, folder: Path) -> None:
    """Until the conductor is over. An error of the conductor's own ends the run and is raised as it is."""
    os.environ.update(ENVIRONMENT)
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    errors: list[BaseException] = []
    tuner = tune.Tuner(
        tune.with_resources(TrainTrial, RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=_Legs(conductor, errors),
            scheduler=_Stopper(conductor, errors),
            num_samples=-1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            verbose=0,
            callbacks=[],
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )
    try:
        tuner.fit()
    except Exception:
        if not errors:
            raise
    if errors:
        raise errors[0]


class _Unsaved:
    """Tune pickles and copies its searcher and scheduler to restore them; ours have nothing to restore."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class _Legs(_Unsaved, Searcher):
    def __init__(self, conductor: Conductor, errors: list[BaseException]) -> None:
        super().__init__()
        self._conductor, self._errors = conductor, errors

    def suggest(self, trial_id: str) -> Any:
        if self._errors or self._conductor.over:
            return Searcher.FINISHED
        try:
            leg = self._conductor.next_leg()
        except Exception as error:
            self._errors.append(error)
            raise
        return None if leg is None else {"trial": leg["trial"], "leg": json.dumps(leg), "board": self._conductor.board}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Told by the scheduler already."""

    def save(self, checkpoint_path: str) -> None:
        """See _Unsaved."""

    def restore(self, checkpoint_path: str) -> None:
        """See _Unsaved."""


class _Stopper(_Unsaved, FIFOScheduler):
    def __init__(self, conductor: Conductor, errors: list[BaseException]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._conductor, self._errors = conductor, errors

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Tune tells an event of a leg: on with it, or its end."""
        try:
            goes_on = self._conductor.told(trial.config["trial"], json.loads(result["event"]))
        except Exception as error:
            self._errors.append(error)
            raise
        if goes_on:
            return TrialScheduler.CONTINUE
        # Tune keeps the process for the next leg and would stop this one's workers only then.
        process = trial.temporary_state.ray_actor
        if process is not None:
            process.cleanup.remote()
        return TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        cause = str(trial.get_error() or "its process died").strip().splitlines()[-1]
        try:
            self._conductor.died(trial.config["trial"], cause)
        except Exception as error:
            self._errors.append(error)
            raise
