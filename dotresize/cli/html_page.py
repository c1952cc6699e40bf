"""One self-contained HTML page about a compression, or about a sweep over widths."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from dotresize import accounting
from dotresize.cli import report

# Shares lost up to this are rounding: a sum of squares in float32 is no better.
NOISE = 1e-9
# What a curve may be drawn against.
_SIZES: dict[str, Callable[[dict[str, Any]], float]] = {
    "residual width": lambda row: row["width"]["new"],
    "feed-forward width": lambda row: row["feed_forward"]["new"],
    "parameters, millions": lambda row: row["parameters"]["narrow"]["total"] / 1e6,
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2733; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
pre { background: #f2f5f8; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #dde3e9; }
.wide, table, tr { background: inherit; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: inherit; }
.wide { overflow-x: auto; } .note { color: #5a6a79; }
svg { width: 100%; min-width: 36rem; height: auto; background: #fff; border-radius: .4rem; }
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark; }
  body { color: #dce3ea; background: #14191f; } pre { background: #222b34; }
  th, td { border-color: #36424e; } .note { color: #9aa9b7; } svg { background: #f4f6f8; }
}
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
    lost: Sequence[float] = (),
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        command: what made it, as typed.
        rows: reports, the dense model's first.
        figures: of the main row's map (``maps.figures_of``), if there is one.
        lost: by each of its feed-forwards, if they were cut or refitted.
    """
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<pre>{html.escape(command)}</pre>",
        f'<div class="wide">{_table(rows)}</div>',
    ]
    if any(row["perplexity"] for row in rows):
        parts += _perplexity_parts(rows)
    if max(lost, default=0.0) > NOISE:
        parts += [
            "<h2>Lost by each feed-forward</h2>",
            '<p class="note">Share of the squares of what it should write on the calibration '
            "tokens, so that the stream is the dense model's again, or, without refit, of what it "
            "wrote before; layer by layer.</p>",
            _svg(lambda figure: _bars(figure, lost, "layer"), height=3.0),
        ]
    allocation = rows[-1].get("layer_widths")
    if allocation is not None:
        parts += [
            "<h2>A width for each layer</h2>",
            '<p class="note">Above, the feed-forward width that each layer got; below, what it is '
            "predicted to lose at every width, in nats of the model's predictions, a line for each "
            "layer from the first (dark) to the last (light), its own width marked.</p>",
            _svg(lambda figure: _layer_widths(figure, allocation), height=6.0),
        ]
    if figures is not None and max(figures["lost"]) > NOISE:
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
        _svg(lambda figure: _bars(figure, figures["lost"], "residual location"), height=3.0),
        "<h2>Spectrum</h2>",
        '<p class="note">Share beyond the leading directions: of the variance, what no map of that '
        "width can keep; of a transport plan, whose leading directions are the map, without its "
        "constant one.</p>",
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
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    picture = text.getvalue()[text.getvalue().index("<svg") :]
    return f'<div class="wide">{picture}</div>'


def _groups(dense: dict[str, Any]) -> dict[str, list[str]]:
    """Return the texts of kinds that the calibration has, and others, by an axis's name."""
    apart = dense["unseen"]
    groups = {
        "perplexity": [name for name in dense["perplexity"] if name not in apart],
        "perplexity, unseen kinds": apart,
    }
    return {name: texts for name, texts in groups.items() if texts}


def _perplexity_parts(rows: list[dict[str, Any]]) -> list[str]:
    """Return curves against the sizes that differ within a method, or bars where none does."""
    groups, methods = _groups(rows[0]), _by_method(rows)
    sizes = {
        name: size
        for name, size in _SIZES.items()
        if any(len(set(map(size, own))) > 1 for own in methods.values())
    }
    if not sizes:
        height = len(groups) * (1.0 + 0.35 * len(rows))
        drawn = _svg(lambda figure: _method_bars(figure, rows, groups), height=height)
        return ["<h2>Perplexity by method</h2>", drawn]
    drawn = _svg(lambda figure: _curves(figure, rows, groups, sizes), height=4.0 * len(groups))
    return ["<h2>Perplexity against size</h2>", drawn]


