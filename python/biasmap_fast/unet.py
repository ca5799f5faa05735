"""The cross-attention layers of a diffusers UNet, and which of them can be attributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


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
    def heads(self) -> int:
        """Number of attention heads."""
        return int(self.module.heads)

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        """Attribution keys of encoded text.

        Args:
            states: ``[1, T', D]`` hidden states of the attribution prompt.

        Returns:
            ``[heads, T', d]`` float32, already times the layer's scale 1 / sqrt(d).
        """
        if self.module.norm_cross is not None:
            states = self.module.norm_encoder_hidden_states(states)
        keys: torch.Tensor = self.module.to_k(states)[0].float()  # [T', heads * d]
        split = keys.view(keys.shape[0], self.heads, -1).transpose(0, 1)  # [heads, T', d]
        return (split * float(self.module.scale)).contiguous()


def cross_attention_layers(pipe: Any, selection: Sequence[str] | None) -> list[CrossAttention]:
    """The layers that ``selection`` names, in the UNet's order.

    Args:
        pipe: a diffusers pipeline with a UNet.
        selection: names or dotted prefixes of names; None for all of the down and up blocks.

    Raises:
        TypeError: the pipeline has no UNet with cross-attention.
        ValueError: a name matches nothing, or a selected layer cannot be attributed.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise TypeError(
            f"expected a diffusers pipeline with a UNet, got {type(pipe).__name__}; transformer "
            "models (SD3, FLUX) are not supported"
        )
    layers = [
        CrossAttention(name, module)
        for name, module in unet.named_modules()
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
    if hasattr(module.processor, "to_k_custom_diffusion"):
        return f"its processor {type(module.processor).__name__} has keys of its own"
    return None
