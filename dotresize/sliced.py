"""Models with a map for every residual location: SliceGPT's construction, for comparison.

Where location r is narrowed by Q_r, the residual connection of the sublayer between r and r + 1
carries an adapter Q_r' Q_(r+1), (k, k). No plain checkpoint can hold it, so such a model loads
through this module only: its config names a type that transformers does not know, so that nobody
loads it without its adapters.

Reference: Ashkboos et al., SliceGPT, arXiv 2401.15024. As published, the maps are found in order,
on what the already sliced part delivers, from second moments of the raw stream (its figure 4).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize import distributed, maps
from dotresize.absorb import absorb
from dotresize.models import architecture_of
from dotresize.streams import Streams, norms_of

MODEL_TYPE = "dotresize-sliced"


class SlicedLayer(nn.Module):
    """A decoder layer with an adapter on each of its two residual connections."""

    def __init__(self, layer: nn.Module, adapters: tuple[Tensor, Tensor], model: Any) -> None:
        super().__init__()
        self.layer = layer
        self.attention_adapter = nn.Parameter(adapters[0])
        self.feed_forward_adapter = nn.Parameter(adapters[1])
        parts = architecture_of(model.config).sublayers
        self._norms = [part.norm for part in parts]
        self._blocks = [part.block for part in parts]
        self._multiplier = architecture_of(model.config).multiplier(model.config)
        # What models ask of their layers besides running them.
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attention, feed_forward = (self.layer.get_submodule(name) for name in self._blocks)
        before_attention, before_feed_forward = map(self.layer.get_submodule, self._norms)
        out = attention(before_attention(hidden_states), *args, **kwargs)
        written = out[0] if isinstance(out, tuple) else out
        middle = hidden_states @ self.attention_adapter + self._multiplier * written
        written = feed_forward(before_feed_forward(middle))
        return past_feed_forward(self, middle) + self._multiplier * written


def without_adapters(layer: nn.Module) -> nn.Module:
    """The decoder layer itself, whether or not it carries adapters."""
    return layer.layer if isinstance(layer, SlicedLayer) else layer


def past_feed_forward(layer: nn.Module, middle: Tensor) -> Tensor:
    """What the residual connection around a layer's feed-forward makes of the stream."""
    return middle @ layer.feed_forward_adapter if isinstance(layer, SlicedLayer) else middle


def add_adapters(narrow: Any, qs: list[Tensor]) -> Any:
    """``absorb(model, qs, untie=True)`` with its adapters, in place; returned for convenience."""
    layers = narrow.get_submodule(architecture_of(narrow.config).layers)
    for i, layer in enumerate(layers):
        weight = next(layer.parameters())
        before, middle, after = qs[2 * i : 2 * i + 3]
        adapters = ((before.mT @ middle).to(weight), (middle.mT @ after).to(weight))
        layers[i] = SlicedLayer(layer, adapters, narrow)
    return narrow


def slice_model(model: Any, qs: list[Tensor]) -> Any:
    """The model narrowed by a map per residual location, (D, k) each; its head is its own."""
    return add_adapters(absorb(model, qs, untie=True), qs)


@torch.no_grad()
def sequential_pca(model: Any, tokens: Tensor, k: int, *, batch_windows: int = 4) -> list[Tensor]:
    """SliceGPT's maps: the principal directions of each location, given the maps before it.

    tokens: int64 (windows, length). Returns (D, k) float64 per residual location.
    """
    architecture = architecture_of(model.config)
    layers = model.get_submodule(architecture.layers)
    streams = Streams(model, tokens, batch_windows)
    multiplier = architecture.multiplier(model.config)
    turn = maps.level if architecture.layer_norm else None
    qs = [_project(streams.stream, k, turn)]
    for layer in tqdm(layers, desc="slice", unit="layer", disable=None):
        norm = norms_of(architecture, layer)[1]
        for i in range(len(streams)):
            streams.stream[i] = streams.until(layer, norm, i)
        qs.append(_project(streams.stream, k, turn))
        block = layer.get_submodule(architecture.sublayers[1].block)
        for i, middle in enumerate(streams.stream):
            streams.stream[i] = middle + multiplier * block(norm(middle))
        qs.append(_project(streams.stream, k, turn))
    return qs


def _project(stream: Any, k: int, turn: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Principal directions of a stream, which is then projected onto them."""
    width = stream[0].shape[-1]
    moment = torch.zeros(width, width, dtype=torch.float64, device=stream[0].device)
    for x in stream:
        wide = x.flatten(0, -2).double()  # the raw stream holds channels in the thousands
        moment += wide.mT @ wide
    distributed.total(moment)
    q = torch.linalg.eigh(moment).eigenvectors[:, -k:]
    q = q if turn is None else turn(q)
    projector = (q @ q.mT).to(stream[0].dtype)
    for i, x in enumerate(stream):
        stream[i] = x @ projector
    return q


def is_one(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(isinstance(module, SlicedLayer) for module in model.modules())


def save(model: Any, folder: Path) -> None:
    """Weights and config of a sliced model into a directory."""
    from safetensors.torch import save_file

    config = {"model_type": MODEL_TYPE, "base": json.loads(model.config.to_json_string(False))}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def is_sliced(folder: Path) -> bool:
    """Whether a directory holds what ``save`` writes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def load(folder: Path) -> Any:
    """A sliced model from its directory."""
    import transformers
    from safetensors.torch import load_file

    base = json.loads((folder / "config.json").read_text(encoding="utf-8"))["base"]
    config = transformers.AutoConfig.for_model(**base)
    weights = load_file(folder / "model.safetensors")
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config)
    width = config.hidden_size
    identity = [torch.eye(width)] * (2 * config.num_hidden_layers + 1)
    model = add_adapters(model, identity)
    model.load_state_dict(weights, assign=True)
    return model.eval()
