"""Merging of feed-forward sublayers: what is alike is found, aligned and tied without loss."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from merge_models import (
    KINDS,
    LANGUAGE,
    LAYERS,
    SECRET,
    build,
    closeness,
    inputs,
    logits,
    with_secret,
)

from dotresize import merge_feed_forward
from dotresize.accounting import unique_parameters
from dotresize.merging.align import features
from dotresize.merging.tie import dropped
from dotresize.models.stacks import layers_of, stacks_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kind", "anchor"),
    [*((kind, "middle") for kind in KINDS), *product(LANGUAGE, ("first", "last"))],
)
def test_secret_permutations_are_merged_without_loss(kind, anchor):
    model = with_secret(kind)
    before = copy.deepcopy(model.state_dict())
    stack = stacks_of(model)[0]
    merged, report = merge_feed_forward(
        model, inputs(kind), k={stack.name: 4}, metric=closeness(model, kind), anchor=anchor
    )
    found = report["stacks"][stack.name]
    assert found["window"] == SECRET
    assert found["anchor"] == {"first": 3, "middle": 4, "last": 6}[anchor]
    assert len(found["profile"]) == LAYERS - 3
    assert (logits(merged, kind) - logits(model, kind)).abs().max() < 1e-4
    layers = layers_of(merged, stack)
    one = sum(p.numel() for n, p in layers[3].named_parameters() if n in stack.weights)
    assert report["parameters"]["dense"] - report["parameters"]["merged"] == 3 * one
    owners = [layers[i].get_parameter(stack.writer) for i in SECRET]
    assert all(owner is owners[0] for owner in owners)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # the given model is untouched


def test_without_permutation_it_is_lost():
    model = with_secret("llama")
    metric = closeness(model, "llama")
    _, aligned = merge_feed_forward(
        model, inputs("llama"), k=4, metric=metric, start=3, baselines=True
    )
    _, plain = merge_feed_forward(
        model, inputs("llama"), k=4, metric=metric, start=3, permute=False
    )
    found = aligned["stacks"]["decoder"]["baselines"]
    assert found["without permutation"] == pytest.approx(plain["metric"]["merged"])
    assert aligned["metric"]["merged"] > -1e-4 > -1e-2 > plain["metric"]["merged"]
    assert found["layers dropped"] < -1e-2


def test_soft_alignment_becomes_the_permutation_at_small_reg():
    model = with_secret("gpt2")
    metric = closeness(model, "gpt2")
    found = {
        soft: merge_feed_forward(model, inputs("gpt2"), k=4, metric=metric, start=3, soft=soft)[1][
            "metric"
        ]["merged"]
        for soft in (0.01, 1.0)
    }
    assert found[0.01] > -1e-3 > found[1.0]


def test_encoder_and_decoder_have_windows_and_tokens_of_their_own():
    model = with_secret("marian", 1)
    batches = inputs("marian")
    merged, report = merge_feed_forward(
        model, batches, k={"encoder": 2, "decoder": 4}, metric=closeness(model, "marian")
    )
    found = report["stacks"]
    assert found["decoder"]["window"] == SECRET
    assert len(found["encoder"]["window"]) == 2
    assert found["encoder"]["tokens"] == sum(int(b["attention_mask"].sum()) for b in batches)
    assert found["decoder"]["tokens"] == sum(int((b["labels"] != -100).sum()) for b in batches)
    shared = {name for names in report["shared"] for name in names}
    assert len(shared) == 4 * (2 + 4)
    assert unique_parameters(merged) == report["parameters"]["merged"]


def test_padding_is_not_counted():
    """What lies under the mask may be anything."""
    model = build("gpt2")
    batches = inputs("gpt2", 2)
    others = [dict(batch) for batch in batches]
    for batch in others:
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    one, other = (
        features(model, stacks_of(model), some, None, "auto")["decoder"]
        for some in (batches, others)
    )
    assert one.tokens == other.tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    assert torch.allclose(one.correlation(1, 2), other.correlation(1, 2), atol=1e-6)


def test_correlation_is_that_of_the_neurons():
    model = build("llama")
    batch = inputs("llama", 1)[0]
    seen = {}
    for i in (2, 5):
        layer = model.model.layers[i].mlp.up_proj
        layer.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out}))
    aligner = features(model, stacks_of(model), [batch], None, "auto")["decoder"]
    kept = [seen[i][batch["attention_mask"] != 0].double().T for i in (2, 5)]
    wanted = torch.corrcoef(torch.cat(kept))[:40, 40:]
    assert torch.allclose(aligner.correlation(2, 5), wanted, atol=1e-5)


def test_a_neuron_that_never_changes_correlates_with_nothing():
    model = build("opt")
    with torch.no_grad():
        model.model.decoder.layers[2].fc1.weight[4] = 0.0
    _, report = merge_feed_forward(model, inputs("opt"), k=3)
    assert report["metric"]["merged"] < 0
    aligner = features(model, stacks_of(model), inputs("opt"), None, "auto")["decoder"]
    assert (aligner.correlation(2, 3)[4] == 0).all()


def test_pairs_are_aligned_once(monkeypatch):
    from dotresize.merging import align as merge_align

    model, pairs = build("llama"), []
    correlation = merge_align.Aligner.correlation

    def counted(self, a, i):
        pairs.append((a, i))
        return correlation(self, a, i)

    monkeypatch.setattr(merge_align.Aligner, "correlation", counted)
    merge_feed_forward(model, inputs("llama"), k=4, anchor="middle")
    assert len(pairs) == len(set(pairs)) == 3 * (LAYERS - 3)


def test_ties_outlive_moves_copies_and_training():
    merged, report = merge_feed_forward(build("gpt2"), inputs("gpt2"), k=3, start=2)
    merged = copy.deepcopy(merged).double()
    optimizer = torch.optim.AdamW(merged.parameters(), lr=0.01)
    batch = inputs("gpt2", 1)[0]
    merged.train()(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert unique_parameters(merged) == report["parameters"]["merged"]
    weights = [merged.get_parameter(name) for name in report["shared"][0]]
    assert all(weight is weights[0] for weight in weights)
    assert weights[0].grad.abs().max() > 0


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"k": 1}, "k 1: must be 2 to 8, the layers of the decoder"),
        ({"k": 9}, "k 9: must be 2 to 8"),
        ({"k": {"encoder": 2}}, "llama has no encoder, but decoder"),
        ({"k": {}}, "k: names no stack, but there is decoder"),
        ({"k": 3, "anchor": "best"}, "anchor 'best': must be one of first, middle, last"),
        ({"k": 3, "start": 6}, "start 6: a window of 3 begins at 0 to 5"),
        ({"k": 3, "soft": 0.0}, "soft 0: must be positive"),
    ],
    ids=str,
)
def test_refusals(choices, message):
    with pytest.raises(ValueError, match=message):
        merge_feed_forward(build("llama"), inputs("llama", 1), **choices)


def test_a_metric_must_be_a_number():
    with pytest.raises(ValueError, match="the metric is nan: must be a finite number"):
        merge_feed_forward(build("llama"), inputs("llama", 1), k=3, metric=lambda _: float("nan"))


def test_a_window_that_breaks_the_model_is_the_worst():
    calls = iter([1.0, float("nan"), 0.3, 0.5, float("-inf"), 0.2, 0.1, 0.4, 0.5])
    _, report = merge_feed_forward(
        build("llama"), inputs("llama", 1), k=2, metric=lambda model: next(calls)
    )
    found = report["stacks"]["decoder"]
    assert [one["metric"] for one in found["profile"]] == [None, 0.3, 0.5, None, 0.2, 0.1, 0.4]
    assert found["window"] == [2, 3]


def test_labels_that_do_not_count():
    model = build("llama")
    batches = inputs("llama", 2)
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
    batches[0]["labels"][:] = -100
    _, both = merge_feed_forward(model, batches, k=2, start=0)
    _, one = merge_feed_forward(model, batches[1:], k=2, start=0)
    assert both["metric"]["dense"] == pytest.approx(one["metric"]["dense"])


@pytest.mark.parametrize("kind", ["vit", "bert", "marian"])
def test_a_metric_is_asked_for_where_there_is_no_loss(kind):
    """Only decoders alone have their next token to be judged by."""
    batches = [{name: x for name, x in b.items() if name != "labels"} for b in inputs(kind)]
    with pytest.raises(ValueError, match="the batches have no labels: give a metric"):
        merge_feed_forward(build(kind), batches, k=2)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_layers_are_as_if_they_were_not_there(kind):
    model = build(kind)
    wanted = copy.deepcopy(model)
    lost = 0
    for stack in stacks_of(wanted):
        layers = layers_of(wanted, stack)
        lost += sum(p.numel() for i in (2, 5) for p in layers[i].parameters())
        kept = [layer for i, layer in enumerate(layers) if i not in (2, 5)]
        owner, _, last = stack.layers.rpartition(".")
        setattr(wanted.get_submodule(owner), last, torch.nn.ModuleList(kept))
    gone = {stack.name: [2, 5] for stack in stacks_of(model)}
    before = logits(model, kind)
    with dropped(model, gone) as parameters:
        torch.testing.assert_close(logits(model, kind), logits(wanted, kind))
        assert parameters == lost
    assert torch.equal(logits(model, kind), before)


def test_text_without_the_layer_that_counts():
    """A cache counts its tokens in layer 0; the first tokens are the same without a cache."""
    model = build("bart")
    batch = {name: x for name, x in inputs("bart", 1)[0].items() if name != "labels"}
    choices = {"max_new_tokens": 12, "max_length": None, "do_sample": False, "num_beams": 1}
    cached = model.generation_config.use_cache
    with dropped(model, {"decoder": [0, 1]}):
        found = model.generate(**batch, **choices)
        assert torch.equal(found, model.generate(**batch, **choices, use_cache=False))
    assert model.generation_config.use_cache == cached


def test_frames_of_padding_do_not_count():
    """The mask is of frames, of which the encoder makes one token of two."""
    model, batches = build("whisper"), inputs("whisper")
    _, report = merge_feed_forward(model, batches, k=2)
    assert report["stacks"]["encoder"]["tokens"] == sum(
        int(batch["attention_mask"].sum()) // 2 for batch in batches
    )


def test_no_batches_and_nothing_that_counts():
    with pytest.raises(ValueError, match="there are no batches"):
        merge_feed_forward(build("llama"), [], k=2)
    batch = inputs("llama", 1)[0]
    batch["attention_mask"] = 0 * batch["attention_mask"]
    with pytest.raises(ValueError, match="no token counts in the decoder"):
        merge_feed_forward(build("llama"), [batch], k=2)


def test_published_parameter_counts():
    """ViT-B/16 with five merged loses 21.8 %, GPT-2 Large with thirteen 20.3 %."""
    import transformers

    from dotresize.merging.tie import tie
    from dotresize.models.skeleton import skeleton

    shapes = [
        (transformers.ViTForImageClassification, transformers.ViTConfig(num_labels=1000), 5, 0.218),
        (
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20),
            13,
            0.203,
        ),
    ]
    for kind, config, k, share in shapes:
        model = skeleton(kind, config, torch.device("cpu"))
        stack, before = stacks_of(model)[0], unique_parameters(model)
        layers = layers_of(model, stack)
        first = {n: p for n, p in layers[0].named_parameters() if n in stack.weights}
        tie(model, stack, list(range(k)), first)
        assert 1 - unique_parameters(model) / before == pytest.approx(share, abs=5e-4)
