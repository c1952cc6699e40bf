"""Families of which only the feed-forward width can be narrowed, and why."""

from __future__ import annotations

from dataclasses import replace

from dotresize.models.architecture import Architecture, Sublayer
from dotresize.models.llama import FEED_FORWARD

NORM_AFTER = Architecture(
    model_types=("gemma2", "gemma3_text", "olmo2", "olmo3"),
    sublayers=(FEED_FORWARD,),
    fixed_residual="a norm follows each sublayer, and no rotation passes its weights",
)

LAYER_NORM = Architecture(
    model_types=("olmo",),
    sublayers=(FEED_FORWARD,),
    fixed_residual="LayerNorm takes off the mean over the channels",
)

GPT2 = replace(
    LAYER_NORM,
    model_types=("gpt2",),
    sublayers=(Sublayer(norm="ln_2", readers=("mlp.c_fc.weight",), writer="mlp.c_proj.weight"),),
    embedding="transformer.wte",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    inner="n_inner",
)

OPT = replace(
    LAYER_NORM,
    model_types=("opt",),
    sublayers=(Sublayer(norm="final_layer_norm", readers=("fc1.weight",), writer="fc2.weight"),),
    embedding="model.decoder.embed_tokens",
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    inner="ffn_dim",
)
