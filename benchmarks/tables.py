"""What the pages show of the benchmarks: tables, and numbers inside sentences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .harness import RESULTS, newest

DEVICE = RESULTS / "amd-epyc"  # whose tables the pages show first
NOT_MEASURED = "not measured"


@cache
def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, whose first columns are aligned to the left and the others to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def run() -> dict[str, Any]:
    """The newest whole run of the device that the pages show."""
    path = newest(DEVICE)
    if path is None:
        raise ValueError(f"{DEVICE} has no whole run: run `make bench`")
    return read(path)


def row(part: str, group: str, name: str) -> dict[str, Any] | None:
    """A row that was measured."""
    for one in run()["rows"]:
        if (one["part"], one["group"], one["name"]) == (part, group, name):
            return one if one["status"] == "ok" else None
    return None


def number(value: float) -> str:
    """Three digits, and no more than there are."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(milliseconds: float) -> str:
    seconds = milliseconds >= 1000
    return f"{number(milliseconds / 1e3)} s" if seconds else f"{number(milliseconds)} ms"


def group_table(rows: list[dict[str, Any]]) -> str:
    """A group's rows; columns that no row fills are left out."""
    times = [one["median_ms"] for one in rows if one["median_ms"] is not None]
    unit, scale = ("s", 1e3) if times and min(times) >= 2000 else ("ms", 1.0)
    lines = []
    for one in rows:
        timed = one["median_ms"] is not None
        bound = timed and one["bound_ms"] is not None
        share = 100 * one["bound_ms"] / one["median_ms"] if bound else 0.0
        quartiles = [number(end / scale) for end in one["quartiles_ms"]] if timed else []
        several = timed and len(rows) > 1 and one["ratio"] is not None
        lines.append(
            {
                "": one["name"] + (f" ({one['note']})" if one["note"] else ""),
                f"median {unit}": number(one["median_ms"] / scale) if timed else one["status"],
                "quartiles": " to ".join(quartiles),
                "of the first": number(one["ratio"]) if several else "",
                "error": "" if one["error"] is None else f"{one['error']:.0e}",
                "peak MiB": "" if one["peak_mib"] is None else number(one["peak_mib"]),
                "held KiB": "" if one["held_kib"] is None else number(one["held_kib"]),
                "of the limit": f"{share:.0f} % ({one['bound_by']})" if bound else "",
            }
        )
    head = [column for column in lines[0] if any(line[column] for line in lines)]
    return table(head, [[line[column] for column in head] for line in lines])


