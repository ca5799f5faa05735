"""Containment of one mask in another: values, gradients, chance, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import overlap


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("percentiles", [(95.0, 90.0), (70.0, 70.0), (50.0, 0.0), (33.3, 97.0)])
def test_containment_is_numpys_masks(dtype, percentiles):
    fractions = tuple(1 - percentile / 100 for percentile in percentiles)
    a, b = torch.randn(2, 4, 13, 9).to(dtype)
    value = bm.containment(a, b, fractions=fractions)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i in range(4):
        kind = np.float64 if dtype == torch.float64 else np.float32
        x, y = (z[i].to(value.dtype).numpy().astype(kind) for z in (a, b))
        first, second = x > np.percentile(x, percentiles[0]), y > np.percentile(y, percentiles[1])
        expected = (first & second).sum() / first.sum()
        assert value[i].item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(bm.containment(a[0], b[0], fractions=fractions), value[0])


def test_equal_fractions_order_as_iou_does():
    a, b = torch.randn(2, 50, 16, 16)
    inside = bm.containment(a, b, fractions=(0.3, 0.3))
    torch.testing.assert_close(inside / (2 - inside), bm.iou(a, b, fraction=0.3))


def test_empty_masks():
    flat, x = torch.ones(8, 8), torch.rand(8, 8)
    value = bm.containment(torch.stack((flat, x)), torch.stack((x, x)))
    assert value.tolist() == [0.0, 1.0]
    assert bm.containment(x, flat) == 0.0
    assert bm.containment(torch.rand(0, 4, 4), torch.rand(0, 4, 4)).shape == (0,)


def test_chance_is_what_unrelated_maps_give():
    a, b = torch.rand(2, 400, 32, 32, generator=torch.Generator().manual_seed(0))
    for fractions in ((0.05, 0.1), (0.2, 0.3)):
        values = bm.containment(a, b, fractions=fractions)
        assert abs(values.mean() - fractions[1]) < 4 * values.std() / math.sqrt(400)


def test_soft_containment_is_the_soft_masks():
    a, b = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    masks = [
        bm.soft_topk(x, fraction=f, temperature=0.02, dim=(-2, -1))
        for x, f in ((a, 0.05), (b, 0.1))
    ]
    expected = (masks[0] * masks[1]).sum((-2, -1)) / masks[0].sum((-2, -1))
    value = bm.soft_containment(a, b, temperature=0.02)
    torch.testing.assert_close(value, expected)
    native = bm.soft_containment(a.float(), b.float(), temperature=0.02)
    torch.testing.assert_close(native.double(), expected, rtol=0, atol=3e-6)
    sharp = bm.soft_containment(a, b, temperature=1e-5)
    hard = bm.containment(a, b)
    assert (sharp - hard).abs().max() < 0.09  # a pixel of the first mask is 1/13


def test_soft_containment_has_gradients_for_both_maps():
    a, b = torch.rand(2, 2, 10, 10, dtype=torch.float64)
    # the range is a constant of the gradient: keep its ends out of the way
    ends = torch.zeros(10, 10, dtype=torch.bool)
    ends[0, 0] = ends[0, 1] = True

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = (z.masked_fill(ends, 0.0) for z in (x, y))
        low, high = torch.zeros_like(x), torch.zeros_like(x)
        low[:, 0, 0], high[:, 0, 1] = -1.0, 2.0
        x, y = x + low + high, y + low + high
        return bm.soft_containment(x, y, fractions=(0.2, 0.3), temperature=0.05)

    assert torch.autograd.gradcheck(loss, (a.requires_grad_(), b.requires_grad_()))


def test_pairs_of_many_concepts():
    maps = torch.randn(2, 4, 49)
    pairs = torch.tensor([[0, 1], [2, 1], [3, 0]])
    found = overlap.pairs_soft_containment(maps, pairs, (0.1, 0.2), 0.01)
    for place, (i, j) in enumerate(pairs.tolist()):
        a, b = (maps[:, k].reshape(2, 7, 7) for k in (i, j))
        expected = bm.soft_containment(a, b, fractions=(0.1, 0.2))
        torch.testing.assert_close(found[:, place], expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: bm.containment(a, a, fractions=0.05), "`fractions` must be two numbers"),
        (lambda a: bm.containment(a, a, fractions=(0.05,)), "must be two numbers, .* got"),
        (lambda a: bm.containment(a, a, fractions=(0.05, 0.0)), r"in \(0, 1\], got 0"),
        (lambda a: bm.containment(a, a[:1]), "`a` and `b` must be alike"),
        (lambda a: bm.containment(a, a / 0.0), "`b` must be finite: 32 of 32 values at batch"),
        (lambda a: bm.soft_containment(a, a, fractions=0.1), "`fractions` must be two numbers"),
        (lambda a: bm.soft_containment(a, a, fractions=(0.1, 1.0)), "`fraction` must be in"),
        (lambda a: bm.soft_containment(a, a, temperature=0.0), "`temperature` must be at least"),
        (lambda a: bm.soft_containment(a / 0.0, a), "`a` must be finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(2, 4, 8) + 0.1)
