"""The persons and captions that a model of a world is trained on."""

from __future__ import annotations

from typing import Any

import numpy as np

from biasmap_fast.presets import with_article
from biasmap_fast.testbed import Person, World, WorldConfig, palette

OPENINGS = ("a photo of the face of ", "a photo of ", "")

# never in a caption, so without a learned meaning; in the vocabulary as one token each
_EXTRA_WORDS = ("gender", "male", "female", "people", "picture", "portrait", "image", "background")


def world_of(record: dict[str, Any]) -> World:
    """The world of a model, by its training.json."""
    fields = record["settings"]["world"].items()
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields}
    return World(WorldConfig(**values))


def face_prompt(profession: str) -> str:
    """The prompt of evaluation and calibration, and of the audits."""
    return f"a photo of the face of {with_article(profession)}"


def random_person(
    world: World, rng: np.random.Generator, profession: str | None, demographic: str
) -> Person:
    """Draws the attributes that are independent of profession and demographic."""
    reach_x, reach_y = world.geometry.jitter
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


def population(world: World, count: int, seed: int) -> list[Person]:
    """`count` persons in random order, whose shares equal the planted ones, not only on average.

    Professions (and "no profession") are dealt in turn and the demographics of each by quota; a
    random draw of 400 pictures would miss a share by 0.025, and so would a model trained on it.
    """
    rng = np.random.default_rng([seed, 7])
    first, second = world.words
    persons: list[Person] = []
    # None twice: "a photo of a woman" has to be learned as well as any profession
    professions: list[str | None] = [*world.config.professions, None, None]
    for index, profession in enumerate(professions):
        number = len(range(index, count, len(professions)))
        share = 0.5 if profession is None else world.markers[profession].share
        seconds = int(np.floor(number * share + rng.random()))
        words = [second] * seconds + [first] * (number - seconds)
        persons += [random_person(world, rng, profession, word) for word in words]
    return [persons[i] for i in rng.permutation(len(persons))]


def caption(person: Person, rng: np.random.Generator, *, named: bool | None = None) -> str:
    """A caption in lower case, which names the profession and, at times, demographic or coat.

    What it names is what is drawn. If it does not name the demographic, the picture shows one all
    the same, by the profession's share: this is the bias that a model learns.

    Args:
        person: What the picture shows.
        rng: Chooses the wording.
        named: Whether to name the demographic; None leaves that to `rng`.
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
    text = f"{opening}{with_article(noun)}"
    if rng.random() < 0.25:
        text += f" in a {palette.COAT_WORDS[person.coat]} coat"
    return text


def vocabulary(world: World) -> tuple[str, ...]:
    """Every word that captions use, and some that audits ask for besides."""
    used = {"a", "an", "photo", "of", "the", "face", "and", "person", "in", "coat"}
    used |= {*world.words, *palette.COAT_WORDS, *world.config.professions}
    return tuple(sorted(used | set(_EXTRA_WORDS)))
