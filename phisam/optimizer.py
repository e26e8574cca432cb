"""PhiSAM: a (phi, psi, mu) sharpness-aware step around any torch optimizer.

    g = sum_e w_e grad L_e            e = 0: x itself;  e = 1..n: x + rho v_e;  w from `measures.py`

A step, as `PhiSAM.step` reads: evaluate this rank's points one a round; exchange the n + 1 losses; weigh; one
all-reduce of d numbers; hand g to the base optimizer. The gradient of every point but a rank's last goes to the
rows of `gradient.py`; the last backward adds to them in .grad, with all weights known, so that DDP's all-reduce
overlaps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from phisam import checks
from phisam.agreement import check_batches_agree, check_settings_agree
from phisam.base import BaseStep
from phisam.catalogue import sgd
from phisam.closures import Closure, first, taking_parts
from phisam.evaluation import Evaluation, Evaluator, plan
from phisam.gradient import Gradients, Perturbation, Rows, add_scaled_, flatten
from phisam.guards import Buffers, Monitor, same_randomness
from phisam.layout import Layout
from phisam.masks import Masks
from phisam.measures import Measure
from phisam.noise import Noise, key
from phisam.preconditioning import check_preconditioner, second_moments
from phisam.record import StepRecord
from phisam.schedules import Schedule, Scheduled
from phisam.sharding import Deal, LossExchange, SampleMesh, Scope
from phisam.wrapping import wrapping_of


class PhiSAM(Optimizer):
    """Minimises L(x) + lam rho^2 phi( mean_i psi( (L(x + rho v_i) - L(x)) / rho^2 ) ), Definition 8 and Appendix H.

        opt = phisam.PhiSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), measure=phisam.frobenius())
        loss = opt.step(lambda: criterion(model(inputs), targets))

    Args:
        model: the module that the closure evaluates, plain, DDP-wrapped (then the closure calls the wrapper) or
            sharded by `fully_shard`.
        base_optimizer: any torch optimizer over the model's parameters. param_groups and state are shared with it,
            so schedulers work on either. A group may carry "rho_scale" (default 1), which multiplies its share of
            v; 0 leaves it unperturbed.
        measure: (phi, psi, mu).
        noise: mu in place of the measure's own; a list for one noise per component of psi.
        rho: perturbation radius, > 0: a number, or a function of the step (`phisam.schedules`). May be assigned.
        lam: factor on the sharpness term (1 is the paper); the strength on S is lam rho^2. As rho, may be a schedule.
        n_samples: draws of mu a step.
        seed: of the noise and of the dropout masks inside steps.
        mesh: `phisam.sample_mesh(...)` in a process group; None for one process.
        scope: "global": L_e is the mean over the data ranks; "shard": each data rank weighs its own losses.
        max_grad_norm: clips the norm of g, once, after the points were combined and the ranks reduced.
        every: k: steps 0, k, 2k, ... have the sharpness term, with k lam; the others are the base optimizer's.
        perturb_fraction: f: the measure sees the first part of the batch alone, also at x, so that delta compares equal
            batches: g = grad L(whole) + sum_e (w_e - [e = 0]) grad L_e(part). The closure must take `part`.
        grad_scaler: for fp16 autocast in the closure. PhiSAM scales every loss, unscales g once, skips the step on all
            ranks if it is not finite, and updates the scaler; nothing of the scaler is to be called elsewhere.

    Parameters must be float32 or float64, of one dtype on one device. torch's random generators inside closures
    are keyed by (seed, step, data rank); outside they are untouched. If a loss or gradient is inf or NaN the step
    is skipped on all ranks and counted in `skipped_steps`. On CUDA nothing in a step waits for the device if the
    base optimizer is one of torch's fused ones; with another, with FSDP2, and in the first step of fused SGD with
    momentum, the host reads one flag, after all work is queued. Before the first step ranks compare their settings.

    Raises:
        ValueError: a setting is out of range, or model, optimizer and mesh do not belong together.
    """

    rho = Scheduled(checks.check_rho)
    lam = Scheduled(checks.check_lam)
    n_samples = checks.Checked(checks.check_n_samples)
    every = checks.Checked(checks.check_every)
    perturb_fraction = checks.Checked(checks.check_perturb_fraction)

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: Optimizer,
        measure: Measure,
        noise: Noise | Sequence[Noise] | None = None,
        rho: float | Schedule = 0.01,
        lam: float | Schedule = 1.0,
        n_samples: int = 2,
        seed: int = 0,
        mesh: SampleMesh | None = None,
        scope: Scope = "global",
        max_grad_norm: float | None = None,
        every: int = 1,
        perturb_fraction: float = 1.0,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        checks.check_base(base_optimizer, max_grad_norm)
        self.model = model
        self.base_optimizer = base_optimizer
        self.mesh = mesh if mesh is not None else SampleMesh()
        self._wrapping = wrapping_of(model)
        self._layout = Layout(model, base_optimizer, self._wrapping)
        self._base_step = BaseStep(base_optimizer, self._wrapping, grad_scaler, max_grad_norm)
        self._step = 0
        self.seed = seed
        self.rho = rho
        self.lam = lam
        self.n_samples = n_samples
        self.every = every
        self.perturb_fraction = perturb_fraction
        self.scope = scope
        self.measure = measure if noise is None or not isinstance(measure, Measure) else measure.with_noise(noise)
        checks.check_mesh(model, self.mesh)
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        trained = checks.trained_parameters(list(model.parameters()), base_optimizer)
        self._wrapping.check(trained, self.mesh, self.scope)
        self._lay_out()
        self._monitor = Monitor(self._layout.parameters[0].device, overflow_expected=grad_scaler is not None)
        self._last_step: StepRecord | None = None
        self._agreed = self.mesh.world_size == 1
        if not isinstance(model, DistributedDataParallel) and not self._wrapping.reduces_every_backward:
            self.mesh.broadcast([*(p.data for p in model.parameters()), *model.buffers()])

    @property
    def measure(self) -> Measure:
        """(phi, psi, mu). May be assigned between steps, on all ranks; its Fisher masks are then made anew."""
        return self._measure

    @measure.setter
    def measure(self, measure: Measure) -> None:
        checks.check_measure(measure, self.n_samples, self.rho)
        check_preconditioner(measure, self.base_optimizer)
        self._measure, self._masks = measure, Masks(measure.noises)
        self._layout.forget()  # given masks must fit x, wherever it lies

    @property
    def scope(self) -> Scope:
        """Whose losses L_e is the mean of."""
        return self._scope

    @scope.setter
    def scope(self, scope: Scope) -> None:
        checks.check_scope(scope)
        self._scope: Scope = scope
        self._layout.forget()  # FSDP2 knows "global" alone

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
    def coming_step(self) -> int:
        """Steps taken so far: what schedules, the noise and dropout are a function of."""
        return self._step

    @property
    def gradient_evaluations_per_step(self) -> float:
        """Forward-and-backward passes over the global batch, mean over steps: n + 1, or 1 + n / k with every = k.

        Also where trace with lam = 1 leaves out the backward at x, whose weight is 0: methods are compared by n + 1.
        """
        evaluations = self.measure.evaluations(self.n_samples)
        if len(evaluations) == 1:
            return 1.0
        whole_batch = self.perturb_fraction == 1
        extra = sum(evaluations[1:]) if whole_batch else self.perturb_fraction * sum(evaluations)
        return 1 + extra / self.every

    @property
    def skipped_steps(self) -> int:
        """Steps not taken because a loss or gradient was inf or NaN. Reading it waits for the device."""
        return self._monitor.skipped_steps

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the last steps were skipped without one taken among them. Reading it waits for the device."""
        return self._monitor.skipped_in_a_row

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Tensor:  # type: ignore[override]
        """One step. The closure runs the forward pass and returns the scalar loss; it calls no backward.

        A list of closures is a list of micro-batches (gradient accumulation): each point is evaluated on all of them,
        L_e is their mean, and one graph is alive at a time. A closure may take one argument, `part`, and then evaluates
        `part(inputs)` with `part(targets)`: perturb_fraction < 1 and Fisher masks need it.

        Returns L_0 = L(x), detached. With a mesh this is collective: every rank calls it, with the same batch on
        the ranks of one data coordinate. Whatever .grad held before is dropped; afterwards it holds g.

        Raises:
            ValueError: the closure called backward, did not return a usable loss, or takes no part where one is needed.
                Parameters and buffers are then as they were before the step.
        """
        closures = taking_parts(closure, self._why_parts())
        self._lay_out()
        parameters = self._layout.parameters
        for p in self._layout.of_model:  # also those that are not trained: the last backward would add to theirs
            p.grad = None
        device = parameters[0].device
        if self._masks.due(self._step):
            self.sync_buffers()  # ranks that were not at x have old ones, which a network in evaluation mode reads
        buffers = Buffers(self.model)
        taken = None
        try:
            with same_randomness(device) as restart:
                dropout_key = key(self.seed, self._step, -1 - self.mesh.data_rank)  # negative: never that of a point
                evaluator = Evaluator(
                    self._wrapping,
                    parameters,
                    self._perturbation,
                    closures,
                    buffers,
                    lambda: restart(dropout_key),
                    self._base_step.loss_scale(device),
                )
                if not self._agreed:
                    self._check_agreement(evaluator)
                self._masks.refresh(self._step, evaluator, self.mesh)
                record, loss, losses = self._accumulate_gradient(evaluator)
            taken = self._base_step.finish_gradient(parameters, losses, self.mesh)
        finally:
            self._perturbation.release()
            buffers.settle(taken)
        self._base_step.take(taken, parameters)
        self._step += 1
        self._monitor.record(taken, record.weights[0], self.every)
        self._last_step = record
        return loss.to(parameters[0].dtype)

    def _accumulate_gradient(self, evaluator: Evaluator) -> tuple[StepRecord, Tensor, Tensor]:
        """.grad <- g = sum_e w_e grad L_e, reduced over all ranks. Returns the record, L_0, the losses of all ranks."""
        mesh, rho, parameters, rho_scales = self.mesh, self.rho, self._layout.parameters, self._layout.rho_scales
        measure, lam = (self.measure, self.every * self.lam) if self._step % self.every == 0 else (sgd(), 0.0)
        evaluations, seen, whole = plan(measure, self.n_samples, self.perturb_fraction, mesh.sample_size)
        split = seen != whole
        at_x_counts = split or measure.weight_at_x(lam) != 0  # trace and SAM with lam = 1: g has no part of grad L_0
        # FSDP2 holds a network gathered until its backward.
        x_is_loss_alone = not (at_x_counts or measure.needs_gradient or self._wrapping.reduces_every_backward)
        deal = Deal(len(evaluations), mesh.sample_size, measure.needs_gradient)
        exchange = LossExchange(mesh, deal, self.scope)
        rows = Rows(len(parameters))
        direction: Gradients | None = None
        for round in range(deal.rounds - 1):
            index = deal.evaluation(round, mesh.sample_rank)
            assert index is not None
            evaluation = evaluations[index]
            self._draw(evaluation, direction)
            loss_alone = evaluation.draw is None and x_is_loss_alone
            evaluated = evaluator.evaluate(evaluation, rho, rho_scales, last=False, loss_alone=loss_alone)
            L_e = exchange.report(round, evaluated.loss)
            if loss_alone:
                del evaluated  # the graph: a third to a half of an evaluation is saved
                continue
            gradient = evaluator.gradient(evaluated)
            if evaluation.draw is not None:
                delta = (L_e - exchange.first_losses[seen]) / rho**2
                rows.add(gradient, *measure.slopes(delta, evaluation.point))
            elif at_x_counts and (mesh.sample_rank == 0 or not deal.everywhere(round)):
                rows.add_unperturbed(index, gradient)
            if index == 0 and measure.needs_gradient:
                direction = self._direction(gradient)
            del gradient, evaluated  # d numbers that the next evaluation has room for

        round = deal.rounds - 1
        index = deal.evaluation(round, mesh.sample_rank)
        # A rank that would only wait evaluates x with weight 0, as DDP needs a backward.
        evaluation = evaluations[0 if index is None else index]
        self._draw(evaluation, direction)
        evaluated = evaluator.evaluate(evaluation, rho, rho_scales, last=True)
        exchange.report(round, evaluated.loss)
        all_losses = exchange.losses
        losses = torch.cat([all_losses[seen : seen + 1], all_losses[2:]]) if split else all_losses
        weights = by_evaluation = measure.weights(losses, rho, lam)
        if split:
            at_x = torch.stack([weights[0] - 1, torch.ones_like(weights[0])])
            by_evaluation = torch.cat([at_x if seen == 0 else at_x.flip(0), weights[1:]])
        factors = None if rows.empty else measure.factors(losses, rho, lam, rows.log_scale)
        # The reduction averages over D S ranks; the mean is over D and the sum over S.
        gradients = rows.combine(by_evaluation, factors, mesh.sample_size)
        weight = mesh.sample_size * (torch.zeros_like(weights[0]) if index is None else by_evaluation[index])
        if evaluated.partial is not None:
            add_scaled_(gradients, evaluated.partial, weight)
        self._wrapping.start_gradients(parameters, gradients)
        evaluated.graph.backward(weight.to(evaluated.graph.dtype))  # type: ignore[no-untyped-call]
        if not self._wrapping.reduces_in_backward:
            mesh.reduce_gradients(parameters)
        for p in self._layout.others:  # theirs is a piece of the last point's gradient: no use to another optimizer
            p.grad = None
        return StepRecord(losses, weights, rho, measure), all_losses[whole], exchange.everyones

    def _check_agreement(self, evaluator: Evaluator) -> None:
        """Once: the ranks have the same settings, and sample ranks the same batch."""
        settings = {
            "seed": self.seed,
            "the step counter": self._step,
            "n_samples": self.n_samples,
            "every": self.every,
            "perturb_fraction": float(self.perturb_fraction),
            "rho": self.rho,
            "lam": self.lam,
        }
        check_settings_agree(self.mesh, settings, self._layout.parameters[0].device)
        if self.mesh.sample_size > 1:
            at_x = evaluator.evaluate(Evaluation(0, first(self.perturb_fraction)), self.rho, (), last=False)
            check_batches_agree(self.mesh, at_x.loss)
        self._agreed = True

    def _draw(self, evaluation: Evaluation, direction: Gradients | None) -> None:
        if evaluation.draw is not None:
            mask = self._masks.of(evaluation.draw.noise)
            moments = partial(second_moments, self.base_optimizer, self._layout.parameters, self._wrapping)
            self._perturbation.draw(evaluation.draw, self.seed, self._step, direction, mask, moments)

    def _direction(self, gradient: Gradients) -> Gradients:
        """grad L(x) of the scope."""
        if self.scope == "shard" or self.mesh.data_size == 1 or self._wrapping.reduces_every_backward:
            return gradient
        held = self._wrapping.held(self._layout.parameters)
        mean = self.mesh.sum(flatten(gradient, held)) / self.mesh.world_size
        return [part.view(x.shape) for part, x in zip(torch.split(mean, [x.numel() for x in held]), held, strict=True)]

    def _why_parts(self) -> str | None:
        """What needs closures that take a part of the batch."""
        if self._masks.need_examples:
            return f"{self.measure.name} (its Fisher mask looks at single examples)"
        return f"perturb_fraction = {self.perturb_fraction}" if self.perturb_fraction < 1 else None

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
        """The base optimizer's state_dict, and under "phisam" what this class adds: numbers, and Fisher masks."""
        own = {
            "step": self._step,
            "seed": self.seed,
            "rho": None if PhiSAM.rho.is_scheduled(self) else self.rho,  # code, not state; it may have ended
            "lam": None if PhiSAM.lam.is_scheduled(self) else self.lam,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "masks": self._masks.state(),
        }
        return {**self.base_optimizer.state_dict(), "phisam": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes bit for bit from `state_dict()`. A schedule of rho or lam stays, and goes on at the state's step.

        Raises:
            ValueError: it is the state of another optimizer.
        """
        if "phisam" not in state_dict:
            raise ValueError(
                'load_state_dict: no "phisam" entry, so this is not the state of a PhiSAM; '
                "load the state of a bare base optimizer with opt.base_optimizer.load_state_dict(...)"
            )
        own = state_dict["phisam"]
        self._lay_out()
        self._masks.load(own.get("masks", []), self._layout.parameters[0].device)
        self.base_optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "phisam"})
        self._lay_out()
        self._step, self.seed = own["step"], own["seed"]
        if own["rho"] is not None and not PhiSAM.rho.is_scheduled(self):
            self.rho = own["rho"]
        if own["lam"] is not None and not PhiSAM.lam.is_scheduled(self):
            self.lam = own["lam"]
        self._monitor.skipped_steps = own["skipped_steps"]
        self._monitor.skipped_in_a_row = own.get("skipped_in_a_row", 0)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "PhiSAM holds the model, the process mesh and closures over both: it cannot be copied or pickled; save "
            "opt.state_dict() and load it into a new PhiSAM"
        )

    def _lay_out(self) -> None:
        """Follows the base optimizer: its groups, its state, and which parameters are trained now."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self._wrapping.moved()  # an evaluation, or a step that raised, may have left FSDP2's parameters gathered
        self._layout.follow(self._take_up)

    def _take_up(self, parameters: list[nn.Parameter], others: bool) -> None:
        """Parameters that are trained from now on, and others than before, or the same ones elsewhere in memory."""
        self._wrapping.check(parameters, self.mesh, self.scope)
        checks.check_tensors(self.model, parameters)
        d = sum(p.numel() for p in parameters)
        self._masks.lay_out(d, parameters[0].device, sharded=self._wrapping.reduces_every_backward)
        if others:  # not when memory alone moved: that may happen on one rank, and making masks is collective
            self._masks.forget()
        names = {p: name for name, p in self.model.named_parameters()}
        self._perturbation = Perturbation(
            self._wrapping.held(parameters),
            [names[p] for p in parameters],
            self._wrapping.spans(parameters),
            d,
            partial(self._wrapping.norm, mesh=self.mesh),
            self._wrapping.moved,
        )
