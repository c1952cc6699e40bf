"""What a model's predictions are worth, and the windows that they are measured on."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import fails, tiny_model
from test_offload import opened, stored

from dotresize import compress
from dotresize.calibration.text import LEAST_HELD_OUT, held_out, random_windows
from dotresize.cli import main
from dotresize.evaluate import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    PROMPTS,
    Predictions,
    greedy_text,
    perplexity,
    prompts_of,
    quality,
    repeated_share,
)
from dotresize.models.causal_lm import CausalLM

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 256, (5, 33))


def predicted(model, windows, **choices) -> Predictions:
    return closing(Predictions(CausalLM.in_memory(model), windows, **choices))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "opt"])
def test_a_model_beside_itself(kind, windows):
    model = tiny_model(kind)
    with predicted(model, windows) as dense:
        found = quality(CausalLM.in_memory(model), dense)
        assert found.kl < 1e-6
        assert found.agreement == 1
        alone = perplexity(CausalLM.in_memory(model), windows)
        assert found.perplexity == pytest.approx(alone, rel=1e-6)
        assert dense.perplexity() == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("length", [2, 33, 130, 257])
def test_figures_by_their_definition(length):
    """In float64 by torch, over windows that are cut into chunks unevenly."""
    windows = torch.randint(0, 256, (3, length))
    model = tiny_model(max_position_embeddings=512)
    narrow, _ = compress(model, torch.randint(0, 256, (6, 33)), width=16, self_windows=0)
    with torch.inference_mode():
        p, q = (
            m(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for m in (model, narrow)
        )
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    loss = -float(q.gather(-1, windows[:, 1:, None]).mean())
    with predicted(model, windows) as dense:
        found = quality(CausalLM.in_memory(narrow), dense)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.kl > 0.01
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert math.log(found.perplexity) == pytest.approx(loss, rel=1e-5)


def test_offloaded_models_have_the_same_figures(tmp_path, windows):
    model = tiny_model()
    narrow, _ = compress(model, windows, width=16, self_windows=0)
    with predicted(model, windows) as dense:
        held = quality(CausalLM.in_memory(narrow), dense)
    one, other = (
        opened(stored(m, tmp_path / name / "stored"))
        for name, m in (("dense", model), ("narrow", narrow))
    )
    with closing(Predictions(one, windows)) as dense:
        found = quality(other, dense)
    assert vars(found) == pytest.approx(vars(held), rel=1e-4)


def test_a_loss_that_is_not_finite_is_named(windows):
    model, broken = tiny_model(), tiny_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with (
        predicted(model, windows) as dense,
        pytest.raises(ValueError, match="loss on wiki is not finite"),
    ):
        quality(CausalLM.in_memory(broken), dense, desc="wiki")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("count", "length"), [(1, 20), (7, 20), (9, 33), (40, 7)])
def test_held_out_windows_touch_no_other(seed, count, length):
    """Neither those of the calibration nor those of a training, in texts of many lengths."""
    numbers = torch.Generator().manual_seed(100 * count + seed)
    lengths = torch.randint(length, 40 * length, (2,), generator=numbers).tolist()
    streams = [torch.arange(n) + 10**6 * i for i, n in enumerate([*lengths, length])]
    count += 2  # one for each stream
    calibrated = random_windows(streams, count, length, seed)
    apart = held_out(streams, count, length, seed)
    assert apart == held_out(streams, count, length, seed)
    taken = {int(t) for s, ranges in zip(streams, apart, strict=True) for r in ranges for t in s[r]}
    assert not taken & set(calibrated.flatten().tolist())
    trained = random_windows(streams, 10 * count, length, seed + 1, apart)
    assert not taken & set(trained.flatten().tolist())
    for stream, ranges in zip(streams, apart, strict=True):
        assert len(ranges) <= 4
        assert sum(map(len, ranges)) == len({i for r in ranges for i in r})
        assert all(0 <= r.start < r.stop <= len(stream) for r in ranges)
        sizes = {len(r) for r in ranges}
        assert sizes <= {length} or (len(ranges) == 1 and LEAST_HELD_OUT <= min(sizes) < length)
    assert not apart[2]  # its one window is calibrated on


def test_training_windows_are_as_they_were_where_nothing_is_held_out():
    streams = [torch.arange(500), torch.arange(300)]
    plain, apart = (random_windows(streams, 9, 20, 3, a) for a in (None, [[], []]))
    assert torch.equal(plain, apart)


def test_a_short_rest_is_held_out():
    streams = [torch.arange(70)]
    (parts,) = held_out(streams, 1, 40, seed=0)
    assert len(parts) == 1
    assert len(parts[0]) == max(
        *(int(w[0]) for w in random_windows(streams, 1, 40, 0)),
        *(69 - int(w[-1]) for w in random_windows(streams, 1, 40, 0)),
    )


def test_repeated_grams():
    loop = torch.tensor([[1, 2, 3, 4] * 4])  # 13 4-grams, 4 of them distinct
    fresh = torch.arange(16)[None]
    assert repeated_share(loop) == pytest.approx(1 - 4 / 13)
    assert repeated_share(fresh) == 0
    assert repeated_share(torch.cat([loop, fresh])) == pytest.approx((1 - 4 / 13) / 2)
    assert repeated_share(torch.zeros(1, 16)) == pytest.approx(12 / 13)


@pytest.mark.parametrize(
    ("shapes", "count"),
    [([(30, 64)], 20), ([(3, 512), (1, 512)], 20), ([(2, 64)], 4), ([(2, 64), (9, 10)], 4)],
    ids=str,
)
def test_prompts_are_spread_over_the_windows(shapes, count):
    texts = [torch.arange(n * t).view(n, t) + 10**6 * i for i, (n, t) in enumerate(shapes)]
    prompts = prompts_of(texts, None)
    assert prompts.shape == (count, PROMPT_TOKENS)
    assert len(set(prompts[:, 0].tolist())) == count <= PROMPTS
    assert torch.equal(prompts, prompts[:, :1] + torch.arange(PROMPT_TOKENS))
    begin = {int(row[0]) for text in texts for row in text if len(row) >= PROMPT_TOKENS}
    assert begin & set(prompts[:, 0].tolist())


def test_prompts_that_do_not_fit():
    assert prompts_of([], None) is None
    assert prompts_of([torch.zeros(3, 64)], NEW_TOKENS) is None
    assert prompts_of([torch.zeros(3, 64)], NEW_TOKENS + 5).shape == (PROMPTS, 5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "gpt2"])
def test_greedy_text_is_what_transformers_writes(kind):
    """And a model's own text is judged by the mean loss after the prompts."""
    model = tiny_model(kind)
    prompts = torch.randint(0, 256, (6, 9))
    texts = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    with torch.inference_mode():
        logits = model(input_ids=texts).logits[:, 8:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 9:].flatten())
    handle = CausalLM.in_memory(model)
    found = greedy_text(handle, handle, prompts)
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert found.repeated == pytest.approx(repeated_share(texts[:, 9:]))


