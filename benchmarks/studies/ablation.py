"""What a width map is best made of: one choice changed at a time, drawn as one picture.

    python -m benchmarks.studies.ablation --out FILE --plot PICTURE

SmolLM2-135M at 20 % less residual width, tied, nothing refitted. Excess = ln(perplexity / dense
perplexity) on three texts; the calibration has all three kinds, or with ``--mixture`` two of them.
A row is appended as soon as a map has been judged; a run that is started again skips those.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize import factorize, sinkhorn, transport_map
from dotresize.baselines.magnitude import selected
from dotresize.calibration.statistics import Statistics
from dotresize.narrow.absorb import absorb
from dotresize.narrow.maps import align, largest
from dotresize.narrow.principal import pca
from dotresize.narrow.sensitivity import unit
from dotresize.narrow.transport import transports
from dotresize.ops.cost_accumulator import L1CostAccumulator

from ..rows import append, read, where
from ..workload import need
from .activations import residual_stream, unit_rms
from .quality import WINDOW, Study
from .quality_cases import MIXTURES, Case

REG = 3.0
WIDTH = 468  # whatever a share of 576 would be rounded to


class Maps:
    """Everything a map can be made of: statistics, and costs of tokens weighed in other ways."""

    def __init__(self, study: Study, mixture: str) -> None:
        tokens, self.statistics = study.calibration(mixture, 0, Case("maps"), narrows=True)
        self.mean: Statistics = self.statistics.mean()
        model = study.model
        self.width = model.width
        self.k = WIDTH
        self.selection = largest(self.mean.importance[0], self.k)
        assert self.statistics.cost is not None
        self.costs = self.statistics.cost.double()
        self.cost = self.costs.mean(0)
        self._collect(model.module, tokens)

    @torch.inference_mode()
    def _collect(self, module: Any, tokens: Tensor) -> None:
        """Collect the raw stream, windows without their first token, and mirrored neurons."""
        raw, later = L1CostAccumulator(self.width), L1CostAccumulator(self.width)
        mirrored = L1CostAccumulator(self.width, m=self.width)
        self.raw_moment = torch.zeros(self.width, self.width, dtype=torch.float64)
        not_first = torch.arange(4 * WINDOW) % WINDOW != 0
        for ids in tokens.split(4):
            stream = residual_stream(module, ids).float()
            for x in stream:
                self.raw_moment += (x.mT @ x).double()
            unit = unit_rms(stream)
            raw.update(stream.flatten(0, 1))
            later.update(unit[:, not_first[: unit.shape[1]]].flatten(0, 1))
            flat = unit.flatten(0, 1)
            mirrored.update(flat, -flat)
        self.raw, self.later = raw.result().double(), later.result().double()
        self.mirrored = mirrored.result().double()

    def transport(self, cost: Tensor | None = None, **choices: Any) -> Tensor:
        cost = self.cost if cost is None else cost
        choices = {"reg": REG, "steps": 1} | choices
        return transports(cost[None], [self.selection], **choices)[0].q

    def limit(self, gradients: float = 0.0, **choices: Any) -> Tensor:
        """Return the limit of transport, with a weight of the gradients' cost."""
        assert self.mean.gradient_cost is not None
        by_gradients = self.mean.gradient_cost[0].double()
        cost = self.cost / self.cost.mean() + gradients * by_gradients / by_gradients.mean()
        return self.transport(cost, steps=math.inf, **choices)

    def limit_on_axes(self, kept_axes: int = 16) -> Tensor:
        """Return the limit with the largest channels kept on their axes."""
        plan = sinkhorn(self.cost, REG * float(self.cost.mean()), tol=1e-9).plan
        assert isinstance(plan, Tensor)
        return self.pca(plan + plan.mT, kept_axes)

    def sensitive(self, weight: float) -> Tensor:
        """Return the principal directions of ``w C + H / w``."""
        assert self.mean.moment is not None
        assert self.mean.fisher is not None
        return self.pca(weight * unit(self.mean.moment[0]) + unit(self.mean.fisher[0]) / weight)

    def planned(
        self, cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, sign: Any = 1.0
    ) -> Tensor:
        """Return a transport map with marginals, or signs, of its own."""
        plan = sinkhorn(cost, REG * float(cost.mean()), a, b, tol=1e-9).plan
        assert isinstance(plan, Tensor)
        return factorize(sign * transport_map(plan)).q

    def marginals(self, of_sources: bool, of_targets: bool) -> Tensor:
        weight = self.mean.importance[0]
        a = weight / weight.sum() if of_sources else None
        chosen = weight[self.selection]
        return self.planned(
            self.cost[:, self.selection], a, chosen / chosen.sum() if of_targets else None
        )

    def signed(self) -> Tensor:
        """Move a neuron onto the mirror image of another where that is nearer."""
        plain, mirrored = (c[:, self.selection] for c in (self.cost, self.mirrored))
        sign = torch.where(mirrored < plain, -1.0, 1.0).double()
        return self.planned(torch.minimum(plain, mirrored), sign=sign)

    def relative(self) -> Tensor:
        """Return the cost as a share of both neurons' magnitudes."""
        unit = self.mean.importance[0]
        return self.cost / (unit[:, None] + unit)

    def mixture(self, share: float) -> Tensor:
        """Return the leading principal directions, and the transport map's span beside them."""
        count = round(share * self.k)
        assert self.mean.moment is not None
        leading = torch.linalg.eigh(self.mean.moment[0]).eigenvectors[:, -count:]
        moved = self.transport()
        beside = moved - leading @ (leading.mT @ moved)
        rest = torch.linalg.svd(beside, full_matrices=False).U[:, : self.k - count]
        return torch.cat([leading, rest], 1)

    def pca(self, moment: Tensor | None = None, kept_axes: int = 16) -> Tensor:
        assert self.mean.moment is not None
        moment = self.mean.moment[0] if moment is None else moment
        return pca(moment, self.selection, self.mean.importance[0], kept_axes=kept_axes).q


