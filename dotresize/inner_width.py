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
from torch import Tensor
from tqdm import tqdm

from dotresize.least_squares import FLOAT, NormalEquations
from dotresize.linear import linear_of, rows_of
from dotresize.models import architecture_of
from dotresize.refit import Correction, solve_writer
from dotresize.streams import Streams, captured


@torch.no_grad()
def narrow_inner(
    model: Any, tokens: Tensor, correction: Correction, *, batch_windows: int = 4
) -> Any:
    """A copy of the model whose feed-forward blocks have ``correction.inner_width`` neurons each.

    tokens: int64 (windows, length). No width given leaves the copy as it is.
    """
    architecture = architecture_of(model.config)
    part = architecture.sublayers[-1]
    narrow = copy.deepcopy(model)
    if correction.inner_width is None:
        return narrow
    wide = Streams(model, tokens, batch_windows)
    thin = Streams(narrow, tokens, batch_windows)
    dense_layers, layers = (m.get_submodule(architecture.layers) for m in (model, narrow))
    pairs = list(zip(dense_layers, layers, strict=True))
    for dense_layer, layer in tqdm(pairs, desc="inner width", unit="layer", disable=None):
        dense_writer, writer = (linear_of(x, part.writer) for x in (dense_layer, layer))
        bias = 0.0 if writer.bias is None else writer.bias.float()
        equations = NormalEquations(rows_of(writer).to(FLOAT))
        for i in range(len(wide)):
            with captured([dense_writer]) as written:
                wide.stream[i] = wide.run(dense_layer, i)
            equations.add(thin.until(layer, writer, i), written[0].float() - bias)
        solve_writer(layer, part, equations, correction)
        for i in range(len(thin)):
            thin.stream[i] = thin.run(layer, i)
    setattr(narrow.config, architecture.inner, correction.inner_width)
    return narrow
