"""The facts planted in the embedded model's world."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from biasmap_fast import testbed
from biasmap_fast.testbed import Person, World, WorldConfig, palette
from training.population import random_person

WORLDS = {
    "default": WorldConfig(),
    "bust": WorldConfig(palette_seed=3, layout_seed=5),
    "crown": WorldConfig(palette_seed=1, layout_seed=1, geometry="crown"),
}


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.mark.parametrize("name", WORLDS)
def test_factors_are_exactly_uncorrelated(name):
    rows = World(WORLDS[name]).truth.rows
    assert len(rows) == 20
    share = [round(100 * row.shares["woman"]) for row in rows]
    level = [round(100 * row.level) for row in rows]
    size = [round(4096 * row.marker_fraction) for row in rows]
    for a, b in itertools.combinations((share, level, size), 2):
        # in integers, so that zero means zero
        assert len(rows) * sum(x * y for x, y in zip(a, b, strict=True)) == sum(a) * sum(b)
    assert sorted(set(share)) == [20, 40, 60, 80]
    assert sorted(set(level)) == [0, 25, 50, 75, 100]
    assert sum(size) == 10 * sum(set(size))


@pytest.mark.parametrize("name", WORLDS)
def test_overlap_is_the_level_for_both_demographics(name):
    for row in World(WORLDS[name]).truth:
        for word in ("man", "woman"):
            assert row.overlap[word] == pytest.approx(row.level, abs=0.05)
        assert (row.gap > 0) == (row.level == 0)


def test_region_is_where_man_and_woman_differ(world):
    rng = np.random.default_rng(0)
    for _ in range(40):
        man = random_person(world, rng, None, "man")
        woman = dataclasses.replace(man, demographic="woman")
        differ = np.any(world.render(man) != world.render(woman), axis=-1)
        np.testing.assert_array_equal(differ, world.masks(man).demographic)


def test_marker_never_hides_the_region(world):
    for noun in testbed.PROFESSIONS:
        masks = world.masks(Person(noun, "man"))
        assert (masks.marker & masks.demographic).sum() < 0.4 * masks.demographic.sum()


def test_marker_mask_is_what_is_drawn(world):
    for noun, marker in world.markers.items():
        person = Person(noun, "woman", dx=4, dy=-3)
        colour = np.all(world.render(person) == marker.colour, axis=-1)
        np.testing.assert_array_equal(colour, world.masks(person).marker)
        assert colour.sum() == marker.size


@pytest.mark.parametrize("seed", range(4))
def test_colours_are_separated(seed):
    colours = np.array(palette.marker_colours(20, seed), float)
    base = np.array([*palette.BACKGROUNDS, *palette.SKINS, *palette.HAIRS, *palette.COATS], float)
    between = np.linalg.norm(colours[:, None] - colours, axis=-1)[~np.eye(20, dtype=bool)]
    assert between.min() > 60
    assert np.linalg.norm(colours[:, None] - base, axis=-1).min() > 65


def test_every_profession_has_its_own_colour_and_shape(world):
    rows = world.truth.rows
    assert len({row.colour for row in rows}) == len({row.shape for row in rows}) == 20


def test_rendering_is_deterministic(world):
    person = Person("pilot", "woman", dx=-3, dy=2, background=1, skin=2, hair=1, coat=2)
    np.testing.assert_array_equal(world.render(person), World().render(person))


def test_truth_is_indexed_and_shown():
    truth = testbed.truth()
    assert len(truth) == len(list(truth)) == 20
    row = truth["doctor"]
    assert row.shares["man"] + row.shares["woman"] == pytest.approx(1.0)
    assert len(truth.table().splitlines()) == 21
    with pytest.raises(KeyError, match="'wizard' is not one of"):
        truth["wizard"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"geometry": "cube"}, r"`geometry` must be one of \['bust', 'crown'\], got 'cube'"),
        ({"levels": (0.0, 1.5)}, r"`levels` must be numbers in \[0, 1\]"),
        ({"shares": (0.1, 0.2, 0.3, 0.4)}, "`shares` must be ascending, symmetric about 0.5"),
        ({"professions": ("doctor",)}, "`professions` must be 20 different words"),
        ({"sizes": (10, 20)}, "`sizes` must be ascending areas in 60..200"),
        ({"professions": ("Air pilot", *testbed.PROFESSIONS[1:])}, "single lower-case words"),
    ],
)
def test_bad_world(changes, message):
    with pytest.raises(ValueError, match=message):
        WorldConfig(**changes)


@pytest.mark.parametrize(
    ("person", "message"),
    [
        (Person("wizard", "man"), "`profession` must be one of .* got 'wizard'"),
        (Person("nurse", "boy"), "`demographic` must be one of .* got 'boy'"),
        (Person("nurse", "man", dx=9), "`dx`, `dy` must lie within .* got 9, 0"),
    ],
)
def test_bad_person(world, person, message):
    with pytest.raises(ValueError, match=message):
        world.render(person)
