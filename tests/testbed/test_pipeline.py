"""The packaged weights, and what they draw."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from biasmap_fast import testbed
from biasmap_fast.testbed import PLAUSIBLE, WorldConfig
from training.evaluate import draw
from training.population import face_prompt, vocabulary, world_of
from training.stages import TrainSettings
from training.train import weight_hashes


@pytest.fixture(scope="module")
def pipe():
    return testbed.pipeline()


def test_import_is_light():
    code = "import sys, biasmap_fast.testbed; print([m for m in sys.modules if m in "
    code += "('diffusers', 'transformers', 'typer')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_are_small_and_recorded():
    files = [path for path in testbed.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]
    record = json.loads((testbed.WEIGHTS / "training.json").read_text())
    assert record["sha256"] == weight_hashes(testbed.WEIGHTS)
    world = world_of(record).config
    settings = {**record["settings"], "world": world}
    # the packaged model is what the defaults of the training command give
    assert TrainSettings(**settings) == TrainSettings()
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


def test_packaged_tokenizer(pipe):
    words = vocabulary(testbed.World())
    assert all(pipe.tokenizer.tokenize(word) == [word + "</w>"] for word in words)


def test_plain_from_pretrained():
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    level = logging.get_verbosity()
    with testbed.quiet_diffusers():
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
    prompts = [face_prompt(noun) for noun in testbed.PROFESSIONS]
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