Rule = Callable[[Maps], Tensor]


def rules() -> Iterator[tuple[str, str, Rule]]:
    """Return what is varied, the choice, and the map."""
    yield "baseline", "selection", lambda m: selected(m.selection, m.width).q
    yield "baseline", "transport", Maps.transport
    yield "baseline", "PCA", Maps.pca
    for reg in (0.03, 0.3, 1.0, 10.0, 30.0):
        yield "regularisation", f"reg {reg:g}", lambda m, r=reg: m.transport(reg=r)
    yield "cost", "relative to both magnitudes", lambda m: m.transport(m.relative())
    yield "cost", "raw stream", lambda m: m.transport(m.raw)
    yield "cost", "without first tokens", lambda m: m.transport(m.later)
    yield "cost", "earlier locations", lambda m: m.transport(m.costs[: len(m.costs) // 2].mean(0))
    yield "cost", "later locations", lambda m: m.transport(m.costs[len(m.costs) // 2 :].mean(0))
    yield "cost", "sign-aware", Maps.signed
    yield "marginals", "sources by magnitude", lambda m: m.marginals(True, False)
    yield "marginals", "targets by magnitude", lambda m: m.marginals(False, True)
    yield "marginals", "both by magnitude", lambda m: m.marginals(True, True)
    for steps in (2, 6, 20):
        yield "steps", f"{steps} in a row", lambda m, s=steps: m.transport(steps=s)
    yield "limit", "of transport", Maps.limit
    for reg in (0.5, 30.0):
        yield "limit", f"reg {reg:g}", lambda m, r=reg: m.limit(reg=r)
    yield "limit", "16 channels kept on their axes", Maps.limit_on_axes
    for weight in (0.1, 0.3, 1.0):
        yield "sensitivity", f"limit, weight {weight:g}", lambda m, w=weight: m.limit(w)
    for weight in (1.0, 7.0, 30.0):
        yield "sensitivity", f"PCA, weight {weight:g}", lambda m, w=weight: m.sensitive(w)
    for share in (0.25, 0.5, 0.75):
        yield "mixture", f"{share:.0%} principal directions", lambda m, s=share: m.mixture(s)
    for axes in (0, 64):
        yield "PCA", f"{axes} channels kept on their axes", lambda m, n=axes: m.pca(kept_axes=n)
    yield "PCA", "of the raw stream", lambda m: m.pca(m.raw_moment)


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the mean excess of every map as a bar, the texts as dots, kinds in colours."""
    matplotlib = need("matplotlib", "matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, and the file small
    import matplotlib.pyplot as plt

    mixtures = list(dict.fromkeys(row["mixture"] for row in rows))
    figure, axes = plt.subplots(
        1,
        len(mixtures),
        figsize=(3 + 4 * len(mixtures), 8),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis, mixture in zip(axes[0], mixtures, strict=True):
        mine = [row for row in rows if row["mixture"] == mixture]
        names = [f"{row['varied']}: {row['choice']}" for row in mine]
        means = [sum(row["excess"].values()) / len(row["excess"]) for row in mine]
        axis.barh(names, means, color=["0.6" if r["varied"] == "baseline" else "C0" for r in mine])
        for i, text in enumerate(mine[0]["excess"]):
            values = [row["excess"][text] for row in mine]
            axis.plot(values, names, "o", color=f"C{i + 1}", markersize=4, label=text)
        axis.set(xlabel="excess", title=f"calibration: {mixture}")
        axis.grid(True, axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    parser.add_argument("--plot", type=Path, help="an .svg or .png of all of its rows")
    parser.add_argument("--mixture", choices=MIXTURES, default="all", help="to calibrate on (all)")
    parser.add_argument("--windows", type=int, default=24, help="calibration windows (24)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    rows = read(args.out) if args.out.exists() else []
    done = {(row["mixture"], row["windows"], row["varied"], row["choice"]) for row in rows}
    left = [rule for rule in rules() if (args.mixture, args.windows, *rule[:2]) not in done]
    if left:
        _measure(left, args)
    if args.plot is not None:
        chart([row for row in read(args.out) if row["windows"] == args.windows], args.plot)
    return 0


def _measure(left: list[tuple[str, str, Rule]], args: argparse.Namespace) -> None:
    about = where(torch.get_num_threads())
    study = Study(args.windows, gradients=True)
    made = Maps(study, args.mixture)
    for varied, choice, rule in left:
        start = time.perf_counter()
        row = {"mixture": args.mixture, "windows": args.windows, "width": made.k}
        row |= {"varied": varied, "choice": choice}
        try:
            q = rule(made)
        except ValueError as error:  # a span that collapsed is a finding too
            sys.stdout.write(f"{varied}, {choice}: {error}\n")
            continue
        took = time.perf_counter() - start
        found = study.perplexities(absorb(study.model, align(q, made.selection)))
        row["excess"] = {text: math.log(found[text] / study.dense[text]) for text in found}
        row["seconds"] = round(took, 2)
        append(args.out, [about | row])
        figures = "  ".join(f"{name} {value:.3f}" for name, value in row["excess"].items())
        sys.stdout.write(f"{varied}, {choice}: {figures}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
