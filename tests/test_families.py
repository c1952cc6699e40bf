"""What single families ask for: experts, norms without weights, configs with own checks."""

from __future__ import annotations

import pytest
import torch
from conftest import copy_of, tiny_model
from test_compress import float64_norms, logits

from dotresize import compress
from dotresize.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (6, 33))


def test_layers_of_several_kinds_are_refused(tokens):
    mixed = tiny_model("qwen3_moe", mlp_only_layers=[1])
    with pytest.raises(ValueError, match=r"model\.layers\.1 has no mlp\.gate\.weight"):
        compress(mixed, tokens)


def test_experts_have_no_inner_width(tokens):
    with pytest.raises(ValueError, match="ff_width: experts have no single inner width"):
        compress(tiny_model("mixtral"), tokens, ff_width=10)


def test_a_tied_head_behind_a_norm_without_weights(tokens):
    """OLMo's: nothing but the table itself can set the scale of the logits."""
    model = float64_norms(tiny_model("olmo", dtype=torch.float64))
    options = {"width": 20, "refit": False, "self_windows": 0, "method": "dot"}
    tied, untied = (compress(model, tokens, untie=untie, **options)[0] for untie in (False, True))
    found, wanted = (logits(float64_norms(narrow), tokens) for narrow in (tied, untied))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    # Only the norms' eps sees another scale of the stream.
    assert (found - wanted).norm() < 5e-3 * wanted.norm()


def test_a_config_that_would_not_be_read_back_is_refused_first(tokens):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}
    rope |= {"rope_theta": 10000.0, "original_max_position_embeddings": 128}
    model = tiny_model("phi3", head_dim=6, rope_parameters=rope)
    with pytest.raises(ValueError, match=r"width 16: phi3 refuses it: .*short_factor"):
        compress(model, tokens, width=16)


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_compare_where_only_one_width_can_change(
    kind, arguments, model_directory, tmp_path, capsys
):
    folder = copy_of(model_directory, tmp_path / "other")
    tiny_model(kind).save_pretrained(folder)
    arguments[1] = str(folder)
    if kind == "gpt2":
        arguments[3:5] = ["--ff-width", "30"]
    assert main([*arguments, "--compare"]) == 0
    heading = capsys.readouterr().out.splitlines()[0].split("  ")
    wanted = {
        "mixtral": ["dense", "magnitude", "PCA", "transport", "transport + refit"],
        "gpt2": [
            "dense",
            "feed-forward, eliminate",
            "feed-forward, nystrom",
            "feed-forward, magnitude",
            "feed-forward, transport",
            "feed-forward, eliminate + refit",
        ],
    }
    assert [name.strip() for name in heading if name.strip()] == wanted[kind]
