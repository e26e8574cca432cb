"""PhiSAM: a (phi, psi, mu) sharpness-aware step around any torch optimizer.

    g = sum_e w_e grad L_e            e = 0: x itself;  e = 1..n: x + rho v_e;  w from `measures.py`

A step, as `PhiSAM.step` reads: evaluate this rank's points one a round; exchange the n + 1 losses; weigh; one
all-reduce of d numbers; hand g to the base optimizer. The gradient of every point but a rank's last goes to the
rows of `gradient.py`; the last backward adds to them in .grad, with all weights known, so that DDP's all-reduce
overlaps it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from phisam.checks import check_mesh, check_tensors, trained_parameters
from phisam.gradient import Perturbation, Rows
from phisam.guards import Buffers, Monitor, checked_loss, same_randomness
from phisam.measures import Measure
from phisam.noise import Noise, key
from phisam.sharding import LossExchange, SampleMesh, Scope, local_forward, reduces_in_backward, reducing_forward

Closure = Callable[[], Tensor]


@dataclass(frozen=True)
class StepRecord:
    """The n + 1 numbers that a step came down to: detached float64 tensors on the model's device.

    losses (n + 1,): L_0, L_1, ..., L_n.  weights (n + 1,): dF/dL, they sum to 1.  delta (n,): (L_i - L_0) / rho^2.
    sharpness (): R_rho of Definition 8, of these samples.
    """

    losses: Tensor
    weights: Tensor
    delta: Tensor
    sharpness: Tensor


class PhiSAM(Optimizer):
    """Minimises L(x) + lam rho^2 phi( mean_i psi( (L(x + rho v_i) - L(x)) / rho^2 ) ), Definition 8 and Appendix H.

        opt = phisam.PhiSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), measure=phisam.frobenius())
        loss = opt.step(lambda: criterion(model(inputs), targets))

    Args:
        model: the module that the closure evaluates, plain or DDP-wrapped (then the closure calls the wrapper).
        base_optimizer: any torch optimizer over the model's parameters. param_groups and state are shared with it,
            so schedulers work on either. A group may carry "rho_scale" (default 1), which multiplies its share of
            v; 0 leaves it unperturbed.
        measure: (phi, psi, mu).
        noise: mu in place of the measure's own; a list for one noise per component of psi.
        rho: perturbation radius, > 0. May be assigned between steps.
        lam: factor on the sharpness term (1 is the paper); the strength on S is lam rho^2. May be assigned.
        n_samples: draws of mu a step.
        seed: of the noise and of the dropout masks inside steps.
        mesh: `phisam.sample_mesh(...)` in a process group; None for one process.
        scope: "global": L_e is the mean over the data ranks; "shard": each data rank weighs its own losses.
        max_grad_norm: clips the norm of g, once, after the points were combined and the ranks reduced.

    Parameters must be float32 or float64, of one dtype on one device. torch's random generators inside closures
    are keyed by (seed, step, data rank); outside they are untouched. If a loss or gradient is inf or NaN the step
    is skipped on all ranks and counted in `skipped_steps`. On CUDA nothing in a step waits for the device if the
    base optimizer is one of torch's fused ones; with another the host reads one flag, after all work is queued.

    Raises:
        ValueError: a setting is out of range, or model, optimizer and mesh do not belong together.
    """

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: Optimizer,
        measure: Measure,
        noise: Noise | Sequence[Noise] | None = None,
        rho: float = 0.01,
        lam: float = 1.0,
        n_samples: int = 2,
        seed: int = 0,
        mesh: SampleMesh | None = None,
        scope: Scope = "global",
        max_grad_norm: float | None = None,
    ) -> None:
        if not isinstance(measure, Measure):
            raise ValueError(f"measure must be a phisam.Measure, such as phisam.frobenius(), got {measure!r}")
        if not isinstance(n_samples, int):
            raise ValueError(f"n_samples must be an integer, got {n_samples!r}")
        if isinstance(base_optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS evaluates the loss by itself and cannot be a base optimizer")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be a positive number or None, got {max_grad_norm!r}")
        if scope not in ("global", "shard"):
            raise ValueError(f'scope must be "global" or "shard", got {scope!r}')
        self.model = model
        self.base_optimizer = base_optimizer
        self.measure = measure if noise is None else measure.with_noise(noise)
        self.n_samples = n_samples
        self.seed = seed
        self.mesh = mesh if mesh is not None else SampleMesh()
        self.scope = scope
        self.rho = rho
        self.lam = lam
        self.max_grad_norm = max_grad_norm
        # A phi or psi that does not work is said now, not in a step where other ranks would wait for ever.
        self.measure.weights(torch.zeros(self.measure.n_points(n_samples) + 1), self.rho, 1.0)
        check_mesh(model, self.mesh)
        self._parameters: list[nn.Parameter] = []
        self._layout: list[tuple[int, torch.dtype, torch.device, torch.Size]] = []
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._lay_out()
        self._monitor = Monitor(self._parameters[0].device)
        self._step = 0
        self._last_step: StepRecord | None = None
        if not isinstance(model, DistributedDataParallel):
            self.mesh.broadcast([*(p.data for p in model.parameters()), *model.buffers()])

    @property
    def rho(self) -> float:
        """Perturbation radius."""
        return self._rho

    @rho.setter
    def rho(self, rho: float) -> None:
        if not (math.isfinite(rho) and rho > 0 and 0 < rho * rho < math.inf):
            raise ValueError(
                f"rho must be a positive finite number, got {rho!r}; for no perturbation use measure=phisam.sgd()"
            )
        self._rho = float(rho)

    @property
    def lam(self) -> float:
        """Factor on the sharpness term."""
        return self._lam

    @lam.setter
    def lam(self, lam: float) -> None:
        if not math.isfinite(lam):
            raise ValueError(f"lam must be a finite number, got {lam!r}; lam = 0 is the base optimizer")
        self._lam = float(lam)

    @property
    def last_step(self) -> StepRecord:
        """Losses, weights and deltas of the last step.

        Raises:
            RuntimeError: no step was taken yet.
        """
        if self._last_step is None:
            raise RuntimeError("last_step: no step was taken yet; call opt.step(closure) first")
        return self._last_step

    @property
    def gradient_evaluations_per_step(self) -> int:
        """Forward-and-backward passes over the global batch: n + 1."""
        return self.measure.n_points(self.n_samples) + 1

    @property
    def skipped_steps(self) -> int:
        """Steps not taken because a loss or gradient was inf or NaN. Reading it waits for the device."""
        return self._monitor.skipped_steps

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """One step. The closure runs the forward pass and returns the scalar loss; it calls no backward.

        Returns L_0 = L(x), detached. With a mesh this is collective: every rank calls it, with the same batch on
        the ranks of one data coordinate. Whatever .grad held before is dropped; afterwards it holds g.

        Raises:
            ValueError: the closure called backward or did not return a usable loss. Parameters and buffers are
                then as they were before the step.
        """
        if not callable(closure):
            raise ValueError(
                "step needs a closure, since it evaluates the loss at n + 1 points: "
                "opt.step(lambda: criterion(model(inputs), targets))"
            )
        self._lay_out()
        buffers = Buffers(self.model)
        taken = torch.zeros((), dtype=torch.bool, device=self._parameters[0].device)
        try:
            with same_randomness(taken.device) as restart:
                losses, weights, finite = self._accumulate_gradient(closure, buffers, restart)
            taken = finite & _all_finite([p.grad for p in self._parameters])
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
        finally:
            self._perturbation.release()
            buffers.settle(taken)
        self._base_step(taken)
        self._step += 1
        self._monitor.record(taken, weights[0])
        delta = (losses[1:] - losses[0]) / self.rho**2
        self._last_step = StepRecord(losses, weights, delta, self.measure.value(losses, self.rho))
        return losses[0].to(self._parameters[0].dtype)

    def _accumulate_gradient(
        self, closure: Closure, buffers: Buffers, restart: Callable[[int], None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """.grad <- g = sum_e w_e grad L_e, reduced over all ranks. Returns losses, weights, all losses finite."""
        mesh, measure = self.mesh, self.measure
        n_points = self.gradient_evaluations_per_step
        last = mesh.rounds(n_points) - 1
        exchange = LossExchange(mesh, n_points, self.scope)
        rows = Rows(len(self._parameters))
        for p in self.model.parameters():  # also those that are not trained: the last backward would add to theirs
            p.grad = None

        for round in range(last):
            point = mesh.point(round)
            with local_forward(self.model):
                loss = self._evaluate(closure, point, buffers, restart)
            L_e = exchange.report(round, loss.detach().double())
            gradient = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            if point == 0:
                rows.add_unperturbed(gradient)
            else:
                delta = (L_e - exchange.losses[0]) / self.rho**2
                rows.add(gradient, *measure.slopes(delta, point))

        point = mesh.point(last)
        mine = point < n_points  # else this rank would only wait: it evaluates x with weight 0, as DDP needs a backward
        with reducing_forward(self.model):
            loss = self._evaluate(closure, point if mine else 0, buffers, restart)
        exchange.report(last, loss.detach().double())
        weights = measure.weights(exchange.losses, self.rho, self.lam)
        factors = None
        if not rows.empty:
            factors = measure.factors(exchange.losses, self.rho, self.lam, rows.log_scale)
        # The reduction averages over D S ranks; the mean is over D and the sum over S.
        for p, gradient_sum in zip(self._parameters, rows.combine(weights[0], factors, mesh.sample_size), strict=True):
            p.grad = gradient_sum
        weight = weights[point] if mine else torch.zeros_like(weights[0])
        with torch.enable_grad():
            (loss * (mesh.sample_size * weight).to(loss.dtype)).backward()  # type: ignore[no-untyped-call]
        if not reduces_in_backward(self.model):
            mesh.reduce_gradients(self._parameters)
        return exchange.losses, weights, exchange.finite

    def _evaluate(self, closure: Closure, point: int, buffers: Buffers, restart: Callable[[int], None]) -> Tensor:
        """L_e with its graph, from the buffers and dropout masks that every point of this step gets."""
        if point == 0:
            self._perturbation.undo()
        else:
            scales = {p: group["rho_scale"] for group in self.param_groups for p in group["params"]}
            self._perturbation.apply(
                self.measure.noise_of(point),
                self.rho,
                [scales[p] for p in self._parameters],
                self.seed,
                self._step,
                point,
            )
        buffers.rewind()
        restart(key(self.seed, self._step, -1 - self.mesh.data_rank))  # negative: never the key of a point's noise
        with torch.enable_grad():
            loss = checked_loss(closure(), self._parameters)
        if point == 0:
            buffers.keep()
        return loss

    def _base_step(self, taken: Tensor) -> None:
        """The base optimizer's step, unless the step is skipped."""
        base = self.base_optimizer
        # torch's fused optimizers skip on the device; but their first step must not be skipped there, since fused SGD
        # makes its momentum in that step and would keep it uninitialised.
        has_momentum = any(group.get("momentum") for group in self.param_groups)
        started = not has_momentum or all(p in base.state for p in self._parameters if p.grad is not None)
        if started and getattr(base, "_step_supports_amp_scaling", False):
            base.found_inf = (~taken).float()  # type: ignore[attr-defined]
            base.grad_scale = None  # type: ignore[attr-defined]
            try:
                base.step()
            finally:
                del base.found_inf, base.grad_scale  # type: ignore[attr-defined]
        elif taken:
            base.step()

    def sync_buffers(self) -> None:
        """Collective: every rank gets the buffers of rank 0, which point 0 has moved (BatchNorm's statistics).

        Buffers do not travel during steps. Call it before ranks other than 0 evaluate the model or save it; and after
        every step if the training forward reads buffers that it changes (spectral normalisation; not BatchNorm).
        """
        self.mesh.broadcast(list(self.model.buffers()))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, with its defaults and rho_scale = 1 unless the group says otherwise."""
        if not any(param_group is group for group in self.base_optimizer.param_groups):
            self.base_optimizer.add_param_group(param_group)
        param_group.setdefault("rho_scale", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict, and under "phisam" what this class adds: numbers only."""
        own = {
            "step": self._step,
            "seed": self.seed,
            "rho": self.rho,
            "lam": self.lam,
            "skipped_steps": self.skipped_steps,
        }
        return {**self.base_optimizer.state_dict(), "phisam": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes bit for bit from `state_dict()`.

        Raises:
            ValueError: it is the state of another optimizer.
        """
        if "phisam" not in state_dict:
            raise ValueError(
                'load_state_dict: no "phisam" entry, so this is not the state of a PhiSAM; '
                "load the state of a bare base optimizer with opt.base_optimizer.load_state_dict(...)"
            )
        own = state_dict["phisam"]
        self.base_optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "phisam"})
        self._lay_out()
        self._step, self.seed, self.rho, self.lam = own["step"], own["seed"], own["rho"], own["lam"]
        self._monitor.skipped_steps = own["skipped_steps"]

    def _lay_out(self) -> None:
        """Follows the base optimizer: its groups, its state, and which parameters are trained now."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        for group in self.param_groups:
            group.setdefault("rho_scale", 1.0)
        parameters = trained_parameters(self.model, self.base_optimizer)
        layout = [(id(p), p.dtype, p.device, p.shape) for p in parameters]
        if layout != self._layout:
            self._layout = layout
            check_tensors(self.model, parameters)
            self._parameters = parameters
            self._perturbation = Perturbation(parameters)


def _all_finite(gradients: Sequence[Tensor | None]) -> Tensor:
    if all(g is None for g in gradients):
        raise ValueError("the loss depends on no parameter of the base optimizer")
    # One fused pass; a square that overflows counts as inf, as it would in Adam's second moment.
    norms = torch._foreach_norm([g for g in gradients if g is not None])
    return torch.isfinite(torch.stack(norms)).all()
