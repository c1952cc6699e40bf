"""The pipeline on tiny random models: exactness, ties, determinism, refit."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from conftest import tiny_model

from dotresize import compress
from dotresize.accounting import count_parameters
from dotresize.benchmarks.studies.activations import residual_stream
from dotresize.calibration.statistics import collect
from dotresize.calibration.text import random_windows
from dotresize.compression import make_options
from dotresize.models import architecture_of, supported
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.absorb import absorb
from dotresize.narrow.calibrate import collect_for
from dotresize.narrow.one_map import basis
from dotresize.narrow.refit import refit
from dotresize.narrow.targets import kept_set

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = supported(residual=True)
# With one map for all locations; the last as in the paper.
METHODS = {
    **{name: {"method": name} for name in ("pca", "dot", "magnitude")},
    "one transport": {"method": "dot", "steps": 1, "factor": "qr"},
}
# What a family makes of a map does not hang on where that comes from.
CASES = [
    *((kind, "dot") for kind in KINDS),
    *(("llama", name) for name in METHODS if name != "dot"),
]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (6, 33))


def logits(model, tokens) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens).logits.double()


def project_residual(model, q):
    """Project what every norm reads onto span(q); the dense model otherwise unchanged."""
    projector = (q @ q.mT).to(model.dtype)
    return [
        norm.register_forward_pre_hook(lambda _, args: (args[0] @ projector,))
        for _, norm in architecture_of(model.config).norms(model)
    ]


def float64_norms(model):
    """transformers computes every RMSNorm in float32; here, in the weights' own type."""

    def forward(x, norm):
        variance = x.square().mean(-1, keepdim=True)
        return architecture.gain(norm) * x * torch.rsqrt(variance + norm.variance_epsilon)

    architecture = architecture_of(model.config)
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
        if type(module).__name__ == "OlmoLayerNorm":
            module.forward = functools.partial(
                torch.nn.functional.layer_norm, normalized_shape=module.normalized_shape
            )
        if type(module).__name__ == "GemmaRMSNorm":
            module.variance_epsilon = module.eps
        if hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(forward, norm=module)
    return model


@pytest.mark.parametrize(("kind", "method"), CASES)
@pytest.mark.parametrize("tied", [True, False])
def test_untied_equals_the_projected_dense_model(kind, tied, method, tokens):
    """float64: absorption is exact, whatever the map."""
    model = float64_norms(tiny_model(kind, tied=tied, dtype=torch.float64))
    narrow, report = compress(
        model, tokens, width=16, refit=False, untie=True, self_windows=0, **METHODS[method]
    )
    assert narrow.config.hidden_size == 16
    assert report["tied"] is False
    q = _map_of(model, tokens, method)
    handles = project_residual(model, q)
    wanted = logits(model, tokens)
    for handle in handles:
        handle.remove()
    assert torch.allclose(logits(float64_norms(narrow), tokens), wanted, atol=1e-9, rtol=1e-9)
    assert (logits(model, tokens) - wanted).abs().max() > 1e-2  # the projection does something


def _map_of(model, tokens, method):
    handle = CausalLM.in_memory(model)
    options = make_options(untie=True, **METHODS[method])
    statistics = collect_for(handle, tokens, options)
    kept = kept_set(None, statistics, 16)
    return basis(handle, options.method.maps([statistics.mean()], [kept], options)[0], options)


