"""A valid call of what takes models, and what its result must be.

The model is a random Llama of 2 layers and width 32, one in a process; none of the functions may
change it, whatever they were given.
"""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import dotresize

from .call import Call, apart
from .kinds import Draw
from .model_kinds import (
    llama,
    merged_folder,
    narrowed,
    odd_batches,
    odd_folder,
    odd_k,
    odd_metric,
    odd_model,
    odd_narrow,
    odd_tokens,
    tokens_of,
)

# Narrow models are compared by their logits: products under autocast have 8 bits.
LOGITS = 0.3


def fingerprint(model: Any) -> tuple:
    """Return what must stay of a model: weights, hooks, mode, and what may be trained."""
    weights = tuple(float(p.detach().double().sum()) for p in model.parameters())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    kinds = tuple((type(p).__name__, p.requires_grad, p.dtype) for p in model.parameters())
    return weights, hooks, kinds, model.training, model.config.to_json_string(False)


def left_alone() -> Callable[[], str | None]:
    """Return a look at the model later on, which says what was changed."""
    before = fingerprint(llama())
    return lambda: None if fingerprint(llama()) == before else "changed the model"


class Holder(nn.Module):
    """A module that calls a function in its forward pass, for functional_call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = llama(), function

    def forward(self, arguments: dict[str, Any]) -> Any:
        return self.function(**arguments)


def perhaps_functional(draw: Draw, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, at times within functional_call, which swaps the model's weights."""
    if not draw.chance(0.05):
        return function

    def functional(**arguments: Any) -> Any:
        holder = Holder(function)
        weights = {name: p.detach() for name, p in holder.named_parameters()}
        return torch.func.functional_call(holder, weights, (arguments,))

    return functional


def logits(model: Any) -> Tensor:
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.clone()


def same_model(found: Any, wanted: Any, given: Any) -> str | None:
    """Return what is wrong with a model that was made; None if nothing is."""
    if type(found) not in (type(wanted), type(given)):
        return f"a {type(found).__name__}, not {type(wanted).__name__}"
    dtypes = {p.dtype for p in found.parameters()}
    if any(held.device.type != "cpu" for held in (*found.parameters(), *found.buffers())):
        return "weights or buffers on another device"
    if isinstance(given, nn.Module) and not dtypes <= {p.dtype for p in given.parameters()}:
        return f"weights of {', '.join(map(str, dtypes))}"
    if len(dtypes) > 1 or min(dtype.itemsize for dtype in dtypes) < 2:
        return None  # such a model cannot be called, before or after
    return apart(logits(found).float(), logits(wanted).float(), LOGITS)


SIZES = (
    *({"width": 24}, {"ff_width": 0.75}, {"params": 0.8, "search": True}, {"energy": 0.9}),
    *({"width": 24, "method": "dot"}, {"width": 24, "scope": "location"}, {"ff_width": 32}),
)


def compress(draw: Draw) -> Call:
    options = inspect.signature(dotresize.compress).parameters.values()
    arguments = {p.name: p.default for p in options} | {"model": llama(), "tokens": tokens_of(draw)}

    def check(plain: dict, given: dict, result: Any) -> str | None:
        found, report = result
        json.dumps(report)
        return same_model(found, dotresize.compress(**plain)[0], given["model"])

    return Call(
        perhaps_functional(draw, dotresize.compress),
        arguments | draw.choice(SIZES),
        check,
        own={"model": odd_model, "tokens": odd_tokens},
        often=("model", "tokens"),
        after=left_alone(),
    )


def merge(draw: Draw) -> Call:
    tokens = tokens_of(draw)
    arguments = {
        "model": llama(),
        "batches": [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}],
        "k": draw.one_of(2, {"decoder": 2}),
        "metric": None,
        "anchor": draw.one_of("first", "middle", "last"),
        "permute": draw.chance(0.8),
        "soft": None,
        "start": draw.one_of(None, 0, {"decoder": 0}),
        "baselines": draw.chance(0.2),
        "backend": draw.one_of("auto", "cpp", "torch"),
    }
    if arguments["permute"] and draw.chance(0.3):
        arguments["soft"] = 0.1

    def check(plain: dict, given: dict, result: Any) -> str | None:
        found, report = result
        json.dumps(report)
        return same_model(found, dotresize.merge_feed_forward(**plain)[0], given["model"])

    return Call(
        perhaps_functional(draw, dotresize.merge_feed_forward),
        arguments,
        check,
        own={"model": odd_model, "batches": odd_batches, "k": odd_k, "metric": odd_metric},
        often=("model", "batches", "k", "metric"),
        after=left_alone(),
    )


def recover(draw: Draw) -> Call:
    arguments = {
        "dense": llama(),
        "narrow": copy.deepcopy(narrowed()),
        "tokens": tokens_of(draw),
        "folder": draw.one_of("state", Path("state")),
        "learning_rate": draw.one_of(2e-4, 1e-3),
        "batch_windows": draw.one_of(1, 2),
        "seed": draw.one_of(0, 1),
    }

    def check(plain: dict, given: dict, result: Any) -> str | None:
        json.dumps(result)
        if not isinstance(given["narrow"], nn.Module):
            return f"accepted a {type(given['narrow']).__name__} as narrow"
        with tempfile.TemporaryDirectory() as folder:
            mine = plain["narrow"] is given["narrow"]
            clean = copy.deepcopy(narrowed()) if mine else plain["narrow"]
            figures = dotresize.recover(**plain | {"narrow": clean, "folder": folder})
        if figures["steps"] != result["steps"]:
            return f"{result['steps']} steps, not {figures['steps']}"
        return same_model(given["narrow"], clean, given["narrow"])

    def run(folder: Any, **others: Any) -> Any:
        """Run in a folder of its own: odd ones lie in it as well."""
        place = tempfile.mkdtemp(dir=".")
        inside = folder in ("state", Path("state")) if isinstance(folder, (str, Path)) else False
        return dotresize.recover(folder=Path(place, folder) if inside else folder, **others)

    models = {"dense": odd_model, "narrow": odd_narrow, "tokens": odd_tokens}
    return Call(run, arguments, check, own=models, often=tuple(models), after=left_alone())


def load(draw: Draw) -> Call:
    folder = merged_folder()

    def check(plain: dict, given: dict, result: Any) -> str | None:
        return same_model(result, dotresize.load(folder), None)

    return Call(dotresize.load, {"folder": folder}, check, own={"folder": odd_folder})


def save(draw: Draw) -> Call:
    arguments = {
        "model": copy.deepcopy(narrowed()),
        "folder": draw.one_of("saved", Path("saved")),
    }

    def run(model: Any, folder: Any) -> Any:
        """Save into a folder of its own, and return it."""
        inside = folder in ("saved", Path("saved")) if isinstance(folder, (str, Path)) else False
        place = Path(tempfile.mkdtemp(dir="."), folder) if inside else folder
        dotresize.save(model, place)
        return place

    def check(plain: dict, given: dict, result: Any) -> str | None:
        found = transformers.AutoModelForCausalLM.from_pretrained(result)
        return same_model(found, plain["model"], given["model"])

    rule: dict[str, Any] = {"own": {"model": odd_model}, "often": ("model",)}
    return Call(run, arguments, check, **rule, after=left_alone())


MODELS: dict[str, tuple[Callable[[Draw], Call], float]] = {
    "compress": (compress, 16),
    "merge_feed_forward": (merge, 10),
    "recover": (recover, 5),
    "load": (load, 2),
    "save": (save, 2),
}
