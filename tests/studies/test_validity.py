"""The validity study's own arithmetic, against the package and against loops."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import biasmap_fast as bm
from studies.validity import candidates
from studies.validity.candidates import (
    PUBLISHED,
    View,
    map_choices,
    measures,
    overlap,
    pair_of_maps,
)
from studies.validity.collect import Capture, concepts_of, default_maps
from studies.validity.score import Truth, _with_null

SEEDS = 3


def test_the_captured_sums_are_the_recorders_maps():
    pipe = bm.testbed.pipeline()
    concepts = concepts_of(bm.testbed.World(), "doctor")
    text = "a photo of the face of a doctor and woman"
    prompt = bm.AttributionPrompt(text, ("doctor", "woman"))
    with bm.attribute(pipe, prompt) as recorder, Capture(pipe, concepts, 2) as capture:
        pipe(
            ["a photo of a doctor"] * 2,
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        )
    keys = [concept.key for concept in concepts]
    rows = [keys.index("noun with woman"), keys.index("woman with noun")]
    found, expected = default_maps(capture.sums)[:, rows], recorder.maps().values
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert capture.step == 3


def test_measures_are_the_packages():
    values = torch.randn(2, 2, SEEDS, 256).cumsum(-1)  # [a or b, P, S, n]
    a, b = values
    square = [x.reshape(-1, 16, 16) for x in (a, b)]
    every = measures(2.6, 11.1)

    def found(name: str) -> torch.Tensor:
        return overlap(View(a), View(b), every[name]).diagonal(dim1=1, dim2=2).flatten()

    for percent in (30, 10, 5):
        expected = bm.iou(*square, fraction=percent / 100)
        torch.testing.assert_close(found(f"IoU top {percent} %"), expected)
        expected = bm.soft_iou(*square, fraction=percent / 100)
        torch.testing.assert_close(found(f"SoftIoU {percent} %"), expected)
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(*square, strict=True)]
    np.testing.assert_allclose(found("rank correlation"), expected, atol=1e-5)
    masks = [x > np.quantile(x, q) for x, q in ((square[0][0], 0.95), (square[1][0], 0.9))]
    inside = (masks[0] & masks[1]).sum() / masks[0].sum()
    assert found("top 5 % inside top 10 %")[0] == pytest.approx(float(inside))


def test_every_seed_meets_every_other():
    a, b = torch.rand(2, 1, SEEDS, 64)
    measure = measures(2.6, 11.1)["top 10 % inside top 30 %"]
    matrix = overlap(View(a), View(b), measure)
    for i, j in product(range(SEEDS), range(SEEDS)):
        one = overlap(View(a[:, i : i + 1]), View(b[:, j : j + 1]), measure)
        assert matrix[0, i, j] == one
    null = _with_null(matrix.double().numpy())
    others = [[float(matrix[0, i, j]) for j in range(SEEDS) if j != i] for i in range(SEEDS)]
    expected = null["raw"][0] - np.mean(others, axis=1)
    np.testing.assert_allclose(null["shuffled subtracted"][0], expected)


def record(levels: list[float], gaps: list[float], *, wrong: int | None = None) -> dict:
    pictures = [
        {"right": place != wrong, "overlap": None if place == wrong else level}
        for place, (level, _) in enumerate(product(levels, range(SEEDS)))
    ]
    nouns = [f"noun {i}" for i in range(len(levels))]
    truth = {noun: {"gap": gap} for noun, gap in zip(nouns, gaps, strict=True)}
    return {"truth": truth, "pictures": pictures}


def test_scores_against_loops():
    levels = [0.0, 0.0, 0.24, 0.26, 0.5, 0.74, 1.0]
    gaps = [3.0, 12.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    truth = Truth(record(levels, gaps, wrong=4))
    values = np.random.default_rng(0).normal(size=(5, 7, SEEDS))
    values[0] = np.array(levels)[:, None]  # the truth itself
    values[1] = -values[0]
    values[2] = 0.5  # says nothing
    found = truth.scores(values)
    for name in ("concordance", "auc", "adjacent", "quarter", "picture_auc"):
        assert found[name][:3].tolist() == [1.0, 0.0, 0.5], name
    assert np.isnan(found["rho"][2])
    for candidate in (3, 4):
        means = values[candidate].mean(1)
        means[1] = values[candidate, 1, [0, 2]].mean()  # picture 4 does not show its profession
        pairs = [(i, j) for i, j in product(range(7), range(7)) if levels[i] - levels[j] > 0.125]
        expected = np.mean([means[i] > means[j] for i, j in pairs])
        assert found["concordance"][candidate] == pytest.approx(expected)
        wins = [means[i] > means[j] for i, j in product(range(2, 7), range(2))]
        assert found["auc"][candidate] == pytest.approx(np.mean(wins))
        assert found["adjacent"][candidate] == pytest.approx(np.mean(means[2:] > means[0]))
        assert found["quarter"][candidate] == pytest.approx(np.mean(means[5] > means[2:4]))
        assert found["rho"][candidate] == pytest.approx(spearmanr(means, levels).statistic)


def test_choices_of_maps_differ_and_changes_count_parts():
    every = list(map_choices())
    assert len(set(every)) == len(every) == 400
    other = candidates.Candidate("single", "raw", "default", "all", "cond", "IoU top 5 %")
    assert PUBLISHED.changes(PUBLISHED) == 0
    assert PUBLISHED.changes(other) == 3


def test_forms_of_maps():
    concepts = ["noun", "control", "neutral"]
    concepts += [f"{x}" for w in ("man", "woman") for x in (f"noun with {w}", f"{w} with noun", w)]
    shape = (2, SEEDS, len(concepts), 2, 3, 2, 256)
    layers = {
        name: torch.rand(shape) for name in ("down_blocks.0.x", "mid_block.x", "up_blocks.2.x")
    }

    def sums(key: str) -> torch.Tensor:
        place = concepts.index(key)
        return sum(
            layers[name][:, :, place, 0, :, 1].sum(2)
            for name in ("down_blocks.0.x", "up_blocks.2.x")
        )

    def pair(form: str) -> tuple[torch.Tensor, torch.Tensor]:
        maps = candidates.Maps(form, "softmax", "default", "all", "cond")
        return pair_of_maps(layers, concepts, maps, "woman")

    expected = {
        "joint": (sums("noun with woman"), sums("woman with noun")),
        "single": (sums("noun"), sums("woman")),
        "neutral": (sums("noun") - sums("neutral"), sums("woman") - sums("neutral")),
        "contrast": (sums("noun"), sums("woman") - sums("man")),
        "axis": (sums("noun"), (sums("woman") - sums("man")).abs()),
    }
    for form, both in expected.items():
        for found, wanted in zip(pair(form), both, strict=True):
            torch.testing.assert_close(found, wanted)
