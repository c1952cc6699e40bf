"""Models with a map for every residual location: SliceGPT's construction, to compare with.

Where location r is narrowed by Q_r, the residual connection of the sublayer between r and r + 1
carries an adapter Q_r' Q_(r+1), (k, k). No plain checkpoint can hold it, so such a model loads
through this module only: its config names a type that transformers does not know, so that nobody
loads it without its adapters.

Reference: Ashkboos et al., SliceGPT, arXiv 2401.15024.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dotresize.models import architecture_of
from dotresize.models.causal_lm import CausalLM, InMemory
from dotresize.narrow.absorb import absorb
from dotresize.narrow.refit import Residual

MODEL_TYPE = "dotresize-sliced"


class SlicedLayer(nn.Module):
    """A decoder layer with an adapter on each of its two residual connections."""

    def __init__(self, layer: nn.Module, adapters: tuple[Tensor, Tensor], config: Any) -> None:
        super().__init__()
        self.layer = layer
        self.attention_adapter = nn.Parameter(adapters[0])
        self.feed_forward_adapter = nn.Parameter(adapters[1])
        architecture = architecture_of(config)
        self._norms = [part.norm for part in architecture.sublayers]
        self._blocks = [part.block for part in architecture.sublayers]
        self._multiplier = architecture.multiplier(config)
        # What models ask of their layers besides running them.
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attention, feed_forward = (self.layer.get_submodule(name) for name in self._blocks)
        before_attention, before_feed_forward = map(self.layer.get_submodule, self._norms)
        out = attention(before_attention(hidden_states), *args, **kwargs)
        written = out[0] if isinstance(out, tuple) else out
        middle = hidden_states @ self.attention_adapter + self._multiplier * written
        written = feed_forward(before_feed_forward(middle))
        return middle @ self.feed_forward_adapter + self._multiplier * written


class AdaptedResidual(Residual):
    """How the residual passes layers with adapters."""

    def body(self, layer: nn.Module) -> nn.Module:
        return cast(SlicedLayer, layer).layer

    def past_feed_forward(self, layer: nn.Module, middle: Tensor) -> Tensor:
        return middle @ cast(SlicedLayer, layer).feed_forward_adapter


class SlicedStore(InMemory):
    """The store of a model with adapters, which is in memory, and has a format of its own."""

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        module = self._module
        base = json.loads(module.config.to_json_string(False))
        config = {"model_type": MODEL_TYPE, "base": base}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: value.contiguous() for name, value in module.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def slice_model(model: CausalLM, qs: list[Tensor]) -> CausalLM:
    """Return the model narrowed by a map for each location, (D, k) each; its head is its own."""
    return add_adapters(absorb(model, qs, untie=True).module, qs)


def add_adapters(module: Any, qs: list[Tensor]) -> CausalLM:
    """Return ``absorb(model, qs, untie=True)`` with its adapters, which are added in place."""
    layers = module.get_submodule(architecture_of(module.config).layers)
    for i, layer in enumerate(layers):
        weight = next(layer.parameters())
        before, middle, after = qs[2 * i : 2 * i + 3]
        adapters = ((before.mT @ middle).to(weight), (middle.mT @ after).to(weight))
        layers[i] = SlicedLayer(layer, adapters, module.config)
    return CausalLM(module, SlicedStore(module))


def is_sliced(folder: Path) -> bool:
    """Return whether a directory holds what ``SlicedStore.save`` writes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def load_sliced(folder: Path) -> CausalLM:
    """Return a sliced model from its directory."""
    import transformers
    from safetensors.torch import load_file

    base = json.loads((folder / "config.json").read_text(encoding="utf-8"))["base"]
    config = transformers.AutoConfig.for_model(**base)
    weights = load_file(folder / "model.safetensors")
    with torch.random.fork_rng(devices=[]):
        module = transformers.AutoModelForCausalLM.from_config(config)
    identity = [torch.eye(config.hidden_size, dtype=torch.float32, device="cpu")] * (
        2 * config.num_hidden_layers + 1
    )
    model = add_adapters(module, identity)
    module.load_state_dict(weights, assign=True)
    module.eval()
    return model
