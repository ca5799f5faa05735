"""Study: what `--precision` saves, and whether its intervals keep their promise.

    python -m studies.precision    # half an hour on one idle core; goes on if stopped

A pool of pictures of the embedded model (300 seeds of each profession, default settings without
controls) stands for the truth. Into studies/results/precision.json go

* *pool*: audits simulated from it, with replacement, the two words of a picture together. For each
  precision the images drawn, those of a fixed design (one number of seeds for all professions, the
  smallest that makes every interval as narrow; it knows the pool's spreads, which nobody does
  beforehand), and how often intervals hold the pool's mean: fixed width, Student's t of
  the fixed design, and that of IoU, which the rule does not look at;
* *distributions*: the same of values whose mean is known, up to ones that break such intervals;
* *mean over professions*: the crossed bootstrap where professions have different numbers of seeds;
* *audit*: one real `--precision` audit, and its values beside the pool's of the same pictures.

Standard errors are the simulation's; a trial with all its words and professions is one observation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from biasmap_fast.audit import run_audit
from biasmap_fast.audit.rounds import GROWTH, boundaries
from biasmap_fast.audit.statistics import ALIKE, crossed_mean_interval

from .common import Values, options, plan_of, values_of, write

PRECISIONS = (0.01, 0.02, 0.03, 0.05)
BLOCK = 100  # seeds of one audit of the pool
Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Floats]


def pool(folder: Path, blocks: int) -> tuple[Floats, Values]:
    """``[professions, seeds, words, 2]`` of the pictures in which everything was measured."""
    found: Values = {}
    for block in range(blocks):
        seeds = range(BLOCK * block, BLOCK * (block + 1))
        result = run_audit(plan_of(seeds=seeds), folder / f"pool-{block}")
        for key, own in values_of(result).items():
            found.setdefault(key, {}).update(own)
    plan = plan_of()
    words = [word for listed in plan.axes.values() for word in listed]
    whole = set.intersection(*(set(own) for own in found.values()))
    array = np.array(
        [[[found[p, w][s] for w in words] for s in sorted(whole)] for p in plan.professions]
    )
    return array, found


@dataclass(frozen=True)
class Stopped:
    """R simulated professions of J parts, each at the round where drawing stopped."""

    counts: npt.NDArray[np.int64]  # [R] images
    means: Floats  # [R, J], as are the others
    wide: Floats  # half-widths that the rule goes by, `statistics.half_width`
    widths: Floats  # Student's half-widths
    others: Floats  # means of what the rule does not look at
    other_widths: Floats


def stop(
    values: Floats, precision: float, others: Floats | None = None, *, term: bool = True
) -> Stopped:
    """Draws every row of ``values`` ``[R, N, J]`` until the rule of `audit.rounds` stops it.

    ``term=False`` leaves out what the rule adds to the variance.
    """
    ends = np.array(list(boundaries(first_size(precision), values.shape[1])))
    means, widths = moments(values, ends)  # [R, E, J]
    alike = (running(np.maximum, values) - running(np.minimum, values))[:, ends - 1] <= ALIKE
    wide = guarded(widths, ends, alike) if term else widths
    narrow = np.all(wide <= precision, axis=2)  # [R, E]
    at = np.where(np.any(narrow, axis=1), np.argmax(narrow, axis=1), len(ends) - 1)
    rows = np.arange(len(values))
    beside = (means, widths) if others is None else moments(others, ends)
    return Stopped(ends[at], *(part[rows, at] for part in (means, wide, widths, *beside)))


def running(extreme: np.ufunc, values: Floats) -> Floats:
    found: Floats = extreme.accumulate(values, axis=1)
    return found


def first_size(precision: float) -> int:
    """Seeds of the first round of a plan that names none."""
    return len(plan_of(precision=precision).seeds)


def moments(values: Floats, ends: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Means and Student's half-widths ``[R, E, J]`` of the first ``ends`` of ``[R, N, J]``."""
    n = ends[:, None]
    means = np.cumsum(values, axis=1)[:, ends - 1] / n
    squares = np.cumsum(values**2, axis=1)[:, ends - 1]
    variances = np.maximum(squares - n * means**2, 0.0) / (n - 1)
    errors = np.sqrt(variances / n)
    # values that do not vary have no interval: none holds anything
    return means, stats.t.ppf(0.975, n - 1) * np.where(errors <= 1e-12, 0.0, errors)


