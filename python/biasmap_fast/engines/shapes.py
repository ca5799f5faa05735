"""The sizes an engine takes: bounds of every dimension, presets, and checks of calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from .errors import ShapeError

Dtype = Literal["float32", "float16", "bfloat16"]

_DIMENSIONS = "batch|height|width|tokens|prompts|attribution_tokens|concepts"
Dimension = Annotated[str, Field(pattern=rf"^({_DIMENSIONS}|(height|width|pixels) >> \d)$")]

# diffusers' Upsample2D takes another path from 64 on; an exported graph has one path.
_MOST_BATCH = 63


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest size of a dimension, and the step between sizes."""

    low: int
    best: int
    high: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.best <= self.high or self.multiple < 1:
            raise ValueError(
                f"expected 1 <= low <= best <= high, got {self.low}, {self.best}, {self.high}"
            )
        if wrong := [n for n in (self.low, self.best, self.high) if n % self.multiple]:
            raise ValueError(f"expected multiples of {self.multiple}, got {wrong}")

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high and size % self.multiple == 0

    def __str__(self) -> str:
        if self.low == self.high:
            return str(self.low)
        step = f" in steps of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.low} to {self.high}{step}"


@dataclass(frozen=True)
class Shapes:
    """Bounds of all dimensions that vary; height and width are of the latents, not in pixels.

    Example:
        >>> PRESETS["sd15"].height
        Range(low=8, best=64, high=128, multiple=1)
    """

    batch: Range = Range(1, 2, 32)  # guidance chunks included
    height: Range = Range(8, 64, 128)
    width: Range = Range(8, 64, 128)
    tokens: Range = Range(1, 77, 616)  # of the text that draws
    prompts: Range = Range(1, 1, 64)  # attribution prompts in one call
    attribution_tokens: Range = Range(1, 12, 77)  # start and end token included
    concepts: Range = Range(1, 2, 64)  # per attribution prompt

    def __post_init__(self) -> None:
        if self.batch.high > _MOST_BATCH:
            raise ValueError(f"`batch` must be at most {_MOST_BATCH}, got {self.batch.high}")

    @property
    def ranges(self) -> dict[str, Range]:
        """Dimension name -> bounds."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def on_grid(self, multiple: int) -> Shapes:
        """The same with heights and widths restricted to multiples, as the UNet's levels need."""

        def restricted(size: Range) -> Range:
            low = -(-size.low // multiple) * multiple
            high = size.high // multiple * multiple
            if high < low:
                raise ValueError(f"no multiple of {multiple} lies between {size.low}, {size.high}")
            best = min(max(round(size.best / multiple) * multiple, low), high)
            return Range(low, best, high, multiple)

        return replace(self, height=restricted(self.height), width=restricted(self.width))


def _square(best: int, high: int) -> dict[str, Range]:
    return {"height": Range(8, best, high), "width": Range(8, best, high)}


PRESETS: dict[str, Shapes] = {
    "testbed": Shapes(batch=Range(1, 8, 63), **_square(16, 64)),
    "sd15": Shapes(**_square(64, 128)),
    "sd21": Shapes(**_square(96, 128)),
    "sdxl": Shapes(**_square(128, 192)),
}


def preset_of(unet: Any) -> str:
    """The preset whose best size is nearest to the UNet's own."""
    size = unet.config.sample_size
    side = size if isinstance(size, int) else max(size)
    return min(PRESETS, key=lambda name: abs(PRESETS[name].height.best - side))


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph.

    A string in its shape is a dimension of `Shapes`, in an output also ``"height >> 1"`` (a height
    halved once) or ``"pixels >> 1"`` (the pixels of latents halved once).
    """

    name: str
    dtype: Dtype
    shape: tuple[int | Dimension, ...]


def halved(dim: str, level: int) -> str:
    """A height or width, halved ``level`` times."""
    return f"{dim} >> {level}" if level else dim


def output_shape(output: Tensor, sizes: Mapping[str, int]) -> list[int]:
    """The shape of an output in a call whose dimensions have these sizes.

    Example:
        >>> maps = Tensor("maps", "float32", ("batch", "height >> 1", "pixels >> 2"))
        >>> output_shape(maps, {"batch": 3, "height": 16, "width": 8})
        [3, 8, 8]
    """

    def size(dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        name, _, level = dim.partition(" >> ")
        if name == "pixels":
            return (sizes["height"] >> int(level)) * (sizes["width"] >> int(level))
        return sizes[name] >> int(level or 0)

    return [size(dim) for dim in output.shape]


def check_sizes(
    bounds: Mapping[str, Range], inputs: Sequence[Tensor], tensors: Mapping[str, Any]
) -> dict[str, int]:
    """Dimension name -> size in a call with these tensors.

    Raises:
        ShapeError: a size is outside the bounds, or two do not agree.
    """
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for expected in inputs:
        shape = list(tensors[expected.name].shape)
        if len(shape) != len(expected.shape):
            raise ShapeError(f"`{expected.name}` must be {list(expected.shape)}, got {shape}")
        for index, (size, dim) in enumerate(zip(shape, expected.shape, strict=True)):
            if isinstance(dim, int):
                if size != dim:
                    raise ShapeError(
                        f"`{expected.name}` must have {dim} as size {index}, got {shape}: the "
                        "engine was exported from another kind of model"
                    )
            elif size not in bounds[dim]:
                raise ShapeError(
                    f"`{expected.name}` must have {dim} of {bounds[dim]}, got {size}: export an "
                    "engine with these sizes"
                )
            elif sizes.setdefault(dim, size) != size:
                raise ShapeError(
                    f"`{expected.name}` must have the {dim} of `{first[dim]}`, {sizes[dim]}, got "
                    f"{size}"
                )
            else:
                first.setdefault(str(dim), expected.name)
    return sizes
