"""One chunk of an audit: pictures drawn together, their maps, their records.

A picture or map that cannot be measured becomes a row with a status, a reason and nulls. Nothing
here writes files or knows about other chunks, so chunks can be measured anywhere, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import overlap, presets
from .controls import control_prompts, control_rows, mask_rows
from .draw import Cache, Drawn, draw
from .masks import contained, containment_maps, hard_iou, map_faults, map_of
from .plan import GUIDED, PLAIN
from .records import CONTROLS_SCHEMA, LEDGER_SCHEMA, MASKS_SCHEMA, OK, to_table

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

    from ..ledger import LedgerRow
    from ..maps import AttributionMaps
    from .plan import AuditPlan, Pair, Unit


@dataclass(frozen=True)
class Reading:
    """What a classifier reads in one picture.

    Attributes:
        profession: the profession, or ``None`` where it cannot be told.
        demographic: the demographic word, or ``None``.
        score: how much the picture looks like what was read, 0 to 1.
        by_axis: axis -> its word or ``None``, and the score of that; takes the place of
            ``demographic`` and ``score`` on the axes that it names.
    """

    profession: str | None
    demographic: str | None
    score: float
    by_axis: Mapping[str, tuple[str | None, float]] = field(default_factory=dict)


# Statuses of pictures whose drawing raised: another attempt may well succeed.
RAISED = ("error", "out_of_memory", "worker_lost")

Reader = Callable[[Sequence["Image"]], Sequence[Reading]]


@dataclass(frozen=True)
class Chunk:
    """The result of one chunk.

    Attributes:
        table: its records.
        pictures: file stem -> picture, those that the plan keeps.
        maps: file stem -> tensor name -> ``[H, W]`` map, those that the plan keeps.
        sides: tables that go beside the records (`records.SIDES`): ``"ledger"``, what guidance
            did; ``"controls"``, other overlaps on the same pictures; ``"masks"``. Absent if empty.
    """

    table: pa.Table
    pictures: dict[str, Image]
    maps: dict[str, dict[str, torch.Tensor]]
    sides: dict[str, pa.Table] = field(default_factory=dict)

    @property
    def raised(self) -> bool:
        """Whether none of its pictures could be drawn, because drawing them raised."""
        return set(self.table["status"].to_pylist()) <= set(RAISED)


def merged(first: Chunk, second: Chunk) -> Chunk:
    """Two halves of a chunk as one, the first half's rows first."""
    import pyarrow as pa

    sides = {}
    for name in {**first.sides, **second.sides}:
        halves = [each.sides[name] for each in (first, second) if name in each.sides]
        sides[name] = pa.concat_tables(halves)
    return Chunk(
        pa.concat_tables([first.table, second.table]),
        {**first.pictures, **second.pictures},
        {**first.maps, **second.maps},
        sides,
    )


@dataclass(frozen=True)
class _Cell:
    """One concept pair on one picture, before masks and percentiles."""

    image: int
    unit: Unit
    pair: Pair


def stem(plan: AuditPlan, unit: Unit) -> str:
    """File name, without ending, of a picture and its maps.

    Example:
        >>> from .plan import AuditPlan, Unit
        >>> plan = AuditPlan(professions=["doctor", "police officer"])
        >>> stem(plan, Unit("police officer", 7))
        '001-police-officer-7'
        >>> stem(plan, Unit("doctor", 7, "guided"))
        '000-doctor-7-guided'
    """
    word = "".join(c if c.isalnum() and c.isascii() else "-" for c in unit.profession)
    name = f"{plan.professions.index(unit.profession):03d}-{word}-{unit.seed}"
    return name if unit.condition == PLAIN else f"{name}-{unit.condition}"


def kept(choice: str, plan: AuditPlan, unit: Unit) -> bool:
    """Whether ``choice`` ("none", "sample", "all") keeps what belongs to ``unit``."""
    return choice == "all" or (choice == "sample" and unit.seed == plan.seeds[0])