def part_tables(record: dict[str, Any], part: str) -> str:
    """Every group of a part, each under a line that says its workload."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in record["rows"]:
        if one["part"] == part:
            groups.setdefault((one["group"], one["workload"]), []).append(one)
    blocks: list[str] = []
    for (name, workload), rows in groups.items():
        if rows[0]["name"] == "*":
            blocks.append(f"{name}: {rows[0]['status']}.")
            continue
        threads = f"{rows[0]['threads']} thread{'s' * (rows[0]['threads'] > 1)}"
        rounds = max(one["rounds"] for one in rows)
        blocks += [f"**{name}** ({workload}; {threads}, {rounds} rounds)", group_table(rows)]
    return "\n\n".join(blocks)


def alone(part: str) -> str:
    """The groups of a part that has a results file of its own."""
    record = read(DEVICE / f"{part}.json")
    return f"{record['date'][:10]}.\n\n{part_tables(record, part)}"


def machine(record: dict[str, Any] | None = None) -> str:
    """Where and when the run was, and what the machine can do."""
    record = record or run()
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    others = ", ".join(f"{name} {version}" for name, version in record["peers"].items())
    rows = []
    for threads, limits in record["limits"].items():
        rate = limits["exponentials_g_s"]
        cells = [threads, number(limits["copy_gb_s"]), number(limits["matrix_gflop_s"])]
        rows.append([*cells, NOT_MEASURED if rate is None else number(rate)])
    columns = ("copy, GB/s read and written", "matrix product, GFLOP/s", "exponentials, 1e9/s")
    return (
        f"{record['device']}, {record['cores']} cores, {record['date'][:10]}, load "
        f"{record['load_before']:.1f} before it, {record['seconds'] / 60:.0f} minutes. {versions}. "
        f"Peers: {others}.\n\n" + table(["threads", *columns], rows, left=0)
    )


def peers() -> str:
    """What each tool did with what was asked of it."""
    rows = [one for one in run()["rows"] if one["part"] == "peers" and one["name"] != "*"]
    tools = list(dict.fromkeys(one["name"] for one in rows))
    status = {(one["group"], one["name"]): one["status"] for one in rows}

    def cell(group: str, tool: str) -> str:
        said: str = status.get((group, tool), "")
        return "yes" if said == "ok" else said.replace("failed: ", "no: ").replace("|", "/")

    groups = dict.fromkeys(one["group"] for one in rows)
    lines = [[group, *(cell(group, tool) for tool in tools)] for group in groups]
    return table(["", *tools], lines, left=1 + len(tools))


def audits() -> str:
    """Findings per hour beside the times."""
    lines = []
    for one in run()["rows"]:
        if (one["part"], one["group"]) != ("audits", "against the published recipe"):
            continue
        if one["median_ms"] is None:
            lines.append([one["name"], one["status"], "", "", ""])
            continue
        low, high = one["ratio_quartiles"]
        error = "" if one["error"] is None else f"{one['error']:.0e}"
        cells = [f"{3.6e6 / one['median_ms']:,.0f}", f"{one['ratio']:.2f}"]
        lines.append([f"{one['name']} ({one['note']})", *cells, f"{low:.2f} to {high:.2f}", error])
    head = ("findings an hour", "of the recipe's time", "quartiles", "difference of a finding")
    return table(["", *head], lines)


def scaling() -> str:
    """How an audit's time grows, with fitted slopes and those of the workers."""
    record, lines = run(), []
    for fit in record["slopes"]:
        rows = [
            one
            for one in record["rows"]
            if one["group"] == fit["group"] and one["x"] and one["status"] == "ok"
        ]
        what = " (of a finding)" if fit["over"] == "batch size" else ""
        values = ", ".join(f"{one['x']:.0f}" for one in rows)
        times = ", ".join(number(one["median_ms"] / 1e3) for one in rows)
        interval = f"{fit['low']:.2f} to {fit['high']:.2f}"
        lines.append([fit["over"] + what, values, times, f"{fit['slope']:.2f}", interval])
    workers = read(DEVICE / "audit-cluster.json")
    times = ", ".join(number(statistics.median(workers["seconds"][n])) for n in ("1", "2"))
    slopes = sorted(-math.log2(one) for one in workers["speed_up_of_each_round"])
    slope, interval = -math.log2(workers["speed_up"]), f"{slopes[0]:.2f} to {slopes[-1]:.2f}"
    cells = ["workers (one thread each)", "1, 2", times, f"{slope:.2f}", f"{interval} (rounds)"]
    head = ("over", "values", "times, s", "slope of log time", "95 %")
    return table(head, [*lines, cells], left=3)


def other_devices() -> str:
    """Whole runs of other devices, complete."""
    blocks: list[str] = []
    for folder in sorted(RESULTS.iterdir()):
        path = newest(folder)
        if folder != DEVICE and path is not None:
            record = read(path)
            parts = dict.fromkeys(one["part"] for one in record["rows"])
            blocks += [f"### {record['device']}", machine(record)]
            blocks += [part_tables(record, part) for part in parts]
    return "\n\n".join(blocks) or "None yet: no GPU was at hand."


def profile() -> str:
    """What of an audit's processor time its parts take."""
    records = {
        "embedded model": read(DEVICE / "audit-profile-testbed.json"),
        "shapes of SD 1.5": read(DEVICE / "audit-profile-sd15.json"),
    }
    parts = ("network", "maps", "sampler", "classifier", "overlaps", "records", "loop", "start")
    totals = {
        "all but the networks": "share_of_all_but_the_networks",
        "the same, without the start": "share_without_the_start",
        "overlaps, records and loop, without the start": "share_of_the_audits_own_code",
    }
    shares = {part: [one["share"].get(part, 0.0) for one in records.values()] for part in parts}
    shares |= {f"**{n}**": [one[key] for one in records.values()] for n, key in totals.items()}
    rows = [[name, *(f"{100 * one:.2f} %" for one in values)] for name, values in shares.items()]
    return table(["", *records], rows)


# What the README shows: words, ours, what it is compared with
HEADLINE = [
    (words, ours, theirs)
    for ours, lines in {
        ("overlap", "hard IoU", "pairwise_iou"): {
            "hard IoU of all pairs, against numpy pair by pair (published)": (
                "numpy, pair by pair (published)"
            ),
            "the same, against batched numpy": "numpy, batched",
        },
        ("overlap", "SoftIoU with gradient", "ops.soft_iou, each map once"): {
            "SoftIoU with gradient, against 20 unrolled iterations, batched": "unrolled, batched"
        },
        ("recorder", "SD 1.5 shapes", "recorder"): {
            "one UNet call of SD 1.5's shapes with maps, against none": "plain",
            "the same, against OVAM": "OVAM",
        },
        ("recorder", "the recorder's share of a UNet call", "concept maps"): {
            "that call's concept maps alone, against keeping its probabilities": (
                "probabilities kept"
            )
        },
        ("guidance", "guided UNet call, 2 chunks", "guide"): {
            "one guided UNet call of SD 1.5's shapes, against the published way": "published"
        },
        ("audits", "against the published recipe", "run_audit, batch 8"): {
            "a finding of a whole audit at batch 8, against the published recipe": (
                "published recipe, one picture at a time"
            )
        },
    }.items()
    for words, theirs in lines.items()
]


