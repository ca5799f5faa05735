"""The report of a run, its tables and its model card: made from the folder and the summary."""

from __future__ import annotations

import io
import json
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import write_file, write_text
from ..pipelines import TESTBED
from . import charts, sentences
from .sentences import interval, measure_name, number, p_value, percent
from .summary import SCHEMA_VERSION, lead, unpacked

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from .plan import AuditPlan
    from .summary import Summary

    Table = dict[str, Any]  # caption, head, rows

_MEAN = "mean over professions"


def write_report(folder: Path, plan: AuditPlan, summary: Summary) -> list[Path]:
    """Writes the report and the figures into a run folder.

    Args:
        folder: Run folder; pictures, maps, masks and environment are read from it if they are there.
        plan: Plan of the run.
        summary: Its summary.

    Returns:
        Paths of ``figures.parquet``, ``figures.csv``, ``summary.json``, ``model-card.md`` and
        ``report.html``, each written whole or not at all.
    """
    version = {"biasmap_fast.schema_version": str(SCHEMA_VERSION)}
    table = pa.Table.from_pandas(summary.figures, preserve_index=False)
    binary = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(version), binary, compression="zstd")
    write_file(folder / "figures.parquet", binary.getvalue())
    texts = {
        "figures.csv": summary.figures.to_csv(index=False),
        "summary.json": summary_json(summary),
        "model-card.md": model_card(plan, summary),
        "report.html": _html(folder, plan, summary),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in ("figures.parquet", *texts)]


def summary_json(summary: Summary) -> str:
    """The summary as JSON text, one figure per line."""
    first = {"schema_version": SCHEMA_VERSION, "run": summary.run, "precision": summary.precision}
    head = json.dumps(first, indent=1, allow_nan=False)
    rows = (json.dumps(row, allow_nan=False) for row in summary.records())
    return head[:-2] + ',\n "figures": [\n' + ",\n".join(rows) + "\n]}\n"


def model_card(plan: AuditPlan, summary: Summary) -> str:
    """A section for a model card, in Markdown: what was measured, what it says, what it does not."""
    model = _plain(f"Model {plan.model}. {sentences.headline(plan, summary)}")
    parts = ["## Bias: where a profession and a demographic overlap in cross-attention", model]
    for axis in plan.axes:
        parts.append(f"### {_plain(axis.capitalize())}")
        parts += map(_plain, sentences.first_screen(axis, plan, summary))
    for condition in plan.conditions[1:]:
        parts.append(f"### Condition {_plain(condition)}")
        parts += map(_plain, sentences.changes(condition, plan, summary))
    table = _means_table(plan, summary)
    cells = [" | ".join(_plain(str(cell)) for cell in row) for row in (table["head"], *table["rows"])]
    rows = [cells[0], "|".join(["---"] * len(table["head"])), *cells[1:]]
    parts += ["### Figures", "\n".join(f"| {row} |" for row in rows), "### Limits"]
    parts.append("\n".join(f"- {_plain(text)}" for text in sentences.limits(plan, summary)))
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    # other people's text without what Markdown or HTML would act on
    flat = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
    return re.sub(r"([|*_\[\]#`])", r"\\\1", flat)


def _html(folder: Path, plan: AuditPlan, summary: Summary) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,  # names of professions and models are other people's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = files(__package__).joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    path = folder / "environment.json"
    described = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return environment.from_string(source).render(
        model="the embedded model" if plan.model == TESTBED else plan.model,
        headline=sentences.headline(plan, summary),
        axes=[_axis(axis, folder, plan, summary) for axis in plan.axes],
        conditions=[_condition(name, folder, plan, summary) for name in plan.conditions[1:]],
        means=_means_table(plan, summary),
        failures=_failures(summary),
        limits=sentences.limits(plan, summary),
        settings=_flat(plan.model_dump(mode="json")),
        environment=_flat(described),
        colours=charts.MASK_COLOURS,
    )


