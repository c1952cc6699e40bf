"""A Marian model of 6 and 6 layers, trained on message catalogues, English to German.

The sentences are what programs say to their users, in the compiled catalogues (.mo) of Debian
packages: gcc-12-locales, inkscape, git, vlc-l10n, gimp-data, gnucash-common, libreoffice-l10n-de,
darktable, gnupg-l10n, coreutils, libc-l10n, dpkg and others that are unpacked into one folder
(``dpkg -x``). Their licences are those of the programs, most of them the GPL: they are read here,
and nothing of them is kept. Every 25th pair is scored on, the one after it chooses.
"""

from __future__ import annotations

import gettext
import random
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize.merging.merge import merge_feed_forward
from dotresize.recovery import fine_tune

from .cases import Task, minus_loss

DATA = Path("/")
LANGUAGE = "de"
WORDS = 3, 24  # of a sentence, at least and at most
TOKENS = 40
VOCABULARY = 8000
EVERY = 25
ALIGNED, CHOOSING, SCORED = 600, 300, 600
BATCH = 64

Pair = tuple[str, str]


def read(folder: Path) -> list[Pair]:
    """Return the pairs of all catalogues below a folder, each English sentence once, in order."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob(f"**/{LANGUAGE}/LC_MESSAGES/*.mo")):
        with file.open("rb") as opened:
            catalogue = gettext.GNUTranslations(opened)._catalog  # type: ignore[attr-defined]
        for key, target in catalogue.items():
            if isinstance(key, str) and isinstance(target, str):  # and no plural
                source, target = (_plain(text) for text in (key.rpartition("\x04")[2], target))
                if source != target and all(map(_fits, (source, target))):
                    found.setdefault(source, target)
    if not found:
        raise SystemExit(f"{folder}: holds no catalogues, {LANGUAGE}/LC_MESSAGES/*.mo")
    return sorted(found.items())


def _plain(text: str) -> str:
    """Return a message in one line, without the marks of keys that open a menu."""
    return re.sub(r"[_~&](?=\w)", "", " ".join(text.split()))


def _fits(text: str) -> bool:
    return WORDS[0] <= len(text.split()) <= WORDS[1]


def new_tokenizer(pairs: list[Pair]) -> Any:
    """Return a tokenizer of pieces that both languages share."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    own = Tokenizer(models.BPE(unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    own.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False
    )
    own.train_from_iterator([text for pair in pairs for text in pair], trainer)
    own.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **names)


