"""The energy of guidance: which concepts must not overlap, and how far they do in one UNet call.

``E = weighted mean over concept pairs of SoftIoU(M_a, M_b)`` (BiasMap, arXiv 2509.13496), on the
maps of one UNet call, or of all calls so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch

from .attribution import AttributionKeys
from .concepts import AttributionPrompt
from .maps import resize
from .ops import concept_map
from .unet import CrossAttention, as_slice

Pair = tuple[str, str]
Prompts = AttributionPrompt | Sequence[AttributionPrompt]

# Sums of the maps of one target, all its prompts' concepts: (h, w) -> [b, K, h, w]
Sums = dict[tuple[int, int], torch.Tensor]


@dataclass(frozen=True)
class Target:
    """What is to be kept apart in one image.

    Attributes:
        prompts: the attribution prompts; their concepts, one prompt after another, are the K
            concepts of the target.
        pairs: the P pairs, by name.
        indices: the same pairs, by index among the K concepts.
        weights: a weight a pair; they need not sum to 1.
    """

    prompts: tuple[AttributionPrompt, ...]
    pairs: tuple[Pair, ...]
    indices: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]


def make_targets(
    prompt: AttributionPrompt | Sequence[Prompts],
    pairs: Sequence[Pair] | Sequence[Sequence[Pair]] | None,
    weights: Sequence[float] | None,
) -> tuple[Target, ...]:
    """One target for every image, or a single one for all of them.

    Args:
        prompt: as in `guide`.
        pairs: as in `guide`.
        weights: as in `guide`.

    Raises:
        TypeError: something else than attribution prompts.
        ValueError: no prompt; a pair that is none, or that no prompt, or more than one, has.
    """
    if isinstance(prompt, AttributionPrompt):
        sets: list[tuple[AttributionPrompt, ...]] = [(prompt,)]
    else:
        sets = [(one,) if isinstance(one, AttributionPrompt) else tuple(one) for one in prompt]
    if not sets or not all(sets):
        raise ValueError("expected at least one attribution prompt, got an empty sequence")
    for each in sets:
        for one in each:
            if not isinstance(one, AttributionPrompt):
                raise TypeError(f"expected an AttributionPrompt, got {type(one).__name__} {one!r}")
    return tuple(
        _target(each, own, weights)
        for each, own in zip(sets, _pairs_of_images(pairs, len(sets)), strict=True)
    )


def _pairs_of_images(
    pairs: Sequence[Pair] | Sequence[Sequence[Pair]] | None, count: int
) -> list[Sequence[Pair] | None]:
    """Pairs for all images, or a list of them for each, as one entry an image."""
    if pairs is None or not pairs or (pairs[0] and isinstance(pairs[0][0], str)):
        return [pairs] * count  # type: ignore[list-item]
    if len(pairs) != count:
        raise ValueError(
            f"expected pairs for all images, or a list of pairs for each of {count} images, got "
            f"{len(pairs)} lists"
        )
    return list(pairs)  # type: ignore[arg-type]


def _target(
    prompts: tuple[AttributionPrompt, ...],
    pairs: Sequence[Pair] | None,
    weights: Sequence[float] | None,
) -> Target:
    concepts = [concept for prompt in prompts for concept in prompt.concepts]
    starts = [0]
    for prompt in prompts:
        starts.append(starts[-1] + len(prompt.concepts))
    if pairs is None:
        inside = [
            pair for first, last in pairwise(starts) for pair in combinations(range(first, last), 2)
        ]
        # one concept a prompt: the pairs are between prompts
        indices = inside or list(combinations(range(len(concepts)), 2))
    else:
        indices = [_find(pair, prompts, starts) for pair in pairs]
    if not indices:
        got = f"{concepts} alone" if pairs is None else "an empty list of pairs"
        raise ValueError(f"guidance needs a pair of concepts, got {got}")
    return Target(
        prompts=prompts,
        pairs=tuple((concepts[a], concepts[b]) for a, b in indices),
        indices=tuple(indices),
        weights=_weights(weights, len(indices)),
    )


def _find(
    pair: Pair, prompts: tuple[AttributionPrompt, ...], starts: Sequence[int]
) -> tuple[int, int]:
    """Indices of a pair among all prompts' concepts: in the prompt that has both, if one has."""
    if len(pair) != 2 or pair[0] == pair[1]:
        raise ValueError(f"a pair must be two different concepts, got {pair!r}")
    both = [i for i, prompt in enumerate(prompts) if set(pair) <= set(prompt.concepts)]
    found = []
    for concept in pair:
        places = both or [i for i, prompt in enumerate(prompts) if concept in prompt.concepts]
        texts = [prompt.text for prompt in prompts]
        if not places:
            known = [concept for prompt in prompts for concept in prompt.concepts]
            raise ValueError(
                f"the pair {pair!r} names {concept!r}, which is no concept of "
                f"{texts[0] if len(texts) == 1 else texts!r}; there are {known}"
            )
        if len(places) > 1:
            raise ValueError(
                f"the pair {pair!r} is ambiguous: {concept!r} is a concept of "
                f"{[texts[i] for i in places]}"
            )
        found.append(starts[places[0]] + prompts[places[0]].concepts.index(concept))
    return found[0], found[1]