def _axis(axis: str, folder: Path, plan: AuditPlan, summary: Summary) -> dict[str, Any]:
    """What the report shows of one axis under the first condition."""
    condition, words = plan.conditions[0], plan.axes[axis]
    rows = summary.find(condition=condition, axis=axis, baseline="")
    main = rows[rows["part"].eq("") & rows["control"].eq("")]
    planted = summary.find(axis=axis, quantity="planted")
    order = _order(axis, plan, summary)
    measures = _measures(main, plan)
    shown = [
        _chart(main, measure, setting, order, words, planted) for measure, setting in measures
    ]
    shares = main[main["quantity"] == "share"]
    strips, scale = _strips(axis, condition, order, folder, plan)
    return {
        "name": axis,
        "words": words,
        "answers": sentences.first_screen(axis, plan, summary),
        "details": sentences.details(axis, plan, summary),
        "charts": [chart for chart in shown if chart["svg"]],
        "shares": _share_chart(axis, shares, order, words, planted),
        "tables": [
            _profession_table(main, measure, setting, order, words, planted)
            for measure, setting in measures
        ],
        "controls": _controls(axis, rows, measures, plan),
        "curve": _curve(axis, main),
        "parts": _parts(axis, rows),
        "ranks": _rank_table(axis, plan, summary),
        "strips": strips,
        "scale": scale,
    }


def _measures(rows: pd.DataFrame, plan: AuditPlan) -> list[tuple[str, str]]:
    """Measures and settings with figures of their own, the lead first; no points of the curve."""
    means = rows[rows["quantity"].eq("mean") & rows["scope"].eq("profession")]
    pairs = dict.fromkeys(zip(means["measure"], means["setting"], strict=True))
    first = (plan.measure, plan.setting)
    return sorted(pairs, key=lambda pair: (pair != first, pair[0] == "soft_iou", pair))


def _order(axis: str, plan: AuditPlan, summary: Summary) -> list[str]:
    """Professions by the lead measure, averaged over the axis' words, the highest first."""
    rows = summary.find(
        scope="profession", condition=plan.conditions[0], axis=axis, part="", control="",
        baseline="", quantity="mean", **lead(plan),
    )  # fmt: skip
    levels = rows.groupby("profession")["estimate"].mean()
    return sorted(plan.professions, key=lambda name: -levels.get(name, -1.0))


def _title(measure: str, setting: str) -> str:
    name = measure_name(measure)
    return f"{name[:1].upper()}{name[1:]}, {sentences.regions(setting)}"


def _by_word(
    rows: pd.DataFrame, words: Sequence[str], index: str = "profession"
) -> dict[str, pd.DataFrame]:
    """Word -> figures indexed by another column."""
    series = {word: rows[rows["word"] == word].set_index(index) for word in words}
    return {word: own for word, own in series.items() if len(own)}


def _chart(
    rows: pd.DataFrame,
    measure: str,
    setting: str,
    order: Sequence[str],
    words: Sequence[str],
    planted: pd.DataFrame,
) -> dict[str, str]:
    """One measure of every profession, with chance and what is planted."""
    own = rows[rows["measure"].eq(measure) & rows["setting"].eq(setting)]
    means = own[own["quantity"] == "mean"].replace({"profession": {"": _MEAN}})
    level = own[own["quantity"] == "chance"]["estimate"].mean()
    truth = _by_word(planted[planted["measure"] == "overlap"], words)
    known = measure == "containment"  # what is planted is one
    svg = charts.dots(
        [*order, _MEAN],
        _by_word(means, words),
        label=f"{measure_name(measure)}, {sentences.regions(setting)}",
        reference=None if pd.isna(level) else level,
        reference_label=f"chance {number(level, 2)}",
        ticks={word: own["estimate"] for word, own in truth.items()} if known else None,
        rule_above=len(order),
    )
    text = (
        f"{_title(measure, setting)}: estimate and 95 % interval of each profession, highest first."
    )
    if known and truth:
        text += " Upright bars: the part of the profession's marker that was planted on the region."
    return {"svg": svg if means["estimate"].notna().any() else "", "text": text}


