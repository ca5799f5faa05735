"""Writes the tables of README.md and docs/ from committed results, or checks them.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import newest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
DEVICE = RESULTS / "amd-epyc"  # whose tables the pages show first
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs/benchmarks.md"
ENGINES = ROOT / "export/README.md"
GUIDANCE = ROOT / "docs/guidance.md"
STATISTICS = ROOT / "docs/statistics.md"
CALIBRATION = RESULTS / "studies/calibration.json"
STUDY = RESULTS / "studies/guidance.json"
VALIDITY = ROOT / "docs/validity.md"
VALIDITY_STUDY = RESULTS / "studies/validity.json"
SCALE = ROOT / "docs/scale.md"
PROFILES = {
    "embedded model": DEVICE / "audit-profile-testbed.json",
    "shapes of SD 1.5": DEVICE / "audit-profile-sd15.json",
}
TRAINING = ROOT / "python/biasmap_fast/testbed/weights/training.json"


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
    lines = ["| | ours | theirs | time, of theirs | memory |", "|---|---:|---:|---:|---:|"]
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
        cells = [*map(duration, times), number(times[0] / times[1]), memory]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def duration(milliseconds: float) -> str:
    seconds = milliseconds >= 1000
    return f"{number(milliseconds / 1e3)} s" if seconds else f"{number(milliseconds)} ms"


def measured(part: str, group: str, name: str, column: str = "median_ms", per: float = 1.0) -> str:
    found = row(part, group, name)
    return NOT_MEASURED if found is None or found[column] is None else number(found[column] / per)


def stored(file: str, name: str) -> float:
    """Median of a row in a file of its own, in milliseconds."""
    return next(float(r["median_ms"]) for r in read(DEVICE / file)["rows"] if r["name"] == name)


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


BATCH_8 = ("engines", "testbed, batch 8")
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
    "sd15 gain": lambda: "{:.2f}".format(
        stored("engines-sd15.json", "torch") / stored("engines-sd15.json", "onnx 23, reduced maps")
    ),
    "testbed torch": lambda: measured(*BATCH_8, "torch"),
    "testbed compiled": lambda: measured(*BATCH_8, "torch.compile"),
    "testbed onnx": lambda: measured(*BATCH_8, "onnx, no maps"),
    "testbed maps": lambda: measured(*BATCH_8, "onnx, reduced maps"),
    "testbed maps 23": lambda: measured(*BATCH_8, "onnx 23, reduced maps"),
    # float32, of 8 heads and 77 tokens, and of two concepts in six blocks: arithmetic, not a time
    "probabilities": lambda: f"{8 * QUERIES * 77 * 4 / 1e6:.0f}",
    "reduced": lambda: f"{6 * 2 * 4096 * 4 / 1e6:.1f}",
}


def testbed() -> str:
    """Evaluation of the packaged weights."""
    found = read(TRAINING)["evaluation"]
    shares = found["shares"]
    lines = [
        "| | |",
        "|---|---:|",
        "| profession right, guidance 3, 25 steps "
        f"| {100 * found['drawn']['profession_accuracy']:.1f} % |",
    ]
    for form, what in (("joint", "joint prompt"), ("single", "one concept a prompt")):
        for word in ("profession", "man", "woman"):
            auc = found["maps"][f"{form} {word}"]["auc"]
            lines.append(f"| pixel AUC of the {word} map on its region, {what} | {auc:.3f} |")
    lines += [
        f"| pictures a profession for the shares | {shares['pictures_each']} |",
        f"| slope of drawn on planted shares, guidance 1 | {shares['share_slope']:.2f} |",
        "| mean error of the shares at guidance 1 (of sampling alone) "
        f"| {shares['mean_absolute_error']:.3f} ({shares['expected_absolute_error']:.3f}) |",
        f"| chi-square p of the shares | {shares['chi_square_p']:.3f} |",
        f"| slope of drawn on planted shares, guidance 3 | {found['drawn']['share_slope']:.2f} |",
    ]
    return "\n".join(lines)


def change(measure: dict[str, Any]) -> str:
    """A relative change in percent with its interval."""
    if measure["relative"] is None:
        return "\N{EN DASH}"
    value = f"{100 * measure['relative']:+.0f}"
    if measure["relative_low"] is None:
        return value
    low, high = (f"{100 * measure[f'relative_{end}']:+.0f}" for end in ("low", "high"))
    return f"{value} [{low}, {high}]".replace("-", "\N{MINUS SIGN}")


def study() -> str:
    """What guidance moved, cell by cell; changes in percent of the plain pictures' value."""
    columns = {
        "energy": "energy",
        "IoU during, joint": "IoU during",
        "IoU after, joint": "IoU after",
        "IoU after, separate": "IoU after, one word a prompt",
        "true overlap": "true overlap",
        "plausibility": "plausibility",
    }
    lines = [
        f"| | pictures | {' | '.join(columns.values())} | profession right |",
        "|---|---:|" + "---:|" * (len(columns) + 1),
    ]
    found = read(STUDY)
    for row in found["rows"]:
        right = f"{100 * row['profession_right']['value']:.1f} %"
        pictures = row["seeds"] * found["professions"]
        measures = row["measures"]
        if row["cell"] == "plain":
            values = [f"{measures[name]['plain']:.3f}" for name in columns]
        else:
            values = [change(measures[name]) for name in columns]
        lines.append(f"| {row['cell']} | {pictures} | {' | '.join(values)} | {right} |")
    return "\n".join(lines)


