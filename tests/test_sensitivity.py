"""Gradients of the model's own output at every residual location, and maps that heed them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import fails, tiny_model

from dotresize import compress
from dotresize.calibration import gradients
from dotresize.calibration.gradients import _drawn
from dotresize.calibration.statistics import Statistics, collect
from dotresize.cli import main
from dotresize.compression import make_options
from dotresize.models import supported
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.calibrate import collect_for
from dotresize.narrow.pipeline import prepare
from dotresize.narrow.sensitivity import felt
from dotresize.offload import memory_plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (5, 17))


def collected(model, tokens, **choices) -> Statistics:
    return collect(
        CausalLM.in_memory(model), tokens, cost=False, fisher=True, gradient_cost=True, **choices
    )


def whole_graph(model, ids, number) -> list[torch.Tensor]:
    """Return a window's gradients by the normalised stream at every location, by one graph."""
    norms = [norm for _, norm in CausalLM.in_memory(model).architecture.norms(model)]
    read: list[torch.Tensor] = []
    handles = [
        norm.register_forward_pre_hook(lambda _, args: read.append(args[0])) for norm in norms
    ]
    share = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    drawn = _drawn(share.detach().exp().float(), 0, number)
    found = torch.autograd.grad(-share.gather(1, drawn[:, None]).sum(), read)
    rms = [x.detach()[0].square().mean(-1, keepdim=True).sqrt() for x in read]
    return [g[0] * r for g, r in zip(found, rms, strict=True)]


@pytest.mark.parametrize("kind", supported(residual=True))
def test_the_walk_backwards_is_the_backward_pass(kind, tokens):
    model = tiny_model(kind, dtype=torch.float64)
    found = collected(model, tokens, apart=True, batch_windows=2)
    each = [whole_graph(model, tokens[i : i + 1], i) for i in range(len(tokens))]
    for place, name in enumerate(found.locations):
        g = torch.cat([window[place] for window in each])
        fisher = g.mT @ g / len(g)
        assert (found.fisher[place] - fisher).norm() < 1e-5 * fisher.norm(), name
        cost = (g[:, :, None] - g[:, None, :]).abs().mean(0)
        assert (found.gradient_cost[place] - cost).norm() < 1e-5 * cost.norm(), name
    assert found.seconds["sensitivity"] > 0
    assert found.kept_bytes == 3 * tokens.numel() * 24 * 8  # what three layers read


def test_what_is_drawn_follows_the_prediction():
    share = torch.tensor([0.0, 0.5, 0.25, 0.25, 0.0])
    drawn = _drawn(share.expand(40_000, -1), 3, 1)
    assert torch.bincount(drawn, minlength=5) / 40_000 == pytest.approx(share, abs=0.01)
    assert torch.equal(drawn, _drawn(share.expand(40_000, -1), 3, 1))
    assert not torch.equal(drawn, _drawn(share.expand(40_000, -1), 4, 1))
    assert not torch.equal(drawn, _drawn(share.expand(40_000, -1), 3, 2))


def test_batches_and_the_callers_modes_change_nothing(tokens):
    model = tiny_model()
    wanted = collected(model, tokens)
    found = collected(model, tokens, batch_windows=1)
    torch.testing.assert_close(found.fisher, wanted.fisher, rtol=1e-4, atol=1e-7)
    with torch.inference_mode():
        found = collected(model, tokens)
    assert torch.equal(found.fisher, wanted.fisher)
    assert not found.fisher.requires_grad
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("method", ["dot", "pca"])
@pytest.mark.parametrize("scope", ["global", "location"])
def test_a_map_that_heeds_the_output(method, scope, tokens):
    model = tiny_model()
    choices = {"width": 16, "method": method, "scope": scope, "self_windows": 0, "seed": 5}
    narrow, report = compress(model, tokens, sensitivity=True, **choices)
    plain, other = compress(model, tokens, sensitivity=False, **choices)
    assert report["map"]["felt"] > 0
    assert report["seconds"]["sensitivity"] > 0
    assert report["sensitivity"]["kept_bytes"] > 0
    assert other["sensitivity"] is None
    assert other["seconds"]["sensitivity"] == 0
    again, _ = compress(model, tokens, sensitivity=True, **choices)
    same = [torch.equal(a, b) for a, b in zip(narrow.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert any(
        not torch.equal(a, b) for a, b in zip(narrow.parameters(), plain.parameters(), strict=True)
    )


@pytest.mark.parametrize("method", ["dot", "pca"])
def test_the_output_feels_such_a_map_less(method, tokens):
    """Neurons that nothing reads are the largest: what heeds the output lets them go."""
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :4] *= 10
        model.lm_head.weight = torch.nn.Parameter(torch.randn(256, 24))
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight",
                              "up_proj.weight", "lm_head.weight")):  # fmt: skip
                weight[:, :4] *= 1e-3
    model.config.tie_word_embeddings = False
    heeds = make_options(width=16, method=method, sensitivity=True)
    handle = CausalLM.in_memory(model)
    heeds_not = make_options(width=16, method=method, sensitivity=False)
    statistics = collect_for(handle, tokens, heeds, heeds_not)
    mean, kept = statistics.mean(), torch.arange(16)

    def of(options) -> float:
        q = options.method.maps([mean], [kept], options)[0].q
        return felt(q, mean.moment[0], mean.fisher[0])

    assert 0 < of(heeds) < 0.8 * of(heeds_not)


