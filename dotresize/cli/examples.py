"""Labelled examples for ``merge-ff --task``: images in a folder for each label, sentence pairs.

A task reads its model and its examples, makes model inputs of them, and scores a model by them.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dotresize.checkpoint import check_complete
from dotresize.checkpoint.source import first_line, locate, one_line
from dotresize.cli.checks import check_distinct

# Examples that pass a model at a time, and tokens of a sentence, its translation, at most.
BATCH = 16
LONGEST = 128

Example = tuple[Any, Any]


class Task(ABC):
    """A model of a task, and what it is judged by.

    Attributes:
        word: what ``--task`` calls it.
        pipeline: what the hub calls it.
        auto, auto_processor: the classes of transformers that read the model, and what makes its
            inputs.
        module, processor: these two, read.
    """

    word: ClassVar[str]
    pipeline: ClassVar[str]
    auto: ClassVar[str]
    auto_processor: ClassVar[str]

    def __init__(self, source: str, device: torch.device) -> None:
        """Read model and processor; ValueError in one line for what is none of the task."""
        transformers: Any = importlib.import_module("transformers")
        transformers.utils.logging.set_verbosity_error()
        if not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE"):
            transformers.utils.logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        where, options = locate(source)
        if "gguf_file" in options:
            raise ValueError(f"model {source}: --task {self.word} reads a directory or a hub id")
        with one_line(source):
            kind = getattr(transformers, self.auto)
            module, problems = kind.from_pretrained(
                where, dtype="auto", use_safetensors=True, output_loading_info=True, **options
            )
            self.processor = getattr(transformers, self.auto_processor).from_pretrained(
                where, **options
            )
        check_complete(source, problems)
        self.module = module.to(device).eval()

    @classmethod
    @abstractmethod
    def read(cls, option: str, paths: list[str]) -> list[Example]:
        """Return the examples that an option names, each a thing and what it should become.

        Raises ValueError, naming the option, for what cannot be read.
        """

    @classmethod
    @abstractmethod
    def content(cls, example: Example) -> bytes:
        """Return all that an example holds, for what ``--resume`` compares."""

    @abstractmethod
    def inputs(self, examples: list[Example]) -> dict[str, Tensor]:
        """Return one batch of model inputs, with labels, on the host."""

    @abstractmethod
    def scores(self, model: Any, examples: list[Example]) -> dict[str, float]:
        """Return what a model is worth on the examples, in percent, by the score's name."""

    def check(self, examples: list[Example]) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise ValueError for examples that are not of the model."""

    def batches(self, examples: list[Example]) -> Iterator[dict[str, Tensor]]:
        """Yield batches of model inputs, with labels, in the model's type, on its device."""
        kind, device = self.module.dtype, self.module.device
        for first in range(0, len(examples), BATCH):
            inputs = self.inputs(examples[first : first + BATCH])
            yield {
                name: x.to(device, kind if x.is_floating_point() else x.dtype)
                for name, x in inputs.items()
            }


class Images(Task):
    """Classification of images: a folder for each label, which the model knows by that name."""

    word, pipeline = "image", "image-classification"
    auto, auto_processor = "AutoModelForImageClassification", "AutoImageProcessor"

    @classmethod
    def read(cls, option: str, paths: list[str]) -> list[Example]:
        if importlib.util.find_spec("PIL") is None:
            raise ValueError("--task image needs pillow: pip install 'dotresize[merge]'")
        from PIL import Image

        readable = Image.registered_extensions()
        known = {suffix for suffix, kind in readable.items() if kind in Image.OPEN}
        found: list[Example] = []
        check_distinct(option, paths)
        for path in paths:
            if not Path(path).is_dir():
                raise ValueError(f"{option} {path}: must be a folder with a folder for each label")
            files = sorted(file for file in Path(path).glob("*/*") if file.is_file())
            files = [file for file in files if file.suffix.lower() in known]
            if not files:
                raise ValueError(f"{option} {path}: holds no images in a folder for each label")
            found += [(file, file.parent.name) for file in files]
        return found

    @classmethod
    def content(cls, example: Example) -> bytes:
        file, label = example
        return label.encode() + file.read_bytes()

    def check(self, examples: list[Example]) -> None:
        for file, name in examples:
            with _opened(file):
                pass
            if name not in self._labels:
                some = ", ".join([*self._labels][:8])
                raise ValueError(f"{file.parent}: is none of the model's labels: {some}, ...")

    @cached_property
    def _labels(self) -> dict[str, int]:
        """The number of each label, by its name, and by itself where no label is called so."""
        names = self.module.config.id2label
        known = {str(label): number for number, label in names.items()}
        return known | {str(number): number for number in names if str(number) not in known}

    def inputs(self, examples: list[Example]) -> dict[str, Tensor]:
        mode = "L" if getattr(self.module.config, "num_channels", 3) == 1 else "RGB"
        images = []
        for file, _ in examples:
            with _opened(file) as image:
                images.append(image.convert(mode))
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        labels = [self._labels[name] for _, name in examples]
        return {
            "pixel_values": pixels,
            "labels": torch.tensor(labels, dtype=torch.int64, device="cpu"),
        }

    @torch.inference_mode()
    def scores(self, model: Any, examples: list[Example]) -> dict[str, float]:
        right = 0
        for batch in self.batches(examples):
            found = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
            right += int((found == batch["labels"]).sum())
        return {"accuracy": 100 * right / len(examples)}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Give an opened image; ValueError for a file that is none, however its reader says so."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:
        raise ValueError(f"{file}: is no image: {first_line(error)}") from None


