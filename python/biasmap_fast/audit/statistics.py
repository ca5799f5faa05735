"""Intervals, tests and the seed-shuffled null of a report's figures.

Coverage of nominal 95 % intervals is simulated in `tests/audit/test_statistics.py`:

* *Mean over the pictures of one profession*: Student's t. At n = 8 it covers 0.94 on Beta(8, 30)
  and 0.91 on the skewed Beta(1, 9), more than either bootstrap.
* *Mean over professions*: picture i of every profession starts from the same noise, so professions
  and seeds are crossed, and both are resampled (pigeonhole bootstrap; Owen, Ann. Appl. Stat. 2007):
  mean +- t times its standard error, min(professions, seeds) - 1 degrees of freedom. It speaks
  about professions like these. Its test flips the signs of whole seeds: it speaks about these
  professions.
* *As many pictures as needed* (``--precision``): mean +- the precision, the fixed-width interval of
  Chow and Robbins (1965).
* *Paired differences* (two conditions, a pair and its control): sign-flip permutation test (Fisher
  1935), exact up to 13 seeds, else 9999 random signs and p = (1 + hits) / (1 + tries), which is
  never 0 (Phipson and Smyth 2010).
* *Shares*: Wilson's score interval. *Their differences*: Newcombe's paired method 10 (1998),
  McNemar's exact test.
* *Rank correlation*: Fisher's z with Bonett and Wright's standard error (Psychometrika 2000).
* *Many tests*: Holm's step-down (1979).
* *Seed-shuffled null*: the profession's mask of seed i over the word's mask of every other seed j:
  the overlap of layout, smoothness and the centred face alone. It is shown and never subtracted:
  if layouts barely move, the signal itself is in it.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float64]
    Values = Sequence[float] | FloatArray

CONFIDENCE = 0.95
RESAMPLES = 2000
PERMUTATIONS = 1999
FLIPS = 9999  # random sign patterns, if there are too many to try all
# methods of an interval whose own width decided the number of pictures
FIXED_WIDTH = "fixed width after sequential sampling (Chow and Robbins 1965)"
NOT_REACHED = "sequential sampling (Chow and Robbins 1965), the precision was not reached"

ALIKE = 1e-3  # values within this range count as one value, as reports show it
_NO_SPREAD = 1e-12  # standard errors below it are those of values that do not vary
_ROUNDING = 1e-6  # of the largest difference: overlaps are measured in float32
_EXACT = 13  # differences up to which all 2 ** n sign patterns are tried


@dataclass(frozen=True)
class Figure:
    """One number of a report with its 95 % interval; ``None`` for what the data do not carry.

    ``n`` counts pictures, or professions for a figure over professions; ``method`` says how the
    interval was made, or why there is none.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the figure as plain values for JSON."""
        return asdict(self)

    def scaled(self, factor: float, shift: float) -> Figure:
        """Returns the figure of ``factor * x + shift``, ``factor`` positive."""
        ends = (self.value, self.low, self.high)
        value, low, high = (None if x is None else factor * x + shift for x in ends)
        return Figure(value, low, high, self.n, self.method)


def _t(degrees: int) -> float:
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, degrees))


def mean_interval(values: Values, *, lowest: float = 0.0, precision: float | None = None) -> Figure:
    """Mean of independent measurements with Student's t interval, cut to the possible values.

    With a precision, at whose half-width drawing stopped, it is mean +- that, or +- `half_width` if
    that is more. No interval for n < 2, and without a precision for values alike to 0.001.

    Raises:
        ValueError: A value is not finite, or outside [lowest, 1].
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size and not (np.isfinite(x).all() and x.min() >= lowest and x.max() <= 1):
        raise ValueError(
            f"`values` must be finite and lie in [{lowest:g}, 1], got "
            f"{int((~np.isfinite(x)).sum())} non-finite values and the range {np.nanmin(x)} to "
            f"{np.nanmax(x)}"
        )
    n = int(x.size)
    if n == 0:
        return Figure(None, None, None, 0, "nothing was measured")
    mean = float(x.mean())
    if n == 1:
        return Figure(mean, None, None, 1, "no interval from one picture")
    error = standard_error(x, precision)
    if error is None:
        return Figure(mean, None, None, n, "no interval: the values are alike")
    reach = _t(n - 1) * error
    method = "Student t over pictures"
    if precision is not None:
        narrow = (half_width(x) or math.inf) <= precision
        method = FIXED_WIDTH if narrow else NOT_REACHED
    return Figure(mean, max(lowest, mean - reach), min(1.0, mean + reach), n, method)