def guarded(widths: Floats, ends: npt.NDArray[np.int64], alike: npt.NDArray[np.bool_]) -> Floats:
    """`statistics.half_width` ``[R, E, J]`` from Student's, and where values are alike."""
    n = ends[:, None]
    wider = np.sqrt(widths**2 + (stats.t.ppf(0.975, n - 1) / (2 * n)) ** 2)
    return np.where(alike, 3 / n, wider)


def rate(hits: npt.NDArray[np.bool_]) -> dict[str, float]:
    """A rate and the simulation's standard error; trials along the first axis."""
    each = hits.reshape(len(hits), -1).mean(axis=1)
    return {
        "value": float(each.mean()),
        "standard_error": float(each.std(ddof=1) / math.sqrt(len(each))),
    }


def fixed_number(spreads: Floats, precision: float) -> int:
    """Smallest number of images whose half-width is within the precision for every spread."""
    worst, n = float(spreads.max()), 2
    while stats.t.ppf(0.975, n - 1) * worst / math.sqrt(n) > precision:
        n += 1
    return n


def simulate_pool(array: Floats, precision: float, trials: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, round(1000 * precision)])
    spreads = array[..., 0].std(axis=1)  # [P, J]
    fixed = fixed_number(spreads, precision)
    most = 2 * fixed + 10 * first_size(precision)
    truth = array.mean(axis=1)  # [P, J, 2]
    counts: list[Any] = []
    hits: dict[str, list[Any]] = {name: [] for name in ("fixed width", "iou", "fixed")}
    for own, mean in zip(array, truth, strict=True):
        drawn = own[rng.integers(0, len(own), (trials, most))]  # [R, N, J, 2]
        found = stop(drawn[..., 0], precision, drawn[..., 1])
        counts.append(found.counts)
        miss, other = np.abs(found.means - mean[:, 0]), np.abs(found.others - mean[:, 1])
        hits["fixed width"].append(miss <= np.maximum(found.wide, precision))
        hits["iou"].append(other <= found.other_widths)
        means, widths = moments(drawn[..., 0], np.array([fixed]))
        hits["fixed"].append((np.abs(means - mean[:, 0]) <= widths)[:, 0])
    images = np.array(counts)  # [P, R]
    covered = {name: np.stack(each, axis=1) for name, each in hits.items()}  # [R, P, J]
    without = np.argsort(spreads.max(axis=1))[:-1]  # all but the profession of the most spread
    fewer = fixed_number(spreads[without], precision)
    return {
        "precision": precision,
        "images": float(images.sum(axis=0).mean()),
        "images_fixed": fixed * len(array),
        "share": float(images.sum(axis=0).mean() / (fixed * len(array))),
        "share_without_the_widest": float(
            images[without].sum(axis=0).mean() / (fewer * len(without))
        ),
        "not_reached": float((images == most).mean()),
        "covered": {name: rate(each) for name, each in covered.items()},
        "covered_least": {name: float(each.mean(axis=0).min()) for name, each in covered.items()},
    }


