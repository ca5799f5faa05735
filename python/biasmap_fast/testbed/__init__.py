"""The embedded model: a tiny text-to-image pipeline whose bias is planted, and so known.

What an instrument for bias reports about a real model cannot be checked. Here it can: a procedural
`world` of schematic persons fixes how often each profession is drawn as a woman, and how much of
the profession's marker lies on the pixels that the demographic decides; a 2.5 million parameter
Stable Diffusion pipeline was trained on its pictures (`training/` in the repository); `classify`
reads what it draws.

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

import contextlib
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import world
from .classify import PLAUSIBLE, Classifier, Reading
from .config import AXES, PROFESSIONS, Person, WorldConfig
from .world import Truth, TruthRow, World

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    folder: Path = WEIGHTS,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StableDiffusionPipeline:
    """Loads the embedded model. It draws 64 x 64 pictures, about half a CPU second each.

    Args:
        folder: Another model of this kind, as `training` writes it.
        dtype: Type of the weights in memory; they are stored as float16.
        device: Where they go.

    Returns:
        A plain `diffusers.StableDiffusionPipeline`, without a progress bar.

    Raises:
        FileNotFoundError: If the folder holds no pipeline.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} must hold a pipeline (model_index.json); train one with "
            f"`python -m training.train --out {folder}`"
        )
    with quiet_diffusers():
        from diffusers import StableDiffusionPipeline  # its import has remarks of its own

        pipe = StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, safety_checker=None, local_files_only=True
        ).to(device)
    pipe.set_progress_bar_config(disable=True)
    loaded: StableDiffusionPipeline = pipe
    return loaded


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silences notices of diffusers and transformers while a pipeline is put together.

    `StableDiffusionPipeline` declares its `vae` as `AutoencoderKL` and remarks on the
    `AutoencoderTiny` used here, which it supports; levels and bars are put back afterwards.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    modules: list[Any] = [diffusers_logging, transformers_logging]
    levels = [module.get_verbosity() for module in modules]
    bars = [module.is_progress_bar_enabled() for module in modules]
    try:
        for module in modules:
            module.set_verbosity_error()
            module.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, level, bar in zip(modules, levels, bars, strict=True):
            module.set_verbosity(level)
            if bar:
                module.enable_progress_bar()


def truth() -> Truth:
    """Returns what was planted, one row per profession; `truth().table()` shows it."""
    return _world().truth


def classify(images: Any) -> list[Reading]:
    """Reads pictures of the embedded model's world.

    Args:
        images: 64 x 64 PIL images, uint8 [N, 64, 64, 3], or float in 0..1 as pipelines return them.

    Returns:
        One `Reading` per picture: profession, demographic, regions, plausibility.

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