def half_width(values: Values) -> float | None:
    """Half-width of the 95 % interval of a mean whose number of values its own width decides.

    ``t * sqrt((s ** 2 + 1 / (4 n)) / n)``. Chow and Robbins (1965) add ``1 / n`` to the variance,
    so that drawing does not stop on a spread that is small by accident; here it is the largest
    variance of values in [0, 1], 1 / 4, over n.
    Values alike to 0.001: ``3 / n``, the rule of three (Hanley and Lippman-Hand, JAMA 1983).
    """
    x = np.asarray(values, dtype=np.float64)
    n = int(x.size)
    if n < 2:
        return None
    if float(np.ptp(x)) <= ALIKE:
        return 3 / n
    return _t(n - 1) * math.sqrt((float(x.var(ddof=1)) + 0.25 / n) / n)


def images_for(spread: float, precision: float) -> int:
    """Smallest fixed number of pictures whose Student's 95 % half-width is within a precision.

    ``spread`` is the values' standard deviation; 0 if they are alike (`half_width`).
    """
    if spread == 0:
        return math.ceil(3 / precision)
    n = max(2, math.ceil((float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * spread / precision) ** 2))
    while _t(n - 1) * spread / math.sqrt(n) > precision:
        n += 1
    return n


def standard_error(values: Values, precision: float | None = None) -> float | None:
    """Standard error behind `mean_interval`; ``None`` if that has no interval."""
    x = np.asarray(values, dtype=np.float64)
    n = int(x.size)
    if n < 2:
        return None
    if precision is None:
        return None if float(np.ptp(x)) <= ALIKE else float(x.std(ddof=1)) / math.sqrt(n)
    return max(half_width(x) or 0.0, precision) / _t(n - 1)


def crossed_mean_interval(
    values: FloatArray, *, lowest: float = 0.0, resamples: int = RESAMPLES, seed: int = 0
) -> Figure:
    """Mean of the professions' means; professions and seeds resampled (pigeonhole bootstrap).

    Args:
        values: ``[professions, seeds]`` in [lowest, 1]; NaN for a picture that was not measured.
        lowest: Smallest possible value: 0 for overlaps, -1 for differences.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap's random numbers.
    """
    kept = _two_dimensions(values)
    kept = kept[np.isfinite(kept).any(axis=1)]  # [K, S]
    kept = kept[:, np.isfinite(kept).any(axis=0)]
    count, seeds = kept.shape
    if count == 0:
        return Figure(None, None, None, 0, "nothing was measured")
    mean = float(np.nanmean(kept, axis=1).mean())
    if min(count, seeds) < 2:
        method = "no interval from fewer than two professions or seeds"
        return Figure(mean, None, None, count, method)
    rng = np.random.default_rng(seed)
    present = np.isfinite(kept)
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)  # [R, S]
    sums = weights @ np.where(present, kept, 0.0).T  # [R, K]
    with np.errstate(invalid="ignore"):  # 0 / 0: none of the profession's seeds was drawn
        means = sums / (weights @ present.T.astype(np.float64))
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)  # [R, K]
    drawn = np.where(np.isfinite(means), drawn, 0)
    total = drawn.sum(axis=1)
    boot = (drawn * np.nan_to_num(means)).sum(axis=1)[total > 0] / total[total > 0]
    error = float(boot.std(ddof=1))
    if error <= _NO_SPREAD:
        return Figure(mean, None, None, count, "no interval: the values do not vary")
    reach = _t(min(count, seeds) - 1) * error
    method = "pigeonhole bootstrap over professions and seeds, t reach"
    return Figure(mean, max(lowest, mean - reach), min(1.0, mean + reach), count, method)


