"""Checking a run folder: every file against its hash, every figure from the records again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..files import sha256_file
from ..overlap import chance_iou
from . import rounds
from .folder import plan_hash, read_plan
from .records import TABLES, RecordError, part_path, read, read_hashes
from .report import summary_json
from .summary import KEYS, MEASURED, summarise

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from .plan import AuditPlan
    from .summary import Summary

_TOLERANCE = 1e-9  # sums in another order, by another numpy, differ in their last digits
_PICTURE = ["condition", "profession", "seed"]


def validate(folder: Path, truth: Iterable[Mapping[str, Any]] | None = None) -> list[str]:
    """Returns everything in which a run folder contradicts itself, one line per difference.

    Files are compared with their hashes, records with the plan and with each other, figures with
    those computed anew. ``report.html`` and ``model-card.md`` are not compared: `render` makes them
    again. An unfinished run is a difference too.

    Args:
        folder: Run folder; nothing in it is changed.
        truth: What is planted, for the embedded model.

    Raises:
        AuditError: ``folder`` is no run folder.
    """
    plan = read_plan(folder)
    differences = list(_files(folder))
    try:
        tables = {name: read(folder, name).to_pandas(maps_as_pydicts="strict") for name in TABLES}
    except RecordError as error:
        return [*differences, str(error)]
    pictures, measurements = tables.pop("pictures"), tables.pop("measurements")
    asked = rounds.asked(plan, pictures, measurements)
    for number in sorted(set(_chunks(folder)) - set(range(len(asked.chunks)))):
        differences += [f"chunk {number}: the plan has {len(asked.chunks)} chunks"]
    expected = {(p.condition, p.profession, p.seed) for chunk in asked.chunks for p in chunk}
    differences += _pictures(plan, expected, pictures)
    differences += _values(plan, pictures, measurements)
    try:
        precision = rounds.figures(plan, asked)
        summary = summarise(
            plan, pictures, measurements, truth=truth, precision=precision, **tables
        )
    except (KeyError, ValueError) as error:  # of records that are told above
        return [*differences, f"the figures cannot be computed: {error}"]
    if not summary.run["complete"]:
        drawn = f"{summary.run['drawn']} of {len(expected)} pictures are drawn"
        differences.append(f"the run is not finished: {drawn}")
    return differences + list(_written(folder, summary))


def _chunks(folder: Path) -> list[int]:
    parts = [*folder.glob("pictures/part-*.parquet"), *folder.glob("hashes/part-*.json")]
    return sorted({int(part.stem[5:]) for part in parts if part.stem[5:].isdecimal()})


def _files(folder: Path) -> Iterator[str]:
    """Files of each chunk against the hashes that were written with them."""
    plan_now = plan_hash(folder)
    for number in _chunks(folder):
        try:
            plan_then, files = read_hashes(folder, number)
        except (OSError, RecordError) as error:
            yield f"chunk {number}: its hashes cannot be read ({error})"
            continue
        if plan_then != plan_now:
            yield f"chunk {number}: plan.yaml is not the file under which it was measured"
        if part_path(folder, "pictures", number).relative_to(folder).as_posix() not in files:
            yield f"chunk {number}: its hashes do not name its pictures"
        for name, expected in sorted(files.items()):
            try:
                found = sha256_file(folder / name)
            except OSError as error:
                yield f"{name}: cannot be read ({error})"
                continue
            if found != expected:
                yield f"{name}: SHA-256 is {found}, was {expected} when it was measured"


def _pictures(
    plan: AuditPlan, expected: set[tuple[str, str, int]], pictures: pd.DataFrame
) -> Iterator[str]:
    for row in pictures.itertuples():
        picture = (row.condition, row.profession, row.seed)
        if picture not in expected:
            yield f"picture {picture}: the plan does not ask for it"
        elif row.prompt != (prompt := plan.prompt(row.profession, row.condition)):
            yield f"picture {picture}: prompt is {row.prompt!r}, the plan says {prompt!r}"


def _values(plan: AuditPlan, pictures: pd.DataFrame, rows: pd.DataFrame) -> Iterator[str]:
    """Measured values against their pictures, their statuses and their chance levels."""
    measured = rows["status"].isin(MEASURED)
    known = rows[_PICTURE].merge(pictures[_PICTURE], how="left", indicator=True)["_merge"]
    chance = rows["chance"].copy()
    for measure, setting in rows[["measure", "setting"]].drop_duplicates().to_numpy():
        own = rows["measure"].eq(measure) & rows["setting"].eq(setting)
        if measure in ("iou", "soft_iou"):
            chance[own] = chance_iou(float(setting))
        elif measure == "containment":
            chance[own] = plan.containment.fractions[1]
    wrong = {
        "its picture is not in the pictures": known.ne("both").to_numpy(),
        "it is measured and has no value between 0 and 1": measured
        & ~rows["value"].between(0, 1 + _TOLERANCE),
        "it is not measured and has a value": ~measured & rows["value"].notna(),
        "its chance is not that of its setting": measured
        & ~np.isclose(rows["chance"], chance, atol=_TOLERANCE),
    }
    for text, where in wrong.items():
        for row in rows[where].itertuples():
            names = (row.word, row.measure, row.setting, row.part, row.control)
            picture = (row.condition, row.profession, row.seed)
            yield f"value of {picture}, {', '.join(name for name in names if name)}: {text}"
    pairs = rows[rows["part"].eq("") & rows["control"].eq("")].groupby(_PICTURE).size()
    for picture, count in pairs[pairs < pairs.max()].items():
        yield f"picture {picture}: {count} values, where other pictures have {pairs.max()}"


def _written(folder: Path, summary: Summary) -> Iterator[str]:
    """Figures as they were written against figures computed anew."""
    text = dict.fromkeys(KEYS, str)
    readers: dict[str, Any] = {
        "figures.parquet": pd.read_parquet,
        "figures.csv": lambda path: pd.read_csv(path, dtype=text).fillna(dict.fromkeys(KEYS, "")),
        "summary.json": lambda path: pd.DataFrame(json.loads(path.read_text("utf-8"))["figures"]),
    }
    for name, reader in readers.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing: `biasmap report` writes it"
            continue
        try:
            yield from _different(name, reader(path), summary.figures)
        except (ValueError, KeyError, OSError) as error:
            yield f"{name} cannot be read: {error}"
    try:
        stated = json.loads((folder / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return  # told above
    now = json.loads(summary_json(summary))
    for part in ("run", "precision"):
        if stated.get(part) != now[part]:
            yield f"summary.json: {part} is {stated.get(part)}, the records give {now[part]}"


def _different(name: str, stated: pd.DataFrame, now: pd.DataFrame) -> Iterator[str]:
    both = stated.merge(now, on=KEYS, how="outer", suffixes=("", "_now"), indicator=True)
    label = both[KEYS].apply(lambda row: " ".join(value for value in row if value), axis=1)
    for side, text in (
        ("left_only", "is there, the records do not give it"),
        ("right_only", "is missing"),
    ):
        yield from (f"{name}: {where} {text}" for where in label[both["_merge"] == side])
    paired = both["_merge"] == "both"
    for column in ("estimate", "low", "high", "n", "p", "p_adjusted"):
        then, new = (both[c].astype(float) for c in (column, f"{column}_now"))
        close = np.isclose(then, new, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
        for index in both.index[paired & ~close]:
            yield (
                f"{name}: {label[index]}: {column} is {then[index]!r}, the records give "
                f"{new[index]!r}"
            )
    for index in both.index[paired & both["method"].ne(both["method_now"])]:
        yield f"{name}: {label[index]}: method is {both['method'][index]!r}"
