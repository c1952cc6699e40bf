"""Odd models, tokens, batches and folders."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dotresize

from .kinds import NOTHING, Draw, Odd

VOCABULARY = 64


@functools.cache
def transformers() -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers


@functools.cache
def llama() -> Any:
    config = transformers().LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():  # what a seed draws must not depend on the calls before
        torch.manual_seed(0)
        return transformers().LlamaForCausalLM(config).eval()


@functools.cache
def narrowed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = torch.randint(0, VOCABULARY, (4, 16))
        return dotresize.compress(llama(), tokens, width=24)[0]


def with_nan(model: Any) -> Any:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.nan
    return model


def in_class(words: str) -> Callable[[Any], Any]:
    """Return a maker of a new small model of another class, of the same config."""
    return lambda model: getattr(transformers(), words)(model.config)


# Models in the model's place; of those in the first table the result must be the same.
ALIKE: dict[str, Callable[[Any], Any]] = {
    "in train mode": lambda model: copy.deepcopy(model).train(),
    "frozen": lambda model: copy.deepcopy(model).requires_grad_(False),
    "made in inference mode": lambda model: torch.inference_mode()(copy.deepcopy)(model),
    "compiled": lambda model: torch.compile(copy.deepcopy(model), backend="eager"),
}
MODELS: dict[str, Callable[[Any], Any]] = ALIKE | {
    "float64": lambda model: copy.deepcopy(model).double(),
    "bfloat16": lambda model: copy.deepcopy(model).bfloat16(),
    "float16": lambda model: copy.deepcopy(model).half(),
    "float8": lambda model: copy.deepcopy(model).to(torch.float8_e5m2),
    "with one weight in float64": lambda model: mixed(copy.deepcopy(model)),
    "on meta": lambda model: copy.deepcopy(model).to("meta"),
    "partly on meta": lambda model: partly(copy.deepcopy(model)),
    "with NaN": lambda model: with_nan(copy.deepcopy(model)),
    "without head": lambda model: copy.deepcopy(model.model),
    "headless class": in_class("LlamaModel"),
    "classifier": in_class("LlamaForSequenceClassification"),
    "config": lambda model: model.config,
    "class": type,
    "state dict": lambda model: model.state_dict(),
    "in DataParallel": lambda model: nn.DataParallel(copy.deepcopy(model)),
    "in a module": lambda model: nn.Sequential(copy.deepcopy(model)),
    "Linear": lambda model: nn.Linear(2, 2),
    "scripted": lambda model: torch.jit.script(nn.Linear(2, 2)),
    "path": lambda model: str(merged_folder()),
    "with a wrapped Linear": lambda model: foreign(copy.deepcopy(model)),
}


def mixed(model: Any) -> Any:
    model.model.layers[0].mlp.up_proj.double()
    return model


def partly(model: Any) -> Any:
    model.model.layers[1].mlp.down_proj.to("meta")
    return model


def foreign(model: Any) -> Any:
    """Put something that is no Linear where one is looked for."""
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
    return model


def odd_model(draw: Draw, base: Callable[[], Any] = llama) -> Odd:
    label = draw.choice(list(MODELS))
    value = MODELS[label](base())
    if label in ALIKE:
        return Odd(f"model {label}", value, copy.deepcopy(base()))
    # Other types give other digits; one that is trained in place is compared with a copy of it.
    own = base is not llama and isinstance(value, nn.Module)
    return Odd(f"model {label}", value, copy.deepcopy(value) if own else value)


def odd_narrow(draw: Draw) -> Odd:
    return odd_model(draw, narrowed)


def tokens_of(draw: Draw) -> Tensor:
    return torch.randint(0, VOCABULARY, (draw.one_of(3, 4), 16))


def odd_tokens(draw: Draw) -> Odd:
    tokens = tokens_of(draw)
    encoding = transformers().BatchEncoding
    kinds: dict[str, tuple[Any, Any]] = {
        "generator of tensors": ((part[None] for part in tokens), tokens),
        "list of tensors": (list(tokens.split(1)), tokens),
        "list of windows of other lengths": ([tokens[:1], tokens[1:, :-1]], NOTHING),
        "list of lists": (tokens.tolist(), tokens),
        "BatchEncoding": (encoding({"input_ids": tokens}), tokens),
        "BatchEncoding of lists": (encoding({"input_ids": tokens.tolist()}), tokens),
        "dict": ({"input_ids": tokens}, tokens),
        "id too large": (tokens + VOCABULARY, NOTHING),
        "negative id": (tokens - VOCABULARY, NOTHING),
        "float ids": (tokens.float(), NOTHING),
        "one window": (tokens[:1], tokens[:1]),
        "one token in a window": (tokens[:, :1], tokens[:, :1]),
        "one token": (tokens[:1, :1], tokens[:1, :1]),
        "text": ("a text", NOTHING),
        "texts": (["a text", "another"], NOTHING),
    }
    label = draw.choice(list(kinds))
    return Odd(label, *kinds[label])


def odd_batches(draw: Draw) -> Odd:
    tokens = odd_tokens(draw)
    good = {"input_ids": tokens_of(draw)}
    mask = torch.ones_like(good["input_ids"])
    plain = [{"input_ids": tokens.plain}] if isinstance(tokens.plain, Tensor) else tokens.plain
    label, value, meaning = draw.one_of(
        ("tokens in a batch: " + tokens.label, [{"input_ids": tokens.value}], plain),
        ("no list: " + tokens.label, tokens.value, NOTHING),
        ("one batch alone", good, NOTHING),
        ("BatchEncoding", [transformers().BatchEncoding(good)], [good]),
        ("a generator", (batch for batch in [good]), [good]),
        ("pairs", [list(good.items())], [good]),
        ("bool mask", [good | {"attention_mask": mask.bool()}], [good]),
        ("float mask", [good | {"attention_mask": mask.float()}], [good]),
        ("mask of another shape", [good | {"attention_mask": mask[:, 1:]}], NOTHING),
        ("mask of zeros", [good | {"attention_mask": 0 * mask}], NOTHING),
        ("labels of lists", [good | {"labels": good["input_ids"].tolist()}], NOTHING),
        ("unknown input", [good | {"nobody": mask}], [good]),
        ("None among inputs", [good | {"attention_mask": None}], [good]),
        ("embeddings", [{"inputs_embeds": torch.rand(2, 8, 32)}], NOTHING),
    )
    return Odd(label, value, meaning)


def odd_k(draw: Draw) -> Odd:
    value = draw.one_of({"decoder": 2.0}, {"decoder": None}, {2: 2}, {"decoder": "2"}, 2.0, [2])
    return Odd(repr(value), value, NOTHING)


def odd_metric(draw: Draw) -> Odd:
    value = draw.one_of("x", None, torch.ones(2), torch.tensor(1.0), 1j, float("nan"), [1.0], "1.0")
    return Odd(f"a metric of {value!r}", lambda model: value, lambda model: value)


@functools.cache
def merged_folder() -> Path:
    """Return a folder with a merged model in it, in the working folder of this process."""
    from dotresize.merging.checkpoint import MergedStore

    batches = [{"input_ids": torch.arange(64).view(4, 16)}]
    merged, _ = dotresize.merge_feed_forward(llama(), batches, k=2)
    folder = Path(tempfile.mkdtemp(dir="."), "merged").absolute()
    folder.mkdir()
    MergedStore(merged).save(folder)
    return folder


def odd_folder(draw: Draw) -> Odd:
    folder = merged_folder()
    kinds = {
        "bytes": str(folder).encode(),
        "its config": folder / "config.json",
        "its parent": folder.parent,
        "the root": "/",
        "missing": folder / "missing",
        "with a slash": f"{folder}/",
        "long": "x" * 5000,
        "hub id": "owner/name",
        "damaged": damaged(folder, draw),
    }
    label = draw.choice(list(kinds))
    # What is cut short may be a file that the model does not need.
    readable = label in ("with a slash", "damaged")
    return Odd(label, kinds[label], folder if readable else NOTHING)


def damaged(folder: Path, draw: Draw) -> Path:
    other = Path(tempfile.mkdtemp(dir=".")).absolute()
    for path in folder.iterdir():
        content = path.read_bytes()
        if draw.chance(0.5):
            content = content[: draw.randrange(len(content))]
        (other / path.name).write_bytes(content)
    return other
