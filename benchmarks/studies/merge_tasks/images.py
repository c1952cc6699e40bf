"""A vision transformer of 12 layers, trained on Fashion-MNIST, whose feed-forwards are merged.

The images are those of the Debian package dataset-fashion-mnist (MIT): 60,000 to train on, of which
1,000 choose, and 10,000 to score on.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize.recovery import fine_tune

from .cases import Task

DATA = Path("/usr/share/datasets/fashion-mnist")
VALIDATION = 1000
ALIGNED = 600  # images of 17 tokens
BATCH = 64


def read(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Return images, float32 (count, 1, 28, 28) from -1 to 1, and labels, int64 (count,)."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        pixels = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8).long()
    return pixels.view(-1, 1, 28, 28).float() / 127.5 - 1, labels


def accuracy(model: Any, pixels: Tensor, labels: Tensor) -> float:
    """Return the share of images that a model names rightly, in percent."""
    right = 0
    with torch.inference_mode():
        for some, wanted in zip(pixels.split(250), labels.split(250), strict=True):
            found = model(pixel_values=some.to(model.device)).logits.argmax(-1)
            right += int((found.cpu() == wanted).sum())
    return 100 * right / len(labels)


def new_model() -> Any:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=12, num_attention_heads=3,
        image_size=28, patch_size=7, num_channels=1, num_labels=10,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config)


def task(folder: Path, cache: Path, steps: int) -> Task:
    """Return the task; its model is trained once and kept in ``cache``."""
    import transformers

    pixels, labels = read(folder, "train")
    test = read(folder, "t10k")
    examples = [
        {"pixel_values": one, "labels": label} for one, label in zip(pixels, labels, strict=True)
    ]
    train = examples[VALIDATION:]
    held_out = pixels[:VALIDATION], labels[:VALIDATION]
    made = cache / "dense"
    if not made.is_dir():
        model = new_model()
        fine_tune(
            model, train, folder=cache / "training", steps=steps, batch=BATCH, learning_rate=1e-3
        )
        model.save_pretrained(made)
    model = transformers.ViTForImageClassification.from_pretrained(made).eval()

    def batches(seed: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(train), generator=generator)[:ALIGNED] + VALIDATION
        return [{"pixel_values": pixels[some]} for some in drawn.split(64)]

    return Task(
        **{"name": "images", "data": "fashion-mnist", "model": model, "train": train},
        batches=batches,
        metric=lambda model: accuracy(model, *held_out),
        scores=lambda model: {"accuracy": accuracy(model, *test)},
        training={"steps": 400, "batch": BATCH, "learning_rate": 3e-4},
        merged=[{"encoder": 5}, {"encoder": 7}],  # a third of 12 go, and a half
    )
