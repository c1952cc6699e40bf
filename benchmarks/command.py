"""``dotresize bench``: this project's CPU operators and every installed peer, side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from . import assignment, harness, l1, l1_gradient, plot, rows, scaling, sinkhorn
from .workload import Case, NotHere, need

_OPERATORS = {"l1": l1, "gradient": l1_gradient, "sinkhorn": sinkhorn, "assignment": assignment}
# Small: a few minutes in all. Pairs of activations, entries times iterations, entries.
_SMALL = {"l1": 5e9, "gradient": 5e9, "sinkhorn": 1e9, "assignment": 5e6}


def run(args: argparse.Namespace) -> int:
    """Time what ``args.what`` names, print tables, append rows and draw the chart."""
    what, threads = _checked(args)
    where = rows.where(threads)
    out = None if args.out is None else Path(args.out)
    sys.stdout.write(f"{where['device']} ({where['simd']}), medians of {args.rounds} rounds\n")
    measured: list[dict[str, Any]] = []
    for cases, peers in _plan(what, args.sizes):
        for case in cases:
            found = harness.measure(
                case,
                _OPERATORS[case.operator].build,
                rounds=args.rounds,
                threads=threads,
                limit_s=args.limit,
                peers=peers,
                say=_quiet if args.quiet else _say,
            )
            found = [where | {"threads": threads} | row for row in found]
            measured += found
            if out is not None:
                rows.append(out, found)
            if not args.quiet:
                _say("")
            sys.stdout.write(table(case, found))
            sys.stdout.flush()
    if "scaling" in what:
        fitted = [where | {"threads": threads} | fit for fit in scaling.fits(measured, l1.OURS)]
        if out is not None:
            rows.append(out, fitted)
        sys.stdout.write(exponents(fitted))
    if args.plot is not None and not any("median_s" in row for row in measured):
        raise ValueError("--plot: nothing was timed, so there is nothing to draw")
    if args.plot is not None:
        plot.chart(measured, Path(args.plot))
        sys.stdout.write(f"chart: {args.plot}\n")
    return 0


def _checked(args: argparse.Namespace) -> tuple[list[str], int]:
    """Return what to time and the number of threads; ValueError for anything that cannot be."""
    what = list(dict.fromkeys(args.what or _OPERATORS))
    for word in what:
        if word not in (*_OPERATORS, "scaling"):
            raise ValueError(
                f"bench {word!r}: must be l1, gradient, sinkhorn, assignment or scaling"
            )
    if args.sizes not in ("small", "all"):
        raise ValueError(f"--sizes {args.sizes!r}: must be small or all")
    if args.rounds < 2:
        raise ValueError(f"--rounds {args.rounds}: must be at least 2 (7 to be quoted)")
    if not args.limit > 0:
        raise ValueError(f"--limit {args.limit}: must be a positive number of seconds")
    available = torch.get_num_threads()
    threads = available if args.threads is None else args.threads
    if not 1 <= threads <= available:
        raise ValueError(f"--threads {threads}: must be from 1 to {available}")
    for option, name in (("--out", args.out), ("--plot", args.plot)):
        if name is not None and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
            raise ValueError(f"{option} {name}: must be a file in a folder that exists")
    if args.plot is not None:
        if Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot {args.plot}: must end in .png, .svg or .pdf")
        try:
            need("matplotlib", "matplotlib")
        except NotHere as reason:
            raise ValueError(f"--plot: matplotlib is {reason}") from None
    return what, threads


def _plan(what: list[str], sizes: str) -> list[tuple[list[Case], bool]]:
    """Return cases, and whether the peers take part."""
    plan = []
    for word in what:
        if word == "scaling":  # sweeps share cases; each is measured once
            shared = {case.label: case for _, _, cases in scaling.sweeps() for case in cases}
            plan.append((list(shared.values()), False))
        else:
            cases = _OPERATORS[word].CASES
            plan.append(([c for c in cases if sizes == "all" or c.work <= _SMALL[word]], True))
    return plan


def _say(text: str) -> None:
    sys.stderr.write(f"\r{text:<78.78}\r")
    sys.stderr.flush()


def _quiet(_: str) -> None:
    pass


def table(case: Case, found: list[dict[str, Any]]) -> str:
    """Return the rows of one case as text, fastest first, then whoever was not timed and why."""
    timed = sorted((r for r in found if "median_s" in r), key=lambda r: r["median_s"])
    ours = {r["allocator"]: r["median_s"] for r in timed if r["name"] == l1.OURS}
    unit, scale = ("G pairs/s", 1e-9) if "tokens" in case.sizes else ("M entries/s", 1e-6)
    lines = [
        "",
        f"{case.label}",
        f"  {'':38} {'median':>11}  {'quartiles':>19}  {'x ours':>7}  {unit:>12}",
    ]
    for row in timed:
        name = row["name"] + ("" if row["allocator"] == "default" else f" ({row['allocator']})")
        low, high = (f"{v * 1e3:.1f}" for v in row["quartiles_s"])
        mine = ours.get(row["allocator"], ours.get("default"))
        ratio = "-" if mine is None else f"{row['median_s'] / mine:.2f}"
        lines.append(
            f"  {name:38} {row['median_s'] * 1e3:8.1f} ms  {low + ' to ' + high:>19}  {ratio:>7}  "
            f"{case.work / row['median_s'] * scale:12.1f}"
        )
    for row in found:
        why = row.get("missing") or row.get("failed")
        if why and row.get("allocator", "default") == "default":
            lines.append(f"  {row['name']:38} {why}")
    return "\n".join(lines) + "\n"


def exponents(fitted: list[dict[str, Any]]) -> str:
    """Return as text how time grows with size: an exponent for each sweep, one a line."""
    lines = ["", "time grows as a power of each size (1 = in proportion; 2 for n and m together)"]
    for fit in fitted:
        span = f"{fit['size']} {fit['from']} to {fit['to']}"
        lines.append(f"  {fit['operator']:9} {span:28} {fit['exponent']:.2f}")
    return "\n".join(lines) + "\n"