class Translation(Task):
    """Translation: two text files, of which line i of the second translates that of the first."""

    word, pipeline = "translation", "translation"
    auto, auto_processor = "AutoModelForSeq2SeqLM", "AutoTokenizer"

    @classmethod
    def read(cls, option: str, paths: list[str]) -> list[Example]:
        if importlib.util.find_spec("sacrebleu") is None:
            raise ValueError("--task translation needs sacrebleu: pip install 'dotresize[merge]'")
        if len(paths) != 2:
            raise ValueError(
                f"{option}: must be two files, whose lines translate each other, not {len(paths)}"
            )
        check_distinct(option, paths)
        lines = []
        for path in paths:
            try:
                lines.append(Path(path).read_text(encoding="utf-8").split("\n"))
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or "is no text in UTF-8"
                raise ValueError(f"{option} {path}: {reason}") from None
        lines = [own[:-1] if own[-1] == "" else own for own in lines]
        for (one, first), (other, second) in pairwise(zip(paths, lines, strict=True)):
            if len(first) != len(second):
                raise ValueError(
                    f"{option}: {one} has {len(first)} lines, {other} has {len(second)}: line i of "
                    "the second must translate that of the first"
                )
        pairs = zip(*lines, strict=True)
        found = [(a.strip(), b.strip()) for a, b in pairs if a.strip() and b.strip()]
        if not found:
            raise ValueError(f"{option} {paths[0]}: holds no sentences")
        return found

    @classmethod
    def content(cls, example: Example) -> bytes:
        return repr(example).encode()

    def check(self, examples: list[Example]) -> None:
        if hasattr(self.processor, "tgt_lang"):
            raise ValueError(
                f"--task translation: {self.module.config.model_type} wants to be told the "
                "languages; merge it by dotresize.merge_feed_forward, in Python"
            )

    def inputs(self, examples: list[Example]) -> dict[str, Tensor]:
        sources, targets = ([pair[i] for pair in examples] for i in (0, 1))
        rule: dict[str, Any] = {
            "return_tensors": "pt",
            "padding": True,
            "truncation": True,
            "max_length": min(LONGEST, self._positions),
        }
        found = self.processor(sources, **rule)
        wanted = self.processor(text_target=targets, **rule)
        labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)
        return {
            "input_ids": found["input_ids"],
            "attention_mask": found["attention_mask"],
            "labels": labels,
        }

    @property
    def _positions(self) -> int:
        return getattr(self.module.config, "max_position_embeddings", LONGEST)

    @torch.inference_mode()
    def scores(self, model: Any, examples: list[Example]) -> dict[str, float]:
        import sacrebleu

        found: list[str] = []
        for batch in self.batches(examples):
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                **{"max_new_tokens": min(LONGEST, self._positions) - 1, "max_length": None},
                **{"num_beams": 1, "do_sample": False},
            )
            found += self.processor.batch_decode(ids, skip_special_tokens=True)
        wanted = [[target for _, target in examples]]
        return {
            "BLEU": float(sacrebleu.corpus_bleu(found, wanted).score),
            "chrF": float(sacrebleu.corpus_chrf(found, wanted).score),
        }


TASKS: dict[str, type[Task]] = {task.word: task for task in (Images, Translation)}
