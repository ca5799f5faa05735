"""Native ops against the reference, and both against numpy and the converged transport."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from biasmap_fast import ops, presets, reference

# Float32 masks against float64: rounding of one sigmoid (measured worst: 4e-7).
MASK = 1e-6
# Float32 sums of up to 4096 products, amplified at most twice by the quotient (measured: 1.4e-6).
IOU = 3e-6
# Gradients times the map's range, over 2 / temperature (measured: 4e-7).
GRADIENT = 2e-6

PAIRS = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 1]])
SIZES = [1, 2, 3, 7, 63, 64, 65, 400, 4096]


def draw(kind, n, seed=0, rows=3):
    """Float32 maps ``[rows, n]`` of one awkward kind, finite."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, n))
    if kind == "ties":
        x = np.round(x * 3) / 3
    elif kind == "attention":
        x = rng.uniform(0, 1, (rows, n)) ** 4 * 7
    elif kind == "huge":
        x = np.clip(x * 1e38, -3.4e38, 3.4e38)
    elif kind == "magnitudes":
        x = np.sign(x) * 10.0 ** rng.uniform(-38, 38, (rows, n))
    elif kind == "denormal":
        x = x * 1e-42
    elif kind == "constant":
        x = np.repeat(x[:, :1], n, axis=1)
    elif kind == "zeros":
        x = np.where(x > 0, 0.0, -0.0)
    elif kind == "sparse":
        x = np.where(x > 0.8, x, 0.0)
    elif kind == "offset":
        x = x * 20 + 1e6
    elif kind == "gap":
        x = np.sort(x, axis=1)
        x[:, n - max(1, n // 4) :] += 40.0
    return torch.from_numpy(x.astype(np.float32))


KINDS = [
    "normal", "ties", "attention", "huge", "magnitudes", "denormal", "constant", "zeros", "sparse",
    "offset", "gap",
]  # fmt: skip


def numpy_overlap(maps, pairs, percentile):
    """The published evaluation: percentile, strict mask, logical and, logical or."""
    with np.errstate(all="ignore"):
        masks = [row > np.percentile(row, percentile) for row in maps.numpy()]
    both = [int(np.logical_and(masks[i], masks[j]).sum()) for i, j in pairs.tolist()]
    either = [int(np.logical_or(masks[i], masks[j]).sum()) for i, j in pairs.tolist()]
    iou = [b / e if e else 0.0 for b, e in zip(both, either, strict=True)]
    return np.array(iou, maps.numpy().dtype), either, [int(m.sum()) for m in masks]


@pytest.mark.parametrize("path", [ops.pairs_iou, reference.pairs_iou])
@pytest.mark.parametrize("percentile", [0.0, 12.5, 50.0, 70.0, 95.0, 99.99])
@pytest.mark.parametrize("kind", KINDS)
def test_hard_iou_equals_numpy_exactly(path, percentile, kind):
    for n in SIZES:
        maps = draw(kind, n, seed=n)
        iou, union, area = path(maps[None], PAIRS, percentile)
        expected, either, areas = numpy_overlap(maps, PAIRS, percentile)
        np.testing.assert_array_equal(iou[0].numpy(), expected, err_msg=f"n = {n}")
        assert union[0].tolist() == either
        assert area[0].tolist() == areas


def test_float64_percentile_equals_numpy_exactly():
    x = torch.randn(50, 333, dtype=torch.float64)
    for q in (0.0, 33.3, 70.0, 99.9):
        found = reference.percentile(x, q).numpy()
        np.testing.assert_array_equal(found, np.percentile(x.numpy(), q, axis=-1))


@pytest.mark.parametrize("path", [ops.pairs_iou, reference.pairs_iou])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_map_that_is_not_finite_never_gives_a_number(path, value):
    maps = torch.rand(2, 3, 100)
    maps[1, 2, 17] = value
    iou, union, area = path(maps, PAIRS, 70.0)
    assert iou[1].isnan().tolist() == [False, True, True, False]
    assert union[1, 1:3].tolist() == [-1, -1]
    assert area[1, 2] == -1
    assert not iou[0].isnan().any()
    assert (area[0] == 30).all()


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 1.0])
@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.3, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_topk_against_float64(kind, fraction, temperature):
    for n in SIZES:
        x = draw(kind, n, seed=n)
        mask = ops.soft_topk(x, fraction, temperature).double()
        expected = reference.soft_topk(x.double(), fraction, temperature)
        torch.testing.assert_close(mask, expected, rtol=0, atol=MASK)
        torch.testing.assert_close(expected.mean(-1), torch.full((3,), fraction).double())
        assert (mask.mean(-1) - fraction).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["normal", "attention", "offset", "gap", "sparse"])
