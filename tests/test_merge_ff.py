"""Merging of feed-forward sublayers: what is alike is found, aligned and tied without loss."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import fails, tiny_model
from safetensors.torch import load_file

import dotresize
from dotresize import merge_command, merge_feed_forward
from dotresize.accounting import unique_parameters
from dotresize.cli import main
from dotresize.merge_align import features
from dotresize.merged_model import save
from dotresize.models.stacks import layers_of, stacks_of
from dotresize.recovery import fine_tune

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 8
SECRET = [3, 4, 5, 6]
KINDS = ["llama", "phi3", "gpt2", "opt", "vit", "marian"]


def build(kind: str):
    import transformers

    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=2,
            image_size=8, patch_size=4, num_channels=1, num_labels=5, initializer_range=0.2,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
    elif kind == "marian":
        config = transformers.MarianConfig(
            d_model=24, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_ffn_dim=40,
            decoder_ffn_dim=40, encoder_attention_heads=2, decoder_attention_heads=2,
            vocab_size=60, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
            max_position_embeddings=64, init_std=0.2,
        )  # fmt: skip
        model = transformers.MarianMTModel(config)
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4} if kind == "gpt2" else {}
        return tiny_model(kind, num_hidden_layers=LAYERS, **heads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.eval()


def inputs(kind: str, count: int = 3) -> list[dict]:
    if kind == "vit":
        return [{"pixel_values": torch.randn(20, 1, 8, 8)} for _ in range(count)]
    found = []
    for _ in range(count):
        mask = torch.ones(6, 20, dtype=torch.int64)
        mask[:3, 14:] = 0
        batch = {"input_ids": torch.randint(2, 60, (6, 20)), "attention_mask": mask}
        if kind == "marian":
            labels = torch.randint(2, 60, (6, 15))
            labels[2:, 9:] = -100
            batch["labels"] = labels
        found.append(batch)
    return found


@torch.no_grad()
def with_secret(kind: str, stack_number: int = 0):
    """A model whose layers 3 to 6 have one feed-forward, its neurons in secret orders."""
    model = build(kind)
    stack = stacks_of(model)[stack_number]
    layers = layers_of(model, stack)
    for i, layer in enumerate(layers):
        weights = dict(layer.named_parameters())
        # A stream that changes slowly: what is one neuron sees nearly the same in every layer.
        for name, weight in weights.items():
            if name == stack.writer or "out_proj" in name or "norm.bias" in name:
                weight.mul_(0.1)
        if i not in SECRET[1:]:
            continue
        source = dict(layers[SECRET[0]].named_parameters())
        order = torch.randperm(40)
        for name in stack.weights:
            if name not in weights:
                continue
            value = source[name]
            writes = name.startswith(stack.writer.removesuffix("weight"))
            if not (writes and name.endswith("bias")):
                first = kind != "gpt2" or name.endswith("bias")
                axis = int(first == writes)
                parts = value.chunk(1 if writes else stack.stacked, axis)
                value = torch.cat([part.index_select(axis, order) for part in parts], axis)
            weights[name].copy_(value)
    return model


def logits(model, kind):
    torch.manual_seed(5)
    batch = inputs(kind, 1)[0]
    with torch.inference_mode():
        return model(**batch).logits


def closeness(model, kind):
    wanted = logits(model, kind)
    return lambda new: -float((logits(new, kind) - wanted).abs().max())


@pytest.mark.parametrize("anchor", ["first", "middle", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_secret_permutations_are_merged_without_loss(kind, anchor):
    model = with_secret(kind)
    before = copy.deepcopy(model.state_dict())
    stack = stacks_of(model)[0]
    merged, report = merge_feed_forward(
        model, inputs(kind), k={stack.name: 4}, metric=closeness(model, kind), anchor=anchor
    )
    found = report["stacks"][stack.name]
    assert found["window"] == SECRET
    assert found["anchor"] == {"first": 3, "middle": 4, "last": 6}[anchor]
    assert len(found["profile"]) == LAYERS - 3
    assert (logits(merged, kind) - logits(model, kind)).abs().max() < 1e-4
    layers = layers_of(merged, stack)
    one = sum(p.numel() for n, p in layers[3].named_parameters() if n in stack.weights)
    assert report["parameters"]["dense"] - report["parameters"]["merged"] == 3 * one
    owners = [layers[i].get_parameter(stack.writer) for i in SECRET]
    assert all(owner is owners[0] for owner in owners)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # the given model is untouched


def test_without_permutation_it_is_lost():
    model = with_secret("llama")
    metric = closeness(model, "llama")
    _, aligned = merge_feed_forward(
        model, inputs("llama"), k=4, metric=metric, start=3, baselines=True
    )
    _, plain = merge_feed_forward(
        model, inputs("llama"), k=4, metric=metric, start=3, permute=False
    )
    found = aligned["stacks"]["decoder"]["baselines"]
    assert found["without permutation"] == pytest.approx(plain["metric"]["merged"])
    assert aligned["metric"]["merged"] > -1e-4 > -1e-2 > plain["metric"]["merged"]
    assert found["layers dropped"] < -1e-2


def test_soft_alignment_becomes_the_permutation_at_small_reg():
    model = with_secret("gpt2")
    metric = closeness(model, "gpt2")
    found = {
        soft: merge_feed_forward(model, inputs("gpt2"), k=4, metric=metric, start=3, soft=soft)[1][
            "metric"
        ]["merged"]
        for soft in (0.01, 1.0)
    }
    assert found[0.01] > -1e-3 > found[1.0]


def test_encoder_and_decoder_have_windows_and_tokens_of_their_own():
    model = with_secret("marian", 1)
    batches = inputs("marian")
    merged, report = merge_feed_forward(
        model, batches, k={"encoder": 2, "decoder": 4}, metric=closeness(model, "marian")
    )
    found = report["stacks"]
    assert found["decoder"]["window"] == SECRET
    assert len(found["encoder"]["window"]) == 2
    assert found["encoder"]["tokens"] == sum(int(b["attention_mask"].sum()) for b in batches)
    assert found["decoder"]["tokens"] == sum(int((b["labels"] != -100).sum()) for b in batches)
    shared = {name for names in report["shared"] for name in names}
    assert len(shared) == 4 * (2 + 4)
    assert unique_parameters(merged) == report["parameters"]["merged"]


def test_padding_is_not_counted():
    """What lies under the mask may be anything."""
    model = build("gpt2")
    batches = inputs("gpt2", 2)
    others = [dict(batch) for batch in batches]
    for batch in others:
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    one, other = (
        features(model, stacks_of(model), some, None, "auto")["decoder"]
        for some in (batches, others)
    )
    assert one.tokens == other.tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    assert torch.allclose(one.correlation(1, 2), other.correlation(1, 2), atol=1e-6)


def test_correlation_is_that_of_the_neurons():
    model = build("llama")
    batch = inputs("llama", 1)[0]
    seen = {}
    for i in (2, 5):
        layer = model.model.layers[i].mlp.up_proj
        layer.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out}))
    aligner = features(model, stacks_of(model), [batch], None, "auto")["decoder"]
    kept = [seen[i][batch["attention_mask"] != 0].double().T for i in (2, 5)]
    wanted = torch.corrcoef(torch.cat(kept))[:40, 40:]
    assert torch.allclose(aligner.correlation(2, 5), wanted, atol=1e-5)


def test_a_neuron_that_never_changes_correlates_with_nothing():
    model = build("opt")
    with torch.no_grad():
        model.model.decoder.layers[2].fc1.weight[4] = 0.0
    _, report = merge_feed_forward(model, inputs("opt"), k=3)
    assert report["metric"]["merged"] < 0
    aligner = features(model, stacks_of(model), inputs("opt"), None, "auto")["decoder"]
    assert (aligner.correlation(2, 3)[4] == 0).all()


def test_pairs_are_aligned_once(monkeypatch):
    from dotresize import merge_align

    model, pairs = build("llama"), []
    correlation = merge_align.Aligner.correlation

    def counted(self, a, i):
        pairs.append((a, i))
        return correlation(self, a, i)

    monkeypatch.setattr(merge_align.Aligner, "correlation", counted)
    merge_feed_forward(model, inputs("llama"), k=4, anchor="middle")
    assert len(pairs) == len(set(pairs)) == 3 * (LAYERS - 3)


def test_ties_outlive_moves_copies_and_training():
    merged, report = merge_feed_forward(build("gpt2"), inputs("gpt2"), k=3, start=2)
    merged = copy.deepcopy(merged).double()
    optimizer = torch.optim.AdamW(merged.parameters(), lr=0.01)
    batch = inputs("gpt2", 1)[0]
    merged.train()(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert unique_parameters(merged) == report["parameters"]["merged"]
    weights = [merged.get_parameter(name) for name in report["shared"][0]]
    assert all(weight is weights[0] for weight in weights)
    assert weights[0].grad.abs().max() > 0


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"k": 1}, "k 1: must be 2 to 8, the layers of the decoder"),
        ({"k": 9}, "k 9: must be 2 to 8"),
        ({"k": {"encoder": 2}}, "llama has no encoder, but decoder"),
        ({"k": {}}, "k: names no stack, but there is decoder"),
        ({"k": 3, "anchor": "best"}, "anchor 'best': must be one of first, middle, last"),
        ({"k": 3, "start": 6}, "start 6: a window of 3 begins at 0 to 5"),
        ({"k": 3, "soft": 0.0}, "soft 0: must be positive"),
    ],
    ids=str,
)
def test_refusals(choices, message):
    with pytest.raises(ValueError, match=message):
        merge_feed_forward(build("llama"), inputs("llama", 1), **choices)


def test_a_metric_must_be_a_number():
    with pytest.raises(ValueError, match="the metric is nan: must be a finite number"):
        merge_feed_forward(build("llama"), inputs("llama", 1), k=3, metric=lambda _: float("nan"))


def test_a_window_that_breaks_the_model_is_the_worst():
    calls = iter([1.0, float("nan"), 0.3, 0.5, float("-inf"), 0.2, 0.1, 0.4, 0.5])
    _, report = merge_feed_forward(
        build("llama"), inputs("llama", 1), k=2, metric=lambda model: next(calls)
    )
    found = report["stacks"]["decoder"]
    assert [one["metric"] for one in found["profile"]] == [None, 0.3, 0.5, None, 0.2, 0.1, 0.4]
    assert found["window"] == [2, 3]


def test_labels_that_do_not_count():
    model = build("llama")
    batches = inputs("llama", 2)
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
    batches[0]["labels"][:] = -100
    _, both = merge_feed_forward(model, batches, k=2, start=0)
    _, one = merge_feed_forward(model, batches[1:], k=2, start=0)
    assert both["metric"]["dense"] == pytest.approx(one["metric"]["dense"])


def test_a_metric_is_asked_for_where_there_is_no_loss():
    with pytest.raises(ValueError, match="neither labels nor input_ids: give a metric"):
        merge_feed_forward(build("vit"), inputs("vit"), k=2)


def test_no_batches_and_nothing_that_counts():
    with pytest.raises(ValueError, match="there are no batches"):
        merge_feed_forward(build("llama"), [], k=2)
    batch = inputs("llama", 1)[0]
    batch["attention_mask"] = 0 * batch["attention_mask"]
    with pytest.raises(ValueError, match="no token counts in the decoder"):
        merge_feed_forward(build("llama"), [batch], k=2)


def test_published_parameter_counts():
    """ViT-B/16 with five merged loses 21.8 %, GPT-2 Large with thirteen 20.3 %."""
    import transformers

    from dotresize.merge_tie import tie
    from dotresize.resident import skeleton

    shapes = [
        (transformers.ViTForImageClassification, transformers.ViTConfig(num_labels=1000), 5, 0.218),
        (
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20),
            13,
            0.203,
        ),
    ]
    for kind, config, k, share in shapes:
        model = skeleton(kind, config, torch.device("cpu"))
        stack, before = stacks_of(model)[0], unique_parameters(model)
        layers = layers_of(model, stack)
        first = {n: p for n, p in layers[0].named_parameters() if n in stack.weights}
        tie(model, stack, list(range(k)), first)
        assert 1 - unique_parameters(model) / before == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "marian"])
def test_stored_once_and_shared_again(kind, tmp_path):
    model = build(kind)
    merged, report = merge_feed_forward(model, inputs(kind), k=3, metric=closeness(model, kind))
    save(merged, tmp_path)
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
    save(merged, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        dotresize.load(tmp_path)


@pytest.fixture
def words(model_directory, text_file, tmp_path):
    small = ["--window", "32", "--windows", "6", "--eval-windows", "4", "--quiet"]
    return [
        *("merge-ff", str(model_directory), str(tmp_path / "out"), "--merge", "2"),
        *("--calibration", str(text_file), "--eval", str(text_file), *small),
    ]


def test_the_command(words, capsys):
    assert main([*words, "--compare", "--anchor", "last"]) == 0
    table = capsys.readouterr().out
    for name in ("dense", "merged", "without permutation", "soft alignment", "layers dropped"):
        assert f"\n{name} " in table
    out = Path(words[2])
    report = json.loads((out / "dotresize.json").read_text())
    assert len(report["stacks"]["decoder"]["profile"]) == 2
    parameters = {name: row["parameters"] for name, row in report["rows"].items()}
    assert parameters["dense"] - parameters["merged"] == 3 * 24 * 40
    assert parameters["merged"] == parameters["soft alignment"] > parameters["layers dropped"]
    assert main(["eval", str(out), *words[6:7], "--window", "32", "--quiet"]) == 0
    assert main(["merge-ff", str(out), f"{out}2", *words[3:]]) == 2  # what is merged is merged


def test_recovery_trains_what_is_shared(words, capsys):
    pytest.importorskip("accelerate")
    assert main([*words, "--recover", "4", "--learning-rate", "0.003"]) == 0
    report = json.loads((Path(words[2]) / "dotresize.json").read_text())
    rows = report["rows"]
    assert rows["merged + recovery"]["parameters"] == rows["merged"]["parameters"]
    assert rows["merged + recovery"]["perplexity"] != rows["merged"]["perplexity"]
    loaded = dotresize.load(words[2])
    assert unique_parameters(loaded) == rows["merged"]["parameters"]


def test_an_interrupted_recovery_goes_on(words, capsys, monkeypatch, tmp_path):
    pytest.importorskip("accelerate")
    words += ["--recover", "4", "--learning-rate", "0.003"]
    whole = [*words]
    whole[2] = str(tmp_path / "whole")
    assert main(whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(merge_command, "_row", _stopping(merge_command._row))
        capsys.readouterr()
        assert "--resume goes on from it" in fails(words, capsys, code=1)
    assert "holds an unfinished run" in fails(words, capsys)
    other = [*words[:-3], "6", *words[-2:], "--resume"]  # steps
    assert "holds something else" in fails(other, capsys)
    assert main([*words, "--resume"]) == 0
    assert not Path(f"{words[2]}.partial").exists()
    one, other = (Path(w[2]) / "model.safetensors" for w in (words, whole))
    assert one.read_bytes() == other.read_bytes()


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


def _stopping(row):
    def stop(model, texts, name, *more):
        if name == "merged + recovery":
            raise KeyboardInterrupt
        return row(model, texts, name, *more)

    return stop


def test_the_profile_is_drawn(words, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([*words, "--plot", str(tmp_path / "profile.svg")]) == 0
    assert "first layer of the window" in (tmp_path / "profile.svg").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--plot", "x.svg", "--start", "0"], "--plot: there is nothing to draw with --start"),
        (["--plot", "x.txt"], "--plot x.txt: must be a .svg, .png or .pdf file"),
        (["--plot", "/no/where/x.svg"], "its directory does not exist"),
        (["--merge", "9"], "--merge 9: must be 2 to 3, the model's layers"),
        (["--anchor", "best"], "--anchor best: must be one of first, middle, last"),
        (["--soft", "0"], "--soft 0: must be positive"),
        (["--soft", "1", "--no-permute"], "--soft 1: must be positive, and without --no-permute"),
        (["--select-windows", "7"], "--select-windows 7: must be 1 to 6"),
        (["--start", "5"], "start 5: a window of 2 begins at 0 to 1"),
        (["--recover", "0"], "--recover 0: must be at least 1 step"),
    ],
    ids=str,
)
def test_the_command_refuses(more, message, words, capsys):
    assert message in fails([*words, *more], capsys)
    assert not Path(words[2]).exists()
