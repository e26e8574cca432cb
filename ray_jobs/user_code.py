"""A user's own function, `package.module:function` in a run description: found, checked, called; and its files.

    model: my_pkg.nets:make             make(input_shape, num_classes, **options) -> nn.Module
    measure: my_pkg.measures:mine       mine(**options) -> phisam.Measure, under optimizer
    data: my_pkg.data:load              load(seed, **options) -> train and test examples; see own_data.py

Whatever is wrong is a ConfigError with the line that it is wrong in: in the driver, before a worker starts.
`docs/own_code.md` is the user's page.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import pkgutil
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import phisam
from phisam.checks import check_measure
from ray_jobs.config import DataConfig, ModelConfig, RunConfig
from ray_jobs.errors import ConfigError, first_line
from ray_jobs.explain import nearest
from ray_jobs.optimizer_config import MeasureConfig, OwnMeasure
from ray_jobs.section import is_own
from ray_jobs.yaml_source import shown

ANY_SEED = 0
CODE_TAG = "code.fingerprint"

logger = logging.getLogger("phisam")


@dataclass(frozen=True)
class OwnFunction:
    """A function that a description names.

    key: where, such as "model"; name: package.module:function; options: its keyword arguments.
    """

    key: str
    name: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.key}.name = {self.name}"

    @property
    def module(self) -> str:
        """package.module"""
        return self.name.partition(":")[0]

    def call(self, seed: int, *arguments: Any) -> Any:
        """What it returns for these arguments and the options.

        torch's, numpy's and Python's generators begin at the seed, and go on afterwards as if nothing had been drawn.

        Raises:
            ConfigError: there is no such function, it does not take these arguments, or it raised something.
        """
        function = self._found()
        self._check_signature(function, arguments)
        with self.blamed(), seeded(seed):
            return function(*arguments, **self.options)

    def check(self, *arguments: Any) -> None:
        """Whether it is there and takes such arguments; it is not called.

        Raises:
            ConfigError: it is not, or does not.
        """
        self._check_signature(self._found(), arguments)

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """What is raised inside is the function's own, and told with its line.

        Raises:
            ConfigError: something was.
        """
        try:
            yield
        except Exception as error:
            raise ConfigError(
                f"{self}: it raised {type(error).__name__}: {first_line(error)}{self._line(error)}. "
                "--verbose shows the traceback"
            ) from error

    def refused(self, what: str) -> ConfigError:
        """For a value that it must not return."""
        return ConfigError(f"{self}: {what}")

    def _found(self) -> Callable[..., Any]:
        attribute = self.name.partition(":")[2]
        if (package := self.module.partition(".")[0]) in sys.stdlib_module_names:  # os:system makes no network
            raise ConfigError(f"{self}: {package} is a module of Python itself: name a function of your own module")
        here = os.getcwd()
        if here not in sys.path:  # as `python -m` has it, and as Ray gives it to the workers
            sys.path.insert(0, here)
        importlib.invalidate_caches()
        try:
            with self.blamed():
                module = importlib.import_module(self.module)
        except ConfigError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError) and f"{self.module}.".startswith(f"{cause.name}."):
                raise self._no_module(str(cause.name)) from None
            raise
        function = getattr(module, attribute, None)
        if function is None:
            near = nearest(attribute, [name for name, value in vars(module).items() if callable(value)])
            raise ConfigError(f"{self}: {module.__file__} has no {attribute!r}.{near}")
        if not callable(function):
            raise ConfigError(f"{self}: {attribute} is {shown(function)}, which cannot be called: name a function")
        found: Callable[..., Any] = function
        return found

    def _no_module(self, absent: str) -> ConfigError:
        parent = absent.rpartition(".")[0]
        folders = getattr(sys.modules[parent], "__path__", ()) if parent else [os.getcwd()]
        known = [".".join(filter(None, (parent, found.name))) for found in pkgutil.iter_modules(folders)]
        return ConfigError(
            f"{self}: there is no module {absent}.{nearest(absent, known)} Looked in the current directory, "
            f"{os.getcwd()}, and in Python's path: run phisam where {absent.partition('.')[0]} lies, put its folder on "
            "PYTHONPATH, or install it with pip"
        )

    def _check_signature(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            signature = inspect.signature(function)
        except ValueError:  # of one written in C, nothing is known
            return
        try:
            signature.bind(*arguments, **self.options)
        except TypeError as error:
            wrong = next((name for name in self.options if f"'{name}'" in str(error)), None)
            near = nearest(wrong, signature.parameters) if wrong and wrong not in signature.parameters else ""
            names = ARGUMENTS[self.key]
            called = ", ".join([*names, *(f"{name}={shown(value)}" for name, value in self.options.items())])
            theirs = f"arguments other than ({', '.join(names)})" if names else "its arguments"
            file, line = _where(function)
            raise ConfigError(
                f"{self}: it is called with ({called}), but {error}.{near} It is defined as "
                f"{self.name.partition(':')[2]}{signature}{f' in {file}:{line}' if file else ''}; {theirs} "
                f"stand under {self.key}.options"
            ) from None

    def _line(self, error: BaseException) -> str:
        """ " at nets.py:12: layers = width / 0": the innermost line of the user's own package."""
        if isinstance(error, SyntaxError) and error.filename:
            return f" at {error.filename}:{error.lineno}: {(error.text or '').strip()}"
        roots = tuple(f"{folder}{os.sep}" for folder in self._folders()) + tuple(map(str, self._files()))
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if roots and os.path.realpath(frame.filename).startswith(roots)]
        return f" at {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""

    def _spec(self) -> Any:
        with contextlib.suppress(ImportError, ValueError):
            return importlib.util.find_spec(self.module.partition(".")[0])
        return None

    def _folders(self) -> list[Path]:
        """Of the outermost package; none where that is a single file."""
        return [Path(folder).resolve() for folder in getattr(self._spec(), "submodule_search_locations", None) or ()]

    def _files(self) -> list[Path]:
        """Of the outermost package: all of its Python files."""
        if folders := self._folders():
            return sorted(file for folder in folders for file in folder.rglob("*.py"))
        spec = self._spec()
        return [Path(spec.origin).resolve()] if spec is not None and spec.has_location and spec.origin else []

    def path(self) -> list[str]:
        """The folders to look for it in, as sys.path has them."""
        return [str(place.parent) for place in self._folders() or self._files()]

    def contents(self) -> Iterator[bytes]:
        """Name and content of each of its files."""
        for file in self._files():
            yield f"{file.name}\n".encode() + file.read_bytes()