def test_float32_reference_is_as_good(kind):
    x = draw(kind, 4096)
    expected = reference.soft_topk(x.double(), 0.3, 0.01)
    found = reference.soft_topk(x, 0.3, 0.01).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=MASK)


def sinkhorn_mask(x, fraction, gamma, iterations):
    """The published iteration over whole maps ``[M, N]``, until it has converged."""
    return presets.paper_soft_topk(x[:, None, :], fraction, gamma, iterations)[:, 0]


def test_closed_form_is_the_converged_transport():
    torch.manual_seed(0)
    x = torch.rand(4, 100).double()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    converged = sinkhorn_mask((x - low) / (high - low), 0.3, 0.05, 20_000)
    exact = reference.soft_topk(x, 0.3, 0.05)
    torch.testing.assert_close(exact, converged, rtol=0, atol=1e-10)
    native = ops.soft_topk(x.float(), 0.3, 0.05).double()
    torch.testing.assert_close(native, converged, rtol=0, atol=1e-6)


def test_closed_form_is_the_converged_transport_at_the_papers_gamma():
    torch.manual_seed(1)
    x = torch.rand(2, 1000).double()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    converged = sinkhorn_mask((x - low) / (high - low), 0.3, 0.01, 10_000)
    exact = reference.soft_topk(x, 0.3, 0.01)
    torch.testing.assert_close(exact, converged, rtol=0, atol=1e-10)
    native = ops.soft_topk(x.float(), 0.3, 0.01).double()
    torch.testing.assert_close(native, converged, rtol=0, atol=1e-6)


def compare_gradients(native, expected, x, temperature):
    """Absolute bound in units of 2 / (temperature * range), and no NaN."""
    span = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)).double()
    error = (native.double() - expected).abs() * span * temperature / 2
    assert native.isfinite().all()
    assert error.max() <= GRADIENT


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 1.0])
@pytest.mark.parametrize("kind", ["normal", "ties", "attention", "constant", "sparse", "gap"])
def test_gradients_against_float64(kind, temperature):
    for n in SIZES:
        x = draw(kind, n, seed=n)
        native, expected = x.clone().requires_grad_(), x.double().requires_grad_()
        upstream = torch.randn(3, n)
        (ops.soft_topk(native, 0.3, temperature) * upstream).sum().backward()
        (reference.soft_topk(expected, 0.3, temperature) * upstream.double()).sum().backward()
        compare_gradients(native.grad, expected.grad, x, temperature)

        native, expected = x.clone().requires_grad_(), x.double().requires_grad_()
        upstream = torch.randn(1, len(PAIRS))
        iou = ops.soft_iou(native[None], PAIRS, 0.3, temperature)
        wanted = reference.soft_iou(expected[None], PAIRS, 0.3, temperature)
        torch.testing.assert_close(iou.double(), wanted, rtol=0, atol=IOU)
        (iou * upstream).sum().backward()
        (wanted * upstream.double()).sum().backward()
        compare_gradients(native.grad, expected.grad, x, temperature)


def test_constant_map_has_the_fraction_everywhere_and_no_gradient():
    x = torch.full((2, 50), 3.0, requires_grad=True)
    for path in (ops.soft_topk, reference.soft_topk):
        mask = path(x, 0.3, 0.01)
        torch.testing.assert_close(mask, torch.full((2, 50), 0.3))
        (grad,) = torch.autograd.grad((mask * torch.randn(2, 50)).sum(), x)
        assert (grad == 0).all()


def test_soft_ops_pass_nan_on():
    x = torch.rand(3, 64)
    x[1, 5] = math.nan
    for path in (ops.soft_topk, reference.soft_topk):
        mask = path(x, 0.3, 0.01)
        assert mask[1].isnan().all()
        assert mask[[0, 2]].isfinite().all()
        x[1, 5] = math.inf
        assert path(x, 0.3, 0.01)[1].isnan().all()
    for path in (ops.soft_iou, reference.soft_iou):
        assert path(x[None], PAIRS, 0.3, 0.01).isnan().tolist() == [[True, True, False, True]]


