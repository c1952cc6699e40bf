"""Entropic optimal transport by log-domain Sinkhorn, one problem or many at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dotresize import reference
from dotresize.ops.backends import choose, cpp
from dotresize.ops.result import STATUS_WORDS, SinkhornResult, _Problem

# How far the masses of a and b may be apart, relative to the larger.
_MASS_TOLERANCE = 1e-5


def sinkhorn(
    cost: Tensor | Sequence[Tensor],
    reg: float | Tensor,
    a: Tensor | Sequence[Tensor] | None = None,
    b: Tensor | Sequence[Tensor] | None = None,
    *,
    max_iter: int = 1000,
    tol: float = 1e-5,
    init: tuple | None = None,
    backend: str = "auto",
) -> SinkhornResult:
    r"""Solve entropic optimal transport problems in the log domain.

    .. math:: \min_P \langle C, P \rangle + \mathrm{reg} \sum_{ij} P_{ij} \log P_{ij}
              \quad \text{s.t.} \quad P 1 = a, \; P^\top 1 = b

    One iteration is a row update, then a column update. Each problem stops by itself, when after a
    row update its column error is at most ``tol``; a problem that has stopped costs nothing.

    Args:
        cost: ``(n, m)``, ``(B, n, m)``, or a list of 2-D tensors of different shapes. float32 or
            float64 (solved as such), float16 or bfloat16 (solved in float32). +inf forbids a pair.
        reg: > 0, in units of the cost; a number, or one per problem ``(B,)``.
        a: row marginals ``(n,)`` or ``(B, n)`` (for a list: a list); None = 1/n each. Zeros are
            allowed and give exact zero rows.
        b: column marginals, likewise.
        max_iter: largest number of iterations per problem.
        tol: marginal error to stop at; 0 runs exactly ``max_iter`` iterations.
        init: potentials ``(f, g)`` to start from, as a result holds them; only g is used, as the
            first row update follows from it.
        backend: "auto", "triton", "cpp" or "torch".

    Returns:
        SinkhornResult. Bad numbers in a cost are that problem's ``status``, not an exception.

    Raises:
        ValueError: wrong shapes, dtypes or devices; reg not positive and finite; marginals that
            are negative, not finite, or do not sum alike.
        RuntimeError: the named backend cannot run here.

    References:
        M. Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, NeurIPS 2013.
    """
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 0:
        raise ValueError(f"max_iter is {max_iter!r}: must be an integer from 0 up")
    if not 0 <= tol < float("inf"):
        raise ValueError(f"tol is {tol!r}: must be finite and not negative")
    if not isinstance(cost, Tensor):
        return _ragged(list(cost), reg, a, b, max_iter, tol, init, backend)
    if cost.dim() not in (2, 3):
        raise ValueError(f"cost has shape {tuple(cost.shape)}: must be (n, m) or (B, n, m)")
    if not cost.is_floating_point():
        raise ValueError(f"cost has dtype {cost.dtype}: must be a floating-point type")
    single = cost.dim() == 2
    problems = _solve_batch(
        cost[None] if single else cost,
        _check_reg(reg, 1 if single else cost.shape[0]),
        _check_marginals("a", a, cost.shape[:-1], cost.device),
        _check_marginals("b", b, (*cost.shape[:-2], cost.shape[-1]), cost.device),
        _check_init(init, cost),
        max_iter,
        tol,
        backend,
    )
    return SinkhornResult.collect(problems, "single" if single else "batch")


def _ragged(
    costs: list[Tensor],
    reg: float | Tensor,
    a: Tensor | Sequence[Tensor] | None,
    b: Tensor | Sequence[Tensor] | None,
    max_iter: int,
    tol: float,
    init: tuple | None,
    backend: str,
) -> SinkhornResult:
    """Problems of equal shape are solved together; the order of the list is kept."""
    for i, cost in enumerate(costs):
        if not isinstance(cost, Tensor) or cost.dim() != 2:
            raise ValueError(f"cost {i} of the list is not a 2-D tensor")
    regs = _check_reg(reg, len(costs))
    columns: dict[str, list | None] = {"a": None, "b": None, "f": None, "g": None}
    for name, value in (("a", a), ("b", b), ("f", init and init[0]), ("g", init and init[1])):
        if value is None:
            continue
        if isinstance(value, Tensor) or len(value) != len(costs):
            raise ValueError(f"{name}: for a list of {len(costs)} costs, give a list as long")
        columns[name] = list(value)
    groups: dict[tuple, list[int]] = {}
    for i, cost in enumerate(costs):
        groups.setdefault((tuple(cost.shape), cost.dtype, cost.device), []).append(i)
    solved: dict[int, _Problem] = {}
    for members in groups.values():
        stacked = {
            name: None if values is None else torch.stack([values[i] for i in members])
            for name, values in columns.items()
        }
        result = sinkhorn(
            torch.stack([costs[i] for i in members]),
            regs[members],
            stacked["a"],
            stacked["b"],
            max_iter=max_iter,
            tol=tol,
            init=None if init is None else (stacked["f"], stacked["g"]),
            backend=backend,
        )
        solved.update(zip(members, result._problems, strict=True))
    return SinkhornResult.collect([solved[i] for i in range(len(costs))], "ragged")


def _check_reg(reg: float | Tensor, batch: int) -> Tensor:
    value = torch.as_tensor(reg, dtype=torch.float64, device="cpu")
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != batch):
        raise ValueError(f"reg has shape {tuple(value.shape)}: must be a number or ({batch},)")
    if not (torch.isfinite(value).all() and (value > 0).all()):
        raise ValueError(f"reg is {reg}: must be positive and finite")
    return value.expand(batch).contiguous()


def _check_marginals(
    name: str, value: Tensor | Sequence[Tensor] | None, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """float64 (B, length); None is uniform with mass 1."""
    length = shape[-1]
    if value is None:
        batch = shape[0] if len(shape) == 2 else 1
        return torch.full((batch, length), 1 / max(1, length), dtype=torch.float64, device=device)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor")
    if tuple(value.shape) not in (tuple(shape), (length,)):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: must be {tuple(shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the cost on {device}")
    if not (torch.isfinite(value).all() and (value >= 0).all()):
        raise ValueError(f"{name} holds a negative or non-finite entry")
    rows = value.double()
    return (rows if rows.dim() == 2 else rows.expand(*shape[:-1], length)).reshape(-1, length)


def _check_init(init: tuple | None, cost: Tensor) -> Tensor:
    """Initial g, float64 (B, m)."""
    shape = (*cost.shape[:-2], cost.shape[-1])
    if init is None:
        return torch.zeros(shape, dtype=torch.float64, device=cost.device).reshape(-1, shape[-1])
    g = init[1]
    if tuple(g.shape) != shape or g.device != cost.device:
        raise ValueError(f"init: g is {tuple(g.shape)} on {g.device}: must be {shape} as the cost")
    # A column that had no mass before may have some now.
    return torch.nan_to_num(g.double(), nan=0.0, posinf=0.0, neginf=0.0).reshape(-1, shape[-1])


def _solve_batch(
    cost: Tensor,
    reg: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    max_iter: int,
    tol: float,
    backend: str,
) -> list[_Problem]:
    chosen = choose(backend, cost.device)
    n, m = cost.shape[1:]
    if n == 0 or m == 0:
        raise ValueError(f"cost has shape {tuple(cost.shape)}: a problem needs rows and columns")
    masses_a, masses_b = a.sum(1), b.sum(1)
    apart = (masses_a - masses_b).abs() > _MASS_TOLERANCE * torch.maximum(masses_a, masses_b)
    if (apart | (masses_a == 0)).any():
        i = int((apart | (masses_a == 0)).nonzero()[0])
        raise ValueError(
            f"marginals of problem {i} sum to {masses_a[i]:.9g} (a) and {masses_b[i]:.9g} (b): "
            "both sums must be positive and equal"
        )
    # float32 marginals sum alike only to rounding; scaled to the rows' mass exactly, tol can hold.
    b = b * (masses_a / masses_b)[:, None]
    work = cost if cost.dtype == torch.float64 else cost.float()
    f, g, n_iter, error, status = _LAUNCH[chosen](
        work.contiguous(), reg, a.contiguous(), b.contiguous(), max_iter, tol, g
    )
    rows = zip(
        n_iter.tolist(), error.tolist(), status.tolist(), reg.tolist(), cost, f, g, strict=True
    )
    return [
        _Problem(cost_i, reg_i, f_i, g_i, n_iter_i, error_i, STATUS_WORDS[status_i])
        for n_iter_i, error_i, status_i, reg_i, cost_i, f_i, g_i in rows
    ]


def _launch_torch(
    cost: Tensor, reg: Tensor, a: Tensor, b: Tensor, max_iter: int, tol: float, g: Tensor
) -> tuple[Tensor, ...]:
    reg = reg.to(cost.device)
    f, g, *rest = reference.sinkhorn(cost, reg, a, b, max_iter, tol, g)
    return f.double(), g.double(), *rest


def _launch_cpp(
    cost: Tensor, reg: Tensor, a: Tensor, b: Tensor, max_iter: int, tol: float, g: Tensor
) -> tuple[Tensor, ...]:
    batch, n, m = cost.shape
    f, g = torch.empty(batch, n, dtype=torch.float64), g.clone()
    n_iter = torch.empty(batch, dtype=torch.int64)
    error = torch.empty(batch, dtype=torch.float64)
    status = torch.empty(batch, dtype=torch.int64)
    problems = cpp().SinkhornProblems(
        batch=batch,
        n=n,
        m=m,
        cost=cost.data_ptr(),
        reg=reg.data_ptr(),
        a=a.data_ptr(),
        b=b.data_ptr(),
        f=f.data_ptr(),
        g=g.data_ptr(),
        n_iter=n_iter.data_ptr(),
        marginal_error=error.data_ptr(),
        status=status.data_ptr(),
    )
    cpp().sinkhorn(
        problems,
        use_float64=cost.dtype == torch.float64,
        max_iter=max_iter,
        tol=tol,
        num_threads=torch.get_num_threads(),
    )
    return f, g, n_iter, error, status


def _launch_triton(
    cost: Tensor, reg: Tensor, a: Tensor, b: Tensor, max_iter: int, tol: float, g: Tensor
) -> tuple[Tensor, ...]:
    from dotresize.kernels import sinkhorn as kernel

    return kernel.sinkhorn(cost, reg, a, b, max_iter, tol, g)


_LAUNCH = {"torch": _launch_torch, "cpp": _launch_cpp, "triton": _launch_triton}
