"""What importing costs, and that the folder ``kernels`` shadows nobody."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import dotresize

ROOT = Path(__file__).parent.parent
# What a fragment begins with, and what a property may.
_NOUNS = {"The", "A", "An", "All", "Whether", "What", "Names", "How"}
_NO_VERBS = _NOUNS | {"Of", "As", "By", "In", "On", "With", "From", "For", "Both", "Those", "Which"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
_DESCRIBED = {"property", "cached_property", "abstractmethod"}
_TEXTS = {".md", ".py", ".cpp", ".hpp"}
# A file in a folder of this repository.
_NAMED = re.compile(
    r"(?<![\w/.])((?:dotresize|kernels|csrc|benchmarks|tests|examples|docs|ops|ot|models|offload"
    r"|calibration|narrow|merging|baselines|cli)/[\w/]*\w\.(?:py|cpp|hpp|md|svg|jsonl))\b"
)


def test_kernels_folder_does_not_shadow_hugging_face(run_python):
    """From the repository root, where ``import kernels`` finds this project's folder."""
    done = run_python(
        "import sys; sys.path.insert(0, '.')\n"
        "import transformers, dotresize.kernels, kernels\n"
        "from transformers import AutoModelForCausalLM\n"
        "from dotresize.kernels import l1_cost, sinkhorn\n"
        "assert dotresize.kernels.__name__ == 'dotresize.kernels'\n"
        "print(kernels.__name__, kernels.__version__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kernels ")


def test_the_real_kernels_package_is_handed_over(run_python, tmp_path):
    real = tmp_path / "kernels"
    real.mkdir()
    (real / "__init__.py").write_text("from kernels.part import value\n__version__ = '9.9'\n")
    (real / "part.py").write_text("value = 5\n")
    done = run_python(
        f"import sys; sys.path[:0] = ['.', {str(tmp_path)!r}]\n"
        "import kernels\nprint(kernels.__version__, kernels.value, kernels.__file__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["9.9", "5", str(real / "__init__.py")]


def test_import_is_light(run_python):
    done = run_python(
        "import sys, numpy, torch\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import dotresize\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} - before))"
    )
    assert done.stdout.strip() == "['dotresize']", done.stdout + done.stderr


def test_public_names_exist():
    for name in dotresize.__all__:
        assert getattr(dotresize, name) is not None


def test_figures_in_pages_come_from_committed_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.tables.__main__ import TABLES, with_tables

    for page in TABLES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert with_tables(page, text) == text, f"{page}: run python -m benchmarks.tables"


def test_docstrings_say_what_is_done():
    """A function's first line begins with a verb in the imperative, no other with a preposition."""
    fragments = []
    for folder in ("dotresize", "kernels", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, _DOCUMENTED) or not ast.get_docstring(node):
                    continue
                first = ast.get_docstring(node).split()[0]
                described = not isinstance(node, ast.FunctionDef) or bool(
                    {ast.unparse(d) for d in node.decorator_list} & _DESCRIBED
                )
                small = isinstance(node, ast.FunctionDef) and not first[0].isupper()
                if first in _NO_VERBS - (_NOUNS if described else set()) or small:
                    where = getattr(node, "name", "module")
                    fragments.append(f"{path.relative_to(ROOT)} {where}: {first}")
    assert fragments == []


def test_files_that_pages_name_exist():
    """Paths and modules of this repository, wherever a page, a docstring or a comment names one."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    folders = ("dotresize", "kernels", "csrc", "benchmarks")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    texts = {p: p.read_text("utf-8") for p in [*pages, *sources] if p.suffix in _TEXTS}
    named = [(path, name) for path, text in texts.items() for name in _NAMED.findall(text)]
    assert len(named) > 60
    missing = [
        (path.name, name)
        for path, name in named
        if not any((f / name).exists() for f in (ROOT, ROOT / "dotresize", path.parent))
    ]
    assert missing == []


def test_commands_that_pages_name_exist():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / "benchmarks").rglob("*.py")]
    commands = {
        m for p in pages for m in re.findall(r"-m (benchmarks[\w.]*)", p.read_text("utf-8"))
    }
    assert len(commands) > 10
    for command in commands:
        path = ROOT / command.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), command


def test_files_stay_readable():
    """One idea a file: at 400 lines there are likely two."""
    sources = [
        path
        for folder, pattern in (("dotresize", "*.py"), ("kernels", "*.py"), ("csrc", "*.[ch]pp"))
        for path in (ROOT / folder).rglob(pattern)
    ]
    assert len(sources) > 20
    too_long = [p.name for p in sources if len(p.read_text("utf-8").splitlines()) > 400]
    assert too_long == []
