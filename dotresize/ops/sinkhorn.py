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
        if len(cost) == 0:
            raise ValueError("cost is an empty list: there must be problems with entries")
        return _ragged(list(cost), reg, a, b, max_iter, tol, init, backend)
    if cost.dim() not in (2, 3):
        raise ValueError(f"cost has shape {tuple(cost.shape)}: must be (n, m) or (B, n, m)")
    if not cost.is_floating_point():
        raise ValueError(f"cost has dtype {cost.dtype}: must be a floating-point type")
    single = cost.dim() == 2
    batch = cost[None] if single else cost
    regs = _check_reg(reg, len(batch))
    problems = _solve_batch(batch, regs, a, b, init, max_iter, tol, backend, range(len(batch)))
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
        if not isinstance(cost, Tensor) or cost.dim() != 2 or not cost.is_floating_point():
            raise ValueError(f"cost {i} of the list is not a 2-D floating-point tensor")
    regs = _check_reg(reg, len(costs))
    vectors: dict[str, list[Tensor] | None] = {}
    starts = None if init is None else init[1]
    for name, value, axis in (("a", a, 0), ("b", b, 1), ("init g", starts, 1)):
        if value is not None and (isinstance(value, Tensor) or len(value) != len(costs)):
            raise ValueError(f"{name}: for a list of {len(costs)} costs, give a list as long")
        vectors[name] = None if value is None else list(value)
        for i, vector in enumerate(vectors[name] or []):
            if not isinstance(vector, Tensor) or vector.shape != costs[i].shape[axis : axis + 1]:
                raise ValueError(
                    f"{name} of problem {i}: must have shape ({costs[i].shape[axis]},)"
                )
    groups: dict[tuple, list[int]] = {}
    for i, cost in enumerate(costs):
        groups.setdefault((tuple(cost.shape), cost.dtype, cost.device), []).append(i)
    solved: dict[int, _Problem] = {}
    for members in groups.values():
        stacked = {
            name: None if values is None else torch.stack([values[i] for i in members])
            for name, values in vectors.items()
        }
        problems = _solve_batch(
            torch.stack([costs[i] for i in members]),
            regs[members],
            stacked["a"],
            stacked["b"],
            None if init is None else (None, stacked["init g"]),
            max_iter,
            tol,
            backend,
            members,
        )
        solved.update(zip(members, problems, strict=True))
    return SinkhornResult.collect([solved[i] for i in range(len(costs))], "ragged")


def _check_reg(reg: float | Tensor, batch: int) -> Tensor:
    value = torch.as_tensor(reg, dtype=torch.float64, device="cpu")
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != batch):
        raise ValueError(f"reg has shape {tuple(value.shape)}: must be a number or ({batch},)")
    if not (torch.isfinite(value).all() and (value > 0).all()):
        raise ValueError(f"reg is {reg}: must be positive and finite")
    return value.expand(batch).contiguous()


def _check_marginals(
    name: str, value: Tensor | Sequence[Tensor] | None, batch: int, length: int, like: Tensor
) -> Tensor:
    """float64 (batch, length); None is uniform with mass 1."""
    if value is None:
        uniform = 1 / max(1, length)
        return torch.full((batch, length), uniform, dtype=torch.float64, device=like.device)
    shared, own = (length,), (batch, length)
    if not isinstance(value, Tensor) or tuple(value.shape) not in (shared, own):
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} has shape {given}: must be {shared} or {own}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the cost on {like.device}")
    if not (torch.isfinite(value).all() and (value >= 0).all()):
        raise ValueError(f"{name} holds a negative or non-finite entry")
    return value.detach().double().expand(batch, length).contiguous()


def _check_masses(a: Tensor, b: Tensor, labels: Sequence[int]) -> Tensor:
    """b scaled to the mass of a, which it must have up to rounding."""
    masses_a, masses_b = a.sum(1), b.sum(1)
    apart = (masses_a - masses_b).abs() > _MASS_TOLERANCE * torch.maximum(masses_a, masses_b)
    wrong = (apart | (masses_a == 0)).nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"marginals of problem {labels[i]} sum to {masses_a[i]:.9g} (a) and {masses_b[i]:.9g} "
            "(b): both sums must be positive and equal"
        )
    # float32 marginals sum alike to rounding only; scaled to the rows' mass exactly, tol can hold.
    return b * (masses_a / masses_b)[:, None]


def _check_init(init: tuple | None, cost: Tensor) -> Tensor:
    """Initial g, a new float64 (B, m)."""
    batch, m = cost.shape[0], cost.shape[2]
    if init is None:
        return torch.zeros(batch, m, dtype=torch.float64, device=cost.device)
    g = init[1]
    if not isinstance(g, Tensor) or tuple(g.shape) not in ((batch, m), (m,)):
        raise ValueError(f"init: g, its second entry, must be a tensor of shape {(batch, m)}")
    if g.device != cost.device:
        raise ValueError(f"init: g is on {g.device}, the cost on {cost.device}")
    # A column that had no mass before may have some now.
    g = torch.nan_to_num(g.detach().double(), nan=0.0, posinf=0.0, neginf=0.0)
    return g.expand(batch, m).clone(memory_format=torch.contiguous_format)


def _solve_batch(
    cost: Tensor,
    reg: Tensor,
    a: Tensor | Sequence[Tensor] | None,
    b: Tensor | Sequence[Tensor] | None,
    init: tuple | None,
    max_iter: int,
    tol: float,
    backend: str,
    labels: Sequence[int],
) -> list[_Problem]:
    """cost (B, n, m); ``labels`` are the caller's numbers of the problems, for messages."""
    chosen = choose(backend, cost.device)
    batch, n, m = cost.shape
    if batch == 0 or n == 0 or m == 0:
        raise ValueError(f"cost has shape {tuple(cost.shape)}: there must be problems with entries")
    rows = _check_marginals("a", a, batch, n, cost)
    columns = _check_masses(rows, _check_marginals("b", b, batch, m, cost), labels)
    start = _check_init(init, cost)
    cost = cost.detach()
    work = cost if cost.dtype == torch.float64 else cost.float()
    f, g, n_iter, error, status = _LAUNCH[chosen](
        work.contiguous(), reg, rows, columns, max_iter, float(tol), start
    )
    problems = zip(
        n_iter.tolist(), error.tolist(), status.tolist(), reg.tolist(), cost, f, g, strict=True
    )
    return [
        _Problem(cost_i, reg_i, f_i, g_i, n_iter_i, error_i, STATUS_WORDS[status_i], chosen)
        for n_iter_i, error_i, status_i, reg_i, cost_i, f_i, g_i in problems
    ]


def _launch_cpp(
    cost: Tensor, reg: Tensor, a: Tensor, b: Tensor, max_iter: int, tol: float, g: Tensor
) -> tuple[Tensor, ...]:
    batch, n, m = cost.shape
    f = torch.empty(batch, n, dtype=torch.float64)
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


_LAUNCH = {"torch": reference.sinkhorn, "cpp": _launch_cpp, "triton": _launch_triton}
