"""The map that a transport plan is, and an orthonormal basis of what it maps onto.

Row convention: hidden states are ``(tokens, D)``; a map T is ``(D, k)`` and narrows by ``X T``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dotresize.ops.arguments import (
    FLOAT_NAMES,
    FLOATS,
    check_dense,
    check_number,
    check_word,
    exact,
)

# Beyond this condition number, after the constant direction is taken out, a direction of the span
# is lost in float64 as well.
MAX_CONDITION = 1e8

FACTORS = ("polar", "qr")


@dataclass(frozen=True)
class Factors:
    """``T = q @ r`` with orthonormal columns in q.

    Attributes:
        q: (D, k) float64, ``q.T @ q = I``.
        r: (k, k) float64; symmetric positive for "polar", upper triangular with positive diagonal
            for "qr".
        cond: condition number of T.
        cond_deflated: the same without T's largest singular direction. A transport map averages,
            so its largest direction is nearly the constant vector and dwarfs the rest; what
            remains says whether the span is healthy.

    Example:
        >>> import torch
        >>> from dotresize import factorize
        >>> factors = factorize(torch.eye(4)[:, :2])
        >>> round(factors.cond, 6)
        1.0
    """

    q: Tensor
    r: Tensor
    cond: float
    cond_deflated: float


@exact
def transport_map(plan: Tensor) -> Tensor:
    r"""Return the map of a transport plan: :math:`T_{ij} = P_{ij} / \sum_i P_{ij}`.

    plan: (n, k) or (B, n, k), non-negative -> the same shape, columns summing to 1: each new neuron
    is a convex mix of old ones, as for weights that write them. ``transport_map(plan.mT).mT`` has
    rows summing to 1: each old neuron is handed on whole, as for weights that read them. Raises
    ValueError naming the first column that receives no mass, and for what is no plan.
    Differentiable by the plan.

    Example:
        >>> import torch
        >>> from dotresize import transport_map
        >>> transport_map(torch.tensor([[0.25, 0.0], [0.25, 0.5]]))
        tensor([[0.5000, 0.0000],
                [0.5000, 1.0000]])
    """
    check_dense("plan", plan)
    if plan.dim() not in (2, 3):
        raise ValueError(f"plan has shape {tuple(plan.shape)}: must be (n, k) or (B, n, k)")
    if plan.dtype not in FLOATS:
        raise ValueError(f"plan has dtype {plan.dtype}: must be {FLOAT_NAMES}")
    if not torch.isfinite(plan).all() or (plan < 0).any():
        raise ValueError("plan holds negative or non-finite entries")
    mass = plan.sum(-2, keepdim=True)
    if not torch.isfinite(mass).all():  # entries near the type's largest
        plan = plan / plan.amax(-2, keepdim=True).clamp_min(torch.finfo(plan.dtype).tiny)
        mass = plan.sum(-2, keepdim=True)
    if (mass == 0).any():
        *problem, _, column = (mass == 0).nonzero()[0].tolist()
        of = f" of problem {problem[0]}" if problem else ""
        raise ValueError(f"column {column} of the plan{of} receives no mass")
    return plan / mass


@exact
def factorize(
    T: Tensor, method: str = "polar", *, name: str = "the map", max_cond: float = MAX_CONDITION
) -> Factors:
    """Split a map into an orthonormal basis of its span and the rest: ``T = q @ r``.

    A model narrowed with T depends on span(T) only (r cancels against the pseudo-inverse), so
    both methods give the same function; "polar" is the orthonormal basis nearest to T, hence the
    nearest to a plain selection of neurons, which keeps tied embeddings tied (see ``align``).
    q and r are differentiable as torch's decompositions are, condition numbers are not.

    Args:
        T: (D, k) with k <= D. Computed in float64.
        method: "polar" or "qr" (positive diagonal).
        name: what T is, for the error message.
        max_cond: largest accepted condition number of the deflated map.

    Raises:
        ValueError: wrong shape, dtype or method, not finite, or a collapsed span, by name.

    Example:
        >>> import torch
        >>> from dotresize import factorize
        >>> T = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> factors = factorize(T)
        >>> bool(torch.allclose(factors.q @ factors.r, T.double()))
        True
    """
    check_word("method", method, FACTORS)
    check_dense(name, T)
    max_cond = check_number("max_cond", max_cond, "a number from 1 up")
    if max_cond < 1:
        raise ValueError(f"max_cond is {max_cond:g}: must be a number from 1 up")
    if T.dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {T.dtype}: must be {FLOAT_NAMES}")
    if T.dim() != 2 or T.shape[1] > T.shape[0] or T.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(T.shape)}: must be (D, k) with 0 < k <= D")
    work = T.double()
    if not torch.isfinite(work).all():
        raise ValueError(f"{name} holds non-finite entries")
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    floor = s[-1].clamp_min(torch.finfo(torch.float64).tiny)
    cond, cond_deflated = (float(s[i].detach() / floor.detach()) for i in (0, min(1, len(s) - 1)))
    # Lost: too small beside the rest of the span, or no more than the rounding of its largest part.
    noise = 4 * torch.finfo(T.dtype).eps * max(T.shape) ** 0.5 * s[0]
    lost = int((s <= torch.maximum(s[min(1, len(s) - 1)] / max_cond, noise)).sum())
    if lost:
        raise ValueError(
            f"{name}: its span has collapsed, {lost} of {len(s)} directions are lost "
            f"(condition number {cond:.1e}, {cond_deflated:.1e} beside the constant direction); "
            "use a smaller reg or a larger width"
        )
    if method == "polar":
        return Factors(u @ vh, vh.mT @ (s[:, None] * vh), cond, cond_deflated)
    q, r = torch.linalg.qr(work)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
    return Factors(q * sign, sign[:, None] * r, cond, cond_deflated)
