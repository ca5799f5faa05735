"""What is measured on a drawn picture: one list of map pairs, one registry of measures.

The map pairs are those of demographic words and of controls, of whole maps and of parts of them.
Each is measured with the measures of `MEASURES` at their settings; a new measure is one entry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import overlap, presets
from ..maps import resize
from .plan import setting_of
from .records import EMPTY, OK, packed
from .settings import PLAIN

if TYPE_CHECKING:
    from ..maps import AttributionMaps
    from .draw import Drawn, Fault
    from .plan import AuditPlan, Pair, Picture

CURVE = tuple(round(0.5 - 0.05 * step, 2) for step in range(10))
"""Fractions of the curve of IoU."""

Setting = tuple[float, ...]  # fractions of the pixels: of both masks, or of each


@dataclass(frozen=True)
class Values:
    """A measure of R map pairs at one setting.

    Attributes:
        values: ``[R]``.
        chance: ``[R]``, or one for all: the value of two unrelated maps.
        empty: ``[R]``: whether neither mask has a pixel; default never.
    """

    values: torch.Tensor
    chance: torch.Tensor | float
    empty: torch.Tensor | None = None


@dataclass(frozen=True)
class Measure:
    """One way to compare the map of a profession with that of a word.

    Attributes:
        values: ``(plan, a, b, setting)`` -> `Values` of the map pairs ``[R, H, W]``.
        settings: The settings at which a plan wants it; none if it does not.
        sides: ``(plan, maps)`` -> the maps ``[R, H, W]`` whose hard masks and values are kept;
            ``None`` to keep neither.
        blocks: Whether it is taken of the sum of the plan's `containment_layers`.
        controls: Whether controls are measured too.
    """

    values: Callable[[AuditPlan, torch.Tensor, torch.Tensor, Setting], Values]
    settings: Callable[[AuditPlan], Sequence[Setting]]
    sides: Callable[[AuditPlan, torch.Tensor], torch.Tensor] | None = None
    blocks: bool = False
    controls: bool = True


def _iou(plan: AuditPlan, a: torch.Tensor, b: torch.Tensor, setting: Setting) -> Values:
    pairs = torch.stack((_evaluated(plan, a), _evaluated(plan, b)), dim=1)  # [R, 2, H, W]
    values, empty = overlap.iou_and_empty(pairs.flatten(2), setting[0])
    return Values(values, overlap.chance_iou(setting[0]), empty)


def _soft_iou(plan: AuditPlan, a: torch.Tensor, b: torch.Tensor, setting: Setting) -> Values:
    if plan.soft_mask == "paper":
        values = presets.paper_soft_iou(a, b)
    else:
        values = overlap.soft_iou(a, b, fraction=setting[0], temperature=plan.temperature)
    return Values(values, overlap.chance_iou(setting[0]))


def _containment(plan: AuditPlan, a: torch.Tensor, b: torch.Tensor, setting: Setting) -> Values:
    first, second = setting
    values = overlap.soft_containment(a, b, fractions=(first, second), temperature=plan.temperature)
    return Values(values, second)  # of an unrelated mask: its mean


def _evaluated(plan: AuditPlan, maps: torch.Tensor) -> torch.Tensor:
    """Maps ``[R, H, W]`` at the size at which the hard masks of IoU are taken."""
    if plan.evaluation_size is None:
        return maps
    return resize(maps[:, None], (plan.evaluation_size, plan.evaluation_size))[:, 0]


def _fractions(plan: AuditPlan) -> list[Setting]:
    return [(fraction,) for fraction in plan.fractions]


MEASURES: dict[str, Measure] = {
    "iou": Measure(_iou, _fractions, sides=_evaluated),
    "soft_iou": Measure(_soft_iou, _fractions, controls=False),
    "containment": Measure(
        _containment,
        lambda plan: [plan.containment.fractions] if plan.measure == "containment" else [],
        sides=lambda plan, maps: maps,
        blocks=True,
    ),
}


def stem(plan: AuditPlan, picture: Picture) -> str:
    """Returns the file name, without ending, of a picture and its maps.

    Example:
        >>> from .plan import AuditPlan, Picture
        >>> plan = AuditPlan(professions=["doctor", "police officer"])
        >>> stem(plan, Picture("police officer", 7))
        '001-police-officer-7'
        >>> stem(plan, Picture("doctor", 7, "guided"))
        '000-doctor-7-guided'
    """
    word = "".join(c if c.isalnum() and c.isascii() else "-" for c in picture.profession)
    name = f"{plan.professions.index(picture.profession):03d}-{word}-{picture.seed}"
    return name if picture.condition == PLAIN else f"{name}-{picture.condition}"


def kept(choice: str, plan: AuditPlan, picture: Picture) -> bool:
    """Whether ``choice`` ("none", "sample", "all") keeps what belongs to a picture."""
    return choice == "all" or (choice == "sample" and picture.seed == plan.seeds[0])


def key_of(picture: Picture) -> dict[str, Any]:
    """Returns the columns that name a picture."""
    return {
        "condition": picture.condition,
        "profession": picture.profession,
        "seed": picture.seed,
    }


@dataclass(frozen=True)
class _Source:
    """One prompt's maps, whole or in S parts."""

    maps: AttributionMaps
    parts: Sequence[str]  # "" for the whole map, else "step:12"
    values: torch.Tensor  # [S, B, K, H, W]

    def of(self, concept: str, image: int) -> torch.Tensor:  # [S, H, W]
        return self.values[:, self.maps.row(image), self.maps.index(concept)]


