"""The HTML page: self-contained, complete, and without an error in a browser."""

from __future__ import annotations

import json
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
    headings = ("Perplexity by method", "Lost by each feed-forward", "Variance lost", "Spectrum")
    for heading in (*headings, "The map", "Time by stage"):
        assert f"<h2>{heading}" in text
    assert text.count("<svg") == 6
    assert "<td>perplexity, topics</td>" in text
    assert "<td>perplexity, other, unseen</td>" in text
    assert "perplexity, unseen kinds</text>" in text
    for name in ("dense", "magnitude", "PCA", "transport", "transport + refit"):
        assert f"<th>{name}</th>" in text
    assert re.search(r"<pre>dotresize compress .* --width 16 --compare .*</pre>", text)


def written_numbers(svg: str) -> list[str]:
    """Everything along the axes of a picture that is no word."""
    words = re.findall(r"<text[^>]*>(.*?)</text>", svg, re.DOTALL)
    return [word for word in words if not re.search("[A-Za-z]{2}", re.sub("<.*?>", "", word))]


def test_of_a_feed_forward_alone_no_map_is_drawn(arguments, tmp_path, capsys):
    i = arguments.index("--width")
    words = [*arguments[:i], *arguments[i + 2 :], "--ff-width", "28"]
    assert main([*words, "--compare", "--report", str(tmp_path / "page")]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "page" / "index.html").read_text()
    for absent in ("Spectrum", "Variance lost", "The map", "against size"):
        assert absent not in text
    assert "<h2>Lost by each feed-forward" in text
    assert text.count("<svg") == 3
    names = [f"feed-forward, {name}" for name in ("eliminate", "nystrom", "magnitude", "transport")]
    wanted = ["dense", *names, "feed-forward, eliminate + refit"]
    assert re.findall("<th>([^<]+)</th>", text) == wanted
    report = json.loads((Path(arguments[2]) / "dotresize.json").read_text())
    rows = [*report["compared"], report]
    kl = [row["kl"]["topics"] for row in rows[1:]]
    assert len(set(kl)) == 5
    assert min(kl) > 1e-4
    assert len({row["parameters"]["narrow"]["total"] for row in rows[1:]}) == 1
    for row in rows[1:]:
        assert len(row["feed_forward_lost"]) == 3
        assert min(row["feed_forward_lost"]) > 1e-4
    for stage in ("sinkhorn", "recovery", "self-generated text", "calibration", "cost"):
        assert f"seconds, {stage}" not in printed.replace("seconds, self-generated text", "")
    assert "seconds, refit" in printed


def test_axes_have_plain_numbers(page):
    numbers = written_numbers(page.read_text())
    assert len(numbers) > 30
    for number in numbers:
        assert re.fullmatch(r"[-\u2212]?[\d.]+", number), number


def test_nothing_is_compared_where_nothing_is_cut(arguments, tmp_path, caplog, capsys):
    caplog.set_level("INFO", logger="dotresize")
    arguments[arguments.index("--width") + 1] = "1"
    assert main([*arguments, "--compare", "--report", str(tmp_path / "page")]) == 0
    assert "nothing was cut" in caplog.text
    assert capsys.readouterr().out.splitlines()[0].split() == ["dense", "transport", "+", "refit"]
    text = (tmp_path / "page" / "index.html").read_text()
    for absent in ("Spectrum", "Variance lost", "The map", "against size"):
        assert absent not in text


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
        *(["magnitude", "PCA", "transport", "transport + refit"] * 2),
    ]
    text = (tmp_path / "sweep" / "index.html").read_text()
    assert text.count("<svg") == 2
    assert "Perplexity against size" in text
    assert "residual width</text>" in text
    assert "feed-forward width</text>" not in text  # the same everywhere
    for number in written_numbers(text):
        assert re.fullmatch(r"[-\u2212]?[\d.]+", number), number
    assert "exists and is not empty" in fails(words, capsys)
    wrong = [*words[:2], str(tmp_path / "wrong"), words[3], "0.8", "25", *words[6:]]
    assert "width 25: must be a whole number up to the model's 24" in fails(wrong, capsys)
    mixed = [*words[:2], str(tmp_path / "mixed"), "--widths", "1", "16", *words[6:]]
    capsys.readouterr()
    assert main([*mixed, "--ff-width", "28"]) == 0
    names = re.findall("<th>([^<]+)</th>", (tmp_path / "mixed" / "index.html").read_text())
    assert names == [
        "dense",
        *(f"feed-forward, {name}" for name in ("eliminate", "nystrom", "magnitude", "transport")),
        "feed-forward, eliminate + refit",
        *("magnitude", "PCA", "transport", "transport + refit"),
    ]
    without = [*words[:2], str(tmp_path / "other"), *words[3:8], *SMALL]
    assert main(without) == 0
    assert "perplexity, topics (held out)" in (tmp_path / "other" / "index.html").read_text()
