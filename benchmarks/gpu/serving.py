"""How fast a narrowed model runs beside the dense one: prompts read, tokens written, memory.

Random weights of one shape at several widths: the time of a product does not depend on what is
multiplied. A prompt is read in one pass into a static cache, then tokens are written one at a time
for the whole batch. "eager" is the model as transformers calls it; "compiled" compiles norms and
feed-forwards, and captures the step that writes a token in a CUDA graph. Attention is not compiled:
each layer's refers to its own cache, and would be compiled 32 times.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dotresize.accounting import count_parameters
from dotresize.models.causal_lm import CausalLM

from ..studies.large import llama_config
from ..studies.large_counts import SHAPES, Shape
from ..workload import one_line
from .times import Clock, Row

WAYS = ("eager", "compiled")
ROUNDS = 3  # of calls that take up to a second


@dataclass(frozen=True)
class Served:
    """Says what is measured: a dense shape, its narrowed ones, batches, and lengths in tokens."""

    shape: str
    # Residual and feed-forward width, and why these.
    narrowed: tuple[tuple[int, int, str], ...]
    batches: tuple[int, ...]
    prompt: int
    written: int


# Near 0.8 of the residual width: the multiples of 64, 128 and 256, and no more; and four fifths of
# the parameters by the feed-forward alone.
FULL = Served(
    "8B",
    (
        (3264, 14336, "multiple of 64"),
        (3200, 14336, "multiple of 128"),
        (3328, 14336, "multiple of 256"),
        (4096, 10240, "feed-forward"),
    ),
    batches=(1, 8, 64),
    prompt=512,
    written=16,
)
TINY = Served("tiny", ((48, 160, "narrow"),), batches=(1, 2), prompt=6, written=3)


def cases(served: Served) -> Iterator[tuple[str, Shape]]:
    """Yield the dense shape and the narrowed ones, by names for rows."""
    dense = SHAPES[served.shape]
    yield "dense", dense
    for width, inner, why in served.narrowed:
        yield why, replace(dense, hidden_size=width, intermediate_size=inner)


def rows(name: str, shape: Shape, served: Served, clock: Clock) -> list[Row]:
    """Return a row for each batch and way: tokens a second, read and written, and peak memory."""
    dense = SHAPES[served.shape]
    clock = Clock(clock.device)
    clock.rounds = min(clock.rounds, ROUNDS)
    config = llama_config(shape, head_dim=dense.hidden_size // dense.num_attention_heads)
    model = _random_model(config, clock.device)
    about = {"name": name, "width": shape.hidden_size, "inner": shape.intermediate_size}
    about |= {"parameters": count_parameters(CausalLM.in_memory(model))["total"]}
    found: list[Row] = []
    try:
        for way in WAYS:
            if way == "compiled":
                # Or what is compiled no more would be timed as if it were.
                torch._dynamo.config.fail_on_recompile_limit_hit = True
                backend = "inductor" if clock.on_gpu else "eager"
                for layer in model.model.layers:
                    for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
                        part.compile(backend=backend, dynamic=True)
            for batch in served.batches:
                row = about | {"way": way, "batch": batch}
                try:
                    row |= _run(model, batch, served, clock)
                except Exception as error:  # the other ways and batches go on
                    row["failed"] = one_line(error)
                found.append(row)
    finally:
        del model
        gc.collect()
        clock.tidy()
        torch._dynamo.reset()
    return found


def _random_model(config: Any, device: torch.device) -> Any:
    import transformers

    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=kind).eval()


@torch.inference_mode()
def _run(model: Any, batch: int, served: Served, clock: Clock) -> Row:
    import transformers

    if clock.on_gpu:
        torch.cuda.reset_peak_memory_stats(clock.device)
    cache = transformers.StaticCache(model.config, max_cache_len=served.prompt + served.written)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(vocabulary, (batch, served.prompt), device=clock.device)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=clock.device)

    def back_to(length: int) -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    def read() -> None:
        if cache.layers[0].is_initialized:
            back_to(0)
        _next(model, prompt, cache, token)

    reading = clock.median(read)

    def step() -> None:
        _next(model, token, cache, token)

    back_to(served.prompt)
    step()
    step = _captured(step, clock.device) if _is_compiled(model) and clock.on_gpu else step

    def write() -> None:
        back_to(served.prompt)
        for _ in range(served.written):
            step()

    writing = clock.median(write)
    return {
        "read_per_s": batch * served.prompt / reading,
        "written_per_s": batch * served.written / writing,
        "peak_bytes": torch.cuda.max_memory_allocated(clock.device) if clock.on_gpu else None,
    }


def _next(model: Any, tokens: Tensor, cache: Any, out: Tensor) -> None:
    """Pass tokens through the model, and write which one follows into ``out``."""
    logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    out.copy_(logits[:, -1:].argmax(-1))


def _is_compiled(model: Any) -> bool:
    return model.model.layers[0].mlp._compiled_call_impl is not None


def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return what repeats a step as a CUDA graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