def measure_chunk(
    pipe: Any,
    plan: AuditPlan,
    units: Sequence[Unit],
    read: Reader | None = None,
    cache: Cache | None = None,
) -> Chunk:
    """Draws the pictures of ``units`` in one batch and measures every concept pair on each.

    Args:
        pipe: the pipeline, with the plan's scheduler, type and device.
        plan: what to draw and measure.
        units: the pictures.
        read: reads profession and demographic from pictures, where there is a classifier.
        cache: what prompts became in this pipeline before.

    Returns:
        Records, and the pictures and maps that the plan keeps.

    Raises:
        ValueError: a concept is not in its attribution prompt, or the prompt is too long.
    """
    cells = _cells(plan, units)
    prompts = [plan.prompts(unit.profession) for unit in units]
    controls = {each: control_prompts(plan, [each]) for each in {u.profession for u in units}}
    # in the separate form a control shares the profession's prompt
    all_prompts = [
        list(dict.fromkeys([*own, *controls[unit.profession]]))
        for unit, own in zip(units, prompts, strict=True)
    ]
    wanted = [read is not None or kept(plan.save_pictures, plan, unit) for unit in units]
    drawn = draw(pipe, plan, units, all_prompts, wanted, cache, swept=prompts)
    guided = [_guidance_fields(drawn.ledger, image) for image in range(len(units))]
    faults = [
        fault or _picture_fault(array, blocked) or _guidance_fault(unit, fields)
        for fault, array, blocked, unit, fields in zip(
            drawn.faults, drawn.arrays, drawn.filtered, units, guided, strict=True
        )
    ]
    pictures = [
        None if fault or array is None else _to_picture(array)
        for array, fault in zip(drawn.arrays, faults, strict=True)
    ]
    readings = _read(read, pictures)
    scores = _clip_scores(read, plan, units, pictures)
    of_cells = _faults(cells, drawn.maps, faults)
    rows: list[dict[str, Any]] = []
    for measured, cell in zip(_measured(plan, cells, drawn.maps, of_cells), cells, strict=True):
        common = _settings(pipe, plan, cell, drawn.size)
        reading = _reading_fields(readings[cell.image], cell.pair, plan)
        reading["clip_score"] = scores[cell.image]
        rows.extend({**common, **guided[cell.image], **reading, **values} for values in measured)
    return Chunk(
        table=to_table(rows),
        pictures={
            stem(plan, unit): picture
            for unit, picture in zip(units, pictures, strict=True)
            if picture is not None and kept(plan.save_pictures, plan, unit)
        },
        maps=_kept_maps(plan, cells, drawn.maps),
        sides=_sides(plan, units, cells, drawn, faults, of_cells),
    )


def failed_chunk(
    pipe: Any, plan: AuditPlan, units: Sequence[Unit], status: str, reason: str
) -> Chunk:
    """The records of pictures that could not be drawn: a status and a reason, no numbers.

    Args:
        pipe: the pipeline that should have drawn them.
        plan: what to draw and measure.
        units: the pictures.
        status: what went wrong, in a word (`RAISED`).
        reason: in a sentence.
    """
    cells = _cells(plan, units)
    faults = [(status, reason)] * len(cells)
    size = (plan.height or _side(pipe, 0), plan.width or _side(pipe, 1))
    rows = [
        {**_settings(pipe, plan, cell, size), **values}
        for measured, cell in zip(_measured(plan, cells, {}, faults), cells, strict=True)
        for values in measured
    ]
    return Chunk(to_table(rows), {}, {})


def _side(pipe: Any, axis: int) -> int:
    """Height or width of the pictures that a pipeline draws unless told otherwise."""
    size = pipe.unet.config.sample_size
    return int((size if isinstance(size, int) else size[axis]) * pipe.vae_scale_factor)


def _cells(plan: AuditPlan, units: Sequence[Unit]) -> list[_Cell]:
    return [
        _Cell(image, unit, pair)
        for image, unit in enumerate(units)
        for pair in plan.pairs(unit.profession)
    ]


