"""Figures of an audit: every one with its n, its interval and the interval's method.

Which interval, and why (coverage of nominal 95 % intervals, simulated; `tests/test_statistics.py`
repeats the important rows):

* *Mean over the images of one profession*: Student's t. IoU is bounded and mildly skewed; at n = 8
  t covers 0.94 on Beta(8, 30), the bias-corrected accelerated bootstrap 0.89 and the percentile
  bootstrap 0.88; from n = 100 all three agree. On the strongly skewed Beta(1, 9) at n = 8, t falls
  to 0.91 (the bootstraps to 0.88): below ten images, read intervals of near-zero IoU with care.
* *Mean over professions*: the images of a profession are not independent, and image i of every
  profession starts from the same noise, so professions and seeds are crossed. Both are resampled
  (the pigeonhole bootstrap: Owen, "The pigeonhole bootstrap", Ann. Appl. Stat. 2007); the interval
  is the mean +- t x its standard error with min(professions, seeds) - 1 degrees of freedom. With
  20 professions, 8 seeds and seed effects as large as profession effects this covers 0.96;
  resampling professions and then the images within them covers 0.73. Where professions do not
  differ it is too wide, never too narrow.
* *As many images as needed* (``--precision``): mean +- the precision, the fixed-width interval of
  Chow and Robbins (1965); see `rounds`.
* *Shares*: Wilson's score interval.
* *Rank correlation over professions*: Fisher's z with Bonett and Wright's standard error for
  Spearman's coefficient (Psychometrika 2000). At 20 professions it covers 0.953 to 0.961 and the
  percentile bootstrap 0.939 to 0.969 (rho 0, 0.5, 0.8); it needs no resampling, so it is taken.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000

FIXED_WIDTH = "fixed width after sequential sampling (Chow and Robbins 1965)"
"""Method of an interval whose number of images its own width decided."""

NOT_REACHED = "sequential sampling (Chow and Robbins 1965), the precision was not reached"
"""Method of one for which drawing ended before."""

ALIKE = 1e-3  # values within so much of each other are one value, as reports show it
_NO_SPREAD = 1e-12  # standard errors below it are those of values that do not vary


@dataclass(frozen=True)
class Figure:
    """One number of a report.

    Attributes:
        value: the estimate; ``None`` where nothing was measured.
        low: lower end of the interval; ``None`` where the data carry none.
        high: upper end of the interval; ``None`` where the data carry none.
        n: number of units behind ``value`` (images; professions for a figure over professions).
        confidence: nominal coverage of the interval.
        method: how the interval was made, or why there is none.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    confidence: float
    method: str

    def to_dict(self) -> dict[str, Any]:
        """The figure as plain values for JSON."""
        return asdict(self)

    def scaled(self, factor: float, shift: float) -> Figure:
        """The figure of ``factor * x + shift``; exact, because the mean is linear.

        Args:
            factor: a positive number.
            shift: added after the multiplication.
        """

        def move(x: float | None) -> float | None:
            return None if x is None else factor * x + shift

        return Figure(
            move(self.value), move(self.low), move(self.high), self.n, self.confidence, self.method
        )


def mean_interval(
    values: Sequence[float] | FloatArray,
    confidence: float = CONFIDENCE,
    *,
    lowest: float = 0.0,
    precision: float | None = None,
) -> Figure:
    """Mean of independent measurements with Student's t interval, cut to the possible values.

    Args:
        values: ``[n]`` measurements in [lowest, 1], for example the IoU of the images of a
            profession, or, with ``lowest=-1``, the differences between two conditions.
        confidence: nominal coverage, between 0 and 1.
        lowest: the smallest possible value.
        precision: half-width at which drawing stopped (`rounds`), or would have. The 95 % interval
            is then mean +- that, or +- `half_width` where it is more: what holds where the number
            of images was not fixed. One of another confidence is wider or narrower in the ratio of
            Student's quantiles.

    Returns:
        A figure without interval for n < 2 and for values that are alike, to 0.001: neither says
        anything about the spread. (With a precision, values that are alike have an interval.)

    Raises:
        ValueError: a value is not finite, or outside [lowest, 1].

    Example:
        >>> figure = mean_interval([0.2, 0.3, 0.4])
        >>> round(figure.value, 3), round(figure.low, 3), round(figure.high, 3), figure.n
        (0.3, 0.052, 0.548, 3)
    """
    x = _checked(np.asarray(values, dtype=np.float64), lowest)
    n = int(x.size)
    if n == 0:
        return Figure(None, None, None, 0, confidence, "nothing was measured")
    mean = float(x.mean())
    if n == 1:
        return Figure(mean, None, None, 1, confidence, "no interval from one image")
    error = standard_error(x, precision)
    if error is None:
        return Figure(mean, None, None, n, confidence, "no interval: the values are alike")
    reach = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    low, high = max(lowest, mean - reach), min(1.0, mean + reach)
    method = "Student t over images"
    if precision is not None:
        narrow = (half_width(x) or math.inf) <= precision
        method = FIXED_WIDTH if narrow else NOT_REACHED
    return Figure(mean, low, high, n, confidence, method)


