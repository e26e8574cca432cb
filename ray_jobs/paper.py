"""The cells of the paper's Table 2 as recipes: paper/cifar10-frob, paper/svhn-s-ssam, paper/cifar100-det-authors, ...

A name is paper/DATA[-s]-METHOD[-authors]. Each recipe is a complete, commented YAML text, composed of what its data set
and its method say in the two tables below. -s trains on the first 10 % of the training set. -authors follows the
commands of the authors' README where they depart from section 4 and Appendix O. docs/paper.md has the paper's numbers,
and every choice where the paper is silent.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

PREFIX = "paper/"

_COMMENT_COLUMN = 30


class _DataSet(NamedTuple):
    title: str
    augment: str
    weight_decay: float
    sam_rho: float
    asam_rho: float
    asam_eta: float
    ssam_rho: float


_DATA_SETS = {
    "cifar10": _DataSet("CIFAR-10", "crop_flip", 5e-4, sam_rho=0.05, asam_rho=0.5, asam_eta=0.01, ssam_rho=0.1),
    "cifar100": _DataSet("CIFAR-100", "crop_flip", 1e-3, sam_rho=0.1, asam_rho=1.0, asam_eta=0.1, ssam_rho=0.2),
    "svhn": _DataSet("SVHN", "none", 5e-4, sam_rho=0.05, asam_rho=0.5, asam_eta=0.01, ssam_rho=0.1),
}


class _Method(NamedTuple):
    """settings: the lines under `optimizer`, with the data set's numbers in braces.

    departure: how the settings depart from the paper, also without -authors. authors_settings and authors_departure:
    the same of the authors' code, where it has other settings.
    """

    title: str
    settings: str
    workers: str
    departure: str = ""
    authors_settings: str = ""
    authors_departure: str = ""


_HYPERCUBE = """\
noise:
  name: hypercube # Appendix O: a cube with sides of 0.02, and rho = 1
  half_width: 0.01
rho: 1.0
"""
_FIRST_ORDER = "more workers share the batch: the perturbed point must wait for the gradient"

_METHODS = {
    "frob": _Method(
        "Frob-SAM",
        """\
measure: frobenius # S = squared Frobenius norm of the Hessian; unbiased, Algorithm 3
rho: 0.005 # the paper sweeps 0.005 and 0.01; its authors' README has this one
lam: 1.0e-3 # the paper sweeps 1e-4, 1e-3 and 5e-3; a quarter, if it means its code's option
n_samples: 2 # the paper sweeps 2 and 10; a step costs n + 1 = 3 gradient evaluations
""",
        "3 workers take one point of a step each, and the step stays the same",
        authors_settings="""\
measure: frobenius # S = squared Frobenius norm of the Hessian; unbiased, Algorithm 3
rho: 0.005
lam: 1.25e-3 # the README's 0.005, divided by the factor 4 that its code leaves out
n_samples: 2 # a step costs n + 1 = 3 gradient evaluations
""",
        authors_departure="lam = 0.005 / 4, since its code leaves out the factor 4 of equation (105)",
    ),
    "det": _Method(
        "Det-SAM",
        f"""\
measure: determinant # phi(t) = 1 / t^2, psi(t) = exp(-t): S is proportional to det H
{_HYPERCUBE}\
lam: 0.1 # the paper sweeps 0.01, 0.1 and 1
n_samples: 1 # section 3 samples "a point"; a step costs n + 1 = 2 gradient evaluations
""",
        "2 workers take one point of a step each, and the step stays the same",
        authors_settings=f"""\
measure:
  name: exp_product # phi(t) = 1 / t^2, psi(t) = exp(sigma t): Det-SAM with exp(-t / 2)
  sigma: -0.5
{_HYPERCUBE}\
lam: 1.0
n_samples: 1 # a step costs n + 1 = 2 gradient evaluations
""",
        authors_departure="psi(t) = exp(-t / 2) in place of exp(-t); lam = 1 in place of 0.1",
    ),
    "trace": _Method(
        "Trace-SAM",
        """\
measure: trace # phi(t) = psi(t) = t
noise: gaussian # S = tr(H) / 2; the sphere of Table 1 divides it by d, 11 million, which leaves SGD
rho: 0.01
lam: 1.0 # w_0 = 1 - lam = 0: the gradient at the perturbed point alone
n_samples: 1 # a step costs n + 1 = 2 gradient evaluations
""",
        "2 workers take one point of a step each, and the step stays the same",
        departure="Gaussian draws in place of the sphere's, as in the code behind the paper's numbers",
    ),
    "sam": _Method(
        "SAM",
        """\
measure: sam # v = grad L / ‖grad L‖; a step costs 2 gradient evaluations
rho: {sam_rho}
lam: 1.0 # w_0 = 1 - lam = 0: the gradient at the perturbed point alone
""",
        _FIRST_ORDER,
    ),
    "asam": _Method(
        "ASAM",
        """\
