"""The summary of a run: figures made from its records and from nothing else.

Groups are (condition, profession, axis, demographic word, percentile). Every figure carries its n,
interval and method. What is planted in the testbed joins here, never in the records.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import compare, nulls, rounds
from .inference import benjamini_hochberg, chance_test, holm, risk_difference
from .records import CONTROLS_SCHEMA, MASKS_SCHEMA, OK
from .statistics import (
    CONFIDENCE,
    crossed_mean_interval,
    mean_interval,
    rank_correlation,
    share_interval,
    stable_seed,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pyarrow as pa

    from .plan import AuditPlan

SCHEMA_VERSION = 5

_COLUMNS = [
    "condition",
    "semantic",
    "axis",
    "demographic",
    "percentile",
    "seed",
    "iou",
    "chance",
    "soft_iou",
    "empty_union",
    "containment",
    "containment_chance",
    "block_iou",
    "semantic_label",
    "attribute_label",
    "attribute_score",
    "clip_score",
    "status",
]


@dataclass
class _Group:
    """The measured images of one (condition, profession, axis, word, percentile)."""

    chance: float
    iou: dict[int, float] = field(default_factory=dict)  # seed -> IoU
    soft: dict[int, float] = field(default_factory=dict)
    blocks: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    empty: int = 0
    failed: int = 0


_Key = tuple[str, str, str, str, float]


def summarise(
    plan: AuditPlan,
    records: pa.Table,
    planted: Sequence[Mapping[str, Any]] | None = None,
    ledger: pa.Table | None = None,
    controls: pa.Table | None = None,
    masks: pa.Table | None = None,
) -> dict[str, Any]:
    """Every figure of a run, as plain values for JSON.

    Args:
        plan: the run's plan.
        records: its records, in canonical order.
        planted: the testbed's table (``semantic``, ``shares``, ``level``, ``overlap``).
        ledger: what guidance did, where there was any.
        controls: other overlaps on the same pictures, where they were measured.
        masks: the masks' bits, where they were kept.

    Returns:
        A dict with ``schema_version``, ``run`` (what was planned and measured), ``precision``
        (what it came to, `rounds.figures`; ``None`` for fixed seeds), ``professions``
        (a figure set a group), ``overall`` (over professions), ``comparisons`` (how many intervals
        leave chance, and how many do so with the level shared out over all of them), ``shares``
        (demographics read in the pictures), ``testbed`` (``None`` for other models),
        ``containment`` (the same figures of that measure; ``None`` where the plan measures IoU
        alone), ``controls``, ``curves`` and ``sweeps`` (`nulls`), and, for the conditions,
        ``differences`` (on the same seeds), ``share_differences``, ``outputs`` and ``guidance``.

    Example:
        >>> from .plan import AuditPlan
        >>> from .records import SCHEMA
        >>> plan = AuditPlan(professions=["doctor"], seeds=[0])
        >>> summarise(plan, SCHEMA.empty_table())["run"]["complete"]
        False
    """
    rows = records.select(_COLUMNS).to_pylist()
    groups = _in_plan_order(_grouped(rows), plan)
    words = sum(len(listed) for listed in plan.axes.values())
    sides = words * len(plan.professions) * len(plan.conditions)
    asked = rounds.asked(plan, rows)
    professions = [
        _profession(key, group, sides, _precision(plan, "iou", key[-1]))
        for key, group in groups.items()
    ]
    _adjust(professions)
    shares = _shares(rows, plan)
    iou = _values(groups, "iou")
    beside = CONTROLS_SCHEMA.empty_table() if controls is None else controls
    kept = MASKS_SCHEMA.empty_table() if masks is None else masks
    summary = {
        "schema_version": SCHEMA_VERSION,
        "run": _run(plan, asked, rows),
        "precision": rounds.figures(plan, asked),
        "overall": _overall(groups),
        "comparisons": _comparisons(professions, sides),
        "professions": professions,
        "shares": shares,
        "testbed": None if planted is None else _testbed(groups, shares, planted),
        "containment": _containment(plan, rows, planted, beside),
        "controls": nulls.summarise_controls(plan, iou, beside, kept, _above(professions)),
        "curves": nulls.threshold_curves(plan, beside),
        "sweeps": nulls.sweep_curves(beside),
        "differences": compare.differences(plan, iou, _values(groups, "soft")),
        "share_differences": compare.share_differences(plan, rows),
        "outputs": compare.outputs(plan, rows),
        "guidance": [] if ledger is None else compare.ledger_curves(ledger),
    }
    if plan.precision is not None:
        rounds.tell(summary, plan.precision)
    return summary


def _precision(plan: AuditPlan, measure: str, percentile: float) -> float | None:
    """The plan's precision for the figures that it is about, None for others."""
    about = measure == plan.measure and percentile == plan.percentiles[0]
    return plan.precision if about else None


