"""A diffusers UNet from outside: its cross-attention layers, and the layout of what goes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

# Rows of the pipeline's UNet batch that the forward pass now running holds; None is all of them.
_PRESENT: ContextVar[tuple[int, ...] | None] = ContextVar("present_rows", default=None)


@dataclass(frozen=True)
class CrossAttention:
    """One cross-attention layer: its dotted name in the UNet and its module."""

    name: str
    module: Any

    @property
    def block(self) -> str:
        """The UNet block it lies in: ``"down_blocks.0"``, ``"mid_block"``, ``"up_blocks.3"``."""
        first, second, *_ = self.name.split(".")
        return first if first == "mid_block" else f"{first}.{second}"

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose maps it gives: itself. An engine's part may have several."""
        return (self.name,)

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return int(self.module.heads)

    def resolution(
        self, query: torch.Tensor, sizes: Mapping[int, tuple[int, int]]
    ) -> tuple[int, int]:
        """Height and width behind queries ``[rows, n, heads * d]``; sizes as of `resolutions`."""
        if query.shape[1] not in sizes:
            raise RuntimeError(
                f"layer {self.name} saw {query.shape[1]} queries; the latents, halved, have "
                f"{sorted(sizes, reverse=True)}. Token merging and similar changes of the "
                "sequence cannot be attributed to pixels"
            )
        return sizes[query.shape[1]]

    def split_heads(self, query: torch.Tensor) -> torch.Tensor:
        """``[rows, n, heads * d]`` as ``[rows, heads, n, d]``, a view."""
        return split_heads(query, self.heads)

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        """Attribution keys ``[P, heads, T', d]`` of hidden states ``[P, T', D]``.

        float32 for half-precision weights, already times the layer's scale 1 / sqrt(d).
        """
        if self.module.norm_cross is not None:
            states = self.module.norm_encoder_hidden_states(states)
        keys: torch.Tensor = self.module.to_k(states)  # [P, T', heads * d]
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        split = split_heads(keys, self.heads)  # [P, heads, T', d]
        return (split * float(self.module.scale)).contiguous()


def split_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """``[rows, n, heads * d]`` as ``[rows, heads, n, d]``, a view."""
    return rows.view(*rows.shape[:2], heads, -1).transpose(1, 2)


def cross_attention_layers(pipe: Any, selection: Sequence[str] | None) -> list[CrossAttention]:
    """The layers that ``selection`` names, in the UNet's order.

    Args:
        pipe: A diffusers pipeline with a UNet.
        selection: Names or dotted prefixes of names; None for all of the down and up blocks.

    Raises:
        TypeError: The pipeline has no UNet with cross-attention.
        ValueError: A name matches nothing, or a selected layer cannot be attributed.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None:
        remedy = (
            "; use probes for models with a transformer" if hasattr(pipe, "transformer") else ""
        )
        raise TypeError(
            f"expected a diffusers pipeline with a UNet, got {type(pipe).__name__}{remedy}"
        )
    # torch.compile wraps the module, and its names
    layers = [
        CrossAttention(name, module)
        for name, module in getattr(unet, "_orig_mod", unet).named_modules()
        if getattr(module, "is_cross_attention", False)
    ]
    if not layers:
        raise TypeError(f"{type(unet).__name__} has no cross-attention layers")
    if selection is None:
        chosen = [layer for layer in layers if layer.block != "mid_block"]
    else:
        chosen = _select(layers, selection)
    for layer in chosen:
        reason = _unsupported(layer.module)
        if reason:
            raise ValueError(f"cannot attribute layer {layer.name}: {reason}")
    projection = getattr(unet.config, "encoder_hid_dim_type", None)
    if projection not in (None, "ip_image_proj"):
        raise ValueError(
            f"cannot attribute {type(unet).__name__}: it projects its text states with "
            f"encoder_hid_dim_type={projection!r}; expected none"
        )
    return chosen


def _select(layers: list[CrossAttention], selection: Sequence[str]) -> list[CrossAttention]:
    if isinstance(selection, str):
        raise TypeError(
            f"`layers` must be a sequence of names or prefixes, got the string {selection!r}"
        )
    if not selection:
        raise ValueError("`layers` must name at least one layer, got none")
    for wanted in selection:
        if not any(_matches(layer, wanted) for layer in layers):
            known = ", ".join(layer.name for layer in layers)
            raise ValueError(f"no cross-attention layer matches {wanted!r}; there are: {known}")
    return [layer for layer in layers if any(_matches(layer, wanted) for wanted in selection)]


def _matches(layer: CrossAttention, wanted: str) -> bool:
    return layer.name == wanted or layer.name.startswith(wanted + ".")


def _unsupported(module: Any) -> str | None:
    """Why the query of ``to_q`` and the keys of ``to_k`` would not be the layer's attention."""
    if module.added_kv_proj_dim is not None:
        return "it attends to added keys (added_kv_proj_dim) in one softmax with the text's"
    if module.norm_q is not None or module.norm_k is not None:
        return "it normalises queries or keys after to_q and to_k (qk_norm)"
    if isinstance(module.norm_cross, torch.nn.GroupNorm):
        return "it normalises the text's states over all tokens (cross_attention_norm='group_norm')"
    if hasattr(module.processor, "to_k_custom_diffusion"):
        return f"its processor {type(module.processor).__name__} has keys of its own"
    return None