def test_by_parts_as_in_memory(arguments, capsys):
    arguments += ["--sensitivity", "on", "--method", "dot"]
    found = []
    for i, more in enumerate((["--self-windows", "0"], ["--memory", "3GB"])):
        out = f"{arguments[2]}-{i}"
        assert main([*arguments[:2], out, *arguments[3:], *more]) == 0
        found.append(json.loads((Path(out) / "dotresize.json").read_text()))
    assert found[0]["map"]["felt"] == pytest.approx(found[1]["map"]["felt"], rel=1e-3)
    assert found[1]["predicted_memory_bytes"]["host"] > 0
    assert found[0]["settings"]["sensitivity"] is True


@pytest.mark.parametrize("state", ["made in inference mode", "in training", "checkpointing"])
def test_models_in_other_states(state, tokens):
    """Their gradients are those of the model in evaluation, and they stay as they were."""
    given = tiny_model()
    wanted = collected(given, tokens)
    if state == "made in inference mode":
        with torch.inference_mode():
            model = copy.deepcopy(given)
    else:
        model = copy.deepcopy(given).train()
    if state == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    found = collected(model, tokens)
    assert torch.equal(found.fisher, wanted.fisher)
    assert model.training == (state != "made in inference mode")
    assert all(p.is_inference() != model.training for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tokens):
    model = tiny_model(dtype=dtype)
    found = collected(model, tokens)
    assert found.fisher[0].diagonal().min() > 0
    narrow, _ = compress(model, tokens, width=16, self_windows=0)
    assert all(torch.isfinite(weight).all() for weight in narrow.parameters())


def test_gradients_beyond_half_precision(tokens, monkeypatch):
    """They are scaled on their way: a small stream has large ones."""
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.lm_head.weight *= 1000
        for name, weight in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                weight *= 2e-4
    found = collected(model.half(), tokens)
    assert torch.isfinite(found.fisher).all()
    monkeypatch.setattr(gradients, "SCALES", {})
    with pytest.raises(ValueError, match=r"gradients entering .* are not finite; turn sensit"):
        collected(model, tokens)


def test_no_room_for_what_layers_read(tokens, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(memory_plan.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"sensitivity: keeps 0\.00 GB in temporary files"):
        compress(tiny_model(), tokens, width=16, self_windows=0)


@pytest.mark.parametrize("method", ["dot", "pca"])
def test_at_the_full_width_of_every_location(method, tokens):
    model = tiny_model()
    narrow, report = compress(model, tokens, width=1.0, scope="location", method=method)
    assert report["width"]["new"] == 24
    with torch.inference_mode():
        found, wanted = (m(input_ids=tokens).logits for m in (narrow, model))
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_what_was_prepared_for_something_else(tokens):
    model = tiny_model()
    handle = CausalLM.in_memory(model)
    whole = prepare(handle, tokens, make_options(width=1.0, self_windows=0))
    budget = prepare(handle, tokens, make_options(self_windows=0))
    _, report = compress(model, tokens, statistics=budget)
    assert report["budget"]["asked"] == 0.8
    for prepared, choices, message in (
        (whole, {"width": 16}, "none were collected"),
        (whole, {"params": 0.8}, "were prepared for no budget of params 0.8"),
        (budget, {"params": 0.9}, "were prepared for no budget of params 0.9"),
        (budget, {"params": 0.8, "params_count": "non_embedding"}, "no budget of params 0.8"),
        (whole.statistics, {"width": 16}, "none were collected"),
        (7, {"width": 16}, "statistics is 7: must be what prepare returned"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(model, tokens, statistics=prepared, **choices)
    with pytest.raises(ValueError, match="were collected on other tokens"):
        compress(model, tokens + 1, statistics=whole, width=1.0)


def test_a_number_of_steps_is_the_papers():
    """Nobody asks the paper's transport to heed the output, but may."""
    for choices, heeds in (
        ({}, True),
        ({"steps": 1}, False),
        ({"targets": [0, 2]}, False),
        ({"steps": 1, "sensitivity": True}, True),
        ({"method": "pca"}, False),
        ({"method": "pca", "sensitivity": True}, True),
        ({"method": "magnitude"}, None),
        ({"sensitivity": False}, False),
    ):
        options = make_options(**choices)
        assert options.meant("sensitivity") is heeds
        assert ("fisher" in options.needs) is bool(heeds)


def test_predictions_that_nothing_can_be_drawn_from(tokens):
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.lm_head.weight[7] = 3e38
    with pytest.raises(ValueError, match="sensitivity: the model's predictions are not finite"):
        compress(model, tokens, width=16, method="dot", sensitivity=True, self_windows=0)


def test_what_the_output_feels_is_what_is_left_out(tokens):
    """The formula agrees with a basis of what is left out, and with drawn samples."""
    x, g = torch.randn(2, 200_000, 9, dtype=torch.float64) @ torch.randn(2, 9, 9).double()
    q = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    kept, left = q[:, :6], q[:, 6:]
    moment, fisher = x.mT @ x / len(x), g.mT @ g / len(g)
    scale = moment.norm() * fisher.norm()
    wanted = ((left.mT @ moment @ left) @ (left.mT @ fisher @ left)).trace() / scale
    found = felt(kept, moment, fisher)
    assert found == pytest.approx(float(wanted), rel=1e-9)
    drawn = ((g @ left) * (x @ left)).sum(1).square().mean() / scale
    assert found == pytest.approx(float(drawn), rel=0.05)


def test_words_that_are_neither_on_nor_off(arguments, capsys):
    assert "--sensitivity 'yes': must be one of on, off" in fails(
        [*arguments, "--sensitivity", "yes"], capsys
    )
    assert "--steps" in fails([*arguments, "--steps", "inf", "--method", "pca"], capsys)
    assert "--steps nan" in fails([*arguments, "--steps", "nan", "--method", "dot"], capsys)