def study_more() -> str:
    """Corrected IoU and demographic shares, in points of 100."""
    columns = [f"corrected IoU {when}, joint" for when in ("during", "after")]
    lines = [
        "| | corrected IoU during | change | corrected IoU after | change | P(woman), change |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in read(STUDY)["rows"]:
        cells = []
        plain = row["cell"] == "plain"
        for name in columns:
            figures = row["measures"][name]
            cells += [f"{100 * figures['value']:.1f}", "" if plain else points(figures["change"])]
        cells.append("" if plain else points(row["share_woman_change"]))
        lines.append(f"| {row['cell']} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("| -", "| \N{MINUS SIGN}")


def points(figures: dict[str, Any]) -> str:
    """A change in points of 100 with its interval."""
    value, low, high = (f"{100 * figures[end]:+.1f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]".replace("-", "\N{MINUS SIGN}")


def profile() -> str:
    """What of an audit's processor time its parts take."""
    found = {name: read(path) for name, path in PROFILES.items() if path.exists()}
    parts = ("network", "maps", "sampler", "classifier", "overlaps", "records", "loop", "start")
    lines = [f"| | {' | '.join(found)} |", "|---|" + "---:|" * len(found)]
    for part in parts:
        shares = [f"{100 * each['share'].get(part, 0.0):.2f} %" for each in found.values()]
        lines.append(f"| {part} | {' | '.join(shares)} |")
    for label, name in (
        ("all but the networks", "share_of_all_but_the_networks"),
        ("the same, without the start", "share_without_the_start"),
        ("overlaps, records and loop, without the start", "share_of_the_audits_own_code"),
    ):
        shares = [f"{100 * each[name]:.2f} %" for each in found.values()]
        lines.append(f"| **{label}** | {' | '.join(shares)} |")
    return "\n".join(lines)


def calibration() -> str:
    """Simulated rates of the audit's tests and intervals."""
    found = read(CALIBRATION)
    lines = [
        f"`benchmarks/calibration.py`, {found['trials']} trials a row:",
        "",
        "| | nominal | found | standard error |",
        "|---|---:|---:|---:|",
    ]
    for row in found["rows"]:
        nominal = "" if row["nominal"] is None else f"{row['nominal']:.2f}"
        lines.append(
            f"| {row['name']} | {nominal} | {row['rate']:.3f} | {row['standard_error']:.3f} |"
        )
    return "\n".join(lines)


def validity() -> str:
    """The chosen measure, the published one, and what lies between, on the final models."""
    groups = read(VALIDITY_STUDY)["groups"]
    lines = [
        "| | choosing | final | final AUC | rho | adjacent | 0.25 against 0.75 | single pictures |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in groups["final"]["variants"].items():
        chose = groups["choosing"]["variants"][name]["figures"]["concordance"]["value"]
        own = found["figures"]
        cells = [f"{chose:.2f}", interval(own["concordance"]), interval(own["auc"])]
        cells += [f"{own[f]['value']:.2f}" for f in ("rho", "adjacent", "quarter", "picture_auc")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def validity_measures() -> str:
    """Every measure on the chosen maps and on the published ones."""
    groups = read(VALIDITY_STUDY)["groups"]
    lines = [
        "| measure | chosen maps, choosing | final | published maps, choosing | final |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in groups["final"]["measures"]["winner"]:
        cells = [
            f"{groups[group]['measures'][maps][name]['figures']['concordance']['value']:.2f}"
            for maps in ("winner", "published")
            for group in ("choosing", "final")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def validity_levels() -> str:
    """Each planted level against level 0 on the final models."""
    levels = read(VALIDITY_STUDY)["groups"]["final"]["levels"]
    lines = [
        "| planted | chosen: AUC against 0 | mean value | published: AUC against 0 | mean value |",
        "|---:|---:|---:|---:|---:|",
    ]
    for level in levels["winner"]:
        cells = []
        for name in ("winner", "published"):
            found = levels[name][level]
            cells.append("" if level == "0" else f"{found['auc']['value']:.2f}")
            cells.append(f"{found['value']['value']:.2f}")
        lines.append(f"| {level} | {' | '.join(cells)} |")
    return "\n".join(lines)


def validity_models() -> str:
    """The gate, model by model, and the chosen and the published measure on each."""
    lines = [
        "| model | AUC of the profession's map | man | woman | drawn right | chosen | published |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for group, found in read(VALIDITY_STUDY)["groups"].items():
        values = [
            found["variants"][name]["figures"]["concordance"]["models"]
            for name in ("winner", "published")
        ]
        figures = dict(zip(found["passed"], zip(*values, strict=True), strict=True))
        for model, gates in found["gates"].items():
            cells = [f"{gates[word]:.3f}" for word in ("noun", "man", "woman")]
            cells.append(f"{100 * found['profession_right'][model]:.0f} %")
            cells += [f"{x:.2f}" for x in figures[model]] if model in figures else ["left out", ""]
            lines.append(f"| {group}, {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(figures: dict[str, Any]) -> str:
    """A mean over models with its interval; a probability does not go beyond 1."""
    return f"{figures['value']:.2f} [{figures['low']:.2f}, {min(1.0, figures['high']):.2f}]"


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"headline": headline, "testbed": testbed},
    BENCHMARKS: {
        "machine": machine,
        "overlap": lambda: part_tables(run(), "overlap"),
        "recorder": lambda: part_tables(run(), "recorder"),
        "peers": peers,
        "guidance": lambda: part_tables(run(), "guidance"),
        "audits": audits,
        "scaling": scaling,
        "engines": lambda: part_tables(run(), "engines"),
        "other devices": other_devices,
    },
    ENGINES: {},
    VALIDITY: {
        "validity": validity,
        "validity measures": validity_measures,
        "validity levels": validity_levels,
        "validity models": validity_models,
    },
    STATISTICS: {"calibration": calibration},
    GUIDANCE: {
        "study": study,
        "study more": study_more,
        "cost": lambda: part_tables(run(), "guidance"),
    },
    SCALE: {"profile": profile},
}


def rendered(path: Path, text: str | None = None) -> str:
    """A page with its tables and numbers made anew.

    A table stands between ``<!-- name -->`` and ``<!-- /name -->``, a number inside a sentence
    between ``<!-- = name -->`` and ``<!-- /= -->``.
    """
    text = path.read_text(encoding="utf-8") if text is None else text
    for name, table in TABLES[path].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, re.DOTALL):
            raise ValueError(f"{path.name} has no place <!-- {name} --> ... <!-- /{name} -->")
        # no backslash of a table may act as a group reference
        filled = table().replace("\\", r"\\")
        text = re.sub(pattern, rf"\g<1>{filled}\n\g<2>", text, flags=re.DOTALL)
    return re.sub(
        r"(<!-- = ([\w ]+) -->).*?(<!-- /= -->)",
        lambda found: f"{found[1]}{INLINE[found[2]]()}{found[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a table is out of date")
    options = parser.parse_args()
    for path in TABLES:
        fresh = rendered(path)
        if options.check and fresh != path.read_text(encoding="utf-8"):
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run benchmarks/tables.py")
        path.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
