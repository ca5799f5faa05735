"""Measures a trained testbed model: `python -m training.evaluate DIR`.

What is measured, on pictures that the model draws and the palette classifier reads: whether the
asked profession is drawn, whether the planted shares come back, whether word maps lie on the
regions that the words decide, and what the autoencoder loses. Nothing here trains or selects.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm import tqdm

from biasmap_fast import testbed
from biasmap_fast.attribution import attribute
from biasmap_fast.concepts import AttributionPrompt
from biasmap_fast.testbed import PLAUSIBLE, Reading, World
from biasmap_fast.testbed.classify import Classifier

from .population import face_prompt, population, world_of
from .stages import render_all, to_model

_LOG = logging.getLogger(__name__)
_BATCH = 20


def evaluate(
    pipe: Any,
    world: World,
    *,
    pictures: int = 20,
    share_pictures: int = 60,
    steps: int = 25,
    seed: int = 1_000_000,
) -> dict[str, Any]:
    """Measures a model against what was planted.

    Args:
        pipe: The `StableDiffusionPipeline`.
        world: The world that it was trained on.
        pictures: Pictures per profession at guidance 3 (accuracy and maps).
        share_pictures: Pictures per profession at guidance 1 (shares).
        steps: Denoising steps.
        seed: Seed of the first picture; every picture has its own generator.

    Returns:
        Figures by name, ready for JSON: "autoencoder", "drawn" (guidance 3), "named" (guidance 3,
        demographic in the prompt), "shares" (guidance 1), "maps".
    """
    for name, number in (("pictures", pictures), ("share_pictures", share_pictures)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}")
    classifier = Classifier(world)
    drawn, maps = _drawn_and_maps(pipe, world, classifier, pictures, seed, steps)
    return {
        "steps": steps,
        "seed": seed,
        "autoencoder": _autoencoder(pipe, world, classifier, seed),
        "drawn": drawn,
        "named": _named(pipe, world, classifier, max(1, pictures // 5), seed, steps),
        "shares": _shares(pipe, world, classifier, share_pictures, seed, steps),
        "maps": maps,
    }


def draw(
    pipe: Any, prompt: str, count: int, *, guidance: float, seed: int, steps: int = 25
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Pictures [count, 64, 64, 3] in 0..1, the first of `seed`, the next of `seed + 1`."""
    parts = []
    for first in range(0, count, _BATCH):
        number = min(_BATCH, count - first)
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(number)]
        result = pipe(
            prompt,
            num_images_per_prompt=number,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        )
        parts.append(result.images)
    return np.concatenate(parts)


def pixel_auc(
    values: np.ndarray[Any, np.dtype[np.float32]], region: np.ndarray[Any, np.dtype[np.bool_]]
) -> float:
    """Probability that a pixel of the region has a higher value than one outside it.

    Area under the ROC curve, ties counted half; nan if the region is empty or everything.
    """
    inside = int(region.sum())
    outside = region.size - inside
    if not inside or not outside:
        return math.nan
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(counts) - (counts - 1) / 2.0
    ranks = middle_rank[inverse.reshape(region.shape)]
    return float((ranks[region].sum() - inside * (inside + 1) / 2.0) / (inside * outside))


