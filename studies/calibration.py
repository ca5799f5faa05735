"""Calibration of the audit's tests and intervals on simulated data, at length.

    python -m studies.calibration              # about 5 minutes on one idle core

Writes studies/results/calibration.json: every row with its nominal level, its rate, and
the simulation's own standard error. The tests repeat the important rows in short.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def rows() -> Iterator[tuple[str, float, Any]]:
    """Name, nominal rate, one simulated trial."""
    for n in (5, 8, 20, 100):
        for a, b in ((8, 30), (1, 9)):
            yield (
                f"Student t interval of mean IoU covers, Beta({a}, {b}), {n} images",
                0.95,
                lambda rng, n=n, a=a, b=b: holds(mean_interval(rng.beta(a, b, n)), a / (a + b)),
            )
            yield (
                f"t test against chance rejects a true chance, Beta({a}, {b}), {n} images",
                0.05,
                lambda rng, n=n, a=a, b=b: rejected(chance_test(rng.beta(a, b, n), a / (a + b))),
            )
    for n in (8, 20):
        yield (
            f"sign-flip test rejects no effect, {n} seeds",
            0.05,
            lambda rng, n=n: rejected(sign_flip_test(rng.beta(8, 30, n) - rng.beta(8, 30, n))),
        )
        yield (
            f"some of 20 professions without effect is left by Holm, {n} seeds",
            0.05,
            lambda rng, n=n: any(
                rejected(p)
                for p in holm(
                    [sign_flip_test(rng.beta(8, 30, n) - rng.beta(8, 30, n)) for _ in range(20)]
                )
            ),
        )
        yield (
            f"sign-flip test over whole seeds rejects no effect, seeds shared, {n} seeds",
            0.05,
            lambda rng, n=n: rejected(
                crossed_sign_flip_test(
                    0.06 * rng.standard_normal((1, n)) + 0.06 * rng.standard_normal((20, n))
                )
            ),
        )
        for spread in (0.0, 0.06):
            yield (
                f"mean over professions covers, seed effects {spread:g}, {n} seeds",
                0.95,
                lambda rng, n=n, spread=spread: holds(
                    crossed_mean_interval(crossed(rng, n, spread), lowest=-1.0, resamples=400), 0.0
                ),
            )
        yield (
            f"Wilson interval covers a share of 0.2, {n} pictures",
            0.95,
            lambda rng, n=n: holds(share_interval(int(rng.binomial(n, 0.2)), n), 0.2),
        )
        yield (
            f"Newcombe's paired interval covers no difference, {n} seeds",
            0.95,
            lambda rng, n=n: holds(share_difference(paired_labels(rng, n)), 0.0),
        )
        yield (
            f"jackknife of the seed-shuffled difference covers 0, unrelated masks, {n} seeds",
            0.95,
            lambda rng, n=n: holds(shuffled(masks(rng, n, 0.0))[1], 0.0),
        )
        yield (
            f"permutation test of the seed-shuffled null rejects unrelated masks, {n} seeds",
            0.05,
            lambda rng, n=n: rejected(shuffled(masks(rng, n, 0.0))[2]),
        )
        yield (
            f"the same with related masks (power, no nominal rate), {n} seeds",
            float("nan"),
            lambda rng, n=n: rejected(shuffled(masks(rng, n, 0.5))[2]),
        )


def main() -> None:
    given = options(__doc__, "calibration", trials=2000)
    found = []
    for number, (name, nominal, draw) in enumerate(rows()):
        rng = np.random.default_rng([number, 20])
        rate = float(np.mean([draw(rng) for _ in range(given.trials)]))
        error = (rate * (1 - rate) / given.trials) ** 0.5
        known = None if np.isnan(nominal) else nominal
        found.append({"name": name, "nominal": known, "rate": rate, "standard_error": error})
        print(f"{name}: {rate:.3f} +- {error:.3f} (nominal {nominal:g})", flush=True)
    write(given.out, 1, {"trials": given.trials, "rows": found})


if __name__ == "__main__":
    main()
