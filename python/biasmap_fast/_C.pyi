# ruff: noqa: N999
"""Native kernels, on the CPU and, where compiled, on a GPU.

Outputs are allocated by the caller (see ops.py). All tensors of a call are on one device, but
``pairs``, which are on the CPU. Maps and queries are float32, on a GPU also float16 or bfloat16.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__version__: str
most_pairs_on_gpu: int
most_concepts_on_gpu: int
most_tokens: int

def build_info() -> dict[str, Any]: ...
def cuda_refusal(device: int) -> str: ...  # why a GPU cannot run the kernels; empty if it can
def pairs_iou(
    maps: Tensor,  # [B, K, N]
    pairs: Tensor,  # [P, 2] int64
    percentile: float,
    iou: Tensor,  # [B, P] out
    union: Tensor,  # [B, P] int32 out
    area: Tensor,  # [B, K] int32 out
    threshold: Tensor,  # [B, K] out
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
    x: Tensor,  # [M, N]
    fraction: float,
    temperature: float,
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
    means: Tensor,  # [B, K, K] out
) -> None: ...
def soft_iou_backward(
    grad: Tensor,  # [B, P]
    maps: Tensor,  # [B, K, N]
    pairs: Tensor,  # [P, 2] int64
    fraction: float,
    temperature: float,
    iou: Tensor,  # [B, P]
    state: Tensor,  # [B, K, 4]
    means: Tensor,  # [B, K, K]
    grad_maps: Tensor,  # [B, K, N] out
) -> None: ...
def concept_map(
    query: Tensor,  # [B, heads, n, d], on a GPU; d and strides multiples of 8, aligned
    keys: Tensor,  # [heads, T', d]
    weights: Tensor,  # [K, T']
    maps: Tensor,  # [B, K, n] out
    add: bool = False,  # to what is in `maps`
) -> None: ...
def concept_map_backward(
    grad: Tensor,  # [B, K, n]
    query: Tensor,  # [B, heads, n, d], as for concept_map
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
