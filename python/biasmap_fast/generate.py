"""Pictures before and after guidance, on the same seeds: what ``biasmap generate`` writes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .attribution import AttributionCache, Branch, attribute
from .concepts import AttributionPrompt
from .energy import Energy
from .files import write_text, writing
from .guidance import guide
from .ledger import LedgerRow, write_csv
from .maps import AttributionMaps
from .overlap import chance_iou, iou, soft_iou

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Generated:
    """The pictures of one prompt, each drawn plain and guided from the same seed.

    Attributes:
        seeds: One per picture.
        before: The plain pictures.
        after: The guided pictures.
        maps_before: Attribution maps of the plain pictures.
        maps_after: Attribution maps of the guided ones, made while they were guided.
        pairs: The concept pairs of the energy.
        ledger: What guidance did; ``image`` counts the seeds.
    """

    seeds: tuple[int, ...]
    before: list[Image]
    after: list[Image]
    maps_before: AttributionMaps
    maps_after: AttributionMaps
    pairs: tuple[tuple[str, str], ...]
    ledger: list[LedgerRow]

    def overlaps(self, fraction: float = 0.3) -> list[dict[str, Any]]:
        """IoU and SoftIoU of every picture and pair, before and after, with the chance level."""
        rows = []
        for a, b in self.pairs:
            columns = {
                f"{name}_{when}": measure(maps[a], maps[b], fraction=fraction).tolist()
                for when, maps in (("before", self.maps_before), ("after", self.maps_after))
                for name, measure in (("iou", iou), ("soft_iou", soft_iou))
            }
            rows += [
                {
                    "seed": seed,
                    "pair": [a, b],
                    "chance": chance_iou(fraction),
                    **{name: values[index] for name, values in columns.items()},
                }
                for index, seed in enumerate(self.seeds)
            ]
        return rows


def generate(
    pipe: Any,
    text: str,
    prompt: AttributionPrompt,
    *,
    seeds: Sequence[int],
    energy: Energy | None = None,
    branch: Branch = "cond",
    batch_size: int = 8,
    progress: bool = False,
    **options: Any,
) -> Generated:
    """Draws every seed twice, plain and guided, and records the maps of both.

    Args:
        pipe: A diffusers text-to-image pipeline with a UNet.
        text: The prompt that draws.
        prompt: The attribution prompt with the concepts.
        seeds: One per picture, each with its own CPU generator.
        energy: As in `guide`; pairs for all images.
        branch: The guidance branch of both maps and energy.
        batch_size: Pictures drawn at once.
        progress: Show a progress bar on stderr.
        options: Further arguments of the pipeline.

    Raises:
        ValueError: As `attribute` and `guide`; no seed.

    Example:
        >>> import biasmap_fast as bm
        >>> from biasmap_fast.generate import generate
        >>> prompt = bm.AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
        >>> drawn = generate(
        ...     bm.testbed.pipeline(), "a photo of a doctor", prompt, seeds=[0],
        ...     num_inference_steps=2, guidance_scale=1.0,
        ... )
        >>> len(drawn.after), sorted(drawn.overlaps()[0])[:3]
        (1, ['chance', 'iou_after', 'iou_before'])
    """
    if not seeds or batch_size < 1:
        raise ValueError(
            f"expected at least one seed and a batch size of 1 or more, got {list(seeds)} and "
            f"{batch_size}"
        )
    energy = energy or Energy()
    pairs: Any = tuple(combinations(prompt.concepts, 2) if energy.pairs is None else energy.pairs)
    cache = AttributionCache()
    guidance = guide(pipe, prompt, energy, branch=branch, cache=cache)
    recorder = attribute(pipe, prompt, branch=branch, cache=cache)
    pictures: dict[str, list[Any]] = {"plain": [], "guided": []}
    maps: dict[str, list[AttributionMaps]] = {"plain": [], "guided": []}
    ledger: list[LedgerRow] = []
    bar = tqdm(total=2 * len(seeds), unit="picture", disable=not progress, file=sys.stderr)
    for first in range(0, len(seeds), batch_size):
        batch = list(seeds[first : first + batch_size])
        for how in ("plain", "guided"):
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in batch]
            with recorder, guidance if how == "guided" else nullcontext():
                output = pipe([text] * len(batch), generator=generators, **options)
            pictures[how] += output.images
            maps[how].append(recorder.maps())
            bar.update(len(batch))
        ledger += [replace(row, image=first + row.image) for row in guidance.ledger]
    bar.close()
    before, after = (
        replace(parts[0], values=torch.cat([part.values for part in parts]))
        for parts in maps.values()
    )
    return Generated(
        seeds=tuple(seeds),
        before=pictures["plain"],
        after=pictures["guided"],
        maps_before=before,
        maps_after=after,
        pairs=pairs,
        ledger=ledger,
    )


def write_generated(
    drawn: Generated, out: Path, settings: dict[str, Any], *, overwrite: bool = False
) -> list[Path]:
    """Writes pictures, overlays, maps, ledger, a comparison to look at, and ``generate.json``.

    Args:
        drawn: What `generate` returned.
        out: The folder; made if it does not exist.
        settings: What was asked for; goes into ``generate.json`` beside the overlaps.
        overwrite: Whether the files of an earlier run are replaced.

    Returns:
        The files, ``generate.json`` last: if it exists, the others are complete.

    Raises:
        FileExistsError: The folder has the files of an earlier run.
    """
    check_free(out, "generate.json", overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)
    written, rows = [], []
    sides = (
        ("before", drawn.before, drawn.maps_before),
        ("after", drawn.after, drawn.maps_after),
    )
    for index, seed in enumerate(drawn.seeds):
        row = []
        for when, pictures, maps in sides:
            images: dict[str, Any] = {"picture": pictures[index]}
            for concept in maps.concepts:
                # one scale for both pictures of a seed, so that colours can be compared
                heats = torch.stack([side[concept][index] for *_, side in sides])
                images[re.sub(r"[^\w-]+", "-", concept)] = maps.overlay(
                    pictures[index],
                    concept,
                    index=index,
                    value_range=(float(heats.min()), float(heats.max())),
                )
            for name, image in images.items():
                written.append(_save(out / f"seed-{seed}-{when}-{name}.png", image))
            row += list(images.values())
        rows.append(row)
    captions = ["", *(f": {concept}" for concept in drawn.maps_before.concepts)]
    titles = [f"{how}{caption}" for how in ("plain", "guided") for caption in captions]
    written.append(_save(out / "comparison.png", _sheet(rows, titles)))
    for when, _, maps in sides:
        written.append(out / f"maps-{when}.safetensors")
        maps.save(written[-1])
    written.append(out / "ledger.csv")
    write_csv(drawn.ledger, written[-1])
    written.append(out / "generate.json")
    write_text(written[-1], json.dumps({**settings, "overlaps": drawn.overlaps()}, indent=1) + "\n")
    return written


def check_free(out: Path, name: str, *, overwrite: bool) -> None:
    """Refuses a folder with the files of an earlier run, by a FileExistsError."""
    if not overwrite and (out / name).exists():
        raise FileExistsError(
            f"{out} has the files of an earlier run: choose another folder, or ask to overwrite "
            "(--overwrite)"
        )


def pair_overlaps(maps: AttributionMaps, fraction: float) -> list[dict[str, Any]]:
    """Returns the IoU of every two concepts on the first picture, with its chance level."""
    return [
        {
            "a": a,
            "b": b,
            "iou": float(iou(maps[a], maps[b], fraction=fraction)[0]),
            "chance": chance_iou(fraction),
        }
        for a, b in combinations(maps.concepts, 2)
    ]


def write_maps(picture: Image, maps: AttributionMaps, out: Path) -> list[Path]:
    """Writes a picture, an overlay per concept (each on its own scale) and the maps."""
    out.mkdir(parents=True, exist_ok=True)
    written = [_save(out / "picture.png", picture)]
    for concept in maps.concepts:
        word = re.sub(r"[^\w-]+", "-", concept)
        written.append(_save(out / f"overlay-{word}.png", maps.overlay(picture, concept)))
    written.append(out / "maps.safetensors")
    maps.save(written[-1])
    return written


def _sheet(rows: Sequence[Sequence[Image]], titles: Sequence[str]) -> Image:
    """Pictures in rows under titles, with a wider gap between before and after."""
    from PIL import Image as PILImage
    from PIL import ImageDraw

    width, height = rows[0][0].size
    scale = max(1, 160 // max(width, height))
    width, height, gap, head = width * scale, height * scale, 6, 14
    columns = len(rows[0])
    sheet = PILImage.new(
        "RGB",
        (columns * (width + gap) + 3 * gap, len(rows) * (height + gap) + gap + head),
        "white",
    )
    lefts = [gap + x * (width + gap) + (2 * gap if 2 * x >= columns else 0) for x in range(columns)]
    for left, title in zip(lefts, titles, strict=True):
        ImageDraw.Draw(sheet).text((left, 3), title, fill="black")
    for y, row in enumerate(rows):
        for left, image in zip(lefts, row, strict=True):
            shown = image.convert("RGB").resize((width, height), PILImage.Resampling.NEAREST)
            sheet.paste(shown, (left, head + gap + y * (height + gap)))
    return sheet


def _save(path: Path, image: Any) -> Path:
    with writing(path) as partial:
        image.save(partial, format="PNG")
    return path
