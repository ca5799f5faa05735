# ruff: noqa: N999
"""Native overlap kernels. Float32 on the CPU; outputs are allocated by the caller (see ops.py)."""

from typing import Any

from torch import Tensor

__version__: str

def build_info() -> dict[str, Any]: ...
def pairs_iou(
    maps: Tensor,  # [B, K, N]
    pairs: Tensor,  # [P, 2] int64
    percentile: float,
    iou: Tensor,  # [B, P] out
    union: Tensor,  # [B, P] int32 out
    area: Tensor,  # [B, K] int32 out
    masks: Tensor,  # [B, K, ceil(N / 64)] int64 scratch
) -> None: ...
def soft_topk(
    x: Tensor,  # [M, N]
    fraction: float,
    temperature: float,
    mask: Tensor,  # [M, N] out
    state: Tensor,  # [M, 4] out
) -> None: ...
def soft_topk_backward(
    grad: Tensor,  # [M, N]
    mask: Tensor,  # [M, N]
    state: Tensor,  # [M, 4]
    grad_x: Tensor,  # [M, N] out
) -> None: ...
def soft_iou(
    maps: Tensor,  # [B, K, N]
    pairs: Tensor,  # [P, 2] int64
    fraction: float,
    temperature: float,
    iou: Tensor,  # [B, P] out
    state: Tensor,  # [B, K, 4] out
) -> None: ...
def soft_iou_backward(
    grad: Tensor,  # [B, P]
    iou: Tensor,  # [B, P]
    maps: Tensor,  # [B, K, N]
    pairs: Tensor,  # [P, 2] int64
    state: Tensor,  # [B, K, 4]
    fraction: float,
    grad_maps: Tensor,  # [B, K, N] out
) -> None: ...
