"""What merging leaves of a model: ``python -m benchmarks.studies.merging TASK --out FILE``.

images        a ViT of 12 layers, trained here on digits of scikit-learn; five become one
translation   a Marian model of 6 + 6 layers, trained here to spell out numbers and dates; three of
              each side become one; BLEU by sacrebleu
language      SmolLM2-135M, ten of its 30, by ``dotresize merge-ff --compare --recover``

Each merges the best window, and compares: without permutation, soft alignment, the layers dropped;
then recovers. Windows are chosen on a validation set, figures are of a test set that nothing saw.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize.accounting import unique_parameters
from dotresize.merging.merge import merge_feed_forward
from dotresize.merging.tie import dropped, gone_of
from dotresize.recovery import fine_tune

from ..demo.texts import model_file, write_texts
from ..rows import append, where
from .spelling import WORDS, example

Examples = list[dict[str, Tensor]]
Metric = Callable[[Any], float]


def digits() -> tuple[Examples, Examples, Examples]:
    """Return training, validation and test images of 8 x 8, shuffled."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    found = [{"pixel_values": pixels[i], "labels": labels[i]} for i in order]
    return found[:1197], found[1197:1437], found[1437:]


def accuracy(examples: Examples) -> Metric:
    batch = _stacked(examples)

    @torch.inference_mode()
    def metric(model: Any) -> float:
        found = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
        return float((found == batch["labels"]).double().mean())

    return metric


def image_model() -> Any:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=12, num_attention_heads=4,
        image_size=8, patch_size=2, num_channels=1, num_labels=10,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def images(folder: Path) -> dict[str, Any]:
    train, validation, test = digits()
    model = image_model()
    fine_tune(model, train, folder=folder / "dense", steps=1200, batch=32, learning_rate=1e-3)
    return _compared(
        model, train, accuracy(validation), accuracy(test), folder,
        k=5, steps=400, batch=32, learning_rate=5e-4,
    )  # fmt: skip


LENGTH = 24


def spelled(count: int, seed: int) -> tuple[Examples, list[str]]:
    """Return examples as padded ids, and the sentences that they should become."""
    generator = random.Random(seed)
    found, sentences = [], []
    for _ in range(count):
        source, target = example(generator)
        ids, labels = ([WORDS.index(word) for word in side] + [1] for side in (source, target))
        padded = torch.zeros(LENGTH, dtype=torch.int64)
        padded[: len(ids)] = torch.tensor(ids)
        wanted = torch.full((LENGTH,), -100)
        wanted[: len(labels)] = torch.tensor(labels)
        mask = (torch.arange(LENGTH) < len(ids)).long()
        found.append({"input_ids": padded, "attention_mask": mask, "labels": wanted})
        sentences.append(" ".join(target))
    return found, sentences


def bleu(examples: Examples, sentences: list[str]) -> Metric:
    import sacrebleu

    batch = _stacked(examples)

    @torch.inference_mode()
    def metric(model: Any) -> float:
        ids = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            max_new_tokens=LENGTH, num_beams=1, do_sample=False,
        )  # fmt: skip
        words = [[WORDS[i] for i in row.tolist() if i > 1] for row in ids]
        found = [" ".join(row) for row in words]
        return float(sacrebleu.corpus_bleu(found, [sentences], tokenize="none").score)

    return metric


def translation_model() -> Any:
    import transformers

    config = transformers.MarianConfig(
        vocab_size=len(WORDS), d_model=96, encoder_layers=6, decoder_layers=6,
        encoder_ffn_dim=384, decoder_ffn_dim=384, encoder_attention_heads=4,
        decoder_attention_heads=4, pad_token_id=0, eos_token_id=1, forced_eos_token_id=1,
        decoder_start_token_id=0, max_position_embeddings=64, dropout=0.0, scale_embedding=True,
        init_std=0.1,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def translation(folder: Path) -> dict[str, Any]:
    train, _ = spelled(20000, 0)
    model = translation_model()
    fine_tune(model, train, folder=folder / "dense", steps=1600, batch=64, learning_rate=1e-3)
    return _compared(
        model, train, bleu(*spelled(100, 1)), bleu(*spelled(300, 2)), folder,
        k=3, steps=300, batch=64, learning_rate=5e-4,
    )  # fmt: skip


def _compared(
    model: Any, train: Examples, metric: Metric, test: Metric, folder: Path, *, k: int,
    **training: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return test figures of everything that is compared, and how the windows were chosen."""
    batches = [_stacked(train[i : i + 100]) for i in range(0, 1000, 100)]
    model.eval()
    merged, report = merge_feed_forward(model, batches, k=k, metric=metric)
    starts = {name: found["window"][0] for name, found in report["stacks"].items()}
    figures = {"dense": test(model), "merged": test(merged)}
    for name, choices in (
        ("without permutation", {"permute": False}),
        ("soft alignment", {"soft": 0.03}),
    ):
        other, _ = merge_feed_forward(model, batches, k=k, metric=metric, start=starts, **choices)
        figures[name] = test(other)
    figures["layers dropped"] = _without_layers(model, report, test)
    for name, one in (("merged, recovered", merged), ("dense, trained as long", model)):
        fine_tune(one, train, folder=folder / name, metric=metric, **training)
        figures[name] = test(one)
    report["figures"] = figures
    assert unique_parameters(merged) == report["parameters"]["merged"]
    return report


def _without_layers(model: Any, report: dict[str, Any], test: Metric) -> float:
    with dropped(model, gone_of(report["stacks"])):
        return test(model)


def language(folder: Path) -> dict[str, Any]:
    calibration, held_out = write_texts(folder / "texts")
    out = folder / "merged"
    command = [sys.executable, "-m", "dotresize", "merge-ff", str(model_file()), str(out)]
    command += ["--merge", "10", "--compare", "--recover", "20", "--eval-windows", "4"]
    command += ["--calibration", *map(str, calibration), "--eval", *map(str, held_out)]
    subprocess.run(command, check=True)
    return json.loads((out / "dotresize.json").read_text(encoding="utf-8"))


def _stacked(examples: Examples) -> dict[str, Tensor]:
    return {name: torch.stack([e[name] for e in examples]) for name in examples[0]}


TASKS = {"images": images, "translation": translation, "language": language}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--out", type=Path, help="a row for each is appended to this file")
    args = parser.parse_args()
    for name in args.tasks:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            report = TASKS[name](Path(folder))
        report.pop("settings", None)
        row = where(torch.get_num_threads()) | {"task": name} | report
        if args.out is not None:
            append(args.out, [row])
        sys.stdout.write(f"{name}: {json.dumps(row.get('figures', row.get('rows')), indent=2)}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
