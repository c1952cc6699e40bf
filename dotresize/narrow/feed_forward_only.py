"""The feed-forward width alone, of models whose residual no map can pass.

Nothing is assumed of a layer but which weights read into the inner neurons and which one writes
from them. With h (tokens, n) what the narrowed model's writer reads, y what the dense model's
writer writes, bias apart, and W the writer, the kept neurons S and their writer are those of
narrow/feed_forward.py for the target h W, or with refit for the target y:

    B = argmin |h_S B - y|^2 + lam |B - B0|^2,    B0 what feed_forward recombined
"""

from __future__ import annotations

from contextlib import ExitStack, closing

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize.calibration.residual_stream import Streams, captured
from dotresize.least_squares import FLOAT, NormalEquations
from dotresize.models import Sublayer
from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import SameParts
from dotresize.models.layer_widths import pad_layer
from dotresize.models.linear import linear_of, rows_of
from dotresize.narrow.maps import WidthMap
from dotresize.narrow.options import Narrowed, Options, Shape
from dotresize.narrow.refit import FIRST_WEIGHT, add_windows, refit_writer
from dotresize.offload.memory_plan import activation_place


@torch.no_grad()
def narrow_feed_forwards(
    model: CausalLM, tokens: Tensor, shape: Shape, options: Options
) -> Narrowed:
    """Narrow the feed-forward blocks of a copy of the model.

    tokens: int64 (windows, length); shape: of the model's own residual width. Without inner widths
    what stays is as it was.
    """
    architecture = model.architecture
    dropped, inner = shape.dropped, shape.inner
    narrow = model.derived(SameParts(model, dropped)) if dropped else model.copied()
    lost: list[float] = []
    if inner is None and not (dropped and options.refit):
        return Narrowed(narrow, WidthMap.none(), [], lost)
    part = architecture.sublayers[-1]
    place = activation_place(model, tokens)
    with ExitStack() as stack:
        stream = Streams(narrow, tokens, options.batch_windows, place)
        stack.enter_context(closing(stream))
        dense_stream = None
        if options.refit:
            dense_stream = Streams(model, tokens, options.batch_windows, place)
            stack.enter_context(closing(dense_stream))
        widths = [None] * len(narrow.layers) if inner is None else list(inner)
        left = iter(zip(narrow.layers, widths, strict=True))
        for i, name in enumerate(
            tqdm(model.layers, desc="inner width", unit="layer", disable=None)
        ):
            if i in dropped:
                if dense_stream is not None:
                    with model.resident(name) as dense_layer:
                        dense_stream.pass_layer(dense_layer)
                continue
            own_name, width = next(left)
            with model.resident(name) as dense_layer, narrow.resident(own_name) as layer:
                equations = _equations(dense_layer, layer, part, dense_stream, stream)
                lost.append(refit_writer(layer, part, equations, width, options, cut=False)[1])
                stream.pass_layer(layer)
                if options.pad and inner is not None:
                    pad_layer(architecture, layer, max(inner))
    if inner is not None:
        setattr(narrow.config, architecture.inner, max(inner))
    return Narrowed(narrow, WidthMap.none(), [], lost)


def _equations(
    dense: nn.Module,
    layer: nn.Module,
    part: Sublayer,
    dense_stream: Streams | None,
    stream: Streams,
) -> NormalEquations:
    """Return those of one layer's writer; the dense stream is moved past it.

    dense_stream: None where the layer's own output is to be met.
    """
    dense_writer, writer = (linear_of(x, part.writer) for x in (dense, layer))
    bias = 0.0 if writer.bias is None else writer.bias.float()
    own = dense_stream is None
    equations = NormalEquations(rows_of(writer).to(FLOAT), met_by_prior=own)
    for i in range(len(stream)):
        y = None
        if dense_stream is not None:
            with captured([dense_writer]) as written:
                dense_stream.stream[i] = dense_stream.run(dense, i)
            y = written[0].float() - bias
        h = stream.until(layer, writer, i)
        add_windows(equations, h, y, [1.0] * len(stream.batches[i]), FIRST_WEIGHT)
    return equations
