"""Damaged and malicious model directories: one line, no crash, nothing read from elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import copy_of, fails
from safetensors.torch import load_file, save_file

from dotresize.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def sharded(model_directory, tmp_path) -> Path:
    folder = copy_of(model_directory, tmp_path / "sharded")
    weights = load_file(folder / "model.safetensors")
    names, where = sorted(weights), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        part = {name: weights[name] for name in names[i::3]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def rename_second(folder: Path, name: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    renamed = {key: name if file == SECOND else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": renamed}))


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder: Path) -> None:
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data[: len(data) // 2])


def outside(folder: Path) -> None:
    shutil.move(folder / SECOND, folder.parent / "stolen.safetensors")
    rename_second(folder, "../stolen.safetensors")


def absolute(folder: Path) -> None:
    shutil.move(folder / SECOND, folder.parent / "stolen.safetensors")
    rename_second(folder, str(folder.parent / "stolen.safetensors"))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / SECOND), folder / "second.bin")
    rename_second(folder, "second.bin")


def endless_header(folder: Path) -> None:
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes((2**40).to_bytes(8, "little") + data[8:])


def no_table(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        left = {name: x for name, x in weights.items() if "embed_tokens" not in name}
        save_file(left, path, metadata={"format": "pt"})


def code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Config"})


def test_shards_are_read(sharded, arguments):
    arguments[1] = str(sharded)
    assert main(arguments) == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, SECOND),
        (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing"),
        (outside, "names '../stolen.safetensors', which is not in the directory"),
        (absolute, "stolen.safetensors', which is not in the directory"),
        (pickled, "names 'second.bin': must be safetensors"),
        (endless_header, f"{SECOND}: "),
        (lambda folder: (folder / INDEX).write_text("[1, 2]"), "has no weight_map"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 1}}'), "no weight_map"),
        (lambda folder: change_config(folder, num_hidden_layers=10**6), "asks for 1000000 layers"),
        (lambda folder: change_config(folder, num_hidden_layers=-3), "asks for -3 layers, 3 are"),
        (lambda folder: change_config(folder, num_hidden_layers="three"), "num_hidden_layers"),
        (
            lambda folder: change_config(folder, hidden_size=10**9),
            "config asks for (259, 1000000000)",
        ),
        (lambda folder: change_config(folder, hidden_size=28), "config asks for (259, 28)"),
        (lambda folder: change_config(folder, vocab_size=10**12), "is stored as (259, 24)"),
        (lambda folder: change_config(folder, num_attention_heads=0), "sharded: "),
        (lambda folder: (folder / "config.json").write_text("[]"), "sharded: "),
        (no_table, "missing keys"),
        (code, "sharded: "),
    ],
)
def test_damage_is_named_in_one_line(damage, message, sharded, arguments, capsys):
    damage(sharded)
    before = sorted(sharded.parent.rglob("*"))
    arguments[1] = str(sharded)
    assert message in fails(arguments, capsys)
    assert sorted(sharded.parent.rglob("*")) == before


def test_the_single_file_is_what_is_read(sharded, model_directory, arguments):
    """As in transformers, whatever an index beside it says."""
    shutil.copy(model_directory / "model.safetensors", sharded)
    (sharded / SECOND).unlink()
    arguments[1] = str(sharded)
    assert main(arguments) == 0
