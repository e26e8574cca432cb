"""One model measured: by one process, or by all processes of a group together. Training and the command both come here.

Every random vector depends on (seed, its number) alone, and the examples on the seed, so the estimates of one model do
not depend on the number of processes, up to the order of additions, nor on what was measured before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import phisam
from phisam import sharpness
from phisam.noise import key
from phisam.sharpness import Density, Estimate, Hessian
from ray_jobs.data import Dataset
from ray_jobs.errors import ConfigError
from ray_jobs.sharpness.config import GRAM_LIMIT, OF_PROBES, SharpnessConfig

BATCH = 128  # examples of one forward pass; also what workers share for eigenvalues and spectra
LEAST_PROBES = 3

Batches = list[tuple[Tensor, Tensor]]
Tell = Callable[[str, int, int], None]  # (what, done, total), on every rank


@dataclass(frozen=True)
class Measured:
    """Estimates; the loss on the same examples; the spectral density, if it was asked for; what a reader must know."""

    estimates: tuple[Estimate, ...]
    loss: float
    density: Density | None
    remarks: tuple[str, ...]

    def metrics(self) -> dict[str, float]:
        """As MLflow gets them: hessian/NAME and hessian/NAME.standard_error."""
        metrics = {}
        for estimate in self.estimates:
            metrics[f"hessian/{estimate.name}"] = estimate.value
            metrics[f"hessian/{estimate.name}.standard_error"] = estimate.standard_error
        return metrics


def measuring_batches(dataset: Dataset, examples: int, seed: int, dtype: torch.dtype = torch.float32) -> Batches:
    """(images, labels) of that many training examples, or of all there are: chosen by the seed, never augmented."""
    split = dataset.train
    generator = Generator().manual_seed(key(seed, int.from_bytes(b"sharpness"), 0))
    chosen = torch.randperm(len(split), generator=generator)[:examples].to(split.labels.device)
    normalize = dataset.normalizer(dtype)
    parts = [split[chosen[first : first + BATCH]] for first in range(0, len(chosen), BATCH)]
    return [(normalize(part.images), part.labels) for part in parts]


def measured(
    model: nn.Module,
    batches: Batches,
    wanted: SharpnessConfig,
    measure: phisam.Measure,
    seed: int,
    *,
    group: dist.ProcessGroup | None = None,
    budget: float | None = None,
    tell: Tell | None = None,
) -> Measured:
    """Everything that `wanted` names. Collective over the group.

    Args:
        measure: whose S(x) `measure` is.
        budget: seconds; what the eigenvalues and spectra leave of it decides the number of probes in place of
            `wanted.probes`, from a first chunk that is timed.

    Raises:
        Unmeasurable: see `phisam.sharpness`.
    """
    begun = time.perf_counter()
    dtype = torch.float32 if wanted.precision == "float32" else torch.float64
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        hessian = Hessian(model, cross_entropy, batches, dtype=dtype, chunk=wanted.chunk, group=group)
        work = _Work(model, hessian, batches, wanted, seed, group, tell)
        for name in wanted.measures:
            if name not in OF_PROBES:
                work.of_lanczos(name)
        probed = [name for name in wanted.measures if name in OF_PROBES]
        if probed:
            left = None if budget is None else max(budget - (time.perf_counter() - begun), 1e-3)
            work.of_probes(probed, measure, left)
        loss = hessian.loss()
    return Measured(tuple(work.estimates), loss, work.density, tuple(work.remarks))


class _Work:
    def __init__(
        self,
        model: nn.Module,
        hessian: Hessian,
        batches: Batches,
        wanted: SharpnessConfig,
        seed: int,
        group: dist.ProcessGroup | None,
        tell: Tell | None,
    ) -> None:
        self._model, self._hessian, self._batches = model, hessian, batches
        self._wanted, self._seed, self._group, self._tell = wanted, seed, group, tell
        self.estimates: list[Estimate] = []
        self.density: Density | None = None
        self.remarks: list[str] = []

    def of_lanczos(self, name: str) -> None:
        """What takes its own number of products."""
        hessian, wanted, seed, progress = self._hessian, self._wanted, self._seed, self._progress(name)
        match name:
            case "top_eigenvalues":
                top = sharpness.top_eigenvalues(hessian, wanted.top_k, seed=seed, progress=progress)
                self.estimates += top.estimates()
                if not top.converged:
                    self.remarks.append(f"top_eigenvalues did not converge in {top.products} products: see its error")
            case "log_determinant":
                probes = wanted.lanczos_probes
                found = sharpness.log_determinant(hessian, wanted.delta, probes, seed, progress=progress)
                self.estimates += found
            case "spectral_density":
                self.density = sharpness.spectral_density(hessian, wanted.lanczos_probes, seed, progress=progress)
                if not self.density.stable:
                    self.remarks.append(f"spectral_density still moves after {self.density.nodes.shape[1]} steps")
            case _:
                ggn = sharpness.GGN(
                    self._model,
                    cross_entropy,
                    self._batches,
                    dtype=hessian.dtype,
                    chunk=wanted.chunk,
                    group=self._group,
                )
                self.estimates.append(sharpness.ggn_log_determinant(ggn, limit=GRAM_LIMIT, progress=progress))

    def of_probes(self, names: Sequence[str], measure: phisam.Measure, seconds: float | None) -> None:
        """Means over random vectors; trace and Frobenius norm share their products."""
        hessian, seed, probes = self._hessian, self._seed, self._wanted.probes
        norms = [name for name in names if name != "measure"]
        passes = bool(norms) + ("measure" in names) * max(1, len(measure.noises))
        if seconds is not None:
            probes = sharpness.probes_within(hessian, seconds / passes, least=LEAST_PROBES)
        if norms:
            both = sharpness.trace_and_frobenius(hessian, probes, seed, progress=self._progress(" and ".join(norms)))
            found = {estimate.name: estimate for estimate in both}
            self.estimates += [found[name] for name in norms]
        if "measure" in names:
            estimate = sharpness.measure(hessian, measure, probes, seed, progress=self._progress("measure"))
            self.estimates.append(replace(estimate, name=f"S_{estimate.name}"))

    def _progress(self, what: str) -> sharpness.Progress | None:
        tell = self._tell
        return None if tell is None else lambda done, total: tell(what, done, total)


def check_measurable(model: nn.Module, dataset: Dataset, wanted: SharpnessConfig) -> None:
    """One product with the Hessian of two examples, before anything is paid for.

    Raises:
        ConfigError: the model has none, what is asked for is too large, or curvlinops is not installed.
    """
    rows = min(wanted.examples, len(dataset.train)) * dataset.num_classes
    if "ggn_log_determinant" in wanted.measures and rows > GRAM_LIMIT:
        raise ConfigError(
            f"sharpness.measures: ggn_log_determinant takes examples x classes = {GRAM_LIMIT} at most, not {rows}: set "
            f"sharpness.examples to {GRAM_LIMIT // dataset.num_classes}, or take log_determinant"
        )
    batches = measuring_batches(dataset, 2, seed=0)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            hessian = Hessian(model.cpu(), cross_entropy, batches, dtype=torch.float64, chunk=1)
            hessian.matvec(torch.ones(hessian.d, 1, dtype=hessian.dtype))
    except (sharpness.Unmeasurable, ImportError) as error:
        raise ConfigError(f"sharpness cannot be measured: {error}") from None


def has_batch_norm(model: nn.Module) -> bool:
    """Whether evaluation mode makes another function of the model than training mode, by its running statistics."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
