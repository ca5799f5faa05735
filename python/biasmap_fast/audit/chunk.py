"""One chunk of an audit: pictures drawn together, and the rows of everything measured on them.

A picture or map that cannot be measured has a status, a reason and nulls. Nothing here writes files
or knows about other chunks, so chunks can be measured anywhere, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .draw import Cache, draw, prompts_of
from .measure import kept, key_of, measured, stem
from .records import LEDGER, MASKS, MEASUREMENTS, OK, PICTURES, to_table
from .settings import GUIDED

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

    from ..ledger import LedgerRow
    from .classifiers import Reader, Reading
    from .draw import Fault
    from .plan import AuditPlan, Picture

# Statuses of pictures whose drawing raised: another attempt may well succeed.
RAISED = ("error", "out_of_memory", "worker_lost")


@dataclass(frozen=True)
class Chunk:
    """The result of one chunk.

    Attributes:
        tables: Name of a table (`records.TABLES`) -> its rows; without a ledger if there is none.
        images: File stem -> picture, those that the plan keeps.
        maps: File stem -> name of a map -> ``[H, W]``, those that the plan keeps.
    """

    tables: dict[str, pa.Table]
    images: dict[str, Image]
    maps: dict[str, dict[str, torch.Tensor]]

    @property
    def raised(self) -> bool:
        """Whether none of its pictures could be drawn, because drawing them raised."""
        return set(self.tables["pictures"]["status"].to_pylist()) <= set(RAISED)


def merged(first: Chunk, second: Chunk) -> Chunk:
    """Returns two halves of a chunk as one, the first half's rows first."""
    import pyarrow as pa

    tables = {
        name: pa.concat_tables([c.tables[name] for c in (first, second) if name in c.tables])
        for name in {**first.tables, **second.tables}
    }
    return Chunk(tables, {**first.images, **second.images}, {**first.maps, **second.maps})


def measure_chunk(
    pipe: Any,
    plan: AuditPlan,
    pictures: Sequence[Picture],
    read: Reader | None = None,
    cache: Cache | None = None,
) -> Chunk:
    """Draws pictures in one batch and measures every pair of concepts on each.

    Args:
        pipe: The pipeline, with the plan's scheduler, dtype and device.
        plan: What to draw and measure.
        pictures: The pictures.
        read: Reads profession and demographic words in pictures, if there is a classifier.
        cache: What prompts became in this pipeline before.
    """
    swept = [prompts_of(plan, picture.profession) for picture in pictures]
    prompts = [prompts_of(plan, picture.profession, controls=True) for picture in pictures]
    wanted = [read is not None or kept(plan.save_pictures, plan, p) for p in pictures]
    drawn = draw(pipe, plan, pictures, prompts, swept, wanted, cache or Cache())
    energies = [_energy(drawn.ledger, index) for index in range(len(pictures))]
    faults = [
        drawn.faults[index]
        or _image_fault(drawn.images[index], drawn.filtered[index])
        or _guidance_fault(picture, energies[index])
        for index, picture in enumerate(pictures)
    ]
    images = [
        None if fault or array is None else _to_image(array)
        for array, fault in zip(drawn.images, faults, strict=True)
    ]
    readings = _readings(read, images)
    scores = _clip_scores(read, plan, pictures, images)
    rows = [
        {
            **_picture_row(plan, picture, drawn.size, faults[index]),
            **energies[index],
            **_reading_row(readings[index], plan),
            "clip_score": scores[index],
        }
        for index, picture in enumerate(pictures)
    ]
    measurements, masks, maps = measured(plan, pictures, drawn, faults)
    tables = {
        "pictures": to_table(rows, PICTURES),
        "measurements": to_table(measurements, MEASUREMENTS),
        "masks": to_table(masks, MASKS),
    }
    if drawn.ledger:
        tables["ledger"] = to_table(_ledger_rows(pictures, drawn.ledger), LEDGER)
    kept_images = {
        stem(plan, picture): image
        for picture, image in zip(pictures, images, strict=True)
        if image is not None and kept(plan.save_pictures, plan, picture)
    }
    return Chunk(tables, kept_images, maps)


