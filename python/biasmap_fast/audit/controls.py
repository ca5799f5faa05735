"""Controls of an audit: other overlaps on the same pictures, from the same UNet calls.

An IoU says little alone: on one centred face any two words overlap more than unrelated masks do.
Beside every pair of profession and demographic word stand therefore, on the same pictures:

* *control words* in the demographic word's place: a function word, an object, "person" (negative
  controls: what a word without that demographic meaning reaches), and a synonym of the profession
  (positive control: what two names of one concept reach);
* *the order swapped*: the demographic word first. In a causal text encoder the later word has seen
  the earlier one, so a finding that turns with the order is one of the prompt;
* *the threshold curve*: the same pair at the percentiles `CURVE`;
* *sweeps*, on request: per UNet call, per layer, and of the other guidance branch.

They share the UNet's queries with the main pairs, so they cost keys and no network calls. The
seed-shuffled null needs no maps of its own: see `nulls`.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from .. import presets
from ..attribution import AttributionCache, attribute
from ..concepts import AttributionPrompt
from .masks import contained, containment_maps, hard_iou, map_faults, map_of, packed
from .records import OK

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..attribution import By, Recorder
    from ..maps import AttributionMaps
    from .plan import AuditPlan, Unit

CURVE = tuple(range(50, 100, 5))
"""Percentiles of the threshold curve."""

NEGATIVE = ("function", "object", "person")
"""Control words that a finding should exceed."""


@dataclass(frozen=True)
class Control:
    """One other overlap that is measured on every picture of a profession.

    Attributes:
        kind: ``"function"``, ``"object"``, ``"person"``, ``"synonym"``, ``"swapped"``.
        axis: the demographic axis it belongs to; ``None`` for control words.
        word: the word whose map is compared with the profession's.
        semantic: where the profession's map comes from.
        other: where the word's map comes from.
    """

    kind: str
    axis: str | None
    word: str
    semantic: AttributionPrompt
    other: AttributionPrompt


@dataclass(frozen=True)
class Swept:
    """What the plan sweeps over: its steps and layers in the main recorder, the other branch."""

    main: Recorder
    branch: Recorder | None

    def maps(self, by: By | Literal["branch"]) -> dict[str, AttributionMaps]:
        """The maps of one sweep, by prompt name."""
        if by == "branch":
            if self.branch is None:
                raise ValueError("the other branch was not recorded")
            return self.branch.maps_by_prompt()
        return self.main.maps_by_prompt(by)


def control_pairs(plan: AuditPlan, profession: str) -> list[Control]:
    """Every control of a profession; none where the plan turns them off.

    Example:
        >>> from .plan import AuditPlan
        >>> plan = AuditPlan(professions=["doctor"])
        >>> [(one.kind, one.word) for one in control_pairs(plan, "doctor")]
        [('function', 'in'), ('object', 'coat'), ('person', 'person'), ('swapped', 'man'), ...]
    """
    if plan.controls is None:
        return []
    words = dict(plan.controls.words)
    if profession in plan.controls.synonyms:
        words["synonym"] = plan.controls.synonyms[profession]
    found = []
    for kind, word in words.items():
        if word != profession:
            pair = plan.pair(profession, kind, word)
            found.append(Control(kind, None, word, pair.semantic_prompt, pair.demographic_prompt))
    if plan.controls.swapped and isinstance(plan.attribution_template, str):
        for pair in plan.pairs(profession):
            prompt = _swapped(plan.attribution_template, profession, pair.demographic)
            found.append(Control("swapped", pair.axis, pair.demographic, prompt, prompt))
    return found


def control_prompts(plan: AuditPlan, professions: Sequence[str]) -> list[AttributionPrompt]:
    """The attribution prompts of every control, each once."""
    return list(
        {
            prompt.name: prompt
            for profession in professions
            for control in control_pairs(plan, profession)
            for prompt in (control.semantic, control.other)
        }.values()
    )


@contextmanager
def sweeping(
    pipe: Any,
    plan: AuditPlan,
    prompts: Sequence[Sequence[AttributionPrompt]],
    main: Recorder,
    cache: AttributionCache | None = None,
) -> Iterator[Swept]:
    """Records the other branch where the plan sweeps over it, of each picture its prompts."""
    if "branch" not in plan.sweeps:
        yield Swept(main, None)
        return
    with attribute(
        pipe,
        prompts,
        branch="uncond" if plan.branch == "cond" else "cond",
        layers=plan.layers,
        chunks=getattr(pipe, "attribution_chunks", None),
        cache=cache,
    ) as other:
        yield Swept(main, other)


def control_rows(
    plan: AuditPlan,
    units: Sequence[Unit],
    maps: Mapping[str, AttributionMaps],
    swept: Swept,
    faults: Sequence[tuple[str, str] | None],
) -> list[dict[str, Any]]:
    """Rows of ``controls/``: for pictures without a fault, every other overlap.

    Args:
        plan: what is measured.
        units: the pictures.
        maps: the main recorder's, by prompt name.
        swept: the others'.
        faults: of each picture; a faulty one is in the records, and has no rows here.
    """
    rows: list[dict[str, Any]] = []
    batches: dict[tuple[float, ...], _Batch] = defaultdict(_Batch)
    other = "uncond" if plan.branch == "cond" else "cond"
    blocks = {
        name: replace(own, values=containment_maps(plan, own.by_block), by="total", parts={})
        for name, own in maps.items()
        if plan.measure == "containment"
    }
    sweeps = {by: _stacked(swept.maps(by), by, other) for by in plan.sweeps}
    professions = {unit.profession for unit in units}
    pairs = {each: plan.pairs(each) for each in professions}
    controls = {each: control_pairs(plan, each) for each in professions}
    for image, unit in enumerate(units):
        if faults[image] is not None:
            continue
        start = {"condition": unit.condition, "semantic": unit.profession, "seed": unit.seed}
        for control in controls[unit.profession]:
            a, b = _sides(maps, control, unit, image)
            inside = _sides(blocks, control, unit, image) if blocks else None
            row = {**start, "kind": control.kind, "axis": control.axis, "word": control.word}
            batches[plan.percentiles].add([row], a[None], b[None], inside)
        for pair in pairs[unit.profession]:
            row = {**start, "axis": pair.axis, "word": pair.demographic}
            if plan.curve:
                a = map_of(maps, pair.semantic_prompt, unit.profession, image)
                b = map_of(maps, pair.demographic_prompt, pair.demographic, image)
                batches[CURVE].add([{**row, "kind": "threshold"}], a[None], b[None])
            for by, found in sweeps.items():
                one, two = found[pair.semantic_prompt.name], found[pair.demographic_prompt.name]
                keys = [{**row, "kind": by, "variant": variant} for variant in one.variants]
                a, b = one.of(unit.profession, image), two.of(pair.demographic, image)
                batches[plan.percentiles[:1]].add(keys, a, b)
    for percentiles, batch in batches.items():
        rows += batch.rows(plan, percentiles)
    return rows


def mask_rows(
    plan: AuditPlan, keys: Sequence[Mapping[str, Any]], a: torch.Tensor, b: torch.Tensor
) -> list[dict[str, Any]]:
    """Rows of ``masks/``: both concepts' bits of R measured pairs at every percentile.

    Args:
        plan: what is measured.
        keys: condition, semantic, seed, axis and demographic of each pair.
        a: ``[R, H, W]`` the profession's maps.
        b: ``[R, H, W]`` the demographic words' maps.
    """
    rows = []
    for q in plan.percentiles:
        one, other = packed(plan, a, q), packed(plan, b, q)
        for key, semantic, demographic in zip(keys, one["bits"], other["bits"], strict=True):
            rows.append(
                {
                    **key,
                    "percentile": q,
                    "height": one["height"],
                    "width": one["width"],
                    "semantic_bits": semantic,
                    "demographic_bits": demographic,
                }
            )
    return rows


@dataclass(frozen=True)
class _Stacked:
    """One prompt's maps of everything that is swept over."""

    maps: AttributionMaps
    variants: tuple[str, ...]  # UNet calls, layers, or the branch
    values: torch.Tensor  # [S, B, K, H, W]

    def of(self, concept: str, image: int) -> torch.Tensor:
        """``[S, H, W]`` of one concept on one picture."""
        return self.values[:, self.maps.row(image), self.maps.index(concept)]


