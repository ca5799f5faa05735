"""The graph with the gradient of the energy: its forward pass, and how the backward pass is traced.

torch's exporter cannot differentiate: the backward pass is traced operator by operator with fake
tensors, so that no activation is held. Three of its operators are written here with ones that ONNX
has; torch itself decomposes norms, SiLU, GELU and softmax. LayerNormalization is decomposed forward
as well, as TensorRT takes only its first output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..reference import soft_topk
from .graph import AttributionGraph
from .shapes import Shapes, Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Gradient:
    """The fixed sizes and the soft masks of one gradient graph; height and width of the latents."""

    height: int
    width: int
    tokens: int = 77  # of the text that draws
    prompts: int = 1  # most attribution prompts per image
    attribution_tokens: int = 16  # most tokens of an attribution prompt; shorter ones are padded
    concepts: int = 4  # most concepts of an attribution prompt
    fraction: float = 0.3
    temperature: float = 0.01

    @property
    def sizes(self) -> dict[str, int]:
        """Dimension name -> size."""
        varying = {"batch": 1, **asdict(self)}  # images take one run each
        return {name: varying[name] for name in Shapes.__dataclass_fields__}


class EnergyGraph(torch.nn.Module):
    """UNet -> noise prediction, maps, energy, SoftIoU of every two concepts, dE / d latents.

    ``E = sum over pairs of weight * SoftIoU``. The weight of any two concepts of any two prompts
    is an input ``pair_weights [1, P, K, P, K]``, 0 for padding.
    """

    def __init__(self, graph: AttributionGraph, fraction: float, temperature: float) -> None:
        super().__init__()
        self.graph = graph
        self.fraction = fraction
        self.temperature = temperature

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Inputs of `forward`, in order."""
        pairs = (1, "prompts", "concepts", "prompts", "concepts")
        return (*self.graph.inputs, Tensor("pair_weights", "float32", pairs))

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What `forward` returns, in order."""
        pairs = ("batch", "prompts", "concepts", "prompts", "concepts")
        return (
            *self.graph.outputs,
            Tensor("energy", "float32", ("batch",)),
            Tensor("soft_iou", "float32", pairs),
            Tensor("gradient", "float32", self.graph.inputs[0].shape),
        )

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One UNet call and the gradient of its energy."""
        *others, pair_weights = given
        latents = others[0].detach().requires_grad_()
        with torch.enable_grad():
            noise, maps = self.graph(latents, *others[1:])
            total = maps.sum(dim=2).flatten(-2).flatten(1, 2)  # [B, P * K, N]
            masks = soft_topk(total, self.fraction, self.temperature)
            both = masks @ masks.transpose(-1, -2)  # [B, P * K, P * K]
            area = masks.sum(dim=-1)
            soft_iou = both / (area[..., :, None] + area[..., None, :] - both)
            soft_iou = soft_iou.reshape(-1, *pair_weights.shape[1:])  # [B, P, K, P, K]
            energy = (pair_weights * soft_iou).flatten(1).sum(dim=1)  # [B]
            # Images do not meet in the UNet: the gradient of the sum is that of every image.
            (gradient,) = torch.autograd.grad(energy.sum(), latents)
        outputs = (noise, maps, energy, soft_iou, gradient.float())
        return tuple(value.detach() for value in outputs)


def traced(energy: EnergyGraph, example: Sequence[torch.Tensor]) -> Any:
    """The graph's operators, backward pass included, as a module for `torch.export`."""
    from torch.fx.experimental.proxy_tensor import make_fx

    module = make_fx(
        lambda *given: energy(*given),
        decomposition_table=decompositions(),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )(*example)
    return module.eval()


def fold(model: Any) -> None:
    """Folds constants; on a gradient graph the exporter's own rewriting takes minutes longer."""
    from onnx_ir.passes import common as passes
    from onnxscript.optimizer import fold_constants

    common: Any = passes
    common.InlinePass()(model)
    fold_constants(model, onnx_shape_inference=False)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator -> decomposition; the table of core decompositions has operators ONNX lacks."""
    from torch._decomp import get_decompositions

    known: dict[Any, Callable[..., Any]] = get_decompositions(
        [
            aten.native_group_norm_backward,
            aten.native_layer_norm,
            aten.native_layer_norm_backward,
            aten.gelu_backward,
            aten.silu_backward,
            aten._softmax_backward_data,
        ]
    )
    known[aten.convolution_backward.default] = convolution_backward
    known[aten.upsample_nearest2d_backward.default] = upsample_nearest2d_backward
    return known


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
    rest = [
        source.shape[2 + i]
        - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i])
        - dilation[i] * (weight.shape[2 + i] - 1)
        - 1
        for i in range(len(stride))
    ]
    gradient = aten.convolution.default(
        grad, weight, None, stride, padding, dilation, True, rest, groups
    )
    return gradient, None, None


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
    return grad.reshape(*input_size[:-2], height, rows, width, columns).sum(dim=(-3, -1))
