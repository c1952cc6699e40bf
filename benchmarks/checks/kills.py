"""Runs killed at random moments, then resumed.

    python -m benchmarks.checks.kills --kills 20 --out FILE

A small random Llama is compressed once undisturbed. Then, for every kill, into a directory of its
own: SIGKILL at a moment drawn evenly between the first line that the run prints, before it
calibrates, and the moment when OUT is there; ``--resume``; and the weights and configs in OUT are
compared byte for byte. Half of the runs read the model by parts (``--memory``).
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from pydoc_data import topics

import torch
from tqdm import tqdm

from ..rows import append, where
from ..studies.large import make
from ..studies.large_counts import SHAPES

HOWS = {"in memory": [], "by parts": ["--memory", "4GB"]}


def weights(out: Path) -> dict[str, str]:
    """Return digests of what a model is loaded from; the report has times in it."""
    names = [*out.glob("*.safetensors"), *out.glob("*.json")]
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in names
        if path.name != "dotresize.json"
    }


def stage(out: Path) -> str:
    """Return the last stage that a killed run has finished."""
    if out.exists():
        return "all"
    partial = Path(f"{out}.partial")
    finished = [name for name in ("narrow", "calibration") if (partial / name).exists()]
    return finished[0] if finished else "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--out", type=Path, help="a row is appended to this file")
    args = parser.parse_args()
    moments, found = random.Random(args.seed), Counter()
    different = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make(SHAPES["tiny"], work / "model")
        text = work / "topics.txt"
        text.write_text("\n".join(topics.topics.values()), encoding="utf-8")

        def start(out: Path, how: str, *more: str) -> subprocess.Popen:
            words = ["compress", str(work / "model"), str(out), "--calibration", str(text)]
            words += ["--window", "128", "--windows", "48", "--width", "0.8", "--ff-width", "0.9"]
            command = [sys.executable, "-m", "dotresize", *words, "--quiet", *HOWS[how], *more]
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            process = subprocess.Popen(command, **pipes)
            process.stderr.readline()
            return process

        whole, seconds = {}, {}
        for how in HOWS:
            process, begin = start(work / how, how), time.perf_counter()
            while process.poll() is None and not (work / how).exists():
                time.sleep(0.005)
            seconds[how] = time.perf_counter() - begin
            process.communicate()
            if process.returncode:
                raise SystemExit("the undisturbed run failed")
            whole[how] = weights(work / how)
        for i in tqdm(range(args.kills), desc="kills", disable=None):
            how = list(HOWS)[i % len(HOWS)]
            out = work / f"out{i}"
            process = start(out, how)
            time.sleep(moments.uniform(0, seconds[how]))
            process.kill()
            process.communicate()
            found[stage(out)] += 1
            if not out.exists():
                process = start(out, how, "--resume")
                _, said = process.communicate()
                if process.returncode:
                    raise SystemExit(f"run {i}, {how}: could not go on: {said.decode()}")
                if Path(f"{out}.partial").exists():
                    different.append(i)
            if weights(out) != whole[how]:
                different.append(i)
            shutil.rmtree(out)
    row = {"kills": args.kills, "seed": args.seed, "finished when killed": dict(found)}
    row |= {"different": different, "seconds undisturbed": seconds}
    if args.out is not None:
        append(args.out, [where(torch.get_num_threads()) | row])
    sys.stdout.write(f"{row}\n")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
