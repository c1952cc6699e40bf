"""The config of a model with another residual width, which transformers reads back."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

# What a Mistral's config has of a Llama's. Everything else is a default, or means nothing there.
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    *("rope_parameters", "attention_dropout", "dtype"),
)


def resized(config: Any, width: int) -> Any:
    """Return a copy of a config with another residual width, its heads as large as before.

    A Llama of a width that its heads do not divide, which LlamaConfig refuses, becomes a Mistral
    without sliding window: the same mathematics and the same names of weights.
    """
    heads = config.num_attention_heads
    # Explicit from now on: no longer what the width divided by the heads would give.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if becomes_mistral(config, width):
        import transformers

        shared = {name: copy.deepcopy(getattr(config, name)) for name in _SHARED}
        shared |= {"hidden_size": width, "head_dim": head_dim, "sliding_window": None}
        return transformers.MistralConfig(**shared)
    config = copy.deepcopy(config)
    config.head_dim = head_dim
    config.hidden_size = width
    return config


def becomes_mistral(config: Any, width: int) -> bool:
    """Return whether a width asks for another model type (see ``resized``)."""
    return config.model_type == "llama" and width % config.num_attention_heads != 0


def has_biases(config: Any) -> bool:
    """Return whether a Llama has biases, which a Mistral has not."""
    return bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))


def class_for(module: nn.Module, config: Any) -> Any:
    """Return the class of a model with such a config: the module's own, unless its type changed."""
    if config.model_type == module.config.model_type:  # type: ignore[union-attr]
        return type(module)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
