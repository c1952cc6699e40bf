"""Families of which only the feed-forward width can be narrowed, and why."""

from __future__ import annotations

from dotresize.models.architecture import Architecture, Sublayer
from dotresize.models.llama import FEED_FORWARD

NORM_AFTER = Architecture(
    model_types=("gemma2", "gemma3_text", "olmo2", "olmo3"),
    sublayers=(FEED_FORWARD,),
    fixed_residual="a norm follows each sublayer, and no rotation passes its weights",
)

# LayerNorm could be passed (see ``Architecture.layer_norm``), this cannot.
WIDE_ATTENTION = "attention is as wide as the residual, whatever the config says"

GPT2 = Architecture(
    model_types=("gpt2",),
    sublayers=(Sublayer(norm="ln_2", readers=("mlp.c_fc.weight",), writer="mlp.c_proj.weight"),),
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    inner="n_inner",
    fixed_residual=WIDE_ATTENTION,
)

OPT = Architecture(
    model_types=("opt",),
    sublayers=(Sublayer(norm="final_layer_norm", readers=("fc1.weight",), writer="fc2.weight"),),
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    inner="ffn_dim",
    fixed_residual=WIDE_ATTENTION,
)
