"""The report of a run: one HTML file that needs no network, made from the run folder alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from ..overlap import chance_iou
from ..pipelines import TESTBED
from . import figures, sentences
from .files import write_text
from .measure import stem
from .plan import GUIDED, AuditPlan, Unit
from .records import OK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pyarrow as pa


@dataclass(frozen=True)
class _Axis:
    """What the report shows of one demographic axis."""

    name: str
    words: tuple[str, ...]
    contained: list[str]  # what containment says; empty where the plan measures IoU alone
    contained_chart: str
    contained_rows: list[dict[str, Any]]
    contained_scatter: str
    chart: str
    tables: list[dict[str, Any]]
    overall: list[dict[str, Any]]
    strips: list[dict[str, Any]]
    scales: dict[str, tuple[float, float]]
    blocks: str
    scatter: str
    shares: str
    finding: str
    multiplicity: str
    controls_text: list[str]
    controls_chart: str
    control_rows: list[dict[str, Any]]
    curve: str
    areas: list[tuple[str, Any]]
    steps: str
    ranks: list[str]  # against the planted overlap, at the first percentile
    rank_rows: list[dict[str, Any]]
    shares_text: str


def write_report(
    folder: Path, plan: AuditPlan, records: pa.Table, summary: Mapping[str, Any]
) -> Path:
    """Writes ``report.html`` into the run folder.

    Args:
        folder: the run folder; pictures, maps and environment are read from it where they are.
        plan: its plan.
        records: its records.
        summary: their summary.

    Returns:
        The report's path.
    """
    environment = _environment(folder)
    main = _under(plan.conditions[0], summary)
    axes = [_axis(name, words, folder, plan, records, main) for name, words in plan.axes.items()]
    html = _template().render(
        plan=plan,
        model="the embedded testbed model" if plan.model == TESTBED else plan.model,
        axes=axes,
        conditions=_conditions(folder, plan, records, summary),
        summary=main,
        run=summary["run"],
        failures=_failures(records),
        headline=sentences.headline(plan, summary),
        limits=sentences.limits(plan, summary),
        guided_maps=sentences.guided_maps(),
        settings=_settings(plan),
        environment=_flat(environment),
        colours={part: figures.hex_colour(part) for part in ("semantic", "demographic", "both")},
        testbed=summary["testbed"] is not None,
    )
    path = folder / "report.html"
    write_text(path, html)
    return path


def _under(condition: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary's rows of one condition alone."""

    def own(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [row for row in rows if row["condition"] == condition]

    found = dict(summary)
    for name in (
        *("professions", "overall", "comparisons", "shares"),
        *("controls", "curves", "sweeps"),
    ):
        found[name] = own(summary[name])
    if summary["testbed"] is not None:
        found["testbed"] = {**summary["testbed"], "rank": own(summary["testbed"]["rank"])}
    return found


def _conditions(
    folder: Path, plan: AuditPlan, records: pa.Table, summary: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What the report shows of every condition but the first, in the plan's order."""
    found = []
    for condition in plan.conditions[1:]:
        rows = [row for row in summary["differences"] if row["condition"] == condition]
        curves = [row for row in summary["guidance"] if row["condition"] == condition]
        found.append(
            {
                "name": condition,
                "guided": condition == GUIDED,
                "rows": rows,
                "contained": [
                    row
                    for row in (summary["containment"] or {}).get("differences", [])
                    if row["condition"] == condition
                ],
                "axes": [
                    _condition_axis(name, words, condition, rows, folder, plan, records, summary)
                    for name, words in plan.axes.items()
                ],
                "curves": _ledger_figures(curves),
                "skipped": _skips(curves),
                "outputs": summary["outputs"],
                "shares": [
                    row for row in summary["share_differences"] if row["condition"] == condition
                ],
            }
        )
    return found


def _condition_axis(
    name: str,
    words: tuple[str, ...],
    condition: str,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    plan: AuditPlan,
    records: pa.Table,
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    first = plan.percentiles[0]
    main = [row for row in rows if row["axis"] == name and row["percentile"] == first]
    by_word = {
        row["demographic"]: {one["semantic"]: one["iou"] for one in row["professions"]}
        for row in main
    }
    cells = {
        (row["semantic"], row["demographic"]): row
        for row in summary["professions"]
        if (row["axis"], row["percentile"], row["condition"]) == (name, first, plan.conditions[0])
    }
    order = _order(plan.professions, words, cells)
    means = {row["demographic"]: row["iou"] for row in main}
    chart = figures.intervals(
        [*order, "mean over professions"],
        {
            word: [*(by_word[word].get(p) for p in order), means[word]]
            for word in words
            if word in by_word
        },
        label=f"change of IoU under {condition}, {name}, percentile {first:g}",
        reference=0.0,
        reference_label="no change",
        rule_above=len(order),
    )
    ranked = _contained_order(name, words, plan, summary) or order
    strips, scales = _strips(name, words, ranked, folder, plan, records, condition)
    return {
        "name": name,
        "sentences": [sentences.difference(row) for row in main],
        "chart": chart if by_word else "",
        "strips": strips,
        "scales": scales,
    }


def _ledger_figures(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """Energy and IoU, and the gradient's norm, over the UNet calls."""
    if not curves:
        return []
    calls = [row["call"] for row in curves]
    overlap = {
        "energy (mean SoftIoU)": [row["energy"] for row in curves],
        "IoU of the same call's maps": [row["iou"] for row in curves],
    }
    norm = {"gradient norm": [row["gradient_norm"] for row in curves]}
    return [
        figures.bands(calls, overlap, x_label="UNet call", label="overlap"),
        figures.bands(calls, norm, x_label="UNet call", label="gradient norm"),
    ]


def _skips(curves: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Reason -> how many calls of pictures were not guided for it."""
    counts: Counter[str] = Counter()
    for row in curves:
        counts.update(row["skipped"])
    return sorted(counts.items())


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,  # names of professions and models are other people's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = sentences.number
    environment.filters["interval"] = sentences.interval
    environment.filters["percent"] = sentences.percent
    environment.filters["p_value"] = sentences.p_value
    source = files(__package__).joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def _axis(
    name: str,
    words: tuple[str, ...],
    folder: Path,
    plan: AuditPlan,
    records: pa.Table,
    summary: Mapping[str, Any],
) -> _Axis:
    rows = [row for row in summary["professions"] if row["axis"] == name]
    overall = [row for row in summary["overall"] if row["axis"] == name]
    shares = {row["semantic"]: row for row in summary["shares"] if row["axis"] == name}
    planted = {row["semantic"]: row for row in (summary["testbed"] or {}).get("planted", [])}
    first = plan.percentiles[0]
    by_cell = {
        (row["semantic"], row["demographic"]): row for row in rows if row["percentile"] == first
    }
    order = _order(plan.professions, words, by_cell)
    inside = _contained(name, words, plan, summary, planted)
    shown = [row["profession"] for row in inside["contained_rows"]] or order
    strips, scales = _strips(name, words, shown, folder, plan, records, plan.conditions[0])
    ranks = [row for row in (summary["testbed"] or {}).get("rank", []) if row["axis"] == name]
    main = [row for row in ranks if row["percentile"] == first and row["against"] == "overlap"]
    return _Axis(
        name=name,
        words=words,
        contained=sentences.contained(name, plan, summary),
        **inside,
        chart=_chart(name, words, order, by_cell, overall, first),
        tables=[
            {
                "percentile": q,
                "chance": chance_iou(1 - q / 100),
                "rows": _table(order, words, rows, shares, planted, q),
            }
            for q in plan.percentiles
        ],
        overall=overall,
        strips=strips,
        scales=scales,
        blocks=_blocks(name, words, overall, first),
        scatter=_scatter(name, words, by_cell, planted, main),
        shares=_share_chart(name, words, order, shares, planted),
        finding=sentences.finding(name, summary),
        multiplicity=sentences.multiplicity(name, summary),
        controls_text=sentences.controls(name, plan, summary),
        controls_chart=_controls_chart(name, plan, overall, summary),
        control_rows=_control_rows(name, plan, summary),
        curve=_curve(name, summary),
        areas=[
            (row["demographic"], row["area"]) for row in summary["curves"] if row["axis"] == name
        ],
        steps=_steps(name, summary),
        ranks=[sentences.rank(row) for row in main],
        rank_rows=_rank_rows(ranks),
        shares_text=sentences.shares(name, summary) if shares and planted else "",
    )


def _contained(
    name: str,
    words: Sequence[str],
    plan: AuditPlan,
    summary: Mapping[str, Any],
    planted: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Containment of every profession: a chart, the rows of its table, and the planted truth."""
    found = summary["containment"]
    if found is None:
        return {"contained_chart": "", "contained_rows": [], "contained_scatter": ""}
    part = (name, plan.conditions[0])
    overall, ranks = (
        [row for row in found[which] if (row["axis"], row["condition"]) == part]
        for which in ("overall", "rank")
    )
    cells = _contained_cells(name, plan, summary)
    means = {row["demographic"]: row["containment"] for row in overall}
    order = _order(plan.professions, words, cells)
    chance = found["fractions"][1]
    chart = figures.intervals(
        [*order, "mean over professions"],
        {
            word: [
                *(cells[p, word]["iou"] if (p, word) in cells else None for p in order),
                means.get(word),
            ]
            for word in words
        },
        label=f"containment of the profession in the {name} word",
        reference=chance,
        reference_label=f"chance {chance:g}",
        rule_above=len(order),
    )
    against = [row for row in ranks if row["against"] == "overlap"]
    return {
        "contained_chart": chart if cells else "",
        "contained_rows": [
            {
                "profession": profession,
                "planted": _planted_overlap(planted.get(profession, {}), words),
                "words": [{"word": word, "cell": cells.get((profession, word))} for word in words],
            }
            for profession in order
        ],
        "contained_scatter": _scatter(name, words, cells, planted, against, label="containment"),
    }


def _planted_overlap(planted: Mapping[str, Any], words: Sequence[str]) -> float | None:
    """A profession's planted overlap, which is the same for every word that it is known of."""
    overlap = planted.get("overlap", {})
    return next((overlap[word] for word in words if word in overlap), None)


def _contained_cells(
    name: str, plan: AuditPlan, summary: Mapping[str, Any]
) -> dict[tuple[str, str], dict[str, Any]]:
    """(profession, word) -> containment under the first condition; empty where not measured.

    The drawing functions were made for IoU, and look for the figure under that name.
    """
    return {
        (row["semantic"], row["demographic"]): {**row, "iou": row["containment"]}
        for row in (summary["containment"] or {}).get("professions", [])
        if (row["axis"], row["condition"]) == (name, plan.conditions[0])
    }


def _contained_order(
    name: str, words: Sequence[str], plan: AuditPlan, summary: Mapping[str, Any]
) -> list[str]:
    """Professions by containment, as `_order`; none where it was not measured."""
    cells = _contained_cells(name, plan, summary)
    return _order(plan.professions, words, cells) if cells else []


def _order(
    professions: Sequence[str],
    words: Sequence[str],
    cells: Mapping[tuple[str, str], Mapping[str, Any]],
) -> list[str]:
    """Professions by IoU, averaged over the axis' words, the highest first; unmeasured last."""

    def level(profession: str) -> float:
        values = [
            cells[profession, word]["iou"]["value"]
            for word in words
            if (profession, word) in cells and cells[profession, word]["iou"]["value"] is not None
        ]
        return sum(values) / len(values) if values else -1.0

    return sorted(professions, key=level, reverse=True)


def _chart(
    name: str,
    words: Sequence[str],
    order: Sequence[str],
    cells: Mapping[tuple[str, str], Mapping[str, Any]],
    overall: Sequence[Mapping[str, Any]],
    percentile: float,
) -> str:
    means = {row["demographic"]: row for row in overall if row["percentile"] == percentile}
    if not means:
        return ""
    chance = next(iter(means.values()))["chance"]
    series = {
        word: [
            *(cells[p, word]["iou"] if (p, word) in cells else None for p in order),
            means[word]["iou"] if word in means else None,
        ]
        for word in words
    }
    return figures.intervals(
        [*order, "mean over professions"],
        series,
        label=f"IoU of profession and {name} word, percentile {percentile:g}",
        reference=chance,
        reference_label=f"chance {chance:.3f}",
        rule_above=len(order),
    )


def _table(
    order: Sequence[str],
    words: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    shares: Mapping[str, Mapping[str, Any]],
    planted: Mapping[str, Mapping[str, Any]],
    percentile: float,
) -> list[dict[str, Any]]:
    cells = {
        (row["semantic"], row["demographic"]): row
        for row in rows
        if row["percentile"] == percentile
    }
    return [
        {
            "profession": profession,
            "words": [
                {
                    "word": word,
                    "cell": cells.get((profession, word)),
                    "share": shares.get(profession, {}).get("words", {}).get(word),
                    "planted_share": planted.get(profession, {}).get("shares", {}).get(word),
                    "planted_overlap": planted.get(profession, {}).get("overlap", {}).get(word),
                }
                for word in words
            ],
        }
        for profession in order
    ]


def _strips(
    axis: str,
    words: Sequence[str],
    order: Sequence[str],
    folder: Path,
    plan: AuditPlan,
    records: pa.Table,
    condition: str,
) -> tuple[list[dict[str, Any]], dict[str, tuple[float, float]]]:
    """Pictures with maps of every profession that has both kept; three of them have a rank."""
    from PIL import Image
    from safetensors.torch import load_file

    seed, measure = plan.seeds[0], "containment" if plan.measure == "containment" else "IoU"
    kept = []
    for profession in order:
        name = stem(plan, Unit(profession, seed, condition))
        picture, maps = folder / f"pictures/{name}.png", folder / f"maps/{name}.safetensors"
        if picture.is_file() and maps.is_file():
            kept.append((profession, picture, maps))
    if not kept:
        return [], {}
    ranks = {0: f"highest {measure}", len(kept) // 2: "median", len(kept) - 1: f"lowest {measure}"}
    if len(kept) == 1:
        ranks = {}
    loaded = []
    for index, (profession, picture, maps) in enumerate(kept):
        tensors = load_file(maps)
        with Image.open(picture) as opened:
            loaded.append((profession, ranks.get(index), opened.convert("RGB"), tensors))
    scales = {
        side: _range([t[f"{axis}/{word}/{side}"] for *_, t in loaded for word in words])
        for side in ("semantic", "demographic")
    }
    joint = isinstance(plan.attribution_template, str)
    measured = _measured(records, condition, axis, seed, plan.percentiles[0])
    strips = []
    for profession, rank, image, tensors in loaded:
        panels = [
            {
                "src": figures.picture_panel(image),
                "alt": f"picture of {profession}",
                "text": plan.prompt(profession),
            }
        ]
        for word in words:
            a = tensors[f"{axis}/{word}/semantic"]
            b = tensors[f"{axis}/{word}/demographic"]
            shown = measured.get((profession, word), "not measured")
            panels += [
                {
                    "src": figures.heat_panel(image, a, profession, scales["semantic"]),
                    "alt": f"map of {profession} over the picture",
                    "text": f"“{profession}” beside “{word}”" if joint else f"“{profession}”",
                },
                {
                    "src": figures.heat_panel(image, b, word, scales["demographic"]),
                    "alt": f"map of {word} over the picture",
                    "text": f"“{word}”",
                },
                {
                    "src": figures.mask_panel(image, a, b, plan.percentiles[0]),
                    "alt": f"masks of {profession} and {word}, {shown}",
                    "text": shown,
                },
            ]
        strips.append({"profession": profession, "rank": rank, "seed": seed, "panels": panels})
    return strips, scales


def _range(maps: Sequence[Any]) -> tuple[float, float]:
    """The coldest and hottest colour's value of maps of one size: one pixel in 200 is hotter.

    The hottest pixel of twenty professions would leave the others' maps dark.
    """
    values = np.stack([m.numpy() for m in maps])
    return float(values.min()), float(np.quantile(values, 0.995))


def _measured(
    records: pa.Table, condition: str, axis: str, seed: int, percentile: float
) -> dict[tuple[str, str], str]:
    """(profession, word) -> what was measured on one seed's picture, in words."""
    key = ["condition", "axis", "seed", "percentile", "status"]
    columns = [*key, "semantic", "demographic", "iou", "containment"]
    found = {}
    for row in records.select(columns).to_pylist():
        if [row[name] for name in key] == [condition, axis, seed, percentile, OK]:
            text = f"IoU {row['iou']:.2f}"
            if row["containment"] is not None:
                text += f", containment {row['containment']:.2f}"
            found[row["semantic"], row["demographic"]] = text
    return found


def _blocks(
    name: str, words: Sequence[str], overall: Sequence[Mapping[str, Any]], percentile: float
) -> str:
    means = {row["demographic"]: row for row in overall if row["percentile"] == percentile}
    blocks = sorted(
        {block for row in means.values() for block in row["block_iou"]}, key=_block_order
    )
    if not blocks:
        return ""
    return figures.columns(
        blocks,
        {
            word: [means[word]["block_iou"].get(block) for block in blocks]
            for word in words
            if word in means
        },
        label=f"block IoU, {name}",
        reference=next(iter(means.values()))["chance"],
    )


def _block_order(name: str) -> tuple[int, str]:
    """Down blocks, mid block, up blocks: the order in which the UNet runs them."""
    for place, part in enumerate(("down", "mid", "up")):
        if name.startswith(part):
            return place, name
    return 3, name


def _main_controls(name: str, summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Controls of one axis at the first percentile, a row a word."""
    first = summary["run"]["percentiles"][0]
    rows = summary["controls"]
    return [row for row in rows if (row["axis"], row["percentile"]) == (name, first)]


def _controls_chart(
    name: str, plan: AuditPlan, overall: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> str:
    """The mean over professions beside the level of every null and control."""
    rows = _main_controls(name, summary)
    if not rows:
        return ""
    first = plan.percentiles[0]
    means = {row["demographic"]: row for row in overall if row["percentile"] == first}
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["overall"]))
    return figures.columns(
        [
            "the word itself",
            *(
                sentences.control_name(kind, plan).replace("shuffled ", "shuffled\n")
                for kind in kinds
            ),
        ],
        {
            row["demographic"]: [
                means[row["demographic"]]["iou"],
                *(row["overall"].get(kind, {}).get("level") for kind in kinds),
            ]
            for row in rows
        },
        label=f"mean IoU, {name}",
        reference=next(iter(means.values()))["chance"],
    )


def _after_holm(row: Mapping[str, Any], kind: str) -> int | None:
    """How many professions exceed a control after Holm's correction; none without a test."""
    tested = [one[kind] for one in row["professions"] if kind in one]
    tested = [one for one in tested if one["p_holm"] is not None]
    if not tested:
        return None
    exceed = [one for one in tested if one["p_holm"] <= 0.05 and one["difference"]["value"] > 0]
    return len(exceed)


def _control_rows(name: str, plan: AuditPlan, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table row a word and control."""
    return [
        {
            "word": row["demographic"],
            "control": sentences.control_name(kind, plan),
            "first": index == 0,
            "professions": sum(kind in one for one in row["professions"]),
            "exceeds": row["exceeds"].get(kind) if sentences.has_intervals(row, kind) else None,
            "above": row["above"],
            "holm": _after_holm(row, kind),
            **figure,
        }
        for row in _main_controls(name, summary)
        for index, (kind, figure) in enumerate(row["overall"].items())
    ]


def _band(figure: Mapping[str, Any]) -> dict[str, float] | None:
    """A figure as a point of `figures.bands`; its interval is its value where it has none."""
    value = figure["value"]
    if value is None:
        return None
    low, high = figure["low"], figure["high"]
    return {
        "median": value,
        "low": value if low is None else low,
        "high": value if high is None else high,
    }


def _curve(name: str, summary: Mapping[str, Any]) -> str:
    rows = [row for row in summary["curves"] if row["axis"] == name]
    if not rows:
        return ""
    return figures.bands(
        rows[0]["percentiles"],
        {row["demographic"]: [_band(figure) for figure in row["corrected"]] for row in rows},
        x_label="percentile of the masks",
        label=f"corrected IoU, {name}",
        reference=0.0,
    )


def _steps(name: str, summary: Mapping[str, Any]) -> str:
    rows = [row for row in summary["sweeps"] if (row["axis"], row["by"]) == (name, "step")]
    if not rows:
        return ""
    chance = chance_iou(1 - summary["run"]["percentiles"][0] / 100)
    return figures.bands(
        [int(part["part"]) for part in rows[0]["parts"]],
        {row["demographic"]: [_band(part["iou"]) for part in row["parts"]] for row in rows},
        x_label="UNet call",
        label=f"IoU of each call, {name}",
        reference=chance,
    )


def _scatter(
    name: str,
    words: Sequence[str],
    cells: Mapping[tuple[str, str], Mapping[str, Any]],
    planted: Mapping[str, Mapping[str, Any]],
    ranks: Sequence[Mapping[str, Any]],
    label: str = "IoU",
) -> str:
    rho = {row["demographic"]: row["spearman"] for row in ranks}
    panels = {
        word: [
            (planted[profession]["overlap"][word], cell["iou"])
            for (profession, found), cell in cells.items()
            if found == word
            and word in planted.get(profession, {}).get("overlap", {})
            and cell["iou"]["value"] is not None
        ]
        for word in words
    }
    panels = {word: points for word, points in panels.items() if points}
    if not panels:
        return ""
    chance = next(iter(cells.values()))["chance"]
    return figures.scatter(
        panels,
        {word: f"{word}: {sentences.RHO} = {sentences.interval(rho[word])}" for word in panels},
        x_label="planted overlap",
        y_label=f"measured {label}, {name}",
        reference=chance,
    )


def _rank_rows(ranks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a word and percentile: rank correlation with either planted value."""
    rows: dict[tuple[str, float], dict[str, Any]] = {}
    for rank in ranks:
        row = rows.setdefault(
            (rank["demographic"], rank["percentile"]),
            {
                "word": rank["demographic"],
                "percentile": rank["percentile"],
                "n": rank["spearman"]["n"],
                "overlap": None,
                "shares": None,
            },
        )
        row[rank["against"]] = rank["spearman"]
    return list(rows.values())


def _share_chart(
    name: str,
    words: Sequence[str],
    order: Sequence[str],
    shares: Mapping[str, Mapping[str, Any]],
    planted: Mapping[str, Mapping[str, Any]],
) -> str:
    """Shares of one word for two, of all words else: the two of a pair sum to one."""
    if not shares:
        return ""
    read = next(iter(shares.values()))["words"]
    shown = [word for word in words if word in read]
    shown = shown[1:] if len(shown) == 2 else shown
    targets = {
        word: [planted.get(p, {}).get("shares", {}).get(word) for p in order] for word in shown
    }
    return figures.intervals(
        order,
        {
            word: [shares[p]["words"][word] if p in shares else None for p in order]
            for word in shown
        },
        label=f"share of pictures read as {' / '.join(shown)} ({name})",
        targets=targets if planted else None,
        first_colour=words.index(shown[0]),
    )


def _failures(records: pa.Table) -> list[dict[str, Any]]:
    columns = ["condition", "semantic", "seed", "axis", "demographic", "percentile"]
    columns += ["status", "reason"]
    return [row for row in records.select(columns).to_pylist() if row["status"] != OK]


def _settings(plan: AuditPlan) -> list[tuple[str, str]]:
    return [
        (name, json.dumps(value, ensure_ascii=False))
        for name, value in plan.model_dump(mode="json").items()
    ]


def _environment(folder: Path) -> dict[str, Any]:
    path = folder / "environment.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows.extend(_flat(value, f"{prefix}{name}."))
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{name}", shown))
    return rows
