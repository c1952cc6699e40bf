"""``python -m benchmarks.lm_eval_task DENSE NARROW``: one multiple choice for both, by lm-eval.

Items are made from the demo's held-out texts; nothing is downloaded. Each model is a directory, a
``.gguf`` file or a hub id that is in the cache. With ``--out FILE`` a JSON line per model is
appended to FILE.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from ..code import measured_code
from ..demo.texts import SOURCES, write_texts
from ..rows import append, device_name, versions
from .items import CHOICES, ITEMS, write_items

TEXTS = Path("demo-output/texts")
FOLDER = Path("demo-output/continuation")  # continuation.yaml names it, too
GROUP = "dotresize_continuation"
OVERALL = "overall"


def measure(source: str, batch: int) -> dict[str, Any]:
    """Return what lm-eval says of one model, and which items it gets right."""
    from dotresize.checkpoint import load_with_tokenizer

    lm_eval = importlib.import_module("lm_eval")
    harness = importlib.import_module("lm_eval.models.huggingface")
    tasks = importlib.import_module("lm_eval.tasks")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every choice made here
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded, tokenizer = load_with_tokenizer(source, device, to_narrow=False)
    # BOS as the tokenizer makes it: nothing is said of it here.
    model = harness.HFLM(pretrained=loaded.module, tokenizer=tokenizer, batch_size=batch)
    manager = tasks.TaskManager(include_path=str(Path(__file__).parent), include_defaults=False)
    results = lm_eval.simple_evaluate(model=model, tasks=[GROUP], task_manager=manager)
    config = loaded.module.config
    widths = {"width": config.hidden_size, "ff_width": getattr(config, "intermediate_size", None)}
    return _summary(results) | widths


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    """Return accuracies with standard errors by source, and a flag for each item."""
    # Newer versions put the group's name before a task's.
    task = {name: next(t for t in results["samples"] if t.endswith(name)) for name in SOURCES}
    tables = {name: results["results"][task[name]] for name in SOURCES}
    tables[OVERALL] = results["results"][GROUP]
    found: dict[str, Any] = {
        key: {name: table[f"{key},none"] for name, table in tables.items()}
        for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    }
    found["right"] = {
        name: [
            sample["acc"]
            for sample in sorted(results["samples"][task[name]], key=lambda s: s["doc_id"])
        ]
        for name in SOURCES
    }
    return found


def difference(dense: dict[str, list[float]], narrow: dict[str, list[float]]) -> dict[str, Any]:
    """Return the accuracy of one less that of the other, with a standard error, item by item.

    Both answer the same items, so their accuracies vary together, and the error of the difference
    is smaller than the errors of the two would give.
    """
    apart = {
        name: [a - b for a, b in zip(narrow[name], dense[name], strict=True)] for name in dense
    }
    apart[OVERALL] = [value for values in apart.values() for value in values]
    return {
        "acc": {name: statistics.mean(values) for name, values in apart.items()},
        "acc_stderr": {
            name: statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            for name, values in apart.items()
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the accuracies as text, a line for each model and one for the difference."""
    names = [*SOURCES, OVERALL]
    counts = [rows[0]["items"][name] for name in names]
    lines = [("accuracy", names), ("items", [str(count) for count in counts])]
    for row in rows:
        about = f"{row['model']}, {row['width']} / {row['ff_width'] or '-'}"
        lines.append((about, [_figure(row["acc"][n], row["acc_stderr"][n]) for n in names]))
        lines.append(
            (
                "  by length",
                [_figure(row["acc_norm"][n], row["acc_norm_stderr"][n]) for n in names],
            )
        )
    apart = rows[-1]["difference"]
    lines.append(("difference", [_figure(apart["acc"][n], apart["acc_stderr"][n]) for n in names]))
    first = max(len(name) for name, _ in lines)
    text = [f"{name:{first}}" + "".join(f"{cell:>16}" for cell in cells) for name, cells in lines]
    return "\n".join([*text, f"chance is {1 / CHOICES:.2f}"])


def _figure(value: float, error: float | str | None) -> str:
    return f"{value:.3f} ± {error:.3f}" if isinstance(error, float) else f"{value:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lm_eval_task", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("dense", metavar="DENSE")
    parser.add_argument("narrow", metavar="NARROW")
    parser.add_argument("--out", type=Path, help="a JSON line per model is appended to this file")
    parser.add_argument(
        "--limit", type=int, default=ITEMS, help="items of each source, at most (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=4, help="choices at a time (%(default)s)")
    args = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        raise SystemExit("needs lm-eval: pip install lm-eval")
    # Read at import; without them the hub is asked about files that lie here.
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

    calibration, held_out = write_texts(TEXTS)
    counts = write_items(FOLDER, held_out, calibration, args.limit)
    digest = hashlib.sha256(b"".join((FOLDER / f"{name}.jsonl").read_bytes() for name in SOURCES))
    where = {
        "date": datetime.date.today().isoformat(),
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "versions": versions() | {"lm-eval": importlib.metadata.version("lm-eval")},
        **measured_code(),
        "items": counts | {OVERALL: sum(counts.values())},
        "items_digest": digest.hexdigest()[:12],
    }
    rows, right = [], []
    for source in (args.dense, args.narrow):
        found = measure(source, args.batch)
        right.append(found.pop("right"))
        rows.append(where | {"model": Path(source).stem} | found)
    rows[-1]["difference"] = difference(*right)
    print(table(rows))
    if args.out is not None:
        append(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