def half_width(values: Sequence[float] | FloatArray) -> float | None:
    """Half-width of the 95 % interval of a mean whose number of values its own width decides.

    ``t * sqrt((s ** 2 + 1 / (4 n)) / n)``, t of n - 1 degrees of freedom. Chow and Robbins (1965)
    add ``1 / n`` to the variance, so that drawing does not stop on a spread that is small by
    accident; here it is the largest variance that values in [0, 1] can have, 1 / 4, over n.

    Args:
        values: ``[n]`` in [0, 1].

    Returns:
        ``None`` for n < 2. ``3 / n`` for values that are alike, to 0.001: the rule of three (Hanley
        and Lippman-Hand, JAMA 1983). Where none of n values is another one, the share of such is
        below ``3 / n`` with confidence 0.95, and they move the mean by no more than that.

    Example:
        >>> round(half_width([0.2, 0.4] * 20), 3), half_width([0.0] * 100)
        (0.041, 0.03)
    """
    x = np.asarray(values, dtype=np.float64)
    n = int(x.size)
    if n < 2:
        return None
    if float(np.ptp(x)) <= ALIKE:
        return 3 / n
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))
    return reach * math.sqrt((float(x.var(ddof=1)) + 0.25 / n) / n)


def images_for(spread: float, precision: float) -> int:
    """Smallest fixed number of images whose Student's 95 % half-width is within a precision.

    Args:
        spread: standard deviation of the values, taken for the true one; 0 for values that are
            alike, which need ``3 / precision`` images (`half_width`).
        precision: the half-width, above 0.

    Example:
        >>> images_for(0.1, 0.02), images_for(0.0, 0.02)
        (99, 150)
    """
    if spread == 0:
        return math.ceil(3 / precision)
    n = max(2, math.ceil((float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * spread / precision) ** 2))
    while float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * spread / math.sqrt(n) > precision:
        n += 1
    return n


def standard_error(
    values: Sequence[float] | FloatArray, precision: float | None = None
) -> float | None:
    """Standard error of a mean; with a precision, that whose 95 % interval `mean_interval` shows.

    Args:
        values: ``[n]``.
        precision: half-width at which drawing stopped; ``None`` where the number was fixed.

    Returns:
        ``None`` below two values and, without a precision, for values that are alike, to 0.001:
        six overlaps of which one is 0.0003 and the others 0 do not tell the mean to so much.
    """
    x = np.asarray(values, dtype=np.float64)
    n = int(x.size)
    if n < 2:
        return None
    if precision is None:
        return None if float(np.ptp(x)) <= ALIKE else float(x.std(ddof=1)) / math.sqrt(n)
    shown = max(half_width(x) or 0.0, precision)
    return shown / float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))


def crossed_mean_interval(
    values: FloatArray,
    confidence: float = CONFIDENCE,
    *,
    lowest: float = 0.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Figure:
    """Mean of the professions' means; professions and seeds resampled (pigeonhole bootstrap).

    Args:
        values: ``[professions, seeds]`` in [lowest, 1]; NaN where an image was not measured.
        confidence: nominal coverage.
        lowest: the smallest possible value: 0, or -1 for differences between two conditions.
        resamples: bootstrap resamples.
        seed: of the bootstrap's own random numbers.

    Returns:
        A figure whose ``n`` counts professions; without interval below two professions or seeds.

    Raises:
        ValueError: ``values`` has not two dimensions.
    """
    if values.ndim != 2:
        raise ValueError(f"`values` must be [professions, seeds], got {list(values.shape)}")
    kept = values[np.isfinite(values).any(axis=1)]  # [K, S]
    kept = kept[:, np.isfinite(kept).any(axis=0)]
    count, seeds = kept.shape
    if count == 0:
        return Figure(None, None, None, 0, confidence, "nothing was measured")
    mean = float(np.nanmean(kept, axis=1).mean())
    if min(count, seeds) < 2:
        method = "no interval from fewer than two professions or seeds"
        return Figure(mean, None, None, count, confidence, method)
    rng = np.random.default_rng(seed)
    means = _resampled_means(kept, rng, resamples)  # [R, K]
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)  # [R, K]
    drawn = np.where(np.isfinite(means), drawn, 0)
    total = drawn.sum(axis=1)
    boot = (drawn * np.nan_to_num(means)).sum(axis=1)[total > 0] / total[total > 0]
    error = float(boot.std(ddof=1))
    if error <= _NO_SPREAD:
        return Figure(mean, None, None, count, confidence, "no interval: the values do not vary")
    reach = float(stats.t.ppf(0.5 + confidence / 2, min(count, seeds) - 1)) * error
    low, high = max(lowest, mean - reach), min(1.0, mean + reach)
    method = "pigeonhole bootstrap over professions and seeds, t reach"
    return Figure(mean, low, high, count, confidence, method)