@pytest.mark.parametrize(("kind", "method"), CASES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("untie", [True, False])
def test_full_width_is_the_identity(kind, tied, untie, method, tokens):
    model = tiny_model(kind, tied=tied)
    wanted = logits(model, tokens)
    for use_refit in (False, True):
        narrow, _ = compress(
            model, tokens, width=1.0, refit=use_refit, untie=untie, **METHODS[method]
        )
        assert (logits(narrow, tokens) - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert torch.equal(logits(model, tokens), wanted)  # the given model is untouched


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("untie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_absorbing_an_identity_is_what_products_would_make(kind, untie, dtype, monkeypatch):
    handle = CausalLM.in_memory(tiny_model(kind, dtype=dtype))
    q = torch.eye(handle.width, dtype=torch.float64)
    found = absorb(handle, q, untie=untie).module.state_dict()
    monkeypatch.setattr("dotresize.narrow.absorb.is_identity", lambda _: False)
    wanted = absorb(handle, q, untie=untie).module.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_loads_plainly_with_equal_logits(kind, tokens, tmp_path):
    import transformers

    model = tiny_model(kind)
    narrow, report = compress(model, tokens, width=0.7)
    assert report["tied"]
    narrow.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.head_dim == 8
    assert (logits(loaded, tokens) - logits(narrow, tokens)).abs().max() < 1e-4


def test_dtypes_are_kept(tokens):
    model = tiny_model(dtype=torch.bfloat16)
    model.model.norm.float()
    state = torch.get_rng_state()
    narrow, _ = compress(model, tokens, width=16, refit=False, self_windows=0, sensitivity=False)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(model.parameters(), narrow.parameters(), strict=True)
    assert all(old.dtype == new.dtype for old, new in pairs)


def test_models_share_no_memory(tokens):
    model = tiny_model("qwen3")
    narrow, _ = compress(model, tokens, width=16)
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert not addresses & {parameter.data_ptr() for parameter in narrow.parameters()}


def test_tokens_may_come_in_parts(tokens):
    model = tiny_model()
    whole, _ = compress(model, tokens, width=16, self_windows=0)
    parts, _ = compress(
        model, iter([tokens[:2], tokens[2:4], tokens[4:]]), width=16, self_windows=0
    )
    assert torch.equal(logits(whole, tokens), logits(parts, tokens))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.int64), "no calibration tokens"),
        ([], "no calibration tokens"),
        (torch.zeros(2, 8), "must be int64"),
        (torch.full((2, 8), 259), "token id 259: the model's vocabulary is 259"),
    ],
)
def test_bad_tokens(bad, message):
    with pytest.raises(ValueError, match=message):
        compress(tiny_model(), bad)


def test_layers_with_masks_of_their_own(tokens):
    """Sliding windows on some layers: at full width, replaying a wrong mask would show."""
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert len(set(model.config.layer_types)) == 2
    narrow, _ = compress(model, tokens, width=1.0)
    assert (logits(narrow, tokens) - logits(model, tokens)).abs().max() < 1e-4
    other = tiny_model("qwen2")
    other.load_state_dict(model.state_dict())
    assert (logits(other, tokens) - logits(model, tokens)).abs().max() > 1e-2


def test_same_seed_same_weights(tokens):
    model = tiny_model()
    one, _ = compress(model, tokens, width=16)
    two, _ = compress(model, tokens, width=16)
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_refit_brings_the_stream_closer(tokens):
    """On the calibration tokens, which is what least squares promises."""
    model = tiny_model(dtype=torch.float64)
    q = _map_of(model, tokens, "pca")
    goal = residual_stream(model, tokens) @ q * (16 / 24) ** 0.5

    def distance(narrow) -> float:
        with torch.inference_mode():
            return float((residual_stream(narrow, tokens) - goal).norm())

    dense = CausalLM.in_memory(model)
    plain, corrected = absorb(dense, q), absorb(dense, q)
    refit(dense, corrected, q, tokens, None, make_options(ridge=1e-6))
    assert distance(corrected.module) < 0.8 * distance(plain.module)


def test_refit_of_biased_writers(tokens):
    """Llama with attention_bias has a bias on the writer too; at full width nothing may change."""
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    narrow, _ = compress(model, tokens, width=1.0)
    assert (logits(narrow, tokens) - logits(model, tokens)).abs().max() < 1e-4


def test_statistics_match_a_direct_computation(tokens):
    model = tiny_model()
    statistics = collect(CausalLM.in_memory(model), tokens, apart=True, batch_windows=2)
    with torch.inference_mode():
        stream = residual_stream(model, tokens).double()
    stream = stream / stream.square().mean(-1, keepdim=True).sqrt()
    assert len(statistics.locations) == 7
    assert statistics.tokens == tokens.numel()
    assert torch.allclose(statistics.importance, stream.abs().mean(1), rtol=1e-5)
    assert torch.allclose(statistics.moment, stream.mT @ stream / tokens.numel(), atol=1e-5)
    cost = (stream[2, :, :, None] - stream[2, :, None, :]).abs().mean(0)
    assert torch.allclose(statistics.cost[2].double(), cost, rtol=1e-5, atol=1e-6)


