"""Every op in plain torch: the definition, the fallback, and what exports use."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._subclasses import FakeTensor


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    # No context at all unless it is needed, so that exports see none.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def concept_map(
    query: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor,
    *,
    per_head: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attribution maps of one cross-attention layer, from its queries.

    ``A = softmax over the T' tokens of (q k'^T / sqrt(d))``; a concept's column is the weighted
    sum over its pieces (BiasMap, arXiv 2509.13496). In the keys' dtype, under autocast too.

    Args:
        query: ``[B, heads, n, d]``, any floating dtype, any strides.
        keys: ``[heads, T', d]`` attribution keys, already divided by sqrt(d).
        weights: ``[K, T']``, the pieces of each concept.
        per_head: Keep heads apart instead of summing over them.
        bias: Added to the scores ``[B, heads, T', n]``; very negative for padding.

    Returns:
        ``[B, K, n]`` or ``[B, heads, K, n]``.
    """
    with _full_precision(keys.device):
        probabilities = attention(query, keys, bias)
        return weights @ (probabilities if per_head else probabilities.sum(dim=-3))


def attention(
    query: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention probabilities ``[B, heads, T', n]``; arguments as for :func:`concept_map`."""
    # Tokens before pixels: on a CPU a softmax over a last dimension of a dozen is 5 times slower.
    scores = keys @ query.to(keys.dtype).transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(dim=-2)


def percentile(x: torch.Tensor, percentile: float) -> torch.Tensor:
    """``numpy.percentile(x, percentile, axis=-1)``, bit for bit in float32 and float64.

    ``torch.quantile`` rounds differently and refuses large inputs.
    """
    n = x.shape[-1]
    position = (n - 1) * (percentile / 100.0)
    k = min(int(position), n - 1)
    top = x.topk(n - k, dim=-1).values  # descending; TopK exports, kthvalue does not
    below, above = top[..., -1], top[..., max(n - k - 2, 0)]
    t = position - k
    if t < 0.5:
        return below + (above - below) * t
    return above - (above - below) * (1.0 - t)


def pairs_iou(
    maps: torch.Tensor, pairs: torch.Tensor, q: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hard IoU of pairs ``[P, 2]`` on maps ``[B, K, N]``: ``mask = map > its q-th percentile``.

    Returns:
        IoU ``[B, P]``, 0 if the union is empty; pixels in the union ``[B, P]`` int32; pixels in
        each mask ``[B, K]`` int32. If a map has a non-finite value: NaN, -1 and -1.
    """
    finite = maps.isfinite().all(dim=-1)  # [B, K]
    masks = maps > percentile(maps, q).unsqueeze(-1)  # [B, K, N]
    area = masks.sum(dim=-1)
    first, second = pairs.unbind(dim=1)
    both = (masks[:, first] & masks[:, second]).sum(dim=-1)  # [B, P]
    union = area[:, first] + area[:, second] - both
    iou = both.to(maps.dtype) / union.clamp(min=1).to(maps.dtype)
    known = finite[:, first] & finite[:, second]
    return (
        iou.masked_fill(~known, math.nan),
        union.masked_fill(~known, -1).int(),
        area.masked_fill(~finite, -1).int(),
    )


def soft_topk(x: torch.Tensor, fraction: float, temperature: float) -> torch.Tensor:
    """The exact entropic-transport soft top-k mask of float32 or float64 rows ``[..., N]``.

    ``m = sigmoid((2 x - tau) / gamma)`` with tau such that ``mean(m) = fraction``, in (0, 1), and
    ``gamma = temperature * (max x - min x)``: the fixed point of the two-anchor transport in
    BiasMap (arXiv 2509.13496), the range being a constant of the gradient. A constant row gives
    ``fraction`` everywhere and gradient 0; a row with a non-finite value gives NaN.
    """
    mask: torch.Tensor
    mask, _ = _SoftTopk.apply(x, fraction, temperature)  # type: ignore[no-untyped-call]
    return mask


def soft_iou(
    maps: torch.Tensor, pairs: torch.Tensor, fraction: float, temperature: float
) -> torch.Tensor:
    """``sum(ab) / (sum a + sum b - sum(ab))`` ``[B, P]`` of the soft top-k masks of pairs."""
    masks = soft_topk(maps, fraction, temperature)  # [B, K, N]
    a, b = masks[:, pairs[:, 0]], masks[:, pairs[:, 1]]  # [B, P, N]
    both = (a * b).sum(dim=-1)
    return both / (a.sum(dim=-1) + b.sum(dim=-1) - both)


class _SoftTopk(torch.autograd.Function):
    # Differentiable twice, by the implicit function theorem.
    @staticmethod
    def forward(
        x: torch.Tensor, fraction: float, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = x.shape[-1]
        span = x.amax(dim=-1, keepdim=True) - x.amin(dim=-1, keepdim=True)
        slope = torch.where(span > 0, 2.0 / (temperature * span), 0.0)  # 2 / gamma
        slope = slope.masked_fill(~span.isfinite(), math.nan)
        # Around the hard threshold x - centre is exact, so that float32 is enough.
        rank = min(max(math.ceil(fraction * n), 1), n)
        centre = x.topk(rank, dim=-1).values[..., -1:]
        z = (x - centre) * slope
        return torch.sigmoid(z + _solve_offset(z, fraction)), slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        mask, slope = output
        ctx.mark_non_differentiable(slope)
        ctx.save_for_backward(mask, slope)

    @staticmethod
    def vmap(_: Any, in_dims: tuple[int, None, None], x: torch.Tensor, *settings: float) -> Any:
        x = x.movedim(in_dims[0], 0)
        return _SoftTopk.apply(x, *settings), (0, 0)  # type: ignore[no-untyped-call]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        mask, slope = ctx.saved_tensors
        weight = mask * (1.0 - mask)  # d sigmoid / dz
        total = weight.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mask.dtype).tiny)
        mean = (weight * grad).sum(dim=-1, keepdim=True) / total
        return slope * weight * (grad - mean), None, None


def _solve_offset(z: torch.Tensor, fraction: float) -> torch.Tensor:
    """The d ``[..., 1]`` with ``mean(sigmoid(z + d)) = fraction``: Newton inside a bracket."""
    # Of saturated pixels only the distance to 0 or 1 is summed, so that the root is exact.
    whole, part = divmod(fraction * z.shape[-1], 1.0)
    logit = math.log(fraction) - math.log1p(-fraction)
    low = logit - z.amax(dim=-1, keepdim=True)  # mean <= fraction here
    high = logit - z.amin(dim=-1, keepdim=True)  # mean >= fraction here
    offset = torch.zeros_like(low).clamp(low, high)
    # A traced graph has no values to exit on. 40 steps come within 3e-7 of the mask of 64, on maps
    # with gaps and with ties too.
    traced = not torch.compiler.is_compiling() and isinstance(z, FakeTensor)
    for step in range(40 if traced else 64):
        shifted = z + offset
        tail = torch.sigmoid(-shifted.abs())
        above = shifted >= 0
        count = above.sum(dim=-1, keepdim=True) - int(whole)
        excess = torch.where(above, -tail, tail).sum(dim=-1, keepdim=True) - part + count
        low = torch.where(excess <= 0, offset, low)
        high = torch.where(excess >= 0, offset, high)
        newton = offset - excess / (tail * (1.0 - tail)).sum(dim=-1, keepdim=True)
        usable = (newton > low) & (newton < high)
        if step >= 8 and step % 2 == 0:  # across a gap of the map's values Newton creeps
            usable = torch.zeros_like(usable)
        moved = torch.where(usable, newton, (low + high) / 2)
        change = (moved - offset).abs()
        offset = moved
        # Exported and compiled graphs have no exit: they take every step.
        if traced or torch.compiler.is_compiling():
            continue
        if not bool((change > 4 * torch.finfo(z.dtype).eps * offset.abs().clamp(min=1.0)).any()):
            break
    return offset
