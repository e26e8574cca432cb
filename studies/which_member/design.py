"""What is compared: tasks, methods, and how much each gets. Pure: everything here is a sweep file as plain values.

At equal evaluations every trial has the gradient evaluations that `epochs` epochs cost the base optimizer; at equal
steps it has the epochs, which is fair where workers would be idle otherwise. It is read where early stopping by
validation loss would have stopped it, the base optimizer's too. Every method has the same number of settings drawn,
over its own rho, lam, n and the base optimizer's rate; the best by validation loss is trained anew from other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

METRIC = "loss/early_validation"
BASELINES = ("base", "sam")
Values = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much of it is done.

    epochs: of the base optimizer, by data set. draws: settings of each method. finalists: methods trained anew, beside
    the baselines.
    """

    epochs: Mapping[str, int]
    draws: int
    finalists: int
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Data, model and base optimizer."""

    data: Values
    model: Values
    base: Values
    rates: tuple[float, float]
    schedule: str


ADAM, SGD = {"name": "adam"}, {"name": "sgd", "momentum": 0.9}
ADAM_RATES, SGD_RATES = (3e-4, 3e-3), (0.01, 0.2)
MLP, CONVNET, TRANSFORMER = {"name": "mlp"}, {"name": "convnet"}, {"name": "transformer"}
FASHION: Values = {"name": "fashion_mnist", "fraction": 0.1}
NOISE = 0.2
VALIDATION = 0.2  # of the training set; a setting is chosen by them: 288 digits, 800 of MNIST, 1,200 of Fashion-MNIST

TASKS = {
    "digits-convnet": Task({"name": "digits"}, CONVNET, SGD, SGD_RATES, "cosine"),  # with BatchNorm
    "mnist5k": Task({"name": "mnist5k"}, MLP, ADAM, ADAM_RATES, "constant"),  # the paper's 6 layers of 128
    "mnist5k-noise": Task({"name": "mnist5k", "label_noise": NOISE}, MLP, SGD, SGD_RATES, "cosine"),
    "fashion": Task(FASHION, MLP, SGD, SGD_RATES, "constant"),
    "fashion-noise": Task({**FASHION, "label_noise": NOISE}, MLP, ADAM, ADAM_RATES, "cosine"),
    "digits-transformer": Task({"name": "digits"}, TRANSFORMER, ADAM, ADAM_RATES, "cosine"),
}

WHOLE = Scale(
    {"digits": 24, "mnist5k": 30, "fashion_mnist": 21},
    draws=7,
    finalists=3,
    seeds=tuple(range(100, 110)),
    tasks=tuple(TASKS),
)
QUICK = Scale(
    {"digits": 10, "mnist5k": 10}, draws=2, finalists=1, seeds=(100, 101), tasks=("digits-convnet", "mnist5k")
)

GAUSSIAN: Values = {"name": "gaussian"}
CURVATURE: Values = {"measures": ["frobenius_squared", "trace"], "examples": 512, "probes": 10, "precision": "float32"}
SYMMETRIC: Values = {**GAUSSIAN, "symmetric": True}
CUBE: Values = {"name": "hypercube", "half_width": 0.01}  # the paper's: delta is then as small as its rho = 1 has it


@dataclass(frozen=True)
class Method:
    """optimizer: its section but for what is drawn. Ranges are of log_uniform; n: choices. adam: needs it as base."""

    optimizer: Values
    rho: tuple[float, float] | None = None
    lam: tuple[float, float] | None = None
    n: tuple[int, ...] = ()
    adam: bool = False

    @property
    def ranges(self) -> Values:
        """By the name of the setting."""
        return {"rho": self.rho, "lam": self.lam, "n_samples": self.n}


METHODS = {
    "base": Method({"measure": "sgd"}),
    # the paper's
    "sam": Method({"measure": "sam"}, rho=(0.02, 1.0)),
    "asam": Method({"measure": {"name": "asam", "eta": 0.01}}, rho=(0.1, 5.0)),
    "ssam": Method({"measure": "ssam"}, rho=(0.02, 1.0)),
    "trace": Method({"measure": "trace", "noise": GAUSSIAN}, rho=(0.005, 0.1), lam=(0.1, 1.0), n=(1, 2)),
    "frobenius": Method({"measure": "frobenius"}, rho=(0.003, 0.05), lam=(1e-3, 0.1), n=(2, 4)),
    "determinant": Method({"measure": "determinant", "noise": CUBE}, rho=(0.3, 10.0), lam=(0.05, 0.5), n=(2, 4)),
    # other noise
    "trace-antithetic": Method(
        {"measure": "trace", "noise": {**GAUSSIAN, "antithetic": True}}, rho=(0.005, 0.1), lam=(0.1, 1.0), n=(2, 4)
    ),
    "trace-symmetric": Method({"measure": "trace", "noise": SYMMETRIC}, rho=(0.01, 0.1), lam=(0.1, 1.0), n=(1, 2)),
    "trace-adaptive": Method(
        {"measure": "trace", "noise": {**GAUSSIAN, "adaptive": 0.01}}, rho=(0.03, 1.0), lam=(0.1, 1.0), n=(1, 2)
    ),
    "trace-preconditioned": Method(
        {"measure": "trace", "noise": {**GAUSSIAN, "preconditioned": {}}}, (0.005, 0.1), (0.1, 1.0), (1, 2), adam=True
    ),
    "frobenius-symmetric": Method(
        {"measure": "frobenius", "noise": SYMMETRIC}, rho=(0.01, 0.1), lam=(1e-4, 1e-2), n=(2, 3)
    ),
    # other measures
    "log-determinant": Method(
        {"measure": "log_determinant", "noise": CUBE}, rho=(0.3, 10.0), lam=(0.05, 0.5), n=(2, 4)
    ),
    "average": Method({"measure": "trace", "noise": GAUSSIAN, "lam": 1.0}, rho=(0.005, 0.1), n=(1,)),  # w_0 = 0
    # less work a step, or at another time
    "trace-every": Method(
        {"measure": "trace", "noise": GAUSSIAN, "every": 4}, rho=(0.005, 0.1), lam=(0.03, 0.25), n=(1, 2)
    ),
    "trace-fading": Method(
        {"measure": "trace", "noise": GAUSSIAN, "lam_schedule": "cosine"}, rho=(0.005, 0.1), lam=(0.1, 1.0), n=(1, 2)
    ),
    "trace-growing": Method(
        {"measure": "trace", "noise": GAUSSIAN, "n_early": 1}, rho=(0.005, 0.1), lam=(0.1, 1.0), n=(3, 4)
    ),
    "sam-every": Method({"measure": "sam", "every": 3, "lam": 1 / 3}, rho=(0.02, 1.0)),  # SAM itself in each third step
}


def _with(method: str, n: int) -> Method:
    """A method with n settled."""
    of = METHODS[method]
    return Method({**of.optimizer, "n_samples": n}, of.rho, of.lam)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What is equal for all methods.

    part: of a sweep's name. tasks: of those that a scale has; none given: all. every: all methods are trained anew.
    """

    title: str
    part: str
    resource: str
    methods: Mapping[str, Method]
    tasks: tuple[str, ...]
    every: bool = False

    def of(self, task: Task) -> dict[str, Method]:
        """The methods that its base optimizer allows."""
        return {name: method for name, method in self.methods.items() if task.base["name"] == "adam" or not method.adam}


