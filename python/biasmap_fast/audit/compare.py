"""What a condition changes: differences on the same seeds, and what guidance did on the way."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from .inference import (
    benjamini_hochberg,
    crossed_sign_flip_test,
    hedges_g,
    holm,
    mcnemar_test,
    share_difference,
    sign_flip_test,
)
from .nulls import matrix_of
from .statistics import crossed_mean_interval, mean_interval, share_interval, stable_seed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pyarrow as pa

    from .plan import AuditPlan

    Part = tuple[str, str, str, float]  # condition, axis, demographic word, percentile
    Values = Mapping[str, Mapping[int, float]]  # profession -> seed -> value


def differences(
    plan: AuditPlan, iou: Mapping[Part, Values], soft_iou: Mapping[Part, Values]
) -> list[dict[str, Any]]:
    """Every other condition minus the first, image by image, for each word and percentile.

    Args:
        plan: the run's plan; its first condition is the baseline.
        iou: what was measured.
        soft_iou: the same images' SoftIoU.

    Returns:
        For each condition, axis, word and percentile: the mean over professions of the differences
        in IoU and SoftIoU (professions and seeds resampled), and each profession's own (Student
        t); for IoU also p values of sign-flip tests and the effect sizes (`inference`). Only
        images that were measured under both conditions count.
    """
    baseline = plan.conditions[0]
    found = []
    for part in iou:
        condition, axis, demographic, percentile = part
        before = (baseline, axis, demographic, percentile)
        if condition == baseline or before not in iou:
            continue
        measures: dict[str, Any] = {}
        by_profession: dict[str, dict[str, Any]] = {}
        for name, values in (("iou", iou), ("soft_iou", soft_iou)):
            changes = {
                semantic: _paired(values[before].get(semantic, {}), after)
                for semantic, after in values[part].items()
            }
            matrix = matrix_of(changes)
            measures[name] = crossed_mean_interval(
                matrix, lowest=-1.0, seed=stable_seed("difference", name, *part)
            ).to_dict()
            for semantic, change in changes.items():
                figure = mean_interval(list(change.values()), lowest=-1.0)
                by_profession.setdefault(semantic, {})[name] = figure.to_dict()
            if name == "iou":
                measures["p"] = crossed_sign_flip_test(matrix)
                _test_professions(changes, by_profession)
        found.append(
            {
                "condition": condition,
                "baseline": baseline,
                "axis": axis,
                "demographic": demographic,
                "percentile": percentile,
                "baseline_iou": _mean_of_means(_among(iou[before], iou[part])),
                "condition_iou": _mean_of_means(_among(iou[part], iou[before])),
                **measures,
                "professions": [
                    {"semantic": semantic, **figures} for semantic, figures in by_profession.items()
                ],
            }
        )
    return found


def _test_professions(changes: Values, rows: Mapping[str, dict[str, Any]]) -> None:
    """Adds p value, adjusted p values and effect size of each profession's differences."""
    p_values = [sign_flip_test(list(change.values())) for change in changes.values()]
    tests = zip(changes, p_values, holm(p_values), benjamini_hochberg(p_values), strict=True)
    for semantic, p, p_holm, p_bh in tests:
        effect = hedges_g(list(changes[semantic].values())).to_dict()
        rows[semantic] |= {"p": p, "p_holm": p_holm, "p_bh": p_bh, "effect": effect}


