"""What a condition changes: differences on the same seeds, and what guidance did on the way."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

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
        t). Only images that were measured under both conditions count.
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
            measures[name] = crossed_mean_interval(
                _matrix(changes), lowest=-1.0, seed=stable_seed("difference", name, *part)
            ).to_dict()
            for semantic, change in changes.items():
                figure = mean_interval(list(change.values()), lowest=-1.0)
                by_profession.setdefault(semantic, {})[name] = figure.to_dict()
        found.append(
            {
                "condition": condition,
                "baseline": baseline,
                "axis": axis,
                "demographic": demographic,
                "percentile": percentile,
                "baseline_iou": _mean_of_means(iou[before]),
                "condition_iou": _mean_of_means(iou[part]),
                **measures,
                "professions": [
                    {"semantic": semantic, **figures} for semantic, figures in by_profession.items()
                ],
            }
        )
    return found


def outputs(plan: AuditPlan, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the classifier reads under each condition: profession right, and plausibility.

    Args:
        plan: the run's plan.
        rows: its records; those of pictures that no classifier read are left out.
    """
    pictures: dict[str, dict[tuple[str, int], tuple[bool, float]]] = defaultdict(dict)
    for row in rows:
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
        }
        for condition in plan.conditions
        if pictures[condition]
    ]


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


def _matrix(values: Values) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values as ``[professions, seeds]``, NaN where there is none."""
    seeds = sorted({seed for found in values.values() for seed in found})
    return np.array(
        [[found.get(seed, np.nan) for seed in seeds] for found in values.values()], np.float64
    ).reshape(len(values), len(seeds))


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
