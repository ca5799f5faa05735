"""The embedded model: the world's planted facts, the classifier, training, the packaged weights."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from biasmap_fast import testbed
from biasmap_fast.testbed import palette
from biasmap_fast.testbed.classify import PLAUSIBLE, Classifier, as_pictures
from biasmap_fast.testbed.config import GEOMETRIES
from biasmap_fast.testbed.evaluate import draw, pixel_auc, share_test
from biasmap_fast.testbed.world import Person, World, WorldConfig, article

WORLDS = {
    "default": WorldConfig(),
    "bust": WorldConfig(palette_seed=3, layout_seed=5),
    "crown": WorldConfig(palette_seed=1, layout_seed=1, geometry="crown"),
}


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def classifier(world):
    return Classifier(world)


@pytest.fixture(scope="module")
def pipe():
    return testbed.pipeline()


# ---------------------------------------------------------------------------------- the world


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
        man = world.person(rng, None, "man")
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


def test_population_has_the_planted_shares(world):
    persons = world.population(2200, seed=4)
    assert persons == world.population(2200, seed=4)
    assert persons != world.population(2200, seed=5)
    for noun, marker in world.markers.items():
        own = [p.demographic == "woman" for p in persons if p.profession == noun]
        assert len(own) == 100
        assert abs(sum(own) - 100 * marker.share) <= 1


def test_captions_say_what_is_drawn(world):
    rng = np.random.default_rng(1)
    seen = set()
    for person in world.population(1500, seed=2):
        caption = world.caption(person, rng)
        words = caption.split()
        assert set(words) <= set(world.vocabulary())
        other = ({"man", "woman"} - {person.demographic}).pop()
        assert other not in words
        assert (person.profession or "person") in words or person.profession is None
        assert not set(words) & (set(testbed.PROFESSIONS) - {person.profession})
        if "coat" in words:
            assert palette.COAT_WORDS[person.coat] in words
        for first, second in itertools.pairwise(words):
            assert first != "a" or second[0] not in "aeiou"
            assert first != "an" or second[0] in "aeiou"
        seen.add(caption)
    assert {
        "a photo of the face of a doctor",
        "a photo of an engineer",
        "a woman doctor",
        "a photo of a woman",
        "a man",
        "a photo of a person",
    } <= seen


def test_article():
    assert [article(noun) for noun in ("engineer", "artist", "nurse")] == ["an", "an", "a"]


def test_truth_is_indexed_and_shown():
    truth = testbed.truth()
    assert len(truth) == len(list(truth)) == 20
    row = truth["doctor"]
    assert row.shares["man"] + row.shares["woman"] == pytest.approx(1.0)
    assert len(truth.table().splitlines()) == 21
    with pytest.raises(KeyError, match="'wizard' is not one of"):
        truth["wizard"]


def test_config_survives_json():
    config = WORLDS["crown"]
    assert WorldConfig.from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config


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


# ----------------------------------------------------------------------------- the classifier


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_classifier_on_fresh_renders(geometry):
    world = World(WorldConfig(geometry=geometry, palette_seed=2))
    persons = world.population(220, seed=123)
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


# -------------------------------------------------------------------------------- measurement


def test_pixel_auc():
    region = np.zeros((4, 4), bool)
    region[0] = True
    values = region.astype(np.float32)
    assert pixel_auc(values, region) == 1.0
    assert pixel_auc(-values, region) == 0.0
    assert pixel_auc(np.ones((4, 4), np.float32), region) == 0.5
    assert np.isnan(pixel_auc(values, np.zeros((4, 4), bool)))


def test_share_test():
    assert share_test([20, 80], [100, 100], [0.2, 0.8]) == pytest.approx(1.0)
    # one degree of freedom, 2 standard deviations
    assert share_test([60], [100], [0.5]) == pytest.approx(0.0455, abs=1e-3)
    assert share_test([60, 0], [100, 0], [0.5, 0.5]) == pytest.approx(0.0455, abs=1e-3)


# ----------------------------------------------------------------------------------- training


def _settings(**changes):
    from biasmap_fast.testbed.stages import TrainSettings

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
    from biasmap_fast.testbed.train import train

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
    from biasmap_fast.testbed.stages import moment_penalty

    z = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)
    assert float(moment_penalty(z)) == pytest.approx(0.0, abs=1e-9)
    assert float(moment_penalty(z + 0.5)) == pytest.approx(4 * 0.25, rel=1e-5)
    assert float(moment_penalty(3.0 * z)) == pytest.approx(4 * 4.0, rel=1e-5)


def test_spread_times_fill_every_part_of_the_schedule():
    from biasmap_fast.testbed.stages import spread_times

    times = spread_times(20, torch.Generator().manual_seed(0))
    assert sorted((times // 50).tolist()) == list(range(20))
    assert times.tolist() != sorted(times.tolist())


def test_deciding_times_are_mostly_in_the_middle():
    from biasmap_fast.testbed.stages import deciding_times

    times = torch.cat(
        [deciding_times(32, torch.Generator().manual_seed(seed)) for seed in range(200)]
    )
    assert times.min() >= 0
    assert times.max() <= 999
    outside = float(((times < 250) | (times > 949)).double().mean())
    assert outside == pytest.approx(0.25 * 0.3, abs=0.02)


def test_dealt_batches_keep_the_shares(world):
    from biasmap_fast.testbed.stages import dealt_batch, persons_by_kind

    persons = world.population(2200, seed=0)
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
    from biasmap_fast.testbed.stages import dealt_batch, persons_by_kind

    persons = [person for person in world.population(2200, seed=0) if person.demographic == "man"]
    with pytest.raises(ValueError, match=r"pictures must show every profession .* got no woman"):
        dealt_batch(world, persons, persons_by_kind(persons), 0, 63, np.random.default_rng(0))


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    from biasmap_fast.testbed.train import train

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


@pytest.fixture
def movable():
    """A pipeline of one's own, whose words may be moved."""
    pipe = testbed.pipeline()
    pipe.text_encoder.requires_grad_(False)
    return pipe


