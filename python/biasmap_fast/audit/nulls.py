"""What stands beside a finding: the seed-shuffled null, controls, curves and sweeps, summarised.

The *seed-shuffled null* lays the profession's mask of seed i over the demographic word's mask of
every other seed j: what remains where nothing of one and the same picture is shared, but layout,
smoothness and the centred face are. It is the mean over all pairs i != j, so it has no random part
and does not depend on how the pictures were divided. It is shown beside the figure and never
subtracted: where layouts barely move, the signal itself is in it.

* *Difference of the figure from it*: D = mean of M[i, i] - mean of M[i, j], M[i, j] the IoU of
  profession mask i and word mask j. D is a U-statistic of degree two; its interval is the
  jackknife's (Arvesen 1969), D +- t x standard error with n - 1 degrees of freedom.
* *Its p value*: the word's masks are permuted among the seeds; exact for the hypothesis that the
  two concepts' masks are independent over seeds. One-sided: more overlap in the same picture.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import integrate, stats

from .controls import CURVE, NEGATIVE
from .inference import (
    benjamini_hochberg,
    crossed_sign_flip_test,
    hedges_g,
    holm,
    sign_flip_test,
)
from .masks import unpacked
from .records import OK
from .statistics import CONFIDENCE, Figure, crossed_mean_interval, mean_interval, stable_seed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    import pyarrow as pa

    from .plan import AuditPlan
    from .statistics import FloatArray

    Part = tuple[str, str, str, float]  # condition, axis, demographic word, percentile
    Values = Mapping[str, Mapping[int, float]]  # profession -> seed -> value

PERMUTATIONS = 1999


def cross_iou(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> FloatArray:
    """IoU of every mask of ``a`` with every mask of ``b``.

    Args:
        a: ``[S, N]`` bool.
        b: ``[S, N]`` bool.

    Returns:
        ``[S, S]``; 0 where the union is empty.

    Example:
        >>> a = np.array([[True, True, False], [False, False, True]])
        >>> cross_iou(a, a).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    # exact: counts of pixels are below 2 ** 24
    inter = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float64)  # [S, S]
    union = a.sum(axis=1)[:, None] + b.sum(axis=1)[None] - inter
    found: FloatArray = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    return found


def shuffled(matrix: FloatArray, seed: int = 0) -> tuple[Figure, Figure, float | None, FloatArray]:
    """The seed-shuffled null of one profession and word.

    Args:
        matrix: ``[S, S]`` of `cross_iou`, profession masks down, the word's masks across.
        seed: of the permutations.

    Returns:
        The null's mean (without interval: it is there to be compared with), the difference of the
        figure from it with its interval, the permutation test's p value, and the jackknife's
        pseudo-values ``[S]``, whose mean is the difference.
    """
    n = matrix.shape[0]
    if n < 3:
        text = "no seed-shuffled null below three pictures"
        none = Figure(None, None, None, n, CONFIDENCE, text)
        return none, none, None, np.full(n, np.nan)
    diagonal = np.diag(matrix)
    trace, total = float(diagonal.sum()), float(matrix.sum())
    apart = (total - trace) / (n * (n - 1))
    difference = trace / n - apart
    rest_trace = trace - diagonal
    rest_total = total - matrix.sum(axis=0) - matrix.sum(axis=1) + diagonal
    without = rest_trace / (n - 1) - (rest_total - rest_trace) / ((n - 1) * (n - 2))  # [S]
    pseudo = n * difference - (n - 1) * without
    error = float(pseudo.std(ddof=1)) / math.sqrt(n)
    method = "jackknife over seeds, Student t"
    figure = Figure(difference, None, None, n, CONFIDENCE, "no interval: no spread")
    p = None
    if error > 1e-12:
        reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
        low, high = max(-1.0, difference - reach), min(1.0, difference + reach)
        figure = Figure(difference, low, high, n, CONFIDENCE, method)
        p = _permutation_test(matrix, trace, seed)
    level = Figure(apart, None, None, n * (n - 1), CONFIDENCE, "mean over all pairs of seeds")
    return level, figure, p, pseudo


