"""Tests, corrections and effect sizes: what is said beside the intervals of `statistics`.

* *Difference between two conditions, or between a pair and its control*: the same pictures' seeds
  are paired, so the sign-flip permutation test (Fisher 1935): under
  the hypothesis that the two labels of a seed can be exchanged, every sign of its difference is as
  likely as the other. Exact where all signs can be tried (13 seeds and fewer), else 9999 random
  ones, and then p = (1 + hits) / (1 + tries), which is never 0 (Phipson and Smyth 2010).
* *Mean over professions*: image i of every profession starts from the same noise, so professions
  are not independent draws. Whole seeds are flipped: the difference of seed s is its mean over
  professions. The test speaks about these professions; the interval (pigeonhole bootstrap) about
  professions like these.
* *IoU against the chance level*: Student's t, the test that belongs to the interval shown.
* *Many professions*: Holm's step-down (1979) for the chance of any false claim, Benjamini and
  Hochberg (1995) for the part of claims that are false. The family is all professions and words
  of one condition and percentile.
* *Effect size of a paired difference*: Hedges' g_z, the mean difference over the standard deviation
  of the differences, times the small-sample factor (Hedges 1981; Lakens 2013, for paired designs).
  Paired, because the question is how surely a condition moves the overlap of one and the same seed;
  against chance the corrected IoU is itself an effect size, and is shown instead.
* *Shares*: the Risk Difference, with Newcombe's intervals: paired (1998b, method 10) where both
  conditions drew the same seeds, and McNemar's exact test for its p value.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from .statistics import CONFIDENCE, Figure, stable_seed, standard_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .statistics import FloatArray

FLIPS = 9999
"""Random sign patterns where there are too many to try all."""

_ROUNDING = 1e-6  # of the largest difference
_EXACT = 13  # differences up to which all 2 ** n patterns are tried


def sign_flip_test(differences: Sequence[float] | FloatArray) -> float | None:
    """Two-sided p value of the sign-flip permutation test of paired differences.

    Args:
        differences: ``[n]``, one a seed; NaN where a side was not measured.

    Returns:
        The p value, or ``None`` below two differences or where all of them are 0. It cannot be
        below ``2 ** (1 - n)``. scipy's ``permutation_test`` gives the same exact p value, but draws
        random signs in a Python loop, too slow for the hundreds of tests of a report.

    Example:
        >>> sign_flip_test([0.1, 0.2, 0.1, 0.3, 0.2, 0.1])
        0.03125
    """
    x = np.asarray(differences, dtype=np.float64)
    x = x[np.isfinite(x)]
    if x.size < 2 or not np.any(x):
        return None
    n = int(x.size)
    signs = _all_signs(n) if n <= _EXACT else _random_signs(n)  # [R, n]
    # Overlaps are measured in float32: sums that differ by less than its rounding are a tie.
    least = abs(float(x.sum())) - _ROUNDING * float(np.abs(x).max())
    hits = int((np.abs(signs @ x) >= least).sum())
    return hits / len(signs) if n <= _EXACT else (1 + hits) / (1 + len(signs))


@cache
def _all_signs(n: int) -> FloatArray:
    bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
    signs: FloatArray = 1.0 - 2.0 * bits.astype(np.float64)
    return signs


@cache
def _random_signs(n: int) -> FloatArray:
    rng = np.random.default_rng(stable_seed("flip", n))
    signs: FloatArray = rng.choice([-1.0, 1.0], size=(FLIPS, n))
    return signs


def crossed_sign_flip_test(differences: FloatArray) -> float | None:
    """`sign_flip_test` over seeds of the mean over professions.

    Args:
        differences: ``[professions, seeds]``, NaN where nothing was measured. Every profession has
            the same weight, however many of the seeds it has.

    Returns:
        As `sign_flip_test`.

    Raises:
        ValueError: ``differences`` has not two dimensions.
    """
    if differences.ndim != 2:
        raise ValueError(
            f"`differences` must be [professions, seeds], got {list(differences.shape)}"
        )
    present = np.isfinite(differences)
    counts = present.sum(axis=1, keepdims=True)  # [professions, 1]
    shares = np.where(present, differences, 0.0) / np.maximum(counts, 1)
    return sign_flip_test(shares.sum(axis=0)[present.any(axis=0)])


def chance_test(
    values: Sequence[float] | FloatArray, chance: float, precision: float | None = None
) -> float | None:
    """Two-sided p value of Student's t test of ``mean = chance``; ``None`` without a spread.

    Args:
        values: ``[n]``.
        chance: the mean under the hypothesis.
        precision: as in `statistics.mean_interval`: p is below 0.05 where that interval, before it
            is cut, leaves ``chance``.

    Example:
        >>> round(chance_test([0.3, 0.35, 0.28, 0.31], 0.1765), 4)
        0.0028
    """
    x = np.asarray(values, dtype=np.float64)
    error = standard_error(x, precision)
    if error is None:
        return None
    return float(2 * stats.t.sf(abs(float(x.mean()) - chance) / error, x.size - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p values; ``None`` stays and does not count.

    Example:
        >>> holm([0.01, None, 0.04, 0.03])
        [0.03, None, 0.06, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted


def benjamini_hochberg(p_values: Sequence[float | None]) -> list[float | None]:
    """Benjamini and Hochberg's adjusted p values; ``None`` stays and does not count.

    Example:
        >>> [None if q is None else round(q, 3) for q in benjamini_hochberg([0.01, None, 0.04])]
        [0.02, None, 0.04]
    """
    kept = [p for p in p_values if p is not None]
    if not kept:
        return list(p_values)
    found = iter(stats.false_discovery_control(kept, method="bh").tolist())
    return [None if p is None else next(found) for p in p_values]


def hedges_g(differences: Sequence[float] | FloatArray, confidence: float = CONFIDENCE) -> Figure:
    """Standardised mean of paired differences, g_z, with a large-sample interval.

    ``g = J * mean / sd`` with ``J = 1 - 3 / (4 (n - 1) - 1)``, and the standard error
    ``sqrt(1 / n + g ** 2 / (2 n))``.

    Args:
        differences: ``[n]``, one a seed; NaN where a side was not measured.
        confidence: nominal coverage.

    Returns:
        A figure without value below three differences or without a spread.

    Example:
        >>> figure = hedges_g([0.1, 0.2, 0.1, 0.3, 0.2, 0.1])
        >>> round(figure.value, 2), figure.n
        (1.72, 6)
    """
    x = np.asarray(differences, dtype=np.float64)
    x = x[np.isfinite(x)]
    n = int(x.size)
    method = "Hedges' g_z, large-sample standard error"
    if n < 3 or float(x.std(ddof=1)) <= 1e-12:
        return Figure(None, None, None, n, confidence, "no effect size: too few, or no spread")
    g = (1 - 3 / (4 * (n - 1) - 1)) * float(x.mean() / x.std(ddof=1))
    reach = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * math.sqrt(1 / n + g**2 / (2 * n))
    return Figure(g, g - reach, g + reach, n, confidence, method)


def risk_difference(share: Figure) -> Figure:
    """Risk Difference of two words that shares of sum to 1: ``p1 - p2 = 2 p1 - 1``, Wilson's ends.

    Args:
        share: `statistics.share_interval` of the first word.

    Example:
        >>> from .statistics import share_interval
        >>> risk_difference(share_interval(8, 10)).value
        0.6000000000000001
    """
    moved = share.scaled(2.0, -1.0)
    method = "Wilson score, of 2 p - 1" if share.low is not None else share.method
    return Figure(moved.value, moved.low, moved.high, share.n, share.confidence, method)


def share_difference(pairs: Sequence[tuple[bool, bool]], confidence: float = CONFIDENCE) -> Figure:
    """Risk Difference between two conditions on the same seeds, with Newcombe's paired interval.

    Newcombe, "Improved confidence intervals for the difference between binomial proportions based
    on paired data", Statistics in Medicine 17 (1998), method 10: Wilson's ends of both shares,
    joined with the correlation of the pairs (corrected for continuity).

    Args:
        pairs: for each seed whether the picture has the label in the baseline, and in the
            condition.
        confidence: nominal coverage.

    Returns:
        Share in the condition minus share in the baseline.

    Example:
        >>> figure = share_difference([(True, False)] * 5 + [(True, True)] * 10)
        >>> round(figure.value, 3), figure.n
        (-0.333, 15)
    """
    n = len(pairs)
    if n == 0:
        return Figure(None, None, None, 0, confidence, "no picture was read in both conditions")
    both = sum(a and b for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    won = sum(b and not a for a, b in pairs)
    neither = n - both - lost - won
    before, after = (both + lost) / n, (both + won) / n
    ends = [
        stats.binomtest(count, n).proportion_ci(confidence, method="wilson")
        for count in (both + won, both + lost)
    ]
    product = math.sqrt(float((both + lost) * (won + neither) * (both + won) * (lost + neither)))
    phi = 0.0
    if product > 0:
        raw = both * neither - lost * won
        phi = (max(raw - n / 2, 0.0) if raw > 0 else raw) / product
    down_a, up_a = after - float(ends[0].low), float(ends[0].high) - after
    down_b, up_b = before - float(ends[1].low), float(ends[1].high) - before
    change = after - before
    low = change - math.sqrt(max(0.0, down_a**2 - 2 * phi * down_a * up_b + up_b**2))
    high = change + math.sqrt(max(0.0, up_a**2 - 2 * phi * up_a * down_b + down_b**2))
    return Figure(
        change, max(-1.0, low), min(1.0, high), n, confidence, "Newcombe's paired method 10"
    )


def mcnemar_test(pairs: Sequence[tuple[bool, bool]]) -> float | None:
    """McNemar's exact two-sided p value; ``None`` where no pair differs.

    Example:
        >>> mcnemar_test([(True, False)] * 6 + [(True, True)] * 10)
        0.03125
    """
    lost = sum(a and not b for a, b in pairs)
    won = sum(b and not a for a, b in pairs)
    return float(stats.binomtest(won, lost + won).pvalue) if lost + won else None
