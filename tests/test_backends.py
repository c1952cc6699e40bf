"""backends() and the choice between them."""

from __future__ import annotations

import pytest
import torch
from conftest import ON_GPU

import dotresize
from dotresize import BackendError, backends, l1_cost, sinkhorn


def test_report_says_what_runs():
    report = backends()
    assert set(report) == {"triton", "cpp", "torch"}
    assert report["cpp"]["simd"] in ("avx512", "avx2", "portable")
    assert report["torch"]["version"] == torch.__version__
    assert all(r["available"] or r["reason"] for r in report.values())


def test_auto_takes_cpp_on_a_cpu(monkeypatch):
    from dotresize.ops import l1_launch

    monkeypatch.setattr(l1_launch, "_sum_cpp", lambda work, steps: work.out.fill_(7.0))
    assert (l1_cost(torch.rand(3, 2)) == 7.0).all()


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a GPU")
def test_named_backend_never_falls_back(run_python):
    done = run_python(
        "import torch, dotresize\n"
        "print(dotresize.backends()['triton'])\n"
        "for call in (lambda: dotresize.l1_cost(torch.rand(3, 2), backend='triton'),\n"
        "             lambda: dotresize.sinkhorn(torch.rand(3, 2), 1.0, backend='triton')):\n"
        "    try:\n        call()\n"
        "    except dotresize.BackendError as error:\n        print(error)\n"
        "print(dotresize.sinkhorn(torch.rand(3, 2), 1.0).status)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'triton' cannot run here: no CUDA or ROCm device") == 2
    assert done.stdout.endswith("converged\n")


def test_wrong_device_is_refused():
    x = torch.rand(3, 2, device="meta")
    for name in ("cpp", "triton"):
        with pytest.raises(BackendError, match="tensors, not meta"):
            l1_cost(x, backend=name)
        with pytest.raises(BackendError, match="tensors, not meta"):
            sinkhorn(x, 1.0, backend=name)


def test_impossible_simd_level(run_python):
    done = run_python("import dotresize\nprint(dotresize.backends()['cpp'])", DOTRESIZE_SIMD="sse9")
    assert "DOTRESIZE_SIMD=sse9: this machine runs" in done.stdout


def test_version():
    assert dotresize.__version__.count(".") == 2
