"""Draws the figures of docs/benchmarks.md from the newest whole run.

python benchmarks/figures.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench_tables import DEVICE, ROOT, read
from harness import newest

DOCS = ROOT / "docs"
# Okabe and Ito's colours, which those who see red and green alike can tell apart
COLOURS = {
    "plain": "#999999",
    "recorder": "#0072B2",
    "recorder, 2 prompts": "#56B4E9",
    "full probabilities": "#009E73",
    "OVAM": "#E69F00",
    "DAAM": "#CC79A7",
    "guide": "#0072B2",
    "published": "#E69F00",
}
OURS, THEIRS = "#0072B2", "#E69F00"
MARKS = {"recorder": "o", "full probabilities": "s", "OVAM": "D", "recorder, 2 prompts": "^"}
Rows = list[dict[str, Any]]


def measured(record: dict[str, Any], part: str, group: str = "") -> Rows:
    """Rows with a time, of a part, of the groups whose names begin so."""
    return [
        row
        for row in record["rows"]
        if row["part"] == part and row["group"].startswith(group) and row["median_ms"] is not None
    ]


def bars(
    axes: Any,
    rows: Rows,
    value: Callable[[dict[str, Any]], float],
    form: str,
    quartiles: Callable[[dict[str, Any]], tuple[float, float]] | None = None,
) -> None:
    """Horizontal bars, with quartiles where there are some, and the value at the end."""
    values = [value(row) for row in rows]
    ends = [quartiles(row) if quartiles else (v, v) for row, v in zip(rows, values, strict=True)]
    for i, (row, each, (low, high)) in enumerate(zip(rows, values, ends, strict=True)):
        colour = COLOURS.get(row["name"], OURS if row["ours"] else THEIRS)
        axes.barh(i, each, color=colour, height=0.65)
        if quartiles:
            axes.plot([low, high], [i, i], color="black", linewidth=1.2)
        axes.text(max(each, high), i, f" {form.format(each)}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlim(0, 1.2 * max(high for _, high in ends))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def overhead(record: dict[str, Any]) -> Figure:
    """Time of a run with maps over that of the plain run."""
    groups = list(dict.fromkeys(row["group"] for row in measured(record, "recorder")))
    shown = [g for g in groups if g == "SD 1.5 shapes" or "50 steps" in g or "8 image" in g]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(shown)), shown, strict=True):
        rows = measured(record, "recorder", group)
        bars(axes, rows, lambda row: row["ratio"], "{:.2f}", lambda row: row["ratio_quartiles"])
        axes.set_title(group.replace("(s)", "s" * ("8 image" in group)), fontsize=9)
        axes.set_xlabel("time, of the plain run", fontsize=8)
    return figure


def memory(record: dict[str, Any]) -> Figure:
    """Bytes kept for the maps, over steps."""
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in measured(record, "recorder", "testbed, 1 image"):
        if row["held_kib"] is not None:
            (steps,) = map(int, re.findall(r"(\d+) steps", row["group"]))
            lines.setdefault(row["name"], []).append((steps, row["held_kib"]))
    for name, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker=MARKS[name], color=COLOURS[name], label=name)
        words = f"{name}: {y[-1]:,.1f} KiB".replace(".0 ", " ")
        axes.annotate(words, (x[-1], y[-1]), xytext=(6, -3), textcoords="offset points", fontsize=8)
    axes.set(yscale="log", xlabel="steps", ylabel="held after the run, KiB", xlim=(5, 85))
    axes.set_title("embedded model, one image", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure


def seconds(row: dict[str, Any]) -> tuple[float, float]:
    low, high = row["quartiles_ms"]
    return low / 1e3, high / 1e3


def an_hour(row: dict[str, Any]) -> tuple[float, float]:
    low, high = row["quartiles_ms"]
    return 3.6e6 / high, 3.6e6 / low


def guidance(record: dict[str, Any]) -> Figure:
    """Time and peak memory of a guided UNet call."""
    groups = list(dict.fromkeys(row["group"] for row in measured(record, "guidance")))
    figure = Figure(figsize=(8, 1.6 * len(groups) + 0.4), layout="constrained")
    grid = figure.subplots(len(groups), 2, squeeze=False)
    for (left, right), group in zip(grid, groups, strict=True):
        rows = measured(record, "guidance", group)
        bars(left, rows, lambda row: row["median_ms"] / 1e3, "{:.1f} s", seconds)
        width = rows[0]["workload"].partition(",")[0]
        left.set_title(f"{group.partition(', ')[2]}, {width}: time", fontsize=9)
        peaks = [row for row in rows if row["peak_mib"] is not None]
        if peaks:
            bars(right, peaks, lambda row: row["peak_mib"], "{:,.0f} MiB")
        right.set_title("peak memory beyond the model", fontsize=9)
    return figure


def limit(record: dict[str, Any]) -> Figure:
    """Kernels against what the machine can do."""
    rows = [row for row in measured(record, "overlap") if row["bound_ms"] is not None]
    figure = Figure(figsize=(7.5, 0.28 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['group']}: {row['name']}" for row in rows]
    shares = [100 * row["bound_ms"] / row["median_ms"] for row in rows]
    colours = [OURS if row["ours"] else THEIRS for row in rows]
    axes.axvline(100, color="black", linewidth=0.8, linestyle="--")
    axes.hlines(range(len(rows)), min(shares) / 2, shares, color=colours, linewidth=1)
    axes.scatter(shares, range(len(rows)), color=colours, zorder=3)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for i, (share, row) in enumerate(zip(shares, rows, strict=True)):
        text = f"{share:.2g} % ({row['bound_by']})"
        axes.annotate(text, (share, i), xytext=(7, 0), textcoords="offset points", va="center",
                      fontsize=8, bbox=box)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(min(shares) / 2, 1000)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel("share of the measured limit, %", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure


def audits(record: dict[str, Any]) -> Figure:
    """Findings an hour, ours over batch sizes."""
    rows = measured(record, "audits", "against the published recipe")
    figure = Figure(figsize=(7, 0.35 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots()
    bars(axes, rows, lambda row: 3.6e6 / row["median_ms"], "{:,.0f}", an_hour)
    axes.set_xlabel("findings an hour (embedded model, one thread)", fontsize=8)
    return figure


# name -> how it is drawn, and the part of a run that it shows
FIGURES: dict[str, tuple[Callable[[dict[str, Any]], Figure], str]] = {
    "overhead": (overhead, "recorder"),
    "memory": (memory, "recorder"),
    "guidance": (guidance, "guidance"),
    "limit": (limit, "overlap"),
    "audits": (audits, "audits"),
}


def stamp(record: dict[str, Any]) -> str:
    """What a figure says it was made from."""
    return f"{record['device']}, {record['date']}"


def stale(path: Path, record: dict[str, Any], part: str) -> bool:
    """Whether a figure is not of this run, as its own metadata say, or should not be there."""
    if not measured(record, part):
        return path.exists()
    return not path.exists() or stamp(record).encode() not in path.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure is out of date")
    options = parser.parse_args()
    found = newest(DEVICE)
    if found is None:
        sys.exit(f"{DEVICE.relative_to(ROOT)} has no whole run: run benchmarks/run.py")
    record = read(found)
    mpl.use("agg")
    for name, (draw, part) in FIGURES.items():
        path = DOCS / f"benchmarks-{name}.png"
        if options.check:
            if stale(path, record, part):
                sys.exit(f"{path.relative_to(ROOT)} is out of date: run benchmarks/figures.py")
        elif measured(record, part):
            draw(record).savefig(path, dpi=110, metadata={"Source": stamp(record)})
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