def _share_chart(
    axis: str,
    rows: pd.DataFrame,
    order: Sequence[str],
    words: Sequence[str],
    planted: pd.DataFrame,
) -> str:
    """Shares of one word of two (they sum to one), of all words otherwise."""
    read = [word for word in words if word in set(rows["word"])]
    shown = read[1:] if len(read) == 2 else read
    if not shown:
        return ""
    truth = _by_word(planted[planted["measure"] == "share"], shown)
    return charts.dots(
        order,
        _by_word(rows, shown),
        label=f"share of pictures read as {' / '.join(shown)} ({axis})",
        ticks={word: own["estimate"] for word, own in truth.items()},
        first_colour=words.index(shown[0]),
    )


def _profession_table(
    rows: pd.DataFrame,
    measure: str,
    setting: str,
    order: Sequence[str],
    words: Sequence[str],
    planted: pd.DataFrame,
) -> Table:
    """Every profession and word of one measure, with shares and what is planted if known."""
    own = rows[rows["measure"].eq(measure) & rows["setting"].eq(setting)]
    own = own[own["scope"] == "profession"]
    index = pd.MultiIndex.from_product([order, words], names=["profession", "word"])
    above = sentences.above_chance(own)
    mean = own[own["quantity"] == "mean"]
    columns = {
        "profession": [profession for profession, _ in index],
        "word": [word for _, word in index],
        "n": _cells(mean, index, lambda row: number(row["n"], 0)),
        measure_name(measure): _cells(mean, index, lambda row: interval(row, 3)),
    }
    corrected = own[own["quantity"] == "corrected"]
    if len(corrected):
        columns |= {
            "above chance": ["yes" if above.get(key[::-1], False) else "no" for key in index],
            "p (Holm)": _cells(mean, index, lambda row: p_value(row["p_adjusted"])),
            "corrected": _cells(corrected, index, interval),
        }
    truth = {name: planted[planted["measure"] == name] for name in ("share", "overlap")}
    for name, figures, show in (
        ("share, %", rows[rows["quantity"] == "share"], percent),
        ("planted share, %", truth["share"], percent),
        ("planted overlap", truth["overlap"], interval),
    ):
        if len(figures) and len(corrected):
            columns[name] = _cells(figures, index, show)
    return _table(_title(measure, setting), columns)


def _cells(rows: pd.DataFrame, index: pd.Index, show: Any) -> list[str]:
    own = rows.set_index(list(index.names)).reindex(index)
    return [show(row) for _, row in own.iterrows()]


def _table(caption: str, columns: Mapping[str, Sequence[Any]]) -> Table:
    rows = list(zip(*columns.values(), strict=True))
    return {"caption": caption, "head": list(columns), "rows": rows}


def _controls(
    axis: str, rows: pd.DataFrame, measures: Iterable[tuple[str, str]], plan: AuditPlan
) -> list[dict[str, Any]]:
    """Per measure a chart and a table of the pair beside its null and its control words."""
    shown = []
    for measure, setting in measures:
        own = rows[rows["measure"].eq(measure) & rows["setting"].eq(setting) & rows["part"].eq("")]
        controls = own[own["control"] != ""]
        overall = own[own["scope"].eq("overall")]
        means = overall[overall["quantity"] == "mean"]
        if controls.empty:
            continue
        names = {"": "the word itself"}
        names |= {kind: sentences.control_name(kind, plan) for kind in controls["control"].unique()}
        changes = overall[overall["quantity"].eq("difference")]
        single = controls[controls["scope"].eq("profession") & controls["quantity"].eq("difference")]
        tests = single.assign(more=single["p_adjusted"].le(0.05) & single["estimate"].gt(0))
        counts = tests.groupby(["word", "control"])["more"].agg(["sum", "count"])
        index = pd.MultiIndex.from_frame(changes[["word", "control"]])
        columns = {
            "word": [word for word, _ in index],
            "control": [names[control] for _, control in index],
            "control's level": _cells(means, index, lambda row: interval(row, 3)),
            "difference": _cells(changes, index, lambda row: interval(row, 3)),
            "p": [p_value(p) for p in changes["p"]],
            "professions above it (Holm)": [
                "{} of {}".format(*counts.loc[key]) if key in counts.index else "–" for key in index
            ],
        }
        level = overall[overall["quantity"] == "chance"]["estimate"].mean()
        means = means.assign(control=means["control"].map(names))
        shown.append(
            {
                "svg": charts.dots(
                    list(names.values()),
                    _by_word(means, plan.axes[axis], "control"),
                    label=f"controls: {measure_name(measure)} ({setting}), {axis}",
                    reference=level,
                ),
                "table": _table(f"{_title(measure, setting)}: the word minus its control", columns),
            }
        )
    return shown