def share_interval(count: int, n: int) -> Figure:
    """Share of ``count`` in ``n`` pictures with Wilson's score interval."""
    if not 0 <= count <= n:
        raise ValueError(f"`count` must lie between 0 and n = {n}, got {count}")
    if n == 0:
        return Figure(None, None, None, 0, "no picture was read")
    ends = stats.binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    low, high = max(0.0, float(ends.low)), min(1.0, float(ends.high))
    return Figure(count / n, low, high, n, "Wilson score")


def share_difference(pairs: Sequence[tuple[bool, bool]]) -> Figure:
    """Difference of a share between two conditions on the same seeds, Newcombe's paired interval.

    Newcombe, Statistics in Medicine 17 (1998), method 10: Wilson's ends of both shares, joined with
    the correlation of the pairs (corrected for continuity).

    ``pairs`` say for each seed whether the picture has the label in the baseline, and in the
    condition; the figure is the condition's share minus the baseline's.
    """
    n = len(pairs)
    if n == 0:
        return Figure(None, None, None, 0, "no picture was read in both conditions")
    both = sum(a and b for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    won = sum(b and not a for a, b in pairs)
    neither = n - both - lost - won
    after, before = share_interval(both + won, n), share_interval(both + lost, n)
    product = math.sqrt(float((both + lost) * (won + neither) * (both + won) * (lost + neither)))
    phi = 0.0
    if product > 0:
        raw = both * neither - lost * won
        phi = (max(raw - n / 2, 0.0) if raw > 0 else raw) / product

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * phi * a * b + b**2))

    (va, la, ua), (vb, lb, ub) = (
        (f.value or 0.0, f.low or 0.0, f.high or 0.0) for f in (after, before)
    )
    low, high = va - vb - reach(va - la, ub - vb), va - vb + reach(ua - va, vb - lb)
    return Figure(va - vb, max(-1.0, low), min(1.0, high), n, "Newcombe's paired method 10")


def mcnemar_test(pairs: Sequence[tuple[bool, bool]]) -> float | None:
    """McNemar's exact two-sided p value; ``None`` if no pair differs."""
    lost = sum(a and not b for a, b in pairs)
    won = sum(b and not a for a, b in pairs)
    return float(stats.binomtest(won, lost + won).pvalue) if lost + won else None


def rank_correlation(measured: Values, planted: Values) -> Figure:
    """Spearman's coefficient over professions with Bonett and Wright's interval.

    No interval below five professions and for a coefficient of 1 or -1, for which Fisher's z is
    infinite; no value if one side does not vary.
    """
    x, y = np.asarray(measured, dtype=np.float64), np.asarray(planted, dtype=np.float64)
    n = int(x.size)
    if n < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Figure(None, None, None, n, "no rank correlation: no variation")
    rho = float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
    if n < 5:
        return Figure(rho, None, None, n, "no interval below five professions")
    if abs(rho) > 1 - 1e-9:
        return Figure(rho, None, None, n, "no interval: the coefficient is 1 or -1")
    z = math.atanh(rho)
    reach = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    method = "Spearman, Fisher z with Bonett-Wright standard error, over professions"
    return Figure(rho, math.tanh(z - reach), math.tanh(z + reach), n, method)


