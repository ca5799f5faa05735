"""Moving the words of professions until the planted shares are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from biasmap_fast import testbed
from biasmap_fast.testbed import World
from biasmap_fast.testbed.classify import Classifier
from training import calibrate


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture
def movable():
    """A pipeline of one's own, whose words may be moved."""
    pipe = testbed.pipeline()
    pipe.text_encoder.requires_grad_(False)
    return pipe


@pytest.fixture
def quick(monkeypatch):
    """A lean of few persons at one time, and pictures of few steps."""
    monkeypatch.setattr(calibrate, "_PERSONS", 8)
    monkeypatch.setattr(calibrate, "_TIMES", (900,))
    monkeypatch.setattr(calibrate, "_STEPS", 4)
    return monkeypatch


def test_word_reaches_a_lean(movable, world, quick):

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


def test_calibration_finds_the_planted_share(movable, world, quick):
    """With a model that draws .1 too few, less steeply than the lean says, and noise."""

    start, _ = calibrate._Lean(movable, world, "nurse", 0)()
    lean = calibrate._Lean(movable, world, "nurse", 0)
    rng = np.random.default_rng(0)

    def share():
        return 0.7 + 0.7 * (lean()[0] - start)

    def drawn(pipe, classifier, noun, noise):
        return rng.binomial(len(noise), share()) / len(noise)

    quick.setattr(calibrate, "drawn_share", drawn)
    word = calibrate.calibrate_word(movable, world, "nurse", pictures=80_000, seed=0)
    assert share() == pytest.approx(world.markers["nurse"].share, abs=0.01)
    assert word.leans[-1] == pytest.approx(0.1 / 0.7, abs=0.02)
    assert 0.0 < word.moved < word.length


def test_a_word_that_loses_its_profession_is_put_halfway_back(movable, world, quick):

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

    quick.setattr(calibrate, "_ROUNDS", 2)
    quick.setattr(calibrate, "drawn_share", drawn)
    word = calibrate.calibrate_word(movable, world, "judge", pictures=2, seed=0)
    assert torch.equal(visited[0], start)
    assert not torch.equal(visited[1], start)
    assert torch.equal(table[row], (visited[1] + start) / 2.0)
    assert 0.0 < word.leans[1] < word.leans[0]
    assert word.rounded()["drawn"] == [0.7, None]


def test_interrupted_calibration_ends_with_the_same_words(movable, world, tmp_path, quick):

    two = {noun: world.markers[noun] for noun in ("judge", "painter")}
    quick.setattr(world, "markers", two)
    quick.setattr(calibrate, "_ROUNDS", 2)
    table, _ = calibrate.word_embedding(movable, "judge")
    first = table.clone()
    words = calibrate.calibrate(movable, world, pictures=16, seed=0, folder=tmp_path)
    moved = table.clone()
    assert list(words) == list(two)
    assert int((moved != first).any(1).sum()) == 2
    (tmp_path / "word-painter.json").unlink()
    table.copy_(first)
    quick.setattr(calibrate, "_PERSONS", 4)  # would end elsewhere: judge is not done again
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


def test_words_in_pieces_and_unreadable_pictures_are_refused(movable, world, tmp_path, quick):

    with pytest.raises(ValueError, match="'wizardry' must be one token"):
        calibrate.word_embedding(movable, "wizardry")
    with torch.no_grad():
        movable.vae.decoder.layers[-1].weight.zero_()
    with pytest.raises(ValueError, match="some of 2 pictures must be plausible, got none"):
        calibrate.drawn_share(movable, Classifier(world), "judge", torch.randn(2, 4, 16, 16))
    quick.setattr(world, "markers", {"judge": world.markers["judge"]})
    with pytest.raises(ValueError, match="'judge': some of 3 pictures must be plausible"):
        calibrate.calibrate(movable, world, pictures=24, seed=0, folder=tmp_path)
    assert not list(tmp_path.iterdir())
