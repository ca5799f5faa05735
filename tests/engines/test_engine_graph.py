"""The pieces of the exported graphs, each against autograd or torch's own operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from biasmap_fast import reference
from biasmap_fast.engines import gradient as gradients
from biasmap_fast.engines.graph import upsampled

aten = torch.ops.aten


def traced_gradient(function, x, *others):
    """d sum(f(x)^2) / dx by a graph that was traced with the decompositions."""

    def gradient(x, *others):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad((function(x, *others) ** 2).sum(), x)
        return found

    table = gradients.decompositions()
    graph = make_fx(gradient, decomposition_table=table, tracing_mode="fake")(x, *others)
    operators = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert not operators & set(table)
    return graph(x, *others), gradient(x, *others)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [(3, 1, 1, 1, 1), (3, 2, 1, 1, 1), (1, 1, 0, 1, 1), (3, 2, 0, 1, 2), (3, 1, 2, 2, 1)],
)
@pytest.mark.parametrize("size", [(8, 8), (9, 6)])
def test_convolution_backward(kernel, stride, padding, dilation, groups, size):
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    weight = torch.randn(6, 4 // groups, kernel, kernel, dtype=torch.float64)

    def convolution(x, weight):
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    found, expected = traced_gradient(convolution, x, weight)
    torch.testing.assert_close(found, expected)


def test_convolution_backward_knows_its_limits():
    grad, x, weight = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
    rest = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    backward = gradients.convolution_backward
    assert backward(grad, x, weight, None, *rest, (False, False, False)) == (None, None, None)
    with pytest.raises(NotImplementedError, match="gradients of weights"):
        backward(grad, x, weight, None, *rest, (True, True, False))


@pytest.mark.parametrize("scale", [2, 3, (2, 4)])
def test_upsample_nearest2d_backward(scale):
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    found, expected = traced_gradient(lambda x: F.interpolate(x, scale_factor=scale), x)
    torch.testing.assert_close(found, expected)


def test_upsample_nearest2d_backward_knows_its_limits():
    with pytest.raises(NotImplementedError, match="upsampling of 4 x 4 to"):
        gradients.upsample_nearest2d_backward(torch.ones(1, 1, 6, 6), [6, 6], [1, 1, 4, 4])


@pytest.mark.parametrize("operator", ["group_norm", "layer_norm", "gelu", "silu", "softmax"])
def test_other_backwards(operator):
    def function(x):
        if operator == "group_norm":
            return F.group_norm(x, 2)
        if operator == "layer_norm":
            return F.layer_norm(x, x.shape[-1:])
        return x.softmax(-1) if operator == "softmax" else getattr(F, operator)(x)

    found, expected = traced_gradient(function, torch.randn(2, 4, 5, 6, dtype=torch.float64))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("source", [(1, 1), (4, 4), (2, 3), (8, 5)])
@pytest.mark.parametrize("size", [(8, 8), (16, 20)])
def test_upsampled_is_bilinear_resizing(source, size):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, *source, generator=generator, requires_grad=True)
    expected = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    found = upsampled(maps, *size)
    torch.testing.assert_close(found, expected)
    ahead = torch.randn(found.shape, generator=generator)
    # The mean over the pixels, as a sum of hundreds rounds by more than what is compared here.
    means = [(resized * ahead).mean(dim=(-2, -1)).sum() for resized in (found, expected)]
    gradients = [torch.autograd.grad(mean, maps)[0] for mean in means]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_traced_soft_topk(fraction):
    """A traced graph cannot stop early, and takes fewer steps than the loop may."""
    rows = torch.randn(32, 200, generator=torch.Generator().manual_seed(0))
    rows[8:16] = rows[8:16].round(decimals=1)  # ties
    rows[16:24] = (rows[16:24] > 1.5) * 5 + 1e-3 * rows[16:24]  # a gap
    expected = reference.soft_topk(rows, fraction, 0.01)
    traced = make_fx(lambda x: reference.soft_topk(x, fraction, 0.01), tracing_mode="fake")(rows)
    torch.testing.assert_close(traced(rows), expected, atol=2e-6, rtol=0)


def test_padding_has_no_share():
    query, keys = torch.randn(2, 3, 10, 4), torch.randn(3, 5, 4)
    weights = torch.rand(2, 5)
    padded = torch.cat([keys, torch.randn(3, 2, 4)], dim=1)
    bias = torch.tensor([0.0] * 5 + [-1e4] * 2)[:, None]
    more = torch.cat([weights, torch.rand(2, 2)], dim=1)
    torch.testing.assert_close(
        reference.concept_map(query, padded, more, bias=bias),
        reference.concept_map(query, keys, weights),
    )