def _containment(
    plan: AuditPlan,
    rows: Sequence[Mapping[str, Any]],
    planted: Sequence[Mapping[str, Any]] | None,
    controls: pa.Table,
) -> dict[str, Any] | None:
    """The figures of containment, which has one value a pair where IoU has one a percentile."""
    if plan.measure != "containment":
        return None
    as_iou = [
        {**row, "iou": row["containment"], "chance": plan.containment.fractions[1], "block_iou": []}
        for row in rows
        if row["percentile"] == plan.percentiles[0]
        and (row["status"] != OK or row["containment"] is not None)
    ]
    groups = _in_plan_order(_grouped(as_iou), plan)
    sides = sum(len(words) for words in plan.axes.values()) * len(plan.professions)
    sides *= len(plan.conditions)
    professions = [_profession(key, group, sides, plan.precision) for key, group in groups.items()]
    _adjust(professions)
    values = _values(groups, "iou")
    differences = compare.differences(plan, values, values)
    ranks = _testbed(groups, [], planted)["rank"] if planted else []
    place = controls.schema.get_field_index("iou")
    inside = controls.set_column(place, controls.schema.field(place), controls["containment"])
    # no masks: what the shuffled null leaves of containment follows nothing (docs/validity.md)
    beside = nulls.summarise_controls(
        plan, values, inside, MASKS_SCHEMA.empty_table(), _above(professions)
    )
    return {
        "fractions": list(plan.containment.fractions),
        "layers": list(plan.containment_layers),
        "overall": [_renamed(row) for row in _overall(groups)],
        "comparisons": [_renamed(row) for row in _comparisons(professions, sides)],
        "professions": [_renamed(row) for row in professions],
        "differences": [
            _renamed(row) | {"professions": [_renamed(one) for one in row["professions"]]}
            for row in differences
        ],
        "rank": [_renamed(row) for row in ranks],
        "controls": [_renamed(row) for row in beside],
    }


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row made for IoU as one of containment: its own names, and nothing of percentiles."""
    names = {
        "iou": "containment",
        "baseline_iou": "baseline_containment",
        "condition_iou": "condition_containment",
    }
    dropped = ("percentile", "soft_iou", "block_iou", "empty_unions")
    return {names.get(name, name): value for name, value in row.items() if name not in dropped}


def _grouped(rows: Iterable[Mapping[str, Any]]) -> dict[_Key, _Group]:
    groups: dict[_Key, _Group] = {}
    for row in rows:
        key = (
            row["condition"],
            row["semantic"],
            row["axis"],
            row["demographic"],
            row["percentile"],
        )
        group = groups.setdefault(key, _Group(row["chance"]))
        if row["status"] != OK:
            group.failed += 1
            continue
        group.iou[row["seed"]] = row["iou"]
        group.soft[row["seed"]] = row["soft_iou"]
        group.empty += bool(row["empty_union"])
        for block, value in row["block_iou"]:
            if value is not None:
                group.blocks[block].append(value)
    return groups


def _in_plan_order(groups: Mapping[_Key, _Group], plan: AuditPlan) -> dict[_Key, _Group]:
    """Groups as the plan lists professions, axes, words and percentiles."""
    words = [(axis, word) for axis, listed in plan.axes.items() for word in listed]

    def place(key: _Key) -> tuple[Any, ...]:
        condition, semantic, axis, demographic, percentile = key
        return (
            plan.conditions.index(condition),
            words.index((axis, demographic)),
            plan.percentiles.index(percentile),
            plan.professions.index(semantic),
        )

    return {key: groups[key] for key in sorted(groups, key=place)}


def _run(plan: AuditPlan, asked: rounds.Asked, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    images = {(row["condition"], row["semantic"], row["seed"]) for row in rows}
    good = {(row["condition"], row["semantic"], row["seed"]) for row in rows if row["status"] == OK}
    bad = {(row["condition"], row["semantic"], row["seed"]) for row in rows if row["status"] != OK}
    return {
        "conditions": list(plan.conditions),
        "percentiles": list(plan.percentiles),
        "images_planned": asked.pictures,
        "images_drawn": len(images),
        "images_measured": len(good),
        "images_measured_in_part": len(good & bad),
        "complete": asked.ended and len(images) == asked.pictures,
        "records": len(rows),
        "status": dict(sorted(Counter(row["status"] for row in rows).items())),
    }


def _profession(
    key: _Key, group: _Group, comparisons: int, precision: float | None
) -> dict[str, Any]:
    values = list(group.iou.values())
    figure = mean_interval(values, precision=precision)
    shared = mean_interval(values, 1 - (1 - CONFIDENCE) / comparisons, precision=precision)
    span = 1 - group.chance
    return {
        **_named(key),
        "n": len(values),
        "failed": group.failed,
        "empty_unions": group.empty,
        "chance": group.chance,
        "iou": figure.to_dict(),
        "corrected": figure.scaled(1 / span, -group.chance / span).to_dict(),
        "soft_iou": mean_interval(list(group.soft.values())).to_dict(),
        "side": _side(figure.low, figure.high, group.chance),
        "side_bonferroni": _side(shared.low, shared.high, group.chance),
        "p": chance_test(values, group.chance, precision),
        "block_iou": {
            block: mean_interval(found).to_dict() for block, found in group.blocks.items()
        },
    }


def _adjust(professions: Sequence[dict[str, Any]]) -> None:
    """Adds adjusted p values: over all professions and words of one condition and percentile."""
    families: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in professions:
        families[row["condition"], row["percentile"]].append(row)
    for rows in families.values():
        p_values = [row["p"] for row in rows]
        adjusted = zip(holm(p_values), benjamini_hochberg(p_values), strict=True)
        for row, (one, other) in zip(rows, adjusted, strict=True):
            row["p_holm"], row["p_bh"] = one, other


def _above(professions: Iterable[Mapping[str, Any]]) -> dict[Any, list[str]]:
    """Part -> the professions whose interval lies above chance."""
    found: dict[Any, list[str]] = defaultdict(list)
    for row in professions:
        part = (row["condition"], row["axis"], row["demographic"], row["percentile"])
        if row["side"] == "above":
            found[part].append(row["semantic"])
    return found


def _named(key: _Key) -> dict[str, Any]:
    names = ("condition", "semantic", "axis", "demographic", "percentile")
    return dict(zip(names, key, strict=True))


def _side(low: float | None, high: float | None, chance: float) -> str:
    if low is None or high is None:
        return "no interval"
    if low > chance:
        return "above"
    return "below" if high < chance else "includes"


def _overall(groups: Mapping[_Key, _Group]) -> list[dict[str, Any]]:
    """Mean over professions, for each (condition, axis, word, percentile)."""
    found = []
    for part, members in _by_word(groups).items():
        condition, axis, demographic, percentile = part
        chance = members[0][1].chance
        span = 1 - chance
        figure = crossed_mean_interval(
            _matrix([group for _, group in members]), seed=stable_seed("overall", *part)
        )
        blocks = sorted({block for _, group in members for block in group.blocks})
        found.append(
            {
                "condition": condition,
                "axis": axis,
                "demographic": demographic,
                "percentile": percentile,
                "chance": chance,
                "images": sum(len(group.iou) for _, group in members),
                "iou": figure.to_dict(),
                "corrected": figure.scaled(1 / span, -chance / span).to_dict(),
                "block_iou": {
                    block: mean_interval(
                        [
                            float(np.mean(group.blocks[block]))
                            for _, group in members
                            if group.blocks.get(block)
                        ]
                    ).to_dict()
                    | {"method": "Student t over professions"}
                    for block in blocks
                },
            }
        )
    return found


def _by_word(
    groups: Mapping[_Key, _Group],
) -> dict[tuple[str, str, str, float], list[tuple[str, _Group]]]:
    parts: dict[tuple[str, str, str, float], list[tuple[str, _Group]]] = defaultdict(list)
    for (condition, semantic, axis, demographic, percentile), group in groups.items():
        parts[condition, axis, demographic, percentile].append((semantic, group))
    return parts


def _values(groups: Mapping[_Key, _Group], name: str) -> dict[Any, dict[str, dict[int, float]]]:
    """Measured values: (condition, axis, word, percentile) -> profession -> seed -> value."""
    return {
        part: {semantic: getattr(group, name) for semantic, group in members}
        for part, members in _by_word(groups).items()
    }


def _matrix(groups: Sequence[_Group]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """IoU as ``[professions, seeds]``, NaN where nothing was measured."""
    seeds = sorted({seed for group in groups for seed in group.iou})
    return np.array(
        [[group.iou.get(seed, np.nan) for seed in seeds] for group in groups], dtype=np.float64
    ).reshape(len(groups), len(seeds))


def _comparisons(professions: Sequence[Mapping[str, Any]], sides: int) -> list[dict[str, Any]]:
    """How many professions' intervals leave the chance level, per word and percentile."""
    parts: dict[tuple[str, str, str, float], list[Mapping[str, Any]]] = defaultdict(list)
    for row in professions:
        part = (row["condition"], row["axis"], row["demographic"], row["percentile"])
        parts[part].append(row)
    found = []
    for (condition, axis, demographic, percentile), rows in parts.items():
        plain = Counter(row["side"] for row in rows)
        shared = Counter(row["side_bonferroni"] for row in rows)
        found.append(
            {
                "condition": condition,
                "axis": axis,
                "demographic": demographic,
                "percentile": percentile,
                "chance": rows[0]["chance"],
                "professions": len(rows),
                "with_interval": len(rows) - plain["no interval"],
                "above": plain["above"],
                "below": plain["below"],
                "above_bonferroni": shared["above"],
                "below_bonferroni": shared["below"],
                "above_holm": _significant(rows, "p_holm", "above"),
                "below_holm": _significant(rows, "p_holm", "below"),
                "above_bh": _significant(rows, "p_bh", "above"),
                "below_bh": _significant(rows, "p_bh", "below"),
                "comparisons": sides,
                "confidence": CONFIDENCE,
            }
        )
    return found


