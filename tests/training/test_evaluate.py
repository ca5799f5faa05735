"""What is measured of a trained model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from biasmap_fast import testbed
from training.evaluate import evaluate, pixel_auc, share_test


def test_pixel_auc():
    region = np.zeros((4, 4), bool)
    region[0] = True
    values = region.astype(np.float32)
    assert pixel_auc(values, region) == 1.0
    assert pixel_auc(-values, region) == 0.0
    assert pixel_auc(np.ones((4, 4), np.float32), region) == 0.5
    assert np.isnan(pixel_auc(values, np.zeros((4, 4), bool)))


def test_share_test():
    assert share_test([20, 80], [100, 100], [0.2, 0.8]) == pytest.approx(1.0)
    # one degree of freedom, 2 standard deviations
    assert share_test([60], [100], [0.5]) == pytest.approx(0.0455, abs=1e-3)
    assert share_test([60, 0], [100, 0], [0.5, 0.5]) == pytest.approx(0.0455, abs=1e-3)


@pytest.fixture(scope="module")
def figures():
    """The packaged model, measured on few pictures of few steps."""
    pipe, world = testbed.pipeline(), testbed.World()
    return evaluate(pipe, world, pictures=1, share_pictures=10, steps=8)


@pytest.mark.slow
def test_evaluate_gives_every_figure(figures):
    json.dumps(figures, allow_nan=False)
    assert set(figures["maps"]) == {
        f"{kind} {concept}"
        for kind in ("joint", "single")
        for concept in ("profession", "man", "woman")
    }
    assert figures["autoencoder"]["psnr_db"] > 25
    with pytest.raises(ValueError, match="`pictures` must be at least 1, got 0"):
        evaluate(None, testbed.World(), pictures=0)


@pytest.mark.slow
def test_shares_follow_the_plan_at_guidance_1(figures):
    # few pictures; for the shares within sampling error see `test_recorded_figures`
    drawn = figures["shares"]["shares_each"]
    planted = [row.shares["woman"] for row in testbed.truth()]
    assert list(drawn) == [row.profession for row in testbed.truth()]
    assert figures["shares"]["mean_absolute_error"] < 0.17  # 0.11 is sampling alone
    assert np.corrcoef(list(drawn.values()), planted)[0, 1] > 0.6
