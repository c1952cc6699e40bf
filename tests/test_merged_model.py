"""Shared weights outlive storing, loading and training."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from merge_models import KINDS, build, closeness, inputs, logits
from safetensors.torch import load_file

import dotresize
from dotresize import merge_feed_forward
from dotresize.accounting import unique_parameters
from dotresize.merging.checkpoint import MergedStore, PlainStore
from dotresize.recovery import fine_tune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "marian"])
def test_stored_once_and_shared_again(kind, tmp_path):
    model = build(kind)
    merged, report = merge_feed_forward(model, inputs(kind), k=3, metric=closeness(model, kind))
    MergedStore(merged).save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    others = {name for names in report["shared"] for name in names[1:]}
    assert others
    assert not others & stored.keys()
    loaded = dotresize.load(tmp_path)
    assert unique_parameters(loaded) == report["parameters"]["merged"]
    assert torch.equal(logits(loaded, kind), logits(merged, kind))
    # What plain transformers would leave at random, it must not load at all.
    import transformers

    with pytest.raises(ValueError, match="dotresize-merged"):
        transformers.AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_for_plain_transformers(kind, tmp_path):
    model = build(kind)
    merged, report = merge_feed_forward(model, inputs(kind), k=3, metric=closeness(model, kind))
    PlainStore(merged).save(tmp_path / "plain")
    loaded = type(merged).from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(loaded.eval(), kind), logits(merged, kind))
    assert unique_parameters(loaded) == report["parameters"]["dense"]
    # The file has as many bytes as the dense model's, so a tied head is not repeated.
    model.save_pretrained(tmp_path / "dense")
    plain, dense = (load_file(tmp_path / f / "model.safetensors") for f in ("plain", "dense"))
    assert sum(w.nbytes for w in plain.values()) == sum(w.nbytes for w in dense.values())
    assert plain.keys() == dense.keys()
    assert unique_parameters(merged) == report["parameters"]["merged"]  # it shares them as before


def test_what_save_pretrained_takes_from_python(tmp_path):
    """The page's two lines; by itself transformers refuses tensors that are shared."""
    merged, _ = merge_feed_forward(build("llama"), inputs("llama"), k=3)
    with pytest.raises(RuntimeError, match="shared tensors"):
        merged.save_pretrained(tmp_path / "refused")
    weights = {name: weight.clone() for name, weight in merged.state_dict().items()}
    merged.save_pretrained(tmp_path / "plain", state_dict=weights)
    loaded = type(merged).from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(logits(loaded, "llama"), logits(merged, "llama"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "os"}, "'os' is no class of transformers'"),
        ({"class": None}, "'None' is no class|None is no class"),
        ({"shared": [["nothing", "model.layers.1.mlp.up_proj.weight"]]}, "is stored apart"),
    ],
    ids=str,
)
def test_damaged_directories(change, message, tmp_path):
    merged, _ = merge_feed_forward(build("llama"), inputs("llama"), k=3)
    MergedStore(merged).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        dotresize.load(tmp_path)


def test_training_what_is_shared_goes_on_from_its_middle(monkeypatch, tmp_path):
    pytest.importorskip("accelerate")
    import transformers

    merged, report = merge_feed_forward(build("vit"), inputs("vit"), k=3, metric=lambda _: 0.0)
    whole = copy.deepcopy(merged)
    images = torch.randn(24, 1, 8, 8)
    examples = [{"pixel_values": x, "labels": torch.tensor(i % 5)} for i, x in enumerate(images)]
    values = iter([0.1, 0.5, 0.2, 0.4, 0.3] * 4)
    choices = {"steps": 5, "batch": 4, "learning_rate": 0.01}
    found = fine_tune(
        whole, examples, folder=tmp_path / "whole", metric=lambda _: next(values), **choices
    )
    assert list(found["metric"].values()) == [0.1, 0.5, 0.2, 0.4, 0.3]
    best = load_file(tmp_path / "whole" / "best.safetensors")
    assert all(torch.equal(p, best[name]) for name, p in whole.named_parameters())
    again = copy.deepcopy(merged)
    step = transformers.Trainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    values = iter([0.1, 0.5, 0.2, 0.4, 0.3])
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(
                again, examples, folder=tmp_path / "two", metric=lambda _: next(values), **choices
            )
    assert not again.training
    again = copy.deepcopy(merged)
    fine_tune(again, examples, folder=tmp_path / "two", metric=lambda _: next(values), **choices)
    assert unique_parameters(again) == report["parameters"]["merged"]
    for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
