"""The compressor as it is called: words become methods, keywords one set of options."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

from dotresize.accounting import check_weights
from dotresize.baselines.feed_forward import HandOn, KeepLargest, Nystrom
from dotresize.baselines.magnitude import Magnitude
from dotresize.baselines.per_location import PerLocation, SliceGPT
from dotresize.calibration.statistics import Statistics
from dotresize.models.bfloat16 import in_float32, set_types
from dotresize.models.causal_lm import CausalLM
from dotresize.models.given import causal_model
from dotresize.models.torch_settings import usual_settings
from dotresize.narrow.feed_forward import Eliminate
from dotresize.narrow.one_map import OneMap, PrincipalDirections, Transport
from dotresize.narrow.options import NUMBERS, FeedForwardMethod, Options, WidthMethod
from dotresize.narrow.pipeline import Prepared, narrow_model
from dotresize.narrow.targets import given_targets
from dotresize.ops.arguments import check_number, check_word, shown

# The methods by their names. The last ones are there to be compared with.
METHODS: dict[str, WidthMethod] = {
    method.name: method for method in (Transport(), PrincipalDirections(), Magnitude(), SliceGPT())
}
FF_METHODS: dict[str, FeedForwardMethod] = {
    method.name: method for method in (Eliminate(), Nystrom(), KeepLargest(), HandOn())
}
SCOPES = ("global", "location")


def make_options(
    *, method: str = "dot", scope: str = "global", ff_method: str = "eliminate", **choices: Any
) -> Options:
    """Return the options that some words and numbers stand for, checked.

    Args:
        method, ff_method: names of ``METHODS`` and ``FF_METHODS``.
        scope: "global": one map for all residual locations; "location": one for each.
        choices: other fields of ``Options``.

    Raises:
        ValueError: a choice that would be refused whatever the model.
    """
    check_word("method", method, METHODS)
    check_word("scope", scope, SCOPES)
    check_word("ff_method", ff_method, FF_METHODS)
    # Numbers of NumPy and torch are not JSON, which the report is.
    for name, value in choices.items():
        if name in NUMBERS and isinstance(value, (np.ndarray, Tensor)):
            choices[name] = check_number(name, value, "a finite number")
        elif isinstance(value, np.generic):
            choices[name] = value.item()
    if "targets" in choices:
        choices["targets"] = given_targets(choices["targets"])
    chosen = METHODS[method]
    if scope == "location" and isinstance(chosen, OneMap):
        chosen = PerLocation(chosen)
    options = Options(method=chosen, ff_method=FF_METHODS[ff_method], **choices)
    options.check()
    return options


@usual_settings()
def compress(
    model: Any,
    tokens: Tensor | Iterable[Tensor],
    *,
    statistics: Prepared | Statistics | None = None,
    **choices: Any,
) -> tuple[Any, dict[str, Any]]:
    """Narrow a causal language model: its residual width, its feed-forwards, its depth.

    Args:
        model: a transformers model of a supported architecture, on any device; not changed. One
            around which ``torch.compile`` was put is unwrapped.
        tokens: calibration text as token ids: int64 (windows, length), what a tokenizer returns
            (its ``input_ids``, without the padding that its ``attention_mask`` marks), lists of
            ids, or an iterable of such. Texts of different lengths are joined, in order, and cut
            into windows as long as the longest.
        statistics: what ``narrow.pipeline.prepare`` returned with these tokens, to share one
            calibration between several calls; the model then writes nothing itself.
        choices: the fields of ``narrow.options.Options``, which describes them (width, energy,
            params, ff_width, method, refit, ...), the methods by their names; and ``scope``:
            "global": one map for every location, hence a plain checkpoint; "location": one for
            each, with adapters (baselines/adapters.py), to compare with.

    Returns:
        the narrowed model, of the same dtype and class (but a Llama of a width that its heads do
        not divide is a Mistral, the same function), and a report (a JSON-able dict).

    Raises:
        ValueError: no such model, or weights that are not loaded; unsupported architecture; tokens
            that are none, or longer than the model's positions; a width that is none; a
            collapsed span; weights or activations that are not finite; unknown options.
        TypeError: a keyword that is no option.

    Formula:
        with h the residual stream, w the gain of a norm and Q (D, k) orthonormal, every reader W
        becomes ``Q' diag(w) W``, every writer ``W Q``, and the norm's weight 1; a refit then
        replaces ``Q' diag(w)`` by the ridge solution of ``norm(h Q) A = norm(h) diag(w)`` on the
        calibration tokens, and the sizes of the columns return into the norm's weight
        (narrow/absorb.py, narrow/refit.py, narrow/norm_scales.py).

    Reference:
        Verma, Murray and Duh, DOTResize: Reducing LLM Width via Discrete Optimal Transport-based
        Neuron Merging, arXiv 2507.04517: ``steps=1, factor="qr"``, of which the default is the
        limit of many steps (narrow/transport.py).

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        ...     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> tokens = torch.randint(0, 100, (8, 32))
        >>> from dotresize import compress
        >>> narrow, report = compress(model, tokens, width=24)
        >>> narrow.config.hidden_size, report["width"]["old"]
        (24, 32)
    """
    if statistics is not None and not isinstance(statistics, (Prepared, Statistics)):
        raise ValueError(f"statistics is {shown(statistics)}: must be what prepare returned")
    unknown = choices.keys() - inspect.signature(compress).parameters.keys()
    if unknown:
        raise TypeError(f"compress() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    options = make_options(**choices)
    given = causal_model(model)
    computed = in_float32(given)
    narrow, report = narrow_model(CausalLM.in_memory(computed), tokens, options, statistics)
    if computed is not given:
        set_types(narrow.module, {name: x.dtype for name, x in given.named_parameters()})
        check_weights(narrow.module)  # float16 ends at 65504
    return narrow.module, report


def _signature() -> inspect.Signature:
    """Return the signature of ``compress`` with every option by its name."""
    own = inspect.signature(compress).parameters.values()
    words = inspect.signature(make_options).parameters
    named = [p for p in words.values() if p.kind is p.KEYWORD_ONLY]
    others = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default)
        for f in fields(Options)
        if f.name not in words
    ]
    positional = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p for p in own if p.kind is p.KEYWORD_ONLY]
    return inspect.Signature([*positional, *named, *others, *keywords])


compress.__signature__ = _signature()  # type: ignore[attr-defined]
