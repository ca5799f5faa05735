"""The ops: registered natives, `reference` for everything else, autograd around both.

``BIASMAP_BACKEND=reference|native`` forces a path. Left alone, float32, float16 and bfloat16 take
the native kernels: on the CPU, and on a GPU if the package was built with CUDA (see ``biasmap
env``). Float64 and other devices take the reference. Half types are computed, and returned, in
float32.

On the CPU `concept_map` is the reference's, and `add_prompt_maps` what records: it has no gradient.

On a GPU nothing waits for it. Pairs of concepts may stay on the CPU, where they are checked: up to
1024 of them travel with the launch. Those on the GPU are not checked: a pair of concepts that there
are not gives NaN.

Registered with ``torch.library.define``/``impl`` under a plain ``autograd.Function``: 3 us a call
against 10 us for ``custom_op`` (with a gradient 7.3 against 15.7).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import _C, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    "concept_map(Tensor query, Tensor keys, Tensor weights) -> Tensor",
    "concept_map_backward(Tensor grad, Tensor query, Tensor keys, Tensor weights) -> Tensor",
    "add_concept_map(Tensor(a!) maps, Tensor query, Tensor keys, Tensor weights) -> ()",
)

_HALF = (torch.float16, torch.bfloat16)
_HAS_CUDA = bool(_C.build_info()["cuda"])


class PairsIoU(NamedTuple):
    """What :func:`pairs_iou` returns."""

    iou: torch.Tensor  # [B, P] float; 0 if the union is empty, NaN if a map is not finite
    union: torch.Tensor  # [B, P] int32 pixels; -1 if a map is not finite
    area: torch.Tensor  # [B, K] int32 pixels in each mask; -1 if the map is not finite


def pairs_iou(maps: torch.Tensor, pairs: torch.Tensor, percentile: float) -> PairsIoU:
    """Hard percentile IoU of concept pairs ``[P, 2]`` on maps ``[B, K, N]``; no gradient."""
    maps = maps.detach()
    if _use_native(maps, maps.shape[1]):
        maps = _readable(maps)
        return PairsIoU(*torch.ops.biasmap.pairs_iou(maps, _at_hand(pairs, maps), percentile))
    return PairsIoU(*reference.pairs_iou(_widen(maps), pairs.to(maps.device), percentile))


def soft_topk(x: torch.Tensor, fraction: float, temperature: float) -> torch.Tensor:
    """Exact soft top-k mask of each row of ``[M, N]``, differentiable; see `reference`."""
    if not _use_native(x):
        return reference.soft_topk(_widen(x), fraction, temperature)
    mask: torch.Tensor
    mask, _ = _SoftTopk.apply(_readable(x), fraction, temperature)  # type: ignore[no-untyped-call]
    return mask


def soft_iou(
    maps: torch.Tensor, pairs: torch.Tensor, fraction: float, temperature: float
) -> torch.Tensor:
    """SoftIoU ``[B, P]`` of pairs ``[P, 2]`` on maps ``[B, K, N]``, differentiable."""
    if not _use_native(maps, maps.shape[1]):
        return reference.soft_iou(_widen(maps), pairs.to(maps.device), fraction, temperature)
    maps = _readable(maps)
    pairs = _at_hand(pairs, maps)
    iou: torch.Tensor
    iou, _ = _SoftIoU.apply(maps, pairs, fraction, temperature)  # type: ignore[no-untyped-call]
    return iou


def concept_map(query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Attribution maps ``[B, K, n]`` of one layer, differentiable in the queries; see `reference`.

    Args:
        query: ``[B, heads, n, d]``, any floating dtype, any strides.
        keys: ``[heads, T', d]`` attribution keys, already divided by sqrt(d).
        weights: ``[K, T']``, the pieces of each concept.
    """
    if not _use_native_attention(query, keys, weights):
        return reference.concept_map(query, keys, weights)
    maps: torch.Tensor = _ConceptMap.apply(query, keys, weights)  # type: ignore[no-untyped-call]
    return maps


def add_concept_map(
    maps: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor
) -> None:
    """Adds `concept_map` of the arguments to contiguous ``maps`` ``[B, K, n]``; no gradient."""
    if _use_native_attention(query, keys, weights):
        torch.ops.biasmap.add_concept_map(maps, query, keys, weights)
    else:
        maps += reference.concept_map(query, keys, weights)


