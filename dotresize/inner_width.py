"""The feed-forward width alone, of models whose residual no map can pass.

Nothing is assumed of a layer but which weights read into the inner neurons and which one writes
from them. With h (tokens, n) what the narrowed model's writer reads, y what the dense model's
writer writes, bias apart, and W the writer, the kept neurons S and their writer are those of
dotresize.feed_forward for the target h W, or with refit for the target y:

    B = argmin |h_S B - y|^2 + lam |B - B0|^2,    B0 what feed_forward recombined
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize import shelves
from dotresize.least_squares import FLOAT, NormalEquations
from dotresize.linear import linear_of, rows_of
from dotresize.models import Sublayer, architecture_of
from dotresize.refit import Correction, solve_writer
from dotresize.resident import resident, shelf_of
from dotresize.streams import Streams, captured


@torch.no_grad()
def narrow_inner(
    model: Any,
    tokens: Tensor,
    correction: Correction,
    *,
    batch_windows: int = 4,
    place: str = "disk",
) -> Any:
    """A copy of the model whose feed-forward blocks have ``correction.inner_width`` neurons each.

    tokens: int64 (windows, length). No width given leaves the copy as it is. The model may be on a
    shelf (dotresize.resident), and then its copy is. place: of the activations between layers.
    """
    architecture = architecture_of(model.config)
    part = architecture.sublayers[-1]
    narrow = copy.deepcopy(model) if shelf_of(model) is None else shelves.copied(model)
    if correction.inner_width is None:
        return narrow
    streams = [Streams(m, tokens, batch_windows, place) for m in (model, narrow)]
    layers = range(len(model.get_submodule(architecture.layers)))
    for i in tqdm(layers, desc="inner width", unit="layer", disable=None):
        name = f"{architecture.layers}.{i}"
        with resident(model, name) as dense_layer, resident(narrow, name) as layer:
            _narrow_layer(dense_layer, layer, part, streams, correction)
    setattr(narrow.config, architecture.inner, correction.inner_width)
    return narrow


def _narrow_layer(
    dense: nn.Module,
    layer: nn.Module,
    part: Sublayer,
    streams: list[Streams],
    correction: Correction,
) -> None:
    """One layer, in place; streams: the dense and the narrowed model's, moved past it."""
    wide, thin = streams
    dense_writer, writer = (linear_of(x, part.writer) for x in (dense, layer))
    bias = 0.0 if writer.bias is None else writer.bias.float()
    equations = NormalEquations(rows_of(writer).to(FLOAT))
    for i in range(len(wide)):
        with captured([dense_writer]) as written:
            wide.stream[i] = wide.run(dense, i)
        equations.add(thin.until(layer, writer, i), written[0].float() - bias)
    solve_writer(layer, part, equations, correction)
    for i in range(len(thin)):
        thin.stream[i] = thin.run(layer, i)
