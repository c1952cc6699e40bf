"""The Llama family and what differs from it by little: RMSNorm before both sublayers."""

from __future__ import annotations

from dataclasses import replace

from dotresize.models.architecture import Architecture, Sublayer

ATTENTION = Sublayer(
    norm="input_layernorm",
    readers=tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    writer="self_attn.o_proj.weight",
)
FEED_FORWARD = Sublayer(
    norm="post_attention_layernorm",
    readers=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    writer="mlp.down_proj.weight",
)

LLAMA = Architecture(
    model_types=("llama",),
    sublayers=(ATTENTION, FEED_FORWARD),
    # LlamaConfig refuses a width that its heads do not divide, even with an explicit head_dim.
    width_divisors=("num_attention_heads",),
)

# The same names, and configs that take any width once head_dim is explicit. Biases of q, k and v
# and Qwen3's per-head norms lie behind the readers, off the residual.
LLAMA_LIKE = replace(LLAMA, model_types=("mistral", "qwen2", "qwen3", "smollm3"), width_divisors=())

GRANITE = replace(LLAMA_LIKE, model_types=("granite",), residual_multiplier="residual_multiplier")

GEMMA = replace(LLAMA_LIKE, model_types=("gemma",), norm_offset=1.0, root_scaled=True)

OLMO = replace(LLAMA_LIKE, model_types=("olmo",), layer_norm=True)

PHI3 = replace(
    LLAMA_LIKE,
    model_types=("phi3",),
    sublayers=(
        replace(ATTENTION, readers=("self_attn.qkv_proj.weight",)),
        replace(FEED_FORWARD, readers=("mlp.gate_up_proj.weight",), stacked=2),
    ),
)

EXPERTS = replace(
    LLAMA_LIKE,
    model_types=("mixtral",),
    # Grouped matrix products want rows of 16 bytes, in half precision too.
    width_multiple=8,
    sublayers=(
        ATTENTION,
        replace(
            FEED_FORWARD,
            readers=("mlp.gate.weight", "mlp.experts.gate_up_proj"),
            writer="mlp.experts.down_proj",
            experts=True,
        ),
    ),
    stored={
        "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
        "mlp.experts.gate_up_proj": (
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
        ),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.{}.w2.weight",),
    },
)

QWEN_EXPERTS = replace(
    EXPERTS,
    model_types=("qwen3_moe",),
    inner="moe_intermediate_size",
    stored={
        "mlp.experts.gate_up_proj": (
            "mlp.experts.{}.gate_proj.weight",
            "mlp.experts.{}.up_proj.weight",
        ),
        "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
    },
)
