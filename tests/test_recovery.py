"""Distillation after the training-free part: it helps, goes on after a stop, and keeps the ties."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import fails, tiny_model

from dotresize import compress, recover
from dotresize.cli import main
from dotresize.recovery import BATCH_WINDOWS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (40, 33))


def divergence(dense, narrow, tokens) -> float:
    with torch.inference_mode():
        wanted, found = (m(input_ids=tokens).logits.log_softmax(-1) for m in (dense, narrow))
    return float(torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum"))


def test_recovery_brings_the_narrow_model_closer(tokens, tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    narrow, _ = compress(model, tokens[:6], width=16)
    before = divergence(model, narrow, tokens)
    report = recover(model, narrow, tokens, folder=tmp_path, learning_rate=1e-2)
    assert divergence(model, narrow, tokens) < 0.9 * before
    assert report["steps"] == 20
    assert report["tokens"] == tokens.numel()
    assert report["losses"][-1] < report["losses"][0]
    assert narrow.lm_head.weight is narrow.model.embed_tokens.weight
    assert narrow.dtype == torch.bfloat16
    assert not narrow.training


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_an_interrupted_recovery_ends_alike(kind, tokens, tmp_path, monkeypatch):
    """Also where transformers gives the weights other names when it saves them."""
    import transformers

    model = tiny_model(kind)
    narrow, _ = compress(model, tokens[:6], width=16, refit=False)
    whole, stopped, again = (copy.deepcopy(narrow) for _ in range(3))
    recover(model, whole, tokens, folder=tmp_path / "whole")
    step = transformers.Trainer.training_step
    calls = []

    def interrupted(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover(model, stopped, tokens, folder=tmp_path / "stopped")
    # A state that was being written when the process was killed.
    (state,) = (tmp_path / "stopped").glob("checkpoint-*")
    shutil.copytree(state, state.with_name("checkpoint-14"))
    (state.with_name("checkpoint-14") / "trainer_state.json").unlink()
    calls.clear()
    monkeypatch.setattr(transformers.Trainer, "training_step", step)
    report = recover(model, again, tokens, folder=tmp_path / "stopped")
    assert report["steps"] == 20
    for (name, one), other in zip(
        whole.state_dict().items(), again.state_dict().values(), strict=1
    ):
        assert torch.equal(one, other), name


def test_too_few_windows(tokens, tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match=f"1 windows are less than a step of {BATCH_WINDOWS}"):
        recover(model, copy.deepcopy(model), tokens[:1], folder=tmp_path)


def test_command_line(arguments, capsys, monkeypatch):
    words = [*arguments, "--recover", "10"]
    out, folder = Path(arguments[2]), Path(f"{arguments[2]}.partial")
    import transformers

    step = transformers.Trainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", interrupted)
    assert "--resume goes on" in fails(words, capsys, code=1)
    monkeypatch.setattr(transformers.Trainer, "training_step", step)
    assert not out.exists()
    assert "holds an unfinished run" in fails(words, capsys)
    assert "another recover (10 then, 11 now)" in fails([*words[:-1], "11", "--resume"], capsys)
    assert main([*words, "--resume"]) == 0
    assert not folder.exists()
    heading = capsys.readouterr().out.splitlines()[0]
    assert [name.strip() for name in heading.split("  ") if name.strip()] == [
        "dense", "transport + refit", "transport + refit + recovery",
    ]  # fmt: skip
    report = json.loads((out / "dotresize.json").read_text())
    assert report["recovery"]["steps"] == 10
    assert report["perplexity"] != report["training_free"]["perplexity"]
    assert "| without recovery |" in (out / "README.md").read_text()
    assert main(["eval", str(out), words[8], *words[9:11], *words[13:16]]) == 0
    found = float(capsys.readouterr().out.split()[1])
    assert found == pytest.approx(report["perplexity"]["topics"], rel=1e-4)


def test_another_run_is_not_gone_on_with(tokens, tmp_path):
    model = tiny_model()
    narrow, other = (compress(model, tokens[:6], width=w, refit=False)[0] for w in (16, 20))
    recover(model, narrow, tokens[:4], folder=tmp_path)
    with pytest.raises(ValueError, match="holds something else"):
        recover(model, other, tokens[:4], folder=tmp_path)


def test_a_loss_that_is_not_finite(tokens, tmp_path):
    model = tiny_model()
    narrow, _ = compress(model, tokens[:6], width=16, refit=False)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="the loss is not finite; try a smaller learning rate"):
        recover(model, narrow, tokens, folder=tmp_path, learning_rate=1e30)
    assert torch.equal(torch.get_rng_state(), state)


def test_buffers_keep_their_type(tokens, tmp_path):
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # as loaded: rotary tables stay in float32
    narrow, _ = compress(model, tokens[:6], width=16, refit=False, self_windows=0)
    before = {name: buffer.clone() for name, buffer in narrow.named_buffers()}
    recover(model, narrow, tokens[:4], folder=tmp_path)
    for name, buffer in narrow.named_buffers():
        assert torch.equal(buffer, before[name])
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
