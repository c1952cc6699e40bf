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

from dotresize.feed_forward import choose_neurons
from dotresize.least_squares import FLOAT, NormalEquations
from dotresize.linear import keep_outputs, linear_of, rows_of, set_rows
from dotresize.models import Sublayer, architecture_of
from dotresize.options import Options
from dotresize.refit import WRITER_RIDGES
from dotresize.streams import Streams, captured


@torch.no_grad()
def narrow_inner(model: Any, tokens: Tensor, inner: int | None, options: Options) -> Any:
    """A copy of the model with ``inner`` neurons in each feed-forward block (None: all of them).

    tokens: int64 (windows, length). Uses ff_method, refit, ridge and batch_windows of the options.
    """
    architecture = architecture_of(model.config)
    part = architecture.sublayers[-1]
    narrow = copy.deepcopy(model)
    if inner is None:
        return narrow
    wide = Streams(model, tokens, options.batch_windows)
    thin = Streams(narrow, tokens, options.batch_windows)
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
        _cut(layer, part, equations, inner, options)
        for i in range(len(thin)):
            thin.stream[i] = thin.run(layer, i)
    setattr(narrow.config, architecture.inner, inner)
    return narrow


def _cut(
    layer: nn.Module, part: Sublayer, equations: NormalEquations, inner: int, options: Options
) -> None:
    """Choose a block's neurons, and cut and solve its weights, in place."""
    gram, prior = equations.gram, equations.prior
    cross = equations.cross if options.refit else gram @ prior
    kept, rows = choose_neurons(options.ff_method, gram, cross, prior, inner)
    if options.refit:
        equations.restrict(kept, rows)
        rows = equations.solve(WRITER_RIDGES * options.ridge)
    set_rows(linear_of(layer, part.writer), rows)
    for name in part.readers:
        keep_outputs(linear_of(layer, name), kept, part.stacked)
