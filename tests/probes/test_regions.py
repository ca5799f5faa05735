from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import biasmap_fast as bm


def naive_otsu(values):
    """Every threshold tried, the variance between the classes written out."""
    best, chosen = -1.0, max(values)
    for threshold in sorted(set(values))[:-1]:
        low = [v for v in values if v <= threshold]
        high = [v for v in values if v > threshold]
        gap = sum(low) / len(low) - sum(high) / len(high)
        between = len(low) * len(high) * gap * gap
        if between > best * (1 + 1e-12):
            best, chosen = between, threshold
    return chosen


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.lists(st.integers(0, 9), min_size=6, max_size=6), st.integers(0, 1000))
def test_otsu_against_every_threshold(levels, seed):
    rows = torch.tensor(levels).float() + torch.arange(2)[:, None] * (seed % 3)
    maps = torch.stack([rows.view(2, 2, 3), rows.view(2, 2, 3) ** 2])  # [2, 2, 2, 3]
    found = bm.otsu(maps)
    assert found.shape == (2, 2)
    for index, value in zip(maps.flatten(0, 1), found.flatten(), strict=True):
        expected = naive_otsu(index.flatten().tolist())
        first = index > float(value)
        second = index > expected
        # two thresholds may be equally good
        assert bool((first == second).all()) or variance(index, first) == pytest.approx(
            variance(index, second), rel=1e-5
        )


def variance(values, mask):
    if not mask.any() or mask.all():
        return 0.0
    return float(mask.sum() * (~mask).sum() * (values[mask].mean() - values[~mask].mean()) ** 2)


def test_otsu_parts_two_levels_and_leaves_a_constant_map_empty():
    maps = torch.full((3, 4, 4), 0.5)
    maps[0, :2] = 0.9
    maps[1, 0, 0] = 0.6
    assert bm.otsu(maps).tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert (maps > bm.otsu(maps)[:, None, None]).sum((1, 2)).tolist() == [8, 1, 0]
    half = maps.to(torch.bfloat16)
    assert (half > bm.otsu(half)[:, None, None]).sum((1, 2)).tolist() == [8, 1, 0]


def test_overlap_by_hand():
    a, b = torch.zeros(3, 10, 10), torch.zeros(3, 10, 10)
    a[0, :4, :5] = 1  # 20 pixels
    b[0, 2:, :] = 1  # 80, of which 10 in a
    a[1, :2], b[1, :4] = 1, 1
    b[2, :5] = 1  # a is empty
    overlap = bm.effect_overlap(a, b)
    assert overlap.value.tolist() == pytest.approx([0.5, 1.0, 0.0])
    assert overlap.chance.tolist() == pytest.approx([0.8, 0.4, 0.5])
    assert overlap.corrected.tolist() == pytest.approx([-1.5, 1.0, 0.0])
    assert overlap.iou.tolist() == pytest.approx([10 / 90, 0.5, 0.0])
    expected = [10 * (1 / 20 / 80) ** 0.5, 20 * (1 / 20 / 40) ** 0.5, 0.0]
    assert overlap.bhattacharyya.tolist() == pytest.approx(expected)


def test_scale_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(4, 16, 12, generator=generator) for _ in range(2))
    first, second = bm.effect_overlap(a, b), bm.effect_overlap(3 * a, 0.2 * b)
    assert torch.equal(first.value, second.value)
    torch.testing.assert_close(first.bhattacharyya, second.bhattacharyya)


def test_refusals():
    with pytest.raises(ValueError, match=r"maps \[B, H, W\]"):
        bm.effect_overlap(torch.ones(2, 4, 4), torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match="finite and at least 0"):
        bm.effect_overlap(-torch.ones(2, 4, 4), torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="finite"):
        bm.otsu(torch.full((1, 2, 2), float("nan")))