@dataclass(frozen=True)
class _Entry:
    """Map pairs ``[S, H, W]`` of one pair of concepts on one picture, and what names them."""

    picture: Picture
    pair: Pair
    parts: Sequence[str]
    a: torch.Tensor
    b: torch.Tensor

    def columns(self) -> Iterator[dict[str, Any]]:
        key = {**key_of(self.picture), "axis": self.pair.axis, "word": self.pair.word}
        for part in self.parts:
            yield {**key, "part": part, "control": self.pair.control}


_Rows = list[dict[str, Any]]


def measured(
    plan: AuditPlan, pictures: Sequence[Picture], drawn: Drawn, faults: Sequence[Fault | None]
) -> tuple[_Rows, _Rows, dict[str, dict[str, torch.Tensor]]]:
    """Rows of measurements and masks, and the maps that are kept, of pictures without a fault."""
    sources = _sources(plan, drawn)
    # measure and settings -> what is measured so, in one go
    batches: dict[tuple[str, tuple[Setting, ...]], list[_Entry]] = defaultdict(list)
    wanted = {p.profession: list(_wanted(plan, p.profession)) for p in pictures}
    for image, picture in enumerate(pictures):
        if faults[image] is None:
            for measure, settings, source, pair in wanted[picture.profession]:
                first = sources[source][pair.profession_prompt.name]
                second = sources[source][pair.word_prompt.name]
                a, b = first.of(picture.profession, image), second.of(pair.word, image)
                batches[measure, settings].append(_Entry(picture, pair, first.parts, a, b))
    measurements: _Rows = []
    masks: _Rows = []
    maps: dict[str, dict[str, torch.Tensor]] = {}
    for (name, settings), entries in batches.items():
        a = torch.cat([entry.a for entry in entries]).float().cpu()  # [R, H, W]
        b = torch.cat([entry.b for entry in entries]).float().cpu()
        keys = [columns for entry in entries for columns in entry.columns()]
        rows, good = _rows(plan, name, settings, keys, a, b)
        measurements += rows
        if MEASURES[name].sides is not None:
            masks += _mask_rows(plan, name, keys, a, b, good)
            _keep_maps(plan, name, entries, maps)
    return measurements, masks, maps


def _wanted(
    plan: AuditPlan, profession: str
) -> Iterator[tuple[str, tuple[Setting, ...], str, Pair]]:
    """Measure, settings, source of the maps and pair of everything measured on a picture."""
    pairs, controls = plan.pairs(profession), plan.control_pairs(profession)
    # by name: a fraction of the plan may be one of the curve
    curve = {setting_of((f,)): (f,) for f in (*plan.fractions, *(CURVE if plan.curve else ()))}
    for name, measure in MEASURES.items():
        settings = tuple(measure.settings(plan))
        if settings:
            source = "containment" if measure.blocks else "whole"
            for pair in pairs:
                yield name, tuple(curve.values()) if name == "iou" else settings, source, pair
            for pair in controls if measure.controls else ():
                yield name, settings, source, pair
    for pair in pairs:
        yield "iou", tuple(_fractions(plan)), "block", pair
        for sweep in plan.sweeps:
            yield "iou", tuple(_fractions(plan)[:1]), sweep, pair


def _sources(plan: AuditPlan, drawn: Drawn) -> dict[str, dict[str, _Source]]:
    """Source of maps -> name of the prompt -> its maps."""
    other = "uncond" if plan.branch == "cond" else "cond"
    sources: dict[str, dict[str, _Source]] = defaultdict(dict)
    for by, by_prompt in drawn.maps.items():
        for name, maps in by_prompt.items():
            parts = {other: maps.values} if by == "branch" else maps.parts
            stacked = torch.stack(list(parts.values()))
            sources[by][name] = _Source(maps, [f"{by}:{part}" for part in parts], stacked)
            if by == "block":
                sources["whole"][name] = _Source(maps, [""], maps.values[None])
                if any(m.blocks and m.settings(plan) for m in MEASURES.values()):
                    chosen = _chosen_blocks(plan, parts)[None]
                    sources["containment"][name] = _Source(maps, [""], chosen)
    return sources