def guider_of(pipe: Any) -> Any | None:
    """The guider of a modular pipeline, which calls the UNet once per branch; else None.

    Guiders of other kinds than classifier-free guidance are refused: they call the conditional
    branch more than once, or project what is added to it.
    """
    guider = getattr(pipe, "guider", None)
    if guider is None:
        return None
    from diffusers import ClassifierFreeGuidance

    if not isinstance(guider, ClassifierFreeGuidance):
        raise ValueError(
            f"expected a modular pipeline with ClassifierFreeGuidance, got {type(guider).__name__}"
        )
    return guider


# InstructPix2Pix: the text with the picture, the picture alone, neither.
_EDITING = ("cond", "picture", "uncond")


def batch_layout(pipe: Any, chunks: int | None = None) -> tuple[str, ...]:
    """The copies of the latents in the UNet batch: "uncond", "cond" and others, in order.

    Args:
        pipe: A diffusers pipeline.
        chunks: Number of copies, if the caller knows; the unconditional one is first.

    Raises:
        ValueError: The pipeline does not say.
    """
    edits = any(kind.__name__.endswith("InstructPix2PixPipeline") for kind in type(pipe).__mro__)
    if edits and chunks == 3:
        return _EDITING
    if chunks is not None:
        return ("cond",) if chunks == 1 else ("uncond", "cond", *("other",) * (chunks - 2))
    if guider_of(pipe) is not None:
        return ("cond",)
    try:
        guided = pipe.do_classifier_free_guidance
    except AttributeError:
        raise ValueError(
            f"{type(pipe).__name__} does not say whether its UNet batch is guided (unconditional "
            f"chunk first); pass attribute(..., chunks=1) without guidance, {3 if edits else 2} "
            "with it"
        ) from None
    if edits and guided:
        return _EDITING
    return ("uncond",) * bool(guided) + ("cond",) + ("perturbed",) * is_perturbed(pipe)


def is_perturbed(pipe: Any) -> bool:
    """Whether the pipeline draws with perturbed-attention guidance (PAG)."""
    return bool(getattr(pipe, "do_perturbed_attention_guidance", False))