ARGUMENTS = {"model": ("input_shape", "num_classes"), "optimizer.measure": (), "data": ("seed",)}
"""What the functions get beside their options, by position."""


def data_function(config: DataConfig) -> OwnFunction:
    """data.root, if there is one, is its option `root`: an absolute path, since workers run elsewhere."""
    return OwnFunction("data", config.name, config.options | ({} if config.root is None else {"root": config.root}))


def model_function(config: ModelConfig) -> OwnFunction:
    """The user's function behind a network."""
    return OwnFunction("model", config.name, config.options)


def measure_function(config: MeasureConfig) -> OwnFunction:
    """The user's function behind a measure."""
    assert isinstance(config, OwnMeasure)
    return OwnFunction("optimizer.measure", config.name, config.options)


def own_functions(config: RunConfig) -> list[OwnFunction]:
    """The user's functions that a description names."""
    return [
        *([data_function(config.data)] if is_own(config.data.name) else []),
        *([model_function(config.model)] if is_own(config.model.name) else []),
        *([measure_function(config.optimizer.measure)] if is_own(config.optimizer.measure.name) else []),
    ]


def check_own(config: RunConfig) -> None:
    """Whether the user's functions are there and take what they will get; none is called.

    Raises:
        ConfigError: one is not, or does not.
    """
    for function in own_functions(config):
        function.check(*ARGUMENTS[function.key])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's, numpy's and Python's generators begin at the seed, and go on afterwards as if nothing had been drawn."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _where(function: Callable[..., Any]) -> tuple[str | None, int]:
    try:
        return inspect.getsourcefile(function), inspect.getsourcelines(function)[1]
    except (OSError, TypeError):
        return None, 0