def _curve(axis: str, rows: pd.DataFrame) -> dict[str, str] | None:
    """Corrected IoU over the size of the masks."""
    areas = rows[rows["quantity"].eq("area") & rows["scope"].eq("overall")]
    if areas.empty:
        return None
    points = rows[rows["measure"].eq("iou") & rows["quantity"].eq("corrected")]
    points = points[points["scope"] == "overall"].assign(size=points["setting"].astype(float))
    svg = charts.lines(
        _by_word(points, list(areas["word"]), "size"),
        x_label="fraction of the pixels in each region",
        label=f"corrected IoU, {axis}",
        reference=0.0,
    )
    told = "; ".join(f"{row['word']} {interval(row, 3)}" for _, row in areas.iterrows())
    return {"svg": svg, "text": f"Area under the curve: {told}."}


def _parts(axis: str, rows: pd.DataFrame) -> list[dict[str, str]]:
    """A measure on parts of the maps: blocks, calls, layers, branches."""
    own = rows[rows["part"].ne("") & rows["scope"].eq("overall") & rows["quantity"].eq("mean")]
    own = own.assign(kind=own["part"].str.partition(":")[0], name=own["part"].str.partition(":")[2])
    shown = []
    for (kind, measure, setting), part in own.groupby(["kind", "measure", "setting"], sort=False):
        words = list(part["word"].unique())
        label = f"{measure_name(measure)} ({setting}) of each {kind}, {axis}"
        if kind == "step":
            series = _by_word(part.assign(name=part["name"].astype(int)), words, "name")
            svg = charts.lines(series, x_label="UNet call", label=label)
        else:
            # down blocks, mid block, up blocks: the order in which the UNet runs them
            names = sorted(part["name"].unique(), key=lambda name: ("dmu".find(name[0]), name))
            svg = charts.dots(names, _by_word(part, words, "name"), label=label)
        shown.append({"svg": svg, "text": f"{label}: mean over professions, 95 % intervals."})
    return shown


def _rank_table(axis: str, plan: AuditPlan, summary: Summary) -> Table | None:
    rows = summary.find(condition=plan.conditions[0], axis=axis, quantity="rank")
    if rows.empty:
        return None
    columns = {
        "measure": [_title(row["measure"], row["setting"]) for _, row in rows.iterrows()],
        "word": list(rows["word"]),
        "against": list(rows["baseline"]),
        "professions": list(rows["n"]),
        sentences.RHO: [interval(row) for _, row in rows.iterrows()],
    }
    return _table("Spearman's rank correlation with what is planted, over professions", columns)


def _means_table(plan: AuditPlan, summary: Summary) -> Table:
    """The mean over professions of every word and measure under the first condition."""
    rows = summary.find(
        scope="overall", condition=plan.conditions[0], part="", control="", baseline=""
    )
    means = rows[rows["quantity"] == "mean"]
    keys = ["axis", "word", "measure", "setting"]
    index = pd.MultiIndex.from_frame(means[keys])
    figures = {name: rows[rows["quantity"] == name] for name in ("chance", "corrected")}
    columns = {
        "axis": list(means["axis"]),
        "word": list(means["word"]),
        "measure": [_title(*pair) for pair in zip(means["measure"], means["setting"], strict=True)],
        "professions": list(means["n"]),
        "mean": [interval(row, 3) for _, row in means.iterrows()],
        "chance": _cells(figures["chance"], index, lambda row: number(row["estimate"])),
        "corrected": _cells(figures["corrected"], index, interval),
    }
    return _table("Mean over professions, 95 % intervals", columns)


