"""The sizes an engine takes: every dimension that may vary, with its true bounds, and presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .errors import ShapeError

# diffusers' Upsample2D takes another path from 64 on; an exported graph has one path.
_MOST_BATCH = 63


@dataclass(frozen=True)
class Range:
    """Bounds of one dimension.

    Attributes:
        low: smallest size.
        best: the size to tune for.
        high: largest size.
        multiple: every size is a multiple of this.
    """

    low: int
    best: int
    high: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.best <= self.high:
            raise ValueError(
                f"expected 1 <= low <= best <= high, got {self.low}, {self.best}, {self.high}"
            )
        wrong = [n for n in (self.low, self.best, self.high) if n % self.multiple]
        if wrong:
            raise ValueError(f"expected multiples of {self.multiple}, got {wrong}")

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high and size % self.multiple == 0

    def __str__(self) -> str:
        step = f" in steps of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.low} to {self.high}{step}"


@dataclass(frozen=True)
class Shapes:
    """Bounds of all dimensions that may vary. Latents, not pixels: a pixel is 8 times smaller.

    Attributes:
        batch: rows of the UNet's batch, guidance chunks included; at most 63.
        height: of the latents.
        width: of the latents.
        tokens: of the text that draws.
        prompts: attribution prompts of one call.
        attribution_tokens: of the longest attribution prompt, start and end token included.
        concepts: of the attribution prompt that has most.

    Example:
        >>> PRESETS["sd15"].height
        Range(low=8, best=64, high=128, multiple=1)
    """

    batch: Range = Range(1, 2, 32)
    height: Range = Range(8, 64, 128)
    width: Range = Range(8, 64, 128)
    tokens: Range = Range(1, 77, 616)
    prompts: Range = Range(1, 1, 64)
    attribution_tokens: Range = Range(1, 12, 77)
    concepts: Range = Range(1, 2, 64)

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

    def to_json(self) -> dict[str, dict[str, int]]:
        """Plain values for JSON."""
        return {name: asdict(size) for name, size in self.ranges.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, int]]) -> Shapes:
        """Reads what `to_json` wrote."""
        return cls(**{name: Range(**size) for name, size in values.items()})


def _square(best: int, high: int) -> dict[str, Range]:
    return {"height": Range(8, best, high), "width": Range(8, best, high)}


PRESETS: dict[str, Shapes] = {
    "testbed": Shapes(batch=Range(1, 8, 63), **_square(16, 64)),
    "sd15": Shapes(**_square(64, 128)),
    "sd21": Shapes(**_square(96, 128)),
    "sdxl": Shapes(**_square(128, 192)),
}


def preset_of(unet: Any) -> str:
    """The preset whose best size is nearest to the UNet's own.

    Example:
        >>> from types import SimpleNamespace
        >>> preset_of(SimpleNamespace(config=SimpleNamespace(sample_size=64)))
        'sd15'
    """
    size = unet.config.sample_size
    side = size if isinstance(size, int) else max(size)
    return min(PRESETS, key=lambda name: abs(PRESETS[name].height.best - side))


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph.

    Attributes:
        name: in the file.
        dtype: torch's name of the type, ``"float16"``.
        shape: sizes; a string is one of the dimensions of `Shapes`, and in an output also what
            `halved` and `area` write.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tensor:
        """Reads it back from JSON."""
        return cls(values["name"], values["dtype"], tuple(values["shape"]))


def halved(dim: str, level: int) -> str:
    """A height or width, halved ``level`` times.

    Example:
        >>> output_shape(Tensor("maps", "float32", (halved("width", 1), area(2))), {
        ...     "height": 16, "width": 8})
        [4, 8]
    """
    return f"{dim} >> {level}" if level else dim


def area(level: int) -> str:
    """The pixels of latents that were halved ``level`` times."""
    return f"pixels >> {level}"


def output_shape(output: Tensor, sizes: Mapping[str, int]) -> list[int]:
    """The shape of an output in a call whose dimensions have these sizes."""

    def size(dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        name, _, level = dim.partition(" >> ")
        if name == "pixels":
            return (sizes["height"] >> int(level)) * (sizes["width"] >> int(level))
        return sizes[name] >> int(level or 0)

    return [size(dim) for dim in output.shape]


def check_sizes(shapes: Shapes, inputs: Sequence[Tensor], given: Mapping[str, Any]) -> None:
    """Checks the shapes of a call's tensors against the engine's bounds.

    Args:
        shapes: the bounds.
        inputs: the graph's inputs.
        given: input name -> tensor.

    Raises:
        ShapeError: the message names input, dimension, bounds and size.
    """
    found: dict[str, tuple[str, int]] = {}
    for expected in inputs:
        shape = tuple(given[expected.name].shape)
        if len(shape) != len(expected.shape):
            raise ShapeError(f"`{expected.name}` must be {list(expected.shape)}, got {list(shape)}")
        for place, (size, dim) in enumerate(zip(shape, expected.shape, strict=True)):
            if isinstance(dim, int):
                if size != dim:
                    raise ShapeError(
                        f"`{expected.name}` must have {dim} as size {place}, got {list(shape)}: "
                        "the engine was exported from another kind of model"
                    )
                continue
            if size not in getattr(shapes, dim):
                raise ShapeError(
                    f"`{expected.name}` must have a {dim} of {getattr(shapes, dim)}, got {size}: "
                    "export an engine with these sizes"
                )
            first, before = found.setdefault(dim, (expected.name, size))
            if before != size:
                raise ShapeError(
                    f"`{expected.name}` must have the {dim} of `{first}`, {before}, got {size}"
                )
