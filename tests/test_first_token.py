"""The first token of a window: BOS where the tokenizer puts it, and what it counts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import fails, pieces_tokenizer, tiny_model

from dotresize import compress
from dotresize.calibration.self_generated import sample
from dotresize.calibration.text import added_around, held_out, random_windows, tokenize
from dotresize.cli import main
from dotresize.cli.names import partial_folder
from dotresize.evaluate import evaluation_windows, perplexity
from dotresize.least_squares import NormalEquations
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.calibrate import first_token
from dotresize.narrow.refit import add_windows, window_weights

pytestmark = pytest.mark.usefixtures("one_thread")

BOS = 1


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """A tiny model directory whose tokenizer puts <s> in front."""
    folder = tmp_path_factory.mktemp("models") / "bos"
    torch.manual_seed(3)
    tiny_model(vocab_size=400, bos_token_id=BOS).save_pretrained(folder)
    pieces_tokenizer().save_pretrained(folder)
    return folder


def test_what_a_tokenizer_adds(with_bos, model_directory):
    import transformers

    load = transformers.AutoTokenizer.from_pretrained
    assert added_around(load(with_bos)) == (BOS, None)
    assert added_around(load(model_directory)) == (None, None)


@pytest.mark.parametrize("length", [2, 9, 32])
def test_every_window_begins_with_it(length):
    streams = [torch.arange(10, 410), torch.arange(500, 620)]
    windows = random_windows(streams, 6, length, 0, None, BOS)
    assert windows.shape == (6, length)
    assert (windows[:, 0] == BOS).all()
    inside = windows[:, 1:]
    assert (inside.diff(dim=1) == 1).all()
    assert (inside >= 10).all()
    evaluated = evaluation_windows(streams[0], length, 3, BOS)
    assert evaluated.shape == (3, length)
    assert (evaluated[:, 0] == BOS).all()
    # Held-out text is apart from the windows, whose own tokens are one fewer.
    used = set(inside.flatten().tolist())
    for stream, ranges in zip(streams, held_out(streams, 6, length - 1, 0), strict=True):
        for part in ranges:
            assert not used & set(stream[part.start : part.stop].tolist())


def test_the_model_writes_behind_it():
    model = CausalLM.in_memory(tiny_model(vocab_size=400))
    for begin in (None, BOS):
        text = sample(model, 3, 12, 0, begin)
        assert text.shape == (3, 12)
        assert bool((text[:, 0] == BOS).all()) is (begin == BOS)
    assert first_token(model, text) == BOS
    assert first_token(model, torch.randint(2, 400, (4, 9))) is None


def test_command_line(with_bos, text_file, tmp_path, capsys):
    import transformers

    out = tmp_path / "out"
    small = ["--window", "24", "--windows", "6", "--eval-windows", "3", "--quiet"]
    words = ["--ff-width", "32", "--calibration", str(text_file), "--eval", str(text_file), *small]
    assert main(["compress", str(with_bos), str(out), *words, "--self-windows", "2"]) == 0
    report = json.loads((out / "dotresize.json").read_text())
    assert report["calibration"]["first_token"] == BOS
    assert report["calibration"]["first_token_counts"] == {"map": 1.0, "least_squares": 100.0}
    assert "beginning with token 1 (BOS)" in (out / "README.md").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(with_bos)
    stream = tokenize(text_file, tokenizer)
    assert BOS not in stream
    windows = torch.cat([torch.full((3, 1), BOS), torch.zeros(3, 23, dtype=torch.int64)], 1)
    whole = stream[: len(stream) // 23 * 23].view(-1, 23)
    windows[:, 1:] = whole[torch.arange(3) * len(whole) // 3]
    model = transformers.AutoModelForCausalLM.from_pretrained(with_bos)
    want = perplexity(CausalLM.in_memory(model.eval()), windows)
    assert math.isclose(report["dense_perplexity"]["topics"], want, rel_tol=1e-5)
    capsys.readouterr()
    evaluated = ["--window", "24", "--eval-windows", "3", "--quiet"]
    assert main(["eval", str(with_bos), str(text_file), *evaluated]) == 0
    assert f"{want:.4f}" in capsys.readouterr().out


def test_a_run_calibrated_without_it_is_not_resumed(with_bos, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["compress", str(with_bos), str(out), "--ff-width", "32", "--window", "24"]
    words += ["--windows", "4", "--calibration", str(text_file), "--quiet"]
    assert main(words) == 0
    path = out / "dotresize.json"
    report = json.loads(path.read_text())
    for new in ("first_token", "multiple_of", "keep_type", "tensor_parallel", "dtype"):
        del report["settings"][new]
    path.write_text(json.dumps(report))
    capsys.readouterr()
    said = fails([*words, "--resume"], capsys)
    assert "was calibrated on windows without the token that the tokenizer puts first" in said
    # So is an unfinished one.
    partial = partial_folder(str(out))
    partial.mkdir()
    (partial / "settings.json").write_text(json.dumps(report["settings"]))
    Path(path).unlink()
    for left in out.iterdir():
        left.unlink()
    assert "puts first" in fails([*words, "--resume"], capsys)


def test_tokens_given_are_taken_as_they_are():
    tokens = torch.randint(2, 400, (4, 16))
    _, report = compress(tiny_model(vocab_size=400), tokens, ff_width=32, self_windows=0)
    assert report["calibration"]["first_token"] is None
    tokens[:, 0] = BOS
    _, report = compress(tiny_model(vocab_size=400), tokens, ff_width=32, self_windows=0)
    assert report["calibration"]["first_token"] == BOS


@pytest.mark.parametrize(
    ("windows", "own", "weight"),
    [(4, 0, 1.0), (32, 8, 2.0), (25, 10, 1.5), (9, 8, 1.0), (33, 1, 2.0)],
)
def test_how_often_a_window_of_the_models_own_counts(windows, own, weight):
    """Each counts twice, or less, so that together they count no more than what was given."""
    found = [weight for batch in window_weights(windows, own, 4) for weight in batch]
    assert found == [1.0] * (windows - own) + [weight] * own


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("first", [1.0, 4.0])
def test_how_often_it_counts(length, first):
    """And how often a window does."""
    u, v = torch.randn(3, length, 5), torch.randn(3, length, 4)
    ours, theirs = (NormalEquations(torch.zeros(5, 4, dtype=torch.float64)) for _ in range(2))
    add_windows(ours, u.flatten(0, 1), v, [1.0, 3.0, 3.0], first)
    for i in (0, 1, 1, 1, 2, 2, 2):
        theirs.add(u[i], v[i])
        for _ in range(int(first) - 1):
            theirs.add(u[i, :1], v[i, :1])
    ours.total()  # the first tokens wait until then
    torch.testing.assert_close(ours.gram, theirs.gram, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.cross, theirs.cross, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.squares, theirs.squares, rtol=1e-5, atol=1e-5)
