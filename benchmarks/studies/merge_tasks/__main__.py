"""What merging feed-forwards costs on real tasks, and what a short training brings back.

    python -m benchmarks.studies.merge_tasks images --out FILE [--data FOLDER] [--seeds 0 1 2]
    python -m benchmarks.studies.merge_tasks translation --out FILE --data FOLDER
    python -m benchmarks.studies.merge_tasks speech --out FILE --data FOLDER --seeds 0
    python -m benchmarks.studies.merge_tasks language --out FILE --seeds 0
    python -m benchmarks.studies.merge_tasks memory --out FILE --seeds 0

Images and translation train their model once, and keep it in --cache. A third and a half of the
feed-forwards are merged, with and without permutation, and as many layers dropped; other windows
and anchors for the third. Each is trained by the same steps. For speech the model is Whisper base;
nothing is trained. For language it is SmolLM2, and narrowing to as many parameters is compared with
merging. Memory is what SmolLM2 takes when it is loaded, merged or not. A row is appended as soon as
a case is finished; a run that is started again skips the rows that FILE has, and goes on with a
training that was interrupted.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path

import torch

from ...rows import append, read, where
from . import images, language, memory, speech, translation

TASKS = {
    "images": images,
    "translation": translation,
    "speech": speech,
    "language": language,
    "memory": memory,
}
# Steps of the training that makes the dense model, where the benchmark makes it.
STEPS = {"images": 8000, "translation": 6000}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    parser.add_argument("--data", type=Path, help="where the data set lies (as its package has it)")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "dotresize", help="for the models"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    chosen = TASKS[args.task]
    if args.data is not None and Path() == chosen.DATA:
        parser.error(f"--data: {args.task} takes none, its texts come with packages")
    data = args.data or chosen.DATA
    task = chosen.task(data, args.cache / args.task, STEPS.get(args.task, 0))
    rows = read(args.out) if args.out.exists() else []
    done = {(row["task"], row["case"], str(row.get("merged")), row["seed"]) for row in rows}
    about = where(torch.get_num_threads()) | {"task": task.name, "data": task.data}

    def keep(row: dict) -> None:
        append(args.out, [about | row])
        found = row.get("after", row["before"])
        sys.stdout.write(f"{row['case']}, {row.get('merged')}, seed {row['seed']}: {found}\n")
        sys.stdout.flush()

    if (task.name, "dense", "None", 0) not in done:
        keep({"case": "dense", "seed": 0} | task.dense())
    for seed in args.seeds:
        for case in task.cases():
            merged = dict(case.stacks)
            if (task.name, case.name, str(merged), seed) in done:
                continue
            words = "-".join([case.name, *(f"{name}-{k}" for name, k in merged.items())])
            folder = args.cache / args.task / f"{words}-{seed}".replace(" ", "-").replace(",", "")
            found = task.run(case, seed, folder)
            score = next(iter(found["before"]))
            keep({"case": case.name, "merged": merged, "seed": seed, "score": score} | found)
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
