"""A procedural world of schematic persons whose demographic bias is planted, and so known.

**This is a drawing convention and says nothing about people.** A "woman" here is a figure with
long hair and a bare chin, a "man" one with a beard and a turned-up collar; the share of each in a
profession is a table in a configuration, dealt out by a seed. The world exists so that an
instrument that claims to measure bias in a text-to-image model can be tried where the right answer
is known.

A 64 x 64 picture shows one person, drawn at a random place, before a random background, with
random skin, hair and coat; none of these depends on the profession. What does:

* *how often*: P(woman | profession), the "share";
* *where*: the profession draws a marker of its own colour and shape, and a known fraction of
  the marker's pixels, the "level", lies on the demographic region.

The **demographic region** is the set of pixels that the demographic decides, those in which
the man and the woman rendering of one person differ. Both demographics paint the same pixels (a
band around the head), so a level holds for either:

===========  ==========================  ==========================
pixels       woman                       man
===========  ==========================  ==========================
beside head  hair colour (long hair)     coat colour (collar)
chin, neck   skin colour                 hair colour (beard)
===========  ==========================  ==========================

A marker is drawn on top of everything; masks are amodal, that is, taken before anything hides
anything. Levels, shares and marker sizes are exactly uncorrelated over the professions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from . import palette
from .config import AXES, GEOMETRIES, SIZE, Marker, Masks, Person, WorldConfig, base_masks
from .layout import place_markers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TruthRow:
    """What was planted for one profession.

    Attributes:
        profession: The profession.
        shares: P(word | profession) of each demographic word.
        level: Overlap as configured: part of the marker that lies on the demographic region.
        overlap: The overlap as measured on renders, per demographic word, averaged over every
            position of a person.
        marker_fraction: The marker's area as a fraction of the picture.
        region_fraction: The demographic region's area as a fraction of the picture.
        gap: Distance in pixels from the marker to the region; 0 if they overlap.
        colour: The marker's colour, "#rrggbb".
        shape: The marker's shape.
    """

    profession: str
    shares: dict[str, float]
    level: float
    overlap: dict[str, float]
    marker_fraction: float
    region_fraction: float
    gap: float
    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Truth:
    """The planted table: one `TruthRow` per profession, indexed by profession."""

    rows: tuple[TruthRow, ...]
    words: tuple[str, str]

    def __iter__(self) -> Iterator[TruthRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, profession: str) -> TruthRow:
        for row in self.rows:
            if row.profession == profession:
                return row
        raise KeyError(f"{profession!r} is not one of {[row.profession for row in self.rows]}")

    def table(self) -> str:
        """Returns the table as text, ordered by level and share."""
        first, second = self.words
        head = (
            f"{'profession':<12} {'P(' + second + ')':>8} {'level':>6} "
            f"{'overlap ' + first + '/' + second:>18} {'marker':>7} {'gap':>5}  colour   shape"
        )
        lines = [
            f"{r.profession:<12} {r.shares[second]:>8.2f} {r.level:>6.2f} "
            f"{r.overlap[first]:>9.3f} / {r.overlap[second]:.3f}  {r.marker_fraction:>6.2%} "
            f"{r.gap:>5.1f}  {r.colour}  {r.shape}"
            for r in sorted(self.rows, key=lambda r: (r.level, r.shares[second]))
        ]
        return "\n".join([head, *lines])


class World:
    """Renders persons, and knows what was planted.

    Args:
        config: The world's configuration; the default is the world of the packaged model.

    Raises:
        ValueError: If a marker of some level does not fit into the geometry.

    Example:
        >>> world = World()
        >>> image = world.render(Person("doctor", "woman", dx=2))
        >>> image.shape, image.dtype
        ((64, 64, 3), dtype('uint8'))
    """

    def __init__(self, config: WorldConfig | None = None) -> None:
        self.config = config or WorldConfig()
        self.geometry = GEOMETRIES[self.config.geometry]
        self.words = AXES["gender"]
        reach_x, reach_y = self.geometry.jitter
        self.positions = [
            (dx, dy) for dx in range(-reach_x, reach_x + 1) for dy in range(-reach_y, reach_y + 1)
        ]
        self.markers: dict[str, Marker] = place_markers(self.config, self.geometry)

    def masks(self, person: Person) -> Masks:
        """Returns the amodal masks of a person."""
        self._check(person)
        masks = base_masks(self.geometry, person.dx, person.dy)
        if person.profession is not None:
            masks.marker[self.marker_pixels(person.profession, person.dx, person.dy)] = True
        return masks

    def marker_pixels(
        self, profession: str, dx: int, dy: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns rows and columns of a profession's marker for a person displaced by dx, dy."""
        rows, columns = self.markers[profession].pixels.T
        return rows + (self.geometry.head_y + dy), columns + (SIZE // 2 + dx)

    def render(self, person: Person) -> NDArray[np.uint8]:
        """Draws a person, [64, 64, 3] uint8; ValueError if an attribute is not of this world."""
        masks = self.masks(person)
        woman = person.demographic == self.words[1]
        skin, hair, coat = (
            palette.SKINS[person.skin],
            palette.HAIRS[person.hair],
            palette.COATS[person.coat],
        )
        image = np.empty((SIZE, SIZE, 3), np.uint8)
        image[:] = palette.BACKGROUNDS[person.background]
        image[masks.coat] = coat
        image[masks.cap] = hair
        image[masks.head] = skin
        image[masks.cap & masks.head] = hair
        image[masks.demographic & ~masks.inner] = hair if woman else coat
        image[masks.inner] = skin if woman else hair
        image[masks.eyes] = palette.EYE
        if person.profession is not None:
            image[masks.marker] = self.markers[person.profession].colour
        return image

    def _check(self, person: Person) -> None:
        for name, known in (("profession", (*self.markers, None)), ("demographic", self.words)):
            if getattr(person, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(person, name)!r}")
        if (person.dx, person.dy) not in self.positions:
            reach_x, reach_y = self.geometry.jitter
            raise ValueError(
                f"`dx`, `dy` must lie within +-{reach_x}, +-{reach_y}, got {person.dx}, {person.dy}"
            )

    @cached_property
    def truth(self) -> Truth:
        """The planted table, with the overlap as measured on renders."""
        first, second = self.words
        region = {  # the pixels in which man and woman differ, at every position of a person
            position: np.any(
                self.render(Person(None, first, *position))
                != self.render(Person(None, second, *position)),
                axis=-1,
            )
            for position in self.positions
        }
        region_fraction = float(np.mean([mask.mean() for mask in region.values()]))
        rows = []
        for profession, marker in self.markers.items():
            # the marker's pixels and the region are the same for both words, and so is the overlap
            inside = [
                mask[self.marker_pixels(profession, *position)].mean()
                for position, mask in region.items()
            ]
            drawn = np.argwhere(self.masks(Person(profession, first)).marker)  # [N, 2]
            apart = np.linalg.norm(drawn[:, None] - np.argwhere(region[0, 0]), axis=-1)  # [N, M]
            rows.append(
                TruthRow(
                    profession=profession,
                    shares={first: 1.0 - marker.share, second: marker.share},
                    level=marker.level,
                    overlap=dict.fromkeys(self.words, float(np.mean(inside))),
                    marker_fraction=marker.size / SIZE**2,
                    region_fraction=region_fraction,
                    gap=float(apart.min()),
                    colour="#{:02x}{:02x}{:02x}".format(*marker.colour),
                    shape=marker.shape,
                )
            )
        return Truth(tuple(rows), self.words)