def add_prompt_maps(
    maps: Sequence[torch.Tensor],
    query: torch.Tensor,
    keys: torch.Tensor,
    members: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Adds the maps of P prompts with U different tokens among them; where `fused_prompts` says so.

    Args:
        maps: ``[P', B, K, n]`` float32 each, a map's pixels in a row; those of the first P' prompts
            are added.
        query: ``[B, n, heads * d]``, any floating dtype, any strides.
        keys: ``[heads, U, d]`` float32 attribution keys, already divided by sqrt(d).
        members: ``[P, U]`` float32, how often each prompt has a token.
        weights: ``[P, K, U]`` float32, the pieces of each concept.
    """
    if query.requires_grad or query.dtype != torch.float32:
        query = query.detach().float()
    _C.prompt_maps(query, keys, members, weights, maps)


def fused_prompts(keys: torch.Tensor) -> bool:
    """Whether `add_prompt_maps` takes prompts whose keys are where, and of the type, of these."""
    return keys.device.type == "cpu" and keys.dtype == torch.float32 and _forced() != "reference"


def fused_attention(query: torch.Tensor, keys: torch.Tensor | None = None) -> bool:
    """Whether `add_concept_map` of such a tensor is one launch, which stores no attention.

    Args:
        query: or anything else on the device and of the type in question.
        keys: ``[..., T', d]``; without, of a number of tokens that the kernel takes.
    """
    possible = query.is_cuda and _HAS_CUDA and query.dtype in (torch.float32, *_HALF)
    if keys is not None:
        possible &= keys.dtype == torch.float32 and keys.shape[-2] <= _C.most_tokens
    return possible and _forced() != "reference"


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in _HALF else x


def _readable(x: torch.Tensor) -> torch.Tensor:
    """``x`` as the kernels of its device read it: those of the CPU know float32 only."""
    return x if x.is_cuda else _widen(x)


def _at_hand(pairs: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Pairs where the kernels find them: on a GPU only if they are too many for a launch."""
    if maps.is_cuda and not pairs.is_cuda and pairs.shape[0] > _C.pairs_by_value:
        return pairs.to(maps.device)
    return pairs


def _forced() -> str:
    forced = os.environ.get("BIASMAP_BACKEND", "")
    if forced and forced not in _BACKENDS:
        raise ValueError(f"BIASMAP_BACKEND must be 'reference' or 'native', got {forced!r}")
    return forced


def _use_native(x: torch.Tensor, concepts: int = 1) -> bool:
    on_gpu = x.is_cuda and _HAS_CUDA and concepts <= _C.most_concepts_on_gpu
    possible = (x.device.type == "cpu" or on_gpu) and x.dtype in (torch.float32, *_HALF)
    forced = _forced()
    if forced == "native" and not possible:
        places = "the CPU or a GPU" if _HAS_CUDA else "the CPU (this build has no CUDA kernels)"
        raise ValueError(
            "BIASMAP_BACKEND=native, but the native kernels take float32, float16 and bfloat16 on "
            f"{places}, on a GPU with {_C.most_concepts_on_gpu} concepts at most, got "
            f"{str(x.dtype).removeprefix('torch.')} on {x.device}, {concepts} concepts"
        )
    return possible and forced != "reference"


def _use_native_attention(query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> bool:
    return (
        fused_attention(query, keys)
        and weights.dtype == torch.float32
        and not (keys.requires_grad or weights.requires_grad)
    )


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
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        _refuse_create_graph()
        mask, state = ctx.saved_tensors
        return torch.ops.biasmap.soft_topk_backward(grad, mask, state).to(ctx.dtype), None, None


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


class _ConceptMap(torch.autograd.Function):
    @staticmethod
    def forward(query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = torch.ops.biasmap.concept_map(query, keys, weights)
        return maps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        _refuse_create_graph()
        return torch.ops.biasmap.concept_map_backward(grad, *ctx.saved_tensors), None, None


# The kernels behind the schemas: torch allocates, C++ fills.


def _floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _pairs_iou(maps: torch.Tensor, pairs: torch.Tensor, percentile: float) -> PairsIoU:
    out = _pairs_iou_outputs(maps, pairs, percentile)
    maps = maps.contiguous()
    masks = maps.new_empty((*maps.shape[:2], _C.mask_words(maps)), dtype=torch.int64)
    _C.pairs_iou(maps, pairs.contiguous(), percentile, *out, masks)
    return out


def _pairs_iou_outputs(maps: torch.Tensor, pairs: torch.Tensor, percentile: float) -> PairsIoU:
    batch, concepts = maps.shape[:2]
    return PairsIoU(
        _floats(maps, batch, pairs.shape[0]),
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
    return _floats(x, *x.shape), _floats(x, x.shape[0], 4)


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
    return _floats(maps, batch, pairs.shape[0]), _floats(maps, batch, concepts, 4)


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


def _concept_map(query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = _concept_map_outputs(query, keys, weights)
    _C.concept_map(query, keys.contiguous(), weights.contiguous(), out, False)
    return out


def _concept_map_outputs(
    query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return _floats(query, query.shape[0], weights.shape[0], query.shape[2])


def _concept_map_backward(
    grad: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    out = _concept_map_backward_outputs(grad, query, keys, weights)
    _C.concept_map_backward(grad.contiguous(), query, keys.contiguous(), weights.contiguous(), out)
    return out


def _concept_map_backward_outputs(
    grad: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    batch, heads, n, depth = query.shape
    return query.new_empty(batch, n, heads, depth).transpose(1, 2)  # as `to_q` lays it out


def _add_concept_map(
    maps: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor
) -> None:
    _C.concept_map(query, keys.contiguous(), weights.contiguous(), maps, True)


def _add_concept_map_outputs(
    maps: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor
) -> None:
    return None


_ANYWHERE, _ON_GPU = ("CPU", "CUDA"), ("CUDA",)
_KERNELS: dict[str, tuple[tuple[str, ...], Callable[..., Any], Callable[..., Any]]] = {
    "pairs_iou": (_ANYWHERE, _pairs_iou, _pairs_iou_outputs),
    "soft_topk": (_ANYWHERE, _soft_topk, _soft_topk_outputs),
    "soft_topk_backward": (_ANYWHERE, _soft_topk_backward, _soft_topk_backward_outputs),
    "soft_iou": (_ANYWHERE, _soft_iou, _soft_iou_outputs),
    "soft_iou_backward": (_ANYWHERE, _soft_iou_backward, _soft_iou_backward_outputs),
    "concept_map": (_ON_GPU, _concept_map, _concept_map_outputs),
    "concept_map_backward": (_ON_GPU, _concept_map_backward, _concept_map_backward_outputs),
    "add_concept_map": (_ON_GPU, _add_concept_map, _add_concept_map_outputs),
}

# The definitions last as long as this object.
_LIBRARY = torch.library.Library("biasmap", "DEF")  # type: ignore[no-untyped-call]
for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _places, _kernel, _outputs = _KERNELS[_name]
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    for _place in _places:
        _LIBRARY.impl(_name, _kernel, _place)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"biasmap::{_name}", _outputs, lib=_LIBRARY)
