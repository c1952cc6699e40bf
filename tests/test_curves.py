"""What each feed-forward loses at every width, and what it costs to leave a layer out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import tiny_model
from test_compress import logits

from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import SameParts
from dotresize.narrow.curves import ENDLESS, measure
from dotresize.narrow.feed_forward import elimination

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (6, 33))


def test_the_course_of_an_elimination_agrees_with_least_squares():
    h, w = torch.randn(300, 12, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    gram = h.mT @ h
    course = elimination(gram, gram @ w, 2, ridge=1e-9)
    assert sorted(course.kept(7, 12).tolist() + course.dropped[:5].tolist()) == list(range(12))
    for count in (12, 9, 4, 2):
        kept = course.kept(count, 12)
        missed = h @ w - h[:, kept] @ torch.linalg.lstsq(h[:, kept], h @ w).solution
        assert course.lost_at([count])[0] == pytest.approx(
            float(missed.square().sum()), rel=1e-5, abs=1e-4
        )


def test_neurons_that_never_fire_are_no_measure(tokens):
    """A layer of zeros beyond its live neurons is measured where live ones go."""
    model = tiny_model()
    for i in (0, 2):
        with torch.no_grad():
            model.model.layers[i].mlp.down_proj.weight[:, 16:] = 0.0
            model.model.layers[i].mlp.up_proj.weight[16:] = 0.0
    found = measure(CausalLM.in_memory(model), tokens[:4], tokens[4:], 0.7, first=1.0)
    assert found.reference[1] == 28
    for i in (0, 2):
        assert found.reference[i] < 16
        assert found.divergence[i] > 0
        assert found.loss(i, [12])[0] > found.loss(i, [16])[0]


def test_divergences_are_those_of_models_with_one_layer_narrowed(tokens):
    """Each layer alone, by the same neurons and writer: the predictions of a whole model."""
    model = tiny_model(dtype=torch.float64)
    handle = CausalLM.in_memory(model)
    found = measure(handle, tokens[:4], tokens[4:], 0.5, first=100.0, batch_windows=3)
    assert found.reference == [20, 20, 20]
    expected = logits(model, tokens[4:]).log_softmax(-1)
    divergences = []
    for i, course in enumerate(found.eliminations):
        kept = course.kept(20, 40)
        other = handle.copied().module
        block = other.model.layers[i].mlp
        with torch.no_grad():
            seen = []
            hook = model.model.layers[i].mlp.down_proj.register_forward_pre_hook(
                lambda _, given, seen=seen: seen.append(given[0])
            )
            model(tokens[:4])
            hook.remove()
            h = seen[0].clone()
            weights = torch.ones(h.shape[:2], dtype=torch.float64)
            weights[:, 0] = 100.0
            scaled = (h * weights[..., None].sqrt()).flatten(0, 1)
            gram = scaled.mT @ scaled
            ridge = 1e-2 * gram[kept][:, kept].diagonal().mean()
            rows = block.down_proj.weight.mT
            left = gram[kept][:, kept] + ridge * torch.eye(20, dtype=torch.float64)
            solved = torch.linalg.solve(left, gram[kept] @ rows + ridge * rows[kept])
            new = torch.zeros_like(rows)
            new[kept] = solved
            block.down_proj.weight.copy_(new.mT)
        narrowed = logits(other, tokens[4:]).log_softmax(-1)
        divergences.append((expected.exp() * (expected - narrowed)).sum(-1)[:, ::2].mean(1))
    of_windows = torch.stack(divergences)  # which all count the same
    sums = of_windows.sum(0)
    scaled = (of_windows / sums * sums.mean()).mean(1)
    assert found.divergence == pytest.approx(scaled.tolist(), rel=1e-3)


def test_what_is_not_finite_is_dearest(tokens):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    found = measure(CausalLM.in_memory(model), tokens[:4], tokens[4:], 0.5, first=1.0, without=True)
    assert min(found.divergence + found.without) >= ENDLESS


@pytest.mark.parametrize("first", [1.0, 100.0])
def test_curves_end_where_they_may(tokens, first):
    """With as far to go as the divergence is measured at, what is above is the same."""
    handle = CausalLM.in_memory(tiny_model())
    whole = measure(handle, tokens[:4], tokens[4:], 0.6, first=first)
    part = measure(handle, tokens[:4], tokens[4:], 0.6, first=first, least=0.6)
    assert part.reference == whole.reference == [24] * 3
    assert part.eliminations[0].lost[-1][0] == 24
    assert part.predicted([24, 30, 38]) == pytest.approx(whole.predicted([24, 30, 38]))


def test_few_layers_are_tried_without(tokens):
    """These change the stream least; each divergence is that of a model without the layer."""
    model = tiny_model(num_hidden_layers=6)
    handle = CausalLM.in_memory(model)
    found = measure(handle, tokens[:4], tokens[4:], 0.5, first=1.0, without=True)
    finite = [i for i, lost in enumerate(found.without) if lost < math.inf]
    assert len(finite) == 4
    with torch.no_grad():
        states = model(tokens[4:], output_hidden_states=True).hidden_states
    # The last of them has passed the final norm.
    changes = [
        float(((b - a).square().sum(-1) / b.square().sum(-1)).mean())
        for a, b in itertools.pairwise(states[:-1])
    ]
    assert set(sorted(range(5), key=changes.__getitem__)[:3]) <= set(finite)
    expected = logits(model, tokens[4:]).log_softmax(-1)
    ratios = []
    for i in finite:
        other = handle.derived(SameParts(handle, (i,))).module
        narrowed = logits(other, tokens[4:]).log_softmax(-1)
        divergence = (expected.exp() * (expected - narrowed)).sum(-1)[:, ::2].mean()
        ratios.append(found.without[i] / float(divergence))
    # Their windows are scaled as those of the narrowed ones are, which is much the same.
    assert ratios == pytest.approx([1.0] * 4, rel=0.1)
