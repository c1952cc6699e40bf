"""What people pass to compress and merge_feed_forward: taken, or refused in one line."""

from __future__ import annotations

import gzip
import json
import logging

import numpy as np
import pytest
import torch
from conftest import tiny_model
from torch import nn

from dotresize import compress, merge_feed_forward
from dotresize.calibration.given_tokens import check_tokens
from dotresize.calibration.text import read_text


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokens(model):
    return torch.randint(0, model.config.vocab_size, (8, 32))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_same(left, right) -> None:
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_tokens_as_tokenizers_return_them(model, tokens):
    import transformers

    expected, _ = compress(model, tokens, width=16)
    given = [
        transformers.BatchEncoding({"input_ids": tokens}),
        {"input_ids": tokens.int(), "attention_mask": torch.ones_like(tokens)},
        {"input_ids": tokens.tolist(), "attention_mask": np.ones(tokens.shape)},
        {"input_ids": tokens, "attention_mask": torch.ones(tokens.shape, dtype=torch.bfloat16)},
        {"input_ids": tokens.tolist(), "attention_mask": [[True] * 32] * 8},
        tokens.int(),
        list(tokens),
        tokens.tolist(),
        tokens.numpy(),
        [{"input_ids": row} for row in tokens],
        (part for part in tokens.split(3)),
        [tuple(row) for row in tokens.tolist()],
    ]
    for other in given:
        assert torch.equal(check_tokens(other, 259), tokens)
    assert_same(compress(model, given[0], width=16)[0], expected)


def test_padding_is_left_out():
    ids = torch.arange(12).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]])
    found = check_tokens({"input_ids": ids, "attention_mask": mask}, 20)
    # Joined in order, cut to the longest; what is left over goes.
    assert found.tolist() == [[0, 1, 2, 3], [4, 5, 6, 9]]
    assert check_tokens([[1, 2, 3], [4], [5, 6]], 20).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("some text", "tokens is 'some text'.*through the model's tokenizer"),
        (None, "tokens is None: must be int64"),
        (7, "tokens is 7: must be int64"),
        ({"ids": [[1]]}, "without input_ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "the shape of input_ids"),
        ({"input_ids": [[]]}, "no calibration tokens"),
        ([], "no calibration tokens"),
        ([["a", "b"]], "tokens is 'a'"),
        ([[1, 2.5]], "tokens is 1: must be"),
        (np.zeros((2, 3)), "a NumPy array of float64"),
        (torch.zeros(2, 3), "torch.float32 of shape"),
        (torch.zeros(2, 3, dtype=torch.int64).to_sparse(), "must be a dense tensor"),
        (torch.zeros(2, 3, dtype=torch.int64, device="meta"), "is on meta"),
        ({"input_ids": [[1]], "attention_mask": [["x"]]}, "shape of input_ids|must be numbers"),
        ([torch.zeros(2, 3).long(), torch.zeros(2, 4).long()], "all of one length"),
        ([[1, 2**70]], "beyond 64 bits"),
        (torch.zeros(1, 300, dtype=torch.int64), "windows of 300: the model has 256 positions"),
    ],
)
def test_other_tokens_are_refused(model, tokens, message):
    with pytest.raises(ValueError, match=message) as error:
        compress(model, tokens, width=16)
    assert "\n" not in str(error.value)


def test_a_compiled_model_is_unwrapped(model, tokens):
    expected, _ = compress(model, tokens, width=16)
    in_place = tiny_model("llama")
    in_place.load_state_dict(model.state_dict())
    in_place.compile()
    for compiled in (torch.compile(model), in_place):
        narrow, _ = compress(compiled, tokens, width=16)
        assert type(narrow) is type(model)
        assert_same(narrow, expected)


def test_models_that_are_none(model, tokens):
    layers = tiny_model("llama")
    layers.model.layers[1].to(torch.bfloat16)
    quantised = tiny_model("llama")
    quantised.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        torch.zeros(40, 24, dtype=torch.int8), requires_grad=False
    )
    headless = tiny_model("llama")
    headless.lm_head = nn.Identity()
    with torch.device("meta"):
        unloaded = tiny_model("llama")
    others = [
        ("some/model", "model is a str: must be a transformers model"),
        (nn.Linear(3, 3), "model is a Linear: must be a transformers model"),
        (model.model, "LlamaModel has no model.embed_tokens; must be a causal language model"),
        (headless, "has no lm_head; must be a causal language model"),
        (unloaded, "model.embed_tokens.weight is on meta.*--memory"),
        (layers, "layers.1.self_attn.q_proj.weight is torch.bfloat16 and"),
        (quantised, "up_proj.weight has dtype torch.int8, which is quantised"),
    ]
    for other, message in others:
        with pytest.raises(ValueError, match=message) as error:
            compress(other, tokens, width=16)
        assert "\n" not in str(error.value)
    for other, message in (others[0], others[1], others[4]):
        with pytest.raises(ValueError, match=message):
            merge_feed_forward(other, [{"input_ids": tokens}], k=2)
    for batches in ("text", tokens, [tokens], [{"input_ids": [1]}], {"input_ids": tokens}, 7):
        with pytest.raises(ValueError, match="batch"):
            merge_feed_forward(model, batches, k=2)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"width": "0.8"}, "width is '0.8': must be a finite number"),
        ({"params": float("nan")}, "params is nan"),
        ({"ff_width": [3]}, r"ff_width is \[3\]"),
        ({"width": True}, "width is True"),
        ({"steps": 1.5}, "steps 1.5: must be a whole number from 1 to 10000, or inf"),
        ({"refit": "no"}, "refit is 'no': must be True or False"),
        ({"method": ["dot"]}, r"method \['dot'\]: must be one of"),
        ({"targets": "all", "method": "dot"}, "targets is 'all'"),
        ({"targets": [0.5], "method": "dot"}, r"targets is \[0.5\]"),
        ({"width": np.array([0.5, 0.5])}, "width is a ndarray"),
        ({"statistics": 3}, "statistics is 3"),
    ],
)
def test_choices_of_other_types(model, tokens, choices, message):
    with pytest.raises(ValueError, match=message):
        compress(model, tokens, **({"width": 16} | choices))