def _permutation_test(matrix: FloatArray, trace: float, seed: int) -> float:
    n = matrix.shape[0]
    rng = np.random.default_rng(seed)
    orders = rng.permuted(np.tile(np.arange(n), (PERMUTATIONS, 1)), axis=1)  # [R, S]
    traces = matrix[np.arange(n), orders].sum(axis=1)
    return float((1 + (traces >= trace - 1e-9).sum()) / (1 + PERMUTATIONS))


def summarise_controls(
    plan: AuditPlan,
    iou: Mapping[Part, Values],
    controls: pa.Table,
    masks: pa.Table,
    above: Mapping[Part, Sequence[str]],
) -> list[dict[str, Any]]:
    """Every null and control beside the figures of each condition, word and percentile.

    Args:
        plan: the run's plan.
        iou: what was measured.
        controls: `records.CONTROLS_SCHEMA`.
        masks: `records.MASKS_SCHEMA`.
        above: the professions whose interval lies above chance.

    Returns:
        One dict a part, with ``overall`` and ``professions``: for the null and every control its
        ``level`` and the ``difference`` of the figure from it, with p values (Holm's and Benjamini
        and Hochberg's over professions). ``above`` counts the professions above chance, and
        ``exceeds`` how many of those exceed each control by an interval above 0.
    """
    matrices = _matrices(masks)
    values = _control_values(controls)
    found = []
    for part, measured in iou.items():
        by_kind: dict[str, dict[str, dict[str, Any]]] = {}
        overall: dict[str, dict[str, Any]] = {}
        if matrices.get(part):
            by_kind["shuffled"], overall["shuffled"] = _shuffled_part(part, matrices[part])
        for kind in (*NEGATIVE, "synonym", "swapped"):
            other = values.get(_control_key(part, kind), {})
            if other:
                by_kind[kind], overall[kind] = _control_part(part, kind, measured, other)
        if not by_kind:
            continue
        condition, axis, demographic, percentile = part
        found.append(
            {
                "condition": condition,
                "axis": axis,
                "demographic": demographic,
                "percentile": percentile,
                "overall": overall,
                "professions": [
                    {
                        "semantic": semantic,
                        **{k: rows[semantic] for k, rows in by_kind.items() if semantic in rows},
                    }
                    for semantic in measured
                ],
                "above": len(above[part]),
                "exceeds": {
                    kind: sum(
                        (rows.get(semantic, {}).get("difference", {}).get("low") or 0.0) > 0.0
                        for semantic in above[part]
                    )
                    for kind, rows in by_kind.items()
                    if kind in ("shuffled", *NEGATIVE)
                },
            }
        )
    return found


