"""Reading a directory whose config names a width for each feed-forward; transformers refuses it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dotresize.models.causal_lm import CausalLM
from dotresize.models.given import causal_model
from dotresize.models.skeleton import skeleton
from dotresize.offload.headers import check_stored, shards
from dotresize.offload.offloaded_model import as_stored


def load_uneven(folder: Path, config: Any, widths: list[int]) -> CausalLM:
    """Return the model of a directory whose layers have feed-forwards of different widths.

    ValueError where the files disagree with the config.
    """
    transformers: Any = importlib.import_module("transformers")
    check_stored(folder, config, widths)
    config = as_stored(folder, config)
    device = torch.device("cpu")
    module = skeleton(transformers.AutoModelForCausalLM, config, device, widths)
    weights: dict[str, Tensor] = {}
    for path in shards(folder):
        weights |= load_file(path)
    missing, _ = module.load_state_dict(weights, strict=False, assign=True)
    module.tie_weights()
    module.requires_grad_(True)  # as from_pretrained leaves it
    left = [name for name, weight in module.named_parameters() if weight.is_meta]
    if left:
        raise ValueError(f"missing keys: {sorted(missing)[0]}")
    if (folder / "generation_config.json").is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return CausalLM.in_memory(causal_model(module.eval()))
