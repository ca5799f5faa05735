"""What the pages show of a whole run of the benchmarks: tables, and numbers inside sentences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import newest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
DEVICE = RESULTS / "amd-epyc"  # whose tables the pages show first
NOT_MEASURED = "not measured"
Cells = list[tuple[str, list[str]]]  # column -> a cell a row


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run() -> dict[str, Any]:
    """The newest whole run of the device that the pages show."""
    path = newest(DEVICE)
    if path is None:
        raise ValueError(f"{DEVICE.relative_to(ROOT)} has no whole run: run benchmarks/run.py")
    return read(path)


def row(part: str, group: str, name: str) -> dict[str, Any] | None:
    """A row that was measured."""
    for found in run()["rows"]:
        if (found["part"], found["group"], found["name"]) == (part, group, name):
            return found if found["status"] == "ok" else None
    return None


def number(value: float) -> str:
    """Three digits, and no more than there are."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def group_cells(rows: list[dict[str, Any]]) -> Cells:
    """Columns of a group's table; those that no row fills are left out."""
    times = [each["median_ms"] for each in rows if each["median_ms"] is not None]
    unit, scale = ("s", 1e3) if times and min(times) >= 2000 else ("ms", 1.0)
    columns: dict[str, list[str]] = {}

    def put(column: str, cell: str) -> None:
        columns.setdefault(column, []).append(cell)

    for each in rows:
        timed = each["median_ms"] is not None
        note = f" ({each['note']})" if each["note"] else ""
        put("", f"{each['name']}{note}")
        put(f"median {unit}", number(each["median_ms"] / scale) if timed else each["status"])
        quartiles = [number(end / scale) for end in each["quartiles_ms"]] if timed else []
        put("quartiles", " to ".join(quartiles))
        several = timed and len(rows) > 1 and each["ratio"] is not None
        put("of the first", number(each["ratio"]) if several else "")
        put("error", "" if each["error"] is None else f"{each['error']:.0e}")
        put("peak MiB", "" if each["peak_mib"] is None else number(each["peak_mib"]))
        put("held KiB", "" if each["held_kib"] is None else number(each["held_kib"]))
        bound = timed and each["bound_ms"] is not None
        share = 100 * each["bound_ms"] / each["median_ms"] if bound else 0.0
        put("of the limit", f"{share:.0f} % ({each['bound_by']})" if bound else "")
    return [(name, cells) for name, cells in columns.items() if any(cells)]