def threshold_curves(plan: AuditPlan, controls: pa.Table) -> list[dict[str, Any]]:
    """Corrected IoU over the percentiles `controls.CURVE`, and its area, for each word.

    The area is the mean of the corrected IoU over the percentiles (trapezoids, divided by their
    range): 0 at chance, 1 at identity, and no one percentile decides it.

    Args:
        plan: the run's plan.
        controls: `records.CONTROLS_SCHEMA`.
    """
    images: dict[tuple[str, str, str], dict[str, dict[int, dict[float, float]]]] = {}
    for row in _ok(controls, ("threshold",)):
        part = (row["condition"], row["axis"], row["word"])
        by_seed = images.setdefault(part, {}).setdefault(row["semantic"], {})
        by_seed.setdefault(row["seed"], {})[row["percentile"]] = row["iou"]
    chances = np.array([(1 - q / 100) / (1 + q / 100) for q in CURVE])
    found = []
    for (condition, axis, word), professions in sorted(images.items()):
        curves = {
            semantic: {
                seed: (np.array([ious[q] for q in CURVE]) - chances) / (1 - chances)
                for seed, ious in by_seed.items()
                if len(ious) == len(CURVE)
            }
            for semantic, by_seed in professions.items()
        }
        areas = {
            semantic: {
                seed: float(integrate.trapezoid(curve, CURVE)) / (CURVE[-1] - CURVE[0])
                for seed, curve in by_seed.items()
            }
            for semantic, by_seed in curves.items()
        }
        key = ("curve", condition, axis, word)
        found.append(
            {
                "condition": condition,
                "axis": axis,
                "demographic": word,
                "percentiles": list(CURVE),
                "corrected": [
                    crossed_mean_interval(
                        matrix_of(
                            {p: {s: c[i] for s, c in own.items()} for p, own in curves.items()}
                        ),
                        lowest=-1.0,
                        seed=stable_seed(*key, q),
                    ).to_dict()
                    for i, q in enumerate(CURVE)
                ],
                "area": crossed_mean_interval(
                    matrix_of(areas), lowest=-1.0, seed=stable_seed(*key, "area")
                ).to_dict(),
                "professions": [
                    {
                        "semantic": p,
                        "area": mean_interval(list(areas[p].values()), lowest=-1.0).to_dict(),
                    }
                    for p in plan.professions
                    if p in areas
                ],
            }
        )
    return found


def sweep_curves(controls: pa.Table) -> list[dict[str, Any]]:
    """Mean IoU over professions of each UNet call, layer or branch that was swept over.

    Args:
        controls: `records.CONTROLS_SCHEMA`.
    """
    parts: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
    for row in _ok(controls, ("step", "layer", "branch")):
        where = (row["condition"], row["axis"], row["word"], row["kind"], row["variant"])
        parts.setdefault(where, {}).setdefault(row["semantic"], {})[row["seed"]] = row["iou"]
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, own in sorted(parts.items()):
        condition, axis, word, kind, variant = key
        entry = found.setdefault(
            key[:-1],
            {"condition": condition, "axis": axis, "demographic": word, "by": kind, "parts": []},
        )
        figure = crossed_mean_interval(matrix_of(own), seed=stable_seed("sweep", *key))
        entry["parts"].append({"part": variant, "iou": figure.to_dict()})
    for entry in found.values():
        if entry["by"] == "step":
            entry["parts"].sort(key=lambda part: int(part["part"]))
    return [found[key] for key in sorted(found)]


def matrix_of(values: Values) -> FloatArray:
    """Values as ``[professions, seeds]``, NaN where nothing was measured."""
    seeds = sorted({seed for own in values.values() for seed in own})
    return np.array(
        [[own.get(seed, np.nan) for seed in seeds] for own in values.values()], np.float64
    ).reshape(len(values), len(seeds))


