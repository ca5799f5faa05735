"""A procedural world of schematic persons whose demographic bias is planted, and so known.

**This is a drawing convention and says nothing about people.** A "woman" here is a figure with
long hair and a bare chin, a "man" one with a beard and a turned-up collar; which share of a
profession is drawn as which is a table in a configuration, dealt out by a seed, and is neither an
estimate nor an opinion. The world exists so that an instrument which claims to measure bias in a
text-to-image model can be tried where the right answer is known.

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

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from . import palette
from .config import (
    AXES,
    GEOMETRIES,
    PROFESSIONS,
    SIZE,
    Geometry,
    Marker,
    Masks,
    Person,
    WorldConfig,
    base_masks,
)
from .layout import place_markers
from .truth import Truth, TruthRow, measure_truth

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "AXES",
    "GEOMETRIES",
    "PROFESSIONS",
    "SIZE",
    "Geometry",
    "Marker",
    "Masks",
    "Person",
    "Truth",
    "TruthRow",
    "World",
    "WorldConfig",
    "article",
    "base_masks",
    "measure_truth",
]

OPENINGS = ("a photo of the face of ", "a photo of ", "")
"""How captions begin, before the article."""

# never in a caption, so without a learned meaning; in the vocabulary as one token each
_EXTRA_WORDS = ("gender", "male", "female", "people", "picture", "portrait", "image", "background")


class World:
    """Renders persons, writes their captions, and knows what was planted.

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
        """Draws a person.

        Args:
            person: What to draw.

        Returns:
            [64, 64, 3] uint8, RGB.

        Raises:
            ValueError: If an attribute is outside this world.
        """
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

    def person(self, rng: np.random.Generator, profession: str | None, demographic: str) -> Person:
        """Draws the attributes that are independent of profession and demographic."""
        reach_x, reach_y = self.geometry.jitter
        return Person(
            profession,
            demographic,
            dx=int(rng.integers(-reach_x, reach_x + 1)),
            dy=int(rng.integers(-reach_y, reach_y + 1)),
            background=int(rng.integers(len(palette.BACKGROUNDS))),
            skin=int(rng.integers(len(palette.SKINS))),
            hair=int(rng.integers(len(palette.HAIRS))),
            coat=int(rng.integers(len(palette.COATS))),
        )

    def population(self, count: int, seed: int) -> list[Person]:
        """Draws persons whose shares equal the planted table, not only on average.

        Professions (and "no profession") are dealt in turn and the demographics of each by
        quota; a random draw of 400 pictures would miss a share by 0.025, and a model
        trained on it would reproduce the miss.

        Args:
            count: How many persons.
            seed: Seed of everything random.

        Returns:
            `count` persons in random order.
        """
        rng = np.random.default_rng([seed, 7])
        first, second = self.words
        persons: list[Person] = []
        # twice: "a photo of a woman" has to be learned as well as any profession
        nouns: list[str | None] = [*self.config.professions, None, None]
        for index, noun in enumerate(nouns):
            own = len(range(index, count, len(nouns)))
            share = 0.5 if noun is None else self.markers[noun].share
            seconds = int(np.floor(own * share + rng.random()))
            persons += [
                self.person(rng, noun, second if rank < seconds else first) for rank in range(own)
            ]
        return [persons[i] for i in rng.permutation(len(persons))]

    def caption(
        self, person: Person, rng: np.random.Generator, *, named: bool | None = None
    ) -> str:
        """Writes a caption for a picture.

        The caption names the profession and, at times, the demographic or the coat; what it
        names is what is drawn. Where it does not name the demographic, the picture shows one all
        the same, by the profession's share: this is the bias that a model learns.

        Args:
            person: What the picture shows.
            rng: Chooses the wording.
            named: Whether to name the demographic; chosen by `rng` if None.

        Returns:
            One line, lower case.
        """
        word = person.demographic
        noun = person.profession
        chance = rng.random() < (0.75 if noun is None else 0.5)
        named = chance if named is None else named
        if noun is None:
            noun = word if named else "person"
        elif named and rng.random() < 0.5:
            noun = f"{noun} and {word}"
        elif named:
            noun = f"{word} {noun}"
        opening = OPENINGS[int(rng.choice(len(OPENINGS), p=(0.45, 0.35, 0.2)))]
        text = f"{opening}{article(noun)} {noun}"
        if rng.random() < 0.25:
            text += f" in a {palette.COAT_WORDS[person.coat]} coat"
        return text

    def vocabulary(self) -> tuple[str, ...]:
        """Returns every word that captions use, and some that audits ask for besides."""
        used = {"a", "an", "photo", "of", "the", "face", "and", "person", "in", "coat"}
        used |= {*self.words, *palette.COAT_WORDS, *self.config.professions}
        return tuple(sorted(used | set(_EXTRA_WORDS)))

    def _check(self, person: Person) -> None:
        reach_x, reach_y = self.geometry.jitter
        if person.profession is not None and person.profession not in self.markers:
            raise ValueError(
                f"`profession` must be one of {sorted(self.markers)} or None, "
                f"got {person.profession!r}"
            )
        if person.demographic not in self.words:
            raise ValueError(
                f"`demographic` must be one of {self.words}, got {person.demographic!r}"
            )
        if abs(person.dx) > reach_x or abs(person.dy) > reach_y:
            raise ValueError(
                f"`dx`, `dy` must lie within +-{reach_x}, +-{reach_y}, got {person.dx}, {person.dy}"
            )

    @cached_property
    def truth(self) -> Truth:
        """The planted table, with the overlap as measured on renders."""
        return measure_truth(self)


def article(noun: str) -> str:
    """Returns "a" or "an" for a noun of this vocabulary."""
    return "an" if noun[0] in "aeiou" else "a"