def new_model() -> Any:
    import transformers

    config = transformers.MarianConfig(
        vocab_size=VOCABULARY, d_model=256, encoder_layers=6, decoder_layers=6,
        encoder_ffn_dim=1024, decoder_ffn_dim=1024, encoder_attention_heads=4,
        decoder_attention_heads=4, pad_token_id=0, eos_token_id=1, forced_eos_token_id=1,
        decoder_start_token_id=0, max_position_embeddings=64, dropout=0.1, scale_embedding=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MarianMTModel(config)


def batch_of(tokenizer: Any, pairs: list[Pair]) -> dict[str, Tensor]:
    """Return model inputs and labels, padded to the longest of the batch."""
    rule = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": TOKENS}
    sources, targets = (tokenizer([pair[i] for pair in pairs], **rule) for i in (0, 1))
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
    names = ("input_ids", "attention_mask")
    return {**{name: sources[name] for name in names}, "labels": labels}


@torch.inference_mode()
def scores(model: Any, tokenizer: Any, pairs: list[Pair]) -> dict[str, float]:
    """Return BLEU and chrF of greedy translations."""
    import sacrebleu

    found: list[str] = []
    for first in range(0, len(pairs), BATCH):
        batch = batch_of(tokenizer, pairs[first : first + BATCH])
        del batch["labels"]
        rule = {"max_new_tokens": TOKENS, "max_length": None, "num_beams": 1, "do_sample": False}
        ids = model.generate(**batch, **rule)
        found += tokenizer.batch_decode(ids, skip_special_tokens=True)
    wanted = [[target for _, target in pairs]]
    return {
        "bleu": sacrebleu.corpus_bleu(found, wanted).score,
        "chrf": sacrebleu.corpus_chrf(found, wanted).score,
    }


def padding(
    model: Any, batches: list[dict[str, Tensor]], stacks: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Return what padded batches change, of each stack: nothing, unless padding were counted.

    The first layers are merged by real batches, by their pairs one at a time, which have no
    padding, and by batches that say that everything counts. "alone" and "counted" are the shares of
    neurons that are then merged with the same ones as before.
    """
    single = [
        {name: x[:, : int(_length(batch, name)[i])][i : i + 1] for name, x in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]
    counted = [
        batch
        | {"attention_mask": torch.ones_like(batch["attention_mask"])}
        | {"labels": batch["labels"].clamp(min=0)}
        for batch in batches
    ]
    found: dict[str, dict[str, float]] = {}
    made = {}
    for name, given in (("batches", batches), ("alone", single), ("counted", counted)):
        rule: dict[str, Any] = {"start": 0, "metric": lambda model: 0.0}
        made[name], report = merge_feed_forward(model, given, k=stacks, **rule)
        for stack in stacks:
            found.setdefault(stack, {})[f"tokens, {name}"] = report["stacks"][stack]["tokens"]
    for stack in stacks:
        weight = f"model.{stack}.layers.0.fc1.weight"
        rows = {name: one.get_parameter(weight) for name, one in made.items()}
        for name in ("alone", "counted"):
            same = torch.isclose(rows[name], rows["batches"], rtol=1e-4, atol=1e-6).all(1)
            found[stack][name] = float(same.double().mean())
    return found


def _length(batch: dict[str, Tensor], name: str) -> Tensor:
    """Return how many tokens of each pair an input has."""
    counts = batch["labels"] != -100 if name == "labels" else batch["attention_mask"] != 0
    return counts.sum(1)


def task(folder: Path, cache: Path, steps: int) -> Task:
    """Return the task; its model is trained once and kept in ``cache``."""
    import transformers

    pairs = read(folder)
    tested = random.Random(0).sample(pairs[::EVERY], min(SCORED, len(pairs) // EVERY))
    choosing = random.Random(1).sample(pairs[1::EVERY], min(CHOOSING, len(pairs) // EVERY))
    train = [pair for i, pair in enumerate(pairs) if i % EVERY > 1]
    made = cache / "dense"
    if not made.is_dir():
        tokenizer = new_tokenizer(train)
        model = new_model()
        fine_tune(
            model, train, folder=cache / "training", steps=steps, batch=BATCH, learning_rate=1e-3,
            collate=lambda some: batch_of(tokenizer, some),
        )  # fmt: skip
        tokenizer.save_pretrained(made)
        model.save_pretrained(made)
    model = transformers.MarianMTModel.from_pretrained(made).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(made)
    held_out = [
        batch_of(tokenizer, choosing[i : i + BATCH]) for i in range(0, len(choosing), BATCH)
    ]

    def batches(seed: int) -> list[dict[str, Tensor]]:
        drawn = random.Random(seed).sample(train, ALIGNED)
        return [batch_of(tokenizer, drawn[i : i + BATCH]) for i in range(0, ALIGNED, BATCH)]

    return Task(
        **{"name": "translation", "data": f"message catalogues, en to {LANGUAGE}"},
        **{"model": model, "train": train, "batches": batches},
        metric=lambda model: minus_loss(model, held_out),
        scores=lambda model: scores(model, tokenizer, tested),
        training={
            **{"steps": 300, "batch": BATCH, "learning_rate": 3e-4},
            "collate": lambda some: batch_of(tokenizer, some),
        },
        checks=lambda: {"padding": padding(model, batches(0), {"encoder": 3, "decoder": 3})},
        merged=[  # a third of 6 go, on both sides or on one; and a half
            {"encoder": 3, "decoder": 3},
            {"encoder": 3},
            {"decoder": 3},
            {"encoder": 4, "decoder": 4},
        ],
    )
