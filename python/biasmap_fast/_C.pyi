# ruff: noqa: N999
"""Native kernels, on the CPU and, where compiled, on a GPU.

Outputs are allocated by the caller (see ops.py). All tensors of a call are on one device; on a GPU,
``pairs`` may be on the CPU. Maps and queries are float32, on a GPU also float16 or bfloat16.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__version__: str
pairs_by_value: int  # most pairs that may be on the CPU with maps on a GPU
most_concepts_on_gpu: int
most_tokens: int

def build_info() -> dict[str, Any]: ...
def mask_words(maps: Tensor) -> int: ...  # [B, K, N]: last size of the scratch of pairs_iou
def pairs_iou(
    maps: Tensor,  # [B, K, N]
    pairs: Tensor,  # [P, 2] int64
    percentile: float,
    iou: Tensor,  # [B, P] out
    union: Tensor,  # [B, P] int32 out
    area: Tensor,  # [B, K] int32 out
    masks: Tensor,  # [B, K, mask_words(maps)] int64 scratch
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
def concept_map(
    query: Tensor,  # [B, heads, n, d], any strides, on a GPU
    keys: Tensor,  # [heads, T', d]
    weights: Tensor,  # [K, T']
    maps: Tensor,  # [B, K, n] out
    add: bool,  # to what is in `maps`
) -> None: ...
def concept_map_backward(
    grad: Tensor,  # [B, K, n]
    query: Tensor,  # [B, heads, n, d], any strides, on a GPU
    keys: Tensor,  # [heads, T', d]
    weights: Tensor,  # [K, T']
    grad_query: Tensor,  # like `query`, out
) -> None: ...
def prompt_maps(
    query: Tensor,  # [B, n, heads * d], any strides, on the CPU
    keys: Tensor,  # [heads, U, d], of the different tokens
    members: Tensor,  # [P, U], how often a prompt has each
    weights: Tensor,  # [P, K, U]
    maps: Sequence[Tensor],  # [P', B, K, n], pixels in a row: the first P' prompts' are added
) -> None: ...
