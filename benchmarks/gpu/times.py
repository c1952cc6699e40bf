"""Times on a GPU: this project's kernels and the peers, on the same tensors, taking turns."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dotresize import L1CostAccumulator, assignment, l1_cost, sinkhorn
from dotresize.ops.constants import L1Operands
from dotresize.ops.l1_launch import PRECISIONS

from .. import assignment as matching
from .. import l1
from .. import sinkhorn as solver
from ..workload import Competitor, NotHere, Workload, one_line
from .correctness import ROWS, WAYS, l1_accepted, relative, solved_by

Row = dict[str, Any]
ROUNDS = 7
LIMIT_S = 1.0  # of a call; a slower peer is timed once
FROM_POINTS = (1, 4096, 3072)  # the problem beside which one from points is timed
# Rows up to which the assignment's peer runs: it gives a problem one warp, and nothing stops it.
PEER_ROWS = 2048


class Clock:
    """Seconds of a call by device events, the caches emptied before it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        size = 1 << 28 if self.on_gpu else 1
        self.rounds = ROUNDS if self.on_gpu else 2
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        result = call()
        end.record()
        torch.cuda.synchronize(self.device)
        del result
        return begin.elapsed_time(end) / 1e3

    def median(self, call: Callable[[], Any]) -> float:
        call()
        return statistics.median(self(call) for _ in range(self.rounds))

    def race(self, work: Workload, prepared: bool = False) -> list[Row]:
        """Check all competitors, then time them in turns; return their rows.

        The call that is checked is timed as well, for those slower than LIMIT_S, only where the
        competitors are ``prepared``: have compiled what they need.
        """
        rows = [{"name": name, "missing": why} for name, why in work.missing.items()]
        times: dict[str, list[float]] = {}
        for name, competitor in work.competitors.items():
            kept: list[Any] = []
            try:
                once = self(lambda c=competitor.call, k=kept: k.append(c()))
                error = work.error(kept.pop()) if competitor.checked else None
                if error is not None and not error <= competitor.accepted:
                    raise ArithmeticError(f"relative error {error:.1e}")
                if not prepared:
                    once = self(competitor.call)
            except Exception as failure:  # a row, not the end
                rows.append({"name": name, "failed": one_line(failure)})
                self.tidy()
                continue
            row = {"name": name, "error": error, "median_s": once, "rounds": 1}
            rows.append(row)
            if once < LIMIT_S:
                times[name] = []
        for _ in range(self.rounds):
            for name, taken in times.items():
                with contextlib.suppress(Exception):
                    taken.append(self(work.competitors[name].call))
        for row in rows:
            if len(taken := times.get(row["name"], [])) > 1:
                low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
                row |= {"median_s": median, "quartiles_s": [low, high], "rounds": len(taken)}
        self.tidy()
        return rows

    def tidy(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()


def l1_rows(shape: tuple[int, int, int], clock: Clock, peers: bool) -> list[Row]:
    """Return rows of (tokens, n, m) sums of |x - y|, with pairs per second."""
    tokens, n, m = shape
    x = torch.randn(tokens, n, device=clock.device)
    y = torch.randn(tokens, m, device=clock.device)
    rows = torch.linspace(0, n - 1, min(n, ROWS), device=clock.device).long()
    truth = torch.cdist(x[:, rows].mT.double(), y.mT.double(), p=1)

    def error(result: Any) -> float:
        return relative(torch.as_tensor(result).view(n, m)[rows], truth)

    work = Workload(error)
    for precision in PRECISIONS:
        accepted = l1_accepted(precision, tokens)
        options: dict[str, Any] = {"reduction": "sum", "precision": precision, "backend": "triton"}
        call = lambda o=options: l1_cost(x, y, **o)  # noqa: E731
        work.add(f"dotresize {precision}", lambda c=call, a=accepted: Competitor(c, a))
    if peers:
        reference = functools.partial(l1_cost, x, y, reduction="sum", backend="torch")
        work.add("dotresize torch", lambda: Competitor(reference, 1e-5))
        for name in ("torch.cdist(p=1)", "broadcast, torch.compile", "cuVS through cupy"):
            work.add(name, lambda p=l1.PEERS[name]: p(x, y))
    found = clock.race(work)
    for row in found:
        if "median_s" in row:
            row["pairs_per_s"] = tokens * n * m / row["median_s"]
    return found


def power_row(clock: Clock, tokens: int, n: int, m: int, calls: int) -> Row:
    """Time float32 costs in a row, and say what the multiprocessors' clock fell to meanwhile.

    Says whether a long call is slow because of its shape or because power runs out: a shape whose
    rate falls with the number of calls, and the clock with it, is short of power.
    """
    from dotresize.kernels.l1_cost import l1_cost as launch

    x, y = (torch.randn(1, tokens, k, device=clock.device) for k in (n, m))
    out = torch.empty(1, n, m, device=clock.device)
    work = L1Operands(x, y, None, out, accumulate=False, divisor=None)  # nothing waits for it
    clocks: list[int] = []

    def several() -> None:
        for _ in range(calls):
            launch(work)
        if clock.on_gpu:
            end = torch.cuda.Event()
            end.record()
            while not end.query():
                clocks.append(torch.cuda.clock_rate(clock.device))

    seconds = clock.median(several)
    row: Row = {"median_s": seconds, "pairs_per_s": calls * tokens * n * m / seconds}
    return row | {"clock_samples": len(clocks), "lowest_clock_mhz": min(clocks, default=None)}


def gradient_rows(shape: tuple[int, int, int], clock: Clock, peers: bool) -> list[Row]:
    """Return rows of the gradients by x of (tokens, n, m) costs, with pairs per second."""
    tokens, n, m = shape
    x = torch.randn(tokens, n, device=clock.device, requires_grad=True)
    y = torch.randn(tokens, m, device=clock.device)
    incoming = torch.randn(n, m, device=clock.device)
    some = torch.linspace(0, tokens - 1, min(tokens, ROWS), device=clock.device).long()
    few = x.detach()[some].double()
    truth = torch.empty_like(few)
    for i, (own, other) in enumerate(zip(few, y[some].double(), strict=True)):
        truth[i] = (incoming * torch.sign(own[:, None] - other)).sum(1)

    def error(result: Any) -> float:
        return relative(result[0][some], truth)

    def prepared(cost: Tensor) -> Competitor:
        gradient = functools.partial(torch.autograd.grad, cost, x, incoming, retain_graph=True)
        return Competitor(gradient, 1e-5)

    work = Workload(error)
    options: dict[str, Any] = {"reduction": "sum", "backend": "triton"}
    work.add("dotresize", lambda: prepared(l1_cost(x, y, **options)))
    forward = functools.partial(l1_cost, x.detach(), y, **options)
    work.add("dotresize, the cost", lambda: Competitor(forward, checked=False))
    if peers:
        work.add("torch.cdist(p=1)", lambda: prepared(torch.cdist(x.mT, y.mT, p=1)))
    found = clock.race(work)
    for row in found:
        if "median_s" in row:
            row["pairs_per_s"] = tokens * n * m / row["median_s"]
    return found


def sinkhorn_rows(
    shape: tuple[int, int, int], counts: tuple[int, int], clock: Clock, peers: bool
) -> list[Row]:
    """Return seconds per iteration, from the difference of two iteration counts.

    What is done once (minima, compilation, the peers' plans) does not count so.
    """
    cost = torch.rand(shape, device=clock.device)
    works = [_sinkhorn_work(cost, count, peers) for count in counts]
    few, many = (clock.race(work) for work in works)
    found = []
    shorter = {row["name"]: row for row in few}
    for longer in many:
        short = shorter[longer["name"]]
        if "median_s" not in short:
            longer = short
        elif "median_s" in longer:
            seconds = (longer["median_s"] - short["median_s"]) / (counts[1] - counts[0])
            longer = longer | {"iterations": list(counts)}
            if seconds > 0:
                longer["per_iteration_s"] = seconds
            else:  # of a busy machine
                longer["failed"] = f"{counts[1]} iterations took no longer than {counts[0]}"
        found.append(longer)
    return found


def _sinkhorn_work(cost: Tensor, count: int, peers: bool) -> Workload:
    truth = solver.plain(cost[:1].double(), count)

    def error(result: Any) -> float:
        if hasattr(result, "n_iter"):
            result = result[0].plan
        elif not isinstance(result, Tensor):
            result = torch.from_numpy(np.array(result)).to(cost.device)
        return relative(result.reshape(-1, *cost.shape[-2:])[:1], truth)

    work = Workload(error)
    for name, storage, given, _, accepted in WAYS:
        call = functools.partial(_solved, cost, count, storage, given)
        work.add(f"dotresize {name}", lambda c=call, a=accepted: Competitor(c, max(a, 5e-3)))
    if peers:
        reference = functools.partial(
            sinkhorn, cost, solver.REG, tol=0, max_iter=count, backend="torch"
        )
        work.add("dotresize torch", lambda: Competitor(reference))
        names = ("torch logsumexp loop", "torch logsumexp loop, torch.compile", "POT ot.batch")
        for name in (*names, "OTT-JAX, jit"):
            # They end on a column update, we on a row update: apart until both have converged.
            work.add(
                name, lambda p=solver.PEERS[name]: dataclasses.replace(p(cost, count), accepted=0.1)
            )
        if cost.shape == FROM_POINTS:
            another = (
                f"another problem: flash-sinkhorn, {solver.POINT_DIMENSIONS}-D points, squared"
            )
            sizes = (*FROM_POINTS[1:], count, cost.device)
            work.add(another, lambda: solver.flash_from_points(*sizes))
    return work


def _solved(cost: Tensor, count: int, storage: str, given: dict[str, bool]) -> Any:
    with solved_by(**given):
        return sinkhorn(cost, solver.REG, tol=0, max_iter=count, storage=storage, backend="triton")


def assignment_rows(problems: int, n: int, kind: str, clock: Clock, peers: bool) -> list[Row]:
    """Return seconds of both ways of a score on a GPU: by the host alone, and through Sinkhorn."""
    score = torch.stack([matching.score_of(kind, n) for _ in range(problems)]).to(clock.device)
    # What the certificate's duals prove to be the best, whoever found them.
    _, proof = assignment(score.cpu(), certificate=True, backend="cpp")
    best = (proof.u + proof.v).sum(1)

    def error(columns: Tensor) -> float:
        columns = columns.to(score.device)
        if not (columns.sort(1).values == torch.arange(n, device=score.device)).all():
            return math.inf
        value = score.double().gather(2, columns[:, :, None]).sum((1, 2)).cpu()
        return float(((value - best) / best).abs().max())

    host = lambda: assignment(score.cpu(), backend="cpp").to(score.device)  # noqa: E731
    through = functools.partial(assignment, score, backend="triton")
    work = Workload(error)
    work.add("dotresize cpp", lambda: Competitor(host, matching.EXACT))
    work.add("dotresize triton", lambda: Competitor(through, matching.EXACT))

    def peer() -> Competitor:
        if n > PEER_ROWS:
            raise NotHere(f"gives a problem one warp: not run above {PEER_ROWS} rows")
        return matching.PEERS[matching.GPU_PEER](list(-score.double()))

    if peers:
        work.add(matching.GPU_PEER, peer)
    return clock.race(work)


def batch_rows(clock: Clock, problems: tuple[int, ...], n: int, m: int, count: int) -> list[Row]:
    """Time one call for a batch against one call for each problem."""
    rows = []
    for batch in problems:
        cost = torch.rand(batch, n, m, device=clock.device)
        solve = functools.partial(sinkhorn, reg=solver.REG, tol=0, max_iter=count, backend="triton")
        together = clock.median(functools.partial(solve, cost))
        alone = clock.median(lambda c=cost, s=solve: [s(v) for v in c])
        row = {"name": f"batch of {batch}", "median_s": together, "singles_s": alone}
        rows.append(row | {"iterations": count})
    return rows


def stopping_row(clock: Clock, shape: tuple[int, int, int], count: int) -> Row:
    """Time half a batch when the other half has converged at once."""
    cost = torch.rand(shape, device=clock.device)
    tol = torch.zeros(shape[0])
    options: dict[str, Any] = {"max_iter": count, "backend": "triton"}
    whole = clock.median(lambda: sinkhorn(cost, solver.REG, tol=tol, **options))
    tol[shape[0] // 2 :] = 1e6
    half = clock.median(lambda: sinkhorn(cost, solver.REG, tol=tol, **options))
    return {"name": "half of the batch stops at once", "median_s": half, "all_s": whole}


def model_row(
    clock: Clock,
    precision: str,
    layers: int,
    n: int,
    m: int,
    tokens: int,
    chunk: int,
    count: int,
) -> Row:
    """Time all costs and plans of a model's residual locations, tokens arriving in chunks."""
    if clock.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    accumulator = L1CostAccumulator(
        n,
        targets=torch.arange(m, device=clock.device),
        batch=layers,
        precision=precision,
        device=clock.device,
        backend="triton",
    )
    found: dict[str, Any] = {}

    def costs(accumulator: L1CostAccumulator, x: Tensor) -> None:
        for _ in range(math.ceil(tokens / chunk)):
            accumulator.update(x)

    def solve() -> None:
        found["result"] = sinkhorn(found["cost"], 0.1, tol=0, max_iter=count, backend="triton")

    row: Row = {"name": f"{layers} of {n} x {m}, {tokens} tokens, {precision}"}
    x = torch.randn(layers, chunk, n, device=clock.device)
    row["costs_s"] = clock(functools.partial(costs, accumulator, x))
    found["cost"] = accumulator.result()
    del accumulator, x
    row["solve_s"] = clock(solve)
    row["plans_s"] = clock(lambda: found["result"].plan)
    row["total_s"] = row["costs_s"] + row["solve_s"] + row["plans_s"]
    row["peak_bytes"] = torch.cuda.max_memory_allocated() if clock.on_gpu else None
    found.clear()
    clock.tidy()
    return row
