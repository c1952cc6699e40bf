"""Merging feed-forward sublayers: k neighbours are aligned, averaged and tied into one.

Every window of k adjacent layers is merged in turn and judged by a metric, without tuning; the best
one stays. Compute does not change, k - 1 feed-forwards' parameters are gone.

Reference: Verma, Murray and Duh, Merging Feed-Forward Sublayers for Compressed Transformers,
arXiv 2501.06126.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dotresize.accounting import unique_parameters
from dotresize.merging.align import Aligner, counted, features, run
from dotresize.merging.tie import dropped, merged, tie, tied
from dotresize.models.given import check_types, transformers_model
from dotresize.models.in_use import alone_with
from dotresize.models.linear import linear_of, rows_of
from dotresize.models.stacks import Stack, layers_of, stacks_of
from dotresize.models.torch_settings import usual_settings
from dotresize.ops.arguments import (
    check_dense,
    check_flag,
    check_number,
    check_whole,
    check_word,
    shown,
)
from dotresize.ops.backends import choose

ANCHORS = ("first", "middle", "last")
# Why layers cannot share a feed-forward.
UNLIKE = "layers side by side have feed-forwards of different widths, which cannot be one"
Metric = Callable[[Any], float]

logger = logging.getLogger("dotresize")


@usual_settings()
def merge_feed_forward(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    *,
    k: int | dict[str, int],
    metric: Metric | None = None,
    anchor: str = "first",
    permute: bool = True,
    soft: float | None = None,
    start: int | dict[str, int] | None = None,
    baselines: bool = False,
    backend: str = "auto",
) -> tuple[Any, dict[str, Any]]:
    """Merge the feed-forwards of k adjacent layers, in every stack of layers that the model has.

    Args:
        model: a transformers model of a family in ``models.stacks``; not changed.
        batches: model inputs; ``attention_mask`` (``decoder_attention_mask``, or labels of -100)
            says which tokens count. About 10,000 tokens are enough.
        k: how many become one, the same in every stack or by the stack's name ("encoder",
            "decoder"); a stack left out stays as it is.
        metric: of a model; higher is better. By default minus the mean loss on the batches; a
            language model's without labels are judged by the next token. It is called with
            torch's own defaults: float32, the CPU, no autocast.
        anchor: the layer of a window that the others are aligned to: first, middle or last.
        permute: False averages the layers as they are.
        soft: align by the entropic transport plan at this reg, in units of the mean of
            1 - correlation, instead of a permutation.
        start: first layer of the window, where it is known; by default all are tried.
        baselines: also measure the best window merged without permutation, and without its
            layers but the anchor.
        backend: of the solvers, see dotresize.backends().

    Returns:
        a copy of the model whose merged feed-forwards share their parameters, and a report: per
        stack the window, the anchor, the tokens counted and the metric of every window ("profile"),
        the parameters before and after, the tied names ("shared"), seconds.

    Raises:
        ValueError: an unknown family or stack; k or start that do not fit the layers; no batches;
            inputs without a token that counts; neurons or a metric that are not finite.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        ...     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> tokens = torch.randint(0, 100, (8, 32))
        >>> from dotresize import merge_feed_forward
        >>> merged, report = merge_feed_forward(model, [{"input_ids": tokens}], k=2)
        >>> len(report["stacks"]["decoder"]["window"])
        2
    """
    model = transformers_model(model)
    batches = _inputs_of(batches)
    baselines = check_flag("baselines", baselines)
    stacks, sizes = _checked(model, batches, k, start, anchor, permute, soft, backend)
    metric = _default_metric(model, batches) if metric is None else metric
    if not callable(metric):
        raise ValueError(f"metric is {shown(metric)}: must be a callable, model -> float")
    begin = time.perf_counter()
    with alone_with(model):  # so that no hook of another thread is copied
        new = copy.deepcopy(model).eval()
    moved = [{name: x.to(model.device) for name, x in batch.items()} for batch in batches]
    found = features(new, stacks, moved, soft, backend) if permute else {}
    with ExitStack() as opened:
        for aligner in found.values():
            opened.callback(aligner.close)
        return _merged(new, stacks, sizes, metric, anchor, start, found, begin, baselines)


def _merged(
    new: Any,
    stacks: tuple[Stack, ...],
    sizes: dict[str, int],
    metric: Metric,
    anchor: str,
    start: int | dict[str, int] | None,
    found: dict[str, Aligner],
    begin: float,
    baselines: bool,
) -> tuple[Any, dict[str, Any]]:
    """Choose and tie the windows of every stack, in place; see ``merge_feed_forward``."""
    collected = time.perf_counter() - begin
    before, chosen = _measured(metric, new), []
    report: dict[str, Any] = {"metric": {"dense": before}, "stacks": {}}
    for stack in stacks:
        begun = start.get(stack.name) if isinstance(start, dict) else start
        choice = _Choice(new, stack, sizes[stack.name], anchor, found.get(stack.name))
        best, profile = choice.best(metric, begun)
        report["stacks"][stack.name] = {
            "window": choice.window(best),
            "anchor": choice.anchor(best),
            "tokens": found[stack.name].tokens if found else None,
            "profile": profile,
            **({"baselines": choice.baselines(metric, best)} if baselines else {}),
        }
        chosen.append((stack, choice.window(best), choice.merged(best)))
    total = unique_parameters(new)
    shared = [
        names for stack, window, weights in chosen for names in tie(new, stack, window, weights)
    ]
    report["metric"]["merged"] = _measured(metric, new)
    report["parameters"] = {"dense": total, "merged": unique_parameters(new)}
    report["shared"] = shared
    report["seconds"] = {
        "features": collected, "selection": time.perf_counter() - begin - collected,
    }  # fmt: skip
    return new, report


def alike_windows(model: Any, stack: Stack, k: int) -> list[int]:
    """Return the first layer of every window of k whose feed-forwards are of one width."""
    writers = [linear_of(layer, stack.writer) for layer in layers_of(model, stack)]
    shapes = [rows_of(writer).shape for writer in writers]
    return [i for i in range(len(shapes) - k + 1) if len(set(shapes[i : i + k])) == 1]


class _Choice:
    """The windows of one stack."""

    def __init__(
        self, model: Any, stack: Stack, k: int, anchor: str, aligner: Aligner | None
    ) -> None:
        self._model, self._stack, self._k = model, stack, k
        self._anchor = {"first": 0, "middle": (k - 1) // 2, "last": k - 1}[anchor]
        self._aligner = aligner
        self._windows = len(layers_of(model, stack)) - k + 1
        self._alike = alike_windows(model, stack, k)

    def window(self, start: int) -> list[int]:
        return list(range(start, start + self._k))

    def anchor(self, start: int) -> int:
        return start + self._anchor

    def merged(self, start: int, *, aligned: bool = True) -> dict[str, Any]:
        """Return the average of the window that begins there."""
        window, anchor = self.window(start), self.anchor(start)
        alignments: dict[int, Tensor] = {}
        if self._aligner is not None and aligned:
            others = [i for i in window if i != anchor]
            alignments = dict(zip(others, self._aligner.to_anchor(anchor, others), strict=True))
        return merged(self._model, self._stack, window, [alignments.get(i) for i in window])

    def best(self, metric: Metric, start: int | None) -> tuple[int, list[dict[str, Any]]]:
        """Return the first layer of the best window, and the metric of all that were tried."""
        if start is not None:
            if not 0 <= start < self._windows:
                raise ValueError(
                    f"start {start}: a window of {self._k} begins at 0 to {self._windows - 1}"
                )
            if start not in self._alike:
                raise ValueError(f"start {start}: {self._stack.name} {UNLIKE}")
            return start, []
        profile = []
        name = f"windows, {self._stack.name}"
        if not self._alike:
            raise ValueError(f"k {self._k}: everywhere in the {self._stack.name} {UNLIKE}")
        for first in tqdm(self._alike, desc=name, unit="window", disable=None):
            context = tied(self._model, self._stack, self.window(first), self.merged(first))
            with context:
                value = _value(metric, self._model)
            # A window that breaks the model is the worst, and no reason to stop.
            profile.append({"start": first, "metric": value if math.isfinite(value) else None})
        sound = [entry for entry in profile if entry["metric"] is not None]
        if not sound:
            raise ValueError(f"the metric of every window of the {self._stack.name} is not finite")
        return max(sound, key=lambda entry: entry["metric"])["start"], profile

    def baselines(self, metric: Metric, start: int) -> dict[str, float]:
        """Return the metric of the window merged without permutation, and of its anchor alone."""
        window = self.window(start)
        plain = self.merged(start, aligned=False)
        others = [i for i in window if i != self.anchor(start)]
        return {
            "without permutation": self._within(
                tied(self._model, self._stack, window, plain), metric
            ),
            "layers dropped": self._within(
                dropped(self._model, {self._stack.name: others}), metric
            ),
        }

    def _within(self, context: AbstractContextManager[Any], metric: Metric) -> float:
        with context:
            return _measured(metric, self._model)


def _measured(metric: Metric, model: Any) -> float:
    value = _value(metric, model)
    if not math.isfinite(value):
        raise ValueError(f"the metric is {value}: must be a finite number, higher is better")
    return value


def _value(metric: Metric, model: Any) -> float:
    """Return a metric, which may be NaN; ValueError where it is no number."""
    value = metric(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"the metric is {shown(value)}: must be a number") from None


def _default_metric(model: Any, batches: list[dict[str, Tensor]]) -> Metric:
    """Return minus the mean loss over all that the loss is of; see ``merge_feed_forward``."""
    every = stacks_of(model)
    stack, causal = every[-1], [s.name for s in every] == ["decoder"]
    if not all("labels" in batch or (causal and "input_ids" in batch) for batch in batches):
        also = " nor input_ids" if causal else ""
        raise ValueError(f"the batches have no labels{also}: give a metric")

    @torch.inference_mode()
    def minus_loss(model: Any) -> float:
        total, count = 0.0, 0
        for batch in batches:
            inputs = {name: x.to(model.device) for name, x in batch.items()}
            if "labels" not in inputs:
                mask, labels = counted(stack, inputs), inputs["input_ids"]
                inputs["labels"] = labels if mask is None else labels.masked_fill(~mask, -100)
            labels = inputs["labels"]
            # Decoders alone predict the next token: the first is given.
            number = int(((labels[:, 1:] if causal else labels) != -100).sum())
            if not number:
                continue
            total += float(run(model, inputs).loss) * number
            count += number
        return -total / count if count else -math.inf

    return minus_loss


def _inputs_of(batches: Any) -> list[dict[str, Tensor]]:
    """Return batches of model inputs; ValueError for what is none."""
    if isinstance(batches, (str, bytes, memoryview, Tensor, np.ndarray, Mapping)) or not isinstance(
        batches, Iterable
    ):
        raise ValueError(f"batches is {shown(batches)}: must be an iterable of dicts of tensors")
    found = []
    for i, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(f"batch {i} is {shown(batch)}: must be a dict of tensors")
        for name, value in batch.items():
            if not isinstance(name, str):
                raise ValueError(f"batch {i} has an input {shown(name)}: must be a name")
            check_dense(f"batch {i}: {name}", value)
        found.append(dict(batch))
    return found


def _check_ids(batches: list[dict[str, Tensor]], vocabulary: float) -> None:
    for i, batch in enumerate(batches):
        for name in batch.keys() & {"input_ids", "decoder_input_ids"}:
            ids = batch[name].flatten().tolist()
            for wrong in (min(ids, default=0), max(ids, default=0)):
                if not 0 <= wrong < vocabulary:
                    raise ValueError(
                        f"batch {i}: {name} hold {wrong}, the model's vocabulary is {vocabulary}"
                    )


def _checked(
    model: Any,
    batches: list[dict[str, Tensor]],
    k: int | dict[str, int],
    start: int | dict[str, int] | None,
    anchor: str,
    permute: bool,
    soft: float | None,
    backend: str,
) -> tuple[tuple[Stack, ...], dict[str, int]]:
    """Return the stacks to merge, and how many layers of each."""
    stacks = stacks_of(model)
    check_flag("permute", permute)
    for given in (k, start):
        for name, value in given.items() if isinstance(given, dict) else [("", given)]:
            which = "k" if given is k else "start"
            if value is not None:
                check_whole(f"{which} of {name}" if name else which, value)
    for stack in stacks:
        layers_of_stack = layers_of(model, stack)
        check_types(
            model,
            (
                f"{stack.layers}.{name}"
                for name, weight in layers_of_stack.named_parameters()
                if weight.dim() > 1
            ),
        )
    names = [stack.name for stack in stacks]
    sizes = k if isinstance(k, dict) else dict.fromkeys(names, k)
    check_word("anchor", anchor, ANCHORS)
    choose(backend, model.device)
    if soft is not None:
        reg = check_number("soft", soft, "a positive number")
        if not permute or reg <= 0:
            raise ValueError(f"soft {reg:g}: must be positive and finite, and needs permute")
    if not batches:
        raise ValueError("there are no batches")
    _check_ids(batches, getattr(model.config, "vocab_size", math.inf))
    if not sizes:
        raise ValueError(f"k: names no stack, but there is {', '.join(names)}")
    for name, size in sizes.items():
        if name not in names:
            raise ValueError(f"k: {model.config.model_type} has no {name}, but {', '.join(names)}")
        layers = len(layers_of(model, stacks[names.index(name)]))
        if not isinstance(size, int) or not 2 <= size <= layers:
            raise ValueError(f"k {size}: must be 2 to {layers}, the layers of the {name}")
    return tuple(stack for stack in stacks if stack.name in sizes), sizes