def _weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0 / count,) * count
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"`weights` must be {count} finite numbers, one a pair, got {weights}")
    return tuple(float(weight) for weight in weights)


class Capture:
    """The queries of one UNet call, and for each target the images that it belongs to.

    Maps are computed when the call is over: under activation checkpointing a hook that computes
    inside the checkpointed part would have to do so again, uncounted, when that is recomputed.
    """

    def __init__(
        self,
        rows: slice,
        sizes: dict[int, tuple[int, int]],
        groups: dict[Target, list[int]],
    ) -> None:
        self.groups = groups
        self._rows = rows
        self._sizes = sizes
        self._queries: dict[str, tuple[CrossAttention, torch.Tensor]] = {}

    def add(self, layer: CrossAttention, query: torch.Tensor) -> None:
        """Keeps one layer's queries ``[rows, n, heads * d]``."""
        self._queries.setdefault(layer.name, (layer, query[self._rows]))

    def sums(self, target: Target, keys: Mapping[AttributionPrompt, AttributionKeys]) -> Sums:
        """The target's maps, summed over heads and the layers of one resolution."""
        images = self.groups[target]
        sums: Sums = {}
        for layer, query in self._queries.values():
            size = layer.resolution(query, self._sizes)
            rows = layer.split_heads(query)[as_slice(images)]  # [b, heads, n, d]
            maps = torch.cat(
                [
                    concept_map(rows, keys[prompt].by_layer[layer.name], keys[prompt].weights)
                    for prompt in target.prompts
                ],
                dim=1,
            )  # [b, K, n]
            maps = maps.view(*maps.shape[:2], *size)
            sums[size] = sums[size] + maps if size in sums else maps
        return sums


class GivenMaps:
    """The maps of one UNet call where the UNet is an engine, whose outputs they are."""

    def __init__(self, rows: slice, groups: dict[Target, list[int]]) -> None:
        self.groups = groups
        self._rows = rows
        self._sums: dict[Target, Sums] = {}

    @property
    def prompts(self) -> list[AttributionPrompt]:
        """The targets' prompts, each once."""
        return list(dict.fromkeys(one for target in self.groups for one in target.prompts))

    def add(self, found: Mapping[Any, Sequence[torch.Tensor]]) -> None:
        """Takes the maps of a whole call: part -> for each of the prompts ``[rows, K, h, w]``."""
        places = {prompt: place for place, prompt in enumerate(self.prompts)}
        for target, images in self.groups.items():
            sums: Sums = {}
            for by_prompt in found.values():
                own = [by_prompt[places[prompt]] for prompt in target.prompts]
                maps = torch.cat(own, dim=1)[self._rows][as_slice(images)]  # [b, K, h, w]
                size = (maps.shape[-2], maps.shape[-1])
                sums[size] = sums[size] + maps if size in sums else maps
            self._sums[target] = sums

    def put(self, target: Target, maps: torch.Tensor) -> None:
        """Takes the maps ``[b, K, h, w]`` of one target's images."""
        self._sums[target] = {(maps.shape[-2], maps.shape[-1]): maps}

    def sums(self, target: Target, keys: Any) -> Sums:
        """As `Capture.sums`; the engine has needed no keys."""
        return self._sums[target]


def total_maps(sums: Sums) -> torch.Tensor:
    """Maps ``[b, K, N]`` at the largest resolution: each resolution's sum is resized once."""
    largest = max(sums)
    return torch.stack([resize(maps, largest) for maps in sums.values()]).sum(0).flatten(2)


def in_batch_order(groups: Mapping[Any, Sequence[int]], parts: Sequence[torch.Tensor]) -> Any:
    """One tensor over the batch from the parts ``[b, ...]`` of every group."""
    order = [image for group in groups.values() for image in group]
    # A slice where images are in order already: a list of indices goes to the GPU, and waits.
    return torch.cat(list(parts))[as_slice(sorted(range(len(order)), key=order.__getitem__))]
