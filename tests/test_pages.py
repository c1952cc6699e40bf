"""The code blocks of README and guides: Python runs, commands are taken, on a tiny model."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

from benchmarks.llama_cpp import picture
from benchmarks.rows import read

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# What a page's first sentences take for granted.
GIVEN = """
import torch
from dotresize import *
layers, x = 2, torch.randn(2, 40, 12)
kept = torch.arange(6)
costs, reg = torch.rand(3, 6, 5), 0.1
changed = costs + 0.01
cost = torch.rand(6, 6)
correlation = torch.rand(6, 6)
result = sinkhorn(torch.rand(12, 6), 0.1)
"""
# Commands that need no model, and that other tests, or installations, run.
LEFT_OUT = ("pip install", "make ", "torchrun", "python -m benchmarks", "npm ", "llama-")
# Commands that make what those after them read.
BEFORE = ("python -c", "head ", "tail ")
# Pages whose Python stands alone.
FIRST = ("README.md", "compress.md")


def blocks(*languages: str) -> list[pytest.param]:
    return [
        pytest.param(text, id=f"{page.name}-{i}")
        for page in PAGES
        if page.name != "api.md"  # its blocks are docstrings; see test_doctests.py
        for i, (language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if language in languages
    ]


@pytest.fixture
def folder(model_directory, text_file, tmp_path) -> Path:
    """A folder with everything that pages name: a model, texts, a list of neurons."""
    shutil.copytree(model_directory, tmp_path / "MODEL")
    long = text_file.read_text(encoding="utf-8")
    for name in ("wiki.txt", "held-out.txt"):
        (tmp_path / name).write_text(long, encoding="utf-8")
    for name in ("wiki.jsonl", "news.jsonl"):
        (tmp_path / name).write_text('{"text": "%s"}\n' % ("many words " * 400), encoding="utf-8")
    (tmp_path / "FILE").write_text("[0, 1, 2, 3]")
    return tmp_path


def test_every_block_says_what_it_is():
    found = [language for page in PAGES for language, _ in BLOCK.findall(page.read_text("utf-8"))]
    assert len(found) > 12
    assert set(found) <= {"python", "sh", "text"}


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_run(text, folder, request):
    given = "" if request.node.callspec.id.startswith(FIRST) else GIVEN
    if "vit" in text:  # three lines about a model that the page describes
        text = VIT + text
    text = text.replace("512", "64")
    done = subprocess.run(
        [sys.executable, "-c", given + text],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr


VIT = """
import transformers
images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
vit = transformers.ViTForImageClassification(transformers.ViTConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2,
    image_size=8, patch_size=4, num_channels=1, num_labels=5))
accuracy = lambda m: float((m(pixel_values=images).logits.argmax(-1) == labels).double().mean())
"""


def commands() -> list[pytest.param]:
    """The commands of one block belong together, in order."""
    found = []
    for block in blocks("sh"):
        lines = [line.partition("#")[0].strip() for line in block.values[0].splitlines()]
        lines = [line for line in lines if line and not line.startswith(LEFT_OUT)]
        assert all(line.startswith(("dotresize ", *BEFORE)) for line in lines), lines
        if lines:
            found.append(pytest.param(lines, id=block.id))
    return found


def make_examples(task: str) -> None:
    """Make a tiny model of a task, and data, by the names that the pages have."""
    from test_merge_tasks import image_model, images, pairs, translation_model

    here = Path()
    if task == "image":
        image_model(here / "VIT")
        images(here / "train", 20, 0)
        images(here / "test", 10, 1)
    else:
        translation_model(here / "MARIAN")
        pairs(here, "train", 20, 0)
        pairs(here, "test", 10, 1)


@pytest.mark.parametrize("lines", commands())
def test_commands_are_taken(lines, folder, monkeypatch, one_thread):
    """The commands run as written, but for a hub's model, and sizes that a tiny model has not."""
    from dotresize.cli import main

    monkeypatch.chdir(folder)
    for line in lines:
        if line.startswith(BEFORE):
            command = line.replace("python", shlex.quote(sys.executable), 1)
            subprocess.run(command, shell=True, check=True, timeout=PATIENCE)
            continue
        words = shlex.split(line.replace("HuggingFaceTB/SmolLM2-135M", "MODEL"))[1:]
        words = ["2" if word == "10" and "--merge" in words else word for word in words]
        if "--task" in words:
            make_examples(words[words.index("--task") + 1])
        elif words[0] in ("compress", "merge-ff", "eval"):
            words += ["--window", "32", "--eval-windows", "2"]
        if words[0] in ("compress", "merge-ff") and "--task" not in words:
            words += ["--windows", "8"]
        assert main(words) == 0, line


def test_the_picture_of_sizes_is_of_the_committed_rows(tmp_path):
    rows = read(ROOT / "benchmarks" / "results" / "llama_cpp.jsonl")
    picture.chart([row for row in rows if row["run"] == rows[-1]["run"]], tmp_path / "bits.svg")
    texts = [
        re.findall(r">([^<>\n]+)</text>", path.read_text())
        for path in (tmp_path / "bits.svg", ROOT / "docs" / "bits.svg")
    ]
    assert texts[0] == texts[1]
    assert {"dense", "--params 0.8 --search", "Q4_K_M"} <= set(texts[0])
