"""Tests, corrections and nulls: against scipy and formulas, and against their own promise.

The calibrations here are short; `benchmarks/calibration.py` repeats them at length.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from biasmap_fast.audit.statistics import (
    chance_test,
    cross_iou,
    crossed_sign_flip_test,
    holm,
    mcnemar_test,
    share_difference,
    share_interval,
    shuffled,
    sign_flip_test,
)


def test_sign_flips_are_exact_for_few_seeds():
    x = np.array([0.1, -0.05, 0.2, 0.15, 0.02])
    signs = np.array(np.meshgrid(*[[1, -1]] * 5)).reshape(5, -1).T
    means = np.abs((signs * x).mean(axis=1))
    assert sign_flip_test(x) == pytest.approx(np.mean(means >= abs(x.mean()) - 1e-12))
    found = stats.permutation_test((x,), np.mean, permutation_type="samples", vectorized=True)
    assert sign_flip_test(x) == pytest.approx(found.pvalue)
    assert sign_flip_test([0.1, np.nan]) is None
    assert sign_flip_test([0.0, 0.0, 0.0]) is None


@pytest.mark.parametrize("rounding", [0.0, 3e-9, -3e-9])
def test_what_rounding_alone_tells_apart_is_a_tie(rounding):
    # 5 of 6 differences count: 2 ** -4, not the 2 ** -5 of six that do
    assert sign_flip_test([0.1, 0.2, 0.1, 0.3, 0.2, rounding]) == 0.0625


def test_a_sampled_p_value_is_never_zero_and_the_same_again():
    x = np.random.default_rng(0).normal(1.0, 0.1, 30)
    assert sign_flip_test(x) == sign_flip_test(x) == 1 / 10000


def test_flips_of_whole_seeds():
    x = np.random.default_rng(1).normal(0.02, 0.1, (4, 9))
    assert crossed_sign_flip_test(x) == sign_flip_test(x.mean(axis=0))
    # a profession of few seeds weighs as much as the others: the mean of the means is tested
    x[2, 5:] = np.nan
    weighed = np.nan_to_num(x / np.isfinite(x).sum(axis=1, keepdims=True)).sum(axis=0)
    assert weighed.sum() / 4 == pytest.approx(np.nanmean(x, axis=1).mean())
    assert crossed_sign_flip_test(x) == sign_flip_test(weighed)
    with pytest.raises(ValueError, match=r"must be \[professions, seeds\], got \[3\]"):
        crossed_sign_flip_test(np.zeros(3))


def test_chance_test_is_the_intervals_own():
    x = np.random.default_rng(2).beta(4, 9, 12)
    assert chance_test(x, 0.2) == pytest.approx(stats.ttest_1samp(x, 0.2).pvalue)
    assert chance_test([0.3, 0.3], 0.2) is None
    chances = np.linspace(0.1, 0.3, 12)  # of each picture its own
    assert chance_test(x, chances) == pytest.approx(stats.ttest_rel(x, chances).pvalue)


def test_corrections_by_hand():
    p = [0.01, 0.04, None, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([None]) == [None]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_newcombes_paired_interval_by_hand():
    """Both Wilson intervals, joined with the correlation of the pairs."""
    pairs = [(True, True)] * 36 + [(False, True)] * 12 + [(True, False)] * 2
    figure = share_difference(pairs)
    after, before = share_interval(48, 50), share_interval(38, 50)
    phi = (36 * 0 - 12 * 2) / np.sqrt(38 * 12 * 48 * 2)  # below 0: no correction
    down = np.array([after.value - after.low, before.high - before.value])
    up = np.array([after.high - after.value, before.value - before.low])
    reach = [np.sqrt(x[0] ** 2 - 2 * phi * x[0] * x[1] + x[1] ** 2) for x in (down, up)]
    assert (figure.value, figure.n) == (pytest.approx(0.2), 50)
    assert (figure.low, figure.high) == pytest.approx((0.2 - reach[0], 0.2 + reach[1]))
    assert mcnemar_test(pairs) == pytest.approx(stats.binomtest(12, 14).pvalue)
    assert mcnemar_test([(True, True)]) is None
    assert share_difference([]).value is None


def test_no_effect_gives_nominal_error_rates():
    """300 runs without effect; 4 standard errors of the rate are 0.05."""
    rng = np.random.default_rng(4)
    paired = rng.beta(8, 30, (2, 300, 9))  # 9 seeds: all 512 signs are tried
    flips = [sign_flip_test(x) for x in paired[1] - paired[0]]
    chance = [chance_test(x, 8 / 38) for x in paired[0]]
    for found in (flips, chance):
        assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.05)


def test_newcombe_covers():
    rng = np.random.default_rng(5)
    hits = []
    for _ in range(100):
        base = rng.random(20)
        before, after = base < 0.4, (base + 0.3 * rng.random(20) - 0.15) < 0.4
        figure = share_difference(list(zip(before, after, strict=True)))
        hits.append(figure.low <= 0.0 <= figure.high)
    assert np.mean(hits) >= 0.88


# --- the seed-shuffled null --------------------------------------------------------------------


def smooth_masks(rng, count, side=12, common=0.0):
    """Masks of the top 30 % of smooth random maps; ``common`` of two sets' maps is shared."""
    from scipy.ndimage import gaussian_filter

    def maps():
        return np.stack(
            [gaussian_filter(rng.standard_normal((side, side)), 2) for _ in range(count)]
        )

    shared = maps()
    sets = []
    for _ in range(2):
        values = (common * shared + (1 - common) * maps()).reshape(count, -1)
        sets.append(values > np.percentile(values, 70, axis=1, keepdims=True))
    return sets


def test_cross_iou_against_loops():
    a, b = smooth_masks(np.random.default_rng(6), 5)
    a[2] = b[2] = False
    expected = [[(x & y).sum() / (x | y).sum() if (x | y).any() else 0.0 for y in b] for x in a]
    assert cross_iou(a, b) == pytest.approx(np.array(expected))


def test_shuffled_null_and_its_jackknife_by_hand():
    matrix = cross_iou(*smooth_masks(np.random.default_rng(7), 6, common=0.5))
    level, difference, p, pseudo = shuffled(matrix)
    off = [matrix[i, j] for i in range(6) for j in range(6) if i != j]
    assert level.value == pytest.approx(np.mean(off))
    assert difference.value == pytest.approx(np.diag(matrix).mean() - np.mean(off))
    assert pseudo.mean() == pytest.approx(difference.value)
    without = []
    for k in range(6):
        rest = np.delete(np.delete(matrix, k, 0), k, 1)
        apart = (rest.sum() - np.trace(rest)) / 20
        without.append(np.trace(rest) / 5 - apart)
    error = np.sqrt(5 / 6 * np.sum((np.array(without) - np.mean(without)) ** 2))
    reach = stats.t.ppf(0.975, 5) * error
    assert difference.high - difference.low == pytest.approx(2 * reach)
    assert 0 < p <= 1
    assert shuffled(matrix[:2, :2])[1].value is None


def test_shuffled_null_is_calibrated_without_association():
    rng = np.random.default_rng(8)
    hits, p_values = [], []
    for _ in range(100):
        _, difference, p, _ = shuffled(cross_iou(*smooth_masks(rng, 12)))
        hits.append(difference.low <= 0 <= difference.high)
        p_values.append(p)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.088)  # 4 standard errors of 100 runs
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.088)


def test_shuffled_null_finds_what_is_there():
    matrix = cross_iou(*smooth_masks(np.random.default_rng(9), 12, common=0.6))
    _, difference, p, _ = shuffled(matrix)
    assert difference.low > 0
    assert p <= 0.001
