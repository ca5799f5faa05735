"""Figures and intervals: against numpy and scipy, and against their own promise of coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from biasmap_fast.audit.statistics import (
    crossed_mean_interval,
    mean_interval,
    rank_correlation,
    share_interval,
    stable_seed,
)


def test_mean_interval_is_students_t():
    x = np.random.default_rng(0).beta(4, 9, 17)
    figure = mean_interval(x)
    low, high = stats.t.interval(0.95, 16, loc=x.mean(), scale=stats.sem(x))
    assert figure.value == pytest.approx(x.mean())
    assert (figure.low, figure.high) == (pytest.approx(low), pytest.approx(high))
    assert figure.n == 17


@pytest.mark.parametrize(
    ("values", "value", "method"),
    [
        ([], None, "nothing was measured"),
        ([0.4], 0.4, "no interval from one picture"),
        ([0.3, 0.3, 0.3], 0.3, "no interval: the values are alike"),
        ([0.0, 0.0, 0.0006], 0.0002, "no interval: the values are alike"),
    ],
)
def test_no_interval_where_the_data_carry_none(values, value, method):
    figure = mean_interval(values)
    assert (figure.low, figure.high, figure.n) == (None, None, len(values))
    assert figure.value == (None if value is None else pytest.approx(value))
    assert figure.method == method


def test_intervals_stay_inside_the_possible():
    figure = mean_interval([0.0, 0.0, 0.02])
    assert figure.low == 0.0


@pytest.mark.parametrize("values", [[0.1, float("nan")], [0.1, 1.2], [-0.1, 0.3]])
def test_impossible_values_are_refused(values):
    with pytest.raises(ValueError, match=r"must be finite and lie in \[0, 1\], got"):
        mean_interval(values)


@pytest.mark.parametrize(("n", "least"), [(8, 0.925), (20, 0.93), (100, 0.935)])
def test_t_interval_covers(n, least):
    """Nominal 95 % on bounded, mildly skewed data like IoU, Beta(8, 30); 0.945 at n = 8."""
    rng = np.random.default_rng(n)
    hits = [
        figure.low <= 8 / 38 <= figure.high
        for figure in (mean_interval(rng.beta(8, 30, n)) for _ in range(1500))
    ]
    assert least <= np.mean(hits) <= 0.97


def crossed(rng, professions, seeds, spread, seed_spread, noise):
    values = (
        0.4
        + spread * rng.standard_normal((professions, 1))
        + seed_spread * rng.standard_normal((1, seeds))
        + noise * rng.standard_normal((professions, seeds))
    )
    return values.clip(0, 1)


@pytest.mark.parametrize(
    ("seeds", "spread", "seed_spread"), [(8, 0.06, 0.0), (8, 0.06, 0.06), (30, 0.06, 0.03)]
)
def test_overall_interval_covers_with_seeds_shared_by_professions(seeds, spread, seed_spread):
    """Seeds are crossed with professions: the same noise starts image i of each of them."""
    rng = np.random.default_rng(seeds)
    hits = []
    for trial in range(300):
        values = crossed(rng, 20, seeds, spread, seed_spread, 0.06)
        figure = crossed_mean_interval(values, resamples=400, seed=trial)
        hits.append(figure.low <= 0.4 <= figure.high)
    assert np.mean(hits) >= 0.92  # nominal 0.95, four standard errors of 300 trials below


def test_resampling_images_within_professions_would_not_cover():
    """Why the bootstrap is crossed and not nested: the usual nested one covers about 0.73 here."""
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(150):
        x = crossed(rng, 20, 8, 0.06, 0.06, 0.06)
        rows = rng.integers(0, 20, (300, 20))
        images = rng.integers(0, 8, (300, 20, 8))
        boot = x[rows[:, :, None], images].mean((1, 2))
        low, high = np.quantile(boot, [0.025, 0.975])
        hits.append(low <= 0.4 <= high)
    assert np.mean(hits) < 0.85


def test_overall_mean_weighs_professions_equally_and_skips_what_is_missing():
    values = np.array([[0.2, 0.4, np.nan], [0.6, np.nan, np.nan], [np.nan] * 3])
    figure = crossed_mean_interval(values)
    assert figure.value == pytest.approx((0.3 + 0.6) / 2)
    assert figure.n == 2
    assert 0 <= figure.low < figure.value < figure.high <= 1


def test_overall_without_interval_below_two():
    figure = crossed_mean_interval(np.array([[0.2, 0.4, 0.3]]))
    assert (figure.value, figure.low, figure.n) == (pytest.approx(0.3), None, 1)
    assert crossed_mean_interval(np.full((2, 2), np.nan)).value is None
    with pytest.raises(ValueError, match=r"must be \[professions, seeds\], got \[3\]"):
        crossed_mean_interval(np.zeros(3))


def test_overall_is_deterministic():
    values = np.random.default_rng(3).beta(5, 9, (6, 7))
    assert crossed_mean_interval(values, seed=5) == crossed_mean_interval(values, seed=5)
    assert stable_seed("overall", 70.0) == stable_seed("overall", 70.0)
    assert stable_seed("overall", 70.0) != stable_seed("overall", 90.0)


def test_wilson_against_the_formula():
    figure = share_interval(7, 20)
    z = stats.norm.ppf(0.975)
    centre = (7 / 20 + z**2 / 40) / (1 + z**2 / 20)
    reach = z * np.sqrt(0.35 * 0.65 / 20 + z**2 / 1600) / (1 + z**2 / 20)
    assert (figure.low, figure.high) == (
        pytest.approx(centre - reach),
        pytest.approx(centre + reach),
    )
    assert share_interval(0, 9).low == 0.0
    assert share_interval(9, 9).high == 1.0
    assert share_interval(0, 0).value is None
    with pytest.raises(ValueError, match="between 0 and n = 3, got 4"):
        share_interval(4, 3)


def test_rank_correlation_against_scipy():
    rng = np.random.default_rng(2)
    x, y = rng.random(20), np.repeat([0, 0.25, 0.5, 0.75, 1], 4)
    figure = rank_correlation(x, y)
    assert figure.value == pytest.approx(stats.spearmanr(x, y)[0])
    assert -1 <= figure.low < figure.value < figure.high <= 1


def test_rank_correlation_says_when_it_cannot_tell():
    assert rank_correlation([0.1, 0.2, 0.3], [1, 1, 1]).value is None
    short = rank_correlation([0.1, 0.2, 0.3], [1, 2, 3])
    assert (short.value, short.low) == (pytest.approx(1.0), None)
    for sign in (1, -1):  # Fisher's z is infinite: an interval would be a point
        perfect = rank_correlation(np.arange(8) / 10, sign * np.arange(8))
        assert (perfect.value, perfect.low, perfect.high) == (pytest.approx(sign), None, None)
        assert perfect.method == "no interval: the coefficient is 1 or -1"


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_rank_interval_covers(rho):
    rng = np.random.default_rng(7)
    truth = 6 / np.pi * np.arcsin(rho / 2)
    hits = []
    for _ in range(800):
        x = rng.standard_normal(20)
        y = rho * x + np.sqrt(1 - rho**2) * rng.standard_normal(20)
        figure = rank_correlation(x, y)
        hits.append(figure.low <= truth <= figure.high)
    assert 0.93 <= np.mean(hits) <= 0.98


def test_scaling_moves_value_and_interval_together():
    figure = mean_interval([0.2, 0.3, 0.5])
    moved = figure.scaled(2.0, -0.1)
    assert moved.value == pytest.approx(2 * figure.value - 0.1)
    assert moved.high - moved.low == pytest.approx(2 * (figure.high - figure.low))
    assert (moved.n, moved.method) == (figure.n, figure.method)
