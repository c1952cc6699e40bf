"""How a result is stored, and what its card says of where it came from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import fails, pieces_tokenizer, tiny_model
from safetensors.torch import load_file

from dotresize import checkpoint
from dotresize.checkpoint.source import _gguf_config
from dotresize.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def words(arguments):
    """The small command, of a feed-forward width."""
    i = arguments.index("--width")
    return [*arguments[:i], "--ff-width", "32", "--self-windows", "0", *arguments[i + 2 :]]


def types(out: str | Path) -> set[torch.dtype]:
    shards = Path(out).glob("*.safetensors")
    return {w.dtype for path in shards for w in load_file(path).values()}


def report(out: str | Path) -> dict:
    return json.loads((Path(out) / "dotresize.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("memory", [[], ["--memory", "3GB"]], ids=["whole", "by layers"])
def test_the_type_that_was_asked_for(dtype, memory, words):
    import transformers

    if memory and dtype == "float16":
        return  # is refused
    assert main([*words, "--dtype", dtype, *memory]) == 0
    assert types(words[2]) == {getattr(torch, dtype)}
    assert report(words[2])["stored"]["dtype"] == dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(words[2])
    assert model.dtype == getattr(torch, dtype)


def test_by_default_it_is_the_model_s_own(words, tmp_path, model_directory):
    assert main(words) == 0
    assert types(words[2]) == {torch.float32}
    assert report(words[2])["stored"] == {"dtype": "float32", "kl_of_rounding": None}
    half = tmp_path / "half"
    shutil.copytree(model_directory, half)
    tiny_model(dtype=torch.bfloat16).save_pretrained(half)
    assert main([words[0], str(half), str(tmp_path / "o"), *words[3:]]) == 0
    assert types(tmp_path / "o") == {torch.bfloat16}


def test_what_is_evaluated_is_what_is_stored(words, capsys):
    assert main([*words, "--dtype", "bfloat16"]) == 0
    found = report(words[2])["perplexity"]["topics"]
    text = words[words.index("--eval") + 1]
    capsys.readouterr()
    evaluated = ["--window", "32", "--eval-windows", "4", "--quiet"]
    assert main(["eval", words[2], text, *evaluated]) == 0
    # The same weights, computed in bfloat16 instead of float32.
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_a_quantised_model_is_stored_in_bfloat16_if_that_changes_nothing(size, words, tmp_path):
    pytest.importorskip("gguf")
    folder = tmp_path / "wide"
    model = tiny_model(hidden_size=32, intermediate_size=64, vocab_size=400)
    with torch.no_grad():
        model.model.norm.weight.mul_(size)  # large logits feel every rounding
    model.save_pretrained(folder)
    pieces_tokenizer().save_pretrained(folder)
    path = tmp_path / "wide.gguf"
    assert main(["export", str(folder), str(path), "--type", "q8_0", "--quiet"]) == 0
    assert main([words[0], str(path), *words[2:]]) == 0
    stored = report(words[2])["stored"]
    small = stored["kl_of_rounding"] <= 1e-3
    assert small is (size == 1.0)
    assert stored["dtype"] == ("bfloat16" if small else "float32")
    assert types(words[2]) == {torch.bfloat16 if small else torch.float32}


def test_a_file_s_size_says_whether_it_is_quantised(tmp_path):
    """And its config is parsed once, for as long as the file is the same."""
    pytest.importorskip("gguf")
    folder, found = tmp_path / "wide", {}
    model = tiny_model(hidden_size=64, intermediate_size=128, vocab_size=400)
    model.save_pretrained(folder)
    pieces_tokenizer().save_pretrained(folder)
    parameters = sum(weight.numel() for weight in model.parameters())
    for kind in ("f32", "f16", "q8_0"):
        path = tmp_path / f"{kind}.gguf"
        assert main(["export", str(folder), str(path), "--type", kind, "--quiet"]) == 0
        found[kind] = checkpoint.is_quantised(str(path), parameters)
    assert found == {"f32": False, "f16": False, "q8_0": True}
    first, second = (checkpoint.read_config(str(path)) for _ in range(2))
    assert first is not second
    assert first.to_dict() == second.to_dict()
    assert _gguf_config.cache_info().hits >= 1
    first.hidden_size = 1
    assert checkpoint.read_config(str(path)).hidden_size == 64
    misses = _gguf_config.cache_info().misses
    os.utime(path, ns=(0, 0))
    assert checkpoint.read_config(str(path)).hidden_size == 64
    assert _gguf_config.cache_info().misses == misses + 1


def test_numbers_too_large_for_float16(words, tmp_path, model_directory, caplog):
    big = tmp_path / "big"
    shutil.copytree(model_directory, big)
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 5] = 7e4
    model.save_pretrained(big)
    assert main([words[0], str(big), *words[2:], "--dtype", "float16"]) == 0
    assert "too large for it; stored as bfloat16" in caplog.text
    assert types(words[2]) == {torch.bfloat16}


def test_float16_is_refused_where_it_would_be_found_too_small_too_late(words, capsys):
    said = fails([*words, "--dtype", "float16", "--memory", "3GB"], capsys)
    assert "--dtype float16: give bfloat16 or float32 with --memory" in said


def test_a_type_that_is_none(words, capsys):
    said = fails([*words, "--dtype", "int8"], capsys)
    assert "--dtype int8: must be auto, float32, bfloat16, float16" in said


def test_the_card_passes_the_licence_on(words, tmp_path, model_directory):
    given = tmp_path / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(model_directory, given)
    card = "---\nlicense: other\nlicense_name: own\nlanguage: [en]\n---\n# A model\n"
    (given / "README.md").write_text(card)
    (given / "LICENSE.txt").write_text("as is")
    assert main([words[0], str(given.parent.parent), *words[2:]]) == 0
    text = (Path(words[2]) / "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    assert "license: other\n" in metadata
    assert "license_name: own\n" in metadata
    assert "base_model: some/model\n" in metadata
    assert "feed-forward width 40 -> 32, by backward elimination of its neurons" in body
    assert str(tmp_path) not in text
    assert (Path(words[2]) / "LICENSE.txt").read_text() == "as is"


def test_the_card_of_a_local_model(words):
    assert main(words) == 0
    text = (Path(words[2]) / "README.md").read_text()
    assert "base_model" not in text
    assert "license" not in text
    assert "# tiny, narrowed" in text
    assert "| KL to the dense model, topics | - |" in text