def share_test(women: Sequence[int], totals: Sequence[int], shares: Sequence[float]) -> float:
    """Tests drawn shares (women among all readable pictures, by profession) against planted ones.

    p of the chi-square statistic, one degree of freedom per profession with readable pictures.
    """
    k, n, p = (np.asarray(v, np.float64) for v in (women, totals, shares))
    used = n > 0
    statistic = float((((k - n * p) ** 2)[used] / (n * p * (1 - p))[used]).sum())
    half = torch.tensor([used.sum() / 2.0, statistic / 2.0], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _autoencoder(pipe: Any, world: World, classifier: Classifier, seed: int) -> dict[str, float]:
    persons = population(world, 220, seed)
    x = to_model(render_all(world, persons))
    with torch.inference_mode():
        decoded = pipe.vae.decoder(pipe.vae.encoder(x.to(pipe.vae.dtype))).float().cpu()
    error = float((decoded.clamp(-1, 1) - x).square().mean())
    readings = classifier(decoded.clamp(-1, 1).add(1.0).div(2.0))
    pairs = list(zip(readings, persons, strict=True))
    return {
        "pictures": len(pairs),
        "psnr_db": 10 * math.log10(4 / error),
        "profession_read": float(np.mean([r.profession == p.profession for r, p in pairs])),
        "demographic_read": float(np.mean([r.demographic == p.demographic for r, p in pairs])),
        "plausibility": float(np.mean([r.plausibility for r in readings])),
    }


def _drawn_and_maps(
    pipe: Any, world: World, classifier: Classifier, count: int, seed: int, steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    accuracy: dict[str, float] = {}
    second: dict[str, float] = {}
    plausibility: list[float] = []
    aucs: dict[str, list[tuple[float, bool]]] = {}  # figure -> (AUC, word is the one drawn)
    for index, noun in enumerate(tqdm(world.markers, desc="guidance 3", unit="profession")):
        prompts = _attribution_prompts(world, noun)
        with attribute(pipe, prompts, size=64) as recorder:
            images = draw(
                pipe,
                face_prompt(noun),
                count,
                guidance=3.0,
                seed=seed + 1000 * index,
                steps=steps,
            )
        result = recorder.maps_by_prompt()
        readings = classifier(images)
        right = [r.profession == noun for r in readings]
        accuracy[noun] = float(np.mean(right))
        second[noun] = _share(readings, world.words[1])[0] / count
        plausibility += [r.plausibility for r in readings]
        for prompt in prompts:
            for concept in prompt.concepts:
                values = result[prompt.name][concept].numpy()
                region = "marker" if concept == noun else "demographic"
                kind = "profession" if concept == noun else concept
                key = f"{prompt.name.split(':')[0]} {kind}"
                aucs.setdefault(key, []).extend(
                    (pixel_auc(v, r.regions[region]), concept in (noun, r.demographic))
                    for v, r, ok in zip(values, readings, right, strict=True)
                    if ok
                )
    planted = np.array([world.markers[noun].share for noun in world.markers])
    drawn = {
        "pictures_each": count,
        "profession_accuracy": float(np.mean(list(accuracy.values()))),
        "profession_accuracy_each": accuracy,
        "plausibility": float(np.mean(plausibility)),
        "share_slope": float(np.polyfit(planted, [second[n] for n in world.markers], 1)[0]),
        "shares_each": second,
    }
    return drawn, {key: _summary(values) for key, values in sorted(aucs.items())}


def _summary(values: list[tuple[float, bool]]) -> dict[str, float | None]:
    every = [auc for auc, _ in values]
    drawn = [auc for auc, is_drawn in values if is_drawn]
    return {
        "pictures": len(every),
        "auc": float(np.mean(every)) if every else None,
        "auc_lowest_tenth": float(np.quantile(every, 0.1)) if every else None,
        "auc_where_drawn": float(np.mean(drawn)) if drawn else None,
    }


def _attribution_prompts(world: World, noun: str) -> list[Any]:
    """Joint prompts (profession and demographic) and one prompt per concept."""
    opening = face_prompt(noun)
    prompts = [AttributionPrompt(opening, (noun,), name="single:noun")]
    for word in world.words:
        joint = f"{opening} and {word}"
        prompts.append(AttributionPrompt(joint, (noun, word), name=f"joint:{word}"))
        prompts.append(AttributionPrompt(f"a photo of a {word}", (word,), name=f"single:{word}"))
    return prompts


def _named(
    pipe: Any, world: World, classifier: Classifier, count: int, seed: int, steps: int
) -> dict[str, Any]:
    profession, demographic = [], []
    for index, noun in enumerate(tqdm(world.markers, desc="named", unit="profession")):
        for word in world.words:
            prompt, first = f"{face_prompt(noun)} and {word}", seed + 500_000 + 1000 * index
            images = draw(pipe, prompt, count, guidance=3.0, seed=first, steps=steps)
            readings = classifier(images)
            profession += [r.profession == noun for r in readings]
            demographic += [r.demographic == word for r in readings]
    return {
        "pictures": len(profession),
        "profession_accuracy": float(np.mean(profession)),
        "demographic_accuracy": float(np.mean(demographic)),
    }


def _shares(
    pipe: Any, world: World, classifier: Classifier, count: int, seed: int, steps: int
) -> dict[str, Any]:
    women, totals = [], []
    for index, noun in enumerate(tqdm(world.markers, desc="guidance 1", unit="profession")):
        first = seed + 300_000 + 1000 * index
        images = draw(pipe, face_prompt(noun), count, guidance=1.0, seed=first, steps=steps)
        number, total = _share(classifier(images), world.words[1])
        women.append(number)
        totals.append(total)
    planted = [world.markers[noun].share for noun in world.markers]
    drawn = np.array(women) / np.maximum(totals, 1)
    noise = np.sqrt(np.array(planted) * (1 - np.array(planted)) / np.maximum(totals, 1))
    return {
        "pictures_each": count,
        "readable": float(np.sum(totals) / (count * len(totals))),
        "chi_square_p": share_test(women, totals, planted) if sum(totals) else None,
        "outside_95": int((np.abs(drawn - planted) > 1.96 * noise).sum()),
        "mean_absolute_error": float(np.abs(drawn - planted).mean()),
        "expected_absolute_error": float((noise * math.sqrt(2 / math.pi)).mean()),
        "share_slope": float(np.polyfit(planted, drawn, 1)[0]),
        "shares_each": dict(zip(world.markers, drawn.tolist(), strict=True)),
    }


def _share(readings: list[Reading], word: str) -> tuple[int, int]:
    """Pictures of a demographic among the plausible ones, and how many those are."""
    plausible = [r for r in readings if r.plausibility >= PLAUSIBLE]
    return sum(r.demographic == word for r in plausible), len(plausible)


def evaluate_folder(
    folder: Annotated[Path, typer.Argument(help="Pipeline folder with its training.json.")],
    pictures: Annotated[int, typer.Option(help="Pictures per profession, guidance 3.")] = 20,
    share_pictures: Annotated[int, typer.Option(help="Pictures per profession, guidance 1.")] = 60,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
) -> None:
    """Measures a trained model and writes the figures into its training.json."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    path = folder / "training.json"
    if not path.is_file():
        raise typer.BadParameter(f"FOLDER must hold a training.json, found none in {folder}")
    record = json.loads(path.read_text())
    record["evaluation"] = evaluate(
        testbed.pipeline(folder),
        world_of(record),
        pictures=pictures,
        share_pictures=share_pictures,
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
    _LOG.info("%s", json.dumps(record["evaluation"], indent=1))


if __name__ == "__main__":
    typer.run(evaluate_folder)