measure:
  name: asam # v = T^2 grad L / ‖T grad L‖ with T = |x| + eta
  eta: {asam_eta}
  scaled: all # biases and BatchNorm's parameters too, as the authors' code has it
rho: {asam_rho}
lam: 1.0 # a step costs 2 gradient evaluations
""",
        _FIRST_ORDER,
    ),
    "ssam": _Method(
        "SSAM",
        """\
measure:
  name: ssam # SSAM-F: SAM on the parameters with the largest Fisher information
  sparsity: 0.5 # the part of the parameters that stays unperturbed
  fisher_samples: 16 # examples that the mask is chosen by, anew in each epoch
rho: {ssam_rho}
lam: 1.0 # a step costs 2 gradient evaluations
""",
        _FIRST_ORDER,
    ),
    "sgd": _Method(
        "SGD",
        """\
measure: sgd # phi = 0: no perturbed point, the base optimizer alone
""",
        "more workers share the batch",
    ),
}

_RECIPE = """\
# {method} on {data_set}: a cell of the paper's Table 2. docs/paper.md has its number, and why each choice is made.
name: {name}
description: >-
{description}
data:
  name: {data}
  root: data # relative to the folder that the command runs in; download: true fetches it
  fraction: {fraction}
  validation_fraction: 0.02 # the paper speaks of none; take 0.1 to choose rho and lam by it
  augment: {augment}
model:
  name: resnet18 # the CIFAR form: a 3 x 3 stem, no max-pooling
optimizer:
  base: {{name: sgd, lr: 0.1, momentum: 0.9, weight_decay: {weight_decay}}}
{settings}\
{schedule}\
  batch_size: 128 # the GLOBAL batch, split over the data ranks
scaling:
  num_workers: 1 # {workers}
"""
_SCHEDULE = """\
schedule: {name: step, every: 10, gamma: 0.25}
training:
  epochs: 50 # the paper says so of SGD; here all seven methods have as many
"""
_AUTHORS_SCHEDULE = """\
schedule:
  name: multistep # of the README: --milestone '50|100|150', which acts two epochs late
  milestones: [52, 102, 152]
  gamma: 0.1
training:
  epochs: 200
"""
_AUTHORS_SCHEDULE_DEPARTURE = (
    "200 epochs in place of 50; lr x 0.1 from epochs 52, 102 and 152 on, counted from 0 (its milestones 50, 100 and "
    "150 act two epochs late), in place of x 0.25 every 10 epochs"
)


@dataclass(frozen=True)
class _Cell:
    data: str
    small: bool
    method: str
    authors: bool

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.data}{'-s' * self.small}-{self.method}{'-authors' * self.authors}"

    def text(self) -> str:
        """The recipe as YAML, with comments that say where each number is from."""
        data_set, method = _DATA_SETS[self.data], _METHODS[self.method]
        settings = (method.authors_settings if self.authors else "") or method.settings
        text = _RECIPE.format(
            method=method.title,
            data_set=data_set.title,
            name=self.name,
            description=textwrap.indent(textwrap.fill(self._description(), 110), "  "),
            data=self.data,
            fraction="0.1 # the first 10 % of the training set" if self.small else "1.0",
            augment=data_set.augment,
            weight_decay=data_set.weight_decay,
            settings=textwrap.indent(settings.format(**data_set._asdict()), "  "),
            schedule=_AUTHORS_SCHEDULE if self.authors else _SCHEDULE,
            workers=method.workers,
        )
        return "".join(f"{_with_comment_in_column(line)}\n" for line in text.splitlines())

    def _description(self) -> str:
        data_set, method = _DATA_SETS[self.data], _METHODS[self.method]
        part = "the first 10 % of " if self.small else ""
        start = f"{method.title}, ResNet-18 on {part}{data_set.title},"
        if not self.authors:
            departure = f". Departs from the paper: {method.departure}" if method.departure else ""
            return f"{start} after section 4 and Appendix O, 50 epochs as for SGD{departure}"
        departures = [_AUTHORS_SCHEDULE_DEPARTURE, method.authors_departure or method.departure]
        return f"{start} by the authors' README. Departs from the paper: {'; '.join(filter(None, departures))}"


_CELLS = [_Cell(*choice) for choice in product(_DATA_SETS, (False, True), _METHODS, (False, True))]

OVERVIEW = f"""\
Every cell of the paper's Table 2 (docs/paper.md) is a recipe, {PREFIX}DATA-METHOD, such as {PREFIX}cifar10-frob:
  DATA    {", ".join(_DATA_SETS)}; and with -s, as in cifar10-s, the first 10 % of it
  METHOD  {", ".join(_METHODS)}; and with -authors, as in frob-authors, by the authors' README"""


def recipes() -> dict[str, Callable[[], str]]:
    """Name -> what makes the recipe's YAML, with its comments."""
    return {cell.name: cell.text for cell in _CELLS}


def _with_comment_in_column(line: str) -> str:
    setting, mark, comment = line.partition(" # ")
    return f"{setting:{_COMMENT_COLUMN - 1}}{mark}{comment}" if mark else line
