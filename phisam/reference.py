"""The paper's definitions and algorithms as they are printed: slow, plain, in any dtype. Open this first.

Tahmasebi, Soleymani, Bahri, Jegelka, Jaillet: "A Universal Class of Sharpness-Aware Minimization
Algorithms", ICML 2024. Letters are the paper's:

    x            parameters, one vector of d numbers
    L            training loss, a function of x that returns a scalar tensor
    v            perturbations, shape (n, d): n draws of mu
    rho          perturbation radius
    phi, psi     R^m -> R and R -> R^m; psi may return a scalar (m = 1), a tensor (m,) or a tuple
    lam          factor on the sharpness term; the paper's algorithms have lam = 1

Nothing else in the package imports this module. It is the oracle of the tests: the fast code must agree with it
to 1e-10 in float64, for every measure and on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
Phi = Callable[[Tensor], Tensor]
Psi = Callable[[Tensor], Tensor | Sequence[Tensor]]


def gradient(L: Loss, x: Tensor) -> Tensor:
    """grad L(x), shape (d,)."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(L(x), x)[0]


def hessian(L: Loss, x: Tensor) -> Tensor:
    """Dense Hessian of L at x, shape (d, d)."""
    return torch.autograd.functional.hessian(L, x.detach())  # type: ignore[no-any-return, no-untyped-call]


def _vector(components: Tensor | Sequence[Tensor]) -> Tensor:
    """psi(t) as a tensor (m,), whatever form the user's psi returns it in."""
    return components.reshape(-1) if isinstance(components, Tensor) else torch.stack(list(components))


def _phi(phi: Phi, t: Tensor) -> Tensor:
    """phi(t) for t of shape (m,); with m = 1 phi is a function of one number and gets one."""
    return phi(t if t.numel() > 1 else t.reshape(()))


def sharpness(H: Tensor, v: Tensor, phi: Phi, psi: Psi) -> Tensor:
    """Definition 1 and equation (3): S = phi( mean_i psi( v_i^T H v_i / 2 ) ) for draws v_i of mu, shape (n, d)."""
    t = torch.stack([_vector(psi(0.5 * v_i @ H @ v_i)) for v_i in v]).mean(0)
    return _phi(phi, t)


def sharpness_aware_loss(L: Loss, x: Tensor, v: Tensor, rho: float, phi: Phi, psi: Psi, lam: float = 1.0) -> Tensor:
    """Definition 8 with the estimator of Appendix H, a scalar:

    L(x) + lam rho^2 phi( mean_i psi( (L(x + rho v_i) - L(x)) / rho^2 ) )
    """
    t = torch.stack([_vector(psi((L(x + rho * v_i) - L(x)) / rho**2)) for v_i in v]).mean(0)
    return L(x) + lam * rho**2 * _phi(phi, t)


def algorithm_1(
    L: Loss, x: Tensor, v: Tensor, rho: float, phi: Phi, psi: Callable[[Tensor], Tensor], lam: float = 1.0
) -> Tensor:
    """Algorithm 1, m = 1: the update direction g_t, shape (d,)."""
    n = len(v)
    delta = torch.stack([(L(x + rho * v_i) - L(x)) / rho**2 for v_i in v]).detach()
    mean_psi = torch.stack([psi(delta_i) for delta_i in delta]).mean()

    g = gradient(L, x)
    for v_i, delta_i in zip(v, delta, strict=True):
        difference = gradient(L, x + rho * v_i) - gradient(L, x)
        g = g + lam * derivative(phi, mean_psi) * derivative(psi, delta_i) * difference / n
    return g


def algorithm_2(
    L: Loss,
    x: Tensor,
    v: Sequence[Tensor],
    rho: float,
    phi: Phi,
    psi: Sequence[Callable[[Tensor], Tensor]],
    lam: float = 1.0,
) -> Tensor:
    """Algorithm 2, any m: the update direction g_t, shape (d,).

    v[l] holds the n draws of mu_l, shape (n, d); psi[l] is the l-th component of psi; phi takes a tensor (m,).
    """
    n = len(v[0])
    delta = [torch.stack([(L(x + rho * v_i) - L(x)) / rho**2 for v_i in v_l]).detach() for v_l in v]
    t = torch.stack(
        [torch.stack([psi_l(d) for d in delta_l]).mean() for psi_l, delta_l in zip(psi, delta, strict=True)]
    )
    t = t.detach().requires_grad_()
    (partial_phi,) = torch.autograd.grad(phi(t), t)

    g = gradient(L, x)
    for l, psi_l in enumerate(psi):  # noqa: E741  the paper's index
        for v_il, delta_il in zip(v[l], delta[l], strict=True):
            difference = gradient(L, x + rho * v_il) - gradient(L, x)
            g = g + lam * partial_phi[l] * derivative(psi_l, delta_il) * difference / n
    return g


