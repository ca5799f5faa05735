"""Sums of concept maps: which prompts are measured together, their keys, and what adds up.

Prompts with as many tokens and as many concepts, on the same images, are a group, and read the
queries together. Behind a causal text encoder prompts that begin alike have the same keys there:
on a CPU one kernel computes what is the same once (of "a photo of a doctor and" with seven last
words, a third of the tokens). Elsewhere their maps are made prompt by prompt.

Sums and bilinear resizing are linear: maps are added per resolution, in place, and resized once at
the end, so that what is held does not grow with steps or layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .maps import resize
from .ops import add_concept_map, add_prompt_maps, fused_prompts
from .reference import concept_map
from .unet import split_heads

By = Literal["total", "block", "layer", "step", "head"]
Size = tuple[int, int]
Rows = slice | list[int]

ALL = slice(None)


@dataclass(frozen=True)
class Group:
    """Prompts that are measured together.

    Attributes:
        prompts: Indices of the group's P prompts among all, those that are detailed first.
        images: The images of the batch that they are measured on; ``None`` for all.
        concepts: Number of concepts of each prompt, K.
        detailed: Number of prompts whose parts are kept apart.
    """

    prompts: tuple[int, ...]
    images: tuple[int, ...] | None
    concepts: int
    detailed: int

    def rows(self, images: int) -> int:
        """Number of images measured in a batch of ``images``, b."""
        return images if self.images is None else len(self.images)

    def select(self, places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Of (row of a pass, image), the group's: (row of the pass, row of its sums)."""
        if self.images is None:
            return list(places)
        rows = {image: row for row, image in enumerate(self.images)}
        return [(place, rows[image]) for place, image in places if image in rows]


def grouped(
    shapes: Sequence[tuple[int, int]],
    images: Sequence[tuple[int, ...] | None],
    detailed: Sequence[bool],
) -> list[Group]:
    """The groups of prompts, each in the order of its first prompt.

    Args:
        shapes: Number of concepts and of tokens of every prompt.
        images: The images that each prompt is measured on; ``None`` for all.
        detailed: Whether parts of a prompt's maps are kept apart.

    Example:
        >>> [group.prompts for group in grouped([(2, 9), (2, 8), (2, 9)], [None] * 3, [True] * 3)]
        [(0, 2), (1,)]
    """
    alike: dict[tuple[tuple[int, int], tuple[int, ...] | None], list[int]] = {}
    for number, key in enumerate(zip(shapes, images, strict=True)):
        alike.setdefault(key, []).append(number)
    return [
        Group(
            tuple(sorted(numbers, key=lambda number: not detailed[number])),
            measured,
            shape[0],
            sum(detailed[number] for number in numbers),
        )
        for (shape, measured), numbers in alike.items()
    ]


@dataclass(frozen=True)
class PromptKeys:
    """P prompts of one shape, ready to meet the queries of a UNet.

    Attributes:
        weights: ``[P, K, T']``, the pieces of each prompt's concepts.
        by_layer: Layer -> keys ``[P, heads, T', d]``, times 1 / sqrt(d).
        members: ``None``; or, for the CPU's kernel, ``[P, U]``: how often each prompt has each of
            the U different tokens. Then ``weights`` is ``[P, K, U]`` and keys ``[heads, U, d]``.
    """

    weights: torch.Tensor
    by_layer: Mapping[str, torch.Tensor]
    members: torch.Tensor | None = None


def prompt_keys(
    weights: torch.Tensor,
    states: torch.Tensor,
    keys_of: Callable[[torch.Tensor], Mapping[str, torch.Tensor]],
    *,
    apart: bool = False,
) -> PromptKeys:
    """The keys of prompts of one shape.

    Args:
        weights: ``[P, K, T']``, on the UNet's device.
        states: ``[P, T', D]`` hidden states.
        keys_of: States ``[R, T, D]`` to layer -> keys ``[R, heads, T, d]``; a token's key depends
            on its own state alone.
        apart: Whether every prompt has its own keys, whatever the device.
    """
    if fused_prompts(weights) and not apart:
        prompts, _, tokens = weights.shape
        tokens_once, which = torch.unique(states.flatten(0, 1), dim=0, return_inverse=True)
        layers = keys_of(tokens_once[None])
        member = torch.nn.functional.one_hot(which).to(weights.dtype)  # [P * T', U]
        member = member.view(prompts, tokens, -1)
        by_layer = {name: keys[0].contiguous() for name, keys in layers.items()}
        return PromptKeys(weights @ member, by_layer, member.sum(1))
    return PromptKeys(weights, keys_of(states))


def add_maps(
    maps: Sequence[torch.Tensor], query: torch.Tensor, keys: PromptKeys, layer: str
) -> None:
    """Adds `reference.concept_map` of prompts to each of ``maps``.

    Args:
        maps: ``[P', B, K, n]`` each, a map's pixels in a row: those of the first P' prompts are
            added.
        query: ``[B, n, heads * d]`` of the layer, any floating dtype, any strides.
        keys: Keys of the prompts.
        layer: Name of the layer.
    """
    by_prompt = keys.by_layer[layer]
    if keys.members is not None:
        add_prompt_maps(maps, query, by_prompt, keys.members, keys.weights)
        return
    with torch.no_grad():
        split = split_heads(query, by_prompt.shape[1])  # [B, heads, n, d]
        sums = max(maps, key=len)
        if len(maps) > 1:
            sums = torch.zeros_like(sums, memory_format=torch.contiguous_format)
        for index, target in enumerate(sums):
            add_concept_map(target, split, by_prompt[index], keys.weights[index])
        if len(maps) > 1:
            for target in maps:
                target += sums[: len(target)]