def headline() -> str:
    """Ours against what one would run otherwise: time, and memory where it was measured."""
    lines = []
    for words, (part, group, name), other in HEADLINE:
        ours, theirs = row(part, group, name), row(part, group, other)
        if ours is None or theirs is None:
            lines.append([words, NOT_MEASURED, "", "", ""])
            continue
        memory = ""
        for column, unit in (("peak_mib", "MiB at the peak"), ("held_kib", "KiB held")):
            if None not in (ours[column], theirs[column]):
                memory = f"{number(ours[column])} of {number(theirs[column])} {unit}"
        pairs = zip(theirs["times_ms"], ours["times_ms"], strict=True)
        gains = sorted(other / own for other, own in pairs)
        low, middle, high = map(number, (gains[0], statistics.median(gains), gains[-1]))
        times = [duration(one["median_ms"]) for one in (ours, theirs)]
        lines.append([words, *times, f"{middle}x ({low} to {high})", memory])
    return table(["", "ours", "theirs", "speed-up", "memory"], lines)


def ratio(group: str, ours: str, theirs: str, column: str, part: str = "guidance") -> str:
    pair = row(part, group, ours), row(part, group, theirs)
    values = [one[column] for one in pair if one is not None and one[column] is not None]
    return f"{values[0] / values[1]:.2f}" if len(values) == 2 else NOT_MEASURED


def held() -> str:
    """KiB that the recorder keeps."""
    measured = row("recorder", "SD 1.5 shapes", "recorder")
    return NOT_MEASURED if measured is None else number(measured["held_kib"])


def controls() -> str:
    """What the default measures add to a whole audit of IoU alone, in percent."""
    group = "what the defaults measure beside IoU"
    measured = row("audits", group, "containment, controls and curves")
    return NOT_MEASURED if measured is None else f"{100 * (measured['ratio'] - 1):.0f}"


def sd15(name: str) -> float:
    """Median of a row of the engines in SD 1.5's size, in milliseconds."""
    rows = read(DEVICE / "engines-sd15.json")["rows"]
    return next(float(one["median_ms"]) for one in rows if one["name"] == name)


def of_batch_8(name: str) -> str:
    rows = read(DEVICE / "engines-testbed.json")["rows"]
    group = [one for one in rows if one["group"] == "one call, batch 8"]
    return number(next(one["median_ms"] for one in group if one["name"] == name))


QUERIES = 5 * (4096 + 1024 + 256)  # of the default layers of SD 1.5 at 64 x 64
MAPS = "onnx 23, reduced maps"
# Numbers inside sentences: name -> what stands between <!-- = name --> and <!-- /= -->
INLINE: dict[str, Callable[[], str]] = {
    "held": held,
    "guided time": lambda: ratio("guided UNet call, 2 chunks", "guide", "published", "median_ms"),
    "guided memory": lambda: ratio("guided UNet call, 2 chunks", "guide", "published", "peak_mib"),
    "controls": controls,
    "two workers": lambda: f"{read(DEVICE / 'audit-cluster.json')['speed_up']:.2f}",
    "sd15 torch": lambda: f"{sd15('torch') / 1e3:.1f}",
    "sd15 onnx": lambda: f"{sd15(MAPS) / 1e3:.1f}",
    "sd15 gain": lambda: f"{sd15('torch') / sd15(MAPS):.2f}",
    "sd15 winograd": lambda: f"{sd15('torch') / sd15(f'{MAPS}, Winograd'):.2f}",
    "sd15 maps": lambda: f"{100 * sd15(MAPS) / sd15('onnx 23, no maps') - 100:.1f}",
    "testbed torch": lambda: of_batch_8("torch"),
    "testbed onnx": lambda: of_batch_8("onnx, no maps"),
    "testbed maps": lambda: of_batch_8("onnx, reduced maps"),
    "testbed maps 23": lambda: of_batch_8(MAPS),
    # float32, of 8 heads and 77 tokens, and of two concepts in six blocks: arithmetic, not a time
    "probabilities": lambda: f"{8 * QUERIES * 77 * 4 / 1e6:.0f}",
    "reduced": lambda: f"{6 * 2 * 4096 * 4 / 1e6:.1f}",
}