def reader_for_testbed(classifier: Callable[[Any], list[Any]] | None = None) -> Reader:
    """The testbed's own classifier, or that of another of its worlds (`testbed.classify`)."""
    from .. import testbed

    classify = classifier or testbed.classify

    def read(pictures: Sequence[Image]) -> list[Reading]:
        return [
            Reading(
                found.profession,
                # Of noise the classifier still says which word is nearer: that is no reading.
                found.demographic if found.plausibility >= testbed.PLAUSIBLE else None,
                float(found.plausibility),
            )
            for found in classify(list(pictures))
        ]

    return read


def _guidance_fields(ledger: Sequence[LedgerRow], image: int) -> dict[str, Any]:
    """The columns that say what guidance did to one image; none without guidance."""
    rows = [row for row in ledger if row.image == image]
    if not rows:
        return {}
    applied = sum(row.applied for row in rows)
    return {
        "guidance_energy_first": rows[0].energy,
        "guidance_energy_last": rows[-1].energy,
        "guidance_applied": applied,
        "guidance_skipped": len(rows) - applied,
    }


def _guidance_fault(unit: Unit, fields: dict[str, Any]) -> tuple[str, str] | None:
    if unit.condition != GUIDED:
        return None
    if not fields:
        return "guidance_skipped", "no UNet call lay between the energy's start and stop"
    if fields["guidance_skipped"] <= fields["guidance_applied"]:
        return None
    calls = fields["guidance_skipped"] + fields["guidance_applied"]
    return (
        "guidance_skipped",
        f"guidance was skipped in {fields['guidance_skipped']} of {calls} UNet calls (see ledger/)",
    )


def _ledger_table(units: Sequence[Unit], ledger: Sequence[LedgerRow]) -> pa.Table | None:
    if not ledger:
        return None
    return to_table(
        [
            {
                "condition": units[row.image].condition,
                "semantic": units[row.image].profession,
                "seed": units[row.image].seed,
                **{name: value for name, value in asdict(row).items() if name != "image"},
                "pairs": ["+".join(pair) for pair in row.pairs],
            }
            for row in ledger
        ],
        LEDGER_SCHEMA,
    )


def _sides(
    plan: AuditPlan,
    units: Sequence[Unit],
    cells: Sequence[_Cell],
    drawn: Drawn,
    faults: Sequence[tuple[str, str] | None],
    of_cells: Sequence[tuple[str, str] | None],
) -> dict[str, pa.Table]:
    """The tables that go beside the records."""
    found = {}
    ledger = _ledger_table(units, drawn.ledger)
    if ledger is not None:
        found["ledger"] = ledger
    rows = control_rows(plan, units, drawn.maps, drawn.swept, faults)
    if rows:
        found["controls"] = to_table(rows, CONTROLS_SCHEMA)
    good = [cell for cell, fault in zip(cells, of_cells, strict=True) if fault is None]
    if good:
        sides = [_pair_maps(cell, drawn.maps) for cell in good]
        a, b = (torch.stack(side).float().cpu() for side in zip(*sides, strict=True))  # [R, H, W]
        found["masks"] = to_table(mask_rows(plan, [_key(c) for c in good], a, b), MASKS_SCHEMA)
    return found


def _key(cell: _Cell) -> dict[str, Any]:
    return {
        "condition": cell.unit.condition,
        "semantic": cell.unit.profession,
        "seed": cell.unit.seed,
        "axis": cell.pair.axis,
        "demographic": cell.pair.demographic,
    }


def _faults(
    cells: Sequence[_Cell],
    maps: dict[str, AttributionMaps],
    faults: Sequence[tuple[str, str] | None],
) -> list[tuple[str, str] | None]:
    """What is wrong with each pair's picture, or with one of its maps on it."""
    found = [faults[cell.image] for cell in cells]
    good = [place for place, fault in enumerate(found) if fault is None]
    if good:
        sides = zip(*(_pair_maps(cells[place], maps) for place in good), strict=True)
        semantic, demographic = (torch.stack(side) for side in sides)  # [R, H, W]
        ones = map_faults(semantic, [cells[place].unit.profession for place in good])
        others = map_faults(demographic, [cells[place].pair.demographic for place in good])
        for place, one, other in zip(good, ones, others, strict=True):
            found[place] = one or other
    return found