@pytest.fixture
def without_eval(arguments) -> list[str]:
    i = arguments.index("--eval")
    return [*arguments[:i], *arguments[i + 2 :]]


def test_a_run_without_texts_to_evaluate_on_has_figures(without_eval, capsys):
    out = Path(without_eval[2])
    assert main([*without_eval, "--compare"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "dotresize.json").read_text())
    card = (out / "README.md").read_text()
    for name in ("perplexity", "KL to the dense model", "top-1 agreement"):
        assert f"{name}, topics (held out)" in printed
        assert f"| {name}, topics (held out) | " in card
    for name in ("repeated 4-grams in greedy text", "perplexity of that text under the dense"):
        assert name in printed
        assert f"| {name}" in card
    rows = [*report["compared"][1:], report]
    for row in rows:
        assert row["perplexity"].keys() == row["kl"].keys() == row["agreement"].keys()
        assert row["perplexity"].keys() == row["dense_perplexity"].keys() == {"topics (held out)"}
        assert 0 < row["kl"]["topics (held out)"] < 10
        assert 0 <= row["agreement"]["topics (held out)"] < 1
        assert row["generated"]["continuations"] == 4
        assert row["dense_generated"] == report["compared"][0]["generated"]
    assert report["compared"][0]["kl"] == {}
    kl = [row["kl"]["topics (held out)"] for row in rows]
    assert kl[-1] == min(kl)


def test_named_texts_are_evaluated_on_alone(arguments, capsys):
    assert main(arguments) == 0
    report = json.loads((Path(arguments[2]) / "dotresize.json").read_text())
    assert list(report["perplexity"]) == list(report["kl"]) == ["topics"]


def test_held_out_windows_by_parts(without_eval, capsys):
    assert main([*without_eval, "--memory", "4GB"]) == 0
    report = json.loads((Path(without_eval[2]) / "dotresize.json").read_text())
    assert report["kl"]["topics (held out)"] > 0
    assert report["generated"] is None


def test_a_text_that_is_all_calibrated_on(without_eval, capsys, caplog, tmp_path):
    caplog.set_level("INFO", logger="dotresize")
    short = tmp_path / "short.txt"
    short.write_text("x" * 32)
    without_eval[without_eval.index("--calibration") + 1] = str(short)
    assert main(without_eval) == 0
    assert "short: calibration leaves no window of 32 tokens; evaluated not at all" in caplog.text
    assert "perplexity" not in capsys.readouterr().out
    assert json.loads((Path(without_eval[2]) / "dotresize.json").read_text())["perplexity"] == {}
    without_eval[2] += "2"
    assert "no text to compare on" in fails([*without_eval, "--compare"], capsys)
    short.write_text("x" * 62)
    assert main([*without_eval, "--windows", "1"]) == 0
    assert "tokens; evaluated on the " in caplog.text


def test_models_with_adapters_write_text(without_eval):
    assert main([*without_eval, "--method", "slicegpt", "--no-refit"]) == 0
    report = json.loads((Path(without_eval[2]) / "dotresize.json").read_text())
    assert report["generated"]["perplexity"] > 1


def test_training_leaves_the_held_out_windows_alone(without_eval, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    from dotresize.cli import comparison

    seen = {}
    recovered, evaluated = comparison.recovered, comparison.Reference.__init__

    def train(dense, narrow, tokens, *others):
        seen["trained"] = tokens
        return recovered(dense, narrow, tokens, *others)

    def begin(self, model, texts, **choices):
        seen["evaluated"] = texts.windows
        evaluated(self, model, texts, **choices)

    monkeypatch.setattr(comparison, "recovered", train)
    monkeypatch.setattr(comparison.Reference, "__init__", begin)
    assert main([*without_eval, "--recover", "3"]) == 0
    held = seen["evaluated"]["topics (held out)"]
    parts = {tuple(w.tolist()) for row in held for w in row.unfold(0, 20, 1)}
    trained = {tuple(w.tolist()) for row in seen["trained"] for w in row.unfold(0, 20, 1)}
    assert not parts & trained  # long parts of one text are not repeated in another place
    report = json.loads((Path(without_eval[2]) / "dotresize.json").read_text())
    before = report["training_free"]
    assert before["kl"] != report["kl"]
    assert before["generated"]["continuations"] == 4
