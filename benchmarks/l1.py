"""The L1 cost: this project's backends, and its peers.

Every peer gets the layout and type that it is fastest with, made outside the timing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dotresize import BackendError, l1_cost
from dotresize.ops import reference
from dotresize.ops.backends import choose, cpp

from .workload import Case, Competitor, NotHere, Workload, need, need_installed

OURS = "dotresize cpp"
LIMIT = "dotresize cpp, tile from registers"
CHECKED_ROWS = 128

# The demo model's residual width at 0.8, then larger ones.
CASES = [
    Case("l1", {"tokens": 4096, "n": 576, "m": 468}),
    Case("l1", {"tokens": 4096, "n": 1024, "m": 768}),
    Case("l1", {"tokens": 4096, "n": 1024, "m": 1024}),
    Case("l1", {"tokens": 4096, "n": 2048, "m": 1536}),
    Case("l1", {"tokens": 4096, "n": 4096, "m": 3072}),
]


def build(case: Case, *, peers: bool = True) -> Workload:
    """Return competitors over seeded normal activations (tokens, n) and (tokens, m)."""
    torch.manual_seed(0)
    problems, tokens = case.sizes.get("problems", 1), case.sizes["tokens"]
    x = torch.randn(problems, tokens, case.sizes["n"])
    y = torch.randn(problems, tokens, case.sizes["m"])
    # Rows enough to see a wrong tile of any size, and few enough for a float64 truth.
    rows = torch.linspace(0, x.shape[2] - 1, min(CHECKED_ROWS, x.shape[2])).long()
    truth = torch.cdist(x[:, :, rows].mT.double(), y.mT.double(), p=1)

    def error(result: Any) -> float:
        value = torch.as_tensor(result).reshape(problems, x.shape[2], y.shape[2])[:, rows]
        return float((value.double() - truth).norm() / truth.norm())

    work = Workload(error)
    for backend in ("cpp", "triton", "torch") if peers else ("cpp",):
        work.add(f"dotresize {backend}", functools.partial(_ours, x, y, backend, "fp32"))
    work.add("dotresize cpp, u8", functools.partial(_ours, x, y, "cpp", "u8"))
    work.add(LIMIT, lambda: _limit(case.work))
    if peers:
        for name, peer in PEERS.items():
            work.add(name, functools.partial(peer, x[0], y[0]))
    return work


def _ours(x: torch.Tensor, y: torch.Tensor, backend: str, precision: str) -> Competitor:
    try:
        choose(backend, x.device)
    except BackendError as error:
        raise NotHere(str(error)) from None
    return Competitor(
        lambda: l1_cost(x, y, reduction="sum", precision=precision, backend=backend),
        5e-3 if precision == "u8" else 1e-5,
    )


def _limit(pairs: int) -> Competitor:
    return Competitor(lambda: cpp().l1_tile_alone(pairs, torch.get_num_threads()), checked=False)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.T.contiguous()


def _cdist(x: torch.Tensor, y: torch.Tensor) -> Competitor:
    a, b = _rows(x), _rows(y)
    return Competitor(lambda: torch.cdist(a, b, p=1))


def _compiled_reference(x: torch.Tensor, y: torch.Tensor) -> Competitor:
    compiled = torch.compile(reference.l1_cost, dynamic=False)
    return Competitor(lambda: compiled(x[None], y[None]))


def _compiled_broadcast(x: torch.Tensor, y: torch.Tensor) -> Competitor:
    """Compute it as a user of torch.compile would; the compiler fuses it into one loop."""

    def broadcast(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a[:, None, :] - b[None, :, :]).abs().sum(-1)

    compiled, a, b = torch.compile(broadcast, dynamic=False), _rows(x), _rows(y)
    return Competitor(lambda: compiled(a, b))


def _scipy(x: torch.Tensor, y: torch.Tensor) -> Competitor:
    cdist = need("scipy.spatial.distance", "scipy").cdist
    a, b = _rows(x).double().numpy(), _rows(y).double().numpy()  # it computes in float64 only
    return Competitor(lambda: cdist(a, b, "cityblock"))


def _sklearn(x: torch.Tensor, y: torch.Tensor) -> Competitor:
    distances = need("sklearn.metrics", "scikit-learn").pairwise_distances
    a, b = _rows(x).double().numpy(), _rows(y).double().numpy()  # scipy computes it, in float64
    return Competitor(lambda: distances(a, b, metric="manhattan", n_jobs=torch.get_num_threads()))


def _faiss(x: torch.Tensor, y: torch.Tensor) -> Competitor:
    faiss = need("faiss", "faiss-cpu")
    faiss.omp_set_num_threads(torch.get_num_threads())
    a, b = _rows(x).numpy(), _rows(y).numpy()
    return Competitor(lambda: faiss.pairwise_distances(a, b, metric=faiss.METRIC_L1))


def _cuvs(x: torch.Tensor, y: torch.Tensor) -> Competitor:
    cupy = need("cupy", "cupy-cuda13x")
    if not x.is_cuda:
        raise NotHere("computes on a GPU only; these are CPU tensors")
    cdist = need("cupyx.scipy.spatial.distance", "cupy-cuda13x").cdist
    a, b = cupy.asarray(_rows(x)), cupy.asarray(_rows(y))
    return Competitor(lambda: torch.as_tensor(cdist(a, b, "cityblock"), device=x.device))


def _keops(x: torch.Tensor, y: torch.Tensor) -> Competitor:
    need_installed("pykeops")
    raise NotHere("reduces over pairs and has no operation that returns the matrix")


PEERS: dict[str, Callable[[torch.Tensor, torch.Tensor], Competitor]] = {
    "torch.cdist(p=1)": _cdist,
    "reference, torch.compile": _compiled_reference,
    "broadcast, torch.compile": _compiled_broadcast,
    "scipy cdist cityblock": _scipy,
    "scikit-learn manhattan": _sklearn,
    "faiss METRIC_L1": _faiss,
    "cuVS through cupy": _cuvs,
    "KeOps": _keops,
}