def failed_chunk(
    pipe: Any, plan: AuditPlan, pictures: Sequence[Picture], status: str, reason: str
) -> Chunk:
    """Returns the records of pictures that could not be drawn: a status (`RAISED`) and a reason."""
    sample = pipe.unet.config.sample_size  # what the pipeline draws unless told otherwise
    sides = (sample, sample) if isinstance(sample, int) else sample
    size = (
        plan.height or int(sides[0] * pipe.vae_scale_factor),
        plan.width or int(sides[1] * pipe.vae_scale_factor),
    )
    rows = [_picture_row(plan, picture, size, (status, reason)) for picture in pictures]
    tables = {
        "pictures": to_table(rows, PICTURES),
        "measurements": MEASUREMENTS.empty_table(),
        "masks": MASKS.empty_table(),
    }
    return Chunk(tables, {}, {})


def _picture_row(
    plan: AuditPlan, picture: Picture, size: tuple[int, int], fault: Fault | None
) -> dict[str, Any]:
    status, reason = fault or (OK, None)
    return {
        **key_of(picture),
        "prompt": plan.prompt(picture.profession, picture.condition),
        "height": size[0],
        "width": size[1],
        "status": status,
        "reason": reason,
    }


def _energy(ledger: Sequence[LedgerRow], image: int) -> dict[str, Any]:
    rows = [row for row in ledger if row.image == image]
    if not rows:
        return {}
    applied = sum(row.applied for row in rows)
    return {
        "energy_first": rows[0].energy,
        "energy_last": rows[-1].energy,
        "energy_applied": applied,
        "energy_skipped": len(rows) - applied,
    }


def _guidance_fault(picture: Picture, energy: Mapping[str, Any]) -> Fault | None:
    if picture.condition != GUIDED:
        return None
    if not energy:
        return "guidance_skipped", "no UNet call lay between the energy's start and stop"
    skipped, applied = energy["energy_skipped"], energy["energy_applied"]
    if skipped <= applied:
        return None
    reason = f"guidance was skipped in {skipped} of {skipped + applied} UNet calls (see ledger/)"
    return "guidance_skipped", reason


def _image_fault(array: np.ndarray[Any, Any] | None, filtered: bool) -> Fault | None:
    if array is None:
        return None
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        return "non_finite_picture", f"{count} of the decoded picture's values are not finite"
    if filtered:
        return "filtered_picture", "the pipeline's safety checker blanked the picture"
    if np.ptp(array) == 0:
        return "blank_picture", f"every value of the picture is {array.flat[0]:g}"
    return None


def _to_image(array: np.ndarray[Any, Any]) -> Image:
    from PIL import Image as PILImage

    return PILImage.fromarray((array * 255).round().clip(0, 255).astype(np.uint8))


def _ledger_rows(pictures: Sequence[Picture], ledger: Sequence[LedgerRow]) -> list[dict[str, Any]]:
    rows = []
    for row in ledger:
        columns = asdict(row)
        picture = pictures[columns.pop("image")]
        pairs = ["+".join(pair) for pair in row.pairs]
        rows.append({**key_of(picture), **columns, "pairs": pairs})
    return rows


def _readings(read: Reader | None, images: Sequence[Image | None]) -> list[Reading | None]:
    present = [image for image in images if image is not None]
    if read is None or not present:
        return [None] * len(images)
    readings = iter(read(present))
    return [None if image is None else next(readings) for image in images]


def _reading_row(reading: Reading | None, plan: AuditPlan) -> dict[str, Any]:
    if reading is None:
        return {}
    read = {
        axis: reading.by_axis.get(axis, (reading.demographic, reading.score)) for axis in plan.axes
    }
    labels = {"profession": reading.profession, **{axis: word for axis, (word, _) in read.items()}}
    return {
        "labels": list(labels.items()),
        "scores": [(axis, score) for axis, (_, score) in read.items()],
    }


def _clip_scores(
    read: Reader | None,
    plan: AuditPlan,
    pictures: Sequence[Picture],
    images: Sequence[Image | None],
) -> list[float | None]:
    """How well each picture shows what the first condition's prompt asks for, if CLIP is there."""
    present = {index: image for index, image in enumerate(images) if image is not None}
    score = getattr(read, "scores", None)
    if score is None or not present:
        return [None] * len(images)
    prompts = [plan.prompt(pictures[index].profession, plan.conditions[0]) for index in present]
    scores = dict(zip(present, score(list(present.values()), prompts), strict=True))
    return [scores.get(index) for index in range(len(images))]
