"""The figures of docs/benchmarks.md, drawn from the newest whole run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .harness import ROOT

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


def bars(axes: Any, rows: Rows, form: str, values: list[tuple[float, ...]]) -> None:
    """Horizontal bars of value, or of value and quartiles, with the value at the end."""
    for i, (row, (value, *quartiles)) in enumerate(zip(rows, values, strict=True)):
        colour = COLOURS.get(row["name"], OURS if row["ours"] else THEIRS)
        axes.barh(i, value, color=colour, height=0.65)
        if quartiles:
            axes.plot(quartiles, [i, i], color="black", linewidth=1.2)
        end = max(value, *quartiles) if quartiles else value
        axes.text(end, i, f" {form.format(value)}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlim(0, 1.2 * max(max(one) for one in values))
    axes.invert_yaxis()
    plain(axes)


def plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def overhead(record: dict[str, Any]) -> Figure:
    """Time of a run with maps over that of the plain run."""
    groups = list(dict.fromkeys(row["group"] for row in measured(record, "recorder")))
    shown = [g for g in groups if g == "SD 1.5 shapes" or "50 steps" in g or "8 image" in g]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(shown)), shown, strict=True):
        rows = measured(record, "recorder", group)
        bars(axes, rows, "{:.2f}", [(row["ratio"], *row["ratio_quartiles"]) for row in rows])
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
    plain(axes)
    return figure


def guidance(record: dict[str, Any]) -> Figure:
    """Time and peak memory of a guided UNet call."""
    groups = list(dict.fromkeys(row["group"] for row in measured(record, "guidance")))
    figure = Figure(figsize=(8, 1.6 * len(groups) + 0.4), layout="constrained")
    grid = figure.subplots(len(groups), 2, squeeze=False)
    for (left, right), group in zip(grid, groups, strict=True):
        rows = measured(record, "guidance", group)
        times = [(row["median_ms"], *row["quartiles_ms"]) for row in rows]
        bars(left, rows, "{:.1f} s", [tuple(each / 1e3 for each in one) for one in times])
        width = rows[0]["workload"].partition(",")[0]
        left.set_title(f"{group.partition(', ')[2]}, {width}: time", fontsize=9)
        peaks = [row for row in rows if row["peak_mib"] is not None]
        if peaks:
            bars(right, peaks, "{:,.0f} MiB", [(row["peak_mib"],) for row in peaks])
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
    plain(axes)
    return figure


def audits(record: dict[str, Any]) -> Figure:
    """Findings per hour, ours over batch sizes."""
    rows = measured(record, "audits", "against the published recipe")
    figure = Figure(figsize=(7, 0.35 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots()
    times = [(row["median_ms"], *reversed(row["quartiles_ms"])) for row in rows]
    bars(axes, rows, "{:,.0f}", [tuple(3.6e6 / each for each in one) for one in times])
    axes.set_xlabel("findings an hour (embedded model, one thread)", fontsize=8)
    return figure


Draw = Callable[[dict[str, Any]], Figure]
# file -> how it is drawn, and the part of a run that it shows
FIGURES: dict[Path, tuple[Draw, str]] = {
    ROOT / f"docs/benchmarks-{draw.__name__}.png": (draw, part)
    for draw, part in (
        (overhead, "recorder"),
        (memory, "recorder"),
        (guidance, "guidance"),
        (limit, "overlap"),
        (audits, "audits"),
    )
}


def stamp(record: dict[str, Any]) -> str:
    """What a figure says it was made from."""
    return f"{record['device']}, {record['date']}"


def stale(path: Path, record: dict[str, Any], part: str) -> bool:
    """Whether a figure is not of this run, as its own metadata say, or should not be there."""
    if not measured(record, part):
        return path.exists()
    return not path.exists() or stamp(record).encode() not in path.read_bytes()


def save(path: Path, draw: Draw, record: dict[str, Any], part: str) -> None:
    """Writes a figure, or removes it if the run has nothing to show."""
    if not measured(record, part):
        path.unlink(missing_ok=True)
    else:
        draw(record).savefig(path, dpi=110, metadata={"Source": stamp(record)})