def check_text(pipe: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuses a UNet call whose text states are made in another way than attribution prompts'.

    That is one that skips layers of the text encoder, or scales a LoRA for this call alone.
    """
    if skipped := getattr(pipe, "clip_skip", None):
        raise ValueError(
            f"the pipeline draws with clip_skip={skipped}; attribution prompts are encoded "
            "without, and their keys would not be those of this picture: draw without clip_skip"
        )
    scale = (kwargs.get("cross_attention_kwargs") or {}).get("scale", 1.0)
    parts = (getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2"))
    if scale != 1.0 and any(getattr(part, "_hf_peft_config_loaded", False) for part in parts):
        raise ValueError(
            f"cross_attention_kwargs={{'scale': {scale}}} scales a LoRA inside each UNet call, "
            "which attribution keys do not see: use pipe.set_adapters(names, weights) before the "
            "block"
        )


def branch_rows(
    sample: torch.Tensor, layout: Sequence[str], branch: str, *, separate: bool = False
) -> slice:
    """Rows of the branch in a UNet batch.

    Args:
        sample: The latents, without the channels that a UNet of editing is given beside them.
        layout: `batch_layout` of the pipeline.
        branch: ``"cond"`` or ``"uncond"``.
        separate: Whether this UNet call is one of the branch alone.

    Raises:
        ValueError: The batch has another layout or no such branch; not ``[B, C, H, W]``.
    """
    if sample.ndim != 4:
        raise ValueError(
            f"expected latents [batch, channels, height, width], got shape {tuple(sample.shape)}; "
            "pipelines that draw videos are not supported"
        )
    batch, chunks = sample.shape[0], len(layout)
    copies = sample.chunk(chunks) if batch % chunks == 0 else ()
    if not copies or any(not torch.equal(copies[0], copy) for copy in copies[1:]):
        raise ValueError(
            f"expected a UNet batch of {chunks} copies of the same latents (guidance chunks), got "
            f"a batch of {batch} that is not; pass attribute(..., chunks=) if the layout differs"
        )
    if separate:
        return slice(0, batch)
    if branch not in layout:
        raise ValueError(
            "branch='uncond' needs classifier-free guidance (guidance_scale > 1), got a UNet "
            "batch without an unconditional chunk"
        )
    images = batch // chunks
    first = images * layout.index(branch)
    return slice(first, first + images)


def resolutions(height: int, width: int) -> dict[int, tuple[int, int]]:
    """Number of queries -> (h, w), for the latents' size halved, rounded up, down to one pixel."""
    sizes = {height * width: (height, width)}
    while height > 1 or width > 1:
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.setdefault(height * width, (height, width))
    return sizes


@contextmanager
def present_rows(rows: Sequence[int]) -> Iterator[None]:
    """Says that forward passes inside the block hold only these rows of the pipeline's batch."""
    token = _PRESENT.set(tuple(rows))
    try:
        yield
    finally:
        _PRESENT.reset(token)


def as_slice(indices: list[int]) -> slice | list[int]:
    """Consecutive indices as a slice, whose indexing copies nothing; others as they are."""
    consecutive = all(index == indices[0] + i for i, index in enumerate(indices))
    return slice(indices[0], indices[-1] + 1) if indices and consecutive else indices


def rows_here(wanted: slice, batch: int, seen: int) -> tuple[tuple[int, int], ...]:
    """Positions of wanted rows in the forward pass now running, each with that in ``wanted``.

    Args:
        wanted: Rows of the pipeline's batch.
        batch: Size of that batch.
        seen: Number of rows that a layer shows.

    Raises:
        RuntimeError: The layer shows another number of rows than the pass has.
    """
    present = _PRESENT.get()
    count = batch if present is None else len(present)
    if seen != count:
        raise RuntimeError(
            f"a layer saw a batch of {seen} in a UNet call of {count}: its rows cannot be told "
            "apart"
        )
    return _rows_here(wanted.start, wanted.stop, range(batch) if present is None else present)


@lru_cache(maxsize=256)  # asked by every layer
def _rows_here(start: int, stop: int, present: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((place, row - start) for place, row in enumerate(present) if start <= row < stop)
