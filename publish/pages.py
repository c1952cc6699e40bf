"""What the site has beside docs/: README as its first page, and a page for each example.

mkdocs calls the functions named on_...; see publish/mkdocs.yml. Links that lead to files of the
repository lead to their pages, so that `mkdocs build --strict` finds what leads nowhere.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
TEXTS = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
# What pages call files of the repository, and where the site has them; None for nowhere.
MOVED: list[tuple[str, str | None]] = [
    (r"(?:\.\./)?examples/(\w+)\.py", r"gallery/\1.md"),
    (r"(?:\.\./)?examples/?", "gallery/index.md"),
    *((rf"(?:\.\./)?{name.replace('.', '[.]')}", page) for name, page in TEXTS.items()),
    (r"docs/(.*?)", r"\1"),
    (r"(?:\.\./)?(?:benchmarks|tests|csrc|dotresize|kernels)/.*?", None),
    (r"(?:CITATION\.cff|LICENSE)", None),
]
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add pages that are made, and leave out what is no page."""
    for name, page in TEXTS.items():
        files.append(_made(config, page, (ROOT / name).read_text(encoding="utf-8")))
    entries = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        title, page = _example(path)
        files.append(_made(config, f"gallery/{path.stem}.md", page))
        if _picture(path).is_file():
            entries += [f"## [{title}]({path.stem}.md)", f"[![]({path.stem}.svg)]({path.stem}.md)"]
    about = "Published methods with this library in their matching step; `make test` runs all."
    files.append(_made(config, "gallery/index.md", "\n\n".join(["# Gallery", about, *entries])))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return a page whose links lead to pages of the site."""
    if page.file.src_uri.endswith(".ipynb"):
        return markdown
    below = "../" * page.file.src_uri.count("/")

    def one(found: re.Match) -> str:
        text, where, anchor = found[1], found[2], found[3] or ""
        for pattern, page_of in MOVED:
            match = re.fullmatch(pattern, where)
            if match:
                return (
                    text if page_of is None else f"[{text}]({below}{match.expand(page_of)}{anchor})"
                )
        return found[0]

    return _LINK.sub(one, markdown)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Return a notebook's page with links to pages: its plugin leaves them as they are."""
    if not page.file.src_uri.endswith(".ipynb"):
        return output
    return re.sub(r'href="([\w./-]+)\.md(#[^"]*)?"', r'href="\1.html\2"', output)


def _made(config: Any, name: str, text: str) -> File:
    return File.generated(config, name, content=text)


def _picture(path: Path) -> Path:
    return ROOT / "docs" / "gallery" / f"{path.stem}.svg"


def _example(path: Path) -> tuple[str, str]:
    """Return the title and the page of an example: its docstring, its picture and its code."""
    code = path.read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(code)) or ""
    first, _, rest = about.partition("\n")
    title, _, said = first.partition(":")
    title = title.strip(".").replace("``", "`")
    rest = f"{said.strip()}\n{rest}".replace("``", "`").strip()
    body = code.split('"""', 2)[2].strip()
    picture = [f"![]({path.stem}.svg)"] if _picture(path).is_file() else []
    parts = [f"# {title}", rest, *picture, f"`examples/{path.name}`:", f"```python\n{body}\n```"]
    return title, "\n\n".join(part for part in parts if part)
