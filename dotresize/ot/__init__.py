"""Entropic transport under POT's names: ``from dotresize import ot`` where ``import ot`` was.

``sinkhorn``, ``sinkhorn2`` and ``solve_batch`` take the arguments of POT 0.9.7, in its order and
with its defaults, and return what it returns, for NumPy arrays and torch tensors; all run through
:func:`dotresize.sinkhorn`, in the log domain. What is not here says which call of POT has it.
"""

from __future__ import annotations

from typing import Any

from dotresize.ops.arguments import check_flag
from dotresize.ot._batch import BatchResult, solve_batch
from dotresize.ot._problem import METHODS, Problem

__all__ = ["BatchResult", "sinkhorn", "sinkhorn2", "solve_batch"]

# What POT's users may look for here, and where POT has it.
_ELSEWHERE = {
    "emd": "emd",
    "emd2": "emd2",
    "solve": "solve",
    "solve_sample": "solve_sample",
    "solve_gromov": "solve_gromov",
    "solve_sample_batch": "batch.solve_sample_batch",
    "solve_gromov_batch": "batch.solve_gromov_batch",
    "sinkhorn_unbalanced": "unbalanced.sinkhorn_unbalanced",
    "sinkhorn_unbalanced2": "unbalanced.sinkhorn_unbalanced2",
    "barycenter": "bregman.barycenter",
    "gromov_wasserstein": "gromov.gromov_wasserstein",
}


def sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    r"""Return the plan of entropic transport, as POT's ``ot.sinkhorn``.

    .. math:: \min_P \langle M, P \rangle + \mathrm{reg} \sum_{ij} P_{ij} \log P_{ij}
              \quad \text{s.t.} \quad P 1 = a, \; P^\top 1 = b

    Iterations are accelerated as those of :func:`dotresize.sinkhorn`: fewer are needed, and one
    goes further than POT's. With stopThr = 0 they are POT's own (u starts, then v, u, v, u), and so
    is the plan after ``numItermax`` of them. Results have the arrays' own type; float32 with
    stopThr below 1e-6, where float32 cannot reach it, is solved in float64 and rounded at the end.

    Args:
        a: row marginal ``(n,)``; ``[]`` is uniform.
        b: column marginal ``(m,)``, or several, ``(m, k)``; ``[]`` is uniform.
        M: cost ``(n, m)``; +inf forbids a pair. Arrays are all NumPy's or all torch's; lists go
            with either.
        reg: > 0.
        method: any of POT's names, in any case. They differ in ``log``, in the norm of the error
            and in the unit of ``warmstart``; greenkhorn and sinkhorn_epsilon_scaling take one b.
        numItermax: iterations; for sinkhorn_epsilon_scaling rounds, at least 35, of
            ``numInnerItermax=100`` iterations.
        stopThr: iterations stop when the column error's L1 norm is at most stopThr, looked at
            after every one. POT looks at every 10th (20th) and takes the L2 norm (greenkhorn: the
            largest entry; epsilon_scaling: the square of L2), which is never more: a solve that
            stops here would stop there. At numItermax POT's norm decides on the warning.
        verbose: one line to this module's logger, at level INFO.
        log: return ``(result, log)``, with POT's keys for this method. ``err`` holds the last
            error only, in POT's norm; u and v are POT's up to a factor (``c u`` and ``v / c``).
        warn: warn where stopThr was not reached. Costs without a solution always warn: the plan is
            0 where a row or column of positive mass has +inf only, NaN where the cost has NaN.
        warmstart: logarithms ``(log u, log v)``, for sinkhorn_stabilized and _epsilon_scaling times
            reg, as their logs hold them; for sinkhorn_log with several b a list of pairs. Only u
            counts, as v follows from it.
        kwargs: numInnerItermax; any other option, known to POT or not, is ignored, as in POT.

    Returns:
        The plan ``(n, m)``, or for several b the losses :math:`\langle M, P \rangle`, ``(k,)``.
        Torch results are differentiable by M, a and b, at convergence; ``log`` is not. Where a and
        b differ in mass, rows are exact and columns in proportion to b, as in POT, and it warns;
        up to 1e-5 (float64: 1e-12) that is rounding, and the error that of b scaled to a's mass.

    Raises:
        ValueError: unknown method; wrong shapes or types; marginals that are negative, not finite
            or all zero; numItermax below 1; stopThr or reg negative or not finite.
        NotImplementedError: reg is None or 0, or requires grad.

    Example:
        >>> import numpy as np
        >>> from dotresize import ot
        >>> plan = ot.sinkhorn([], [], np.array([[0.0, 1.0], [1.0, 0.0]]), 0.1)
        >>> bool(np.allclose(plan.sum(0), 0.5))
        True

    References:
        R. Flamary et al., POT: Python Optimal Transport, JMLR 22(78), 2021.
    """
    log = check_flag("log", log)
    problem = Problem.checked(a, b, M, reg, method, METHODS, kwargs)
    solved = problem.solve(numItermax, stopThr, verbose, warn, warmstart)
    result = problem.arrays.back(solved.result)
    return (result, solved.log()) if log else result


def sinkhorn2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    r"""Return the loss :math:`\langle M, P \rangle` of the plan, as POT's ``ot.sinkhorn2``.

    Arguments and errors are those of :func:`sinkhorn`; POT has three of the methods here, and does
    not warn by default. Returns a number (NumPy scalar or 0-d tensor), or ``(k,)`` for several b.

    Example:
        >>> import numpy as np
        >>> from dotresize import ot
        >>> loss = ot.sinkhorn2([], [], np.array([[0.0, 1.0], [1.0, 0.0]]), 0.1)
        >>> bool(loss < 1e-3)
        True
    """
    log = check_flag("log", log)
    problem = Problem.checked(a, b, M, reg, method, METHODS[:3], kwargs)
    solved = problem.solve(numItermax, stopThr, verbose, warn, warmstart)
    loss = problem.arrays.back(solved.loss())
    return (loss, solved.log()) if log else loss


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise _NotHere(f"dotresize.ot has no {name}: use ot.{_ELSEWHERE[name]} of POT")
    text = f"module 'dotresize.ot' has no attribute {name!r}"
    raise AttributeError(text if name.startswith("_") else f"{text}; POT may have it: ot.{name}")


class _NotHere(NotImplementedError, AttributeError):
    """An error that is both, so that ``hasattr`` still answers."""
