"""``solve_batch`` of POT: many entropic problems of one shape."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dotresize.ops.arguments import check_whole, check_word
from dotresize.ops.sinkhorn import sinkhorn
from dotresize.ot._arrays import (
    Arrays,
    linear_loss,
    positive_reg,
    tolerance,
)

_METHODS = ("auto", "proximal", "log_sinkhorn", "sinkhorn")
_REG_TYPES = ("kl", "entropy")
_GRADS = ("detach", "autodiff", "last_step", "envelope")


@dataclass(frozen=True, eq=False)
class BatchResult:
    """What POT's ``OTResult`` holds for a batch, and how each problem ended.

    Attributes:
        potentials: ``(f (B, n), g (B, m))``, with ``plan = exp(f_i + g_j - M_ij / reg)``; their
            exponentials for method "sinkhorn", as in POT. The constant that f may pass to g is
            this package's.
        plan: ``(B, n, m)``, rows exact.
        value: ``(B,)``, with the regulariser; see :func:`solve_batch`.
        value_linear: ``(B,)``, ``<M, P>``.
        n_iter, marginal_error, converged, status: per problem, as in ``SinkhornResult``.
        log: ``{"n_iter": the largest}``.
    """

    potentials: tuple[Any, Any] = field(repr=False)
    plan: Any = field(repr=False)
    value: Any
    value_linear: Any
    n_iter: Any = field(repr=False)
    marginal_error: Any = field(repr=False)
    converged: Any = field(repr=False)
    status: tuple[str, ...]
    log: dict[str, int]

    @property
    def potential_a(self) -> Any:
        return self.potentials[0]

    @property
    def potential_b(self) -> Any:
        return self.potentials[1]

    @property
    def marginal_a(self) -> Any:
        return self.plan.sum(2)

    @property
    def marginal_b(self) -> Any:
        return self.plan.sum(1)

    @property
    def marginals(self) -> tuple[Any, Any]:
        return self.marginal_a, self.marginal_b


def solve_batch(
    M: Any,
    reg: float | None = None,
    a: Any = None,
    b: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> BatchResult:
    r"""Solve many entropic problems of one shape, as POT's ``ot.batch.solve_batch``.

    .. math:: \min_P \langle M, P \rangle + \mathrm{reg} \, R(P)
              \quad \text{s.t.} \quad P 1 = a, \; P^\top 1 = b

    Each problem stops by itself, when its columns' L1 error is at most ``tol``; POT stops all, when
    the largest L2 error of any is below it. float32 with tol below 1e-6 is solved in float64.

    Args:
        M: costs ``(B, n, m)``, NumPy or torch; +inf forbids a pair.
        reg: > 0.
        a: row marginals ``(B, n)`` or ``(n,)``; None is uniform. Zeros are allowed.
        b: column marginals, likewise; of the same mass to 1e-5, and scaled to it.
        max_iter: largest number of iterations.
        tol: marginal error to stop at; 0 runs exactly ``max_iter`` iterations.
        method: all have the same solution, and one algorithm here. "sinkhorn" returns
            exponentials of potentials.
        inner_iter, inner_reg: POT's path to the solution with method "proximal"; no effect.
        reg_type: R is "entropy", :math:`\sum P \log P`, or "kl",
            :math:`\sum P \log(P / a b^\top)`. The plan is the same.
        grad: what torch may differentiate. "envelope": value and value_linear by M, with the plan
            taken as constant, which is exact for value. "autodiff" and "last_step": plan, value and
            value_linear by M, a and b, implicitly at convergence; nothing is unrolled, and no step
            approximated. Gradients of a and b are POT's up to a constant from one to the other.
            "detach": nothing. Potentials never.

    Returns:
        BatchResult. Problems that were not solved are named in one warning.

    Raises:
        ValueError: unknown names; wrong shapes or types; bad marginals; reg, tol or max_iter
            out of range.
        NotImplementedError: reg is None or 0, or requires grad.

    Example:
        >>> import torch
        >>> from dotresize import ot
        >>> result = ot.solve_batch(torch.rand(5, 8, 6), 0.1)
        >>> result.plan.shape
        torch.Size([5, 8, 6])
    """
    kind = reg_type.lower() if isinstance(reg_type, str) else reg_type
    for name, given, accepted in (
        ("method", method, _METHODS),
        ("reg_type", kind, _REG_TYPES),
        ("grad", grad, _GRADS),
    ):
        check_word(name, given, accepted)
    number = positive_reg(reg, "ot.batch.solve_batch(M)")
    steps, tol = check_whole("max_iter", max_iter, 0), tolerance("tol", tol)
    arrays = Arrays.of(M=M, a=a, b=b)
    cost = arrays.tensor(M)
    if cost.dim() != 3:
        raise ValueError(f"M has shape {tuple(cost.shape)}: must be (B, n, m)")
    cost = arrays.working(cost.detach() if grad == "detach" else cost, tol)
    batch, n, m = cost.shape
    rows, columns = _marginal("a", a, batch, n, arrays), _marginal("b", b, batch, m, arrays)
    if grad not in ("autodiff", "last_step"):
        rows, columns = rows.detach(), columns.detach()
    # Any: of a batch, all attributes are tensors.
    result: Any = sinkhorn(cost, number, rows, columns, max_iter=steps, tol=tol)
    _warn(result, tol, steps)
    plan = result.plan if grad in ("autodiff", "last_step") else result.plan.detach()
    linear = linear_loss(plan, cost)
    exponent = _log(plan)
    if kind == "kl":
        exponent = exponent - _log(rows)[:, :, None] - _log(columns)[:, None, :]
    value = linear + number * (plan * exponent).sum((1, 2), dtype=torch.float64)
    f, g = (potential.detach() for potential in result.potentials)
    if method == "sinkhorn":
        f, g = f.exp(), g.exp()
    back = arrays.back
    return BatchResult(
        potentials=(back(f), back(g)),
        plan=back(plan),
        value=back(value),
        value_linear=back(linear),
        n_iter=back(result.n_iter, torch.int64),
        marginal_error=back(result.marginal_error, torch.float64),
        converged=back(result.converged, torch.bool),
        status=result.status,
        log={"n_iter": int(result.n_iter.max())},
    )


def _marginal(name: str, given: Any, batch: int, length: int, arrays: Arrays) -> Tensor:
    """Return a marginal, float64 (batch, length); None is uniform."""
    if given is None:
        uniform = 1 / max(1, length)
        return torch.full((batch, length), uniform, dtype=torch.float64, device=arrays.device)
    value = arrays.tensor(given).double()
    if tuple(value.shape) not in ((length,), (batch, length)):
        shape = tuple(value.shape)
        raise ValueError(f"{name} has shape {shape}: must be ({batch}, {length}) or ({length},)")
    return value.expand(batch, length)


def _log(mass: Tensor) -> Tensor:
    """Return a finite logarithm, also where there is no mass: 0 log 0 is 0."""
    return mass.clamp_min(torch.finfo(mass.dtype).tiny).log()


def _warn(result: Any, tol: float, max_iter: int) -> None:
    open_ones = [i for i, word in enumerate(result.status) if word != "converged"]
    if not open_ones:
        return
    worst = open_ones[0]
    error = float(result.marginal_error[worst])
    text = (
        f"Sinkhorn did not converge: {len(open_ones)} of {len(result)} problems; "
        f"problem {worst} ended as {result.status[worst]!r}, marginal error {error:.2e}, "
        f"tol={tol}, max_iter={max_iter}"
    )
    warnings.warn(text, stacklevel=3)