def _significant(rows: Iterable[Mapping[str, Any]], name: str, side: str) -> int:
    """How many professions on one side of chance have an adjusted p value within the level."""
    return sum(
        row["side"] == side and row[name] is not None and row[name] <= 1 - CONFIDENCE
        for row in rows
    )


def _shares(rows: Sequence[Mapping[str, Any]], plan: AuditPlan) -> list[dict[str, Any]]:
    """Demographics that the classifier reads, per profession: each picture counts once."""
    labels: dict[tuple[str, str, str], dict[int, tuple[str | None, str | None]]] = {}
    for row in rows:
        if row["attribute_score"] is None:  # no classifier looked at the picture
            continue
        part = (row["condition"], row["semantic"], row["axis"])
        found = labels.setdefault(part, {})
        found[row["seed"]] = (row["attribute_label"], row["semantic_label"])
    words = compare.words_read(plan, rows)
    shares = []
    for (condition, semantic, axis), pictures in labels.items():
        counts = Counter(label for label, _ in pictures.values() if label is not None)
        n = sum(counts.values())
        if n == 0 or not words[axis]:
            continue
        right = sum(noun == semantic for _, noun in pictures.values())
        shares.append(
            {
                "condition": condition,
                "semantic": semantic,
                "axis": axis,
                "n": n,
                "unread": len(pictures) - n,
                "words": {word: share_interval(counts[word], n).to_dict() for word in words[axis]},
                "risk_difference": _risk_difference(words[axis], counts, n),
                "semantic_right": share_interval(right, len(pictures)).to_dict(),
            }
        )
    return shares


