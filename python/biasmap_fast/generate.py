"""Pictures before and after guidance, on the same seeds: what ``biasmap generate`` writes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .attribution import Branch, attribute
from .concepts import AttributionPrompt
from .energy import Pair
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
        seeds: one a picture.
        before: the plain pictures.
        after: the guided ones.
        maps_before: attribution maps of the plain ones.
        maps_after: attribution maps of the guided ones, made while they were guided.
        pairs: the concept pairs of the energy.
        ledger: what guidance did; ``image`` counts the seeds.
    """

    seeds: tuple[int, ...]
    before: list[Image]
    after: list[Image]
    maps_before: AttributionMaps
    maps_after: AttributionMaps
    pairs: tuple[Pair, ...]
    ledger: list[LedgerRow]

    def overlaps(self, percentile: float = 70.0) -> list[dict[str, Any]]:
        """IoU and SoftIoU of every picture and pair, before and after, with the chance level."""
        fraction = 1 - percentile / 100
        rows = []
        for a, b in self.pairs:
            found = {
                f"{name}_{when}": measure(maps[a], maps[b], **options).tolist()
                for when, maps in (("before", self.maps_before), ("after", self.maps_after))
                for name, measure, options in (
                    ("iou", iou, {"percentile": percentile}),
                    ("soft_iou", soft_iou, {"fraction": fraction}),
                )
            }
            rows += [
                {
                    "seed": seed,
                    "pair": [a, b],
                    "chance": chance_iou(fraction),
                    **{name: values[index] for name, values in found.items()},
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
    pairs: Sequence[Pair] | None = None,
    energy: dict[str, Any] | None = None,
    branch: Branch = "cond",
    batch_size: int = 8,
    progress: bool = False,
    **options: Any,
) -> Generated:
    """Draws every seed twice, plain and guided, and attributes both.

    Args:
        pipe: any diffusers text-to-image pipeline with a UNet.
        text: the prompt that draws.
        prompt: the attribution prompt with the concepts.
        seeds: one picture a seed, each with its own CPU generator.
        pairs: concept pairs of the energy; default every pair.
        energy: further arguments of `guide` (``scale``, ``start``, ``inner_steps``, ...).
        branch: of both maps and energy.
        batch_size: pictures drawn at once.
        progress: show a progress bar on stderr.
        options: further arguments of the pipeline.

    Raises:
        ValueError: as `attribute` and `guide`; no seed.

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
    wanted = tuple(combinations(prompt.concepts, 2) if pairs is None else pairs)
    guidance = guide(pipe, prompt, pairs=wanted, branch=branch, **(energy or {}))
    recorders = [attribute(pipe, prompt, branch=branch) for _ in range(2)]
    pictures: list[list[Any]] = [[], []]
    ledger: list[LedgerRow] = []
    parts: list[list[AttributionMaps]] = [[], []]
    bar = tqdm(total=2 * len(seeds), unit="picture", disable=not progress, file=sys.stderr)
    for first in range(0, len(seeds), batch_size):
        batch = list(seeds[first : first + batch_size])
        for which, recorder in enumerate(recorders):
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in batch]
            with recorder, guidance if which else nullcontext():
                output = pipe([text] * len(batch), generator=generators, **options)
            pictures[which] += output.images
            maps = recorder.maps()
            if not isinstance(maps, AttributionMaps):
                raise TypeError(f"expected maps of one prompt, got {type(maps).__name__}")
            parts[which].append(maps)
            bar.update(len(batch))
        ledger += [replace(row, image=first + row.image) for row in guidance.ledger]
    bar.close()
    before, after = (
        replace(part[0], values=torch.cat([maps.values for maps in part])) for part in parts
    )
    return Generated(
        seeds=tuple(seeds),
        before=pictures[0],
        after=pictures[1],
        maps_before=before,
        maps_after=after,
        pairs=wanted,
        ledger=ledger,
    )


def write_generated(drawn: Generated, out: Path, settings: dict[str, Any]) -> list[Path]:
    """Writes pictures, overlays, maps, ledger, a comparison to look at, and ``generate.json``.

    Args:
        drawn: what `generate` returned.
        out: the folder; made if it does not exist. Files of the same names are replaced.
        settings: what was asked for; goes into ``generate.json`` beside the overlaps.

    Returns:
        The files, ``generate.json`` last: where it is, the others are whole.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    rows = []
    for index, seed in enumerate(drawn.seeds):
        row = []
        for when, pictures, maps in (
            ("before", drawn.before, drawn.maps_before),
            ("after", drawn.after, drawn.maps_after),
        ):
            shown: dict[str, Any] = {"picture": pictures[index]}
            for concept in maps.concepts:
                word = re.sub(r"[^\w-]+", "-", concept)
                # one scale for both pictures of a seed, so that colours can be compared
                shown[word] = maps.overlay(
                    pictures[index], concept, index=index, value_range=_range(drawn, concept, index)
                )
            for name, image in shown.items():
                written.append(_save(out / f"seed-{seed}-{when}-{name}.png", image))
            row += list(shown.values())
        rows.append(row)
    titles = [f"{when}{name}" for when in ("plain", "guided") for name in ("", *_of(drawn))]
    written.append(_save(out / "comparison.png", _sheet(rows, titles)))
    for when, maps in (("before", drawn.maps_before), ("after", drawn.maps_after)):
        path = out / f"maps-{when}.safetensors"
        maps.save(path)
        written.append(path)
    write_csv(drawn.ledger, out / "ledger.csv")
    written.append(out / "ledger.csv")
    text = json.dumps({**settings, "overlaps": drawn.overlaps()}, indent=1) + "\n"
    written.append(_replacing(out / "generate.json", lambda path: path.write_text(text)))
    return written


def _of(drawn: Generated) -> list[str]:
    return [f": {concept}" for concept in drawn.maps_before.concepts]


def _range(drawn: Generated, concept: str, index: int) -> tuple[float, float]:
    maps = [side[concept][index] for side in (drawn.maps_before, drawn.maps_after)]
    return min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)


def _sheet(rows: Sequence[Sequence[Image]], titles: Sequence[str]) -> Image:
    """Pictures in rows under titles, with a wider gap between before and after."""
    from PIL import Image as PILImage
    from PIL import ImageDraw

    width, height = rows[0][0].size
    scale = max(1, 160 // max(width, height))
    width, height, gap, head = width * scale, height * scale, 6, 14
    half = len(rows[0]) // 2
    sheet = PILImage.new(
        "RGB",
        (len(rows[0]) * (width + gap) + 3 * gap, len(rows) * (height + gap) + gap + head),
        "white",
    )
    lefts = [gap + x * (width + gap) + (2 * gap if x >= half else 0) for x in range(2 * half)]
    for left, title in zip(lefts, titles, strict=True):
        ImageDraw.Draw(sheet).text((left, 3), title, fill="black")
    for y, row in enumerate(rows):
        for left, image in zip(lefts, row, strict=True):
            shown = image.convert("RGB").resize((width, height), PILImage.Resampling.NEAREST)
            sheet.paste(shown, (left, head + gap + y * (height + gap)))
    return sheet


def _save(path: Path, image: Any) -> Path:
    return _replacing(path, lambda partial: image.save(partial, format="PNG"))


def _replacing(path: Path, write: Callable[[Path], Any]) -> Path:
    """Writes a file under a temporary name and renames it: never half a file."""
    partial = path.with_name(f".{path.name}.tmp")
    write(partial)
    partial.replace(path)
    return path
