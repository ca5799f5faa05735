"""Attribution maps as a value: indexing, parts, overlays, and a file format without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .files import write_file

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMAT = "biasmap_fast.AttributionMaps/1"

# Colour stops of the overlay, dark to bright, monotone in lightness (after matplotlib's inferno).
_RAMP = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


@dataclass(frozen=True, eq=False)
class AttributionMaps:
    """Attribution maps of the concepts of one prompt, for B images.

    Attributes:
        values: ``[B, K, H, W]`` float32: the sum over heads, layers and UNet calls of attention
            probability, so a pixel's value lies between 0 and heads * layers * calls.
        concepts: The K concepts, in the order of ``values``.
        prompt: The attribution prompt's text.
        branch: The guidance branch whose queries were used.
        layers: Names of the layers summed over.
        by: What ``parts`` keeps apart.
        parts: Name -> ``[B, K, H, W]``; the parts sum to ``values``. Empty for ``by="total"``.
        images: The images of those drawn that the B are, if each had its own prompts; ``None`` if
            they are all.

    Example:
        >>> maps = AttributionMaps(torch.rand(3, 2, 8, 8), ("doctor", "gender"))
        >>> maps["doctor"].shape
        torch.Size([3, 8, 8])
    """

    values: torch.Tensor  # [B, K, H, W]
    concepts: tuple[str, ...]
    prompt: str = ""
    branch: str = "cond"
    layers: tuple[str, ...] = ()
    by: str = "total"
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    images: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 4 or self.values.shape[1] != len(self.concepts):
            raise ValueError(
                f"`values` must be [B, {len(self.concepts)}, H, W] for the concepts "
                f"{list(self.concepts)}, got {list(self.values.shape)}"
            )
        if self.images is not None and len(self.images) != len(self):
            raise ValueError(
                f"`images` must name the {len(self)} images of `values`, got {len(self.images)}"
            )

    def __len__(self) -> int:
        """Number of images, B."""
        return self.values.shape[0]

    def __getitem__(self, concept: str) -> torch.Tensor:
        """The maps of one concept: ``[B, H, W]``."""
        return self.values[:, self.index(concept)]

    def index(self, concept: str) -> int:
        """Index of a concept in the second dimension of ``values`` and of every part.

        Raises:
            KeyError: There is no such concept; the message lists those there are.
        """
        if concept not in self.concepts:
            raise KeyError(f"no concept {concept!r}; there are {list(self.concepts)}")
        return self.concepts.index(concept)

    def row(self, image: int) -> int:
        """Index of an image of those drawn in the first dimension.

        Raises:
            KeyError: The prompt was not measured on it; the message lists the images it was.
        """
        if self.images is None:
            return image
        if image not in self.images:
            raise KeyError(f"no maps of image {image}; there are those of {list(self.images)}")
        return self.images.index(image)

    @property
    def by_block(self) -> Mapping[str, torch.Tensor]:
        """UNet block -> ``[B, K, H, W]``, of maps recorded with ``by="block"``."""
        return self._by("block")

    @property
    def by_layer(self) -> Mapping[str, torch.Tensor]:
        """Layer -> ``[B, K, H, W]``, of maps recorded with ``by="layer"``."""
        return self._by("layer")

    @property
    def by_step(self) -> Mapping[str, torch.Tensor]:
        """UNet call, counted from "0" -> ``[B, K, H, W]``, recorded with ``by="step"``."""
        return self._by("step")

    @property
    def by_head(self) -> Mapping[str, torch.Tensor]:
        """``"layer:head"`` -> ``[B, K, H, W]``, of maps recorded with ``by="head"``."""
        return self._by("head")

    def overlay(
        self,
        image: Image | Sequence[Image],
        concept: str,
        *,
        index: int | None = None,
        strength: float = 0.65,
        value_range: tuple[float, float] | None = None,
    ) -> Image | list[Image]:
        """Heat maps over pictures.

        Args:
            image: One picture, or all B of them, as Pillow has them (``output_type="pil"``).
            concept: The concept whose map is shown.
            index: Which of the B maps belongs to the one picture; needed if B > 1.
            strength: Opacity of the hottest colour, 0 to 1; cooler ones are more transparent.
            value_range: Map values of the coldest and hottest colour. If not given, each map's
                minimum and maximum, so brightness cannot be compared between pictures.

        Returns:
            A picture of the given one's size for one picture, a list for several.

        Raises:
            KeyError: No such concept.
            TypeError: Not a picture of Pillow.
            ValueError: The number of pictures is not B, no map has the index, or a map holds NaN.
        """
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"`strength` must be between 0 and 1, got {strength}")
        maps = self[concept]
        if isinstance(image, Sequence):
            if len(image) != len(self):
                raise ValueError(f"expected {len(self)} pictures for the maps, got {len(image)}")
            return [
                _blend(one, heat, strength, value_range)
                for one, heat in zip(image, maps, strict=True)
            ]
        if index is None and len(self) != 1:
            raise ValueError(f"one picture for {len(self)} maps: say which with `index=`")
        if not 0 <= (index or 0) < len(self):
            raise ValueError(f"`index` must be one of {len(self)} maps, got {index}")
        return _blend(image, maps[index or 0], strength, value_range)

    def to(self, device: torch.device | str) -> AttributionMaps:
        """The same maps on another device."""
        return self._map(lambda maps: maps.to(device))

    def resize(self, size: int | tuple[int, int]) -> AttributionMaps:
        """The same maps, bilinearly resized to ``size`` (an int for a square)."""
        target = (size, size) if isinstance(size, int) else size
        return self._map(lambda maps: resize(maps, target))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, complete or not at all."""
        from safetensors.torch import save

        names = ("concepts", "prompt", "branch", "layers", "by", "images")
        described = {name: getattr(self, name) for name in names}
        described |= {"format": _FORMAT, "parts": list(self.parts)}
        tensors = {f"parts/{i}": part for i, part in enumerate(self.parts.values())}
        tensors["values"] = self.values
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_file(Path(path), save(contiguous, metadata={"biasmap_fast": json.dumps(described)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttributionMaps:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no safetensors file of attribution maps.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads((file.metadata() or {}).get("biasmap_fast", "{}"))
                if described.get("format") != _FORMAT:
                    raise ValueError(
                        f"{os.fspath(path)} holds no attribution maps: expected the format "
                        f"{_FORMAT!r}, got {described.get('format')!r}"
                    )
                names = described.pop("parts")
                parts = {name: file.get_tensor(f"parts/{i}") for i, name in enumerate(names)}
                values = file.get_tensor("values")
        except SafetensorError as error:
            raise ValueError(
                f"{os.fspath(path)} is not a complete safetensors file: {error}"
            ) from error
        del described["format"]
        immutable: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in described.items()
        }
        return cls(values=values, parts=parts, **immutable)

    def _by(self, by: str) -> Mapping[str, torch.Tensor]:
        if self.by != by:
            raise ValueError(f"these maps were recorded by={self.by!r}; record with by={by!r}")
        return self.parts

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> AttributionMaps:
        parts = {name: change(part) for name, part in self.parts.items()}
        return replace(self, values=change(self.values), parts=parts)


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of ``[B, K, h, w]`` to ``[B, K, *size]``, pixel centres aligned."""
    if maps.shape[-2:] == size:
        return maps
    return torch.nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _blend(
    image: Image, heat: torch.Tensor, strength: float, value_range: tuple[float, float] | None
) -> Image:
    import numpy as np
    from PIL import Image as PILImage

    if not isinstance(image, PILImage.Image):
        raise TypeError(f"expected a picture of Pillow, got {type(image).__name__}")
    if not bool(torch.isfinite(heat).all()):
        raise ValueError("the attribution map holds NaN or infinite values and cannot be shown")
    picture = np.asarray(image.convert("RGB"), dtype=np.float32)  # [h, w, 3]
    size = (picture.shape[0], picture.shape[1])
    values = resize(heat[None, None].float().cpu(), size)[0, 0].numpy()  # [h, w]
    low, high = value_range or (float(heat.min()), float(heat.max()))
    level = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    stops = np.linspace(0, 1, len(_RAMP))
    colour = np.stack(
        [np.interp(level, stops, channel) for channel in zip(*_RAMP, strict=True)], -1
    )
    opacity = (strength * level)[..., None]
    blended = picture * (1 - opacity) + colour * opacity
    return PILImage.fromarray(blended.round().astype(np.uint8))