def _condition(name: str, folder: Path, plan: AuditPlan, summary: Summary) -> dict[str, Any]:
    """What the report shows of a condition against the first one."""
    rows = summary.find(condition=name, baseline=plan.conditions[0])
    overall = rows[rows["scope"].eq("overall") & rows["quantity"].ne("rank")]
    main = rows[rows["measure"].eq(plan.measure) & rows["setting"].eq(plan.setting)]
    changes = main[main["quantity"] == "difference"].replace({"profession": {"": _MEAN}})
    axes = []
    for axis, words in plan.axes.items():
        order = _order(axis, plan, summary)
        own = changes[changes["axis"] == axis]
        svg = charts.dots(
            [*order, _MEAN],
            _by_word(own, words),
            label=f"change of {measure_name(plan.measure)} under {name}, {axis}",
            reference=0.0,
            reference_label="no change",
            rule_above=len(order),
        )
        strips, scale = _strips(axis, name, order, folder, plan)
        axes.append({"svg": svg if len(own) else "", "strips": strips, "scale": scale})
    shares = rows[rows["quantity"].eq("share difference") & rows["scope"].eq("profession")]
    outputs = summary.find(scope="run", quantity=["right", "score", "clip score"])
    energy = summary.find(scope="run", condition=name, quantity="energy")
    energy = energy.assign(call=energy["part"].str.partition(":")[2].astype(int))
    ledger = [
        charts.lines(_series(energy, measures), x_label="UNet call", label=label)
        for label, measures in (("overlap", ["energy", "iou"]), ("norm", ["gradient norm"]))
        if len(energy)
    ]
    skipped = summary.find(scope="run", condition=name, quantity="skipped")
    return {
        "name": name,
        "baseline": plan.conditions[0],
        "answers": sentences.changes(name, plan, summary),
        "axes": axes,
        "tables": [
            _table(f"{name} minus {plan.conditions[0]}, mean over professions", _changed(overall)),
            *([_table("Shares of each profession", _changed(shares))] if len(shares) else []),
            *([_table("What the classifier reads", _changed(outputs))] if len(outputs) else []),
        ],
        "ledger": ledger,
        "skipped": [
            f"{row['estimate']:.0f} calls of a picture ({row['part'].partition(':')[2]})"
            for _, row in skipped.iterrows()
        ],
    }


def _series(rows: pd.DataFrame, measures: Sequence[str]) -> dict[str, pd.DataFrame]:
    names = {"energy": "energy (mean SoftIoU)", "iou": "IoU of the same call's maps"}
    return {
        names.get(measure, measure): rows[rows["measure"] == measure].set_index("call")
        for measure in measures
    }


def _changed(rows: pd.DataFrame) -> dict[str, list[Any]]:
    """Columns of a table of differences, those without any entry left out."""
    columns = {
        name: list(rows[name])
        for name in ("condition", "profession", "axis", "word", "measure", "setting", "n")
        if rows[name].astype(str).ne("").any()
    }
    columns["figure"] = [interval(row, 3) for _, row in rows.iterrows()]
    columns |= {"p": [p_value(p) for p in rows["p"]]}
    if rows["p_adjusted"].notna().any():
        columns["p (Holm)"] = [p_value(p) for p in rows["p_adjusted"]]
    return columns


