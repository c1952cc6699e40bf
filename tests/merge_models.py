"""Tiny models to merge, of every layout, some with layers that are secretly alike."""

from __future__ import annotations

import torch
from conftest import tiny_model

from dotresize.models.stacks import layers_of, stacks_of

LAYERS = 8
SECRET = [3, 4, 5, 6]
LANGUAGE = ["llama", "phi3", "gpt2", "opt"]
ONE_STACK = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
IMAGES = ONE_STACK | {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 5}
TEXT = ONE_STACK | {"vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0}
PAIRS = {
    "d_model": 24, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    "decoder_start_token_id": 0, "max_position_embeddings": 64, "init_std": 0.2,
}  # fmt: skip
# Frames of a spectrum, of which a convolution makes half as many tokens.
SPEECH = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
DISTILBERT = {"dim": 24, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 40}
# For each kind: what its classes in transformers begin with, what the one with a head ends with,
# and the config of a tiny model.
OTHERS: dict[str, tuple[str, str, dict]] = {
    "vit": ("ViT", "ForImageClassification", IMAGES),
    "deit": ("DeiT", "ForImageClassification", IMAGES),
    "beit": ("Beit", "ForImageClassification", IMAGES),
    "dinov2": ("Dinov2", "ForImageClassification", IMAGES | {"mlp_ratio": 2}),
    "marian": ("Marian", "MTModel", PAIRS),
    "bart": ("Bart", "ForConditionalGeneration", PAIRS),
    "mbart": ("MBart", "ForConditionalGeneration", PAIRS),
    "m2m_100": ("M2M100", "ForConditionalGeneration", PAIRS),
    "whisper": ("Whisper", "ForConditionalGeneration", PAIRS | SPEECH),
    "bert": ("Bert", "ForMaskedLM", TEXT),
    "camembert": ("Camembert", "ForMaskedLM", TEXT),
    "deberta-v2": ("DebertaV2", "ForMaskedLM", TEXT),
    "distilbert": ("DistilBert", "ForMaskedLM", TEXT | DISTILBERT),
    "electra": ("Electra", "ForMaskedLM", TEXT),
    "modernbert": ("ModernBert", "ForMaskedLM", TEXT),
    "mpnet": ("MPNet", "ForMaskedLM", TEXT),
    "roberta": ("Roberta", "ForMaskedLM", TEXT),
    "xlm-roberta": ("XLMRoberta", "ForMaskedLM", TEXT),
}
KINDS = [*LANGUAGE, *OTHERS]


def build(kind: str):
    import transformers

    if kind in OTHERS:
        name, head, shape = OTHERS[kind]
        config = getattr(transformers, f"{name}Config")(**shape)
        model = getattr(transformers, name + head)(config)
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4} if kind == "gpt2" else {}
        return tiny_model(kind, num_hidden_layers=LAYERS, **heads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.eval()


def inputs(kind: str, count: int = 3) -> list[dict]:
    pairs = kind in OTHERS and OTHERS[kind][2].keys() >= PAIRS.keys()
    if kind in OTHERS and OTHERS[kind][2].keys() >= IMAGES.keys():
        return [{"pixel_values": torch.randn(20, 1, 8, 8)} for _ in range(count)]
    found = []
    for _ in range(count):
        mask = torch.ones(6, 20, dtype=torch.int64)
        mask[:3, 14:] = 0
        batch = {"input_ids": torch.randint(2, 60, (6, 20)), "attention_mask": mask}
        if kind == "whisper":
            batch = {
                "input_features": torch.randn(6, 8, 40),
                "attention_mask": mask.repeat_interleave(2, 1),
            }
        if pairs:
            labels = torch.randint(2, 60, (6, 15))
            labels[2:, 9:] = -100
            batch["labels"] = labels
        found.append(batch)
    return found


@torch.no_grad()
def with_secret(kind: str, stack_number: int = 0):
    """A model whose layers 3 to 6 have one feed-forward, its neurons in secret orders."""
    model = build(kind)
    stack = stacks_of(model)[stack_number]
    layers = layers_of(model, stack)
    for i, layer in enumerate(layers):
        weights = dict(layer.named_parameters())
        # A stream that changes slowly: what is one neuron sees nearly the same in every layer.
        small = "out_proj", "attention.output.dense", "norm.bias"
        for name, weight in weights.items():
            if name == stack.writer or any(part in name.lower() for part in small):
                weight.mul_(0.1)
        if i not in SECRET[1:]:
            continue
        source = dict(layers[SECRET[0]].named_parameters())
        order = torch.randperm(source[stack.writer].numel() // 24)
        for name in stack.weights:
            if name not in weights:
                continue
            value = source[name]
            writes = name.startswith(stack.writer.removesuffix("weight"))
            if not (writes and name.endswith("bias")):
                first = kind != "gpt2" or name.endswith("bias")
                axis = int(first == writes)
                parts = value.chunk(1 if writes else stack.stacked, axis)
                value = torch.cat([part.index_select(axis, order) for part in parts], axis)
            weights[name].copy_(value)
    return model


def logits(model, kind):
    torch.manual_seed(5)
    batch = inputs(kind, 1)[0]
    with torch.inference_mode():
        return model(**batch).logits


def closeness(model, kind):
    wanted = logits(model, kind)
    return lambda new: -float((logits(new, kind) - wanted).abs().max())
