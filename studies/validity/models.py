"""The models of the validity study: two groups of small models, each trained from its own seed.

The groups share no training seed, no palette, no geometry and no layout, a layout being which
profession has which level, share, size, shape and place.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from biasmap_fast.testbed import World, WorldConfig, quiet_diffusers
from training.population import population
from training.stages import TrainSettings, render_all, train_autoencoder
from training.train import load_autoencoder, train

LOG = logging.getLogger(__name__)
# a fifth of the embedded model's training: ten minutes on a core
PICTURES, UNET_STEPS, SETTLE_STEPS = 6600, 1200, 200


@dataclass(frozen=True)
class Group:
    """Models of one geometry and palette."""

    name: str
    geometry: str
    palette_seed: int
    layout_seeds: tuple[int, ...]
    seeds: tuple[int, ...]

    def settings(self, index: int) -> TrainSettings:
        """What decides the weights of one model."""
        world = WorldConfig(
            palette_seed=self.palette_seed,
            layout_seed=self.layout_seeds[index],
            geometry=self.geometry,
        )
        return TrainSettings(
            seed=self.seeds[index],
            world=world,
            pictures=PICTURES,
            unet_steps=UNET_STEPS,
            settle_steps=SETTLE_STEPS,
            calibration_pictures=0,
        )


# The packaged model is layout 0 of palette 0, and has been looked at: it is in neither group.
GROUPS = {
    "choosing": Group("choosing", "bust", 0, (1, 3, 5, 6, 7), (1, 2, 3, 4, 5)),
    "final": Group("final", "crown", 1, (11, 12, 13, 14, 15), (11, 12, 13, 14, 15)),
}


def train_group(group: Group, folder: Path, indices: tuple[int, ...]) -> None:
    """Trains what is missing of a group; a run that was killed continues.

    The models of a group share an autoencoder, trained on pictures of all its layouts: trained on
    one layout alone it lost the colours of markers elsewhere (77 % of the professions readable).
    """
    shared = folder / group.name / "autoencoder"
    if not (shared / "vae").is_dir():
        _train_autoencoder(group, shared)
    for index in indices:
        path = folder / group.name / f"seed-{group.seeds[index]}"
        if not (path / "training.json").is_file():
            LOG.info("training %s", path)
            autoencoder, sha256 = load_autoencoder(shared)  # `train` halves it in place
            settings = replace(group.settings(index), autoencoder_sha256=sha256)
            train(settings, path, autoencoder)


def _train_autoencoder(group: Group, folder: Path) -> None:
    """Trains an autoencoder on equal parts of all the group's layouts."""
    settings = group.settings(0)
    count = len(group.seeds)
    pictures = []
    for index in range(count):
        world = World(group.settings(index).world)
        persons = population(world, PICTURES // count, group.seeds[index])
        pictures.append(render_all(world, persons))
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    autoencoder, _ = train_autoencoder(settings, torch.cat(pictures), work)
    with quiet_diffusers():
        autoencoder.to(torch.float16).save_pretrained(folder / "vae.tmp")
    (folder / "vae.tmp").rename(folder / "vae")