def test_numbers_of_numpy_and_torch(model, tokens):
    expected, _ = compress(model, tokens, width=0.75, ridge=0.25)
    for width, ridge in (
        (torch.tensor(0.75), np.array(0.25)),
        (np.float64(0.75), np.float32(0.25)),
    ):
        narrow, report = compress(model, tokens, width=width, ridge=ridge)
        assert_same(narrow, expected)
        json.dumps(report)


def test_targets_as_lists_and_arrays(model, tokens):
    kept = [*range(0, 24, 2), 1, 3, 5, 7]
    expected, _ = compress(model, tokens, width=16, method="magnitude", targets=torch.tensor(kept))
    for targets in (kept, np.array(kept), np.array(kept, dtype=np.int32), tuple(kept)):
        narrow, _ = compress(model, tokens, width=16, method="magnitude", targets=targets)
        assert_same(narrow, expected)


def head_of_its_own():
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(torch.randn(259, 24))
    assert model.config.tie_word_embeddings
    return model


@pytest.mark.parametrize("choices", [{"width": 24}, {"ff_width": 40, "width": 24}])
def test_a_head_that_is_not_the_embedding_is_kept(tokens, choices):
    model = head_of_its_own()
    before = weights(model)
    narrow, report = compress(model, tokens, refit=False, self_windows=0, **choices)
    with torch.inference_mode():
        wanted, found = (m(input_ids=tokens).logits for m in (model, narrow))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert not report["tied"]
    assert not narrow.config.tie_word_embeddings
    assert model.config.tie_word_embeddings  # the caller's is as it was
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_head_of_its_own_where_the_residual_stays(tokens):
    model = tiny_model("gemma2")
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    narrow, _ = compress(model, tokens, ff_width=30)
    assert torch.equal(narrow.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(narrow.lm_head.weight, narrow.get_input_embeddings().weight)


def test_a_copy_of_the_embedding_is_tied_all_the_same(model, tokens):
    copied = tiny_model("llama")
    copied.load_state_dict(model.state_dict())
    copied.lm_head.weight = nn.Parameter(copied.lm_head.weight.detach().clone())
    assert compress(copied, tokens, width=16)[1]["tied"]


def test_too_little_text_is_said(model, tokens, caplog):
    with caplog.at_level(logging.WARNING, logger="dotresize"):
        compress(model, tokens[:1, :2], width=16, self_windows=0)
        assert "2 calibration tokens for 24 channels: give at least 12 windows of 2" in caplog.text
        caplog.clear()
        compress(model, tokens[:1], ff_width=30, self_windows=0)
        assert "32 calibration tokens for 40 inner neurons" in caplog.text
        caplog.clear()
        compress(model, tokens, width=16)
        assert caplog.text == ""


def test_autocast_around_compress_changes_nothing(model, tokens):
    expected, _ = compress(model, tokens, width=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, _ = compress(model, tokens, width=16)
    assert_same(narrow, expected)


LINES = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two {}"))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.txt", "a", "a.jsonl.gz", "a.json.gz"]
)
def test_json_lines_under_any_name(tmp_path, name):
    path = tmp_path / name
    data = LINES.encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_text(path) == ["one", "two {}"]


def test_plain_text_and_parquet(tmp_path):
    from pyarrow import Table, parquet

    (tmp_path / "a.txt").write_text("{ not json }\nmore", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == ["{ not json }\nmore"]
    (tmp_path / "a.md.gz").write_bytes(gzip.compress(b"plain"))
    assert read_text(tmp_path / "a.md.gz") == ["plain"]
    parquet.write_table(
        Table.from_pydict({"text": ["x", "y"], "n": [1, 2]}), tmp_path / "a.parquet"
    )
    assert read_text(tmp_path / "a.parquet") == ["x", "y"]
    for columns in ({"body": ["x"]}, {"text": [1]}, {"text": [None]}):
        parquet.write_table(Table.from_pydict(columns), tmp_path / "b.parquet")
        with pytest.raises(ValueError, match=r"b\.parquet: (must have a|its) column 'text'"):
            read_text(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"text": "x"}]', "is .json: must be plain text, JSON lines"),
        ("a.csv", b"text\nx\n", "is .csv: must be plain text"),
        ("a.HTML", b"<p>x</p>", "is .html: must be"),
        ("a.csv.gz", gzip.compress(b"text\nx\n", mtime=0), "is .csv: must be"),
        ("a.gz", b"no gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:20], "cannot be read"),
        ("a.txt", b'\n{"body": "x"}\n', "line 2: must be a JSON object"),
        ("a.tar", b"name\0\0text", "holds zero bytes"),
        ("a.parquet.gz", gzip.compress(b"PAR1\0", mtime=0), "holds zero bytes"),
        ("a.bin", b"\xff\xfe\x00", r"not UTF-8 \(byte 0\): must be plain text"),
        ("a.parquet", b"PAR1", "must have a column 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', "line 2: must be a JSON object"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_text(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