def _shuffled_part(
    part: Part, matrices: Mapping[str, tuple[list[int], FloatArray]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    pseudo: dict[str, dict[int, float]] = {}
    levels = []
    for semantic, (seeds, matrix) in matrices.items():
        level, difference, p, values = shuffled(matrix, stable_seed("shuffled", *part, semantic))
        rows[semantic] = {"level": level.to_dict(), "difference": difference.to_dict(), "p": p}
        if level.value is not None:
            levels.append(level.value)
            pseudo[semantic] = dict(zip(seeds, values.tolist(), strict=True))
    _adjust(rows)
    figure = crossed_mean_interval(
        matrix_of(pseudo), lowest=-1.0, seed=stable_seed("shuffled", *part)
    )
    overall = {
        "level": mean_interval(levels).to_dict() | {"method": "Student t over professions"},
        "difference": figure.to_dict() | {"method": f"jackknife's pseudo-values, {figure.method}"},
        "p": None,  # each profession has its own permutations; the interval speaks for the mean
    }
    return rows, overall


def _control_part(
    part: Part, kind: str, measured: Values, other: Values
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Levels of one control, and differences of the figure from it on the same pictures."""
    changes = {
        semantic: {
            seed: own[seed] - other[semantic][seed] for seed in own if seed in other[semantic]
        }
        for semantic, own in measured.items()
        if semantic in other
    }
    rows = {
        semantic: {
            "level": mean_interval(list(other[semantic].values())).to_dict(),
            "difference": mean_interval(list(change.values()), lowest=-1.0).to_dict(),
            "effect": hedges_g(list(change.values())).to_dict(),
            "p": sign_flip_test(list(change.values())),
        }
        for semantic, change in changes.items()
    }
    _adjust(rows)
    matrix = matrix_of(changes)
    seed = stable_seed("control", kind, *part)
    overall = {
        "level": crossed_mean_interval(matrix_of(other), seed=seed).to_dict(),
        "difference": crossed_mean_interval(matrix, lowest=-1.0, seed=seed).to_dict(),
        "p": crossed_sign_flip_test(matrix),
    }
    return rows, overall


def _adjust(rows: Mapping[str, dict[str, Any]]) -> None:
    p_values = [row["p"] for row in rows.values()]
    adjusted = zip(holm(p_values), benjamini_hochberg(p_values), strict=True)
    for row, (one, other) in zip(rows.values(), adjusted, strict=True):
        row["p_holm"], row["p_bh"] = one, other


def _matrices(masks: pa.Table) -> dict[Part, dict[str, tuple[list[int], FloatArray]]]:
    """Part -> profession -> seeds, and `cross_iou` of their masks."""
    kept: dict[Part, dict[str, list[tuple[int, Any, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in masks.to_pylist():
        part = (row["condition"], row["axis"], row["demographic"], row["percentile"])
        size = row["height"], row["width"]
        kept[part][row["semantic"]].append(
            (row["seed"], (row["semantic_bits"], *size), (row["demographic_bits"], *size))
        )
    found: dict[Part, dict[str, tuple[list[int], FloatArray]]] = {}
    for part, professions in kept.items():
        found[part] = {}
        for semantic, rows in sorted(professions.items()):
            rows.sort(key=lambda row: row[0])  # whatever chunk a picture was measured in
            a, b = (
                np.stack([unpacked(bits, height, width) for bits, height, width in side])
                for side in zip(*(row[1:] for row in rows), strict=True)
            )
            found[part][semantic] = [row[0] for row in rows], cross_iou(a, b)
    return found


def _control_key(part: Part, kind: str) -> tuple[str, str, str, str, float]:
    condition, axis, demographic, percentile = part
    if kind == "swapped":
        return condition, kind, axis, demographic, percentile
    return condition, kind, "", "", percentile


def _control_values(
    controls: pa.Table,
) -> dict[tuple[str, str, str, str, float], dict[str, dict[int, float]]]:
    found: dict[Any, dict[str, dict[int, float]]] = {}
    for row in _ok(controls, (*NEGATIVE, "synonym", "swapped")):
        own = (row["axis"], row["word"]) if row["kind"] == "swapped" else ("", "")
        if row["iou"] is None:
            continue
        key = (row["condition"], row["kind"], *own, row["percentile"])
        found.setdefault(key, {}).setdefault(row["semantic"], {})[row["seed"]] = row["iou"]
    # in one order, whatever chunk a picture was measured in
    return {
        key: {p: dict(sorted(own.items())) for p, own in sorted(values.items())}
        for key, values in found.items()
    }


def _ok(controls: pa.Table, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Measured rows of some kinds, in one order whatever chunk they stand in."""
    rows = [r for r in controls.to_pylist() if r["kind"] in kinds and r["status"] == OK]
    rows.sort(
        key=lambda r: (
            r["condition"], r["semantic"], r["seed"], r["kind"], r["word"],
            r["variant"] or "", r["percentile"],
        )
    )  # fmt: skip
    return rows
