"""Scales moved from the readers of a norm into its weight: the same function, even columns."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from dotresize import compress
from dotresize.models import supported
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.norm_scales import scale_norms

pytestmark = pytest.mark.usefixtures("one_thread")

RESIDUAL = supported(residual=True)


def logits(module, tokens) -> torch.Tensor:
    with torch.no_grad():
        return module(tokens).logits


@pytest.mark.parametrize("kind", RESIDUAL)
@pytest.mark.parametrize("tied", [True, False])
def test_the_function_is_the_same(kind, tied):
    model = tiny_model(kind, tied=tied, dtype=torch.float64)
    tokens = torch.randint(259, (2, 16))
    before = logits(model, tokens)
    scale_norms(CausalLM.in_memory(model))
    close = 1e-4 if kind == "gemma" else 1e-9  # whose norms compute in float32 whatever the model
    torch.testing.assert_close(logits(model, tokens), before, rtol=close, atol=close)


@pytest.mark.parametrize("kind", [k for k in RESIDUAL if k != "olmo"])
def test_columns_become_even(kind):
    model = tiny_model(kind, tied=False)
    handle = CausalLM.in_memory(model)
    scale_norms(handle)
    for layer, part in handle.architecture.each(model):
        readers = [model.get_parameter(f"{layer}.{name}") for name in part.readers]
        columns = torch.cat([r.flatten(0, -2) for r in readers]).norm(dim=0)
        torch.testing.assert_close(columns, columns.mean().expand_as(columns))
    head = model.lm_head.weight.norm(dim=0)
    torch.testing.assert_close(head, head.mean().expand_as(head))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("small", [30.0, 1 / 4096])
def test_half_precision_loses_nothing(kind, small):
    """The scales are powers of two: reader times norm is bit for bit the same."""
    model = tiny_model(kind, dtype=torch.bfloat16)
    offset = float(kind == "gemma")
    layer = model.model.layers[0]
    pairs = [
        (layer.input_layernorm, layer.self_attn.q_proj),
        (layer.post_attention_layernorm, layer.mlp.up_proj),
    ]
    with torch.no_grad():
        for norm, _ in pairs:
            norm.weight.fill_(1.0 - offset)
        for _, reader in pairs:
            reader.weight[:, ::3] *= small
    before = [reader.weight.double() for _, reader in pairs]
    scale_norms(CausalLM.in_memory(model))
    for (norm, reader), old in zip(pairs, before, strict=True):
        assert len(norm.weight.unique()) > 1 or (kind == "gemma" and small < 1)
        assert torch.equal(reader.weight.double() * (norm.weight.double() + offset), old)


def test_silent_channels_stay_as_they_are():
    model = tiny_model(dtype=torch.float64)
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.input_layernorm.weight[3] = 0.0
        layer.mlp.gate_proj.weight[:, 5] = 0.0
        layer.mlp.up_proj.weight[:, 5] = 0.0
        layer.post_attention_layernorm.weight[7] = -0.5
    tokens = torch.randint(259, (2, 16))
    before = logits(model, tokens)
    scale_norms(CausalLM.in_memory(model))
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-9, atol=1e-9)
    assert layer.input_layernorm.weight[3] == 0
    assert layer.post_attention_layernorm.weight[7] < 0


@pytest.mark.parametrize(
    "options",
    [
        {"width": 16},
        {"ff_width": 32},
        {"width": 16, "refit": False},
        {"width": 16, "method": "dot", "ff_width": 32},
        {"width": 16, "method": "magnitude", "untie": True},
        {"width": 16, "scope": "location", "refit": False},
        {"width": 16, "method": "slicegpt"},
    ],
)
def test_every_method_ends_with_it(options):
    model, tokens = tiny_model(), torch.randint(259, (4, 16))
    narrow, _ = compress(model, tokens, self_windows=0, **options)
    layer = narrow.model.layers[1]
    layer = getattr(layer, "layer", layer)
    columns = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]).norm(dim=0)
    torch.testing.assert_close(columns, columns.mean().expand_as(columns), rtol=1e-4, atol=1e-4)
    norm = layer.post_attention_layernorm.weight
    assert not torch.allclose(norm, torch.ones_like(norm))
