"""The one rule of widths, and what a model's config makes of the choices about them."""

from __future__ import annotations

import pytest
import torch
from conftest import LLAMA3_ROPE, fails, tiny_model

from dotresize import compress
from dotresize.cli import main
from dotresize.compression import make_options
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.choose_width import choose_inner_width, choose_width, choose_widths
from dotresize.narrow.round_width import FEW, STEPS, WITHIN, WITHIN_LIMIT, round_width

pytestmark = pytest.mark.usefixtures("one_thread")


def outline(kind: str = "llama", **changes) -> CausalLM:
    with torch.device("meta"):
        return CausalLM.in_memory(tiny_model(kind, **changes))


SMOLLM = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}


@pytest.mark.parametrize(
    ("wanted", "full", "expected"),
    [
        (0.8 * 576, 576, 448),  # 64 x 7 is 2.8 % away; 128 has nothing within 6 %
        (0.73 * 1536, 1536, 1152),  # 128 x 9
        (0.8 * 4096, 4096, 3328),  # 256 x 13
        (0.8 * 14336, 14336, 11520),
        (0.97 * 576, 576, 544),  # not the whole width, though 576 is 64 x 9
        (0.9 * 200, 200, 192),
        (0.6 * 200, 200, 120),
        (100, 130, 96),
        (90, 130, 88),  # below 128 channels a multiple of 8: no multiple of 32 is within 6 %
        (12, 24, 16),
        (3, 7, 3),  # no multiple of 8 at all
        (1, 1, 1),
    ],
)
def test_rule(wanted, full, expected):
    assert round_width(wanted, full) == expected


@pytest.mark.parametrize("full", [1, 7, 24, 40, 100, 576, 1000, 1536, 2048])
@pytest.mark.parametrize("towards", ["nearest", "up", "down"])
def test_rule_everywhere(full, towards):
    for wanted in range(1, full):
        found = round_width(wanted, full, towards=towards)
        assert 0 < found <= full
        if towards == "up":
            assert found >= wanted
        if towards == "down":
            assert found <= wanted
        if towards == "nearest":
            assert found < full or full == 1
        best = {
            "up": [w for s in STEPS for w in range(s, full + 1, s) if w >= wanted],
            "down": [w for s in STEPS for w in range(s, full, s) if w <= wanted],
            "nearest": [w for s in STEPS for w in range(s, full, s)],
        }[towards]
        within = WITHIN if towards == "nearest" else WITHIN_LIMIT
        near = [w for w in best if abs(w - wanted) <= within * wanted]
        if near:  # the largest power of two that has a multiple so near divides the result
            power = max(s for s in STEPS for w in near if w % s == 0)
            assert found % power == 0
            assert abs(found - wanted) <= within * wanted
        elif wanted >= FEW and found not in (1, full):
            assert found % 32 == 0


def test_multiple_of_and_tensor_parallel():
    assert round_width(460.8, 576, multiple_of=12) == 456
    assert round_width(460.8, 576, multiple_of=36) == 468
    assert round_width(1121, 1536, times=3) == 1152  # 3 x 128 x 3
    model = outline(**SMOLLM)
    for parallel, expected in ((1, 1152), (3, 1152), (9, 1152)):
        found = choose_inner_width(model, make_options(ff_width=0.73, tensor_parallel=parallel))
        assert found == expected
        assert found % (32 * parallel) == 0
    with pytest.raises(ValueError, match="tensor_parallel 2: must divide the model's 9 heads"):
        choose_widths(model, make_options(ff_width=0.73, tensor_parallel=2))
    with pytest.raises(ValueError, match="ff_width 1000: must be a multiple of 3, such as 999 or"):
        choose_inner_width(model, make_options(ff_width=1000, tensor_parallel=3))


@pytest.mark.parametrize("asked", [0, -1, 577, 468.5, float("nan"), float("inf")])
def test_widths_that_are_none(asked):
    with pytest.raises(ValueError, match="width"):
        choose_width(outline(**SMOLLM), make_options(width=asked))


def test_exact_widths_are_taken_exactly():
    model = outline(**SMOLLM)
    for width in (1, 459, 460, 468, 575, 576):
        assert choose_width(model, make_options(width=width)) == (576 if width == 1 else width)
    with pytest.raises(ValueError, match="width 468: must be a multiple of 32, such as 448 or 480"):
        choose_width(model, make_options(width=468, multiple_of=32))
    with pytest.raises(ValueError, match=r"width 12: must be a multiple of 8, such as 8 or 16"):
        choose_width(outline("mixtral"), make_options(width=12))
    with pytest.raises(ValueError, match="there is no multiple of 1024 below 576"):
        choose_width(model, make_options(width=0.9, multiple_of=1024))


