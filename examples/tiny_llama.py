"""A checkpoint to try a tool on: a random Llama, half of whose neurons nearly repeat the others."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


def save_tiny_llama(folder: str) -> LlamaForCausalLM:
    """Write a model of 3 layers, width 64 and 96 inner neurons with a tokenizer; return it."""
    set_seed(0)
    torch.set_num_threads(1)
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, intermediate_size=96, initializer_range=0.2, **shape)
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data[48:] = linear.weight[:48] + 0.05 * torch.randn(48, 64)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"word": 0}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return model