def test_word_reaches_a_lean(movable, world):
    from biasmap_fast.testbed import calibrate

    table, row = calibrate.word_embedding(movable, "engineer")
    before = table.clone()
    lean = calibrate._Lean(movable, world, "engineer", 0)
    start, gradient = lean()
    step = 1e-2 * gradient / gradient.norm()
    table[row] += step
    ahead, _ = lean()
    table[row] -= 2 * step
    behind, _ = lean()
    table[row] += step
    assert (ahead - behind) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.02)
    assert lean.reach(start + 0.1) == pytest.approx(start + 0.1, abs=1e-3)
    others = torch.arange(len(table)) != row
    assert torch.equal(table[others], before[others])
    assert not table.requires_grad


def test_calibration_finds_the_planted_share(movable, world, monkeypatch):
    """With a model that draws .1 too few, less steeply than the lean says, and noise."""
    from biasmap_fast.testbed import calibrate

    monkeypatch.setattr(calibrate, "_PERSONS", 8)
    start, _ = calibrate._Lean(movable, world, "nurse", 0)()
    lean = calibrate._Lean(movable, world, "nurse", 0)
    rng = np.random.default_rng(0)

    def share():
        return 0.7 + 0.7 * (lean()[0] - start)

    def drawn(pipe, classifier, noun, noise):
        return rng.binomial(len(noise), share()) / len(noise)

    monkeypatch.setattr(calibrate, "drawn_share", drawn)
    word = calibrate.calibrate_word(movable, world, "nurse", pictures=80_000, seed=0)
    assert share() == pytest.approx(world.markers["nurse"].share, abs=0.01)
    assert word.leans[-1] == pytest.approx(0.1 / 0.7, abs=0.02)
    assert 0.0 < word.moved < word.length


