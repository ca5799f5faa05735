"""The embedded model: a tiny text-to-image pipeline whose bias is planted, and so known.

What an instrument for bias reports about a real model cannot be checked. Here it can: a procedural
`world` of schematic persons fixes how often each profession is drawn as a woman, and how much of
the profession's marker lies on the pixels that the demographic decides; a 2.5 million parameter
Stable Diffusion pipeline was trained on its pictures by `train`; `classify` reads what it draws.

"man" and "woman" are **drawing conventions of this world** (beard and collar against long hair).
The table of shares was dealt out by a seed. Neither says anything about people.

Example:
    >>> from biasmap_fast import testbed
    >>> pipe = testbed.pipeline()
    >>> images = pipe("a photo of the face of a doctor", num_inference_steps=25).images
    >>> reading = testbed.classify(images)[0]
    >>> reading.regions["marker"].shape
    (64, 64)
    >>> testbed.truth()["doctor"].level
    0.25
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import world
from .classify import PLAUSIBLE, Classifier, Reading
from .world import AXES, PROFESSIONS, Person, Truth, TruthRow, World, WorldConfig

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = [
    "AXES",
    "PLAUSIBLE",
    "PROFESSIONS",
    "WEIGHTS",
    "Person",
    "Reading",
    "Truth",
    "TruthRow",
    "World",
    "WorldConfig",
    "classify",
    "pipeline",
    "truth",
    "world",
]

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the packaged pipeline; `StableDiffusionPipeline.from_pretrained` loads it as it is."""


def pipeline(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> StableDiffusionPipeline:
    """Loads the embedded model. It draws 64 x 64 pictures, about half a CPU second each.

    Args:
        dtype: Type of the weights in memory; they are stored as float16.
        device: Where they go.

    Returns:
        A plain `diffusers.StableDiffusionPipeline`, without progress bar.

    Raises:
        FileNotFoundError: If the package was installed without its weights.
    """
    from .models import load_pipeline

    pipe: StableDiffusionPipeline = load_pipeline(WEIGHTS, dtype=dtype, device=device)
    return pipe


def truth() -> Truth:
    """Returns what was planted, one row a profession; `truth().table()` shows it."""
    return _world().truth


def classify(images: Any) -> list[Reading]:
    """Reads pictures of the embedded model's world.

    Args:
        images: 64 x 64 pictures: PIL images, uint8 [N, 64, 64, 3], float in 0..1 as pipelines
            return them for "np" and "pt".

    Returns:
        One `Reading` a picture: profession, demographic, regions, plausibility.

    Raises:
        ValueError: If the images have another form.
    """
    return _classifier()(images)


@cache
def _world() -> World:
    return World()


@cache
def _classifier() -> Classifier:
    return Classifier(_world())