def test_gradient_of_a_map_with_nan_is_nan_not_zero():
    x = torch.rand(1, 2, 64)
    x[0, 0, 3] = math.nan
    x.requires_grad_()
    ops.soft_iou(x, PAIRS[:1], 0.3, 0.01).sum().backward()
    assert x.grad[0, 0].isnan().all()


def test_maps_that_no_pair_names_cost_no_gradient():
    x = torch.rand(2, 4, 100)
    x[:, 3] = math.nan
    x.requires_grad_()
    iou = ops.soft_iou(x, torch.tensor([[0, 2]]), 0.3, 0.01)
    iou.sum().backward()
    assert iou.isfinite().all()
    assert (x.grad[:, [1, 3]] == 0).all()
    assert (x.grad[:, [0, 2]] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    maps = (torch.rand(2, 3, 100) * 60).to(dtype)
    for q in (50.0, 70.0):
        for half, full in zip(
            ops.pairs_iou(maps, PAIRS, q), ops.pairs_iou(maps.float(), PAIRS, q), strict=True
        ):
            assert torch.equal(half, full)
    maps.requires_grad_()
    iou = ops.soft_iou(maps, PAIRS, 0.3, 0.01)
    assert iou.dtype == torch.float32
    assert torch.equal(iou, ops.soft_iou(maps.detach().float(), PAIRS, 0.3, 0.01))
    iou.sum().backward()
    assert maps.grad.dtype == dtype
    assert maps.grad.isfinite().all()


def test_strided_inputs():
    base = torch.rand(50, 3, 2, 2)
    maps = base[..., 0].permute(2, 1, 0)  # [2, 3, 50]
    pairs = torch.stack((PAIRS, PAIRS))[0].T.contiguous().T
    assert not maps.is_contiguous()
    assert not pairs.is_contiguous()
    for strided, packed in zip(
        ops.pairs_iou(maps, pairs, 70.0),
        ops.pairs_iou(maps.contiguous(), PAIRS, 70.0),
        strict=True,
    ):
        assert torch.equal(strided, packed)
    x, y = maps.clone().requires_grad_(), maps.detach().contiguous().requires_grad_()
    ops.soft_iou(x, pairs, 0.3, 0.01).sum().backward()  # expanded upstream gradient, too
    ops.soft_iou(y, PAIRS, 0.3, 0.01).sum().backward()
    assert torch.equal(x.grad, y.grad)
    z, w = maps[0].clone().T.requires_grad_(), maps[0].T.contiguous().requires_grad_()
    ops.soft_topk(z, 0.3, 0.01)[:, 1].sum().backward()
    ops.soft_topk(w, 0.3, 0.01)[:, 1].sum().backward()
    assert torch.equal(z.grad, w.grad)


def test_empty_batches_and_no_pairs():
    none = PAIRS[:0]
    for maps, pairs in ((torch.rand(0, 3, 10), PAIRS), (torch.rand(2, 3, 10), none)):
        for path in (ops, reference):
            x = maps.clone().requires_grad_()
            iou, union, area = path.pairs_iou(x.detach(), pairs, 70.0)
            assert iou.shape == union.shape == (maps.shape[0], len(pairs))
            assert area.shape == maps.shape[:2]
            soft = path.soft_iou(x, pairs, 0.3, 0.01)
            assert soft.shape == iou.shape
            soft.sum().backward()
            assert torch.equal(x.grad, torch.zeros_like(x))
    assert ops.soft_topk(torch.rand(0, 10), 0.3, 0.01).shape == (0, 10)


def test_results_do_not_depend_on_threads_or_batch():
    maps = torch.rand(16, 3, 4096)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            x = maps.clone().requires_grad_()
            soft = ops.soft_iou(x, PAIRS, 0.3, 0.01)
            soft.sum().backward()
            results.append((ops.pairs_iou(maps, PAIRS, 70.0).iou, soft.detach(), x.grad))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    alone = torch.cat([ops.soft_iou(maps[i : i + 1], PAIRS, 0.3, 0.01) for i in range(16)])
    assert torch.equal(alone, results[0][1])


def test_gradcheck_in_float64():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 9, dtype=torch.float64, requires_grad=True)

    def fixed_range(x):  # the range is a constant of the gradient: hold it fixed here, too
        ends = torch.tensor([[-0.5, 1.5]], dtype=x.dtype)
        return torch.cat((x, ends.expand(*x.shape[:-1], 2)), dim=-1)

    def soft_topk(x):
        return ops.soft_topk(fixed_range(x[0]), 0.3, 0.5)

    def soft_iou(x):
        return ops.soft_iou(fixed_range(x), PAIRS, 0.3, 0.5)

    assert torch.autograd.gradcheck(soft_topk, x)
    assert torch.autograd.gradcheck(soft_iou, x)
    assert torch.autograd.gradgradcheck(soft_topk, x)


