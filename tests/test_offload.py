"""Offloaded models: the same result as in memory, and no more than a part of them held."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from dotresize import compress
from dotresize.calibration.residual_stream import Streams
from dotresize.compression import make_options
from dotresize.evaluate import perplexity
from dotresize.models import supported
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.absorb import absorb
from dotresize.narrow.pipeline import narrow_model
from dotresize.offload import offloaded_model, transfers
from dotresize.offload.offloaded_model import open_model
from dotresize.offload.stored_weights import StoredWeights

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


@pytest.fixture
def tokens():
    return torch.randint(259, (6, 24))


def stored(model, folder: Path, shard: str = "20KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def opened(folder: Path) -> CausalLM:
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
    dense = opened(stored(model, folder / "dense"))
    offloaded, report = narrow_model(dense, tokens, make_options(**choices))
    (folder / "narrow").mkdir()
    offloaded.save(folder / "narrow")
    loaded, problems = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "narrow", output_loading_info=True, dtype="auto"
    )
    assert not any(problems.values()), problems
    assert loaded.config.to_dict().keys() == held.config.to_dict().keys()
    return held, loaded.eval(), offloaded, report


def assert_same(one, other):
    weights = other.state_dict()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_same_weights_as_in_memory(choices, tied, tokens, tmp_path):
    held, loaded, offloaded, report = both(tiny_model(tied=tied), tokens, tmp_path, **choices)
    assert_same(held, loaded)
    assert all(weight.is_meta for weight in offloaded.module.parameters())
    assert report["parameters"]["narrow"]["total"] == sum(p.numel() for p in held.parameters())
    assert perplexity(offloaded, tokens) == pytest.approx(
        perplexity(CausalLM.in_memory(held), tokens), rel=1e-6
    )


@pytest.mark.parametrize("kind", supported(residual=True))
def test_every_family_with_a_residual_map(kind, tokens, tmp_path):
    held, loaded, offloaded, _ = both(tiny_model(kind), tokens, tmp_path)
    assert_same(held, loaded)
    assert perplexity(offloaded, tokens) == pytest.approx(
        perplexity(CausalLM.in_memory(held), tokens), rel=1e-6
    )


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2", "gpt2", "opt"])
def test_feed_forwards_alone(kind, refit, tokens, tmp_path):
    choices = {"width": None, "ff_width": 25, "refit": refit}
    held, loaded, offloaded, report = both(tiny_model(kind), tokens, tmp_path, **choices)
    assert report["feed_forward"]["new"] == 25
    assert_same(held, loaded)
    assert perplexity(offloaded, tokens) == pytest.approx(
        perplexity(CausalLM.in_memory(held), tokens), rel=1e-6
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_files_of_the_model_without_its_head(kind, tokens, tmp_path):
    """As the hub has GPT-2: ``wte.weight``, not ``transformer.wte.weight``."""
    choices = {"ff_width": 30, "width": None if kind == "gpt2" else 16, "self_windows": 0}
    model = tiny_model(kind)
    held, _ = compress(model, tokens, **choices)
    dense = opened(stored(model.base_model, tmp_path / "dense"))
    offloaded, _ = narrow_model(dense, tokens, make_options(**choices))
    for name, weight in held.named_parameters():
        assert torch.equal(offloaded.store.weights.read(name), weight), name


def test_half_precision_is_stored_as_it_was_and_computed_wide(tokens, tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    dense = opened(stored(model, tmp_path / "dense"))
    # Which tokens are drawn hangs on the last digits: no gradients here.
    offloaded, _ = narrow_model(dense, tokens, make_options(width=16, sensitivity=False))
    wide, _ = compress(model.float(), tokens, width=16, sensitivity=False, self_windows=0)
    files = offloaded.store.weights
    for name, weight in wide.named_parameters():
        assert files.read(name).dtype == torch.bfloat16
        # The refit sees embeddings as they were rounded.
        error = (files.read(name).float() - weight).norm() / weight.norm()
        assert error < 0.02, name


def test_parts_are_held_as_long_as_somebody_uses_them(tmp_path):
    model = opened(stored(tiny_model(), tmp_path / "dense"))
    name = model.parts[1]
    assert model.device.type == "cpu"
    with model.resident(name) as outer:
        with model.resident(name):
            assert not next(outer.parameters()).is_meta
        assert not next(outer.parameters()).is_meta
        others = model.module.get_submodule(model.parts[2])
        assert all(weight.is_meta for weight in others.parameters())
    assert all(weight.is_meta for weight in model.module.parameters())


def test_a_weight_that_is_not_finite_is_named(tokens, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"weight model.layers.1.mlp.up_proj.weight .* NaN"):
        narrow_model(opened(stored(model, tmp_path / "dense")), tokens, make_options(width=16))


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
        opened(folder)


def test_a_weight_outside_the_parts(tmp_path):
    model = tiny_model("opt", word_embed_proj_dim=16)
    with pytest.raises(ValueError, match=r"project_out\.weight is of no part that --memory knows"):
        opened(stored(model, tmp_path / "dense"))


def test_masks_are_kept_once(tokens, tmp_path):
    model = tiny_model("gemma2")
    kept = Streams(CausalLM.in_memory(model), tokens, 2)._arguments.values()
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


@pytest.mark.parametrize("tied", [True, False])
def test_parts_read_ahead_and_written_behind(tied, tokens, monkeypatch, tmp_path):
    """Threads write the same files, to the last bit; a pass reads one part in vain at most."""
    read: list[str] = []
    part_of = StoredWeights.part

    def counted(self, name, keys):
        read.append(name)
        return part_of(self, name, keys)

    monkeypatch.setattr(StoredWeights, "part", counted)
    files, counts = {}, {}
    for moved_by_threads in (False, True):
        for module in (transfers, offloaded_model):
            monkeypatch.setattr(module, "threaded", lambda _, moved=moved_by_threads: moved)
        folder = tmp_path / str(moved_by_threads)
        folder.mkdir()
        torch.manual_seed(0)
        *_, narrow, _ = both(tiny_model(tied=tied), tokens, folder, ff_width=30)
        files[moved_by_threads] = {
            path.name: path.read_bytes() for path in narrow.store.weights.paths
        }
        counts[moved_by_threads] = Counter(read)
        read.clear()
    assert files[True] == files[False]
    assert counts[True].keys() == counts[False].keys()
    assert 0 <= (counts[True] - counts[False]).total() <= 2
    assert not counts[False] - counts[True]
    table = "model.embed_tokens"
    assert counts[True][table] == counts[False][table]


def test_the_next_part_is_read_while_one_is_used():
    begun: list[str] = []
    parts = ["table", "first", "second", "head"]
    ahead = transfers.ReadAhead(
        lambda name: begun.append(name) or {name: torch.zeros(1)}, parts, torch.device("cpu")
    )

    def take(name: str) -> str:
        assert list(ahead.take(name)) == [name]
        ahead._pool.submit(lambda: None).result()  # what was asked for beside is done
        return begun[-1]

    assert [take(name) for name in ("table", "first", "second")] == ["first", "second", "head"]
    assert [take(name) for name in ("head", "second", "first")] == ["head", "first", "table"]
    assert begun == ["table", "first", "second", "head", "second", "first", "table"]


def test_a_damaged_part_is_named_when_its_turn_comes(tokens, monkeypatch, tmp_path):
    monkeypatch.setattr(offloaded_model, "threaded", lambda _: True)
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
    dense = opened(stored(model, tmp_path / "dense"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight .* holds NaN"):
        narrow_model(dense, tokens, make_options(width=16, self_windows=0))


def test_a_part_that_cannot_be_written_ends_the_run(tokens, monkeypatch, tmp_path):
    """Not silently, though nobody waits while it is written."""
    for module in (transfers, offloaded_model):
        monkeypatch.setattr(module, "threaded", lambda _: True)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    dense = opened(stored(tiny_model(), tmp_path / "dense"))
    monkeypatch.setattr(transfers, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        narrow_model(dense, tokens, make_options(width=16, self_windows=0))


def test_a_tied_head_waits_for_the_table_that_is_written(tokens, monkeypatch, tmp_path):
    for module in (transfers, offloaded_model):
        monkeypatch.setattr(module, "threaded", lambda _: True)
    dense = opened(stored(tiny_model(tied=True), tmp_path / "dense"))
    narrow = absorb(dense, torch.eye(24, dtype=torch.float64)[:, :16])
    with narrow.resident("model.embed_tokens") as table:
        weight = table.weight.clone()
    with narrow.resident("lm_head") as head:
        assert torch.equal(head.weight, weight)