def rare(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return np.where(rng.random(shape) < 0.05, 0.5, 0.0)


def normal(spread: float) -> tuple[Draw, float, float]:
    return lambda rng, shape: rng.normal(0.4, spread, shape), 0.4, spread


def beta(a: float, b: float) -> tuple[Draw, float, float]:
    mean, variance = stats.beta.stats(a, b)
    return lambda rng, shape: rng.beta(a, b, shape), float(mean), math.sqrt(float(variance))


DISTRIBUTIONS = {  # how to draw, mean, spread
    "normal, spread 0.15": normal(0.15),
    "normal, spread 0.07": normal(0.07),
    "Beta(8, 30)": beta(8, 30),
    "Beta(1, 9)": beta(1, 9),
    "Beta(0.3, 2.7)": beta(0.3, 2.7),
    "0.5 in one picture of twenty, else 0": (rare, 0.025, 0.5 * math.sqrt(0.05 * 0.95)),
}


def simulate(name: str, precision: float, trials: int, seed: int) -> dict[str, Any]:
    draw, truth, spread = DISTRIBUTIONS[name]
    fixed = fixed_number(np.array([spread]), precision)
    rng = np.random.default_rng([seed, round(1000 * precision)])
    most = 2 * fixed + 10 * first_size(precision)
    hits: dict[str, list[Any]] = {"fixed width": [], "without the term": [], "fixed": []}
    counts, errors = [], []
    for begin in range(0, trials, 500):
        values = draw(rng, (min(500, trials - begin), most, 1))
        found, bare = stop(values, precision), stop(values, precision, term=False)
        errors.append(found.means - truth)
        counts.append(found.counts)
        miss = np.abs(errors[-1])
        hits["fixed width"].append(miss <= np.maximum(found.wide, precision))
        hits["without the term"].append(
            np.abs(bare.means - truth) <= np.maximum(bare.widths, precision)
        )
        means, widths = moments(values, np.array([fixed]))
        hits["fixed"].append(np.abs(means[:, 0] - truth) <= widths[:, 0])
    return {
        "name": name,
        "precision": precision,
        "images": float(np.concatenate(counts).mean()),
        "images_fixed": fixed,
        "bias": float(np.concatenate(errors).mean()),
        "covered": {kind: rate(np.concatenate(each)) for kind, each in hits.items()},
    }


def over_professions(array: Floats, precision: float, trials: int, seed: int) -> dict[str, Any]:
    """The crossed interval where drawing stopped: normal values of the pool's spreads.

    Professions are random, as the interval assumes, and half of a picture's variance is its seed's.
    """
    rng = np.random.default_rng(seed)
    spreads = array[..., 0].std(axis=1).max(axis=1)  # [P]
    most = 2 * fixed_number(spreads, precision)
    hits: dict[str, list[Any]] = {"ragged": [], "all seeds": []}
    for trial in range(trials):
        level = 0.1 * rng.standard_normal((len(spreads), 1))
        shared = rng.standard_normal((1, most)) + rng.standard_normal((len(spreads), most))
        values = level + spreads[:, None] * shared / math.sqrt(2)
        counts = stop(values[..., None], precision).counts
        ragged = np.where(np.arange(most) < counts[:, None], values, np.nan)
        for name, matrix in (("ragged", ragged), ("all seeds", values)):
            figure = crossed_mean_interval(
                np.clip(matrix, -1, 1), lowest=-1.0, resamples=400, seed=trial
            )
            hits[name].append((figure.low or 0.0) <= 0.0 <= (figure.high or 0.0))
    return {
        "precision": precision,
        "trials": trials,
        "covered": {name: rate(np.array(each)) for name, each in hits.items()},
    }


def real(folder: Path, precision: float, known: Values) -> dict[str, Any]:
    """One audit with a precision, and its values beside the pool's of the same pictures."""
    began = time.perf_counter()
    result = run_audit(plan_of(precision=precision), folder / f"audit-{precision:g}")
    apart = [
        abs(one - other)
        for key, own in values_of(result).items()
        for seed, values in own.items()
        if seed in known[key]
        for one, other in zip(values, known[key][seed], strict=True)
    ]
    return {
        "seconds_of_this_call": round(time.perf_counter() - began, 1),
        **(result.summary.precision or {}),
        "compared_with_the_pool": len(apart),
        "largest_difference": max(apart),
    }


def main() -> None:
    given = options(__doc__, "precision", blocks=3, trials=2000)
    torch.set_num_threads(1)
    array, known = pool(given.runs, given.blocks)
    spreads = np.round(array[..., 0].std(axis=1).max(axis=1), 4)
    record = {
        "growth": GROWTH,
        "pool_seeds": array.shape[1],
        "spread": dict(zip(plan_of().professions, spreads.tolist(), strict=True)),
        "trials": given.trials,
        "pool": [simulate_pool(array, h, given.trials // 4, 1) for h in PRECISIONS],
        "distributions": [
            simulate(name, h, given.trials, 2) for name in DISTRIBUTIONS for h in PRECISIONS
        ],
        "mean over professions": over_professions(array, 0.03, given.trials // 4, 3),
        "audit": real(given.runs, 0.02, known),
    }
    write(given.out, 1, record)


if __name__ == "__main__":
    main()