def _stacked(found: Mapping[str, AttributionMaps], by: str, other: str) -> dict[str, _Stacked]:
    made = {}
    for name, maps in found.items():
        parts = {other: maps.values} if by == "branch" else maps.parts
        made[name] = _Stacked(maps, tuple(parts), torch.stack(list(parts.values())))
    return made


@dataclass(frozen=True)
class _Entry:
    """Rows that come together, with their maps ``[S, H, W]``."""

    keys: list[dict[str, Any]]
    a: torch.Tensor
    b: torch.Tensor
    # those on which containment is measured, if it is: [H, W], of a single row
    parts: tuple[torch.Tensor, torch.Tensor] | None


class _Batch:
    """Map pairs that are masked at the same percentiles."""

    def __init__(self) -> None:
        self._by_size: dict[torch.Size, list[_Entry]] = defaultdict(list)

    def add(
        self,
        keys: list[dict[str, Any]],
        a: torch.Tensor,
        b: torch.Tensor,
        parts: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Takes S pairs of maps ``[S, H, W]``, and what a single one's containment is of."""
        self._by_size[a.shape[1:]].append(_Entry(keys, a, b, parts))

    def rows(self, plan: AuditPlan, percentiles: Sequence[float]) -> list[dict[str, Any]]:
        """One row a pair and percentile."""
        rows: list[dict[str, Any]] = []
        for entries in self._by_size.values():
            keys = [key for entry in entries for key in entry.keys]
            a = torch.cat([entry.a for entry in entries]).float().cpu()  # [R, H, W]
            b = torch.cat([entry.b for entry in entries]).float().cpu()
            faults = [
                one or other
                for one, other in zip(
                    map_faults(a, [key["semantic"] for key in keys]),
                    map_faults(b, [key["word"] for key in keys]),
                    strict=True,
                )
            ]
            rows += [
                {**key, "percentile": float(q), "status": fault[0], "reason": fault[1]}
                for key, fault in zip(keys, faults, strict=True)
                if fault is not None
                for q in percentiles
            ]
            good = [place for place, fault in enumerate(faults) if fault is None]
            if not good:
                continue
            if len(good) < len(keys):
                a, b = a[good], b[good]
            inside = _contained(plan, entries, good)
            for q in percentiles:
                found, empty = hard_iou(plan, a, b, float(q))
                rows += [
                    {
                        **keys[place],
                        "percentile": float(q),
                        "iou": value,
                        "empty_union": no_union,
                        "containment": inside.get(place),
                        "status": OK,
                    }
                    for place, value, no_union in zip(good, found, empty, strict=True)
                ]
        return rows


def _contained(
    plan: AuditPlan, entries: Sequence[_Entry], places: Sequence[int]
) -> dict[int, float]:
    """Containment of those of the rows that have parts for it."""
    parts = [entry.parts for entry in entries for _ in entry.keys]
    found = {place: own for place in places if (own := parts[place]) is not None}
    if not found:
        return {}
    a, b = (torch.stack(side).float().cpu() for side in zip(*found.values(), strict=True))
    return dict(zip(found, contained(plan, a, b), strict=True))


def _sides(
    maps: Mapping[str, AttributionMaps], control: Control, unit: Unit, image: int
) -> tuple[torch.Tensor, torch.Tensor]:  # [H, W], [H, W]
    return (
        map_of(maps, control.semantic, unit.profession, image),
        map_of(maps, control.other, control.word, image),
    )


def _swapped(template: str, profession: str, demographic: str) -> AttributionPrompt:
    """The joint attribution prompt with the two words in each other's place."""
    bare = {"demographic": profession, "a_demographic": presets.with_article(profession)}
    text = template.format(profession=presets.with_article(demographic), **bare)
    concepts = (profession, demographic)
    return AttributionPrompt(text, concepts, f"{text} [{profession}, {demographic}, swapped]")
