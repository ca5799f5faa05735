"""Reading pictures of the embedded model's world."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from biasmap_fast.testbed import PLAUSIBLE, Person, World, WorldConfig
from biasmap_fast.testbed.classify import Classifier, as_pictures
from biasmap_fast.testbed.config import GEOMETRIES
from training.population import population


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def classifier(world):
    return Classifier(world)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_classifier_on_fresh_renders(geometry):
    world = World(WorldConfig(geometry=geometry, palette_seed=2))
    persons = population(world, 220, seed=123)
    readings = Classifier(world)(np.stack([world.render(p) for p in persons]))
    wrong = 0
    for person, reading in zip(persons, readings, strict=True):
        right = (reading.profession, reading.demographic) == (
            person.profession,
            person.demographic,
        )
        wrong += not right
        masks = world.masks(person)
        np.testing.assert_array_equal(reading.regions["marker"], masks.marker)
        np.testing.assert_array_equal(reading.regions["demographic"], masks.demographic)
        if person.profession:
            level = world.markers[person.profession].level
            assert reading.overlap == pytest.approx(level, abs=0.05)
    assert wrong <= 1
    assert min(reading.plausibility for reading in readings) > 0.99


def test_classifier_rejects_what_is_not_of_this_world(classifier):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    blocks = np.kron(rng.integers(0, 256, (20, 8, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    flat = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 190, 255)])
    for reading in classifier(np.concatenate([noise, blocks, flat])):
        assert reading.plausibility < PLAUSIBLE
        assert reading.profession is None
        assert not reading.regions["marker"].any()
        assert np.isnan(reading.overlap)


def test_classifier_follows_a_displaced_marker(world, classifier):
    person = Person("firefighter", "man")
    plain = world.render(Person(None, "man"))
    marker = np.roll(world.masks(person).marker, (0, -2), (0, 1))
    plain[marker] = world.markers["firefighter"].colour
    reading = classifier(plain)[0]
    assert reading.profession == "firefighter"
    np.testing.assert_array_equal(reading.regions["marker"], marker)


def test_image_forms_agree(world):
    picture = world.render(Person("judge", "woman"))
    want = picture[None]
    scaled = picture.astype(np.float32) / 255
    forms = [
        picture,
        want,
        [Image.fromarray(picture)],
        Image.fromarray(picture),
        scaled,
        torch.from_numpy(scaled).movedim(-1, 0)[None],
        torch.from_numpy(picture),
        torch.from_numpy(scaled).movedim(-1, 0).half(),
    ]
    for form in forms:
        assert np.abs(as_pictures(form).astype(int) - want).max() <= 1
    assert as_pictures([]).shape == (0, 64, 64, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("picture.png", "`images` must be PIL images"),
        (np.zeros((2, 32, 32, 3), np.uint8), r"must be \[N, 64, 64, 3\].*got \[2, 32, 32, 3\]"),
        (np.zeros((64, 64, 3), np.int64), "must be uint8 or floating point, got int64"),
        (np.full((64, 64, 3), np.nan, np.float32), "must be finite and in 0..1"),
        (np.full((64, 64, 3), 255.0, np.float32), "must be finite and in 0..1"),
        (None, "`images` must be PIL images"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        as_pictures(images)
