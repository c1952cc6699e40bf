"""What a CPU computes in bfloat16, and what in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import pieces_tokenizer, tiny_model
from test_compress import logits

from dotresize import checkpoint, compress
from dotresize.calibration.self_generated import sample
from dotresize.cli.storage import Storage
from dotresize.cli.texts import Texts
from dotresize.models.bfloat16 import in_bfloat16
from dotresize.models.causal_lm import CausalLM


@pytest.fixture
def instructions(monkeypatch):
    """Return what gives this CPU instructions, or takes them away."""

    def give(**found: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)

    return give


def test_a_copy_where_there_are_instructions(instructions):
    instructions(avx512_bf16=True)
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    copy = in_bfloat16(CausalLM.in_memory(model)).module
    assert {weight.dtype for weight in copy.parameters()} == {torch.bfloat16}
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    # Rotary frequencies to 8 bits would turn the last positions by more than half a radian.
    buffers = dict(model.named_buffers())
    assert buffers
    assert all(torch.equal(own, buffers[name]) for name, own in copy.named_buffers())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    tokens = torch.randint(0, 256, (2, 9))
    difference = (logits(copy, tokens).float() - logits(model, tokens)).norm()
    assert 0 < difference < 0.05 * logits(model, tokens).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_stay(instructions, dtype):
    instructions(amx_bf16=True)
    handle = CausalLM.in_memory(tiny_model(dtype=dtype))
    assert in_bfloat16(handle) is handle


def test_the_model_itself_where_there_are_none(instructions, monkeypatch):
    handle = CausalLM.in_memory(tiny_model())
    instructions(avx2=True, avx512_bf16=False)
    assert in_bfloat16(handle) is handle
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert in_bfloat16(handle) is handle


@pytest.mark.parametrize("fast", [True, False])
def test_text_is_drawn_by_the_model_s_probabilities(instructions, fast):
    """The second token of many texts, of which a window has four; the first ones are uniform."""
    instructions(avx512_bf16=fast)
    model = tiny_model(vocab_size=12, eos_token_id=3, pad_token_id=3)
    windows = sample(CausalLM.in_memory(model), 1500, 8, seed=5).view(-1, 2).clone()
    wanted = logits(model, windows[:, :1])[:, 0].double().clone()
    wanted[:, 3] = -torch.inf
    expected = wanted.softmax(-1).sum(0)
    found = windows[:, 1].bincount(minlength=12).double()
    assert found[3] == 0
    spread = (wanted.softmax(-1) * (1 - wanted.softmax(-1))).sum(0).sqrt()
    assert ((found - expected).abs() <= 4.5 * spread + 0.01 * expected).all()


def test_a_cpu_computes_half_precision_in_float32():
    """Its own products of bfloat16 are slow, and another CPU's would give another model."""
    model, tokens = tiny_model(dtype=torch.bfloat16), torch.randint(250, (8, 32))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    narrow, _ = compress(model, tokens, width=16, self_windows=0)
    exact, _ = compress(copy.deepcopy(model).float(), tokens, width=16, self_windows=0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    for weight, wanted in zip(narrow.parameters(), exact.parameters(), strict=True):
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, wanted.bfloat16())
    assert {b.dtype for b in narrow.buffers()} == {torch.float32}  # rotary frequencies


def test_a_directory_in_half_precision_is_computed_in_float32_and_stored_as_it_was(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    pieces_tokenizer().save_pretrained(tmp_path / "model")
    cpu = torch.device("cpu")
    model, _ = checkpoint.load_with_tokenizer(str(tmp_path / "model"), cpu, to_narrow=True)
    assert {weight.dtype for weight in model.module.parameters()} == {torch.float32}
    storage = Storage("auto", quantised=False, texts=Texts({}, []), model=model)
    assert storage.dtype == torch.bfloat16
    assert Storage("float32", quantised=False, texts=Texts({}, []), model=model).dtype == (
        torch.float32
    )
