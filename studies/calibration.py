"""Calibration of the audit's tests and intervals on simulated data, at length.

    python -m studies.calibration              # about 5 minutes on one idle core

Writes studies/results/calibration.json: every row with its nominal level, its rate, and
the simulation's own standard error. The tests repeat the important rows in short.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from biasmap_fast.audit.statistics import (
    chance_test,
    cross_iou,
    crossed_mean_interval,
    crossed_sign_flip_test,
    holm,
    mean_interval,
    share_difference,
    share_interval,
    shuffled,
    sign_flip_test,
)

from .common import options, write


def holds(figure: Any, truth: float) -> bool:
    """Whether an interval holds the truth; none at all does not."""
    return figure.low is not None and bool(figure.low <= truth <= figure.high)


def rejected(p: float | None) -> bool:
    return p is not None and p <= 0.05


def crossed(rng: np.random.Generator, seeds: int, seed_spread: float) -> Any:
    return (
        0.06 * rng.standard_normal((20, 1))
        + seed_spread * rng.standard_normal((1, seeds))
        + 0.06 * rng.standard_normal((20, seeds))
    )


def masks(rng: np.random.Generator, count: int, common: float) -> Any:
    """Two sets of top-30 % masks of smooth maps on 16 x 16, ``common`` of them shared."""
    shared = gaussian_filter(rng.standard_normal((count, 16, 16)), (0, 2, 2))
    sets = []
    for _ in range(2):
        own = gaussian_filter(rng.standard_normal((count, 16, 16)), (0, 2, 2))
        values = (common * shared + (1 - common) * own).reshape(count, -1)
        sets.append(values > np.percentile(values, 70, axis=1, keepdims=True))
    return cross_iou(*sets)


def paired_labels(rng: np.random.Generator, n: int) -> list[tuple[bool, bool]]:
    """Labels of the same seeds under two conditions; share 0.3 in either, correlated."""
    before = rng.random(n) < 0.3
    after = np.where(rng.random(n) < 0.6, before, rng.random(n) < 0.3)
    return list(zip(before.tolist(), after.tolist(), strict=True))


Trial = Callable[[np.random.Generator], bool]


def of_means(n: int, a: int, b: int) -> dict[str, tuple[float | None, Trial]]:
    """Name -> nominal rate and a simulated trial, of n images with values from Beta(a, b)."""
    mean, what = a / (a + b), f"Beta({a}, {b}), {n} images"
    return {
        f"Student t interval of mean IoU covers, {what}": (
            0.95, lambda rng: holds(mean_interval(rng.beta(a, b, n)), mean),
        ),
        f"t test against chance rejects a true chance, {what}": (
            0.05, lambda rng: rejected(chance_test(rng.beta(a, b, n), mean)),
        ),
    }  # fmt: skip


def of_seeds(n: int) -> dict[str, tuple[float | None, Trial]]:
    """The same of n seeds, for differences, means over professions, shares and masks."""

    def flipped(rng: np.random.Generator) -> float | None:
        return sign_flip_test(rng.beta(8, 30, n) - rng.beta(8, 30, n))

    def shared(rng: np.random.Generator) -> Any:
        return 0.06 * rng.standard_normal((1, n)) + 0.06 * rng.standard_normal((20, n))

    def covered(spread: float) -> Trial:
        return lambda rng: holds(
            crossed_mean_interval(crossed(rng, n, spread), lowest=-1.0, resamples=400), 0.0
        )

    return {
        f"sign-flip test rejects no effect, {n} seeds": (
            0.05, lambda rng: rejected(flipped(rng)),
        ),
        f"some of 20 professions without effect is left by Holm, {n} seeds": (
            0.05, lambda rng: any(map(rejected, holm([flipped(rng) for _ in range(20)]))),
        ),
        f"sign-flip test over whole seeds rejects no effect, seeds shared, {n} seeds": (
            0.05, lambda rng: rejected(crossed_sign_flip_test(shared(rng))),
        ),
        f"mean over professions covers, seed effects 0, {n} seeds": (0.95, covered(0.0)),
        f"mean over professions covers, seed effects 0.06, {n} seeds": (0.95, covered(0.06)),
        f"Wilson interval covers a share of 0.2, {n} pictures": (
            0.95, lambda rng: holds(share_interval(int(rng.binomial(n, 0.2)), n), 0.2),
        ),
        f"Newcombe's paired interval covers no difference, {n} seeds": (
            0.95, lambda rng: holds(share_difference(paired_labels(rng, n)), 0.0),
        ),
        f"jackknife of the seed-shuffled difference covers 0, unrelated masks, {n} seeds": (
            0.95, lambda rng: holds(shuffled(masks(rng, n, 0.0))[1], 0.0),
        ),
        f"permutation test of the seed-shuffled null rejects unrelated masks, {n} seeds": (
            0.05, lambda rng: rejected(shuffled(masks(rng, n, 0.0))[2]),
        ),
        f"the same with related masks (power, no nominal rate), {n} seeds": (
            None, lambda rng: rejected(shuffled(masks(rng, n, 0.5))[2]),
        ),
    }  # fmt: skip


def main() -> None:
    given = options(__doc__, "calibration", trials=2000)
    trials: dict[str, tuple[float | None, Trial]] = {}
    for n, (a, b) in itertools.product((5, 8, 20, 100), ((8, 30), (1, 9))):
        trials |= of_means(n, a, b)
    rows = []
    for number, (name, (nominal, trial)) in enumerate(
        (trials | of_seeds(8) | of_seeds(20)).items()
    ):
        rng = np.random.default_rng([number, 20])
        rate = float(np.mean([trial(rng) for _ in range(given.trials)]))
        error = (rate * (1 - rate) / given.trials) ** 0.5
        rows.append({"name": name, "nominal": nominal, "rate": rate, "standard_error": error})
        print(f"{name}: {rate:.3f} +- {error:.3f} (nominal {nominal})", flush=True)
    write(given.out, 1, {"trials": given.trials, "rows": rows})


if __name__ == "__main__":
    main()
