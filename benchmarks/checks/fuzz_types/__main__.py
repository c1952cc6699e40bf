"""Arguments of every type: ``python -m benchmarks.checks.fuzz_types --calls 2000 --seed 0``.

Each call of a public function starts from valid arguments (solvers.py, pot.py, models.py); up to
three are replaced by values of a random kind (kinds.py, model_kinds.py), or the call is made in an
unusual context of torch's. Good are a right result, and a ValueError, TypeError, OSError or
BackendError of one line that a ``raise`` of this package has made (trial.py); all else is a fault.
``--call SEED`` makes one call and shows it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...rows import append, where
from .kinds import Draw
from .trial import CALLS, Trial, name_of, public

PROCESS_CALLS = 100
# Seconds that a call may take, on a machine however busy; the slowest takes one.
PATIENCE = 60


def work(seeds: Iterable[int]) -> None:
    """Make calls, and say on the first stdout what comes, and what came."""
    said = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for seed in seeds:
            said.write(json.dumps({"seed": seed}) + "\n")
            trial = Trial(seed)
            said.write(json.dumps({"name": trial.name, "what": trial.what}) + "\n")
            kind, text = trial.outcome()
            said.write(json.dumps({"kind": kind, "text": text[:2000]}) + "\n")
        os.chdir("/")


def rows_of(seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what the calls came to, from processes that may crash or hang."""
    while seeds:
        command = [sys.executable, "-m", __package__, "--work", *map(str, seeds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=pump, args=(process.stdout, lines), daemon=True).start()
        row: dict[str, Any] = {}
        try:
            while line := lines.get(timeout=PATIENCE if row else 10 * PATIENCE):
                found = json.loads(line)
                row = found if "seed" in found else row | found
                if "kind" in row:
                    yield row
            died = f"crash: exit code {process.wait()}" if process.wait() else ""
        except queue.Empty:
            died = f"hang: over {PATIENCE} s"
        finally:
            process.kill()
            process.wait()
        if not row:
            raise SystemExit(f"no call was made from seed {seeds[0]} on: {died}")
        if "kind" in row and died:  # memory that a call has spoilt may show later
            row = {"seed": row["seed"], "name": "?", "what": "after the call"}
        if "kind" not in row:
            yield {"name": "?", "what": "", **row, "kind": "fault", "text": died}
        seeds = seeds[seeds.index(row["seed"]) + 1 :]


def pump(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


# What messages quote; a line says nothing of the fault from there on, but for words in quotes.
QUOTED = re.compile(
    r"\b(tensor|array|nested_tensor|Parameter|\w*Tensor|masked_array)\b.*|[\[({<].*"
)


def group_of(row: dict[str, Any]) -> tuple[str, str]:
    """Return what faults are counted by: the function, and what the message begins with."""
    text = " ".join(row["text"].split())
    if text.startswith(("crash", "hang")):
        return row["name"], f"{text}, {row['what'].partition('(')[2]}"
    head, _, message = text.partition(": ")
    message = re.sub(r"\d[\d.e+-]*", "#", re.sub(r"'[^']*'", "'...'", message))
    return row["name"], f"{head}: {QUOTED.sub('...', message)[:70]}"


def show(seed: int) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        trial = Trial(seed)
        sys.stdout.write(f"{trial.what}\n")
        for name in trial.given:
            valid = " ".join(repr(trial.call.arguments[name]).split())
            sys.stdout.write(f"  {name} = {valid:.90}\n")
            if name in trial.odd:
                sys.stdout.write(f"    replaced by: {trial.odd[name].label}\n")
        sys.stdout.flush()
        kind, text = trial.outcome(show=True)
        os.chdir("/")
    sys.stdout.write(f"{kind}: {text}\n")
    return int(kind == "fault")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--call", type=int, metavar="SEED", help="make this call alone, and show it"
    )
    parser.add_argument("--out", type=Path, help="append the summary here as a JSON line")
    parser.add_argument("--only", help="of these functions alone, by name, with commas between")
    parser.add_argument("--work", type=int, nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if missing := sorted(public() - CALLS.keys()):
        raise SystemExit(
            f"dotresize.{missing[0]} has no call: add one to benchmarks/checks/fuzz_types"
        )
    if given.work:
        work(given.work)
        return 0
    if given.call is not None:
        return show(given.call)
    only = set(given.only.split(",")) if given.only else CALLS.keys()
    if unknown := sorted(only - CALLS.keys()):
        raise SystemExit(f"{unknown[0]} is none of {', '.join(CALLS)}")
    every = (seed for seed in itertools.count(given.seed * 10**9) if name_of(Draw(seed)) in only)
    seeds, begin = list(itertools.islice(every, given.calls)), time.perf_counter()
    kinds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    faults: dict[tuple[str, str], list[dict]] = {}
    progress = tqdm(total=len(seeds), disable=None)
    for start in range(0, len(seeds), PROCESS_CALLS):
        for row in rows_of(seeds[start : start + PROCESS_CALLS]):
            progress.update()
            kinds[row["kind"]] += 1
            calls[row["name"]] += 1
            if row["kind"] == "fault":
                faults.setdefault(group_of(row), []).append(row)
    progress.close()
    for (name, message), rows in sorted(faults.items()):
        print(f"{len(rows):4} x {name}: {message}")
        print(f"       --call {rows[0]['seed']}  {rows[0]['what']}")
    summary = {
        "seed": given.seed,
        "calls": dict(sorted(calls.items())),
        **{kind: kinds[kind] for kind in ("right", "refused", "fault")},
        "seconds": round(time.perf_counter() - begin, 1),
    }
    print(json.dumps(summary))
    if given.out:
        groups = [
            {"function": name, "says": text, "times": len(rows), "call": rows[0]["seed"]}
            for (name, text), rows in sorted(faults.items())
        ]
        append(given.out, [where(threads=1) | summary | {"faults": groups}])
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
