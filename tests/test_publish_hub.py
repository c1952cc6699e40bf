"""The directory for Hugging Face's kernel hub: its own package loads it, and its solvers solve."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from publish import hub

KERNELS = Path(sys.prefix) / "hub-kernels"  # where ``make test`` installs it, for here alone
SOLVE = """
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel

dotresize = get_local_kernel(Path(sys.argv[1]))
assert not any(name.split(".")[0] == "dotresize" for name in sys.modules)
given = torch.load(sys.argv[2], weights_only=True)
found = {}
for backend in ("torch", "triton"):
    result = dotresize.sinkhorn(given["cost"], 0.1, tol=1e-6, backend=backend)
    assert result.status == ("converged",) * 2, result.status
    found[backend] = result.plan.double()
    found[backend + " l1"] = dotresize.l1_cost(given["x"], backend=backend).double()
assert "dotresize" not in sys.modules
print(torch.__version__)
torch.save(found, sys.argv[3])
"""


def test_the_hubs_package_loads_the_kernels(tmp_path):
    if not KERNELS.is_dir():
        pytest.skip(f"{KERNELS} is not there: see the Makefile")
    out = tmp_path / "dotresize"
    assert hub.write(out) == out / "build" / "torch-universal"
    x, cost = torch.randn(2, 33, 9), torch.rand(2, 9, 7)
    torch.save({"x": x, "cost": cost}, tmp_path / "given")
    paths = [str(tmp_path / name) for name in ("dotresize", "given", "found")]
    done = subprocess.run(
        [sys.executable, "-c", SOLVE, *paths],
        cwd=tmp_path,
        env={"PYTHONPATH": str(KERNELS), "TRITON_INTERPRET": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found", weights_only=True)
    plan = _sinkhorn(cost.double(), 0.1)
    distance = (x.double()[:, :, :, None] - x.double()[:, :, None]).abs().mean(1)
    for backend in ("torch", "triton"):
        assert (found[backend] - plan).abs().sum((1, 2)).max() < 1e-5
        assert torch.allclose(found[f"{backend} l1"], distance, atol=1e-6)


def _sinkhorn(cost: torch.Tensor, reg: float) -> torch.Tensor:
    """Return plans between uniform marginals, float64, by many plain updates."""
    kernel = (-cost / reg).exp()
    v = cost.new_ones(len(cost), cost.shape[2])
    for _ in range(5000):
        u = 1 / cost.shape[1] / (kernel @ v[..., None])[..., 0]
        v = 1 / cost.shape[2] / (kernel.mT @ u[..., None])[..., 0]
    return u[..., None] * kernel * v[:, None]


def test_a_directory_that_is_there_stays(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine: is there already; give a directory that is"):
        hub.write(tmp_path / "mine")
    with pytest.raises(ValueError, match="version 0: must be at least 1"):
        hub.write(tmp_path / "other", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
