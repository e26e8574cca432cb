"""The table that every measure enters, and the small training that the contract is checked with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import phisam
from tests.phisam.cases import CASES
from tests.phisam.test_optimizer import examples, make_model

Part = Callable[[Tensor], Tensor]
NoiseOf = Callable[[nn.Module], "phisam.Noise | list[phisam.Noise]"]


@dataclass(frozen=True)
class Entry:
    """A measure and settings under which the small network trains. Masks and Dirac noises are made for a model."""

    make: Callable[[], phisam.Measure]
    noise: NoiseOf | None = None
    rho: float = 0.1
    lam: float = 0.2
    n_samples: int = 4

    @property
    def preconditioned(self) -> bool:
        """Needs a base optimizer with a second moment."""
        return self.noise is not None and "preconditioned" in getattr(self.noise(make_model()), "name", "")

    def base(self, parameters: Any, lr: float | None = None) -> torch.optim.Optimizer:
        """SGD with momentum, with lr the plain one; Adam where the noise asks for it."""
        if self.preconditioned:
            return torch.optim.Adam(parameters, lr=0.05 if lr is None else lr)
        return sgd(parameters) if lr is None else torch.optim.SGD(parameters, lr=lr)

    def optimizer(self, model: nn.Module, base: torch.optim.Optimizer | None = None, **settings: Any) -> phisam.PhiSAM:
        return phisam.PhiSAM(
            model,
            base if base is not None else self.base(model.parameters()),
            self.make(),
            **{
                "noise": None if self.noise is None else self.noise(model),
                "rho": self.rho,
                "lam": self.lam,
                "n_samples": self.n_samples,
                **settings,
            },
        )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def every_other(model: nn.Module) -> Tensor:
    """A mask over half of the parameters, the first among them."""
    return (torch.arange(size(model)) % 2 == 0).to(next(model.parameters()))


def fisher() -> Any:
    return phisam.fisher_mask(sparsity=0.5, fisher_samples=16, refresh_every=4)


OPTIONS: dict[str, NoiseOf] = {
    "symmetric": lambda _: phisam.gaussian().symmetric(),
    "antithetic": lambda _: phisam.gaussian().antithetic(),
    "adaptive": lambda _: phisam.gaussian().adaptive(eta=0.01),
    "adaptive_weights": lambda _: phisam.sphere().adaptive(scaled="weight"),
    "preconditioned": lambda _: phisam.gaussian().preconditioned(),
    "preconditioned_sphere": lambda model: (
        phisam.sphere().preconditioned(power=0.5, damping=0.3).masked(every_other(model)).symmetric()
    ),
    "masked": lambda model: phisam.gaussian().masked(every_other(model)),
    "fisher_masked": lambda _: phisam.gaussian().masked(fisher()),
    "all_options": lambda model: phisam.rademacher().adaptive(eta=0.01).masked(every_other(model)).symmetric(),
}

TABLE: dict[str, Entry] = {
    "trace": Entry(phisam.trace),
    "frobenius": Entry(phisam.frobenius, lam=0.01),
    "frobenius_biased": Entry(lambda: phisam.frobenius(unbiased=False), lam=0.01),
    "determinant": Entry(phisam.determinant),
    "log_determinant": Entry(phisam.log_determinant),
    "exp_product": Entry(lambda: phisam.exp_product(0.1)),
    "eigen_power": Entry(lambda: phisam.eigen_power(2)),
    "custom": Entry(CASES["custom"].make),
    "list_of_noises": Entry(
        lambda: phisam.Measure(
            phi=lambda t: 2 * (t[1] - t[0] ** 2),
            psi=lambda t: (t, t**2),
            noise=[phisam.gaussian(), phisam.rademacher()],
        ),
        lam=0.01,
        n_samples=2,
    ),
    "sam": Entry(phisam.sam),
    "asam": Entry(phisam.asam),
    "ssam": Entry(lambda: phisam.ssam(sparsity=0.5, fisher_samples=16, refresh_every=4)),
    "sgd": Entry(phisam.sgd),
    "trace_hypercube": Entry(phisam.trace, lambda _: phisam.hypercube(0.5)),
    "trace_dirac": Entry(phisam.trace, lambda model: phisam.dirac(every_other(model)), n_samples=1),
    "trace_gradient": Entry(phisam.trace, lambda _: phisam.gradient_direction()),
    **{f"trace_{name}": Entry(phisam.trace, noise) for name, noise in OPTIONS.items()},
    **{f"frobenius_{name}": Entry(phisam.frobenius, noise, lam=0.01) for name, noise in OPTIONS.items()},
}

UNPERTURBED = {"sgd"}
# Their direction is the gradient's, so that they stay where the gradient is zero.
ALONG_THE_GRADIENT = {"sam", "asam", "ssam", "trace_gradient"}


def closure_of(model: nn.Module, dtype: torch.dtype | None = None) -> Callable[[Part], Tensor]:
    """The loss on the shared examples; the form with `part` serves every measure."""
    x, y = examples()
    x = x.to(next(model.parameters()).device, dtype)
    y = y.to(x.device)
    return lambda part: nn.functional.cross_entropy(model(part(x)), part(y))


def evaluation_weights(opt: phisam.PhiSAM) -> Tensor:
    """The weight of each evaluation of the last step: w_e, of which the two of a symmetric pair get a half each."""
    shares = [
        share
        for e, weight in enumerate(opt.last_step.weights)
        for share in ([weight / 2] * 2 if e and opt.measure.noise_of(e).two_sided else [weight])
    ]
    return torch.stack(shares)
