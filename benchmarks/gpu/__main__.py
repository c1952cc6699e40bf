"""``python -m benchmarks.gpu --out DIR``: everything this project claims of a GPU, in one command.

Ceilings of the device, correctness of every kernel against float64, out-of-range and race checks,
times beside the peers, and memory; at most eight minutes on an H200, without a network. Every case
is a row of DIR/gpu.jsonl, also one that fails; DIR/gpu.md is a summary. Exit code 1 if a
correctness case fails. Without a GPU, TRITON_INTERPRET=1 rehearses all of it on tiny sizes.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Before JAX is imported: it would take most of the memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch

from dotresize.ops.l1_launch import PRECISIONS

from .. import rows
from ..tables.gpu import SECTIONS, summary
from ..workload import one_line
from . import correctness as gpu_checks
from . import serving, tolerance
from . import times as gpu_times
from .ceilings import ceilings, waits

Row = dict[str, Any]
_SANITIZERS = ("memcheck", "racecheck")
_SANITIZER_S = 75
# Processes that check; each holds a few gigabytes of the GPU at most.
_CHECKERS = 8
# On a GPU no case begins later than this after the start; those that remain are rows that say so.
# The sanitizers have time of their own after it, eight minutes in all. A rehearsal has no limit.
_BUDGET_S = 330.0

SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "l1": [(16384, 4096, 3072), (4096, 14336, 11469)],
        "gradient": [(1024, 4096, 3072)],
        # Tokens, sources, targets, calls in a row.
        "power": [
            (16384, 4096, 3072, 1),
            (16384, 4096, 3072, 20),
            (4096, 14336, 11469, 1),
            (4096, 14336, 11472, 1),
            (1024, 14336, 11469, 1),
        ],
        # Shape, and the two iteration counts whose difference gives the time of one. Both capture a
        # CUDA graph and launch as many iterations one by one, so that neither counts.
        "sinkhorn": [
            ((1, 14336, 11469), (9, 25)),
            ((1, 4096, 3072), (41, 137)),
            ((32, 4096, 3072), (9, 25)),
            ((64, 576, 464), (41, 137)),
        ],
        # Shape, reg over the mean cost, tolerance.
        "tolerance": [
            *(
                (shape, ratio, 1e-5)
                for shape in ((1, 4096, 3072), (64, 576, 464), (32, 4096, 3072), (1, 14336, 11469))
                for ratio in (0.02, 3.0)
            ),
            ((1, 4096, 3072), 0.02, 1e-7),
        ],
        # Problems, rows, kind of score.
        "assignment": [
            (problems, n, kind)
            for problems, n in ((1, 1536), (16, 576), (1, 4096))
            for kind in ("noisy copies", "unrelated neurons")
        ]
        # A user of the peer reported that this took it 26.7 s of a GPU, and scipy 1.2 s.
        + [(5, 1024, "uniform")],
        "serving": serving.FULL,
        "batch": ((1, 4, 16, 64), 576, 464, 100),
        "stopping": ((32, 4096, 3072), 50),
        # Locations, sources, targets, tokens, tokens at a time, iterations.
        "model": (64, 4096, 3072, 16384, 512, 100),
    },
    "tiny": {
        "l1": [(3, 33, 70)],
        "gradient": [(4, 9, 5)],
        "power": [(3, 9, 5, 2)],
        "sinkhorn": [((1, 5, 9), (1, 2))],
        "tolerance": [((1, 6, 5), 3.0, 1e-3)],
        "assignment": [(2, 5, "uniform")],
        "serving": serving.TINY,
        "batch": ((1, 2), 3, 7, 1),
        "stopping": ((2, 3, 7), 1),
        "model": (1, 16, 12, 40, 32, 1),
    },
}


class Report:
    """Rows, written as they come; a case that raises is a row as well."""

    def __init__(self, path: Path, about: Row, sections: tuple[str, ...], seconds: float) -> None:
        self.path, self.about, self.rows = path, about, list[Row]()
        self.sections, self.seconds = sections, seconds
        self.start = time.perf_counter()

    def add(self, section: str, case: str, run: Callable[[], Any], extra_s: float = 0) -> None:
        if section not in self.sections:
            return
        start = time.perf_counter()
        try:
            limit = self.seconds + extra_s
            if start - self.start > limit:
                raise TimeoutError(f"not begun: {limit:g} s were over")
            found = run()
            found = found if isinstance(found, list) else [found]
        except Exception as error:  # the others go on
            traceback.print_exc()
            found = [{"failed": one_line(error)}]
        found = [{"section": section, "case": case} | row for row in found]
        self.rows += found
        rows.append(self.path, [self.about | row for row in found])
        state = "failed" if any("failed" in row for row in found) else "done"
        print(f"{time.perf_counter() - start:7.1f} s  {state}  {section}: {case}", flush=True)


def environment(device: torch.device, commit: str | None) -> Row:
    """Return the device, its clocks, what is installed, and what is measured."""
    about = rows.where(torch.get_num_threads(), commit)
    if device.type != "cuda":
        return about | {"device": f"{rows.processor()}, interpreter"}
    properties = torch.cuda.get_device_properties(device)
    about |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        values = done.stdout.strip().split(", ")
        about["nvidia_smi"] = dict(zip(fields.split(","), values, strict=False))
    return about


def check(test: gpu_checks.Check, device: torch.device) -> Row:
    torch.manual_seed(0)
    error, accepted = test(device)
    row = {"error": error, "accepted": accepted}
    if not error <= accepted:
        row["failed"] = f"error {error:.2e}, accepted {accepted:.0e}"
    return row


def checked(size: str, device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Return names of the checks and what waits for their rows.

    On a GPU in several processes, as most of a check's time is spent on compilation, which all
    later sections find done; the tiny sizes too, which the sanitizers run again.
    """
    if device.type != "cuda":
        for name, test in gpu_checks.checks(size):
            yield name, functools.partial(check, test, device)
        return
    # By name: those that know no size are the same for both.
    wanted = {
        name: (one, i)
        for one in ("tiny", size)
        for i, (name, _) in enumerate(gpu_checks.checks(one))
    }
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(_CHECKERS, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {name: pool.submit(_check_alone, *which) for name, which in wanted.items()}
        for name, future in futures.items():
            yield name, future.result


def _check_alone(size: str, i: int) -> Row:
    tests = [test for _, test in gpu_checks.checks(size)]
    return check(tests[i], torch.device("cuda"))


def sanitize(tool: str) -> Row:
    """Run the tiny correctness cases in a process of their own, under a sanitizer."""
    if shutil.which("compute-sanitizer") is None:
        return {"missing": "compute-sanitizer is not installed"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
    command += ["-m", "benchmarks.gpu", "--tiny-checks"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=_SANITIZER_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it watches would live on
        process.communicate()
        return {"missing": f"not finished after {_SANITIZER_S} s"}
    last = output.strip().splitlines()[-1:]
    row: Row = {"returncode": process.returncode, "last_line": "".join(last)[:200]}
    if process.returncode:
        row["failed"] = row["last_line"]
    return row


def run(
    out: Path,
    peers: bool,
    sections: tuple[str, ...] = SECTIONS,
    seconds: float | None = None,
    commit: str | None = None,
) -> int:
    on_gpu = torch.cuda.is_available()
    if seconds is None:
        seconds = _BUDGET_S if on_gpu else math.inf
    device = torch.device("cuda" if on_gpu else "cpu")
    size = "full" if on_gpu else "tiny"
    sizes, clock = SIZES[size], gpu_times.Clock(device)
    report = Report(out / "gpu.jsonl", environment(device, commit), sections, seconds)
    rates = waits(device, clock.median) | ceilings(device, clock.median)
    for name, rate in rates.items():
        report.add("ceiling", name, lambda r=rate: {"per_s": r()})
    if "check" in sections:
        for name, result in checked(size, device):
            report.add("check", name, result)
        clock.tidy()
    for shape, counts in sizes["sinkhorn"]:
        report.add(
            "sinkhorn",
            str(shape),
            lambda s=shape, c=counts: gpu_times.sinkhorn_rows(s, c, clock, peers),
        )
    for shape, ratio, tol in sizes["tolerance"]:
        report.add(
            "tolerance",
            f"{shape}, reg {ratio:g} of the mean, tol {tol:g}",
            lambda given=(shape, ratio, tol): tolerance.rows(*given, clock, peers),
        )
    for problems, n, kind in sizes["assignment"]:
        report.add(
            "assignment",
            f"{problems} of {n} x {n}, {kind}",
            lambda given=(problems, n, kind): gpu_times.assignment_rows(*given, clock, peers),
        )
    for shape in sizes["l1"]:
        report.add("l1", str(shape), lambda s=shape: gpu_times.l1_rows(s, clock, peers))
    for shape in sizes["gradient"]:
        report.add("gradient", str(shape), lambda s=shape: gpu_times.gradient_rows(s, clock, peers))
    for given in sizes["power"]:
        report.add("power", str(given), lambda g=given: gpu_times.power_row(clock, *g))
    report.add(
        "batch", str(sizes["batch"][1:]), lambda: gpu_times.batch_rows(clock, *sizes["batch"])
    )
    report.add(
        "stopping",
        str(sizes["stopping"]),
        lambda: gpu_times.stopping_row(clock, *sizes["stopping"]),
    )
    for precision in PRECISIONS:
        # Once to compile what is new.
        run_model = lambda p=precision: [  # noqa: E731
            gpu_times.model_row(clock, p, *sizes["model"]) for _ in range(1 + on_gpu)
        ][-1]
        report.add("model", precision, run_model)
    for name, shape in serving.cases(sizes["serving"]):
        report.add(
            "serving", name, lambda n=name, s=shape: serving.rows(n, s, sizes["serving"], clock)
        )
    # Last: one that has to be stopped disturbs no timing.
    for tool in _SANITIZERS if on_gpu else ():
        report.add("sanitizer", tool, lambda t=tool: sanitize(t), extra_s=_SANITIZER_S)
    text = summary(report.about, report.rows)
    (out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    wrong = [r for r in report.rows if r["section"] in ("check", "sanitizer") and "failed" in r]
    return 1 if wrong else 0


def tiny_checks() -> int:
    found = [check(test, torch.device("cuda")) for _, test in gpu_checks.checks("tiny")]
    return 1 if any("failed" in row for row in found) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.jsonl and gpu.md")
    parser.add_argument("--no-peers", action="store_true", help="time this project only")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        help="what to measure; rows are appended (all)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"no case but a sanitizer begins later (on a GPU {_BUDGET_S:g})",
    )
    parser.add_argument(
        "--commit",
        help="commit that rows name where the sources came without their git history",
    )
    parser.add_argument("--tiny-checks", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("torch sees no GPU; set TRITON_INTERPRET=1 to rehearse on tiny sizes")
    if arguments.tiny_checks:
        return tiny_checks()
    if arguments.out is None:
        parser.error("--out: a folder is needed")
    if arguments.seconds is not None and not arguments.seconds > 0:
        parser.error(f"--seconds {arguments.seconds:g}: must be above 0")
    if arguments.commit is not None and not re.fullmatch("[0-9a-f]{7,40}", arguments.commit):
        parser.error(f"--commit {arguments.commit}: must be 7 to 40 hexadecimal digits")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {arguments.out}: cannot be made a folder ({error.strerror})")
    return run(
        arguments.out,
        not arguments.no_peers,
        tuple(arguments.sections),
        arguments.seconds,
        arguments.commit and arguments.commit[:7],
    )


if __name__ == "__main__":
    raise SystemExit(main())