def part_tables(record: dict[str, Any], part: str) -> str:
    """Every group of a part, each under a line that says its workload."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in record["rows"]:
        if each["part"] == part:
            groups.setdefault((each["group"], each["workload"]), []).append(each)
    lines: list[str] = []
    for (name, _), rows in groups.items():
        if rows[0]["name"] == "*":
            lines += [f"{name}: {rows[0]['status']}.", ""]
            continue
        threads = f"{rows[0]['threads']} thread{'s' * (rows[0]['threads'] > 1)}"
        rounds = max(each["rounds"] for each in rows)
        lines += [f"**{name}** ({rows[0]['workload']}; {threads}, {rounds} rounds)", ""]
        cells = group_cells(rows)
        lines.append(f"| {' | '.join(column for column, _ in cells)} |")
        lines.append("|---|" + "---:|" * (len(cells) - 1))
        lines += [f"| {' | '.join(each)} |" for each in zip(*(c for _, c in cells), strict=True)]
        lines.append("")
    return "\n".join(lines).strip()


def alone(part: str) -> str:
    """The groups of a part that has a results file of its own."""
    record = read(DEVICE / f"{part}.json")
    return f"{record['date'][:10]}.\n\n{part_tables(record, part)}"


def machine(record: dict[str, Any] | None = None) -> str:
    """Where and when the run was, and what the machine can do."""
    record = record or run()
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    peers = ", ".join(f"{name} {version}" for name, version in record["peers"].items())
    lines = [
        f"{record['device']}, {record['cores']} cores, {record['date'][:10]}, load "
        f"{record['load_before']:.1f} before it, {record['seconds'] / 60:.0f} minutes. {versions}. "
        f"Peers: {peers}.",
        "",
        "| threads | copy, GB/s read and written | matrix product, GFLOP/s | exponentials, 1e9/s |",
        "|---:|---:|---:|---:|",
    ]
    for threads, found in record["limits"].items():
        rate = found["exponentials_g_s"]
        cells = [number(found["copy_gb_s"]), number(found["matrix_gflop_s"])]
        cells.append(NOT_MEASURED if rate is None else number(rate))
        lines.append(f"| {threads} | {' | '.join(cells)} |")
    return "\n".join(lines)


def peers() -> str:
    """What each tool did with what was asked of it."""
    rows = [each for each in run()["rows"] if each["part"] == "peers" and each["name"] != "*"]
    tools = list(dict.fromkeys(each["name"] for each in rows))
    asked = dict.fromkeys(each["group"] for each in rows)
    lines = [f"| | {' | '.join(tools)} |", "|---|" + "---|" * len(tools)]
    said = {(each["group"], each["name"]): each["status"] for each in rows}
    for group in asked:
        cells = [said.get((group, tool), "") for tool in tools]
        cells = [
            "yes" if cell == "ok" else cell.replace("failed: ", "no: ").replace("|", "/")
            for cell in cells
        ]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


def audits() -> str:
    """Findings an hour beside the times."""
    rows = [
        each
        for each in run()["rows"]
        if (each["part"], each["group"]) == ("audits", "against the published recipe")
    ]
    lines = [
        "| | findings an hour | of the recipe's time | quartiles | difference of a finding |",
        "|---|---:|---:|---:|---:|",
    ]
    for each in rows:
        if each["median_ms"] is None:
            lines.append(f"| {each['name']} | {each['status']} | | | |")
            continue
        low, high = each["ratio_quartiles"]
        error = "" if each["error"] is None else f"{each['error']:.0e}"
        lines.append(
            f"| {each['name']} ({each['note']}) | {3.6e6 / each['median_ms']:,.0f} | "
            f"{each['ratio']:.2f} | {low:.2f} to {high:.2f} | {error} |"
        )
    return "\n".join(lines)


def scaling() -> str:
    """How an audit's time grows, with fitted slopes and those of the workers."""
    record = run()
    lines = ["| over | values | times, s | slope of log time | 95 % |", "|---|---|---|---:|---:|"]
    for fitted in record["slopes"]:
        rows = [
            each
            for each in record["rows"]
            if each["group"] == fitted["group"] and each["x"] and each["status"] == "ok"
        ]
        values = ", ".join(f"{each['x']:.0f}" for each in rows)
        what = " (of a finding)" if fitted["over"] == "batch size" else ""
        times = ", ".join(number(each["median_ms"] / 1e3) for each in rows)
        lines.append(
            f"| {fitted['over']}{what} | {values} | {times} | {fitted['slope']:.2f} | "
            f"{fitted['low']:.2f} to {fitted['high']:.2f} |"
        )
    found = read(DEVICE / "audit-cluster.json")
    seconds = [statistics.median(found["seconds"][n]) for n in ("1", "2")]
    slope = -math.log2(found["speed_up"])
    of_rounds = sorted(-math.log2(each) for each in found["speed_up_of_each_round"])
    lines.append(
        f"| workers (one thread each) | 1, 2 | {', '.join(map(number, seconds))} | "
        f"{slope:.2f} | {of_rounds[0]:.2f} to {of_rounds[-1]:.2f} (rounds) |"
    )
    return "\n".join(lines)


def other_devices() -> str:
    """Whole runs of other devices, complete."""
    found = [newest(folder) for folder in sorted(RESULTS.iterdir()) if folder != DEVICE]
    parts: list[str] = []
    for path in found:
        if path is None:
            continue
        record = read(path)
        parts += [f"### {record['device']}", machine(record)]
        parts += [
            part_tables(record, part) for part in dict.fromkeys(r["part"] for r in record["rows"])
        ]
    return "\n\n".join(parts) or "None yet: no GPU was at hand."


# What the README shows: words, ours, what it is compared with, and of what the ratio is
HEADLINE = [
    (
        "hard IoU of all pairs, against numpy pair by pair (published)",
        ("overlap", "hard IoU", "pairwise_iou"),
        "numpy, pair by pair (published)",
    ),
    (
        "the same, against batched numpy",
        ("overlap", "hard IoU", "pairwise_iou"),
        "numpy, batched",
    ),
    (
        "SoftIoU with gradient, against 20 unrolled iterations, batched",
        ("overlap", "SoftIoU with gradient", "ops.soft_iou, each map once"),
        "unrolled, batched",
    ),
    (
        "one UNet call of SD 1.5's shapes with maps, against none",
        ("recorder", "SD 1.5 shapes", "recorder"),
        "plain",
    ),
    (
        "the same, against OVAM",
        ("recorder", "SD 1.5 shapes", "recorder"),
        "OVAM",
    ),
    (
        "that call's concept maps alone, against keeping its probabilities",
        ("recorder", "the recorder's share of a UNet call", "concept maps"),
        "probabilities kept",
    ),
    (
        "one guided UNet call of SD 1.5's shapes, against the published way",
        ("guidance", "guided UNet call, 2 chunks", "guide"),
        "published",
    ),
    (
        "a finding of a whole audit at batch 8, against the published recipe",
        ("audits", "against the published recipe", "run_audit, batch 8"),
        "published recipe, one picture at a time",
    ),
]