def test_parameters_are_counted_once():
    tied, untied = (count_parameters(CausalLM.in_memory(tiny_model(tied=t))) for t in (True, False))
    assert untied["total"] - tied["total"] == 259 * 24
    assert untied["non_embedding"] == tied["non_embedding"]
    assert tied["total"] - tied["non_embedding"] == 259 * 24


def test_windows_cover_every_source():
    streams = [torch.arange(1000), torch.arange(10_000, 10_090)]
    windows = random_windows(streams, 9, 20, seed=3)
    assert windows.shape == (9, 20)
    assert (windows[:, 0] < 1000).sum() == 5
    starts = windows[:, 0][windows[:, 0] < 1000].sort().values
    assert (starts // 196).tolist() == [0, 1, 2, 3, 4]  # one in each fifth of the text
    assert torch.equal(windows, random_windows(streams, 9, 20, seed=3))
    assert not torch.equal(windows, random_windows(streams, 9, 20, seed=4))


def test_non_finite_weights_and_activations_are_named(tokens):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        compress(model, tokens)
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5] = 3e38
    with pytest.raises(ValueError, match=r"model\.layers\.2\.input_layernorm, neuron 5"):
        compress(model, tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "svd"}, "must be one of dot, pca, magnitude, slicegpt"),
        ({"scope": "layer"}, "must be one of global, location"),
        ({"scope": "location", "method": "magnitude"}, "scope location: must be of pca or dot"),
        ({"method": "slicegpt", "refit": False, "ff_width": 30}, "narrows the residual only"),
        ({"self_windows": -1}, "self_windows -1"),
        ({"width": 25}, "up to the model's 24"),
        ({"width": 15, "keep_type": True}, "a multiple of its 4 heads, such as 12 or 16"),
        ({"width": 16, "multiple_of": 0}, "multiple_of 0: must be at least 1"),
        ({"width": 16, "tensor_parallel": 3}, "tensor_parallel 3: must divide the model.s 4 heads"),
        ({"reg": 0.0}, "reg"),
        ({"reg": 1e15, "method": "dot"}, "span has collapsed"),
        ({"ff_width": 41}, "ff_width 41: must be a whole number up to the model.s 40"),
        ({"ff_method": "prune"}, "must be one of eliminate"),
        ({"energy": 0.0}, "energy 0: must be a share"),
        ({"energy": 0.9, "width": 0.5}, "not both"),
        ({"steps": 0, "method": "dot"}, "steps 0: must be a whole number from 1 to 10000, or inf"),
        ({"steps": 1.5, "method": "dot"}, "steps 1.5: must be a whole number"),
        ({"steps": math.nan, "method": "dot"}, "steps"),
        ({"steps": math.inf, "method": "pca"}, "steps: method pca has none; give method dot"),
        ({"factor": "qr", "method": "dot"}, "factor qr: the limit of transport has none"),
        (
            {"steps": math.inf, "method": "dot", "targets": torch.arange(16)},
            "targets: the limit of transport depends on none",
        ),
        ({"reg": 2, "method": "magnitude"}, "reg: method magnitude has none; give method dot"),
        ({"reg": 2, "width": None, "ff_width": 40}, "reg: ff_width alone leaves the residual"),
        ({"sensitivity": True, "method": "slicegpt"}, "sensitivity: method slicegpt has none"),
        ({"sensitivity": 1, "method": "dot"}, "sensitivity is 1: must be True or False"),
        ({"targets": torch.arange(3), "method": "pca"}, "targets: method pca has none"),
        ({"targets": torch.arange(3), "method": "dot"}, "3 neurons are named, the new width is 16"),
        ({"targets": torch.arange(3), "method": "dot", "params": 0.5}, "leave params out"),
        ({"backend": "cublas"}, "must be one of auto"),
    ],
)
def test_bad_options(options, message, tokens):
    with pytest.raises(ValueError, match=message):
        compress(tiny_model(), tokens, **options)


def test_unsupported_architecture_names_what_is():
    import transformers

    config = transformers.BloomConfig(hidden_size=8, n_head=2, n_layer=1, vocab_size=11)
    with pytest.raises(ValueError, match=r"'bloom' is not supported; supported: gemma, gemma2"):
        compress(transformers.BloomForCausalLM(config), torch.zeros(1, 4, dtype=torch.int64))
