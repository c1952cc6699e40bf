"""Models with a map and adapters per location: SliceGPT's construction and transport's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import fails, tiny_model
from test_compress import float64_norms, logits

import dotresize
from dotresize import compress
from dotresize.baselines.adapters import AdaptedResidual, slice_model
from dotresize.baselines.per_location import sequential_pca
from dotresize.benchmarks.studies.activations import residual_stream
from dotresize.cli import main
from dotresize.compression import make_options
from dotresize.models import supported
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.refit import refit

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (6, 33))


@pytest.mark.parametrize("kind", supported(residual=True))
def test_full_width_is_an_exact_rotation(kind, tokens):
    """Every location has a basis of its own; the adapters must undo all of them."""
    model = float64_norms(tiny_model(kind, dtype=torch.float64))
    qs = sequential_pca(CausalLM.in_memory(model), tokens, 24)
    assert len(qs) == 7
    assert (qs[0] - qs[1]).abs().max() > 0.1
    sliced = float64_norms(slice_model(CausalLM.in_memory(model), qs).module)
    assert torch.allclose(logits(sliced, tokens), logits(model, tokens), atol=1e-9)


def test_sliced_equals_the_dense_model_with_projected_locations(tokens):
    model = float64_norms(tiny_model(dtype=torch.float64))
    qs = sequential_pca(CausalLM.in_memory(model), tokens, 16)
    sliced = float64_norms(slice_model(CausalLM.in_memory(model), qs).module)
    projectors = [q @ q.mT for q in qs]

    def project(layer, before, middle):
        def forward(hidden_states, **arguments):
            x = hidden_states @ before
            x = x + layer.self_attn(hidden_states=layer.input_layernorm(x), **arguments)[0]
            x = x @ middle
            return x + layer.mlp(layer.post_attention_layernorm(x))

        return forward

    wanted = logits(sliced, tokens)
    assert (logits(model, tokens) - wanted).abs().max() > 1e-2
    for i, layer in enumerate(model.model.layers):
        layer.forward = project(layer, projectors[2 * i], projectors[2 * i + 1])
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] @ projectors[-1],))
    assert torch.allclose(logits(model, tokens), wanted, atol=1e-9)


def test_reconstruction_is_the_least_over_all_maps(tokens):
    """Of the embeddings, on the calibration tokens: no map of that width keeps more."""
    model = tiny_model(dtype=torch.float64)
    with torch.inference_mode():
        stream = residual_stream(model, tokens)[0]

    def error(q: torch.Tensor) -> float:
        return float((stream - stream @ q @ q.mT).square().sum())

    best = error(sequential_pca(CausalLM.in_memory(model), tokens, 16)[0])
    for _ in range(20):
        assert best <= error(torch.linalg.qr(torch.randn(24, 16, dtype=torch.float64)).Q)
    selection = torch.eye(24, dtype=torch.float64)[:, stream.square().sum(0).topk(16).indices]
    assert best <= error(selection)


def test_command_line(model_directory, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    small = ["--window", "32", "--windows", "8", "--eval-windows", "4", "--quiet"]
    words = ["compress", str(model_directory), str(out), "--width", "16", "--method", "slicegpt"]
    words += ["--no-refit", "--calibration", str(text_file), "--eval", str(text_file), *small]
    assert main(words) == 0
    assert "loads with dotresize.load" in capsys.readouterr().out
    report = json.loads((out / "dotresize.json").read_text())
    assert report["plain_checkpoint"] is False
    assert "`dotresize.load` loads it" in (out / "README.md").read_text()
    assert main(["eval", str(out), str(text_file), *small[:2], *small[4:]]) == 0
    value = float(capsys.readouterr().out.split()[1])
    assert value == pytest.approx(report["perplexity"]["topics"], rel=1e-4)
    assert dotresize.load(out).config.hidden_size == 16
    # Without its adapters it would be another model, so transformers must not load it.
    import transformers

    with pytest.raises(ValueError, match="dotresize-sliced"):
        transformers.AutoModelForCausalLM.from_pretrained(out)
    again = [words[0], str(out), str(tmp_path / "again"), *words[3:]]
    assert "dotresize-sliced" in fails(again, capsys)


def test_load_refuses_what_is_not_sliced(model_directory, tmp_path):
    for folder in (model_directory, tmp_path, Path("nowhere")):
        with pytest.raises(ValueError, match="has no format of ours"):
            dotresize.load(folder)


def test_transport_per_location(tokens):
    model = tiny_model()
    narrow, report = compress(model, tokens, width=16, method="dot", scope="location", refit=False)
    assert report["plain_checkpoint"] is False
    assert logits(narrow, tokens).isfinite().all()
    assert (logits(narrow, tokens) - logits(model, tokens)).abs().max() > 1e-3


def refitted(model, tokens, qs):
    dense = CausalLM.in_memory(model)
    sliced = slice_model(dense, qs)
    float64_norms(sliced.module)
    refit(dense, sliced, qs, tokens, None, make_options(ridge=1e-3), AdaptedResidual())
    return sliced.module


def test_refit_at_full_width_is_the_identity(tokens):
    model = float64_norms(tiny_model(dtype=torch.float64))
    sliced = refitted(model, tokens, sequential_pca(CausalLM.in_memory(model), tokens, 24))
    # Products of the normal equations are in float32.
    assert torch.allclose(logits(sliced, tokens), logits(model, tokens), atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_refit_of_locations_brings_the_logits_closer(kind, tokens):
    model = float64_norms(tiny_model(kind, dtype=torch.float64, tied=False))
    qs = sequential_pca(CausalLM.in_memory(model), tokens, 16)
    wanted = logits(model, tokens)
    found = [
        (logits(m, tokens) - wanted).square().mean()
        for m in (
            float64_norms(slice_model(CausalLM.in_memory(model), qs).module),
            refitted(model, tokens, qs),
        )
    ]
    assert found[1] < 0.8 * found[0]