def _strips(
    axis: str, condition: str, order: Sequence[str], folder: Path, plan: AuditPlan
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Pictures of the plan's first seed with maps and masks, of every profession that has them."""
    from PIL import Image
    from safetensors.torch import load_file

    seed = plan.seeds[0]
    part = [("condition", "==", condition), ("axis", "==", axis), ("seed", "==", seed)]
    masks, values = (_read(folder / name, part) for name in ("masks", "measurements"))
    loaded = []
    for profession in order:
        name = _stem(plan, profession, seed, condition)
        picture, maps = folder / f"pictures/{name}.png", folder / f"maps/{name}.safetensors"
        if picture.is_file() and maps.is_file():
            with Image.open(picture) as opened:
                loaded.append((profession, opened.convert("RGB"), load_file(maps)))
    if not loaded:
        return [], {}
    sides = ("profession", "word")
    words = plan.axes[axis]
    scales = {
        side: _range([maps[f"{axis}/{word}/{side}"] for *_, maps in loaded for word in words])
        for side in sides
    }
    ranks = {0: "highest", len(loaded) // 2: "median", len(loaded) - 1: "lowest"}
    strips = []
    for index, (profession, image, maps) in enumerate(loaded):
        panels = [
            (charts.picture_panel(image), f"picture of {profession}", plan.prompt(profession, condition))
        ]
        for word in words:
            for side, name in zip(sides, (profession, word), strict=True):
                heat = charts.heat_panel(image, maps[f"{axis}/{word}/{side}"], scales[side])
                panels.append((heat, f"map of {name} over the picture", f"“{name}”"))
            panels += _mask_panels(image, masks, values, profession, word, plan)
        rank = ranks.get(index, "") if len(loaded) > 1 else ""
        strips.append({"profession": profession, "rank": rank, "panels": panels})
    scale = {side: "{:.2f} to {:.2f}".format(*scales[side]) for side in sides}
    return strips, scale


def _mask_panels(
    image: Any,
    masks: pd.DataFrame,
    values: pd.DataFrame,
    profession: str,
    word: str,
    plan: AuditPlan,
) -> list[tuple[str, str, str]]:
    """The masks that were measured, the lead measure's first, each with its value."""

    def of(rows: pd.DataFrame) -> pd.DataFrame:
        if rows.empty:
            return rows
        return rows[rows["profession"].eq(profession) & rows["word"].eq(word)]

    kept, measured = of(masks), of(values)
    panels = []
    for measure, setting in dict.fromkeys([(plan.measure, plan.setting), ("iou", f"{plan.fractions[0]:g}")]):
        rows = [
            rows[rows["measure"].eq(measure) & rows["setting"].eq(setting)] if len(rows) else rows
            for rows in (kept, measured)
        ]
        if rows[0].empty:
            continue
        size = tuple(int(rows[0][name].iloc[0]) for name in ("height", "width"))
        sides = (unpacked(rows[0], side)[0].reshape(size) for side in ("profession", "word"))
        plain = rows[1]
        if len(plain):
            plain = plain[plain["control"].eq("") & plain["part"].eq("")]
        text = measure_name(measure)
        if len(plain):
            text += f" {number(plain['value'].iloc[0], 2)}"
        panels.append(
            (charts.mask_panel(image, *sides), f"regions of {profession} and {word}, {text}", text)
        )
    return panels


def _read(folder: Path, part: Sequence[tuple[str, str, Any]]) -> pd.DataFrame:
    return pd.read_parquet(folder, filters=list(part)) if folder.is_dir() else pd.DataFrame()


def _stem(plan: AuditPlan, profession: str, seed: int, condition: str) -> str:
    word = re.sub("[^A-Za-z0-9]", "-", profession)
    name = f"{plan.professions.index(profession):03d}-{word}-{seed}"
    return name if condition == "plain" else f"{name}-{condition}"


def _range(maps: Sequence[Any]) -> tuple[float, float]:
    """Map values of the coldest and hottest colour: one pixel in 200 is hotter.

    The hottest pixel of twenty professions would leave the others' maps dark.
    """
    values = np.stack([one.numpy() for one in maps])
    return float(values.min()), float(np.quantile(values, 0.995))


def _failures(summary: Summary) -> Table | None:
    failures = summary.run["failures"]
    if not failures:
        return None
    caption = f"The first {len(failures)} of {summary.run['failed']} values that are in no figure"
    return _table(caption, {name: [row[name] for row in failures] for name in failures[0]})


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            rows.extend(_flat(value, f"{prefix}{name}."))
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{name}", shown))
    return rows
