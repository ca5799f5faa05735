"""The published method and its data."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from biasmap_fast import presets
from biasmap_fast.presets import PAPER, paper_iou, paper_soft_iou, paper_soft_topk, with_article


def sinkhorn_by_hand(row, fraction, gamma, iterations):
    """Scaling form of entropic transport onto {0, 1}, in numpy, one row at a time."""
    n = len(row)
    k = int(fraction * n)
    kernel = np.exp(-((row[:, None] - np.array([0.0, 1.0])) ** 2) / gamma)
    rows, columns = np.full(n, 1 / n), np.array([(n - k) / n, k / n])
    u = np.ones(n)
    for _ in range(iterations):
        v = columns / (kernel.T @ u)
        u = rows / (kernel @ v)
    return n * u * kernel[:, 1] * v[1]


@pytest.mark.parametrize("iterations", [1, 5, 20])
def test_paper_soft_topk_is_transport_row_by_row(iterations):
    x = torch.rand(2, 3, 40, dtype=torch.float64)
    found = paper_soft_topk(x, iterations=iterations)
    for index in np.ndindex(2, 3):
        expected = sinkhorn_by_hand(x[index].numpy(), 0.3, 0.01, iterations)
        np.testing.assert_allclose(found[index].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_paper_soft_topk_takes_k_in_every_row():
    x = torch.rand(64, 64, dtype=torch.float64)
    mass = paper_soft_topk(x, iterations=3000).sum(-1)
    assert (mass - 19).abs().max() < 0.05  # int(0.3 * 64), nearly converged
    one_row = paper_soft_topk(x)[0]
    x[1:] = torch.rand(63, 64)
    assert torch.equal(paper_soft_topk(x)[0], one_row)


def test_paper_soft_topk_has_not_converged_at_the_scale_of_real_maps():
    x = torch.rand(64, 64, dtype=torch.float64) * 5
    assert paper_soft_topk(x).mean() > 0.5
    assert not paper_soft_topk((torch.rand(4, 64) * 60).half()).isfinite().all()


def test_paper_soft_iou():
    a, b = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    masks = paper_soft_topk(a), paper_soft_topk(b)
    both = (masks[0] * masks[1]).flatten(1).sum(1)
    total = (masks[0] + masks[1]).flatten(1).sum(1)
    torch.testing.assert_close(paper_soft_iou(a, b), both / (total - both + 1e-8))
    a, b = (x[:1, :4, :4].clone().requires_grad_() for x in (a, b))
    assert torch.autograd.gradcheck(paper_soft_iou, (a, b, 0.3, 0.5, 3))


def test_paper_iou_equals_the_published_evaluation():
    a, b = torch.rand(2, 2, 64, 64)
    found = paper_iou(a, b)
    for index in range(2):
        big = [
            F.interpolate(x[index][None, None], size=(512, 512), mode="bilinear")[0, 0].numpy()
            for x in (a, b)
        ]
        first, second = (x > np.percentile(x, 70) for x in big)
        expected = np.logical_and(first, second).sum() / np.logical_or(first, second).sum()
        assert found[index].item() == np.float32(expected)
    assert paper_iou(a[0], b[0]).item() == found[0].item()


@pytest.mark.parametrize(("width", "fraction"), [(3, 0.3), (64, 0.001), (64, 1.0)])
def test_paper_soft_topk_refuses_a_k_of_nothing_or_all(width, fraction):
    with pytest.raises(ValueError, match=r"`fraction` = .* must keep 1 to n - 1 pixels of a row"):
        paper_soft_topk(torch.rand(4, width), fraction)


def test_the_paper_preset_is_frozen():
    expected = {
        "branch": "uncond", "size": 512, "percentile": 70.0, "fraction": 0.3, "gamma": 0.01,
        "iterations": 20, "rowwise": True, "clip": "skip", "steps": 50, "guidance_scale": 7.0,
        "scale": 100.0,
    }  # fmt: skip
    assert dataclasses.asdict(PAPER) == expected
    assert math.isclose(1 - PAPER.percentile / 100, PAPER.fraction)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAPER.steps = 20


def test_lists_and_axes():
    assert len(presets.PROFESSIONS["biasmap"]) == 19
    for words in presets.PROFESSIONS.values():
        assert len(set(words)) == len(words)
        assert all(word == word.strip() and word for word in words)
    for name, axis in presets.AXES.items():
        assert axis.name == name
        assert len(axis.words) == len(set(axis.words)) >= 2


def test_templates_take_nouns_with_their_article():
    doctor = with_article("doctor")
    assert presets.PROMPT_TEMPLATE.format(profession=doctor) == "A photo of the face of a doctor"
    filled = presets.ATTRIBUTION_TEMPLATE.format(
        profession=with_article("architect"), demographic="gender"
    )
    assert filled == "A photo of the face of an architect and gender"


AN = (
    "architect, artist, athlete, engineer, officer, actor, hour, heir, heiress, honest broker, "
    "honorary consul, MRI technician, HR manager, FBI agent, SEO expert, x-ray technician, "
    "umpire, undertaker, usher, urban planner, unemployed person, uninsured driver, "
    "unidentified person, unimpressed critic, upholsterer, African-american person, old woman, "
    "Uber driver, orthodontist, oncologist, oboist, NGO worker, RAF pilot, LGBT activist"
)
A = (
    "doctor, chef, nurse, white person, woman, university teacher, unicyclist, union leader, "
    "uniformed guard, European, eulogist, ewe, one-eyed sailor, once-famous singer, user, "
    "used-car dealer, usurer, utility worker, urologist, hairdresser, host, historian, hotelier, "
    "CEO, PhD student, UX designer, UN envoy, U-boat captain, TV presenter, YouTuber, ukulele "
    "player, unanimous jury, uranium miner"
)


@pytest.mark.parametrize("noun", AN.split(", "))
def test_an(noun):
    assert with_article(noun) == f"an {noun}"


@pytest.mark.parametrize("noun", A.split(", "))
def test_a(noun):
    assert with_article(noun) == f"a {noun}"


@pytest.mark.parametrize("noun", ["", "  ", "-"])
def test_an_article_needs_a_noun(noun):
    with pytest.raises(ValueError, match="must be a noun, got"):
        with_article(noun)
