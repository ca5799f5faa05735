"""Trains the embedded model: `python -m training.train --out DIR`.

Stages of a fixed number of steps: the autoencoder, then the UNet on latents and captions (the text
encoder stays random), at last mostly at the times that decide the demographic. Then the words of
the professions are calibrated (see `calibrate`). A run that was killed and started again continues
to the same weights, given the same number of threads and the same libraries. The packaged weights
took 73 minutes of one core of a busy machine, and their words 45 more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import transformers
import typer

from biasmap_fast import testbed
from biasmap_fast.testbed import World

from . import networks
from .calibrate import calibrate
from .evaluate import evaluate_folder
from .population import population, vocabulary
from .stages import TrainSettings, encode_all, render_all, train_autoencoder, train_unet

_LOG = logging.getLogger(__name__)


def write_pipeline(pipe: Any, folder: Path, words: Iterable[str]) -> dict[str, str]:
    """Writes a pipeline folder with float16 weights, converted in place; see `weight_hashes`."""
    with testbed.quiet_diffusers():
        pipe.to(torch.float16).save_pretrained(folder)
    # transformers takes the type of the file where diffusers takes float32: a plain
    # `from_pretrained` would mix the two, so the file is said to be float32
    _edit(folder / "text_encoder" / "config.json", dtype="float32")
    # AutoencoderTiny writes this entry, and remarks on it when reading
    _edit(folder / "vae" / "config.json", block_out_channels=None)
    networks.write_vocabulary(folder / "tokenizer", *networks.byte_pairs(sorted(words)))
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    return weight_hashes(folder)


def _edit(path: Path, **changes: str | None) -> None:
    """Sets entries of a JSON file, or removes those given as None."""
    fields = json.loads(path.read_text()) | changes
    removed = {name for name, value in changes.items() if value is None}
    fields = {name: value for name, value in fields.items() if name not in removed}
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def weight_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every safetensors file below a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def train(
    settings: TrainSettings,
    folder: Path,
    autoencoder: Any | None = None,
    stop_after: int | None = None,
) -> Any | None:
    """Trains a model and writes its pipeline folder with `training.json`.

    Checkpoints go to the folder `<folder>.work` beside it, which may be removed afterwards.

    Args:
        settings: What to train.
        folder: Where the pipeline goes.
        autoencoder: A trained autoencoder of the same world instead of a new one.
        stop_after: Take at most this many steps of each stage, then return None.
    """
    work = folder.with_name(folder.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    world = World(settings.world)
    words = vocabulary(world)
    persons = population(world, settings.pictures, settings.seed)
    pictures = render_all(world, persons)
    stages = []
    if autoencoder is None:
        autoencoder, stage = train_autoencoder(settings, pictures, work, stop_after)
        stages.append(stage)
        if len(stage.losses) < settings.autoencoder_steps:
            return None
    latents = encode_all(autoencoder, pictures)
    unet, text_encoder, tokenizer, more = train_unet(
        settings, world, persons, latents, work, stop_after
    )
    stages += more
    if stages[-1].name != "settle" or len(stages[-1].losses) < settings.settle_steps:
        return None
    seconds = {stage.name: stage.seconds for stage in stages}
    pipe = networks.build_pipeline(autoencoder, text_encoder, tokenizer, unet)
    hashes = write_pipeline(pipe, folder, words)
    calibration: dict[str, Any] = {}
    if settings.calibration_pictures:
        start = time.monotonic()
        pipe = testbed.pipeline(folder)  # as it is used: with the weights as they were written
        moved = calibrate(
            pipe,
            world,
            pictures=settings.calibration_pictures,
            seed=settings.seed,
            folder=work,
            processes=torch.get_num_threads(),
        )
        calibration = {profession: word.rounded() for profession, word in moved.items()}
        seconds["calibration"] = time.monotonic() - start
        hashes = write_pipeline(pipe, folder, words)
    record = {
        "format": "biasmap_fast.testbed/1",
        "settings": dataclasses.asdict(settings),
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "losses_every_100_steps": {
            stage.name: [
                round(float(np.mean(stage.losses[i : i + 100])), 5)
                for i in range(0, len(stage.losses), 100)
            ]
            for stage in stages
        },
        "calibration": calibration,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
        },
        "sha256": hashes,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    _LOG.info("wrote %s: %s", folder, ", ".join(f"{k} {v[:12]}" for k, v in hashes.items()))
    return pipe


def load_autoencoder(folder: Path) -> tuple[Any, str]:
    """The autoencoder of a pipeline folder, and the sha256 of its weights."""
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} must hold a trained pipeline, found no {weights}")
    with testbed.quiet_diffusers():
        autoencoder = diffusers.AutoencoderTiny.from_pretrained(folder / "vae")
    autoencoder.eval().requires_grad_(False)
    return autoencoder, hashlib.sha256(weights.read_bytes()).hexdigest()


def main(
    out: Annotated[Path, typer.Option(help="Pipeline folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of weights, population and noise.")] = 0,
    threads: Annotated[int, typer.Option(help="Cores, part of what is reproduced.")] = 1,
) -> None:
    """Trains a testbed model and measures it; a run that was killed continues where it was."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    train(TrainSettings(seed=seed), out)
    evaluate_folder(out, threads=threads)


if __name__ == "__main__":
    typer.run(main)
