"""The public overlap functions: values, properties, and what they refuse."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

import biasmap_fast as bm
from biasmap_fast import overlap, presets

SHAPES = [(1, 1), (1, 7), (5, 3), (16, 16)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def two_maps(draw):
    """Two maps [1, H, W] of one shape: smooth or with many ties, never constant."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(2, 9))
    levels = draw(st.sampled_from([3, 20, 10**6]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.integers(0, levels, (2, 1, height, width)).astype(np.float32) / levels
    x[:, 0, 0, 0], x[:, 0, 0, 1] = 0.0, 1.0
    return torch.from_numpy(x)


@settings(deadline=None, max_examples=60)
@given(two_maps(), st.floats(0.001, 1.0))
def test_hard_iou_properties(maps, fraction):
    a, b = maps
    value = bm.iou(a, b, fraction=fraction)
    assert 0 <= value <= 1
    assert torch.equal(value, bm.iou(b, a, fraction=fraction))
    order = torch.randperm(a[0].numel(), generator=torch.Generator().manual_seed(0))
    shuffled = (x.flatten()[order].reshape(x.shape) for x in maps)
    assert torch.equal(value, bm.iou(*shuffled, fraction=fraction))
    same, empty = overlap.iou_and_empty(torch.stack((a, a), 1).flatten(2), fraction)
    assert same == 1 or (same == 0 and empty)  # empty: all values above the rest tie


@settings(deadline=None, max_examples=60)
@given(two_maps(), st.floats(0.05, 0.95), st.floats(-5, 5), st.sampled_from([1e-3, 0.3, 1.0, 40.0]))
def test_soft_iou_properties(maps, fraction, shift, scale):
    a, b = maps.double()
    options = {"fraction": fraction, "temperature": 0.05}
    value = bm.soft_iou(a, b, **options)
    assert 0 <= value <= 1 + 1e-12
    torch.testing.assert_close(value, bm.soft_iou(b, a, **options))
    order = torch.randperm(a[0].numel(), generator=torch.Generator().manual_seed(0))
    shuffled = [x.flatten()[order].reshape(x.shape) for x in (a, b)]
    torch.testing.assert_close(value, bm.soft_iou(*shuffled, **options))
    moved = bm.soft_iou(a * scale + shift, b, **options)
    torch.testing.assert_close(value, moved, rtol=1e-8, atol=1e-8)
    native = bm.soft_iou(a.float(), b.float(), **options)
    torch.testing.assert_close(native.double(), value, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(shape, dtype):
    a, b = torch.rand(2, 3, *shape).to(dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    for function in (bm.iou, bm.soft_iou):
        value = function(a, b)
        assert value.shape == (3,)
        assert value.dtype == kind
        assert function(a[0], b[0]).shape == ()
        assert torch.equal(function(a[0], b[0]), value[0])
    every = bm.pairwise_iou(torch.stack((a, b, a), dim=1))
    assert every.shape == (3, 3, 3)
    assert torch.equal(every[:, 0, 1], bm.iou(a, b))
    assert torch.equal(every, every.transpose(1, 2))
    assert bm.soft_topk(a, dim=(-2, -1)).shape == a.shape
    assert bm.soft_topk(a).dtype == kind


def test_values_by_hand():
    a = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    b = torch.tensor([[3.0, 0.0, 1.0, 2.0]])
    assert bm.iou(a, b, fraction=0.5).item() == pytest.approx(1 / 3)
    assert bm.iou(a, b, fraction=0.3).item() == 0.0
    assert bm.iou(a, b, fraction=1.0).item() == 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("percent", [100, 70, 50, 45, 33.3, 30, 10, 5, 1])
def test_masks_of_a_fraction_are_numpys_to_the_bit(percent, dtype):
    """0.3 of the pixels is `numpy.percentile(map, 70)`, whatever 100 * (1 - 0.3) rounds to."""
    maps = np.random.default_rng(0).integers(0, 50, (40, 2, 11, 13)).astype(dtype) / 7
    value = bm.iou(*torch.from_numpy(maps).unbind(1), fraction=percent / 100)
    levels = np.percentile(maps, round(100 - percent, 1), axis=(2, 3), keepdims=True)
    first, second = (maps > levels).swapaxes(0, 1)
    both, either = (first & second).sum((1, 2)), (first | second).sum((1, 2))
    expected = both.astype(dtype) / np.maximum(either, 1).astype(dtype)
    assert value.numpy().tobytes() == expected.astype(dtype).tobytes()


def test_a_row_of_a_map_is_not_the_map():
    x = torch.zeros(8, 8)
    x[0] = torch.linspace(1, 2, 8)
    x += torch.rand(8, 8) * 0.1
    rows, whole = bm.soft_topk(x), bm.soft_topk(x, dim=(-2, -1))
    torch.testing.assert_close(rows.mean(-1), torch.full((8,), 0.3), atol=1e-6, rtol=0)
    assert whole[0].mean() > 0.9
    torch.testing.assert_close(whole.mean(), torch.tensor(0.3), atol=1e-6, rtol=0)


def test_soft_iou_has_gradients_for_both_maps():
    a, b = torch.rand(2, 2, 12, 12, dtype=torch.float64)
    a.requires_grad_()
    b.requires_grad_()
    bm.soft_iou(a, b, temperature=0.1).sum().backward()
    step = 1e-5
    with torch.no_grad():
        for x in (a, b):
            direction = x.grad / x.grad.norm()
            lo, hi = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
            direction = direction.where((x != lo) & (x != hi), 0.0)  # the range stays
            moved = [(y + step * direction if y is x else y) for y in (a, b)]
            back = [(y - step * direction if y is x else y) for y in (a, b)]
            slope = bm.soft_iou(*moved, temperature=0.1) - bm.soft_iou(*back, temperature=0.1)
            assert (slope.sum() / (2 * step)).item() == pytest.approx(
                (direction * x.grad).sum().item(), rel=1e-6
            )


def test_empty_batches():
    none = torch.rand(0, 8, 8)
    assert bm.iou(none, none).shape == (0,)
    assert bm.soft_iou(none, none).shape == (0,)
    assert bm.pairwise_iou(torch.rand(0, 3, 8, 8)).shape == (0, 3, 3)
    assert bm.soft_topk(none, dim=(-2, -1)).shape == (0, 8, 8)


def test_constant_maps_are_counted_as_empty():
    flat, x = torch.ones(1, 8, 8), torch.rand(1, 8, 8)
    value, empty = overlap.iou_and_empty(torch.stack((flat, flat), 1).flatten(2), 0.3)
    assert (value.item(), empty.item()) == (0.0, True)
    value, empty = overlap.iou_and_empty(torch.stack((flat, x), 1).flatten(2), 0.3)
    assert (value.item(), empty.item()) == (0.0, False)
    assert bm.pairwise_iou(torch.stack((flat, x), dim=1)).tolist() == [[[0.0, 0.0], [0.0, 1.0]]]
    p = 0.3  # two flat masks of 0.3 everywhere overlap as unrelated ones do
    assert bm.soft_iou(flat, flat).item() == pytest.approx(bm.chance_iou(p), abs=1e-6)


def test_chance_level_is_what_unrelated_maps_give():
    maps = torch.rand(200, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    values = bm.pairwise_iou(maps)[:, 0, 1]
    assert values.mean().item() == pytest.approx(bm.chance_iou(0.3), abs=0.004)
    assert bm.corrected(values, bm.chance_iou(0.3)).mean().item() == pytest.approx(0, abs=0.005)


@pytest.mark.parametrize(("side", "fraction", "told"), [(16, 0.3, 0.178), (8, 0.1, 0.062)])
def test_masks_of_few_pixels_meet_a_little_more_than_the_chance_level(side, fraction, told):
    """As docs/statistics.md says; how many pixels two random masks share is hypergeometric."""
    pixels = side * side
    kept = pixels - 1 - math.floor((1 - fraction) * (pixels - 1))
    shared = np.arange(kept + 1)
    chances = hypergeom(pixels, kept, kept).pmf(shared)
    expected = float((chances * shared / (2 * kept - shared)).sum())
    assert expected == pytest.approx(told, abs=5e-4)
    assert expected > bm.chance_iou(fraction)
    maps = torch.rand(4000, 2, side, side, generator=torch.Generator().manual_seed(0))
    values = bm.pairwise_iou(maps, fraction=fraction)[:, 0, 1]
    assert values.mean().item() == pytest.approx(expected, abs=4 * values.std().item() / 4000**0.5)


def test_chance_and_correction_take_floats_arrays_and_tensors():
    assert bm.chance_iou(0.3) == pytest.approx(0.3 / 1.7)
    chance = bm.chance_iou(0.3)
    assert bm.corrected(1.0, chance) == 1.0
    assert bm.corrected(chance, chance) == 0.0
    for make in (np.array, torch.tensor):
        levels = bm.chance_iou(make([0.1, 0.3]))
        corrected = bm.corrected(make([0.0, 1.0]), chance)
        assert type(levels) is type(corrected) is type(make([0.0]))
        assert levels.tolist() == pytest.approx([0.1 / 1.9, 0.3 / 1.7])
        assert corrected.tolist() == pytest.approx([-0.3 / 1.4, 1.0])
        assert bm.corrected(make([0.5, 1.0]), make([0.5, 0.5])).tolist() == [0.0, 1.0]
    assert bm.corrected(torch.rand(3), chance).dtype == torch.float32


NAN = torch.rand(3, 8, 8)
NAN[2, 4, 4:6] = math.nan
INF = torch.rand(2, 3, 8, 8)
INF[1, 2, 0, 0] = math.inf
MAP, MAPS = torch.rand(3, 8, 8), torch.rand(2, 3, 8, 8)

REFUSED = [
    (bm.iou, ([1], MAP), {}, TypeError, "`a` must be a torch tensor, got list"),
    (bm.iou, (MAP, MAP.numpy()), {}, TypeError, "`b` must be a torch tensor, got ndarray"),
    (bm.iou, (MAP.long(), MAP), {}, TypeError, r"`a` must be float16, .* got \[3, 8, 8\] int64"),
    (bm.iou, (MAP.bool(), MAP), {}, TypeError, r"got \[3, 8, 8\] bool"),
    (bm.iou, (MAPS, MAPS), {}, ValueError, r"must be \[B, H, W\] or .* got \[2, 3, 8, 8\] float32"),
    (bm.iou, (MAP[0, 0], MAP[0, 0]), {}, ValueError, r"got \[8\] float32"),
    (bm.iou, (MAP[:, :0], MAP[:, :0]), {}, ValueError, r"H, W >= 1, got \[3, 0, 8\]"),
    (bm.iou, (MAP, MAP[:2]), {}, ValueError, r"alike, got \[3, 8, 8\] .* and \[2, 8, 8\]"),
    (bm.iou, (MAP, MAP.double()), {}, ValueError, "alike, got .* float32 and .* float64"),
    (bm.iou, (MAP, MAP.to("meta")), {}, ValueError, "on one device, got cpu and meta"),
    (bm.iou, (MAP, MAP), {"fraction": 0}, ValueError, r"in \(0, 1\], got 0"),
    (bm.iou, (MAP, MAP), {"fraction": 30}, ValueError, r"in \(0, 1\], got 30"),
    (bm.iou, (MAP, MAP), {"fraction": math.nan}, ValueError, r"in \(0, 1\], got nan"),
    (bm.iou, (MAP, NAN), {}, ValueError, "`b` must be finite: 2 of 64 values at batch index 2 are"),
    (bm.soft_iou, (NAN, MAP), {}, ValueError, "`a` must be finite: 2 of 64 .* batch index 2 "),
    (bm.soft_iou, (MAP, MAP), {"fraction": 0}, ValueError, r"`fraction` .* \(0, 1\), got 0"),
    (bm.soft_iou, (MAP, MAP), {"fraction": 1.0}, ValueError, r"`fraction` .* got 1.0"),
    (bm.soft_iou, (MAP, MAP), {"fraction": math.nan}, ValueError, "`fraction` .* got nan"),
    (bm.soft_iou, (MAP, MAP), {"temperature": 0}, ValueError, "`temperature` .* at least 1e-06"),
    (bm.soft_iou, (MAP, MAP), {"temperature": -1}, ValueError, "`temperature` .* got -1"),
    (bm.soft_iou, (MAP, MAP), {"temperature": math.inf}, ValueError, "finite, got inf"),
    (bm.soft_iou, (MAP, MAP), {"temperature": math.nan}, ValueError, "finite, got nan"),
    (bm.pairwise_iou, ([],), {}, TypeError, "`maps` must be a torch tensor, got list"),
    (bm.pairwise_iou, (MAPS.int(),), {}, TypeError, r"got \[2, 3, 8, 8\] int32"),
    (bm.pairwise_iou, (MAP,), {}, ValueError, r"\[B, K, H, W\] with H, W >= 1, got \[3, 8, 8\]"),
    (bm.pairwise_iou, (MAPS[..., :0],), {}, ValueError, r"got \[2, 3, 8, 0\]"),
    (bm.pairwise_iou, (MAPS,), {"fraction": -0.01}, ValueError, "got -0.01"),
    (bm.pairwise_iou, (INF,), {}, ValueError, "1 of 64 values at batch index 1, concept 2 are NaN"),
    (bm.soft_topk, (1.0,), {}, TypeError, "`x` must be a torch tensor, got float"),
    (bm.soft_topk, (MAP.int(),), {}, TypeError, "`x` must be float16"),
    (bm.soft_topk, (MAP,), {"dim": 1}, ValueError, r"`dim` must be -1 or \(-2, -1\), got 1"),
    (bm.soft_topk, (MAP[0, 0],), {"dim": (-2, -1)}, ValueError, r"values along .* got \[8\]"),
    (bm.soft_topk, (MAP[..., :0],), {}, ValueError, r"values along .* got \[3, 8, 0\]"),
    (bm.soft_topk, (NAN,), {}, ValueError, "`x` must be finite: 2 of 8 values at batch index 20"),
    (bm.chance_iou, (0.0,), {}, ValueError, r"`fraction` must be in \(0, 1\), got 0.0"),
    (bm.chance_iou, (torch.tensor([0.5, 1.0]),), {}, ValueError, "`fraction` must be in"),
    (bm.corrected, (0.5, 1.0), {}, ValueError, r"`chance` must be in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize(("function", "arguments", "options", "error", "message"), REFUSED)
def test_refuses(function, arguments, options, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **options)


def test_a_range_beyond_float32(monkeypatch):
    a, b = torch.rand(2, 8, 8)
    a[0, 0], a[1, 1] = 3e38, -3e38
    torch.testing.assert_close(
        bm.soft_iou(a, b), bm.soft_iou(a.double(), b.double()).float(), rtol=0, atol=1e-6
    )
    monkeypatch.setenv("BIASMAP_BACKEND", "reference")
    with pytest.raises(ValueError, match="range is more than torch.float32 holds"):
        bm.soft_iou(a, b)


def test_fraction_is_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        bm.iou(MAP, MAP, 0.3)


def test_arguments_are_not_changed():
    a, b, maps = MAP.clone(), MAP.flip(0).clone(), MAPS.clone()
    bm.iou(a, b), bm.soft_iou(a, b), bm.soft_topk(a), bm.pairwise_iou(maps)
    assert torch.equal(a, MAP)
    assert torch.equal(b, MAP.flip(0))
    assert torch.equal(maps, MAPS)


# torch 2.13's own tracing of an autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_public_functions_compile_into_one_graph(dtype):
    def everything(a, b):
        soft = bm.soft_iou(a, b) + bm.soft_topk(a, dim=(-2, -1)).amax((-2, -1))
        return soft, bm.corrected(bm.iou(a, b), 0.2), bm.pairwise_iou(a[None])

    a, b = (torch.rand(3, 8, 8, dtype=dtype, requires_grad=True) for _ in "ab")
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(a, b), everything(a, b), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("module", [overlap, presets])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted >= 5
    assert found.failed == 0