EVALUATIONS = Comparison("equal gradient evaluations", "", "gradient_evaluations", METHODS, tuple(TASKS))
# n + 1 points: as many workers take a step in the time of one, where the batch is too small to be shared by them
STEPS = Comparison(
    "equal steps",
    "steps-",
    "epochs",
    {
        "base": METHODS["base"],
        "sam": METHODS["sam"],
        "trace-1": _with("trace", 1),
        "trace-3": _with("trace", 3),
        "trace-8": _with("trace", 8),
        "frobenius-8": _with("frobenius", 8),
    },
    ("mnist5k", "digits-convnet"),
    every=True,
)
COMPARISONS = (EVALUATIONS, STEPS)


def tuning(comparison: Comparison, name: str, scale: Scale, root: str | None) -> Values:
    """The sweep that draws settings of every method on one task.

    root: the folder of Fashion-MNIST's files.
    """
    task = TASKS[name]
    methods = comparison.of(task)
    space: Values = {
        "run": {"grid": list(methods)},
        "optimizer.base.lr": {"log_uniform": list(task.rates)},
    }
    for key, kind in (("rho", "log_uniform"), ("lam", "log_uniform"), ("n_samples", "choice")):
        drawn = {method: values for method in methods if (values := methods[method].ranges[key])}
        if drawn:
            space[f"optimizer.{key}"] = [
                {kind: list(values), "when": {"description": method}} for method, values in drawn.items()
            ]
    return {
        **_common(comparison, name, "tuning", {m: _run(comparison, name, m, scale, root) for m in methods}),
        "space": space,
        "search": {"name": "random", "trials": scale.draws, "seed": 0},
    }


def finals(comparison: Comparison, name: str, scale: Scale, root: str | None, chosen: Mapping[str, Values]) -> Values:
    """The sweep that trains chosen settings from new seeds. chosen: method -> dotted key -> value."""
    task = TASKS[name]
    runs = {}
    for method, values in chosen.items():
        run = _run(comparison, name, method, scale, root)
        for key, value in values.items():
            section = run
            *path, last = key.split(".")
            for part in path:
                section = section[part]
            section[last] = value
        run["sharpness"] = {**CURVATURE, "every": max(1, scale.epochs[task.data["name"]] // 8)}
        runs[method] = run
    return {
        **_common(comparison, name, "finals", runs),
        "space": {"run": {"grid": list(runs)}},
        "seeds": list(scale.seeds),
    }


def finalists(comparison: Comparison, scores: Mapping[str, float], scale: Scale) -> list[str]:
    """The baselines, and the best others by validation loss: the lower the better."""
    if comparison.every:
        return list(scores)
    others = sorted((method for method in scores if method not in BASELINES), key=lambda method: scores[method])
    return [*(method for method in BASELINES if method in scores), *others[: scale.finalists]]


def sweep_name(comparison: Comparison, task: str, stage: str) -> str:
    """stage: tuning or finals."""
    return f"which-member/{task}/{comparison.part}{stage}"


def _common(comparison: Comparison, task: str, stage: str, runs: Values) -> Values:
    return {
        "name": sweep_name(comparison, task, stage),
        "runs": runs,
        "metric": METRIC,
        "resource": comparison.resource,
        "in_process": True,
        "max_concurrent": 2,
    }


def _run(comparison: Comparison, name: str, method: str, scale: Scale, root: str | None) -> Values:
    task = TASKS[name]
    data = {**task.data, "validation_fraction": VALIDATION}
    if data["name"] == "fashion_mnist" and root is not None:
        data["root"] = root
    optimizer = {"base": {**task.base, "lr": task.rates[0]}, **comparison.methods[method].optimizer}
    return {
        "name": f"{name}-{method}",
        "description": method,
        "data": data,
        "model": task.model,
        "optimizer": optimizer,
        "schedule": task.schedule,
        "training": {"epochs": scale.epochs[task.data["name"]]},
        "scaling": {"num_workers": 1, "use_gpu": False},
        "checkpoint": {"every_epochs": 10},
        "tracking": {"tags": {"study": "which_member", "task": name}},
    }
