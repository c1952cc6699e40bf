"""What the output feels of the residual stream: one backward pass of the model's own output.

At each position a token is drawn from the model's prediction there. The gradient g of minus its
log-probability says, at every residual location, how a change of the stream would be felt; the mean
of g'g over tokens is the Fisher matrix of the location. No labels are read.

With n the RMS-normalised stream, x = rms n, gradients are those by n: g times the token's rms, so
that they stand beside the statistics of normalised tokens.

The layers are walked backwards one at a time, each run again from what it read, which is kept for
all of them: (layers x tokens x width) numbers, in a temporary file unless a device has the room.

Source: the Fisher matrix of sampled output as a metric for residual channels: arXiv 2609.35579.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize import distributed
from dotresize.calibration.activation_cache import ActivationCache
from dotresize.calibration.residual_stream import Streams, captured_inputs, norms_of
from dotresize.calibration.self_generated import drawn_at
from dotresize.models.causal_lm import CausalLM
from dotresize.offload.memory_plan import layer_inputs_place

# Predictions whose cumulated probabilities are held at a time, in float64.
ROWS = 64
# What takes the streams that the norms of some locations read, the gradients by them, the number of
# the first location, and what the gradients were multiplied by.
Add = Callable[[list[Tensor], list[Tensor], int, float], None]
# What gradients are multiplied by on their way, so that they fit into the type.
SCALES = {torch.float16: 2.0**-8}


class BackwardPass:
    """What every layer read, kept on the way forward, and the way back.

    Attributes:
        kept_bytes: of what was kept.
    """

    def __init__(self, model: CausalLM, tokens: Tensor, streams: Streams, seed: int) -> None:
        """Begin before the first layer. tokens: int64 (windows, length) of all processes."""
        self._model, self._streams, self._seed = model, streams, seed
        self._place = layer_inputs_place(model, tokens)
        self._read: list[ActivationCache] = []
        self._scale = 1.0
        self.kept_bytes = 0

    def keep(self) -> None:
        """Keep what the next layer reads, the stream as it is now."""
        cache = ActivationCache(len(self._streams), self._place)
        self._read.append(cache)
        for i, stream in enumerate(self._streams.stream):
            cache[i] = stream
            self.kept_bytes += stream.nbytes

    def close(self) -> None:
        """Let what was kept go."""
        for cache in self._read:
            cache.close()

    def run(self, add: Add) -> None:
        """Walk from the output, whose stream has passed all layers, to the embedding."""
        model, streams = self._model, self._streams
        architecture = model.architecture
        back = ActivationCache(len(streams), streams.place)
        with closing(back):
            with (
                model.resident(architecture.final_norm, architecture.head) as parts,
                differentiable(*parts),
            ):
                for i, stream in enumerate(streams.stream):
                    self._scale = SCALES.get(stream.dtype, 1.0)
                    back[i] = self._of_output(i, stream)
                    add([stream], [back[i]], 2 * len(model.layers), self._scale)
            layers = list(enumerate(zip(model.layers, self._read, strict=True)))
            for number, (name, cache) in tqdm(
                layers[::-1], desc="sensitivity", unit="layer", disable=None
            ):
                with model.resident(name) as layer, differentiable(layer):
                    norms = norms_of(architecture, layer)
                    for i, read in enumerate(cache):
                        with torch.enable_grad(), captured_inputs(norms) as seen:
                            stream = read.requires_grad_()
                            out = streams.run(layer, i, stream)
                        middle = seen[1]
                        found = torch.autograd.grad(out, [stream, middle], back[i])
                        back[i] = found[0]
                        read_by = [stream.detach(), middle.detach()]
                        add(read_by, list(found), 2 * number, self._scale)
                cache.close()

    def _of_output(self, i: int, stream: Tensor) -> Tensor:
        """Return the gradient of batch i by the final stream, a window at a time."""
        found = torch.empty_like(stream)
        first = sum(len(ids) for ids in self._streams.batches[:i])
        for j in range(len(stream)):
            with torch.enable_grad():
                window = stream[j : j + 1].clone().requires_grad_()
                logits = self._streams.logits(i, window, slice(j, j + 1))
            share = logits.detach().float().softmax(-1)[0]
            if not torch.isfinite(share).all():
                raise ValueError(
                    "sensitivity: the model's predictions are not finite, so that no output can be "
                    "drawn from them; turn sensitivity off"
                )
            # A window's draws are the same, however windows are batched and spread over processes.
            number = distributed.rank() + (first + j) * distributed.size()
            rows = torch.arange(len(share), dtype=torch.int64, device=share.device)
            share[rows, _drawn(share, self._seed, number)] -= 1.0
            share *= self._scale
            found[j] = torch.autograd.grad(logits, window, share[None].to(logits))[0][0]
        return found


@contextmanager
def differentiable(*modules: nn.Module) -> Iterator[None]:
    """Let gradients pass modules during the block, whatever state their owner left them in.

    They are as in evaluation (training draws dropout, and may run layers twice, for checkpoints),
    and weights that were made in ``torch.inference_mode`` are replaced by copies.
    """
    every = [module for root in modules for module in root.modules()]
    training = [module.training for module in every]
    replaced: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for module in every:
            module.training = False
            for name, weight in [*module._parameters.items(), *module._buffers.items()]:
                if weight is not None and weight.is_inference():
                    replaced.append((module, name, weight))
                    copied = weight.clone()
                    held = isinstance(weight, nn.Parameter)
                    new = nn.Parameter(copied, requires_grad=False) if held else copied
                    setattr(module, name, new)
        yield
    finally:
        for module, was in zip(every, training, strict=True):
            module.training = was
        for module, name, weight in replaced:
            setattr(module, name, weight)


def _drawn(share: Tensor, seed: int, number: int) -> Tensor:
    """Return a token for each row of probabilities: int64 (tokens,). number: of the window."""
    mixed = (seed * 1_000_003 + number) % 2**63
    generator = torch.Generator().manual_seed(mixed)
    uniform = torch.rand(len(share), 1, generator=generator, dtype=torch.float64, device="cpu")
    drawn = []
    for rows, heights in zip(share.split(ROWS), uniform.split(ROWS), strict=True):
        drawn.append(drawn_at(rows, heights)[:, 0])
    return torch.cat(drawn)