def share_interval(count: int, n: int, confidence: float = CONFIDENCE) -> Figure:
    """A share with Wilson's score interval.

    Args:
        count: pictures with the label, 0 <= count <= n.
        n: pictures in all.
        confidence: nominal coverage.

    Raises:
        ValueError: ``count`` is negative or larger than ``n``.

    Example:
        >>> figure = share_interval(8, 10)
        >>> figure.value, round(figure.low, 3), round(figure.high, 3)
        (0.8, 0.49, 0.943)
    """
    if not 0 <= count <= n:
        raise ValueError(f"`count` must lie between 0 and n = {n}, got {count}")
    if n == 0:
        return Figure(None, None, None, 0, confidence, "no picture was read")
    ends = stats.binomtest(count, n).proportion_ci(confidence, method="wilson")
    low, high = max(0.0, float(ends.low)), min(1.0, float(ends.high))
    return Figure(count / n, low, high, n, confidence, "Wilson score")


def rank_correlation(
    measured: Sequence[float] | FloatArray,
    planted: Sequence[float] | FloatArray,
    confidence: float = CONFIDENCE,
) -> Figure:
    """Spearman's coefficient over professions with Bonett and Wright's interval.

    Args:
        measured: ``[K]`` a figure of each profession, for example its mean IoU.
        planted: ``[K]`` the same professions' known values.
        confidence: nominal coverage.

    Returns:
        A figure without interval below five professions and for a coefficient of 1 or -1, of which
        Fisher's z is infinite, and without value where either side does not vary.

    Raises:
        ValueError: the two differ in length.
    """
    x, y = np.asarray(measured, dtype=np.float64), np.asarray(planted, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(
            f"`measured` and `planted` must both be [K], got {list(x.shape)} and {list(y.shape)}"
        )
    n = int(x.size)
    if n < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Figure(None, None, None, n, confidence, "no rank correlation: no variation")
    rho = float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
    if n < 5:
        return Figure(rho, None, None, n, confidence, "no interval below five professions")
    if abs(rho) > 1 - 1e-9:
        return Figure(rho, None, None, n, confidence, "no interval: the coefficient is 1 or -1")
    z = math.atanh(rho)
    reach = float(stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    method = "Spearman, Fisher z with Bonett-Wright standard error, over professions"
    return Figure(rho, math.tanh(z - reach), math.tanh(z + reach), n, confidence, method)


def stable_seed(*parts: object) -> int:
    """A seed for the bootstrap that depends on what is estimated and on nothing else."""
    return zlib.crc32("\x1f".join(map(str, parts)).encode())


def _checked(x: FloatArray, lowest: float) -> FloatArray:
    if x.size and not (np.isfinite(x).all() and x.min() >= lowest and x.max() <= 1):
        raise ValueError(
            f"`values` must be finite and lie in [{lowest:g}, 1], got "
            f"{int((~np.isfinite(x)).sum())} non-finite values and the range {np.nanmin(x)} to "
            f"{np.nanmax(x)}"
        )
    return x


def _resampled_means(
    values: FloatArray, rng: np.random.Generator, resamples: int
) -> FloatArray:  # [R, K]
    """Profession means over resampled seeds, the same seeds for every profession."""
    seeds = values.shape[1]
    present = np.isfinite(values)
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)  # [R, S]
    sums = weights @ np.where(present, values, 0.0).T  # [R, K]
    counts = weights @ present.T.astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0: none of the profession's seeds was drawn
        means: FloatArray = sums / counts
    return means
