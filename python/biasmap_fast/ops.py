"""The ops: registered natives on the CPU, `reference` for everything else, autograd around both.

``BIASMAP_BACKEND=reference|native`` forces a path. Left alone, float32, float16 and bfloat16 on the
CPU take the native kernels; float64 and other devices take the reference. Half types are computed,
and returned, in float32.

Registered with ``torch.library.define``/``impl`` under a plain ``autograd.Function``: 3 us a call
against 10 us for ``custom_op`` (with a gradient 7.3 against 15.7).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import _C, reference

if TYPE_CHECKING:
    from collections.abc import Callable

_BACKENDS = ("reference", "native")

_SCHEMAS = (
    "pairs_iou(Tensor maps, Tensor pairs, float percentile)"
    " -> (Tensor iou, Tensor union, Tensor area)",
    "soft_topk(Tensor x, float fraction, float temperature) -> (Tensor mask, Tensor state)",
    "soft_topk_backward(Tensor grad, Tensor mask, Tensor state) -> Tensor",
    "soft_iou(Tensor maps, Tensor pairs, float fraction, float temperature)"
    " -> (Tensor iou, Tensor state)",
    "soft_iou_backward(Tensor grad, Tensor iou, Tensor maps, Tensor pairs, Tensor state,"
    " float fraction) -> Tensor",
)


class PairsIoU(NamedTuple):
    """What :func:`pairs_iou` returns."""

    iou: torch.Tensor  # [B, P] float; 0 if the union is empty, NaN if a map is not finite
    union: torch.Tensor  # [B, P] int32 pixels; -1 if a map is not finite
    area: torch.Tensor  # [B, K] int32 pixels in each mask; -1 if the map is not finite


def pairs_iou(maps: torch.Tensor, pairs: torch.Tensor, percentile: float) -> PairsIoU:
    """Hard percentile IoU of concept pairs ``[P, 2]`` on maps ``[B, K, N]``; no gradient."""
    maps = _widen(maps.detach())
    if _use_native(maps):
        return PairsIoU(*torch.ops.biasmap.pairs_iou(maps, pairs, percentile))
    return PairsIoU(*reference.pairs_iou(maps, pairs.to(maps.device), percentile))


def soft_topk(x: torch.Tensor, fraction: float, temperature: float) -> torch.Tensor:
    """Exact soft top-k mask of each row of ``[M, N]``, differentiable; see `reference`."""
    x = _widen(x)
    if not _use_native(x):
        return reference.soft_topk(x, fraction, temperature)
    mask: torch.Tensor
    mask, _ = _SoftTopk.apply(x, fraction, temperature)  # type: ignore[no-untyped-call]
    return mask


def soft_iou(
    maps: torch.Tensor, pairs: torch.Tensor, fraction: float, temperature: float
) -> torch.Tensor:
    """SoftIoU ``[B, P]`` of pairs ``[P, 2]`` on maps ``[B, K, N]``, differentiable."""
    maps = _widen(maps)
    if not _use_native(maps):
        return reference.soft_iou(maps, pairs.to(maps.device), fraction, temperature)
    iou: torch.Tensor
    iou, _ = _SoftIoU.apply(maps, pairs, fraction, temperature)  # type: ignore[no-untyped-call]
    return iou


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _use_native(x: torch.Tensor) -> bool:
    possible = x.device.type == "cpu" and x.dtype == torch.float32
    forced = os.environ.get("BIASMAP_BACKEND", "")
    if forced and forced not in _BACKENDS:
        raise ValueError(f"BIASMAP_BACKEND must be 'reference' or 'native', got {forced!r}")
    if forced == "native" and not possible:
        raise ValueError(
            "BIASMAP_BACKEND=native, but the native kernels take float32, float16 and bfloat16 on "
            f"the CPU, got {str(x.dtype).removeprefix('torch.')} on {x.device}"
        )
    return possible and forced != "reference"


def _refuse_create_graph() -> None:
    # once_differentiable would drop second derivatives in silence where `grad` is a constant.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the native ops have first derivatives only; for create_graph=True use float64 or set "
            "BIASMAP_BACKEND=reference"
        )


class _SoftTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor, fraction: float, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask, state = torch.ops.biasmap.soft_topk(x, fraction, temperature)
        return mask, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        mask, state = output
        ctx.mark_non_differentiable(state)
        ctx.save_for_backward(mask, state)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        _refuse_create_graph()
        mask, state = ctx.saved_tensors
        return torch.ops.biasmap.soft_topk_backward(grad, mask, state), None, None


class _SoftIoU(torch.autograd.Function):
    @staticmethod
    def forward(
        maps: torch.Tensor, pairs: torch.Tensor, fraction: float, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        iou, state = torch.ops.biasmap.soft_iou(maps, pairs, fraction, temperature)
        return iou, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        maps, pairs, fraction, _ = inputs
        iou, state = output
        ctx.mark_non_differentiable(state)
        ctx.save_for_backward(iou, maps, pairs, state)
        ctx.fraction = fraction

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        _refuse_create_graph()
        grad_maps = torch.ops.biasmap.soft_iou_backward(grad, *ctx.saved_tensors, ctx.fraction)
        return grad_maps, None, None, None


# The kernels behind the schemas: torch allocates, C++ fills. Every tensor is float32 on the CPU.


def _pairs_iou(maps: torch.Tensor, pairs: torch.Tensor, percentile: float) -> PairsIoU:
    out = _pairs_iou_outputs(maps, pairs, percentile)
    words = (maps.shape[2] + 63) // 64
    masks = maps.new_empty((*maps.shape[:2], words), dtype=torch.int64)
    _C.pairs_iou(maps.contiguous(), pairs.contiguous(), percentile, *out, masks)
    return out


def _pairs_iou_outputs(maps: torch.Tensor, pairs: torch.Tensor, percentile: float) -> PairsIoU:
    batch, concepts = maps.shape[:2]
    return PairsIoU(
        maps.new_empty(batch, pairs.shape[0]),
        maps.new_empty(batch, pairs.shape[0], dtype=torch.int32),
        maps.new_empty(batch, concepts, dtype=torch.int32),
    )


def _soft_topk(
    x: torch.Tensor, fraction: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out = _soft_topk_outputs(x, fraction, temperature)
    _C.soft_topk(x.contiguous(), fraction, temperature, *out)
    return out


def _soft_topk_outputs(
    x: torch.Tensor, fraction: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 4)


def _soft_topk_backward(
    grad: torch.Tensor, mask: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    out = _soft_topk_backward_outputs(grad, mask, state)
    _C.soft_topk_backward(grad.contiguous(), mask.contiguous(), state, out)
    return out


def _soft_topk_backward_outputs(
    grad: torch.Tensor, mask: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    return mask.new_empty(mask.shape)


def _soft_iou(
    maps: torch.Tensor, pairs: torch.Tensor, fraction: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out = _soft_iou_outputs(maps, pairs, fraction, temperature)
    _C.soft_iou(maps.contiguous(), pairs.contiguous(), fraction, temperature, *out)
    return out


def _soft_iou_outputs(
    maps: torch.Tensor, pairs: torch.Tensor, fraction: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, concepts = maps.shape[:2]
    return maps.new_empty(batch, pairs.shape[0]), maps.new_empty(batch, concepts, 4)


def _soft_iou_backward(
    grad: torch.Tensor,
    iou: torch.Tensor,
    maps: torch.Tensor,
    pairs: torch.Tensor,
    state: torch.Tensor,
    fraction: float,
) -> torch.Tensor:
    out = _soft_iou_backward_outputs(grad, iou, maps, pairs, state, fraction)
    maps, pairs = maps.contiguous(), pairs.contiguous()
    _C.soft_iou_backward(grad.contiguous(), iou, maps, pairs, state, fraction, out)
    return out


def _soft_iou_backward_outputs(
    grad: torch.Tensor,
    iou: torch.Tensor,
    maps: torch.Tensor,
    pairs: torch.Tensor,
    state: torch.Tensor,
    fraction: float,
) -> torch.Tensor:
    return maps.new_empty(maps.shape)


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "pairs_iou": (_pairs_iou, _pairs_iou_outputs),
    "soft_topk": (_soft_topk, _soft_topk_outputs),
    "soft_topk_backward": (_soft_topk_backward, _soft_topk_backward_outputs),
    "soft_iou": (_soft_iou, _soft_iou_outputs),
    "soft_iou_backward": (_soft_iou_backward, _soft_iou_backward_outputs),
}

# The definitions last as long as this object.
_LIBRARY = torch.library.Library("biasmap", "DEF")  # type: ignore[no-untyped-call]
for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _kernel, _outputs = _KERNELS[_name]
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _kernel, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"biasmap::{_name}", _outputs, lib=_LIBRARY)
