"""Mistakes on the command line: one line each that says what, where and what would be accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import copy_of, fails

from dotresize.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--width", "25", "width 25: must be a whole number up to the model's 24"),
        ("--width", "0", "--width 0: must be a share in (0, 1]"),
        ("--width", "-3", "--width -3: must be a share in (0, 1]"),
        ("--width", "wide", "argument --width"),
        ("--method", "svd", "must be one of dot, pca, magnitude, slicegpt"),
        ("--energy", "1.5", "energy 1.5: must be a share"),
        ("--params", "0.8", "give --params or --width, not both"),
        ("--params", "1.5", "params 1.5: must be a share"),
        ("--params-count", "all", "must be one of total, non_embedding"),
        (
            "--params-count",
            "non_embedding",
            "--params-count non_embedding: does nothing without --params",
        ),
        (
            "--ff-method",
            "nystrom",
            "--ff-method nystrom: does nothing without --ff-width or --params",
        ),
        ("--ff-width", "41", "--ff-width 41: must be a whole number up to the model's 40"),
        ("--ff-method", "prune", "must be one of eliminate, nystrom, magnitude, transport"),
        ("--steps", "0", "--steps 0: must be a whole number from 1 to 10000, or inf"),
        ("--targets", "nowhere.json", "nowhere.json: no such file"),
        ("--factor", "svd", "must be one of polar, qr"),
        ("--reg", "0", "reg 0: must be positive"),
        ("--ridge", "-1", "ridge -1: must be"),
        ("--seed", str(10**30), "must fit in 64 bits"),
        ("--device", "meta", "must be auto, cpu or cuda"),
        ("--windows", "0", "--windows 0: must be at least one for each of the 1"),
        ("--preset", "quick", "--preset 'quick': must be one of fast, balanced, best"),
        ("--window", "1", "--window 1"),
        ("--window", "100000", "--window 100000: the model has 256 positions"),
        ("--eval-windows", "0", "--eval-windows 0"),
        ("--device", "abacus", "--device abacus"),
        ("--backend", "cublas", "must be one of auto, triton, cpp, torch"),
        ("--calibration", "nowhere.txt", "nowhere.txt does not exist"),
        ("--eval", "nowhere.txt", "nowhere.txt does not exist"),
    ],
)
def test_bad_options(arguments, capsys, option, value, message):
    assert message in fails([*arguments, option, value], capsys)
    assert not Path(arguments[2]).exists()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.txt", "a.txt is empty"),
        (b" \n\n ", "a.txt", "a.txt is empty"),
        (b"short", "a.txt", "has 5 tokens: one window takes 32"),
        (b"caf\xe9 " * 100, "a.txt", "not UTF-8 (byte 3)"),
        (b'{"text": "x"}\n{"body": 1}\n', "a.jsonl", "a.jsonl line 2: must be a JSON object"),
        (b"not json\n", "a.jsonl", "a.jsonl line 1"),
    ],
)
def test_bad_calibration_text(arguments, capsys, tmp_path, content, name, message):
    path = tmp_path / name
    path.write_bytes(content)
    arguments[arguments.index("--calibration") + 1] = str(path)
    assert message in fails(arguments, capsys)


def test_missing_words(capsys, model_directory):
    assert "required: verb" in fails([], capsys)
    assert "invalid choice" in fails(["shrink"], capsys)
    assert "--calibration" in fails(["compress", str(model_directory), "out"], capsys)


def test_a_collapsed_span(arguments, capsys):
    assert "its span has collapsed" in fails(
        [*arguments, "--method", "dot", "--reg", "1e15"], capsys
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[0, 1", "must be a JSON list of neuron numbers"),
        ('{"kept": [1]}', "must be a JSON list of neuron numbers"),
        ("[0.5, 1]", "must be a JSON list of neuron numbers"),
        ("[" + "9" * 30 + "]", "must be a JSON list of neuron numbers"),
        ("[0, 1, 2]", "3 neurons are named, the new width is 16"),
        (str([*range(15), 24]), "neuron 24 is not one of the model's 24"),
        (str([*range(15), 0]), "neuron 0 is named twice"),
    ],
)
def test_bad_targets(arguments, capsys, tmp_path, content, message):
    path = tmp_path / "kept.json"
    path.write_text(content)
    assert message in fails([*arguments, "--method", "dot", "--targets", str(path)], capsys)
    assert not Path(arguments[2]).exists()


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bad_models(arguments, capsys, tmp_path, model_directory):
    def message(model: object) -> str:
        arguments[1] = str(model)
        return fails(arguments, capsys)

    assert "no such directory" in message(tmp_path / "absent")
    assert "no such file" in message(tmp_path / "absent.gguf")
    (tmp_path / "junk.gguf").write_bytes(b"GGUF but not really")
    assert "junk.gguf" in message(tmp_path / "junk.gguf")
    (tmp_path / "hollow").mkdir()
    assert "without config.json" in message(tmp_path / "hollow")
    gpt = copy_of(model_directory, tmp_path / "gpt")
    change_config(gpt, model_type="bloom")
    assert "'bloom' is not supported; supported: gemma, gemma2" in message(gpt)
    pickled = copy_of(model_directory, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "no file named model.safetensors" in message(pickled)
    cut = copy_of(model_directory, tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cut: model.safetensors: " in message(cut)
    wrong = copy_of(model_directory, tmp_path / "wrong")
    change_config(wrong, intermediate_size=41)
    assert "config asks for (41, 24)" in message(wrong)
    deeper = copy_of(model_directory, tmp_path / "deeper")
    change_config(deeper, num_hidden_layers=4)
    assert "config asks for 4 layers, 3 are stored" in message(deeper)


def test_nan_weights_are_named(arguments, capsys, tmp_path, model_directory):
    from safetensors.torch import load_file, save_file

    bad = copy_of(model_directory, tmp_path / "nan")
    weights = load_file(bad / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][0, 0] = torch.inf
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    arguments[1] = str(bad)
    assert "model.layers.1.self_attn.o_proj.weight" in fails(arguments, capsys)


def test_output_must_be_new(arguments, capsys, tmp_path):
    out = Path(arguments[2])
    out.mkdir()
    (out / "precious").write_text("data")
    assert "exists and is not empty" in fails(arguments, capsys)
    assert (out / "precious").read_text() == "data"
    (out / "precious").unlink()
    assert main(arguments) == 0  # an empty directory is fine
    capsys.readouterr()
    for name, message in (("x" * 300, "File name too long"), ("link", "symbolic link")):
        (tmp_path / "link").is_symlink() or (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        arguments[2] = str(tmp_path / name)
        assert message in fails(arguments, capsys)
    arguments[2] = str(tmp_path / "file")
    Path(arguments[2]).write_text("data")
    assert "a file of that name exists" in fails(arguments, capsys)