def test_a_second_derivative_through_the_native_op_is_refused():
    x = torch.rand(2, 64, requires_grad=True)
    iou = ops.soft_iou(x[None], torch.tensor([[0, 1]]), 0.3, 0.1)
    for value in (ops.soft_topk(x, 0.3, 0.1)[:, 0].sum(), iou.sum()):
        (plain,) = torch.autograd.grad(value, x, retain_graph=True)
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        assert torch.equal(gradient, plain)
        with pytest.raises(RuntimeError, match="first derivatives only.*BIASMAP_BACKEND=reference"):
            torch.autograd.grad(gradient.square().sum(), x)


def samples():
    maps, x = torch.rand(2, 3, 70), torch.rand(4, 70)
    op = torch.ops.biasmap
    mask, state = op.soft_topk(x, 0.3, 0.01)
    iou, states, means = op.soft_iou(maps, PAIRS, 0.3, 0.01)
    return {
        "pairs_iou": (maps, PAIRS, 70.0),
        "soft_topk": (x, 0.3, 0.01),
        "soft_topk_backward": (torch.rand(4, 70), x, 0.3, 0.01, mask, state),
        "soft_iou": (maps, PAIRS, 0.3, 0.01),
        "soft_iou_backward": (torch.rand(2, 4), maps, PAIRS, 0.3, 0.01, iou, states, means),
    }


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.biasmap, name).default, samples()[name])


# torch 2.13's own tracing of an autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph_with_its_gradient():
    maps = torch.rand(2, 3, 70)

    def energy(x):
        return ops.soft_iou(x, PAIRS, 0.3, 0.01).mean() + ops.soft_topk(x[0], 0.3, 0.01)[0, 0]

    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    a, b = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    energy(a).backward()
    compiled(b).backward()
    assert torch.equal(a.grad, b.grad)


def test_the_reference_exports():
    class Graph(torch.nn.Module):
        def forward(self, x):
            return reference.pairs_iou(x, PAIRS, 70.0)[0], reference.soft_iou(x, PAIRS, 0.3, 0.01)

    x = torch.rand(2, 3, 70)
    exported = torch.export.export(Graph(), (x,))
    names = {str(node.target) for node in exported.graph.nodes}
    assert not any("biasmap" in name for name in names)
    for found, expected in zip(exported.module()(x), Graph()(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_forced_backends(monkeypatch):
    x = torch.rand(2, 64)
    native = ops.soft_topk(x, 0.3, 0.01)
    monkeypatch.setenv("BIASMAP_BACKEND", "reference")
    assert torch.equal(ops.soft_topk(x, 0.3, 0.01), reference.soft_topk(x, 0.3, 0.01))
    monkeypatch.setenv("BIASMAP_BACKEND", "native")
    assert torch.equal(ops.soft_topk(x, 0.3, 0.01), native)
    with pytest.raises(ValueError, match="BIASMAP_BACKEND=native, .* got float64 on cpu"):
        ops.soft_topk(x.double(), 0.3, 0.01)
    with pytest.raises(ValueError, match="got float32 on meta"):
        ops.soft_topk(x.to("meta"), 0.3, 0.01)
    monkeypatch.setenv("BIASMAP_BACKEND", "fast")
    with pytest.raises(ValueError, match="must be 'reference' or 'native', got 'fast'"):
        ops.soft_topk(x, 0.3, 0.01)
