"""Forms of a run for others: figures as CSV and Parquet, and a section for a model card.

`summary.json` is the whole; these hold its figures of professions and of means over professions,
one a row, with n, interval and method.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from . import sentences
from .files import write_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .plan import AuditPlan

SCHEMA = pa.schema(
    [
        pa.field("condition", pa.string(), nullable=False),
        pa.field("axis", pa.string(), nullable=False),
        pa.field("semantic", pa.string()),  # null: the mean over professions
        pa.field("demographic", pa.string(), nullable=False),
        pa.field("percentile", pa.float64()),
        pa.field("figure", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field("p", pa.float64()),
        pa.field("p_holm", pa.float64()),
        pa.field("p_bh", pa.float64()),
        pa.field("method", pa.string(), nullable=False),
    ]
)


def figures_table(summary: Mapping[str, Any]) -> pa.Table:
    """Every figure of professions, controls, shares and differences, one a row.

    Args:
        summary: `summary.summarise`.
    """
    rows: list[dict[str, Any]] = []

    def add(source: Mapping[str, Any], name: str, figure: Mapping[str, Any], **more: Any) -> None:
        keys = ("condition", "axis", "semantic", "demographic", "percentile")
        row = {key: source.get(key) for key in keys} | {"figure": name, **figure} | more
        rows.append({key: row.get(key) for key in SCHEMA.names})

    tests = ("p", "p_holm", "p_bh")
    for row in summary["professions"]:
        add(row, "iou", row["iou"], **{name: row[name] for name in tests})
        add(row, "corrected", row["corrected"])
        add(row, "soft_iou", row["soft_iou"])
    for row in summary["overall"]:
        add(row, "iou", row["iou"])
        add(row, "corrected", row["corrected"])
    for row in summary["controls"]:
        for own in ({"semantic": None, **row["overall"]}, *row["professions"]):
            source = {**row, "semantic": own["semantic"]}
            for kind, found in own.items():
                if kind != "semantic":
                    add(source, f"{kind} level", found["level"])
                    p_values = {name: found.get(name) for name in tests}
                    add(source, f"iou minus {kind}", found["difference"], **p_values)
    for row in summary["differences"]:
        name = f"iou minus {row['baseline']}"
        add(row, name, row["iou"], p=row["p"])
        for one in row["professions"]:
            source = {**row, "semantic": one["semantic"]}
            add(source, name, one["iou"], **{test: one.get(test) for test in tests})
    if summary["containment"] is not None:
        for row in summary["containment"]["professions"]:
            add(row, "containment", row["containment"], **{name: row[name] for name in tests})
        for row in summary["containment"]["overall"]:
            add(row, "containment", row["containment"])
        for row in summary["containment"]["differences"]:
            add(row, f"containment minus {row['baseline']}", row["containment"], p=row["p"])
    for row in summary["shares"]:
        for word, figure in row["words"].items():
            add({**row, "demographic": word}, "share", figure)
    for row in summary["share_differences"]:
        name = f"share minus {row['baseline']}"
        add(row, name, row["risk_difference"], p=row["p"])
        for one in row["professions"]:
            source = {**row, "semantic": one["semantic"]}
            add(source, name, one["risk_difference"], **{test: one[test] for test in tests})
    version = {"biasmap_fast.schema_version": str(summary["schema_version"])}
    return pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(version))


def write_tables(folder: Path, plan: AuditPlan, summary: Mapping[str, Any]) -> list[Path]:
    """Writes ``figures.csv``, ``figures.parquet`` and ``model-card.md`` into a run folder.

    Args:
        folder: the run folder.
        plan: its plan.
        summary: its summary.

    Returns:
        The files' paths; each is written whole or not at all.
    """
    table = figures_table(summary)
    text, binary = io.BytesIO(), io.BytesIO()
    pa_csv.write_csv(table, text)
    pq.write_table(table, binary, compression="zstd")
    card = model_card(plan, summary).encode()
    contents = {
        "figures.csv": text.getvalue(),
        "figures.parquet": binary.getvalue(),
        "model-card.md": card,
    }
    for name, data in contents.items():
        write_file(folder / name, data)
    return [folder / name for name in contents]


def model_card(plan: AuditPlan, summary: Mapping[str, Any]) -> str:
    """A section for a model card, in Markdown: what was measured, what it says, what it does not.

    Args:
        plan: the run's plan.
        summary: its summary.
    """
    lines = [
        "## Bias: concept entanglement in cross-attention",
        "",
        _plain(f"Model `{plan.model}`. {sentences.headline(plan, summary)}"),
        "",
    ]
    for axis in plan.axes:
        lines += [f"### {_plain(axis).capitalize()}", ""]
        told = sentences.contained(axis, plan, summary)
        told += [sentences.finding(axis, summary), *sentences.controls(axis, plan, summary)]
        lines += [text for one in told for text in (_plain(one), "")]
    first = (plan.conditions[0], plan.percentiles[0])
    lines += [
        f"Mean over professions, percentile {plan.percentiles[0]:g}, 95 % intervals:",
        "",
        "| axis | word | IoU | chance | corrected |",
        "|---|---|---:|---:|---:|",
    ]
    for row in summary["overall"]:
        if (row["condition"], row["percentile"]) == first:
            iou, corrected = (sentences.interval(row[name], 3) for name in ("iou", "corrected"))
            words = f"{_plain(row['axis'])} | {_plain(row['demographic'])}"
            lines.append(f"| {words} | {iou} | {row['chance']:.3f} | {corrected} |")
    lines += ["", "### Limits", ""]
    lines += [f"- {_plain(text)}" for text in sentences.limits(plan, summary)]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text of others without what Markdown or HTML would act on."""
    flat = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
    for mark in ("|", "*", "_", "[", "]", "#"):
        flat = flat.replace(mark, f"\\{mark}")
    return flat
