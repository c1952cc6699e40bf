"""Directories of merged models: every shared tensor once, and which names share it.

No transformers config can say that layers share a feed-forward, so such a model loads through
``dotresize.load``: its config names a type that transformers does not know, so that nobody loads it
with the missing tensors left at random. ``PlainStore`` repeats the shared tensors instead, in an
ordinary directory, which saves no byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dotresize.models import architecture_of, supported
from dotresize.models.causal_lm import CausalLM, InMemory, save_config
from dotresize.models.layer_widths import differ, inner_widths, set_inner_widths
from dotresize.models.stacks import stacks_of

MODEL_TYPE = "dotresize-merged"


def shared_names(model: Any) -> list[list[str]]:
    """Return the names of parameters that are one, a list for each; a tied head is one of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


@contextmanager
def declared(model: Any) -> Iterator[None]:
    """Let transformers write the model's shared parameters once, instead of refusing them."""
    before = model._tied_weights_keys or {}
    more = {other: first for first, *others in shared_names(model) for other in others}
    model._tied_weights_keys = {**before, **more} if isinstance(before, dict) else [*before, *more]
    try:
        yield
    finally:
        del model._tied_weights_keys  # the class has what was before


class MergedStore(InMemory):
    """The store of a merged model, which is in memory, and has a format of its own."""

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        model = self._module
        config = {
            "model_type": MODEL_TYPE,
            "class": type(model).__name__,
            "base": json.loads(model.config.to_json_string(False)),
            "shared": shared_names(model),
            "inner_widths": _inner_widths(model),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        every = dict(model.named_parameters(remove_duplicate=False))
        once = {name: value.detach() for name, value in model.named_parameters()}
        buffers = {name: value for name, value in model.state_dict().items() if name not in every}
        weights = {name: value.cpu().contiguous() for name, value in (once | buffers).items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)


class PlainStore(InMemory):
    """The store of a merged model that is written for every tool: each layer has its own copy.

    Embedding and head stay one tensor where they are, which configs of transformers can say.
    """

    def save(self, folder: Path) -> None:
        model = self._module
        layers = tuple(f"{stack.layers}." for stack in stacks_of(model))
        weights = model.state_dict()
        for _, *others in shared_names(model):
            copies = [name for name in others if name.startswith(layers)]
            # On the host: a device that the model fills has no room for them.
            weights |= {name: weights[name].to("cpu", copy=True) for name in copies}
        model.save_pretrained(folder, state_dict=weights)
        if _inner_widths(model):
            save_config(model, folder)


def is_merged(folder: Path) -> bool:
    """Return whether a directory holds what ``MergedStore.save`` writes."""
    return _config(folder).get("model_type") == MODEL_TYPE


def load_merged(folder: Path) -> CausalLM:
    """Return a merged model from its directory, its tensors shared again.

    Raises ValueError for a damaged one.
    """
    import transformers
    from safetensors.torch import load_file

    config = _config(folder)
    kind = getattr(transformers, str(config.get("class")), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"model {folder}: {config.get('class')!r} is no class of transformers'")
    weights = load_file(folder / "model.safetensors")
    with torch.random.fork_rng(devices=[]):
        model = kind(transformers.AutoConfig.for_model(**config["base"]))
        if config.get("inner_widths"):
            set_inner_widths(architecture_of(model.config), model, config["inner_widths"])
    for first, *others in config["shared"]:
        for name in others:
            if name in weights or first not in weights:
                raise ValueError(f"model {folder}: {name} is stored apart from {first}")
            weights[name] = weights[first]
    model.load_state_dict(weights, assign=True)
    _share(model, config["shared"])
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return CausalLM(model.eval(), MergedStore(model))


def _inner_widths(model: Any) -> list[int]:
    """Return the feed-forward width of every layer where they differ, else an empty list."""
    if model.config.model_type not in supported():
        return []
    widths = inner_widths(architecture_of(model.config), model)
    return widths if differ(widths) else []


def _share(model: Any, names: list[list[str]]) -> None:
    """Give all names of each list the parameter of its first."""
    for first, *others in names:
        parameter = model.get_parameter(first)
        for name in others:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, parameter)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