def algorithm_3(L: Loss, x: Tensor, v: Tensor, rho: float, lam: float = 1.0) -> Tensor:
    """Algorithm 3, Frob-SAM: the update direction g_t, shape (d,). v holds n >= 2 draws of N(0, I_d)."""
    n = len(v)
    losses = [L(x + rho * v_i).detach() for v_i in v]
    gradients = [gradient(L, x + rho * v_i) for v_i in v]

    first = sum((L_i * g_i for L_i, g_i in zip(losses, gradients, strict=True)), torch.zeros_like(x))
    sum_of_losses = sum(losses, torch.zeros_like(losses[0]))
    sum_of_gradients = sum(gradients, torch.zeros_like(x))
    return (
        gradient(L, x)
        + lam * 4 * first / ((n - 1) * rho**2)
        - lam * 4 * (sum_of_losses / ((n - 1) * rho)) * (sum_of_gradients / (n * rho))
    )


def derivative(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """f'(t) for a scalar function of a scalar."""
    t = t.detach().clone().requires_grad_()
    value = f(t)
    if not value.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(value, t)[0]


# The baselines of Table 2, in the letters of their papers, each as the gradient that its base optimizer gets.


def sam(L: Loss, x: Tensor, rho: float) -> Tensor:
    """Foret, Kleiner, Mobahi, Neyshabur 2021: grad L(w + eps), eps = rho grad L(w) / ‖grad L(w)‖_2, with w = x."""
    w = x
    eps = rho * gradient(L, w) / torch.linalg.vector_norm(gradient(L, w))
    return gradient(L, w + eps)


def asam(L: Loss, x: Tensor, rho: float, eta: float, scaled: Tensor | None = None) -> Tensor:
    """Kwon, Kim, Park, Choi 2021: grad L(w + eps), eps = rho T_w^2 grad L(w) / ‖T_w grad L(w)‖_2, T_w = |w| + eta.

    scaled (d,), bool: T_w is 1 where it is False. None: every parameter is scaled, as the paper has it; its authors'
    code scales the parameters whose name contains "weight".
    """
    w = x
    T_w = w.abs() + eta
    if scaled is not None:
        T_w = torch.where(scaled, T_w, torch.ones_like(w))
    eps = rho * T_w**2 * gradient(L, w) / torch.linalg.vector_norm(T_w * gradient(L, w))
    return gradient(L, w + eps)


def fisher_diagonal(losses: Sequence[Loss], x: Tensor) -> Tensor:
    """The diagonal of the empirical Fisher information, (d,): the mean over examples of (grad log p(y_i | x_i))^2.

    losses: -log p(y_i | x_i) as a function of the parameters, one for each example, not averaged.
    """
    return torch.stack([gradient(loss, x) ** 2 for loss in losses]).mean(0)


def fisher_mask(F: Tensor, sparsity: float) -> Tensor:
    """1 at the (1 - sparsity) d coordinates of the largest Fisher information F (d,), 0 elsewhere.

    (1 - sparsity) d is rounded to the nearest integer; the authors' code rounds down.
    """
    kept = torch.argsort(F, descending=True)[: round((1 - sparsity) * len(F))]
    m = torch.zeros_like(F)
    m[kept] = 1
    return m


def ssam(L: Loss, x: Tensor, rho: float, mask: Tensor) -> Tensor:
    """Mi, Shen, Ren, Zhou, Sun, Ji, Tao 2022, SSAM-F: grad L(w + m eps), with SAM's eps and the mask m (d,).

    ‖grad L(w)‖ is of the whole gradient, not of the masked one.
    """
    w, m = x, mask
    eps = rho * gradient(L, w) / torch.linalg.vector_norm(gradient(L, w))
    return gradient(L, w + m * eps)


def preconditioned(v: Tensor, m2: Tensor, power: float, damping: float) -> Tensor:
    """D v with D_j = (sqrt(m2_j) / rms + damping)^-power, rms^2 = mean_j m2_j, over its root mean square. Ours."""
    D = (m2.sqrt() / m2.mean().sqrt() + damping) ** -power
    return D / (D**2).mean().sqrt() * v


def symmetric_loss(L: Loss, x: Tensor, v: Tensor, rho: float, phi: Phi, psi: Psi, lam: float = 1.0) -> Tensor:
    """`sharpness_aware_loss` with the mean over the pair x + rho v_i, x - rho v_i in place of L(x + rho v_i). Ours."""

    def pair(at: Tensor, v_i: Tensor) -> Tensor:
        return (L(at + rho * v_i) + L(at - rho * v_i)) / 2

    t = torch.stack([_vector(psi((pair(x, v_i) - L(x)) / rho**2)) for v_i in v]).mean(0)
    return L(x) + lam * rho**2 * _phi(phi, t)
