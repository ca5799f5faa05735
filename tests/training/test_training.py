"""Population, captions, and the training loops."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from biasmap_fast import testbed
from biasmap_fast.testbed import World, WorldConfig, palette
from training.networks import build_tokenizer
from training.population import caption, population, vocabulary, world_of
from training.stages import (
    TrainSettings,
    dealt_batch,
    deciding_times,
    moment_penalty,
    persons_by_kind,
    spread_times,
)
from training.train import load_autoencoder, train


@pytest.fixture(scope="module")
def world():
    return World()


def test_population_has_the_planted_shares(world):
    persons = population(world, 2200, seed=4)
    assert persons == population(world, 2200, seed=4)
    assert persons != population(world, 2200, seed=5)
    for noun, marker in world.markers.items():
        own = [p.demographic == "woman" for p in persons if p.profession == noun]
        assert len(own) == 100
        assert abs(sum(own) - 100 * marker.share) <= 1


def test_captions_say_what_is_drawn(world):
    rng = np.random.default_rng(1)
    seen = set()
    for person in population(world, 1500, seed=2):
        text = caption(person, rng)
        words = text.split()
        assert set(words) <= set(vocabulary(world))
        other = ({"man", "woman"} - {person.demographic}).pop()
        assert other not in words
        assert (person.profession or "person") in words or person.profession is None
        assert not set(words) & (set(testbed.PROFESSIONS) - {person.profession})
        if "coat" in words:
            assert palette.COAT_WORDS[person.coat] in words
        for first, second in itertools.pairwise(words):
            assert first != "a" or second[0] not in "aeiou"
            assert first != "an" or second[0] in "aeiou"
        seen.add(text)
    assert {
        "a photo of the face of a doctor",
        "a photo of an engineer",
        "a woman doctor",
        "a photo of a woman",
        "a man",
        "a photo of a person",
    } <= seen


def test_world_of_a_record():
    config = WorldConfig(palette_seed=1, layout_seed=1, geometry="crown")
    settings = dataclasses.asdict(TrainSettings(world=config))
    assert world_of(json.loads(json.dumps({"settings": settings}))).config == config


def _settings(**changes):

    small = {
        "pictures": 44,
        "autoencoder_steps": 3,
        "unet_steps": 3,
        "settle_steps": 2,
        "unet_batch": 4,
        "settle_batch": 4,
        "calibration_pictures": 0,  # such a model draws nothing that can be read
    }
    return TrainSettings(**{**small, **changes})


def test_interrupted_training_ends_with_the_same_weights(tmp_path):

    settings = _settings()
    train(settings, tmp_path / "straight")
    assert train(settings, tmp_path / "broken", stop_after=2) is None
    assert not (tmp_path / "broken").exists()
    assert train(settings, tmp_path / "broken", stop_after=2) is None  # now within the UNet
    train(settings, tmp_path / "broken")
    straight, broken = (
        json.loads((tmp_path / name / "training.json").read_text())
        for name in ("straight", "broken")
    )
    assert straight["sha256"] == broken["sha256"]
    assert straight["losses_every_100_steps"] == broken["losses_every_100_steps"]
    assert len(straight["sha256"]) == 3
    assert not list((tmp_path / "broken.work").glob("*.tmp"))


def test_moment_penalty_is_zero_for_standard_channels():

    z = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)
    assert float(moment_penalty(z)) == pytest.approx(0.0, abs=1e-9)
    assert float(moment_penalty(z + 0.5)) == pytest.approx(4 * 0.25, rel=1e-5)
    assert float(moment_penalty(3.0 * z)) == pytest.approx(4 * 4.0, rel=1e-5)


def test_spread_times_fill_every_part_of_the_schedule():

    times = spread_times(20, torch.Generator().manual_seed(0))
    assert sorted((times // 50).tolist()) == list(range(20))
    assert times.tolist() != sorted(times.tolist())


def test_deciding_times_are_mostly_in_the_middle():

    times = torch.cat(
        [deciding_times(32, torch.Generator().manual_seed(seed)) for seed in range(200)]
    )
    assert times.min() >= 0
    assert times.max() <= 999
    outside = float(((times < 250) | (times > 949)).double().mean())
    assert outside == pytest.approx(0.25 * 0.3, abs=0.02)


def test_dealt_batches_keep_the_shares(world):

    persons = population(world, 2200, seed=0)
    kinds = persons_by_kind(persons)
    rng = np.random.default_rng(0)
    size = 21 * 20  # twenty visits of every profession, ten of them without the demographic's word
    chosen, captions = dealt_batch(world, persons, kinds, 0, size, rng)
    halves = [dealt_batch(world, persons, kinds, k, size // 2, rng) for k in (0, size // 2)]
    assert [persons[i].demographic for half, _ in halves for i in half] == [
        persons[i].demographic for i in chosen
    ]
    for place, noun in enumerate(testbed.PROFESSIONS):
        own = [persons[i] for i in chosen[place::21]]
        assert {person.profession for person in own} == {noun}
        for half in (own[::2], own[1::2]):
            women = sum(person.demographic == "woman" for person in half)
            assert women == pytest.approx(10 * world.markers[noun].share)
    named = [bool({"man", "woman"} & set(text.split())) for text in captions]
    assert 0.4 < np.mean(named) < 0.5


def test_dealing_a_kind_that_nobody_is(world):

    persons = [person for person in population(world, 2200, seed=0) if person.demographic == "man"]
    with pytest.raises(ValueError, match=r"pictures must show every profession .* got no woman"):
        dealt_batch(world, persons, persons_by_kind(persons), 0, 63, np.random.default_rng(0))


def test_checkpoint_of_other_settings_is_refused(tmp_path):

    train(_settings(), tmp_path / "model", stop_after=1)
    with pytest.raises(ValueError, match="was written with other settings"):
        train(_settings(seed=1), tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet_steps": 0}, "`unet_steps` must be at least 1, got 0"),
        ({"calibration_pictures": -1}, "`calibration_pictures` must be at least 0, got -1"),
        ({"pictures": 2}, "`pictures` must be at least the batch size, got 2"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        _settings(**changes)


def test_missing_pipeline_says_how_to_train(tmp_path):

    with pytest.raises(FileNotFoundError, match=r"training\.train --out"):
        testbed.pipeline(tmp_path)
    with pytest.raises(FileNotFoundError, match="must hold a trained pipeline"):
        load_autoencoder(tmp_path)


def test_tokenizer_has_every_word_and_splits_the_others(world):

    tokenizer = build_tokenizer(vocabulary(world))
    for word in vocabulary(world):
        assert tokenizer.tokenize(word) == [word + "</w>"]
        assert tokenizer.tokenize(word.upper()) == [word + "</w>"]
    assert len(tokenizer.tokenize("wizardry")) > 1
    assert len(tokenizer.tokenize("médecin")) > 1
    ids = tokenizer("wizardry médecin").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "wizardry médecin"