# what the functions return


def own_model(config: ModelConfig, input_shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """The network that the user's function makes: images (B, *input_shape) -> logits (B, num_classes).

    Raises:
        ConfigError: it makes something else.
    """
    function = model_function(config)
    model = function.call(seed, input_shape, num_classes)
    if not isinstance(model, nn.Module):
        raise function.refused(f"it must return a torch.nn.Module, not {shown(model)}")
    if not any(p.requires_grad for p in model.parameters()):
        raise function.refused("its network has no parameter that can be trained")
    place = torch.empty(0).device  # the CPU, or what the caller builds networks on
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device != place:
            raise function.refused(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}; return the network in "
                "float32 on the CPU: workers move it, and training.precision is what it is evaluated in"
            )
    with function.blamed(), torch.no_grad():
        logits = model.eval()(torch.zeros(2, *input_shape))
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else shown(logits)
        raise function.refused(
            f"for images (2, {', '.join(map(str, input_shape))}) its network must return logits (2, {num_classes}), "
            f"not {got}"
        )
    return model.train()


def own_measure(config: MeasureConfig, n_samples: int) -> phisam.Measure:
    """The measure that the user's function makes, seen to weigh the losses of a step with n_samples draws.

    Raises:
        ConfigError: it makes something else.
    """
    function = measure_function(config)
    measure = function.call(ANY_SEED)
    if not isinstance(measure, phisam.Measure):
        raise function.refused(f"it must return a phisam.Measure(phi=..., psi=..., noise=...), not {shown(measure)}")
    with function.blamed():
        check_measure(measure, n_samples, 1.0)
        losses = torch.linspace(1, 2, measure.n_points(n_samples) + 1, dtype=torch.float64)
        weights = measure.weights(losses, 1.0, 1.0)
    if not torch.isfinite(weights).all() or abs(float(weights.sum()) - 1) > 1e-6:
        raise function.refused(
            f"for the losses {losses.tolist()} and rho = 1 the weights of the gradients are {weights.tolist()}; they "
            "must be finite and sum to 1: look at phi and psi where delta is between 0 and 1"
        )
    return measure


# the files


@dataclass(frozen=True)
class OwnCode:
    """Where the user's modules lie, and what was in them: goes with a run to its workers.

    path: for sys.path. fingerprint: sha256 over their files, in hex; "" where a run names none.
    """

    path: tuple[str, ...]
    fingerprint: str

    @classmethod
    def of(cls, config: RunConfig) -> OwnCode:
        """The code behind a description, as it is now."""
        functions = own_functions(config)
        if not functions:
            return cls((), "")
        path = dict.fromkeys(folder for function in functions for folder in function.path())
        digest = hashlib.sha256()
        for part in sorted({part for function in functions for part in function.contents()}):
            digest.update(part)
        return cls(tuple(path), digest.hexdigest())

    def settings(self) -> dict[str, Any]:
        """JSON values that `arrive` takes."""
        return asdict(self)

    def tags(self) -> dict[str, str]:
        """What a run's tags say of it."""
        return {CODE_TAG: self.fingerprint} if self.fingerprint else {}


def arrive(config: RunConfig, settings: Mapping[str, Any] | None) -> None:
    """In a worker, before the user's functions are called: they are found where the driver found them.

    settings: `OwnCode.settings()` of the driver. Warns if the code is another by now.
    """
    if settings is None or not own_functions(config):
        return
    sys.path.extend(folder for folder in settings["path"] if folder not in sys.path)
    if warning := changed(settings["fingerprint"], OwnCode.of(config).fingerprint):
        logger.warning(warning)


def changed(before: str | None, now: str) -> str | None:
    """What there is to say where the user's code is not what a run began with."""
    if before in (None, "", now):
        return None
    return (
        f"your own code has changed since the run began (fingerprint {str(before)[:12]}, now {now[:12]}): from here on "
        "it trains with the new code, and an undisturbed run would not have"
    )
