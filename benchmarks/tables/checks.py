"""Tables of what is checked: other libraries' tests, argument types, interrupts, gradients."""

from __future__ import annotations

from typing import Any


def peers(peer_rows: list[dict[str, Any]], pot_rows: list[dict[str, Any]]) -> str:
    """Return the counts of peers' own tests, by the last runs of their commands."""
    row, pot = peer_rows[-1], pot_rows[-1]
    lines = [
        "| tests of | passed | refused, or different, on purpose | failed |",
        "|---|---|---|---|",
    ]
    for peer in row["peers"]:
        if "passed" not in peer:
            continue
        reasons = "; ".join(f"{reason} ({count})" for reason, count in peer["reasons"].items())
        counts = f"{peer['on_purpose']}: {reasons}" if reasons else "0"
        lines.append(
            f"| {peer['peer']} ({peer['version']}) | {peer['passed']} | {counts} | "
            f"{len(peer['wrong'])} |"
        )
    refused = f"{pot['failed']}: {'; '.join(sorted(set(pot['expected'].values())))}"
    lines.append(
        f"| POT, Sinkhorn ({pot['versions']['POT']}) | {pot['passed']} | {refused} | "
        f"{len(pot['wrong'])} |"
    )
    without = ", ".join(p["peer"] for p in row["peers"] if "passed" not in p)
    lines += ["", f"{row['date']} and {pot['date']}. {without} distributes no tests. Rows:"]
    lines.append("`benchmarks/results/peer_tests.jsonl`, `pot_tests.jsonl`.")
    return "\n".join(lines)


def types(rows: list[dict[str, Any]]) -> str:
    """Return what the last fuzz of argument types came to."""
    row = rows[-1]
    calls = sum(row["calls"].values())
    return (
        f"{calls} calls of {len(row['calls'])} functions and methods (seed {row['seed']}, "
        f"{row['date']}): {row['right']} right results, {row['refused']} refusals of one line, "
        f"{row['fault']} of anything else.\nRows: `benchmarks/results/fuzz_types.jsonl`."
    )


def interrupts(rows: list[dict[str, Any]]) -> str:
    """Return how soon Ctrl-C ended each kernel in the last run."""
    row = rows[-1]
    lines = ["| kernel | seconds from the signal to the exception |", "|---|---|"]
    lines += [f"| {name} | {seconds:.3f} |" for name, seconds in row["interrupts"].items()]
    lines += ["", f"The worst of three, {row['device']}, {row['date']}. Rows:"]
    return "\n".join([*lines, "`benchmarks/results/interrupts.jsonl`."])


def last_runs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of each case's last run."""
    last = {r["case"]: r["run"] for r in rows}
    return [r for r in rows if r["run"] == last[r["case"]]]


def gradient(rows: list[dict[str, Any]]) -> str:
    """Return how long the gradient of the L1 cost takes, in the last run of each case."""
    rows, last = last_runs(rows), {r["case"]: r["run"] for r in rows}
    lines = ["| gradient | dotresize | times the cost itself | torch.cdist took, times as long |"]
    lines.append("|---|---|---|---|")
    shown = [r for r in rows if r.get("allocator") == "default"]
    for case in last:
        times = {r["name"]: r["median_s"] for r in shown if r["case"] == case and "median_s" in r}
        ours, cost = times["dotresize cpp"], times["dotresize cpp, the cost"]
        peer = times.get("torch.cdist(p=1), backward")
        lines.append(
            f"| {case.removeprefix('L1 gradient ')} | {ours * 1e3:.1f} ms | {ours / cost:.2f} | "
            f"{'-' if peer is None else f'{peer / ours:.1f}'} |"
        )
    row = shown[-1]
    lines += ["", f"Medians, {row['device']} ({row['simd']}), {row['date']}. Rows:"]
    return "\n".join([*lines, "`benchmarks/results/gradient.jsonl`."])