def _picture_fault(array: np.ndarray[Any, Any] | None, filtered: bool) -> tuple[str, str] | None:
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


def _measured(
    plan: AuditPlan,
    cells: Sequence[_Cell],
    maps: dict[str, AttributionMaps],
    faults: Sequence[tuple[str, str] | None],
) -> list[list[dict[str, Any]]]:
    """For every cell, one dict of measured columns a percentile."""
    chances = {q: float(overlap.chance_iou(1 - q / 100)) for q in plan.percentiles}
    values: list[list[dict[str, Any]]] = []
    good: list[int] = []
    for index, fault in enumerate(faults):
        status, reason = fault or (OK, None)
        values.append(
            [
                {"percentile": q, "chance": chances[q], "status": status, "reason": reason}
                for q in plan.percentiles
            ]
        )
        if fault is None:
            good.append(index)
    if not good:
        return values
    stacked = [_pair_maps(cells[index], maps) for index in good]
    a, b = (torch.stack(side).float().cpu() for side in zip(*stacked, strict=True))  # [R, H, W]
    blocks = _block_pairs([cells[index] for index in good], maps)
    inside = _contained(plan, blocks)
    for position, q in enumerate(plan.percentiles):
        columns = {**_overlaps(plan, a, b, blocks, q), **inside}
        for row, index in enumerate(good):
            values[index][position].update({name: x[row] for name, x in columns.items()})
    return values


def _overlaps(
    plan: AuditPlan,
    a: torch.Tensor,  # [R, H, W]
    b: torch.Tensor,  # [R, H, W]
    blocks: dict[str, tuple[torch.Tensor, torch.Tensor]],
    percentile: float,
) -> dict[str, list[Any]]:
    """Measured columns of R rows at one percentile."""
    fraction = 1 - percentile / 100
    found, empty = hard_iou(plan, a, b, percentile)
    if plan.soft_mask == "paper":
        soft = presets.paper_soft_iou(a, b)
    else:
        soft = overlap.soft_iou(a, b, fraction=fraction, temperature=plan.temperature)
    by_block: list[dict[str, float | None]] = [{} for _ in range(a.shape[0])]
    for name, (block_a, block_b) in blocks.items():
        for row, (value, no_union) in enumerate(
            zip(*hard_iou(plan, block_a, block_b, percentile), strict=True)
        ):
            by_block[row][name] = None if no_union else value
    return {
        "iou": found,
        "corrected": [overlap.corrected(x, overlap.chance_iou(fraction)) for x in found],
        "soft_iou": soft.tolist(),
        "empty_union": empty,
        "block_iou": [list(row.items()) for row in by_block],
        **_ranges("semantic", a),
        **_ranges("demographic", b),
    }


def _contained(
    plan: AuditPlan, blocks: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, list[Any]]:
    """The columns of containment of R rows, from the sum of some blocks' maps ``[R, H, W]``."""
    if plan.measure != "containment":
        return {}
    a, b = (
        containment_maps(plan, {name: pair[side] for name, pair in blocks.items()})
        for side in range(2)
    )
    chance = plan.containment.fractions[1]  # of an unrelated mask: its mean
    return {"containment": contained(plan, a, b), "containment_chance": [chance] * len(a)}


def _ranges(side: str, maps: torch.Tensor) -> dict[str, list[Any]]:
    flat = maps.flatten(1).double()  # [R, H * W]
    return {
        f"{side}_low": flat.amin(1).tolist(),
        f"{side}_high": flat.amax(1).tolist(),
        f"{side}_mass": flat.mean(1).tolist(),
    }


def _pair_maps(
    cell: _Cell, maps: dict[str, AttributionMaps]
) -> tuple[torch.Tensor, torch.Tensor]:  # [H, W], [H, W]
    pair = cell.pair
    return (
        map_of(maps, pair.semantic_prompt, cell.unit.profession, cell.image),
        map_of(maps, pair.demographic_prompt, pair.demographic, cell.image),
    )


