"""The ops: registered natives, `reference` for everything else, autograd around both.

``BIASMAP_BACKEND=reference|native`` forces a path. Left alone, float32, float16 and bfloat16 take
the native kernels: on the CPU, and on every GPU that they were built for and whose driver is new
enough (`native_status`, ``biasmap env``). Float64, other devices and, on a GPU, more than 16
concepts or 1024 pairs take the reference. Half types are computed and returned in float32, under
autocast too. Nothing waits for a GPU: pairs of concepts lie on the CPU and travel with the launch.
After ``os.fork()`` the CPU's kernels run on one thread.

A plain ``autograd.Function`` around an op takes 3 us per call, against 10 us of ``custom_op``, and
has first derivatives under ``torch.func``, which ``register_autograd`` has not.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import _C, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PairsIoU(NamedTuple):
    """What :func:`pairs_iou` returns."""

    iou: torch.Tensor  # [B, P] float; 0 if the union is empty, NaN if a map is not finite
    union: torch.Tensor  # [B, P] int32 pixels; -1 if a map is not finite
    area: torch.Tensor  # [B, K] int32 pixels in each mask; -1 if the map is not finite


def pairs_iou(maps: torch.Tensor, pairs: torch.Tensor, percentile: float) -> PairsIoU:
    """Hard percentile IoU of concept pairs ``[P, 2]`` on maps ``[B, K, N]``; no gradient."""
    maps, pairs, native = _prepared(maps.detach(), pairs)
    run = _pairs_iou if native else reference.pairs_iou
    return PairsIoU(*run(maps, pairs, percentile)[:3])


def soft_topk(x: torch.Tensor, fraction: float, temperature: float) -> torch.Tensor:
    """Exact soft top-k mask of each row of ``[M, N]``, differentiable; see `reference`."""
    run = _soft_topk if (native := _use_native(x)) else reference.soft_topk
    return run(_widened(x, native), fraction, temperature)


def soft_iou(
    maps: torch.Tensor, pairs: torch.Tensor, fraction: float, temperature: float
) -> torch.Tensor:
    """SoftIoU ``[B, P]`` of pairs ``[P, 2]`` on maps ``[B, K, N]``, differentiable."""
    maps, pairs, native = _prepared(maps, pairs)
    run = _soft_iou if native else reference.soft_iou
    return run(maps, pairs, fraction, temperature)


def concept_map(query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`reference.concept_map`, differentiable in the queries; on a CPU the reference itself."""
    native = fused_attention(query, keys, weights)
    return (_concept_map if native else reference.concept_map)(query, keys, weights)


def add_concept_map(
    maps: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor
) -> None:
    """Adds `concept_map` of the arguments to contiguous ``maps`` ``[B, K, n]``; no gradient."""
    if fused_attention(query, keys, weights):
        _C.concept_map(_dense(query), keys.contiguous(), weights.contiguous(), maps, add=True)
    else:
        maps += reference.concept_map(query, keys, weights)


