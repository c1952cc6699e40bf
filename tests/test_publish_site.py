"""The site is built without a link that leads nowhere; gallery and notebooks are today's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import PATIENCE
from nbclient import NotebookClient
from test_examples import HELPERS

from publish import gallery

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def build(root: Path, out: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-f", root / "publish" / "mkdocs.yml", "-d", out],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_site_is_built_with_every_page(tmp_path):
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    wanted = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    wanted |= {f"gallery/{path.stem}.html" for path in (ROOT / "examples").glob("*.py")}
    wanted |= {"index.html", "gallery/index.html", "notebooks/align.html", "notebooks/narrow.html"}
    assert wanted <= pages, wanted - pages
    shown = (tmp_path / "gallery" / "index.html").read_text(encoding="utf-8")
    for name in gallery.DRAWINGS:
        assert f'src="{name}.svg"' in shown
        assert (tmp_path / "gallery" / f"{name}.svg").is_file()
    # Notebooks are not among what mkdocs looks for dead links in.
    for page in tmp_path.rglob("*.html"):
        for link in re.findall(r'href="([\w./-]+)', page.read_text(encoding="utf-8")):
            if not link.startswith(("/", "http")) and page.name != "404.html":
                assert (page.parent / link).exists(), (page, link)
    # A page of the repository is linked as a page of the site.
    first = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="gallery/index.html"' in first
    assert 'href="docs/' not in first


def test_links_that_lead_nowhere_end_the_build(tmp_path):
    links = ["nowhere.md", "sinkhorn.md#nowhere", "../examples/nowhere_else.py"]
    for name in ("docs", "publish", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.rmtree(tmp_path / "docs" / "notebooks")
    config = tmp_path / "publish" / "mkdocs.yml"
    lines = config.read_text().splitlines()
    config.write_text("\n".join(line for line in lines if "otebooks" not in line))
    for path in ROOT.glob("*.md"):
        shutil.copy(path, tmp_path)
    page = tmp_path / "docs" / "ot.md"
    page.write_text(page.read_text() + "".join(f"\n[there]({link})\n" for link in links))
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    for found in ("'nowhere.md'", "#nowhere", "nowhere_else.md"):
        assert found in done.stderr


def test_every_example_has_its_picture():
    examples = {path.stem for path in (ROOT / "examples").glob("*.py") if path.name not in HELPERS}
    assert examples == set(gallery.DRAWINGS)
    assert examples == {path.stem for path in (ROOT / "docs" / "gallery").glob("*.svg")}


def test_a_picture_is_what_the_example_draws(tmp_path, one_thread):
    """Its words, and which bar is how long; digits may differ between machines."""
    name = "model_averaging"
    drawn, kept = (
        re.findall(r">([^<>\n]+)</text>", path.read_text())
        for path in (gallery.draw(name, tmp_path), ROOT / "docs" / "gallery" / f"{name}.svg")
    )
    words = [[text for text in texts if not re.search(r"\d", text)] for texts in (drawn, kept)]
    assert words[0] == words[1]
    shares = [[float(t.split()[0]) for t in texts if t.endswith(" %")] for texts in (drawn, kept)]
    assert len(shares[0]) == 3
    assert all(abs(one - other) < 5 for one, other in zip(*shares, strict=True))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, model_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in out.get("data", {}) for cell in code for out in cell.outputs) >= 1
    for cell in code:
        # A tiny model, and windows as long as its positions are.
        source = re.sub('MODEL = ".*"', f"MODEL = {str(model_directory)!r}", cell.source)
        cell.source = re.sub(r"\b512\b", "64", source)
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=PATIENCE, kernel_name="python3", resources=folder).execute()
    pictures = [out for cell in code for out in cell.outputs if "image/png" in out.get("data", {})]
    assert pictures
