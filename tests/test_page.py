"""The HTML page: self-contained, complete, and without an error in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import PATIENCE, fails

from dotresize.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
SMALL = ("--window", "32", "--windows", "8", "--eval-windows", "4", "--quiet")


@pytest.fixture(scope="module")
def page(model_directory, text_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    words = ["compress", str(model_directory), str(folder / "out"), "--width", "16", "--compare"]
    other = folder / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    words += ["--calibration", str(text_file), "--eval", str(text_file), *SMALL]
    words += ["--unseen", str(other)]
    assert main([*words, "--report", str(folder / "report")]) == 0
    return folder / "report" / "index.html"


class _Links(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        fetched = ("src", "href", "xlink:href", "srcset")
        self.found += [
            v for k, v in attributes if k in fetched and not v.startswith(("#", "data:"))
        ]


def test_the_page_is_whole_and_fetches_nothing(page):
    text = page.read_text()
    links = _Links()
    links.feed(text)
    assert links.found == []
    assert "<script" not in text
    for heading in ("Perplexity against size", "Variance lost", "Spectrum", "The map", "Time by"):
        assert heading in text
    assert text.count("<svg") == 5
    assert "<td>perplexity, topics</td>" in text
    assert "<td>perplexity, other, unseen</td>" in text
    assert "perplexity, unseen kinds</text>" in text
    for name in ("dense", "magnitude", "PCA", "transport", "PCA + refit"):
        assert f"<th>{name}</th>" in text
    assert re.search(r"<pre>dotresize compress .* --width 16 --compare .*</pre>", text)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_finds_no_error(page, tmp_path):
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *("--window-size=1100,2400", f"--screenshot={picture}", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert picture.stat().st_size > 20_000


def test_the_page_has_a_directory_of_its_own(model_directory, text_file, tmp_path, capsys):
    words = ["compress", str(model_directory), str(tmp_path / "out"), "--width", "16"]
    words += ["--calibration", str(text_file), *SMALL, "--report"]
    assert "must not be or hold the output" in fails([*words, str(tmp_path / "." / "out")], capsys)
    assert "a file of that name exists" in fails([*words, str(text_file)], capsys)
    assert not (tmp_path / "out").exists()


def test_sweep(model_directory, text_file, tmp_path, capsys):
    words = ["sweep", str(model_directory), str(tmp_path / "sweep"), "--widths", "0.8", "12"]
    words += ["--calibration", str(text_file), "--eval", str(text_file), *SMALL]
    assert main(words) == 0
    heading = capsys.readouterr().out.splitlines()[0].split("  ")
    assert [name.strip() for name in heading if name.strip()] == [
        "dense",
        *(["magnitude", "PCA", "transport", "PCA + refit"] * 2),
    ]
    text = (tmp_path / "sweep" / "index.html").read_text()
    assert text.count("<svg") == 2
    assert "exists and is not empty" in fails(words, capsys)
    wrong = [*words[:2], str(tmp_path / "wrong"), words[3], "0.8", "11", *words[6:]]
    assert "width 11: must be a whole number" in fails(wrong, capsys)
    without = [*words[:2], str(tmp_path / "other"), *words[3:8], *SMALL]
    assert main(without) == 0
    assert "perplexity, topics (held out)" in (tmp_path / "other" / "index.html").read_text()