def _chosen_blocks(plan: AuditPlan, blocks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    wanted = plan.containment_layers
    everything = wanted is plan.layers  # those layers are all that was recorded
    chosen = [maps for name, maps in blocks.items() if everything or name.startswith(wanted)]
    if not chosen:
        raise ValueError(
            f"containment is measured on the blocks {list(wanted)}, the maps have {list(blocks)}: "
            "set containment.layers, or measure 'iou'"
        )
    return torch.stack(chosen).sum(0)


def _rows(
    plan: AuditPlan,
    name: str,
    settings: Sequence[Setting],
    keys: Sequence[dict[str, Any]],
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[_Rows, list[int]]:
    """Rows of one measure of the maps ``[R, H, W]``, and which of the R can be measured."""
    faults = [
        first or second
        for first, second in zip(
            _map_faults(a, [key["profession"] for key in keys]),
            _map_faults(b, [key["word"] for key in keys]),
            strict=True,
        )
    ]
    good = [index for index, fault in enumerate(faults) if fault is None]
    if len(good) < len(keys):
        a, b = a[good], b[good]
    rows = []
    for setting in settings:
        shared = {"measure": name, "setting": setting_of(setting)}
        for key, fault in zip(keys, faults, strict=True):
            if fault is not None:
                rows.append({**key, **shared, "status": fault[0], "reason": fault[1]})
        if not good:
            continue
        values = MEASURES[name].values(plan, a, b, setting)
        size = values.values.shape
        chance = torch.as_tensor(values.chance, dtype=torch.float64).expand(size)
        empty = torch.zeros(size) if values.empty is None else values.empty
        columns = (values.values.tolist(), chance.tolist(), empty.tolist())
        for index, value, expected, no_pixel in zip(good, *columns, strict=True):
            status = EMPTY if no_pixel else OK
            rows.append(
                {**keys[index], **shared, "value": value, "chance": expected, "status": status}
            )
    return rows, good


def _mask_rows(
    plan: AuditPlan,
    name: str,
    keys: Sequence[dict[str, Any]],
    a: torch.Tensor,
    b: torch.Tensor,
    good: Sequence[int],
) -> _Rows:
    """The hard masks of demographic words at the plan's settings."""
    measure = MEASURES[name]
    indices = [i for i in good if not keys[i]["part"] and not keys[i]["control"]]
    if not indices or measure.sides is None:
        return []
    first, second = measure.sides(plan, a[indices]), measure.sides(plan, b[indices])
    height, width = first.shape[-2:]
    rows = []
    for setting in measure.settings(plan):
        bits = zip(_mask_bits(first, setting[0]), _mask_bits(second, setting[-1]), strict=True)
        for index, (profession_bits, word_bits) in zip(indices, bits, strict=True):
            key = {k: v for k, v in keys[index].items() if k not in ("part", "control")}
            row: dict[str, Any] = {"measure": name, "setting": setting_of(setting)}
            row |= {"height": height, "width": width}
            rows.append({**key, **row, "profession_bits": profession_bits, "word_bits": word_bits})
    return rows


def _mask_bits(maps: torch.Tensor, fraction: float) -> list[bytes]:
    flat = maps.flatten(1).numpy()  # [R, N]
    # Of large maps three times as fast as `reference.percentile`, and the same bits (of numpy 2).
    mask = flat > np.percentile(flat, overlap.percentile_of(fraction), axis=1, keepdims=True)
    return packed(mask)


def _keep_maps(
    plan: AuditPlan,
    name: str,
    entries: Sequence[_Entry],
    maps: dict[str, dict[str, torch.Tensor]],
) -> None:
    """Adds the maps of demographic words, as ``AXIS/WORD/MEASURE/profession`` and ``.../word``."""
    for entry in entries:
        pair = entry.pair
        if pair.control or entry.parts[0] or not kept(plan.save_maps, plan, entry.picture):
            continue
        tensors = maps.setdefault(stem(plan, entry.picture), {})
        for side, values in (("profession", entry.a), ("word", entry.b)):
            tensors[f"{pair.axis}/{pair.word}/{name}/{side}"] = values[0].float().cpu().clone()


def _map_faults(maps: torch.Tensor, concepts: Sequence[str]) -> list[Fault | None]:
    """What is wrong with each of R maps ``[R, H, W]``; ``None`` for a good one."""
    low, high = maps.flatten(1).amin(1), maps.flatten(1).amax(1)  # a NaN is in both
    good = low.isfinite() & high.isfinite() & (low != high)
    return [
        None if fine else _map_fault(maps[row], concept)
        for row, (fine, concept) in enumerate(zip(good.tolist(), concepts, strict=True))
    ]


def _map_fault(values: torch.Tensor, concept: str) -> Fault:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        count = int((~finite).sum())
        return "non_finite_map", f"{count} of the values of the map of {concept!r} are not finite"
    return "constant_map", f"every value of the map of {concept!r} is {float(values.max()):g}"
