"""Several Python threads, forked processes, and the same numbers every time."""

from __future__ import annotations

import concurrent.futures
import copy
import os
import threading

import pytest
import torch
from conftest import ON_GPU, PATIENCE, device_of, tiny_model
from torch.utils.data import DataLoader, Dataset

from dotresize import assignment, compress, l1_cost, sinkhorn
from dotresize.models.in_use import alone_with


def work(seed: int, backend: str = "auto", neurons: int = 260) -> tuple[torch.Tensor, ...]:
    """All operators once, on problems of a size that several C++ threads share."""
    generator = torch.Generator().manual_seed(seed)
    small = backend == "triton"
    x = torch.rand(2, 40, 24 if small else neurons, generator=generator).to(device_of(backend))
    cost = l1_cost(x, backend=backend)
    result = sinkhorn(cost, 0.05, tol=1e-4, max_iter=5 if small else 300, backend=backend)
    return cost.cpu(), result.plan.cpu(), assignment(cost, maximize=False).cpu()


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_python_threads_at_once(backend):
    if backend == "triton" and not ON_GPU:
        pytest.skip("Triton's interpreter patches its language module, so it takes one thread")
    expected = [work(seed, backend) for seed in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for _ in range(2):
            found = list(pool.map(work, range(6), [backend] * 6))
            assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_deterministic(backend):
    assert same(work(3, backend), work(3, backend))


class Problems(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, seed: int) -> tuple[torch.Tensor, ...]:
        return work(seed)


def test_forked_loader_workers():
    expected = [work(seed) for seed in range(4)]  # the parent's threads have run before the fork
    loader = DataLoader(
        Problems(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE
    )
    assert all(same(a, b) for a, b in zip(expected, loader, strict=True))


FORKED = """
import os, sys, torch
sys.path.insert(0, "tests")
from test_concurrency import same, work
torch.set_num_threads(2)
expected = work(1, neurons=100)  # few enough for torch's own operations to take one thread
child = os.fork()
if child == 0:
    os._exit(0 if same(expected, work(1, neurons=100)) else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_bare_fork_after_threads_have_run(run_python):
    done = run_python(FORKED)
    assert done.returncode == 0, done.stderr


def test_models_narrowed_in_threads():
    """Two models in three threads: calls wait for those with the same model, hooks and all.

    Models are made whose parameters have no memory at first: no other thread's are.
    """
    models, tokens = [tiny_model() for _ in range(2)], torch.randint(0, 256, (4, 33))

    def narrowed(model):
        return compress(model, tokens, ff_width=28, self_windows=0)[0].state_dict()

    expected = [narrowed(model) for model in models]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        made = [pool.submit(narrowed, model) for model in models * 3]
        others = [pool.submit(torch.nn.Linear, 2, 2) for _ in range(200)]
        assert not any(other.result().weight.is_meta for other in others)
        for i, one in enumerate(made):
            assert all(map(torch.equal, one.result().values(), expected[i % 2].values()))
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_one_thread_at_a_time_has_a_model():
    """Shallow copies and the base model are the same one; its own thread may enter again."""
    model, other = tiny_model(), tiny_model()
    entered = []

    def enter(one):
        with alone_with(one):
            entered.append(one)

    with alone_with(model), alone_with(copy.copy(model)), alone_with(model.model):
        waiting = [
            threading.Thread(target=enter, args=(one,))
            for one in (copy.copy(model), model.model, model)
        ]
        free = threading.Thread(target=enter, args=(other,))
        for thread in (*waiting, free):
            thread.start()
        free.join(PATIENCE)
        assert entered == [other]
    for thread in waiting:
        thread.join(PATIENCE)
    assert len(entered) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_waits_for_no_thread_of_its_parent():
    model, begun, ended = tiny_model(), threading.Event(), threading.Event()

    def hold():
        with alone_with(model):
            begun.set()
            ended.wait(PATIENCE)

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        with alone_with(model):
            os._exit(0)
    ended.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
