"""A model as a caller gives it: unwrapped, and refused in words where it cannot be worked on."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dotresize.models import architecture_of

logger = logging.getLogger("dotresize")


def transformers_model(model: Any, *, name: str = "model") -> Any:
    """Return a transformers model, out of ``torch.compile`` if need be; ValueError for others."""
    model = getattr(model, "_orig_mod", model)
    if getattr(model, "_compiled_call_impl", None) is not None:  # by its own method
        model = copy.copy(model)
        model._compiled_call_impl = None
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        kind = type(model).__name__
        raise ValueError(
            f"{name} is a {kind}: must be a transformers model, such as "
            "AutoModelForCausalLM.from_pretrained(...) returns"
        )
    for weight, value in model.named_parameters():
        if value.is_meta:
            raise ValueError(
                f"{name}: weight {weight} is on meta (not loaded, or offloaded by accelerate); "
                "load the model whole, or narrow its files with dotresize compress --memory"
            )
    return model


def causal_model(model: Any) -> Any:
    """Return a causal language model that can be narrowed; ValueError, in words, for all else.

    One whose config says that embedding and head are tied, and whose head is another tensor all
    the same (as where adapters were merged into it), comes back with a config that says so.
    """
    model = transformers_model(model)
    architecture = architecture_of(model.config)
    head, table = architecture.head, architecture.embedding
    for part in (table, architecture.layers, architecture.final_norm, head):
        try:
            found = model.get_submodule(part)
            if part in (table, head):
                found.weight.shape  # noqa: B018 - a head may be no matrix
        except AttributeError:
            raise ValueError(
                f"model: {type(model).__name__} has no {part}; must be a causal language model "
                "with its head, as AutoModelForCausalLM makes it, without adapters around it"
            ) from None
    architecture.check(model)
    check_types(
        model,
        (
            f"{layer}.{name}"
            for layer, sublayer in architecture.each(model)
            for name in (*sublayer.readers, sublayer.writer)
        ),
    )
    if not getattr(model.config, "tie_word_embeddings", False):
        return model
    if same_weight(model.get_submodule(head).weight, model.get_submodule(table).weight):
        return model
    logger.info(NOT_TIED, f"{head}.weight", f"{table}.weight")
    # The caller's model and its config stay as they are; the weights are the same tensors.
    model = copy.copy(model)
    model.config = untied(model.config)
    return model


NOT_TIED = "%s is not %s, though the config says that they are tied: both are kept"


def untied(config: Any) -> Any:
    """Return a copy of a config that says that the head has a weight of its own."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config


def same_weight(left: Tensor, right: Tensor) -> bool:
    """Return whether two weights are one, or hold the same numbers."""
    if left is right or left.shape != right.shape:
        return left is right
    return torch.equal(left, right.to(left.device))


def check_types(model: Any, names: Iterable[str]) -> None:
    """Raise ValueError where some of the named weights are quantised, or of different dtypes."""
    first: tuple[str, torch.dtype] | None = None
    for name in names:
        weight = model.get_parameter(name)
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ValueError(
                f"model: weight {name} has dtype {weight.dtype}, which is quantised; load the "
                "model in float16, bfloat16 or float32"
            )
        if first is None:
            first = name, weight.dtype
        if weight.dtype != first[1]:
            raise ValueError(
                f"model: weight {name} is {weight.dtype} and {first[0]} is {first[1]}; give all "
                "layers one dtype, for example by model.float()"
            )
