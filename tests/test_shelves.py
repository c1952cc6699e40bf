"""Models that stay in their files: the same result as in memory, and no more of them held."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import copy_of, fails, tiny_model
from test_cli import start

from dotresize import comparison, compress
from dotresize.cli import main
from dotresize.evaluate import perplexity
from dotresize.memory import parse, plan
from dotresize.resident import device_of, parts, resident, shelf_of
from dotresize.shelves import open_model, save
from dotresize.streams import Spill, Streams

pytestmark = pytest.mark.usefixtures("one_thread")

CHOICES = [
    {},
    {"untie": True},
    {"refit": False},
    {"refit": False, "untie": True},
    {"width": 24, "ff_width": 30},
    {"width": 20, "ff_width": 0.5, "method": "dot"},
    {"method": "magnitude"},
    {"energy": 0.9},
]
FAMILIES = [
    *("qwen2", "qwen3", "mistral", "smollm3", "granite", "gemma", "olmo", "phi3"),
    *("mixtral", "qwen3_moe"),
]


@pytest.fixture
def tokens():
    return torch.randint(259, (6, 24))


def stored(model, folder: Path, shard: str = "20KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def on_shelf(folder: Path):
    import transformers

    work = folder.parent / "work"
    work.mkdir()
    config = transformers.AutoConfig.from_pretrained(folder)
    return open_model(folder, config, torch.device("cpu"), work)


def both(model, tokens, folder: Path, **choices):
    """Narrowed in memory, and from its files; both loaded."""
    import transformers

    choices = {"width": 16, "self_windows": 0} | choices
    if "energy" in choices:
        del choices["width"]
    held, _ = compress(model, tokens, **choices)
    shelved, report = compress(on_shelf(stored(model, folder / "dense")), tokens, **choices)
    (folder / "narrow").mkdir()
    save(shelved, folder / "narrow")
    loaded, problems = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "narrow", output_loading_info=True, dtype="auto"
    )
    assert not any(problems.values()), problems
    assert loaded.config.to_dict().keys() == held.config.to_dict().keys()
    return held, loaded.eval(), shelved, report


def assert_same(one, other):
    weights = other.state_dict()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_same_weights_as_in_memory(choices, tied, tokens, tmp_path):
    held, loaded, shelved, report = both(tiny_model(tied=tied), tokens, tmp_path, **choices)
    assert_same(held, loaded)
    assert all(weight.is_meta for weight in shelved.parameters())
    assert report["parameters"]["narrow"]["total"] == sum(p.numel() for p in held.parameters())
    assert perplexity(shelved, tokens) == pytest.approx(perplexity(held, tokens), rel=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_with_a_residual_map(kind, tokens, tmp_path):
    held, loaded, shelved, _ = both(tiny_model(kind), tokens, tmp_path)
    assert_same(held, loaded)
    assert perplexity(shelved, tokens) == pytest.approx(perplexity(held, tokens), rel=1e-6)


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2", "gpt2", "opt"])
def test_feed_forwards_alone(kind, refit, tokens, tmp_path):
    choices = {"width": None, "ff_width": 25, "refit": refit}
    held, loaded, shelved, report = both(tiny_model(kind), tokens, tmp_path, **choices)
    assert report["feed_forward"]["new"] == 25
    assert_same(held, loaded)
    assert perplexity(shelved, tokens) == pytest.approx(perplexity(held, tokens), rel=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_files_of_the_model_without_its_head(kind, tokens, tmp_path):
    """As the hub has GPT-2: ``wte.weight``, not ``transformer.wte.weight``."""
    choices = {"ff_width": 30, "width": None if kind == "gpt2" else 16, "self_windows": 0}
    model = tiny_model(kind)
    held, _ = compress(model, tokens, **choices)
    shelved, _ = compress(on_shelf(stored(model.base_model, tmp_path / "dense")), tokens, **choices)
    for name, weight in held.named_parameters():
        assert torch.equal(shelf_of(shelved).read(name), weight), name


def test_half_precision_is_stored_as_it_was_and_computed_wide(tokens, tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    shelved, _ = compress(on_shelf(stored(model, tmp_path / "dense")), tokens, width=16)
    wide, _ = compress(model.float(), tokens, width=16, self_windows=0)
    files = shelf_of(shelved)
    for name, weight in wide.named_parameters():
        assert files.read(name).dtype == torch.bfloat16
        # The refit sees embeddings as they were rounded.
        error = (files.read(name).float() - weight).norm() / weight.norm()
        assert error < 0.02, name


def test_parts_are_held_as_long_as_somebody_uses_them(tmp_path):
    model = on_shelf(stored(tiny_model(), tmp_path / "dense"))
    name = parts(model)[1]
    assert device_of(model).type == "cpu"
    with resident(model, name) as outer:
        with resident(model, name):
            assert not next(outer.parameters()).is_meta
        assert not next(outer.parameters()).is_meta
        others = model.get_submodule(parts(model)[2])
        assert all(weight.is_meta for weight in others.parameters())
    assert all(weight.is_meta for weight in model.parameters())


def test_a_weight_that_is_not_finite_is_named(tokens, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"weight model.layers.1.mlp.up_proj.weight .* NaN"):
        compress(on_shelf(stored(model, tmp_path / "dense")), tokens, width=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 5}, r"gate.weight is stored as \(4, 24\), .* asks for \(5, 24\)"),
        ({"intermediate_size": 41}, r"w1.weight is stored as \(40, 24\), .* asks for \(41, 24\)"),
    ],
    ids=str,
)
def test_experts_other_than_the_config_has(change, message, tmp_path):
    folder = stored(tiny_model("mixtral"), tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        on_shelf(folder)


def test_a_weight_outside_the_parts(tmp_path):
    model = tiny_model("opt", word_embed_proj_dim=16)
    with pytest.raises(ValueError, match=r"project_out\.weight is of no part that --memory knows"):
        on_shelf(stored(model, tmp_path / "dense"))


@pytest.fixture
def by_parts(arguments):
    return [*arguments, "--memory", "4GB"]


def test_the_command_line_says_what_it_will_take(by_parts, arguments, caplog, tmp_path):
    """And it writes what it writes with the model in memory, own text left out."""
    caplog.set_level("INFO", logger="dotresize")
    assert main(by_parts) == 0
    assert "activations on the host" in caplog.text
    arguments[2] = str(tmp_path / "held")
    assert main([*arguments, "--self-windows", "0"]) == 0
    report, held = (
        json.loads((Path(out) / "dotresize.json").read_text())
        for out in (by_parts[2], arguments[2])
    )
    assert report["perplexity"] == pytest.approx(held["perplexity"], rel=1e-5)
    assert report["calibration"] == held["calibration"]
    assert report["predicted_memory_bytes"]["host"] > 10**8
    assert not Path(f"{by_parts[2]}.partial").exists()


@pytest.mark.parametrize("stage", ["calibrate", "compress", "dense_report"])
def test_stopped_and_gone_on(stage, by_parts, capsys, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    whole = [*by_parts]
    whole[2] = str(tmp_path / "whole")
    assert main(whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(comparison, stage, stop)
        capsys.readouterr()
        assert "--resume goes on from it" in fails(by_parts, capsys, code=1)
    # Another budget changes where activations lie, and no weight.
    assert main([*by_parts[:-1], "1GB", "--resume"]) == 0
    shards = sorted(Path(whole[2]).glob("*.safetensors"))
    assert len(shards) == 5
    for shard in shards:
        assert shard.read_bytes() == (Path(by_parts[2]) / shard.name).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "much"], "--memory 'much' is not a size of memory"),
        (["--memory", "0GB"], "--memory '0GB' is not a size"),
        (["--memory", "1MB"], r"--memory 0.00 GB: 0.\d\d GB are needed, .* by the"),
        (["--compare"], "--compare: needs the whole model in memory; leave --memory out"),
        (["--method", "slicegpt"], "--method slicegpt: needs the whole model"),
        (["--self-windows", "2"], "--self-windows: needs the whole model"),
    ],
    ids=str,
)
def test_refusals(words, message, by_parts, capsys):
    assert re.search(message, fails([*by_parts, *words], capsys))
    assert not Path(f"{by_parts[2]}.partial").exists()


def test_only_directories_have_parts(by_parts, capsys, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    by_parts[1] = str(tmp_path / "model.gguf")
    assert "--memory: reads a model directory by parts" in fails(by_parts, capsys)


@pytest.mark.parametrize("place", ["host", "disk", "device"])
def test_activations_come_back_as_they_were(place):
    kept = Spill(2, place)
    first, second = torch.randn(3, 4).bfloat16(), torch.randn(2, 4)
    kept[0], kept[1] = first, second
    first_was = first.clone()
    first.zero_()  # what is kept is a copy
    assert torch.equal(kept[0], first_was)
    kept[1] = second[:1]
    assert torch.equal(kept[1], second[:1])
    with pytest.raises(IndexError, match="batch 0 was never written"):
        Spill(1, place)[0]


def test_no_more_files_than_a_process_may_open():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        kept = Spill(400)
        for i in range(400):
            kept[i] = torch.full((3,), i)
        assert [int(x[0]) for x in kept] == list(range(400))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_budget_too_small_does_not_cost_what_is_finished(by_parts, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "dense_report", stop)
        fails(by_parts, capsys, code=1)
    kept = Path(f"{by_parts[2]}.partial")
    assert "GB are needed" in fails([*by_parts[:-1], "1MB", "--resume"], capsys)
    assert (kept / "narrow" / "config.json").is_file()
    assert main([*by_parts, "--resume"]) == 0
    assert not kept.exists()


def test_the_peak_of_experts(by_parts, model_directory, tmp_path):
    """Nothing is computed for all experts at once."""
    size = {"hidden_size": 512, "intermediate_size": 256, "num_local_experts": 96}
    folder = copy_of(model_directory, tmp_path / "experts")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    stored(tiny_model("mixtral", num_hidden_layers=1, **size), folder, "30MB")
    by_parts[1] = str(folder)
    by_parts[by_parts.index("--width") + 1] = "408"
    process = start(by_parts)
    assert process.wait(timeout=120) == 0, process.stderr.read()
    report = json.loads((Path(by_parts[2]) / "dotresize.json").read_text())
    predicted, met = (report[f"{name}_memory_bytes"]["host"] for name in ("predicted", "peak"))
    assert 0.6 * predicted < met <= predicted


def test_masks_are_kept_once(tokens, tmp_path):
    model = tiny_model("gemma2")
    kept = Streams(model, tokens, 2)._arguments.values()
    seen = [
        value
        for layer in kept
        for args, kwargs in layer
        for value in (*args, *kwargs.values())
        if isinstance(value, torch.Tensor)
    ]
    assert len(kept) == 3
    # A mask of each kind, whatever the batches; positions besides.
    assert len({id(value) for value in seen if value.ndim == 4}) <= 2
    assert len({id(value) for value in seen}) <= 4


def test_long_texts_to_evaluate_on_are_planned_for(tmp_path):
    model = on_shelf(stored(tiny_model(), tmp_path / "dense"))
    few = torch.zeros(2, 8, dtype=torch.int64)
    small, large = (plan(model, few, 16, 40, 4, 10**12, n) for n in (0, 10**7))
    assert large.host - small.host > 10**7 * 24 * 4 - 10**6


@pytest.mark.parametrize(
    ("size", "bytes_"), [("3GB", 3e9), ("2.5 GiB", 2.5 * 2**30), ("800m", 8e8), ("4096", 4096)]
)
def test_sizes_of_memory(size, bytes_):
    assert parse(size) == bytes_