def test_type_is_kept_where_that_is_asked_for():
    model = outline(**SMOLLM)
    for width in (0.8, 460):
        with pytest.raises(ValueError, match="multiple of its 9 heads, such as"):
            choose_width(model, make_options(width=width, keep_type=True))
    assert choose_width(model, make_options(width=468, keep_type=True)) == 468
    with pytest.raises(ValueError, match="441 or 450; this one has biases, which mistral has not"):
        choose_width(outline(**SMOLLM, attention_bias=True), make_options(width=0.8))


@pytest.mark.parametrize("tied", [True, False])
def test_llama_saved_as_mistral_is_the_same_function(tied, tmp_path):
    import transformers

    model = tiny_model(tied=tied, dtype=torch.float64)
    tokens = torch.randint(259, (4, 16))
    choices = {"ff_width": 32, "self_windows": 0}
    narrow, report = compress(model, tokens, width=18, **choices)  # 4 heads
    assert report["model_type"] == {"old": "llama", "new": "mistral"}
    assert type(narrow).__name__ == "MistralForCausalLM"
    narrow.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.model_type == "mistral"
    assert loaded.config.sliding_window is None
    assert loaded.config.head_dim == 8
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, narrow(tokens).logits)
    # The same weights in a Llama, whose config is not asked, compute the same.
    config = transformers.LlamaConfig.from_dict(model.config.to_dict())
    config.hidden_size, config.intermediate_size = 18, 32
    llama = transformers.LlamaForCausalLM(config).double()
    llama.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, narrow(tokens).logits)


def test_scaled_rotations_come_with_it():
    model = tiny_model(rope_parameters=LLAMA3_ROPE, dtype=torch.float64)
    tokens = torch.randint(259, (4, 16))
    narrow, _ = compress(model, tokens, width=18, refit=False, self_windows=0)
    assert narrow.config.rope_parameters["rope_type"] == "llama3"
    theirs, ours = (m.model.rotary_emb.inv_freq for m in (model, narrow))
    torch.testing.assert_close(ours.to(theirs), theirs)


def test_energy_rounds_up_and_params_down():
    model, tokens = tiny_model(), torch.randint(259, (6, 16))
    _, report = compress(model, tokens, energy=0.9, self_windows=0)
    assert report["width"]["new"] in (8, 16, 24)
    for share in (0.9, 0.8, 0.6):
        _, report = compress(model, tokens, params=share, self_windows=0)
        counts = report["parameters"]
        assert counts["narrow"]["total"] <= share * counts["dense"]["total"]


def test_refused_before_a_weight_is_read(arguments, capsys, monkeypatch):
    from dotresize import checkpoint

    def never(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint, "load_with_tokenizer", never)
    arguments = [word for word in arguments if word not in ("--width", "16")]
    for wrong, said in {
        ("--width", "25"): "--width 25: must be a whole number up to the model's 24",
        ("--width", "18", "--keep-type"): "--width 18: a llama's is a multiple of its 4 heads",
        ("--ff-width", "41"): "--ff-width 41: must be a whole number up to the model's 40",
        ("--width", "0.9", "--multiple-of", "32"): "there is no multiple of 32 below 24",
        ("--params", "0.001"): "--params 0.001: no pair of widths has so few parameters; the least",
        ("--width", "0.5", "--tensor-parallel", "3"): "--tensor-parallel 3: must divide",
        ("--width", "16", "--window", "500"): "--window 500: the model has 256 positions",
        ("--width", "16", "--multiple-of", "0"): "--multiple-of 0: must be at least 1",
    }.items():
        given = [*arguments[:3], *wrong, *arguments[3:]]
        if "--window" in wrong:
            i = arguments.index("--window")
            given = [*arguments[:i], *wrong, *arguments[i + 2 :]]
        assert said in fails(given, capsys), wrong


def test_odd_widths_say_what_they_cost(arguments, caplog):
    big = ["--width", "18"]
    i = arguments.index("--width")
    with caplog.at_level("INFO", logger="dotresize"):
        assert main([*arguments[:i], *big, *arguments[i + 2 :]]) == 0
    said = caplog.text
    assert "saved as mistral without sliding window" in said
    assert "width 18 is no multiple of 32: in llama.cpp such rows stay in 16 bits" in said