def words_read(plan: AuditPlan, rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The words of each axis whose shares a classifier's labels tell.

    All of them, unless it reads a word that the axis lacks: then it need not know all words of the
    axis either, and those count that it has read. Of an axis that it knows nothing of none is left.
    """
    labels: dict[str, set[str]] = {axis: set() for axis in plan.axes}
    for row in rows:
        if row["attribute_label"] is not None:
            labels[row["axis"]].add(row["attribute_label"])
    return {
        axis: words
        if labels[axis] <= set(words)
        else tuple(word for word in words if word in labels[axis])
        for axis, words in plan.axes.items()
    }


def share_differences(plan: AuditPlan, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Risk Difference between every other condition and the first, on the same seeds.

    Args:
        plan: the run's plan.
        rows: its records; a picture counts where its axis was read under both conditions.

    Returns:
        For each condition, axis and word (the second alone of an axis of two): each profession's
        Risk Difference with Newcombe's paired interval and McNemar's p value, Holm's and Benjamini
        and Hochberg's over professions, and the mean over professions.
    """
    labels: dict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    for row in rows:
        if row["attribute_label"] is not None:
            labels[row["condition"], row["axis"], row["semantic"]][row["seed"]] = row[
                "attribute_label"
            ]
    found = []
    baseline = plan.conditions[0]
    for condition in plan.conditions[1:]:
        for axis, words in words_read(plan, rows).items():
            for word in words[1:] if len(words) == 2 else words:
                pairs = {
                    semantic: _label_pairs(
                        labels[baseline, axis, semantic], labels[condition, axis, semantic], word
                    )
                    for semantic in plan.professions
                }
                kept = {semantic: own for semantic, own in pairs.items() if own}
                if kept:
                    where = {"condition": condition, "baseline": baseline, "axis": axis}
                    found.append({**where, "demographic": word, **_share_rows(kept)})
    return found


def _label_pairs(
    before: Mapping[int, str], after: Mapping[int, str], word: str
) -> dict[int, tuple[bool, bool]]:
    return {s: (before[s] == word, after[s] == word) for s in sorted(before) if s in after}


def _share_rows(pairs: Mapping[str, Mapping[int, tuple[bool, bool]]]) -> dict[str, Any]:
    p_values = [mcnemar_test(list(own.values())) for own in pairs.values()]
    tests = zip(pairs.items(), p_values, holm(p_values), benjamini_hochberg(p_values), strict=True)
    matrix = matrix_of(
        {
            semantic: {seed: float(after) - float(before) for seed, (before, after) in own.items()}
            for semantic, own in pairs.items()
        }
    )
    return {
        "risk_difference": crossed_mean_interval(matrix, lowest=-1.0).to_dict(),
        "p": crossed_sign_flip_test(matrix),
        "professions": [
            {
                "semantic": semantic,
                "risk_difference": share_difference(list(own.values())).to_dict(),
                "p": p,
                "p_holm": p_holm,
                "p_bh": p_bh,
            }
            for (semantic, own), p, p_holm, p_bh in tests
        ],
    }


def outputs(plan: AuditPlan, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the classifier reads under each condition: profession right, plausibility, CLIP score.

    Args:
        plan: the run's plan.
        rows: its records; those of pictures that no classifier read are left out.

    Returns:
        One dict a condition. ``clip_score`` is ``None`` without CLIP, and
        ``clip_score_difference`` (on the same seeds, professions and seeds resampled) also for the
        first condition, from which it is taken.
    """
    pictures: dict[str, dict[tuple[str, int], tuple[bool, float]]] = defaultdict(dict)
    scores: dict[str, dict[str, dict[int, float]]] = {each: {} for each in plan.conditions}
    for row in rows:
        if row["clip_score"] is not None:
            own = scores[row["condition"]].setdefault(row["semantic"], {})
            own[row["seed"]] = row["clip_score"] / 100  # a share, as intervals are cut to
        if row["attribute_score"] is not None:
            right = row["semantic_label"] == row["semantic"]
            seen = (row["semantic"], row["seed"])
            pictures[row["condition"]][seen] = (right, row["attribute_score"])
    return [
        {
            "condition": condition,
            "pictures": len(pictures[condition]),
            "semantic_right": share_interval(
                sum(right for right, _ in pictures[condition].values()), len(pictures[condition])
            ).to_dict(),
            "attribute_score": mean_interval(
                [score for _, score in pictures[condition].values()]
            ).to_dict()
            | {"method": "Student t over pictures"},
            **_clip_figures(plan, condition, scores),
        }
        for condition in plan.conditions
        if pictures[condition]
    ]


def _clip_figures(
    plan: AuditPlan, condition: str, scores: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> dict[str, Any]:
    own, before = scores[condition], scores[plan.conditions[0]]
    if not own:
        return {"clip_score": None, "clip_score_difference": None}
    seed = stable_seed("clip score", condition)
    level = crossed_mean_interval(matrix_of(own), seed=seed).scaled(100, 0).to_dict()
    if condition == plan.conditions[0]:
        return {"clip_score": level, "clip_score_difference": None}
    matrix = matrix_of({p: _paired(before.get(p, {}), after) for p, after in own.items()})
    change = crossed_mean_interval(matrix, lowest=-1.0, seed=seed).scaled(100, 0).to_dict()
    return {
        "clip_score": level,
        "clip_score_difference": change | {"p": crossed_sign_flip_test(matrix)},
    }


def ledger_curves(ledger: pa.Table) -> list[dict[str, Any]]:
    """The ledger over the run: for each condition and UNet call, what its pictures had.

    Args:
        ledger: `records.read_ledger`.
    """
    calls: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in ledger.to_pylist():
        calls[row["condition"], row["call"]].append(row)
    curves = []
    for (condition, call), rows in sorted(calls.items()):
        taken = [row for row in rows if np.isfinite(row["gradient_norm"])]
        curves.append(
            {
                "condition": condition,
                "call": call,
                "timestep": rows[0]["timestep"],
                "pictures": len(rows),
                "energy": _quartiles([row["energy"] for row in rows]),
                "iou": _quartiles([float(np.mean(row["iou"])) for row in rows]),
                "gradient_norm": _quartiles([row["gradient_norm"] for row in taken]),
                "clipped": sum(row["clip_factor"] < 1.0 for row in rows if row["applied"]),
                "skipped": dict(
                    sorted(Counter(row["reason"] for row in rows if not row["applied"]).items())
                ),
            }
        )
    return curves


def _paired(before: Mapping[int, float], after: Mapping[int, float]) -> dict[int, float]:
    return {seed: value - before[seed] for seed, value in after.items() if seed in before}


def _among(values: Values, others: Values) -> Values:
    """The values of those images that others have too."""
    return {
        semantic: {seed: x for seed, x in own.items() if seed in others.get(semantic, {})}
        for semantic, own in values.items()
    }


def _mean_of_means(values: Values) -> float | None:
    means = [float(np.mean(list(found.values()))) for found in values.values() if found]
    return float(np.mean(means)) if means else None


def _quartiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median and quartiles of finite values; None without any."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return None
    low, middle, high = np.quantile(finite, (0.25, 0.5, 0.75))
    return {"median": float(middle), "low": float(low), "high": float(high)}
