"""Effect maps as a value, their regions, and how far one lies in another."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMAT = "biasmap_fast.EffectMaps/1"


@dataclass(frozen=True, eq=False)
class EffectMaps:
    """Effect maps of S swaps on B pictures; made by `Probes.effects`.

    Attributes:
        values: ``[B, S, h, w]`` float32 on the grid of the latents; the mean over the measured
            calls of maps whose own mean is 1.
        names: The swaps, in the order of ``values``.

    Example:
        >>> effects = EffectMaps(torch.rand(3, 2, 8, 8), ("profession", "gender"))
        >>> effects["gender"].shape
        torch.Size([3, 8, 8])
    """

    values: torch.Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of pictures, B."""
        return self.values.shape[0]

    def __getitem__(self, name: str) -> torch.Tensor:
        """The maps of one swap: ``[B, h, w]``.

        Raises:
            KeyError: There is no such swap.
        """
        return self.values[:, swap_index(self.names, name)]

    def overlay(
        self, images: Image | Sequence[Image], name: str, *, strength: float = 0.65
    ) -> Image | list[Image]:
        """One swap's maps over the pictures, each in its own range.

        Args:
            images: All B pictures as Pillow images, or the picture if B is 1.
            name: The swap.
            strength: Opacity of the hottest colour, 0 to 1.
        """
        from .maps import AttributionMaps

        return AttributionMaps(self.values, self.names).overlay(images, name, strength=strength)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, whole or not at all."""
        from safetensors.torch import save

        described = json.dumps({"format": _FORMAT, "names": list(self.names)})
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            tensors = {"values": self.values.contiguous()}
            partial.write_bytes(save(tensors, metadata={"biasmap_fast": described}))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EffectMaps:
        """Reads what `save` wrote.

        Raises:
            ValueError: The file holds no effect maps.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads((file.metadata() or {}).get("biasmap_fast", "{}"))
                if described.get("format") != _FORMAT:
                    raise ValueError(
                        f"{os.fspath(path)}: expected the format {_FORMAT!r}, got "
                        f"{described.get('format')!r}"
                    )
                return cls(file.get_tensor("values"), tuple(described["names"]))
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)} is no whole safetensors file: {error}") from error


@dataclass(frozen=True, eq=False)
class EffectOverlap:
    """How far the region of one effect map lies in another's, per picture; all ``[B]``.

    Attributes:
        value: Part of the first map's region inside the second's, ``|P and D| / |P|``.
        chance: What a region anywhere would have: ``|D|`` as a fraction of the picture.
        corrected: ``(value - chance) / (1 - chance)``: 0 at chance, 1 if all is inside.
        iou: Intersection over union of the two regions.
        bhattacharyya: ``sum sqrt(p d)`` of the maps as distributions, without a threshold.
    """

    value: torch.Tensor
    chance: torch.Tensor
    corrected: torch.Tensor
    iou: torch.Tensor
    bhattacharyya: torch.Tensor


def effect_overlap(a: torch.Tensor, b: torch.Tensor) -> EffectOverlap:
    """How far the region of map ``a`` lies in the region of map ``b``.

    A region is a map above its `otsu` threshold. A map without differences has no region: value,
    IoU and corrected value are then 0.

    Args:
        a: ``[B, H, W]``, at least 0: for entanglement the profession's effect map.
        b: ``[B, H, W]``: the demographic word's.

    Raises:
        ValueError: The shapes differ or are not ``[B, H, W]``, or a value is negative or no number.

    Example:
        >>> import torch, biasmap_fast as bm
        >>> maps = torch.zeros(2, 1, 8, 8)
        >>> maps[0, 0, :4], maps[1, 0, 2:6] = 1, 1
        >>> overlap = bm.effect_overlap(maps[0], maps[1])
        >>> overlap.value.item(), overlap.chance.item()
        (0.5, 0.5)
    """
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(
            f"expected two sets of maps [B, H, W], got {list(a.shape)} and {list(b.shape)}"
        )
    a, b = _checked(a), _checked(b)
    first = a > otsu(a)[:, None, None]
    second = b > otsu(b)[:, None, None]
    inside, area = _count(first & second), _count(first)
    value = inside / area.clamp(min=1)
    chance = _count(second) / second[0].numel()
    p, d = (each / each.sum((-2, -1), keepdim=True).clamp(min=1e-30) for each in (a, b))
    return EffectOverlap(
        value=value,
        chance=chance,
        corrected=torch.where(area > 0, (value - chance) / (1 - chance), 0.0),
        iou=inside / _count(first | second).clamp(min=1),
        bhattacharyya=(p * d).sqrt().sum((-2, -1)),
    )


def otsu(maps: torch.Tensor) -> torch.Tensor:
    """Thresholds that part each map into two classes of greatest variance between them.

    Every value of a map is tried as the threshold, so there is no histogram to choose.

    Args:
        maps: ``[..., H, W]``.

    Returns:
        ``[...]``: the largest value of the lower class, so that ``maps > threshold`` is the
        region. For a map of one value that value: its region is empty.

    Raises:
        ValueError: A value is no number.
    """
    values = _checked(maps, negative=True).flatten(-2).sort(-1).values.double()  # [..., n]
    count = values.shape[-1]
    below = torch.arange(1, count, device=values.device, dtype=torch.float64)  # class sizes
    sums = values.cumsum(-1)
    mean_below = sums[..., :-1] / below
    mean_above = (sums[..., -1:] - sums[..., :-1]) / (count - below)
    between = below * (count - below) * (mean_above - mean_below).square()
    # equal values are in one class
    between = between.masked_fill(values[..., 1:] == values[..., :-1], -1.0)
    best = between.argmax(-1, keepdim=True)
    constant = values[..., :1] == values[..., -1:]
    return values.gather(-1, torch.where(constant, count - 1, best))[..., 0].to(maps.dtype)


def swap_index(names: Sequence[str], name: str) -> int:
    """Where a swap stands among the names; a KeyError lists those there are."""
    if name not in names:
        raise KeyError(f"no swap {name!r}; there are {list(names)}")
    return names.index(name)


def _count(masks: torch.Tensor) -> torch.Tensor:
    return masks.sum((-2, -1)).to(torch.float32)


def _checked(maps: torch.Tensor, *, negative: bool = False) -> torch.Tensor:
    if not bool(torch.isfinite(maps).all()) or (not negative and bool((maps < 0).any())):
        raise ValueError("maps must be finite" + ("" if negative else " and at least 0"))
    return maps.to(torch.promote_types(maps.dtype, torch.float32))