def headline() -> str:
    """Ours against what one would run otherwise: time, and memory where it was measured."""
    lines = ["| | ours | theirs | speed-up | memory |", "|---|---:|---:|---:|---:|"]
    for words, (part, group, name), other in HEADLINE:
        ours, theirs = row(part, group, name), row(part, group, other)
        if ours is None or theirs is None:
            lines.append(f"| {words} | {NOT_MEASURED} | | | |")
            continue
        times = [each["median_ms"] for each in (ours, theirs)]
        memory = ""
        for column, unit in (("peak_mib", "MiB at the peak"), ("held_kib", "KiB held")):
            pair = (ours[column], theirs[column])
            if None not in pair:
                memory = f"{number(pair[0])} of {number(pair[1])} {unit}"
        pairs = zip(theirs["times_ms"], ours["times_ms"], strict=True)
        gains = sorted(other / own for other, own in pairs)
        low, middle, high = map(number, (gains[0], statistics.median(gains), gains[-1]))
        cells = [*map(duration, times), f"{middle}x ({low} to {high})", memory]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def duration(milliseconds: float) -> str:
    seconds = milliseconds >= 1000
    return f"{number(milliseconds / 1e3)} s" if seconds else f"{number(milliseconds)} ms"


def measured(part: str, group: str, name: str, column: str = "median_ms", per: float = 1.0) -> str:
    found = row(part, group, name)
    return NOT_MEASURED if found is None or found[column] is None else number(found[column] / per)


def stored(file: str, name: str, group: str = "") -> float:
    """Median of a row in a file of its own, in milliseconds."""
    rows = [each for each in read(DEVICE / file)["rows"] if group in ("", each["group"])]
    return next(float(each["median_ms"]) for each in rows if each["name"] == name)


def of_batch_8(name: str) -> str:
    return number(stored("engines-testbed.json", name, "one call, batch 8"))


def share(group: str, ours: str, theirs: str, column: str, part: str = "guidance") -> str:
    pair = row(part, group, ours), row(part, group, theirs)
    values = [each[column] for each in pair if each is not None and each[column] is not None]
    return f"{values[0] / values[1]:.2f}" if len(values) == 2 else NOT_MEASURED


def controls() -> str:
    """What the default measures add to a whole audit of IoU alone, in percent."""
    group = "what the defaults measure beside IoU"
    found = row("audits", group, "containment, controls and curves")
    more = NOT_MEASURED if found is None or found["ratio"] is None else found["ratio"] - 1
    return more if isinstance(more, str) else f"{100 * more:.0f}"


def sd15_gain(name: str) -> str:
    """How many times as fast as eager torch."""
    gain = stored("engines-sd15.json", "torch") / stored("engines-sd15.json", name)
    return f"{gain:.2f}"


QUERIES = 5 * (4096 + 1024 + 256)  # of the default layers of SD 1.5 at 64 x 64
# Numbers inside sentences: name -> what stands between <!-- = name --> and <!-- /= -->
INLINE: dict[str, Callable[[], str]] = {
    "held": lambda: measured("recorder", "SD 1.5 shapes", "recorder", "held_kib"),
    "guided time": lambda: share("guided UNet call, 2 chunks", "guide", "published", "median_ms"),
    "guided memory": lambda: share("guided UNet call, 2 chunks", "guide", "published", "peak_mib"),
    "controls": controls,
    "two workers": lambda: f"{read(DEVICE / 'audit-cluster.json')['speed_up']:.2f}",
    "sd15 torch": lambda: f"{stored('engines-sd15.json', 'torch') / 1e3:.1f}",
    "sd15 onnx": lambda: f"{stored('engines-sd15.json', 'onnx 23, reduced maps') / 1e3:.1f}",
    "sd15 gain": lambda: sd15_gain("onnx 23, reduced maps"),
    "sd15 winograd": lambda: sd15_gain("onnx 23, reduced maps, Winograd"),
    "sd15 maps": lambda: "{:.1f}".format(
        100
        * stored("engines-sd15.json", "onnx 23, reduced maps")
        / stored("engines-sd15.json", "onnx 23, no maps")
        - 100
    ),
    "testbed torch": lambda: of_batch_8("torch"),
    "testbed onnx": lambda: of_batch_8("onnx, no maps"),
    "testbed maps": lambda: of_batch_8("onnx, reduced maps"),
    "testbed maps 23": lambda: of_batch_8("onnx 23, reduced maps"),
    # float32, of 8 heads and 77 tokens, and of two concepts in six blocks: arithmetic, not a time
    "probabilities": lambda: f"{8 * QUERIES * 77 * 4 / 1e6:.0f}",
    "reduced": lambda: f"{6 * 2 * 4096 * 4 / 1e6:.1f}",
}
