"""What fixes a world: its configuration, its geometry, and the attributes of one picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]

SIZE = 64
"""Height and width of a picture in pixels."""

AXES: dict[str, tuple[str, str]] = {"gender": ("man", "woman")}
"""Demographic axis -> the two words that captions use; shares are those of the second word."""

PROFESSIONS = (
    *("architect", "artist", "baker", "chef", "doctor", "electrician", "engineer", "farmer"),
    *("firefighter", "judge", "lawyer", "librarian", "mechanic", "nurse", "painter", "pilot"),
    *("plumber", "scientist", "tailor", "teacher"),
)
"""The twenty professions of the default world."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a person's parts are; pixels, y downwards, relative to the centre of the head.

    Attributes:
        head_y: Row of the head's centre in the picture.
        head: Half-axes (x, y) of the head.
        region: Half-width, top and bottom of the demographic region (the head's upper part, or
            lower where the region is above, is cut out of it).
        inner: Half-width of the part of the region that belongs to the face and neck.
        cap: Lowest row of the short hair that both demographics have.
        shoulders: Half-axes (x, y) and centre y of the coat.
        jitter: Largest displacement (x, y) of the person.
    """

    head_y: int
    head: tuple[float, float]
    region: tuple[int, int, int]
    inner: int
    cap: int
    shoulders: tuple[float, float, float]
    jitter: tuple[int, int]


GEOMETRIES: dict[str, Geometry] = {
    # the region is around the lower half of the head and the neck
    "bust": Geometry(25, (8.5, 10.5), (14, -4, 15), 5, -5, (21.0, 22.0, 37.0), (4, 3)),
    # the region is around the upper half of the head: hood and fringe against loose hair
    "crown": Geometry(29, (8.5, 10.5), (15, -20, -1), 9, -20, (19.0, 20.0, 30.0), (4, 3)),
}
"""Named geometries; with the second, a finding is tried in a world it was not tuned on."""


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """Everything that fixes a world.

    Attributes:
        palette_seed: Chooses the marker colours and which profession gets which.
        layout_seed: Deals levels, shares, sizes, shapes and marker places to the professions.
        geometry: A key of `GEOMETRIES`.
        levels: Overlap levels in 0..1.
        shares: P(second word | profession), symmetric about 0.5; a multiple of four values, for
            sizes that correlate with neither.
        sizes: Marker areas in pixels, small and large.
        professions: len(levels) * len(shares) single words.

    Raises:
        ValueError: If a field is not as described.
    """

    palette_seed: int = 0
    layout_seed: int = 0
    geometry: str = "bust"
    levels: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    shares: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    sizes: tuple[int, int] = (84, 132)
    professions: tuple[str, ...] = PROFESSIONS

    def __post_init__(self) -> None:
        if self.geometry not in GEOMETRIES:
            raise ValueError(
                f"`geometry` must be one of {sorted(GEOMETRIES)}, got {self.geometry!r}"
            )
        for name, values in (("levels", self.levels), ("shares", self.shares)):
            if not values or any(not 0.0 <= value <= 1.0 for value in values):
                raise ValueError(f"`{name}` must be numbers in [0, 1], got {values}")
        mirrored = tuple(1.0 - share for share in reversed(self.shares))
        if len(self.shares) % 4 or not np.allclose(self.shares, mirrored):
            raise ValueError(
                "`shares` must be ascending, symmetric about 0.5 and a multiple of four values, "
                f"got {self.shares}"
            )
        count, words = len(self.levels) * len(self.shares), set(self.professions)
        if not len(self.professions) == len(words) == count:
            raise ValueError(
                f"`professions` must be {count} different words (levels x shares), "
                f"got {len(words)} different of {len(self.professions)}"
            )
        if any(not word.isalpha() or not word.islower() for word in words):
            raise ValueError(f"`professions` must be single lower-case words, got {sorted(words)}")
        if not 60 <= self.sizes[0] <= self.sizes[1] <= 200:
            raise ValueError(f"`sizes` must be ascending areas in 60..200, got {self.sizes}")


@dataclass(frozen=True, slots=True)
class Person:
    """The attributes of one picture; a picture is a function of these and of the world.

    Attributes:
        profession: A profession of the world, or None for a person without a marker.
        demographic: "man" or "woman".
        dx, dy: Displacement to the right and downwards in pixels.
        background, skin, hair, coat: Indices into the colours of `palette`.
    """

    profession: str | None
    demographic: str
    dx: int = 0
    dy: int = 0
    background: int = 0
    skin: int = 0
    hair: int = 0
    coat: int = 0


@dataclass(frozen=True, slots=True)
class Masks:
    """Amodal masks of one picture, each [64, 64] bool."""

    marker: Mask  # empty without a profession
    demographic: Mask  # the pixels that the demographic decides
    inner: Mask  # the part of `demographic` on face and neck
    head: Mask
    cap: Mask  # short hair that both demographics have
    coat: Mask  # below the region
    eyes: Mask


@dataclass(frozen=True, slots=True)
class Marker:
    """How a profession is drawn, and the share and level planted with it."""

    profession: str
    level: float
    share: float
    size: int
    shape: str
    colour: tuple[int, int, int]
    pixels: NDArray[np.int64] = field(repr=False)  # [size, 2] (y, x) relative to the head's centre


def base_masks(geometry: Geometry, dx: int, dy: int) -> Masks:
    """Returns the masks of a person without a profession."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    x -= SIZE // 2 + dx
    y -= geometry.head_y + dy
    head = (x / geometry.head[0]) ** 2 + (y / geometry.head[1]) ** 2 <= 1.0
    half, top, bottom = geometry.region
    middle = (top + bottom) / 2.0
    # a rounded box: corners of a plain one look like a placard
    box = (np.abs(x) / (half + 0.5)) ** 6 + ((y - middle) / (bottom - middle + 0.5)) ** 6 <= 1.0
    neck = (np.abs(x) <= geometry.inner) & (y > 0)
    below = bottom > geometry.head[1]
    inner = box & ((head & (y >= 4 if below else y <= -2)) | (neck & below))
    eyes = (np.abs(np.abs(x) - 3.5) <= 0.5) & (np.abs(y - 1.5) <= 0.5)
    demographic = box & (inner | ~head) & ~eyes  # eyes are drawn over it, the same for both
    coat = (x / geometry.shoulders[0]) ** 2 + (
        (y - geometry.shoulders[2]) / geometry.shoulders[1]
    ) ** 2 <= 1.0
    scalp = (x / (geometry.head[0] + 1.5)) ** 2 + (y / (geometry.head[1] + 2.0)) ** 2 <= 1.0
    cap = scalp & (y <= geometry.cap) & ~demographic
    marker = np.zeros((SIZE, SIZE), np.bool_)
    return Masks(marker, demographic, inner, head, cap, coat, eyes)