def _risk_difference(
    words: Sequence[str], counts: Mapping[str, int], n: int
) -> dict[str, Any] | None:
    """Second word's share minus the first's; None unless every picture was read as one of two."""
    if len(words) != 2 or counts[words[0]] + counts[words[1]] != n:
        return None
    return risk_difference(share_interval(counts[words[1]], n)).to_dict()


def _testbed(
    groups: Mapping[_Key, _Group],
    shares: Sequence[Mapping[str, Any]],
    planted: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What is planted beside what is measured.

    Rank correlation of IoU with the planted overlap; how many shares' intervals hold the planted
    share.
    """
    known = {row["semantic"]: row for row in planted}
    ranks = [
        _rank(part, members, known, against)
        for part, members in _by_word(groups).items()
        for against in ("overlap", "shares")
    ]
    held: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in shares:
        words = list(row["words"].items())
        for word, figure in words[1:] if len(words) == 2 else words:  # the two of a pair sum to 1
            truth = known.get(row["semantic"], {}).get("shares", {}).get(word)
            if truth is not None and figure["low"] is not None:
                part = row["condition"], row["axis"]
                held[part].append(figure["low"] <= truth <= figure["high"])
    return {
        "planted": [dict(row) for row in planted],
        "rank": [rank for rank in ranks if rank["spearman"]["n"]],
        "shares": [
            {"condition": condition, "axis": axis, "compared": len(each), "covered": sum(each)}
            for (condition, axis), each in held.items()
        ],
    }


def _rank(
    part: tuple[str, str, str, float],
    members: Sequence[tuple[str, _Group]],
    known: Mapping[str, Mapping[str, Any]],
    against: str,
) -> dict[str, Any]:
    """Rank correlation over professions of mean IoU with what is planted ("overlap", "shares").

    The two are uncorrelated in the testbed's world, so each answers its own question.
    """
    condition, axis, demographic, percentile = part
    pairs = [
        (float(np.mean(list(group.iou.values()))), known[semantic][against][demographic])
        for semantic, group in members
        if group.iou and demographic in known.get(semantic, {}).get(against, {})
    ]
    figure = rank_correlation([x for x, _ in pairs], [y for _, y in pairs])
    return {
        "condition": condition,
        "axis": axis,
        "demographic": demographic,
        "percentile": percentile,
        "against": against,
        "spearman": figure.to_dict(),
    }