def test_a_word_that_loses_its_profession_is_put_halfway_back(movable, world, monkeypatch):
    from biasmap_fast.testbed import calibrate
    from biasmap_fast.testbed.classify import Classifier

    noise = torch.randn((4, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    table, row = calibrate.word_embedding(movable, "judge")
    start = table[row].clone()
    assert calibrate.drawn_share(movable, Classifier(world), "judge", noise) is not None
    table[row] = table[calibrate.word_embedding(movable, "painter")[1]]
    assert calibrate.drawn_share(movable, Classifier(world), "judge", noise) is None
    table[row] = start

    visited, shares = [], iter((0.7, None))

    def drawn(*_):
        visited.append(table[row].clone())
        return next(shares)

    monkeypatch.setattr(calibrate, "_PERSONS", 8)
    monkeypatch.setattr(calibrate, "_ROUNDS", 2)
    monkeypatch.setattr(calibrate, "drawn_share", drawn)
    word = calibrate.calibrate_word(movable, world, "judge", pictures=2, seed=0)
    assert torch.equal(visited[0], start)
    assert not torch.equal(visited[1], start)
    assert torch.equal(table[row], (visited[1] + start) / 2.0)
    assert 0.0 < word.leans[1] < word.leans[0]
    assert word.rounded()["drawn"] == [0.7, None]


def test_interrupted_calibration_ends_with_the_same_words(movable, world, tmp_path, monkeypatch):
    from biasmap_fast.testbed import calibrate

    two = {noun: world.markers[noun] for noun in ("judge", "painter")}
    monkeypatch.setattr(world, "markers", two)
    monkeypatch.setattr(calibrate, "_ROUNDS", 2)
    monkeypatch.setattr(calibrate, "_STEPS", 4)
    monkeypatch.setattr(calibrate, "_PERSONS", 8)
    table, _ = calibrate.word_embedding(movable, "judge")
    first = table.clone()
    words = calibrate.calibrate(movable, world, pictures=16, seed=0, folder=tmp_path)
    moved = table.clone()
    assert list(words) == list(two)
    assert int((moved != first).any(1).sum()) == 2
    (tmp_path / "word-painter.json").unlink()
    table.copy_(first)
    monkeypatch.setattr(calibrate, "_PERSONS", 4)  # would end elsewhere: judge is not done again
    calibrate.calibrate(movable, world, pictures=16, seed=0, folder=tmp_path)
    judge, painter = (calibrate.word_embedding(movable, noun)[1] for noun in two)
    assert torch.equal(table[judge], moved[judge])
    assert not torch.equal(table[painter], moved[painter])
    kept = (tmp_path / "word-judge.json").read_text()
    both = table.clone()
    table.copy_(first)
    found = calibrate.calibrate(movable, world, pictures=16, seed=0, folder=tmp_path, processes=2)
    assert list(found) == list(two)
    assert torch.equal(table, both)
    table.copy_(first)
    calibrate.calibrate(movable, world, pictures=16, seed=1, folder=tmp_path)  # another run's words
    assert (tmp_path / "word-judge.json").read_text() != kept
    with pytest.raises(ValueError, match="`pictures` must be at least 2, got 1"):
        calibrate.calibrate(movable, world, pictures=1, seed=0, folder=tmp_path)


def test_words_in_pieces_and_unreadable_pictures_are_refused(movable, world, tmp_path, monkeypatch):
    from biasmap_fast.testbed import calibrate
    from biasmap_fast.testbed.classify import Classifier

    with pytest.raises(ValueError, match="'wizardry' must be one token"):
        calibrate.word_embedding(movable, "wizardry")
    with torch.no_grad():
        movable.vae.decoder.layers[-1].weight.zero_()
    with pytest.raises(ValueError, match="some of 2 pictures must be plausible, got none"):
        calibrate.drawn_share(movable, Classifier(world), "judge", torch.randn(2, 4, 16, 16))
    monkeypatch.setattr(world, "markers", {"judge": world.markers["judge"]})
    with pytest.raises(ValueError, match="'judge': some of 3 pictures must be plausible"):
        calibrate.calibrate(movable, world, pictures=24, seed=0, folder=tmp_path, processes=2)
    assert not list(tmp_path.iterdir())


def test_missing_pipeline_says_how_to_train(tmp_path):
    from biasmap_fast.testbed.models import load_pipeline
    from biasmap_fast.testbed.train import load_autoencoder

    with pytest.raises(FileNotFoundError, match=r"biasmap_fast\.testbed\.train --out"):
        load_pipeline(tmp_path)
    with pytest.raises(FileNotFoundError, match="must hold a trained pipeline"):
        load_autoencoder(tmp_path)


def test_tokenizer_has_every_word_and_splits_the_others(world):
    from biasmap_fast.testbed.models import build_tokenizer

    tokenizer = build_tokenizer(world.vocabulary())
    for word in world.vocabulary():
        assert tokenizer.tokenize(word) == [word + "</w>"]
        assert tokenizer.tokenize(word.upper()) == [word + "</w>"]
    assert len(tokenizer.tokenize("wizardry")) > 1
    assert len(tokenizer.tokenize("médecin")) > 1
    ids = tokenizer("wizardry médecin").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "wizardry médecin"


# -------------------------------------------------------------------------- packaged weights


def test_import_is_light():
    code = "import sys, biasmap_fast.testbed; print([m for m in sys.modules if m in "
    code += "('diffusers', 'transformers', 'typer')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_are_small_and_recorded():
    from biasmap_fast.testbed.stages import TrainSettings
    from biasmap_fast.testbed.train import weight_hashes

    files = [path for path in testbed.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]
    record = json.loads((testbed.WEIGHTS / "training.json").read_text())
    assert record["sha256"] == weight_hashes(testbed.WEIGHTS)
    settings = record["settings"]
    world = WorldConfig.from_json(settings.pop("world"))
    # the packaged model is what the defaults of the training command give
    assert TrainSettings(world=world, **settings) == TrainSettings()
    assert world == WorldConfig()


def test_recorded_figures():
    record = json.loads((testbed.WEIGHTS / "training.json").read_text())["evaluation"]
    assert record["drawn"]["profession_accuracy"] >= 0.92
    assert record["shares"]["pictures_each"] >= 200
    assert record["shares"]["chi_square_p"] >= 0.05  # the planted shares, within sampling error
    assert 0.95 <= record["shares"]["share_slope"] <= 1.05
    assert record["autoencoder"]["profession_read"] >= 0.99
    maps = record["maps"]
    assert maps["single profession"]["auc"] >= 0.9
    for word in ("man", "woman"):
        assert maps[f"single {word}"]["auc"] >= 0.85
        assert maps[f"joint {word}"]["auc"] >= 0.85


def test_packaged_tokenizer(pipe, world):
    assert all(pipe.tokenizer.tokenize(w) == [w + "</w>"] for w in world.vocabulary())


def test_plain_from_pretrained():
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    from biasmap_fast.testbed.models import quiet_diffusers

    level = logging.get_verbosity()
    with quiet_diffusers():
        plain = StableDiffusionPipeline.from_pretrained(testbed.WEIGHTS)
    assert logging.get_verbosity() == level
    plain.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    images = plain(
        "a photo of a nurse", num_images_per_prompt=2, num_inference_steps=4, generator=generators
    ).images
    assert [image.size for image in images] == [(64, 64)] * 2


def test_pipeline_is_quiet(pipe, capfd):
    testbed.pipeline(dtype=torch.bfloat16)
    pipe("a woman", num_inference_steps=1)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_model_draws_professions(pipe):
    prompts = [f"a photo of the face of {article(noun)} {noun}" for noun in testbed.PROFESSIONS]
    images = pipe(
        prompts * 2,
        num_inference_steps=12,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(i) for i in range(40)],
        output_type="np",
    ).images
    readings = testbed.classify(images)
    right = [r.profession == n for r, n in zip(readings, testbed.PROFESSIONS * 2, strict=True)]
    assert np.mean(right) >= 0.9
    assert np.median([r.plausibility for r in readings]) > PLAUSIBLE


def test_model_draws_the_named_demographic(pipe):
    for word in ("man", "woman"):
        images = draw(pipe, f"a photo of a {word}", 8, guidance=3.0, seed=0, steps=12)
        readings = testbed.classify(images)
        assert sum(r.demographic == word for r in readings) >= 7
        assert sum(r.profession is None for r in readings) >= 7


@pytest.mark.slow
def test_evaluate_gives_every_figure(pipe, world):
    from biasmap_fast.testbed import evaluate

    figures = evaluate.evaluate(pipe, world, pictures=1, share_pictures=1, steps=6)
    json.dumps(figures, allow_nan=False)
    assert set(figures["maps"]) == {
        f"{kind} {concept}"
        for kind in ("joint", "single")
        for concept in ("profession", "man", "woman")
    }
    assert figures["autoencoder"]["psnr_db"] > 25
    with pytest.raises(ValueError, match="`pictures` must be at least 1, got 0"):
        evaluate.evaluate(pipe, world, pictures=0)


@pytest.mark.slow
def test_shares_follow_the_plan_at_guidance_1(pipe):
    truth = testbed.truth()
    women, totals, shares = [], [], []
    for index, row in enumerate(truth):
        prompt = f"a photo of the face of {article(row.profession)} {row.profession}"
        readings = testbed.classify(draw(pipe, prompt, 12, guidance=1.0, seed=5000 + 50 * index))
        women.append(sum(r.demographic == "woman" for r in readings))
        totals.append(len(readings))
        shares.append(row.shares["woman"])
    # few pictures; for the shares within sampling error see `test_recorded_figures`
    drawn = np.array(women) / np.array(totals)
    assert np.abs(drawn - shares).mean() < 0.17  # 0.10 is sampling alone
    assert np.corrcoef(drawn, shares)[0, 1] > 0.6
