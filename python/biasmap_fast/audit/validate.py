"""Checking a run folder: every figure from the records again, every file against its hash."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..overlap import chance_iou, corrected
from .files import sha256
from .folder import plan_hash, read_plan
from .records import OK, SIDES, RecordError, part_path, read_records, read_side
from .rounds import COLUMNS, asked
from .summary import summarise

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow as pa

    from .plan import AuditPlan, Unit

# Sums in another order, by another version of numpy, differ in their last digits.
_TOLERANCE = 1e-9


def validate(folder: Path, planted: Any = None) -> list[str]:
    """Everything in which a run folder contradicts itself.

    Every record is compared with the plan (its settings, and whether it was asked for), with the
    other records of its picture (every pair and percentile once) and with itself (``chance`` and
    ``corrected``); every file of a chunk with its hash; ``summary.json`` with a summary computed
    anew. ``report.html`` is not compared: `render` makes it again.

    Args:
        folder: the run folder, finished or not. Nothing in it is changed.
        planted: the testbed's table, where the plan's model is the testbed.

    Returns:
        One line a difference; none if the folder is whole.

    Raises:
        AuditError: ``folder`` is no run folder.
    """
    plan = read_plan(folder)
    try:
        records = read_records(folder)
        sides = {side: read_side(folder, side) for side in SIDES}
    except RecordError as error:
        # what a plan with a precision asks for, damaged records do not say
        known = asked(plan).chunks if plan.precision is None else None
        return [*_files(folder, known), str(error)]
    chunks = asked(plan, records.select(COLUMNS).to_pylist()).chunks
    found = [*_files(folder, chunks), *_records(plan, chunks, records)]
    path = folder / "summary.json"
    if not path.is_file():
        return [*found, "summary.json is missing: `biasmap report` writes it"]
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return [*found, f"summary.json cannot be read: {error}"]
    # through JSON, as the file went: tuples are lists there
    computed = json.loads(json.dumps(summarise(plan, records, planted, **sides)))
    found += _different(stated, computed, "summary.json")
    return found


def _files(folder: Path, chunks: Sequence[Sequence[Unit]] | None) -> Iterator[str]:
    """Every measured chunk's files against the hashes that were written with them."""
    plan_now = plan_hash(folder)
    parts = sorted((folder / "records").glob("part-*.parquet"))
    count = len(parts) if chunks is None else len(chunks)
    known = set(parts) if chunks is None else {part_path(folder, i) for i in range(count)}
    for path in parts:
        name = path.relative_to(folder).as_posix()
        if path not in known:
            yield f"{name}: the plan has {count} chunks, none of this number"
            continue
        try:
            hashes = (folder / "hashes" / path.name).with_suffix(".json")
            stated = json.loads(hashes.read_text(encoding="utf-8"))
            files, plan_then = dict(stated["files"]), stated["plan_sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"{name}: its hashes cannot be read ({error})"
            continue
        if plan_then != plan_now:
            yield f"{name}: plan.yaml is not the file under which it was measured"
        if name not in files:
            yield f"{name}: its hashes do not name it"
        for file, expected in sorted(files.items()):
            try:
                data = (folder / file).read_bytes()
            except OSError as error:
                yield f"{file}: cannot be read ({error})"
                continue
            if sha256(data) != expected:
                yield f"{file}: SHA-256 is {sha256(data)}, was {expected} when it was measured"


def _records(plan: AuditPlan, chunks: Sequence[Sequence[Unit]], records: pa.Table) -> Iterator[str]:
    """Records against the pictures that are asked for, and against themselves."""
    pictures = {(unit.condition, unit.profession, unit.seed) for part in chunks for unit in part}
    cells: Counter[tuple[Any, ...]] = Counter()
    for row in records.to_pylist():
        picture = (row["condition"], row["semantic"], row["seed"])
        where = (
            f"record of {picture}, {row['axis']}/{row['demographic']}, "
            f"percentile {row['percentile']:g}"
        )
        if picture not in pictures:
            yield f"{where}: the plan does not ask for this picture"
            continue
        cells[picture] += 1
        for name, expected in _expected(plan, row).items():
            if row[name] != expected:
                yield f"{where}: {name} is {row[name]!r}, the plan says {expected!r}"
        yield from (f"{where}: {text}" for text in _figures(row))
    if not cells:
        return
    most = max(cells.values())
    for picture, count in cells.items():
        if count != most:
            yield f"records of {picture}: {count} rows, where other pictures have {most}"


def _expected(plan: AuditPlan, row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that the plan decides."""
    same = ["model", "steps", "guidance_scale", "dtype", "branch", "soft_mask", "temperature"]
    same += ["negative_prompt", "evaluation_size"]
    return {
        **{name: getattr(plan, name) for name in same},
        "template": plan.template(row["condition"]),
        "prompt": plan.prompt(row["semantic"], row["condition"]),
    }


def _figures(row: Mapping[str, Any]) -> Iterator[str]:
    """Figures of a record that others of it decide."""
    fraction = 1 - row["percentile"] / 100
    if not math.isclose(row["chance"], chance_iou(fraction), abs_tol=_TOLERANCE):
        yield f"chance is {row['chance']!r}, of this percentile it is {chance_iou(fraction)!r}"
    numbers = ["iou", "corrected", "soft_iou"]
    if row["containment_chance"] is not None:
        numbers.append("containment")
    if row["status"] != OK:
        if given := [name for name in numbers if row[name] is not None]:
            yield f"status is {row['status']!r}, and yet there are {given}"
        return
    if missing := [name for name in numbers if row[name] is None]:
        yield f"status is 'ok', and there is no {missing}"
        return
    for name in numbers[:1] + numbers[3:]:
        if not 0 <= row[name] <= 1 + _TOLERANCE:
            yield f"{name} is {row[name]!r}, not between 0 and 1"
    expected = float(corrected(row["iou"], chance_iou(fraction)))
    if not math.isclose(row["corrected"], expected, abs_tol=_TOLERANCE):
        yield f"corrected is {row['corrected']!r}, of this iou it is {expected!r}"


def _different(stated: Any, computed: Any, where: str) -> Iterator[str]:
    """Leaves in which two JSON values differ, each with its path."""
    if isinstance(stated, dict) and isinstance(computed, dict):
        for name in [*stated, *(name for name in computed if name not in stated)]:
            if name not in computed:
                yield f"{where}.{name}: is there, the records do not give it"
            elif name not in stated:
                yield f"{where}.{name}: is missing"
            else:
                yield from _different(stated[name], computed[name], f"{where}.{name}")
    elif isinstance(stated, list) and isinstance(computed, list):
        if len(stated) != len(computed):
            yield f"{where}: has {len(stated)} entries, the records give {len(computed)}"
            return
        for index, pair in enumerate(zip(stated, computed, strict=True)):
            yield from _different(*pair, f"{where}[{index}]")
    elif not _equal(stated, computed):
        yield f"{where}: says {stated!r}, the records give {computed!r}"


def _equal(a: Any, b: Any) -> bool:
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (a, b))
    if numbers:
        return math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return bool(a == b)