def _block_pairs(
    cells: Sequence[_Cell], maps: dict[str, AttributionMaps]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """UNet block -> its maps of the profession and of the demographic word, ``[R, H, W]`` each."""
    found = {}
    for name in next(iter(maps.values())).by_block:
        sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for cell in cells:
            pair = cell.pair
            for side, prompt, concept in (
                (sides[0], pair.semantic_prompt, cell.unit.profession),
                (sides[1], pair.demographic_prompt, pair.demographic),
            ):
                own = maps[prompt.name]
                values = own.by_block[name]  # [b, K, H, W]
                side.append(values[own.row(cell.image), own.index(concept)])
        found[name] = (torch.stack(sides[0]).float().cpu(), torch.stack(sides[1]).float().cpu())
    return found


def _settings(pipe: Any, plan: AuditPlan, cell: _Cell, size: tuple[int, int]) -> dict[str, Any]:
    """The columns that say what was asked for: enough to draw the picture again."""
    return {
        "condition": cell.unit.condition,
        "model": plan.model,
        "revision": plan.revision,
        "semantic": cell.unit.profession,
        "axis": cell.pair.axis,
        "demographic": cell.pair.demographic,
        "template": plan.template(cell.unit.condition),
        "prompt": plan.prompt(cell.unit.profession, cell.unit.condition),
        "negative_prompt": plan.negative_prompt,
        "attribution_prompts": cell.pair.texts,
        "seed": cell.unit.seed,
        "steps": plan.steps,
        "guidance_scale": plan.guidance_scale,
        "scheduler": type(pipe.scheduler).__name__,
        "height": size[0],
        "width": size[1],
        "dtype": plan.dtype,
        "branch": plan.branch,
        "layers": None if plan.layers is None else list(plan.layers),
        "evaluation_size": plan.evaluation_size,
        "soft_mask": plan.soft_mask,
        "temperature": plan.temperature,
    }


def _read(read: Reader | None, pictures: Sequence[Image | None]) -> list[Reading | None]:
    readings: list[Reading | None] = [None] * len(pictures)
    present = [index for index, picture in enumerate(pictures) if picture is not None]
    if read is None or not present:
        return readings
    found = read([picture for picture in pictures if picture is not None])
    for index, reading in zip(present, found, strict=True):
        readings[index] = reading
    return readings


def _clip_scores(
    read: Reader | None,
    plan: AuditPlan,
    units: Sequence[Unit],
    pictures: Sequence[Image | None],
) -> list[float | None]:
    """How well each picture shows what the first condition's prompt asks for, if CLIP is there."""
    found: list[float | None] = [None] * len(pictures)
    present = {image: picture for image, picture in enumerate(pictures) if picture is not None}
    scores = getattr(read, "scores", None)
    if scores is None or not present:
        return found
    texts = [plan.prompt(units[image].profession, plan.conditions[0]) for image in present]
    for image, score in zip(present, scores(list(present.values()), texts), strict=True):
        found[image] = score
    return found


def _reading_fields(reading: Reading | None, pair: Pair, plan: AuditPlan) -> dict[str, Any]:
    if reading is None:
        return {}
    word, score = reading.by_axis.get(pair.axis, (reading.demographic, reading.score))
    return {
        "semantic_label": reading.profession,
        "attribute_label": word,
        "attribute_score": score,
    }


def _to_picture(array: np.ndarray[Any, Any]) -> Image:
    from PIL import Image as PILImage

    return PILImage.fromarray((array * 255).round().clip(0, 255).astype(np.uint8))


def _kept_maps(
    plan: AuditPlan, cells: Sequence[_Cell], maps: dict[str, AttributionMaps]
) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for cell in cells:
        if not kept(plan.save_maps, plan, cell.unit):
            continue
        semantic, demographic = _pair_maps(cell, maps)
        tensors = found.setdefault(stem(plan, cell.unit), {})
        name = f"{cell.pair.axis}/{cell.pair.demographic}"
        tensors[f"{name}/semantic"] = semantic.float().cpu().clone()
        tensors[f"{name}/demographic"] = demographic.float().cpu().clone()
    return found
