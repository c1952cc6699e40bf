"""Models without some of their layers."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import tiny_model
from test_compress import logits
from test_offload import opened, stored

from dotresize.calibration.statistics import Statistics
from dotresize.compression import make_options
from dotresize.models import architecture_of, supported
from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import SameParts
from dotresize.narrow.options import Calibrated, Shape
from dotresize.narrow.pipeline import _narrowed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (6, 33))


def skipping(model, number: int):
    """Return the same model, one of whose layers passes on what it reads."""
    layer = model.get_submodule(architecture_of(model.config).layers)[number]
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    return model


def narrowed(model: CausalLM, tokens, shape: Shape, **choices):
    options = make_options(self_windows=0, ff_width=shape.inner and max(shape.inner), **choices)
    statistics = Statistics.none(tokens.numel(), model.width)
    return _narrowed(Calibrated(model, tokens, statistics, options), shape, {}).model


@pytest.mark.parametrize("kind", supported())
def test_without_a_layer_is_the_model_that_skips_it(kind, tokens, tmp_path):
    """Also written, read by plain transformers, and generating with a cache."""
    model = tiny_model(kind)
    made = CausalLM.in_memory(model).derived(SameParts(CausalLM.in_memory(model), (1,))).module
    assert made.config.num_hidden_layers == 2
    found = logits(made, tokens)
    written = made.generate(tokens[:1, :5], max_new_tokens=4, do_sample=False)
    expected = skipping(model, 1)
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(found, logits(expected, tokens), **close)
    rest = written[:, 5:]
    greedy = logits(expected, written)[:, 4:-1].argmax(-1)
    assert torch.equal(greedy[:, : rest.shape[1]], rest)
    made.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, tokens), found, **close)


@pytest.mark.parametrize("kind", ["llama", "gemma", "granite", "olmo", "phi3", "mixtral", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_at_the_full_width_and_without_refit(kind, tied, tokens):
    model = tiny_model(kind, dtype=torch.float64, tied=tied)
    made = narrowed(CausalLM.in_memory(model), tokens, Shape(24, None, (0,)), width=24, refit=False)
    torch.testing.assert_close(
        logits(made.module, tokens), logits(skipping(model, 0), tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_refit_makes_up_for_a_layer(kind, tokens):
    """What is left is nearer to the dense model than the model that only skips the layer."""
    model = tiny_model(kind, dtype=torch.float64)
    handle = CausalLM.in_memory(model)
    dense = logits(model, tokens)
    made = narrowed(handle, tokens, Shape(24, [40, 40], (1,)), ridge=1e-6)
    refitted = (logits(made.module, tokens) - dense).square().mean()
    skipped = (logits(skipping(model, 1), tokens) - dense).square().mean()
    assert refitted < 0.7 * skipped


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_from_its_files_as_in_memory(kind, tokens, tmp_path):
    folder = stored(tiny_model(kind), tmp_path / "model")
    shape = Shape(24, [30, 20], (1,))
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = narrowed(CausalLM.in_memory(module), tokens, shape)
    found = narrowed(opened(folder), tokens, shape)
    found.finish()
    (tmp_path / "out").mkdir()
    found.save(tmp_path / "out")
    assert found.inner_widths == expected.inner_widths == [30, 20]
    from dotresize import load

    torch.testing.assert_close(
        logits(load(tmp_path / "out"), tokens),
        logits(expected.module, tokens),
        rtol=1e-3,
        atol=1e-4,
    )
