"""Does it pay to draw k of the n backward passes in proportion to |w_i|, each reweighted?

    python benchmarks/subsampling.py

g = grad L_0 + sum_i w_i grad L_i (Frob-SAM: w_0 = 1, sum_i w_i = 0), against grad L_0 + (W / k) sum_{k draws} sign(w_i)
grad L_i with i drawn with probability |w_i| / W, W = sum_i |w_i|. Its own variance, over that of the n draws of mu, is
exactly (W sum_i |w_i| ‖h_i‖^2 - ‖sum_i w_i h_i‖^2) / k with h_i = grad L_i, or grad L_i - grad L_0 as control variate.
A forward alone costs FORWARD of an evaluation. Printed: noise, the trace of the covariance, times the cost of a step,
relative to all n backwards. Digits, an MLP after 200 steps of Adam, float64.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import phisam

FORWARD, RHO, DRAWS = 0.4, 0.03, 200


def main() -> None:
    """Prints the table."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16.0), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(200):
        batch = slice(128 * (step % 14), 128 * (step % 14) + 128)
        opt.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        opt.step()
    parameters = list(model.parameters())
    x = torch.cat([p.detach().reshape(-1) for p in parameters])

    def at(point: Tensor) -> tuple[Tensor, Tensor]:
        torch.nn.utils.vector_to_parameters(point, parameters)
        loss = cross_entropy(model(images[:128]), labels[:128])
        return loss.detach(), torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])

    L_0, g_0 = at(x)
    print("| measure | n | k | plain: noise x cost | with control variate |\n|---|---|---|---|---|")
    for name, measure in (("frobenius", phisam.frobenius()), ("log_determinant", phisam.log_determinant())):
        for n in (4, 8, 16):
            full, own = _noises(at, x, L_0, g_0, measure, n)
            for k in (1, 2, n // 2):
                cost = (1 + FORWARD * n + (1 - FORWARD) * k) / (1 + n)
                ratios = [(full + noise / k) / full * cost for noise in own]
                print(f"| {name} | {n} | {k} | {ratios[0]:.3g} | {ratios[1]:.3g} |", flush=True)


def _noises(at, x, L_0, g_0, measure, n):  # type: ignore[no-untyped-def]
    """Noise of all n backwards, and what one draw adds: plain, and with the control variate."""
    generator = torch.Generator().manual_seed(n)
    total, own = [], torch.zeros(2, dtype=torch.float64)
    for _ in range(DRAWS):
        points = [at(x + RHO * torch.randn(len(x), dtype=x.dtype, generator=generator)) for _ in range(n)]
        w = measure.weights(torch.stack([L_0, *(L for L, _ in points)]), RHO, 1.0)
        h = torch.stack([g for _, g in points])
        total.append(w[0] * g_0 + w[1:] @ h)
        for which, part in enumerate((h, h - g_0)):
            drawn = w[1:].abs().sum() * (w[1:].abs() * part.square().sum(1)).sum()
            own[which] += (drawn - (w[1:] @ part).square().sum()) / DRAWS
    return float(torch.stack(total).var(0).sum()), own.tolist()


if __name__ == "__main__":
    main()
