"""A feed-forward width for each layer: how it is chosen, written, read, and narrowed again."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import transformers
from conftest import fails, tiny_model
from safetensors.torch import load_file, save_file
from test_compress import logits
from test_offload import opened, stored

from dotresize import checkpoint, compress, load, save
from dotresize.accounting import count_parameters
from dotresize.cli import main
from dotresize.compression import make_options
from dotresize.models import architecture_of, supported
from dotresize.models.causal_lm import CausalLM
from dotresize.models.layer_widths import set_inner_widths
from dotresize.narrow import allocation
from dotresize.narrow.allocation import Allocation, allocate
from dotresize.narrow.curves import Curves
from dotresize.narrow.feed_forward import Elimination
from dotresize.narrow.pipeline import narrow_model, prepare

pytestmark = pytest.mark.usefixtures("one_thread")


# Multiples this fine leave room for widths that are better than equal ones.
UNEVEN = {"ff_width": 28, "multiple_of": 4, "layer_widths": True}


@pytest.fixture(autouse=True)
def any_gain(monkeypatch):
    """Random layers are much alike: without this most would keep equal widths."""
    monkeypatch.setattr(allocation, "GAIN", 0.0)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (6, 33))


def uneven(kind: str = "llama", **options):
    """Return a model with feed-forwards of different widths, and the report of how it came."""
    tokens = torch.randint(0, 256, (6, 33))
    return compress(tiny_model(kind), tokens, **UNEVEN, **options)


def curves_of(losses: list[list[float]]) -> Curves:
    """Return curves of layers with as many neurons as losses, these by neurons left, from 1."""
    every = []
    for one in losses:
        left = list(range(len(one), 0, -1))
        every.append(Elimination(torch.arange(0), list(zip(left, reversed(one), strict=True))))
    # A scale of 1: the loss at the reference is the divergence.
    return Curves([1] * len(losses), [one[0] for one in losses], every)


def test_widths_are_the_best_of_all():
    generator = torch.Generator().manual_seed(3)
    for multiple in (1, 2):
        losses = [
            [*torch.rand(8, generator=generator).cumsum(0).flip(0).tolist()[:-1], 0.0]
            for _ in range(3)
        ]
        curves = curves_of(losses)
        found = allocate(curves, 14, [8, 8, 8], multiple)
        assert sum(found) <= 14
        every = itertools.product(range(multiple, 9, multiple), repeat=3)
        best = min(curves.predicted(widths) for widths in every if sum(widths) <= 14)
        assert curves.predicted(found) == pytest.approx(best)


def test_no_widths_fit():
    assert allocate(curves_of([[1.0, 0.5]] * 3), 2, [2, 2, 2], 1) is None


@pytest.mark.parametrize("options", [{"ff_width": 8}, {"ff_width": 38, "multiple_of": 19}])
def test_equal_widths_are_taken_where_nothing_is_better(options, tokens):
    """No others are to be had, or their multiples cost too much."""
    narrow, report = compress(tiny_model(), tokens, layer_widths=True, self_windows=0, **options)
    allocation = report["layer_widths"]
    assert allocation["predicted"] <= allocation["predicted_equal"]
    assert sum(CausalLM.in_memory(narrow).inner_widths) <= 3 * options["ff_width"]


@pytest.mark.parametrize(("dearest", "stay_equal"), [(1.0, True), (1.1, True), (2.0, False)])
def test_widths_stay_equal_where_little_is_to_be_won(monkeypatch, dearest, stay_equal):
    monkeypatch.setattr(allocation, "GAIN", 0.1)
    courses = [
        Elimination(torch.arange(0), [(40, 0.0), (1, 39.0 * slope)])
        for slope in (1.0, dearest, 1.0)
    ]
    curves = Curves([1] * 3, [39.0, 39.0 * dearest, 39.0], courses)
    options = make_options(ff_width=28, layer_widths=True, multiple_of=4)
    handle = CausalLM.in_memory(tiny_model())
    found = allocation.allocation_of(curves, handle, [28] * 3, 84, options)
    assert (found.widths == (28, 28, 28)) == stay_equal
    assert sum(found.widths) <= 84


@pytest.mark.parametrize("kind", supported(feed_forward=True))
def test_written_read_and_padded(kind, tokens, tmp_path):
    """The directory loads as what it was; padded it is the same function, and plain."""
    narrow, report = uneven(kind, self_windows=0)
    layers = report["feed_forward"]["layers"]
    assert layers is not None
    assert sum(layers) <= 3 * 28
    CausalLM.in_memory(narrow).save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again, tokens), logits(narrow, tokens))
    assert CausalLM.in_memory(again).inner_widths == layers
    with pytest.raises(Exception, match="per-layer"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    more, second = compress(again, tokens, ff_width=20, self_windows=0)
    assert CausalLM.in_memory(more).inner_widths == [min(20, width) for width in layers]
    assert second["feed_forward"]["old"] == max(layers)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "opt", "gemma2"])
def test_padding_changes_nothing(kind, tmp_path):
    tokens = torch.randint(0, 256, (6, 33))
    model = tiny_model(kind)
    choices = UNEVEN | {"self_windows": 0}
    narrow, report = compress(model, tokens, **choices)
    padded, plain = compress(model, tokens, pad=True, **choices)
    assert not report["plain_checkpoint"]
    assert plain["plain_checkpoint"]
    assert plain["feed_forward"]["layers"] == report["feed_forward"]["layers"]
    torch.testing.assert_close(logits(padded, tokens), logits(narrow, tokens), rtol=0, atol=1e-5)
    padded.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(padded, tokens))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_in_files_as_in_memory(kind, tokens, tmp_path):
    """An offloaded model gets the same widths, and its directory says so; it is read by parts."""
    folder = stored(tiny_model(kind), tmp_path / "model")
    options = make_options(**UNEVEN, self_windows=0)
    expected, first = narrow_model(
        CausalLM.in_memory(transformers.AutoModelForCausalLM.from_pretrained(folder)),
        tokens,
        options,
    )
    found, second = narrow_model(opened(folder), tokens, options)
    assert second["feed_forward"] == first["feed_forward"]
    (tmp_path / "out").mkdir()
    found.save(tmp_path / "out")
    again = load(tmp_path / "out")
    torch.testing.assert_close(
        logits(again, tokens), logits(expected.module, tokens), rtol=1e-3, atol=1e-4
    )


def test_a_budget_counts_what_is_there(tokens):
    narrow, report = compress(
        tiny_model(), tokens, params=0.7, params_count="non_embedding", layer_widths=True
    )
    count = report["parameters"]
    assert count["narrow"]["non_embedding"] <= 0.7 * count["dense"]["non_embedding"]
    again, second = compress(narrow, tokens, params=0.9, params_count="non_embedding")
    left = count_parameters(CausalLM.in_memory(again))["non_embedding"]
    assert left <= 0.9 * count["narrow"]["non_embedding"]
    assert second["parameters"]["dense"] == count["narrow"]


def test_an_allocation_passes_through_json(tokens):
    options = make_options(**UNEVEN, self_windows=0)
    allocation = prepare(CausalLM.in_memory(tiny_model()), tokens, options).allocation
    assert allocation is not None
    assert Allocation.recorded(**json.loads(json.dumps(vars(allocation)))) == allocation


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"0": {"intermediate_size": 0}}, "intermediate_size is 0 in layer 0"),
        ({"0": {"intermediate_size": "wide"}}, "intermediate_size is 'wide' in layer 0"),
        ({"1": {"hidden_act": "gelu"}}, "layer 1 differs in hidden_act"),
        ({"0": {"intermediate_size": 24}}, "config asks for"),
    ],
)
def test_a_config_that_says_something_else(entries, message, model_directory, tmp_path):
    for path in model_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["per_layer_config"] = entries
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_what_was_prepared_is_what_is_asked_for(tokens):
    prepared = prepare(
        CausalLM.in_memory(tiny_model()),
        tokens,
        make_options(**UNEVEN, self_windows=0),
    )
    with pytest.raises(ValueError, match="were not prepared for these layer_widths"):
        compress(tiny_model(), tokens, ff_width=20, layer_widths=True, statistics=prepared)


def test_saved_and_trained_again(tokens, tmp_path):
    """``save`` names the widths, and every weight of what ``load`` returns can be trained."""
    narrow, report = uneven()
    save(narrow, tmp_path / "out")
    again = load(tmp_path / "out")
    assert CausalLM.in_memory(again).inner_widths == report["feed_forward"]["layers"]
    assert all(weight.requires_grad for weight in again.parameters())
    with pytest.raises(ValueError, match="exists and is not empty"):
        save(narrow, tmp_path / "out")


@pytest.mark.parametrize("choices", [{"method": "slicegpt"}, {"scope": "location"}])
def test_maps_for_each_location_want_one_width(choices, tokens):
    narrow, _ = uneven()
    with pytest.raises(ValueError, match="takes models whose layers have feed-forwards of one"):
        compress(narrow, tokens, width=16, **choices)


def test_padding_alone_makes_it_plain(tokens, tmp_path):
    """An uneven model of which nothing is cut can be filled up; its card says how one is loaded."""
    narrow, _ = uneven()
    assert len(set(CausalLM.in_memory(narrow).inner_widths)) > 1
    padded, report = compress(narrow, tokens, ff_width=1.0, layer_widths=True, pad=True)
    assert report["plain_checkpoint"]
    assert report["feed_forward"]["method"] is None  # nothing was eliminated
    assert len(set(CausalLM.in_memory(padded).inner_widths)) == 1


def test_a_head_that_is_not_the_embedding_is_kept(tmp_path):
    """Both weights are kept whatever the config says, as with layers of one width."""
    tokens = torch.randint(0, 256, (6, 33))
    narrow, _ = compress(tiny_model(tie_word_embeddings=True), tokens, **UNEVEN)
    CausalLM.in_memory(narrow).save(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = 2.0 * weights["model.embed_tokens.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    again = load(tmp_path)
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, weights["lm_head.weight"])
    assert torch.allclose(logits(again, tokens), 2.0 * logits(narrow, tokens), rtol=1e-4)


def test_from_the_hub_and_its_cache(tmp_path, monkeypatch):
    """An uneven model loads from the folder of the hub's cache, and its files by their id."""
    narrow, _ = uneven()
    cached = tmp_path / "models--some--uneven" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    CausalLM.in_memory(narrow).save(cached)
    kept = logits(narrow, torch.arange(20)[None])
    assert torch.equal(
        logits(load(tmp_path / "models--some--uneven"), torch.arange(20)[None]), kept
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(cached))
    assert checkpoint._downloaded("some/uneven") == cached


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_widths": True, "width": 16}, "layer_widths: does nothing without ff_width"),
        ({"pad": True, "ff_width": 28}, "pad: does nothing without layer_widths"),
        ({"layer_widths": 1, "ff_width": 28}, "layer_widths is 1: must be True or False"),
        ({"layer_widths": True, "ff_width": 3}, "in multiples of 8: 24 in all, and .* room for 9"),
    ],
)
def test_bad_options(options, message, tokens):
    with pytest.raises(ValueError, match=message):
        compress(tiny_model(), tokens, **options)


