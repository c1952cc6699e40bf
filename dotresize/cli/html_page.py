"""One self-contained HTML page about a compression, or about a sweep over widths."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dotresize import accounting
from dotresize.cli import report

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2733; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
pre { background: #f2f5f8; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #dde3e9; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; } .note { color: #5a6a79; }
"""


def check() -> None:
    """Raise ValueError where the pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--report needs matplotlib: pip install 'dotresize[plot]'") from None


def write(
    path: Path,
    *,
    title: str,
    command: str,
    rows: list[dict[str, Any]],
    figures: dict[str, Any] | None = None,
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        command: what made it, as typed.
        rows: reports, the dense model's first.
        figures: of the main row's map (``maps.figures_of``), if there is one.
    """
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<pre>{html.escape(command)}</pre>",
        f'<div class="wide">{_table(rows)}</div>',
    ]
    if any(row["perplexity"] for row in rows):
        groups = _groups(rows[0])
        drawn = _svg(lambda figure: _sizes(figure, rows, groups), height=4.0 * len(groups))
        parts += ["<h2>Perplexity against size</h2>", drawn]
    if figures is not None:
        parts += _map_parts(figures)
    parts += ["<h2>Time by stage</h2>", _svg(lambda figure: _stages(figure, rows), height=3.0)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<link rel="icon" href="data:,">'  # no browser asks for an icon then
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _table(rows: list[dict[str, Any]]) -> str:
    lines = report.cells(rows)
    head = "".join(f"<th>{html.escape(report.label(row))}</th>" for row in rows)
    body = ""
    for name, cells in lines:
        columns = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body += f"<tr><td>{html.escape(name)}</td>{columns}</tr>"
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _map_parts(figures: dict[str, Any]) -> list[str]:
    details = "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures["details"].items()
    )
    return [
        "<h2>Variance lost at each location</h2>",
        '<p class="note">Of the RMS-normalised residual stream, before any refit; from the '
        "embedding to the final norm.</p>",
        _svg(lambda figure: _lost(figure, figures), height=3.0),
        "<h2>Spectrum</h2>",
        '<p class="note">Share of the variance beyond the leading directions: what no map of that '
        "width can keep.</p>",
        _svg(lambda figure: _spectrum(figure, figures), height=3.0),
        "<h2>The map</h2>",
        f'<p class="note">Size of its entries, old neurons down, new ones across. '
        f"{html.escape(details)}</p>",
        _svg(lambda figure: _picture(figure, figures), height=5.0),
    ]


def _svg(draw: Callable[[Any], None], *, height: float = 4.0) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dotresize"}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _groups(dense: dict[str, Any]) -> dict[str, list[str]]:
    """Return the texts of kinds that the calibration has, and others, by an axis's name."""
    apart = dense["unseen"]
    groups = {
        "perplexity": [name for name in dense["perplexity"] if name not in apart],
        "perplexity, unseen kinds": apart,
    }
    return {name: texts for name, texts in groups.items() if texts}


def _sizes(figure: Any, rows: list[dict[str, Any]], groups: dict[str, list[str]]) -> None:
    """Draw panels for each group of texts: their mean against width and parameters."""
    panels = figure.subplots(len(groups), 2, squeeze=False, sharey="row", sharex="col")
    for axes, (name, texts) in zip(panels, groups.items(), strict=True):
        _size_panels(axes[0], axes[1], rows, texts)
        axes[0].set_ylabel(name)
    panels[-1][0].set_xlabel("residual width")
    panels[-1][1].set_xlabel("parameters, millions")


def _size_panels(
    widths: Any, parameters: Any, rows: list[dict[str, Any]], texts: list[str]
) -> None:
    """Draw a line for each method: the geometric mean over the texts."""
    dense = rows[0]
    for name in dict.fromkeys(report.label(row) for row in rows[1:]):
        points = sorted(
            (row["width"]["new"], row["parameters"]["narrow"]["total"] / 1e6, _mean(row, texts))
            for row in [dense, *(row for row in rows if report.label(row) == name)]
        )
        for axis, i in ((widths, 0), (parameters, 1)):
            axis.plot([p[i] for p in points], [p[2] for p in points], marker="o", label=name)
    widths.set_yscale("log")
    parameters.legend(fontsize=8)
    for axis in (widths, parameters):
        axis.grid(True, which="both", alpha=0.25)


def _mean(row: dict[str, Any], texts: list[str]) -> float:
    return math.exp(sum(math.log(row["perplexity"][text]) for text in texts) / len(texts))


def _stages(figure: Any, rows: list[dict[str, Any]]) -> None:
    axis = figure.subplots()
    names = [f"{i}. {report.label(row)}" for i, row in enumerate(rows)]
    left = [0.0] * len(rows)
    for stage in accounting.STAGES:
        values = [row["seconds"].get(stage, 0.0) for row in rows]
        if any(values):
            axis.barh(names, values, left=left, label=stage)
            left = [a + b for a, b in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(fontsize=8)


def _lost(figure: Any, figures: dict[str, Any]) -> None:
    axis = figure.subplots()
    axis.bar(range(len(figures["lost"])), figures["lost"])
    axis.set(xlabel="residual location", ylabel="share lost")


def _spectrum(figure: Any, figures: dict[str, Any]) -> None:
    axis = figure.subplots()
    counts = range(1, len(figures["spectrum"]) + 1)
    axis.semilogy(counts, [max(value, 1e-8) for value in figures["spectrum"]])
    axis.axvline(figures["width"], color="tab:red", label=f"width {figures['width']}")
    axis.set(xlabel="directions kept", ylabel="share lost")
    axis.legend(fontsize=8)


def _picture(figure: Any, figures: dict[str, Any]) -> None:
    axis = figure.subplots()
    image = axis.imshow(figures["map"], cmap="magma", vmin=0, interpolation="nearest")
    axis.set(xlabel="new neuron", ylabel="old neuron")
    figure.colorbar(image, label="absolute value")