def sign_flip_test(differences: Values) -> float | None:
    """Two-sided p value of the sign-flip permutation test of paired differences.

    ``None`` below two differences or if all are 0; NaN does not count. scipy's ``permutation_test``
    gives the same exact p value, but draws random signs in a Python loop, too slow for a report.
    """
    x = np.asarray(differences, dtype=np.float64)
    x = x[np.isfinite(x)]
    if x.size < 2 or not np.any(x):
        return None
    n = int(x.size)
    signs = _all_signs(n) if n <= _EXACT else _random_signs(n)  # [R, n]
    # sums that differ by less than the rounding of float32 are a tie
    least = abs(float(x.sum())) - _ROUNDING * float(np.abs(x).max())
    hits = int((np.abs(signs @ x) >= least).sum())
    return hits / len(signs) if n <= _EXACT else (1 + hits) / (1 + len(signs))


def crossed_sign_flip_test(differences: FloatArray) -> float | None:
    """`sign_flip_test` over seeds of the mean of ``[professions, seeds]`` over professions."""
    x = _two_dimensions(differences)
    present = np.isfinite(x)
    shares = np.where(present, x, 0.0) / np.maximum(present.sum(axis=1, keepdims=True), 1)
    return sign_flip_test(shares.sum(axis=0)[present.any(axis=0)])


def chance_test(values: Values, chance: Any, precision: float | None = None) -> float | None:
    """Two-sided p value of Student's t test of ``mean = chance``; ``None`` without a spread.

    With a precision, p is below 0.05 if `mean_interval`'s interval leaves ``chance``.
    """
    x = np.asarray(values, dtype=np.float64) - chance
    error = standard_error(x, precision)
    return (
        None if error is None else float(2 * stats.t.sf(abs(float(x.mean())) / error, x.size - 1))
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p values; ``None`` stays and does not count."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted


def cross_iou(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> FloatArray:
    """IoU ``[S, S]`` of every mask of ``a`` ``[S, N]`` with every mask of ``b``."""
    # exact: counts of pixels are below 2 ** 24
    inter = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float64)
    union = a.sum(axis=1)[:, None] + b.sum(axis=1)[None] - inter
    iou: FloatArray = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    return iou


def shuffled(matrix: FloatArray, seed: int = 0) -> tuple[Figure, Figure, float | None, FloatArray]:
    """The seed-shuffled null of one profession and word.

    The difference from it is a U-statistic of degree two; its interval is the jackknife's (Arvesen
    1969). The p value is one-sided (more overlap in the same picture): the word's masks are
    permuted among the seeds.

    Args:
        matrix: ``[S, S]`` of `cross_iou`: profession masks down, the word's masks across.
        seed: Seed of the permutations.

    Returns:
        The null's mean, the difference from it, its p value, and the jackknife's pseudo-values
        ``[S]``, whose mean is the difference.
    """
    n = matrix.shape[0]
    if n < 3:
        none = Figure(None, None, None, n, "no seed-shuffled null below three pictures")
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
    figure = Figure(difference, None, None, n, "no interval: no spread")
    p = None
    if error > _NO_SPREAD:
        reach = _t(n - 1) * error
        low, high = max(-1.0, difference - reach), min(1.0, difference + reach)
        figure = Figure(difference, low, high, n, "jackknife over seeds, Student t")
        rng = np.random.default_rng(seed)
        orders = rng.permuted(np.tile(np.arange(n), (PERMUTATIONS, 1)), axis=1)  # [R, S]
        traces = matrix[np.arange(n), orders].sum(axis=1)
        p = float((1 + (traces >= trace - 1e-9).sum()) / (1 + PERMUTATIONS))
    return Figure(apart, None, None, n * (n - 1), "mean over all pairs of seeds"), figure, p, pseudo


def stable_seed(*parts: object) -> int:
    """A seed for random numbers that depends on what is estimated and on nothing else."""
    return zlib.crc32("\x1f".join(map(str, parts)).encode())


def _two_dimensions(values: FloatArray) -> FloatArray:
    if values.ndim != 2:
        raise ValueError(f"`values` must be [professions, seeds], got {list(values.shape)}")
    return values


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
