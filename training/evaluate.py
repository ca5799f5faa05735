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
from scipy import stats
from tqdm import tqdm

from biasmap_fast import testbed
from biasmap_fast.attribution import attribute
from biasmap_fast.concepts import AttributionPrompt
from biasmap_fast.files import write_text
from biasmap_fast.testbed import PLAUSIBLE, Reading, World
from biasmap_fast.testbed.classify import Classifier

from .population import face_prompt, population, world_of
from .stages import render_all, to_model

_LOG = logging.getLogger(__name__)
_BATCH = 20
Array = np.ndarray[Any, np.dtype[Any]]


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
    model = _Model(pipe, world, steps, seed)
    drawn, maps = model.drawn_and_maps(pictures)
    return {
        "steps": steps,
        "seed": seed,
        "autoencoder": model.autoencoder(),
        "drawn": drawn,
        "named": model.named(max(1, pictures // 5)),
        "shares": model.shares(share_pictures),
        "maps": maps,
    }


def draw(
    pipe: Any, prompt: str, count: int, *, guidance: float, seed: int, steps: int = 25
) -> Array:
    """Pictures [count, 64, 64, 3] in 0..1, the first of `seed`, the next of `seed + 1`."""
    parts = []
    for first in range(seed, seed + count, _BATCH):
        seeds = range(first, min(first + _BATCH, seed + count))
        result = pipe(
            prompt,
            num_images_per_prompt=len(seeds),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(one) for one in seeds],
            output_type="np",
        )
        parts.append(result.images)
    return np.concatenate(parts)


def pixel_auc(values: Array, region: Array) -> float:
    """Probability that a pixel of the region has a higher value than one outside it.

    Area under the ROC curve, ties counted half; nan if the region is empty or everything.
    """
    inside, outside = (values[part].astype(np.float64) for part in (region, ~region))
    if not len(inside) or not len(outside):
        return math.nan
    wins = stats.mannwhitneyu(inside, outside, method="asymptotic").statistic
    return float(wins / (len(inside) * len(outside)))


def share_test(women: Sequence[int], totals: Sequence[int], shares: Sequence[float]) -> float:
    """Tests drawn shares (women among all readable pictures, by profession) against planted ones.

    p of the chi-square statistic, one degree of freedom per profession with readable pictures.
    """
    k, n, p = (np.asarray(v, np.float64) for v in (women, totals, shares))
    used = n > 0
    statistic = (((k - n * p) ** 2)[used] / (n * p * (1 - p))[used]).sum()
    return float(stats.chi2.sf(statistic, used.sum()))


class _Model:
    def __init__(self, pipe: Any, world: World, steps: int, seed: int) -> None:
        self.pipe, self.world, self.steps, self.seed = pipe, world, steps, seed
        self.classifier = Classifier(world)
        self.planted = np.array([marker.share for marker in world.markers.values()])

    def professions(self, what: str) -> Any:
        """Professions with the first seed of each."""
        first = range(self.seed, self.seed + 1000 * len(self.world.markers), 1000)
        pairs = list(zip(self.world.markers, first, strict=True))
        return tqdm(pairs, desc=what, unit="profession")

    def read(self, prompt: str, count: int, guidance: float, seed: int) -> list[Reading]:
        images = draw(self.pipe, prompt, count, guidance=guidance, seed=seed, steps=self.steps)
        return self.classifier(images)

    def share(self, readings: list[Reading]) -> tuple[int, int]:
        """Pictures of the second demographic among the plausible ones, and how many those are."""
        plausible = [r for r in readings if r.plausibility >= PLAUSIBLE]
        return sum(r.demographic == self.world.words[1] for r in plausible), len(plausible)

    def autoencoder(self) -> dict[str, float]:
        persons = population(self.world, 220, self.seed)
        x = to_model(render_all(self.world, persons))
        vae = self.pipe.vae
        with torch.inference_mode():
            decoded = vae.decoder(vae.encoder(x.to(vae.dtype))).float().cpu().clamp(-1, 1)
        readings = self.classifier(decoded.add(1.0).div(2.0))
        pairs = list(zip(readings, persons, strict=True))
        return {
            "pictures": len(pairs),
            "psnr_db": 10 * math.log10(4 / float((decoded - x).square().mean())),
            "profession_read": float(np.mean([r.profession == p.profession for r, p in pairs])),
            "demographic_read": float(np.mean([r.demographic == p.demographic for r, p in pairs])),
            "plausibility": float(np.mean([r.plausibility for r in readings])),
        }

    def drawn_and_maps(self, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
        accuracy: dict[str, float] = {}
        second: dict[str, float] = {}
        plausibility: list[float] = []
        aucs: dict[str, list[tuple[float, bool]]] = {}  # figure -> (AUC, word is the one drawn)
        for noun, seed in self.professions("guidance 3"):
            prompts = self.attribution_prompts(noun)
            with attribute(self.pipe, prompts, size=64) as recorder:
                readings = self.read(face_prompt(noun), count, 3.0, seed)
            result = recorder.maps_by_prompt()
            right = [r.profession == noun for r in readings]
            accuracy[noun] = float(np.mean(right))
            second[noun] = self.share(readings)[0] / count
            plausibility += [r.plausibility for r in readings]
            for prompt in prompts:
                for concept in prompt.concepts:
                    values = result[prompt.name][concept].numpy()
                    region = "marker" if concept == noun else "demographic"
                    kind = "profession" if concept == noun else concept
                    aucs.setdefault(f"{prompt.name.split(':')[0]} {kind}", []).extend(
                        (pixel_auc(v, r.regions[region]), concept in (noun, r.demographic))
                        for v, r, ok in zip(values, readings, right, strict=True)
                        if ok
                    )
        drawn = {
            "pictures_each": count,
            "profession_accuracy": float(np.mean(list(accuracy.values()))),
            "profession_accuracy_each": accuracy,
            "plausibility": float(np.mean(plausibility)),
            "share_slope": float(np.polyfit(self.planted, list(second.values()), 1)[0]),
            "shares_each": second,
        }
        return drawn, {key: _summary(values) for key, values in sorted(aucs.items())}

    def attribution_prompts(self, noun: str) -> list[AttributionPrompt]:
        """Joint prompts (profession and demographic) and one prompt per concept."""
        opening = face_prompt(noun)
        prompts = [AttributionPrompt(opening, (noun,), name="single:noun")]
        for word in self.world.words:
            joint, single = f"{opening} and {word}", f"a photo of a {word}"
            prompts.append(AttributionPrompt(joint, (noun, word), name=f"joint:{word}"))
            prompts.append(AttributionPrompt(single, (word,), name=f"single:{word}"))
        return prompts

    def named(self, count: int) -> dict[str, Any]:
        profession, demographic = [], []
        for noun, seed in self.professions("named"):
            for word in self.world.words:
                prompt = f"{face_prompt(noun)} and {word}"
                readings = self.read(prompt, count, 3.0, seed + 500_000)
                profession += [r.profession == noun for r in readings]
                demographic += [r.demographic == word for r in readings]
        return {
            "pictures": len(profession),
            "profession_accuracy": float(np.mean(profession)),
            "demographic_accuracy": float(np.mean(demographic)),
        }

    def shares(self, count: int) -> dict[str, Any]:
        women, totals = [], []
        for noun, seed in self.professions("guidance 1"):
            number, total = self.share(self.read(face_prompt(noun), count, 1.0, seed + 300_000))
            women.append(number)
            totals.append(total)
        planted = self.planted
        drawn = np.array(women) / np.maximum(totals, 1)
        noise = np.sqrt(planted * (1 - planted) / np.maximum(totals, 1))
        return {
            "pictures_each": count,
            "readable": float(np.sum(totals) / (count * len(totals))),
            "chi_square_p": share_test(women, totals, planted.tolist()) if sum(totals) else None,
            "outside_95": int((np.abs(drawn - planted) > 1.96 * noise).sum()),
            "mean_absolute_error": float(np.abs(drawn - planted).mean()),
            "expected_absolute_error": float((noise * math.sqrt(2 / math.pi)).mean()),
            "share_slope": float(np.polyfit(planted, drawn, 1)[0]),
            "shares_each": dict(zip(self.world.markers, drawn.tolist(), strict=True)),
        }


def _summary(values: list[tuple[float, bool]]) -> dict[str, float | None]:
    every = [auc for auc, _ in values]
    drawn = [auc for auc, is_drawn in values if is_drawn]
    return {
        "pictures": len(every),
        "auc": float(np.mean(every)) if every else None,
        "auc_lowest_tenth": float(np.quantile(every, 0.1)) if every else None,
        "auc_where_drawn": float(np.mean(drawn)) if drawn else None,
    }


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
    pipe, world = testbed.pipeline(folder), world_of(record)
    figures = evaluate(pipe, world, pictures=pictures, share_pictures=share_pictures)
    write_text(path, json.dumps({**record, "evaluation": figures}, indent=1) + "\n")
    _LOG.info("%s", json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(evaluate_folder)