def add_prompt_maps(
    maps: Sequence[torch.Tensor],
    query: torch.Tensor,
    keys: torch.Tensor,
    members: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Adds the maps of prompts that share their tokens, if `fused_prompts` says so; see `_C`."""
    if query.requires_grad or query.dtype != torch.float32:
        query = query.detach().float()
    _C.prompt_maps(query, keys, members, weights, maps)


def fused_prompts(keys: torch.Tensor) -> bool:
    """Whether `add_prompt_maps` takes prompts whose keys are where, and of the type, of these."""
    return keys.device.type == "cpu" and keys.dtype == torch.float32 and _forced() != "reference"


def fused_attention(
    query: torch.Tensor, keys: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> bool:
    """Whether `add_concept_map` is one launch, on this device, of this dtype and for these keys."""
    possible = query.is_cuda and query.dtype in _DTYPES and _runs_on(query.device)
    for x in (keys, weights):
        possible &= x is None or (x.dtype == torch.float32 and not x.requires_grad)
    if keys is not None:
        possible &= keys.shape[-2] <= _C.most_tokens and keys.shape[-1] % 8 == 0
    if weights is not None:
        possible &= len(weights) <= _C.most_concepts_on_gpu
    return possible and _forced() != "reference"


def native_status() -> dict[str, str]:
    """Device name to ``"native"``, or to ``"reference: "`` and why."""
    refusals = {"cpu": ""} | {f"cuda:{i}": _refusal(i) for i in range(torch.cuda.device_count())}
    if _forced() == "reference":
        refusals = dict.fromkeys(refusals, "BIASMAP_BACKEND asks for it")
    return {name: f"reference: {why}" if why else "native" for name, why in refusals.items()}


# ---- which path ------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def _refusal(gpu: int) -> str:
    return _C.cuda_refusal(gpu)


def _runs_on(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and not _refusal(device.index or 0))


def _forced() -> str:
    forced = os.environ.get("BIASMAP_BACKEND", "")
    if forced not in ("", "reference", "native"):
        raise ValueError(f"BIASMAP_BACKEND must be 'reference' or 'native', got {forced!r}")
    return forced


def _use_native(x: torch.Tensor, concepts: int = 1, pairs: int = 0) -> bool:
    few = concepts <= _C.most_concepts_on_gpu and pairs <= _C.most_pairs_on_gpu
    fits = few or not x.is_cuda
    possible = fits and x.dtype in _DTYPES and _runs_on(x.device)
    forced = _forced()
    if forced == "native" and not possible:
        raise ValueError(
            "BIASMAP_BACKEND=native, but the native kernels take float32, float16 and bfloat16, on "
            "devices that `biasmap env` calls native, on GPUs 16 concepts and 1024 pairs at most; "
            f"got {str(x.dtype)[6:]} on {x.device}, {concepts} concepts, {pairs} pairs"
        )
    return possible and forced != "reference"


def _widened(x: torch.Tensor, native: bool) -> torch.Tensor:
    return x.float() if x.dtype in _DTYPES and not (native and x.is_cuda) else x


def _prepared(maps: torch.Tensor, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    native = _use_native(maps, maps.shape[1], len(pairs))
    return _widened(maps, native), pairs.to("cpu" if native else maps.device), native


# ---- registration: torch allocates, C++ fills ------------------------------------------------

# The definitions last as long as this object.
_LIBRARY = torch.library.Library("biasmap", "DEF")  # type: ignore[no-untyped-call]
_KERNELS: dict[str, Callable[..., Any]] = {}


def _tuple(made: Any) -> tuple[torch.Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _dense(x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or x.ndim < 4:
        return x.contiguous() if isinstance(x, torch.Tensor) else x
    # Queries: kernels read eight numbers at once, aligned.
    *outer, inner = x.stride()
    wide = inner == 1 and all(s % 8 == 0 for s in outer) and x.data_ptr() % 16 == 0
    return x if wide else x.clone(memory_format=torch.contiguous_format)


def _define(schema: str, outputs: Callable[..., Any], *, gpu_only: bool = False) -> Any:
    """Registers the function of ``_C`` that the schema names, and returns the op.

    It takes the op's arguments, then the empty tensors of `outputs`. All tensors but pairs, keys
    and weights have a leading batch dimension, into which vmap folds its own.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    op = getattr(torch.ops.biasmap, name)

    def kernel(*args: Any) -> Any:
        made = outputs(*args)
        getattr(_C, name)(*map(_dense, args), *_tuple(made))
        return made

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size, folded = info.batch_size, list(args)
        for i, (dim, arg) in enumerate(zip(in_dims, args, strict=True)):
            argument = op.default._schema.arguments[i].name
            if isinstance(arg, torch.Tensor) and argument not in ("pairs", "keys", "weights"):
                stacked = arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
                folded[i] = stacked.flatten(0, 1)
            elif dim is not None:
                raise NotImplementedError(f"biasmap.{name} has no vmap over `{argument}`")
        made = op(*folded)
        apart = tuple(one.view(size, len(one) // size, *one.shape[1:]) for one in _tuple(made))
        return (apart, (0,) * len(apart)) if isinstance(made, tuple) else (apart[0], 0)

    for device in ("CUDA",) if gpu_only else ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"biasmap::{name}", outputs, lib=_LIBRARY)
    torch.library.register_vmap(f"biasmap::{name}", batched, lib=_LIBRARY)
    _KERNELS[name] = kernel
    return op


def _differentiable(
    schema: str, outputs: Callable[..., Any], *, gpu_only: bool = False
) -> Callable[..., torch.Tensor]:
    """The first output as a function, with its gradient to the first argument.

    ``<name>_backward`` takes the output's gradient, the arguments and, of several, the outputs.
    """
    arguments, result = schema.replace("(", "_backward(Tensor grad, ", 1).split(") -> ")
    arguments += f", {result[1:-1]}" if result.startswith("(") else ""
    op = _define(schema, outputs, gpu_only=gpu_only)
    derivative = _define(f"{arguments}) -> Tensor", _gradient, gpu_only=gpu_only)

    class Derivative(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(lambda *args: derivative(*args))
        setup_context = staticmethod(lambda ctx, inputs, output: None)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(
                "the native ops have first derivatives only; set BIASMAP_BACKEND=reference for more"
            )

    class Op(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(lambda *args: op(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            several = output if isinstance(output, tuple) else ()
            ctx.mark_non_differentiable(*several[1:])
            args = (*inputs, *several)
            ctx.settings = [None if isinstance(arg, torch.Tensor) else arg for arg in args]
            ctx.save_for_backward(*(arg for arg in args if isinstance(arg, torch.Tensor)))

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
            saved = iter(ctx.saved_tensors)
            args = [next(saved) if value is None else value for value in ctx.settings]
            # A graph of the backward pass is made for torch.func, and for create_graph=True.
            recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            gradient = (Derivative.apply if recorded else derivative)(grad, *args)
            return gradient, *[None] * (len(ctx.needs_input_grad) - 1)

    return lambda *args: _tuple((Op.apply if torch.is_grad_enabled() else op)(*args))[0]


def _gradient(grad: torch.Tensor, x: torch.Tensor, *_: Any) -> torch.Tensor:
    if x.ndim < 4:
        return x.new_empty(x.shape)
    batch, heads, n, depth = x.shape
    return x.new_empty(batch, n, heads, depth).transpose(1, 2)  # as `to_q` lays it out


def _new(like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return like.new_empty(shape, dtype=dtype)


_pairs_iou = _define(
    "pairs_iou(Tensor maps, Tensor pairs, float percentile)"
    " -> (Tensor iou, Tensor union, Tensor area, Tensor threshold)",
    lambda maps, pairs, _: (
        _new(maps, len(maps), len(pairs)),
        _new(maps, len(maps), len(pairs), dtype=torch.int32),
        _new(maps, *maps.shape[:2], dtype=torch.int32),
        _new(maps, *maps.shape[:2]),
    ),
)
_soft_topk = _differentiable(
    "soft_topk(Tensor x, float fraction, float temperature) -> (Tensor mask, Tensor state)",
    lambda x, *_: (_new(x, *x.shape), _new(x, len(x), 4)),
)
_soft_iou = _differentiable(
    "soft_iou(Tensor maps, Tensor pairs, float fraction, float temperature)"
    " -> (Tensor iou, Tensor state, Tensor means)",
    lambda maps, pairs, *_: (
        _new(maps, len(maps), len(pairs)),
        _new(maps, *maps.shape[:2], 4),
        _new(maps, *maps.shape[:2], maps.shape[1]),
    ),
)
_concept_map = _differentiable(
    "concept_map(Tensor query, Tensor keys, Tensor weights) -> Tensor",
    lambda query, _, weights: _new(query, len(query), len(weights), query.shape[2]),
    gpu_only=True,
)
