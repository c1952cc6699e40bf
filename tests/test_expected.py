"""What is said of the time before a CPU begins."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import tiny_model

from dotresize.cli import expected
from dotresize.compression import make_options
from dotresize.models.causal_lm import CausalLM


@pytest.fixture
def model(monkeypatch) -> CausalLM:
    monkeypatch.setattr(expected, "_rate", lambda model: 1e6)
    return CausalLM.in_memory(tiny_model())


def seconds(model: CausalLM, **choices) -> float:
    return expected.expected_seconds(model, 8, 32, make_options(**choices))


def test_more_work_takes_longer(model):
    plain = seconds(model, ff_width=20, self_windows=0)
    layers = sum(p.numel() for p in model.module.model.layers.parameters())
    norm = model.module.model.norm.weight.numel()
    assert plain == pytest.approx(2 * 8 * 32 * 3.0 * (layers + norm) / 1e6)
    assert seconds(model, ff_width=20) > 2 * plain  # as much text again, and its writing
    assert seconds(model, ff_width=20, layer_widths=True, self_windows=0) > 1.5 * plain
    assert seconds(model, width=16, self_windows=0) > 3 * plain
    assert seconds(model, params=0.9, search=False, self_windows=0) == plain
    assert seconds(model, params=0.9, search=True, self_windows=0) > 2 * plain
    assert seconds(model, params=0.4, self_windows=0) > 2 * plain  # a search by itself


def test_a_minute_or_more_is_said(model, caplog):
    caplog.set_level(logging.INFO, logger="dotresize.stages")
    options = make_options(ff_width=20, self_windows=0)
    count = round(600 / expected.expected_seconds(model, 1, 32, options))
    expected.announce(model, count // 20, 32, options)
    assert not caplog.text
    expected.announce(model, count, 32, options)
    assert "narrowing takes about 10.0 minutes on this CPU (threads: " in caplog.text


def test_the_rate_is_measured():
    model = CausalLM.in_memory(tiny_model())
    assert 1e6 < expected._rate(model) < 1e14
    assert torch.is_grad_enabled()