@torch.no_grad()
def add_heads(
    maps: Sequence[torch.Tensor], query: torch.Tensor, keys: PromptKeys, layer: str
) -> None:
    """As `add_maps`, but the map of each head to one of ``maps``."""
    split = split_heads(query, len(maps))  # [B, heads, n, d]
    for index, weights in enumerate(keys.weights):
        by_head = concept_map(split, keys.by_layer[layer][index], weights, per_head=True)
        for head, target in enumerate(maps):
            target[index] += by_head[:, head]


@dataclass
class _Run:
    """The sums of one pipeline call."""

    images: int  # B
    calls: int = 0
    # (index of the group, by, name of the part) -> (h, w) -> sum [P, b, K, h * w], float32
    sums: dict[tuple[int, By, str], dict[Size, torch.Tensor]] = field(default_factory=dict)
    # (index of the group, layer, (h, w)) -> what its maps are added to; None for the call's own
    targets: dict[tuple[int, str, Size], list[torch.Tensor | None]] = field(default_factory=dict)

    @property
    def largest(self) -> Size:
        return max(size for sums in self.sums.values() for size in sums)


class Sums:
    """The sums of a recorder's pipeline calls, by group and by everything that is kept apart."""

    def __init__(self, groups: Sequence[Group], by: tuple[By, ...], size: Size | None) -> None:
        self._groups = groups
        self._by = by
        self._size = size
        self.runs: list[_Run] = []

    def begin(self, images: int) -> None:
        """Starts the sums of a pipeline call that draws so many images."""
        self.runs.append(_Run(images))

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(t.nbytes for run in self.runs for by in run.sums.values() for t in by.values())

    def targets(
        self, index: int, part: Any, size: Size, device: torch.device
    ) -> list[torch.Tensor]:
        """The sums that one part's maps of a group belong to, ``[P, b, K, h * w]`` each.

        P counts the prompts that a sum is kept of: all, or the detailed ones. The first has all.
        """
        run = self.runs[-1]
        key = (index, part.name, size)
        if key not in run.targets:
            kept = self._by if self._groups[index].detailed else self._by[:1]
            run.targets[key] = [
                None if by == "step" else self._sum((index, by, name), size, device)
                for by in kept
                for name in _names(by, part)
            ]
        step: tuple[int, By, str] = (index, "step", str(run.calls - 1))
        return [
            self._sum(step, size, device) if sums is None else sums for sums in run.targets[key]
        ]

    def _sum(self, key: tuple[int, By, str], size: Size, device: torch.device) -> torch.Tensor:
        run, group = self.runs[-1], self._groups[key[0]]
        by_size = run.sums.setdefault(key, {})
        if size not in by_size:
            prompts = len(group.prompts) if key[1] == self._by[0] else group.detailed
            shape = (prompts, group.rows(run.images), group.concepts, size[0] * size[1])
            by_size[size] = torch.zeros(shape, device=device)
        return by_size[size]

    def totals(self, by: By) -> Iterator[tuple[Group, list[str], torch.Tensor]]:
        """Of every group: the names of S parts, and their maps ``[S, P, B, K, H, W]``.

        P counts the prompts that ``by`` was kept of; a group without is left out.

        Raises:
            ValueError: The pipeline calls differ in map size without a ``size``, or in their steps.
        """
        sizes = {run.largest for run in self.runs}
        if len(sizes) > 1 and self._size is None:
            raise ValueError(
                f"the recorded pipeline calls have maps of different sizes {sorted(sizes)}; "
                "give attribute(..., size=) one to bring them to"
            )
        for index, group in enumerate(self._groups):
            if by != self._by[0] and not group.detailed:
                continue
            names = list(
                dict.fromkeys(
                    name for run in self.runs for *key, name in run.sums if key == [index, by]
                )
            )
            runs = [self._resized(run, [(index, by, name) for name in names]) for run in self.runs]
            yield group, names, torch.cat(runs, dim=2) if len(runs) > 1 else runs[0]

    def images(self, group: Group) -> tuple[int, ...] | None:
        """The images of a group over all pipeline calls; ``None`` for all."""
        if group.images is None:
            return None
        starts = itertools.accumulate((run.images for run in self.runs[:-1]), initial=0)
        return tuple(start + image for start in starts for image in group.images)

    def _resized(self, run: _Run, keys: Sequence[tuple[int, By, str]]) -> torch.Tensor:
        """Maps ``[S, P, b, K, H, W]``: sums at the largest resolution, their total at ``size``."""
        for key in keys:
            if key not in run.sums:
                raise ValueError(
                    f"pipeline calls with different numbers of steps have no common part "
                    f"{key[2]!r}; record them separately to keep steps apart"
                )
        alike: dict[tuple[Size, ...], list[int]] = {}  # parts with the same resolutions
        for number, key in enumerate(keys):
            alike.setdefault(tuple(run.sums[key]), []).append(number)
        totals = []
        for sizes, numbers in alike.items():
            large = []
            for size in sizes:
                sums = torch.stack([run.sums[keys[number]][size] for number in numbers])
                maps = sums.view(-1, sums.shape[3], *size)  # [s * P * b, K, h, w]
                large.append(resize(maps, run.largest))
            total = resize(torch.stack(large).sum(0), self._size or run.largest)
            totals.append(total.view(*sums.shape[:4], *total.shape[-2:]))
        if len(totals) == 1:
            return totals[0]
        order = torch.tensor(list(itertools.chain.from_iterable(alike.values()))).argsort()
        return torch.cat(totals)[order]


def _names(by: By, part: Any) -> list[str]:
    if by == "head":
        return [f"{part.name}:{head}" for head in range(part.heads)]
    return [{"total": "", "block": part.block, "layer": part.name, "step": ""}[by]]
