"""``dotresize merge-ff --task``: models of images and of translation, as their users call it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import fails
from merge_models import build

import dotresize
from dotresize.accounting import unique_parameters
from dotresize.cli import main
from dotresize.cli.examples import TASKS

pytest.importorskip("PIL")
pytest.importorskip("sacrebleu")
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ["bag", "boot", "coat", "dress", "shirt"]
WORDS = [f"w{i}" for i in range(3, 60)]


def image_model(folder: Path) -> Path:
    model = build("vit")
    model.config.id2label = dict(enumerate(LABELS))
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(folder)
    return folder


def images(folder: Path, count: int, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    for i in range(count):
        file = folder / LABELS[i % len(LABELS)] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (9, 11), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return folder


def translation_model(folder: Path) -> Path:
    build("bart").save_pretrained(folder)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: i for i, word in enumerate(WORDS, 3)}
    own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=own,
        **{"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    ).save_pretrained(folder)
    return folder


def pairs(folder: Path, name: str, count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    files = [folder / f"{name}.{side}" for side in ("en", "de")]
    lines = [" ".join(generator.choice(WORDS, 3 + i % 9)) for i in range(count)]
    files[0].write_text("\n".join(lines) + "\n")
    files[1].write_text("\n".join(line[::-1] for line in lines) + "\n")
    return [str(file) for file in files]


@pytest.fixture
def of_images(tmp_path):
    return [
        *("merge-ff", str(image_model(tmp_path / "vit")), str(tmp_path / "out"), "--merge", "3"),
        *("--task", "image", "--calibration", str(images(tmp_path / "train", 60, 0))),
        *("--eval", str(images(tmp_path / "test", 20, 1)), "--examples", "20", "--quiet"),
    ]


@pytest.fixture
def of_pairs(tmp_path):
    return [
        *("merge-ff", str(translation_model(tmp_path / "bart")), str(tmp_path / "out")),
        *("--merge", "3", "--task", "translation"),
        *("--calibration", *pairs(tmp_path, "train", 60, 0)),
        *("--eval", *pairs(tmp_path, "test", 20, 1), "--examples", "20", "--quiet"),
    ]


def record(words: list[str]) -> dict:
    return json.loads((Path(words[2]) / "dotresize.json").read_text())


OTHERS = ("without permutation", "soft alignment", "layers dropped")


def test_images(of_images, capsys):
    assert main([*of_images, "--compare"]) == 0
    heading = capsys.readouterr().out.splitlines()[0]
    found = record(of_images)
    assert [*found["rows"]] == ["dense", "merged", *OTHERS]
    for name, row in found["rows"].items():
        assert f" {name}" in heading
        assert 0 <= row["scores"]["accuracy"] <= 100
    rows = {name: row["parameters"] for name, row in found["rows"].items()}
    assert rows["dense"] - rows["merged"] == 2 * (2 * 24 * 40 + 24 + 40)
    assert rows["merged"] == rows["soft alignment"] > rows["layers dropped"]
    loaded = dotresize.load(of_images[2])
    assert unique_parameters(loaded) == rows["merged"]
    task = TASKS["image"](of_images[1], torch.device("cpu"))
    examples = task.read("--eval", [of_images[10]])
    assert task.scores(loaded, examples) == found["rows"]["merged"]["scores"]
    assert task.scores(task.module, examples) == found["rows"]["dense"]["scores"]
    card = (Path(of_images[2]) / "README.md").read_text()
    assert "| accuracy | " in card
    assert transformers.AutoImageProcessor.from_pretrained(of_images[2]) is not None


def test_translation(of_pairs, tmp_path):
    picture = tmp_path / "profile.svg"
    assert main([*of_pairs, "--compare", "--plain", "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    found = record(of_pairs)
    assert [*found["stacks"]] == ["encoder", "decoder"]
    assert [*found["rows"]] == ["dense", "merged", *OTHERS]
    assert all([*row["scores"]] == ["BLEU", "chrF"] for row in found["rows"].values())
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(of_pairs[2])
    again, _ = dotresize.merge_feed_forward(
        transformers.AutoModelForSeq2SeqLM.from_pretrained(of_pairs[1]),
        _batches(of_pairs),
        k=3,
    )
    for name, weight in again.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight), name
    card = (Path(of_pairs[2]) / "README.md").read_text()
    assert "pipeline_tag: translation" in card
    assert "of the encoder have equal feed-forwards. Layers" in card


def _batches(words: list[str]) -> list[dict]:
    import random

    task = TASKS["translation"](words[1], torch.device("cpu"))
    examples = task.read("--calibration", words[8:10])
    random.Random(0).shuffle(examples)
    return list(task.batches(examples[:20]))


def test_pairs_are_padded_and_masked(of_pairs):
    batch = _batches(of_pairs)[0]
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert (batch["labels"][:, 0] != -100).all()
    assert (batch["labels"] == -100).any()


def test_images_in_plain_transformers(of_images):
    """Whose names of the weights are other ones in a file."""
    assert main([*of_images, "--plain", "--dtype", "bfloat16"]) == 0
    plain = transformers.AutoModelForImageClassification.from_pretrained(of_images[2])
    assert plain.dtype == torch.bfloat16
    window = record(of_images)["stacks"]["encoder"]["window"]
    first, *others = (plain.vit.layers[i].mlp.fc1.weight for i in window)
    assert all(torch.equal(first, other) for other in others)
    again = [*of_images]
    again[1], again[2] = of_images[2], f"{of_images[2]}-2"
    assert main(again) == 0  # of a model in half precision


def test_a_model_without_a_head_is_refused(of_images, capsys):
    model = transformers.AutoModelForImageClassification.from_pretrained(of_images[1])
    model.vit.save_pretrained(of_images[1])
    capsys.readouterr()  # transformers' own bars
    assert "missing keys: classifier" in fails(of_images, capsys)


def test_what_wants_languages_is_refused(of_pairs, capsys, monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "tgt_lang", None, raising=False)
    assert "bart wants to be told the languages" in fails(of_pairs, capsys)


@pytest.mark.parametrize("kind", ["of_images", "of_pairs"])
def test_recovery_is_resumed(kind, request, monkeypatch, capsys):
    """Stopped in the middle of the training, and behind it."""
    pytest.importorskip("accelerate")
    from dotresize.cli import merge_labelled

    words = [*request.getfixturevalue(kind), "--recover", "4", "--learning-rate", "0.003"]
    assert main(words) == 0
    found = record(words)
    assert found["rows"]["merged + recovery"]["recovery"]["steps"] == 4
    expected = (Path(words[2]) / "model.safetensors").read_bytes()
    words[2] += "-2"
    step, calls = transformers.Trainer.training_step, []

    def stop(*_, **__):
        raise KeyboardInterrupt

    def interrupted(*given, **others):
        calls.append(0)
        return stop() if len(calls) == 3 else step(*given, **others)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", interrupted)
        assert main(words) == 1
        patch.setattr(merge_labelled.card, "write_output", stop)
        assert main([*words, "--resume"]) == 1
    assert len(calls) == 3 + 2  # the third of four steps again, and the last
    assert "--resume goes on from it" in capsys.readouterr().err
    if kind == "of_pairs":
        file = Path(words[8])
        before = file.read_text()
        file.write_text(before.replace("w3", "w4"))
        assert "made with another examples_sha256" in fails([*words, "--resume"], capsys)
        file.write_text(before)
    assert main([*words, "--resume"]) == 0
    assert (Path(words[2]) / "model.safetensors").read_bytes() == expected
    assert not Path(f"{words[2]}.partial").exists()


def test_without_texts_to_score_on_what_is_left_is_taken(of_images, capsys):
    at = of_images.index("--eval")
    del of_images[at : at + 2]
    assert main([*of_images, "--eval-examples", "7"]) == 0
    assert record(of_images)["rows"]["dense"]["examples"] == 7
    capsys.readouterr()
    of_images[2] += "-2"
    of_images[of_images.index("20")] = "60"
    assert "--examples 60: leaves none of 60 to score on" in fails(of_images, capsys)


def _replaced(words: list[str], option: str, *values: str) -> list[str]:
    at = words.index(option) + 1
    end = next(i for i in range(at, len(words)) if words[i].startswith("--"))
    return [*words[:at], *values, *words[end:]]


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--task", ["sound"], "--task 'sound': must be one of lm, image, translation"),
        ("--merge", ["9"], "--merge 9: must be 2 to 8, the layers of the encoder"),
        ("--calibration", ["nowhere"], "--calibration nowhere: must be a folder with a folder"),
        ("--examples", ["0"], "--examples 0: must be at least 1"),
    ],
)
def test_refusals_of_images(option, values, message, of_images, capsys):
    assert message in fails(_replaced(of_images, option, *values), capsys)
    assert not list(Path(of_images[2]).parent.glob("out*"))


def test_refusals_of_images_that_are_none(of_images, capsys, tmp_path):
    (tmp_path / "empty" / "bag").mkdir(parents=True)
    words = _replaced(of_images, "--calibration", str(tmp_path / "empty"))
    assert "holds no images in a folder for each label" in fails(words, capsys)
    images(tmp_path / "others", 5, 0)
    (tmp_path / "others" / "coat").rename(tmp_path / "others" / "hat")
    words = _replaced(of_images, "--eval", str(tmp_path / "others"))
    assert "hat: is none of the model's labels: bag, boot" in fails(words, capsys)
    (tmp_path / "test" / "bag" / "0.png").write_bytes(b"no image")
    assert "0.png: is no image: cannot identify" in fails(of_images, capsys)
    for option in ("--windows", "--window"):
        line = fails([*of_images, option, "20"], capsys)
        assert f"{option}: does nothing with --task image" in line
    train = of_images[8]
    assert "is given twice" in fails(_replaced(of_images, "--calibration", train, train), capsys)
    assert not list(Path(of_images[2]).parent.glob("out*"))


def test_refusals_of_pairs(of_pairs, capsys, tmp_path):
    one, two = of_pairs[8:10]
    line = fails(_replaced(of_pairs, "--calibration", one), capsys)
    assert "--calibration: must be two files, whose lines translate each other, not 1" in line
    short = tmp_path / "short.de"
    short.write_text("w3\n")
    line = fails(_replaced(of_pairs, "--calibration", one, str(short)), capsys)
    assert "has 60 lines" in line
    assert "has 1: line i" in line
    binary = tmp_path / "binary.de"
    binary.write_bytes(b"\xff\xfe\x00")
    line = fails(_replaced(of_pairs, "--calibration", one, str(binary)), capsys)
    assert "binary.de: is no text in UTF-8" in line
    line = fails(_replaced(of_pairs, "--eval", one, str(tmp_path / "none")), capsys)
    assert "none: No such file" in line
    of_pairs[of_pairs.index("--task") + 1] = "image"
    assert "must be a folder" in fails(of_pairs, capsys)
    assert not list(Path(of_pairs[2]).parent.glob("out*"))
    assert two.endswith("train.de")


def test_examples_are_of_labelled_tasks(arguments, capsys):
    words = ["merge-ff", *arguments[1:3], "--merge", "2", *arguments[5:], "--examples", "3"]
    assert "--examples: does nothing with --task lm" in fails(words, capsys)
