"""The Llama family: RMSNorm before attention and before a gated feed-forward."""

from __future__ import annotations

from dataclasses import replace

from dotresize.models.architecture import Architecture, Sublayer

LLAMA = Architecture(
    model_types=("llama",),
    sublayers=(
        Sublayer(
            norm="input_layernorm",
            readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            writer="self_attn.o_proj",
        ),
        Sublayer(
            norm="post_attention_layernorm",
            readers=("mlp.gate_proj", "mlp.up_proj"),
            writer="mlp.down_proj",
        ),
    ),
    # LlamaConfig refuses a width that its heads do not divide, even with an explicit head_dim.
    width_divisors=("num_attention_heads",),
)

# The same names, and configs that take any width once head_dim is explicit. Biases of q, k and v
# and Qwen3's per-head norms lie behind the readers, off the residual.
LLAMA_LIKE = replace(LLAMA, model_types=("mistral", "qwen2", "qwen3"), width_divisors=())
