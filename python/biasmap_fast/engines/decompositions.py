"""Backward operators that ONNX does not know, written with those it knows.

The forward graph exports as it is. Of the gradient graph's operators torch 2.13's exporter lacks
three; norms, SiLU, GELU and softmax have decompositions in torch itself. The whole table of core
decompositions would bring ``aten.empty_permuted``, which it lacks too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten


def convolution_backward(
    grad: torch.Tensor,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, None, None]:
    """The gradient of a convolution's input: the transposed convolution of the gradient."""
    if transposed or output_mask[1] or output_mask[2]:
        raise NotImplementedError("gradients of weights and of transposed convolutions")
    if not output_mask[0]:
        return None, None, None
    left = [
        source.shape[2 + i]
        - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i])
        - dilation[i] * (weight.shape[2 + i] - 1)
        - 1
        for i in range(len(stride))
    ]
    found = aten.convolution.default(
        grad, weight, None, stride, padding, dilation, True, left, groups
    )
    return found, None, None


def upsample_nearest2d_backward(
    grad: torch.Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> torch.Tensor:
    """Each source pixel's gradient is the sum over its copies; for whole factors."""
    height, width = input_size[-2:]
    if output_size[0] % height or output_size[1] % width:
        raise NotImplementedError(f"upsampling of {height} x {width} to {list(output_size)}")
    rows, columns = output_size[0] // height, output_size[1] // width
    split = grad.reshape(*input_size[:-2], height, rows, width, columns)
    return split.sum(dim=(-3, -1))


def table() -> dict[Any, Callable[..., Any]]:
    """Operator -> decomposition, for `torch.fx.experimental.proxy_tensor.make_fx`."""
    from torch._decomp import get_decompositions

    known: dict[Any, Callable[..., Any]] = get_decompositions(
        [
            aten.native_group_norm_backward,
            aten.native_layer_norm_backward,
            aten.gelu_backward,
            aten.silu_backward,
            aten._softmax_backward_data,
        ]
    )
    return {
        **known,
        aten.convolution_backward.default: convolution_backward,
        aten.upsample_nearest2d_backward.default: upsample_nearest2d_backward,
    }