def _by_method(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the reports of narrowed models, by method."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows[1:]:
        methods.setdefault(report.label(row), []).append(row)
    return methods


def _curves(
    figure: Any,
    rows: list[dict[str, Any]],
    groups: dict[str, list[str]],
    sizes: dict[str, Callable[[dict[str, Any]], float]],
) -> None:
    """Draw panels for each group of texts: their geometric mean against each size, by method."""
    panels = figure.subplots(len(groups), len(sizes), squeeze=False, sharey="row", sharex="col")
    for axes, (group, texts) in zip(panels, groups.items(), strict=True):
        for axis, (name, size) in zip(axes, sizes.items(), strict=True):
            for method, own in _by_method(rows).items():
                points = sorted((size(row), _mean(row, texts)) for row in [rows[0], *own])
                axis.plot(*zip(*points, strict=True), marker="o", label=method)
            axis.set_xlabel(name)
            axis.grid(True, alpha=0.25)
            _plain(axis.xaxis)
        axes[0].set(ylabel=group, yscale="log")
        _plain_log(axes[0].yaxis, (1, 2, 3, 5))
        axes[-1].legend(fontsize=8)


def _method_bars(figure: Any, rows: list[dict[str, Any]], groups: dict[str, list[str]]) -> None:
    """Draw a bar for each model, in panels for each group of texts: their geometric mean."""
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex="col")
    names = [report.label(row) for row in rows]
    for (axis,), (group, texts) in zip(panels, groups.items(), strict=True):
        values = [_mean(row, texts) for row in rows]
        places = range(len(rows))  # two may have one name
        drawn = axis.barh(places, values, color=["tab:gray"] + ["tab:blue"] * (len(rows) - 1))
        axis.bar_label(drawn, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
        axis.set_yticks(places, names)
        axis.set_xlabel(group)
        axis.margins(x=0.1)
        axis.invert_yaxis()
        _plain(axis.xaxis)


def _plain(axis: Any) -> None:
    """Write plain numbers along a linear axis: no offset, no powers."""
    from matplotlib.ticker import ScalarFormatter

    numbers = ScalarFormatter(useOffset=False)
    numbers.set_scientific(False)
    axis.set_major_formatter(numbers)


def _plain_log(axis: Any, steps: tuple[float, ...]) -> None:
    """Write plain numbers along a logarithmic axis. steps: those of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format(Decimal(f"{value:.3g}"), "f")))
    axis.set_minor_formatter(NullFormatter())


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
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _bars(figure: Any, lost: Sequence[float], place: str) -> None:
    axis = figure.subplots()
    axis.bar(range(len(lost)), lost)
    axis.set(xlabel=place, ylabel="share lost")
    axis.xaxis.get_major_locator().set_params(integer=True)
    _plain(axis.yaxis)


def _layer_widths(figure: Any, allocation: dict[str, Any]) -> None:
    from matplotlib import colormaps

    above, below = figure.subplots(2, 1)
    widths, curves = allocation["widths"], allocation["curves"]
    above.bar(range(len(widths)), widths)
    above.set(xlabel="layer", ylabel="inner neurons")
    above.xaxis.get_major_locator().set_params(integer=True)
    colours = colormaps["viridis"].resampled(len(curves))
    for i, (width, curve) in enumerate(zip(widths, curves, strict=True)):
        counts, losses = zip(*curve, strict=True)
        below.plot(counts, losses, color=colours(i), linewidth=1)
        at = np.interp(width, counts, losses)
        below.plot([width], [at], "o", color=colours(i), markersize=4)
    below.set(xlabel="inner neurons", ylabel="predicted loss, nats")
    for axis in (above, below):
        axis.grid(True, alpha=0.25)


def _spectrum(figure: Any, figures: dict[str, Any]) -> None:
    axis = figure.subplots()
    for name, shares in figures["spectra"].items():
        counts = range(1, len(shares) + 1)
        axis.semilogy(counts, [max(value, 1e-6) for value in shares], label=name)
    _plain_log(axis.yaxis, (1,))
    axis.axvline(figures["width"], color="tab:red", label=f"width {figures['width']}")
    axis.set(xlabel="directions kept", ylabel="share lost")
    axis.legend(fontsize=8)


def _picture(figure: Any, figures: dict[str, Any]) -> None:
    axis = figure.subplots()
    image = axis.imshow(figures["map"], cmap="magma", vmin=0, interpolation="nearest")
    axis.set(xlabel="new neuron", ylabel="old neuron")
    figure.colorbar(image, label="absolute value")