def test_experts_have_one_width(tokens):
    with pytest.raises(ValueError, match="layer_widths: experts have no single inner width"):
        compress(tiny_model("mixtral"), tokens, params=0.8, layer_widths=True)


def test_only_feed_forwards_of_one_width_are_merged(tokens, tmp_path):
    from dotresize import merge_feed_forward
    from dotresize.merging.checkpoint import MergedStore, PlainStore

    model = tiny_model(num_hidden_layers=4)
    set_inner_widths(architecture_of(model.config), model, [40, 24, 24, 16])
    batches = [{"input_ids": tokens}]
    with pytest.raises(ValueError, match="start 0: decoder layers side by side have feed-forwards"):
        merge_feed_forward(model, batches, k=2, start=0)
    with pytest.raises(ValueError, match="k 3: everywhere in the decoder layers side by side"):
        merge_feed_forward(model, batches, k=3)
    merged, found = merge_feed_forward(model, batches, k=2)
    assert found["stacks"]["decoder"]["window"] == [1, 2]
    for kind in (MergedStore, PlainStore):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        kind(merged).save(folder)
        assert torch.equal(logits(load(folder), tokens), logits(merged, tokens))


def test_command(arguments, text_file, tmp_path, capsys, caplog):
    """The command line makes one, evaluates it, narrows it again; the card says how it loads."""
    out = tmp_path / "out"
    narrow = [word for word in arguments if word != "--quiet"]
    narrow[narrow.index("--width") : narrow.index("--width") + 2] = [
        "--ff-width",
        "28",
        "--multiple-of",
        "4",
    ]
    page = tmp_path / "page"
    assert main([*narrow, "--layer-widths", "--report", str(page), "--compare"]) == 0
    said = capsys.readouterr()
    divergences = next(line for line in said.out.splitlines() if line.startswith("KL to the dense"))
    assert "0.0000" not in divergences  # what it is compared with is narrowed as far
    assert f"{out} loads with dotresize.load" in said.out
    assert "transformers does not load feed-forwards of different widths yet" in caplog.text
    assert "no multiple of 32" not in caplog.text
    assert "`dotresize.load` does" in (out / "README.md").read_text()
    assert "A width for each layer" in (page / "index.html").read_text()
    assert main(["eval", str(out), str(text_file), "--window", "32", "--quiet"]) == 0
    again = tmp_path / "again"
    narrow[1:3], narrow[narrow.index("28")] = [str(out), str(again)], "20"
    assert main(narrow) == 0
    assert main(["eval", str(again), str(text_file), "--window", "32", "--quiet"]) == 0
    capsys.readouterr()
    said = fails([*arguments, "--pad"], capsys)
    assert "--pad: does nothing without --layer-widths" in said
