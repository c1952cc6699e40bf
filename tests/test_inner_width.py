"""Families of which only the feed-forward width can be narrowed."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from test_compress import logits

from dotresize import compress
from dotresize.calibration.residual_stream import captured
from dotresize.compression import make_options
from dotresize.models import architecture_of, supported
from dotresize.models.causal_lm import CausalLM
from dotresize.models.linear import linear_of
from dotresize.narrow.feed_forward_only import narrow_feed_forwards
from dotresize.narrow.options import Shape
from dotresize.narrow.refit import FIRST_WEIGHT

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = sorted(set(supported()) - set(supported(residual=True)))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (6, 33))


def parts(model):
    """Readers and writer of every layer."""
    architecture = architecture_of(model.config)
    part = architecture.sublayers[-1]
    for layer in model.get_submodule(architecture.layers):
        yield [linear_of(layer, name) for name in part.readers], linear_of(layer, part.writer)


def test_there_are_some():
    assert {"gemma2", "gpt2", "olmo2", "opt"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_all_neurons_are_the_identity(kind, tokens):
    model = tiny_model(kind)
    for refit in (True, False):
        options = make_options(refit=refit)
        handle = CausalLM.in_memory(model)
        shape = Shape(24, handle.inner_widths)
        narrow = narrow_feed_forwards(handle, tokens, shape, options).model
        assert (logits(narrow.module, tokens) - logits(model, tokens)).abs().max() < 2e-3
    narrow, report = compress(model, tokens, ff_width=1.0)
    assert torch.equal(logits(narrow, tokens), logits(model, tokens))
    assert report["feed_forward"]["method"] is None
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert not addresses & {parameter.data_ptr() for parameter in narrow.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_selection_equals_the_dense_model_without_the_others(kind, tokens):
    """float64: kept neurons are found again by their weights, and nothing else has moved."""
    model = tiny_model(kind, dtype=torch.float64)
    narrow, _ = compress(
        model, tokens, ff_width=28, ff_method="magnitude", refit=False, self_windows=0
    )
    before = logits(model, tokens)
    for (dense_readers, writer), (readers, _) in zip(parts(model), parts(narrow), strict=True):
        rows, kept = (
            r[0].weight if isinstance(r[0], torch.nn.Linear) else r[0].weight.mT
            for r in (dense_readers, readers)
        )
        dead = ~(rows[:, None] == kept).all(-1).any(1)
        assert int(dead.sum()) == 12
        writer.register_forward_pre_hook(
            lambda _, args, dead=dead: (args[0].masked_fill(dead, 0.0),)
        )
    wanted = logits(model, tokens)
    assert torch.allclose(logits(narrow, tokens), wanted, atol=1e-9)
    assert (before - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_loads_plainly(kind, tokens, tmp_path):
    import transformers

    model = tiny_model(kind)
    narrow, report = compress(model, tokens, ff_width=0.7)
    expected = {"asked": 0.7, "old": 40, "new": 32, "layers": None, "method": "eliminate"}
    assert report["feed_forward"] == expected
    assert report["width"]["new"] == 24
    narrow.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(loaded, tokens) - logits(narrow, tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_is_nearer_to_what_the_dense_writers_write(kind, tokens):
    model = tiny_model(kind)
    with captured([writer for _, writer in parts(model)]) as wanted:
        logits(model, tokens)

    def distance(**options) -> float:
        narrow, _ = compress(model, tokens, ff_width=24, self_windows=0, **options)
        with captured([writer for _, writer in parts(narrow)]) as found:
            logits(narrow, tokens)
        return float((found[0] - wanted[0]).norm())  # later ones read another stream

    magnitude = distance(ff_method="magnitude", refit=False)
    assert distance(ff_method="nystrom", refit=False) < magnitude
    assert distance(ff_method="eliminate", ridge=1e-4) < 0.9 * magnitude


@pytest.mark.parametrize("refit", [True, False])
def test_what_the_first_feed_forward_loses(refit, tokens):
    model = tiny_model("olmo2")
    narrow, report = compress(model, tokens, ff_width=24, refit=refit, self_windows=0)
    written = []
    for one in (model, narrow):
        with captured([writer for _, writer in parts(one)]) as found:
            logits(one, tokens)
        written.append(found[0].double())  # later ones read another stream
    counts = torch.ones(tokens.shape[1], 1, dtype=torch.float64)
    counts[0] = FIRST_WEIGHT
    missed, whole = (
        (x.view(*tokens.shape, -1).square() * counts).sum()
        for x in (written[1] - written[0], written[0])
    )
    wanted = missed / whole
    assert len(report["feed_forward_lost"]) == 3
    assert report["feed_forward_lost"][0] == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0.8},
        {"width": 16, "ff_width": 20},
        {"energy": 0.9},
        {"width": 0.8, "ff_width": 0.7},
    ],
)
def test_the_residual_is_refused_with_the_reason(options, tokens):
    with pytest.raises(ValueError, match=r"olmo2 keeps its residual \(a norm follows each"):
        compress(tiny_model("olmo2"), tokens, **options)


@pytest.mark.parametrize(
    "options",
    [{"method": "pca"}, {"untie": True}, {"method": "magnitude", "refit": False}],
)
def test_choices_of_the_residual_are_refused(options, tokens):
    with pytest.raises(ValueError, match="gpt2 keeps its residual"):
        compress(tiny_model("gpt2"), tokens, ff_width=0.7, **options)
