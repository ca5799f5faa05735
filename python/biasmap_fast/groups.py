"""Concept maps of many attribution prompts from the same queries.

Prompts with as many tokens and as many concepts, on the same images, are a group, and read the
queries together. Behind a causal text encoder prompts that begin alike have the same keys there:
on a CPU one kernel computes what is the same once (of "a photo of a doctor and" with seven last
words, a third of the tokens). A GPU's kernel takes prompt by prompt. Elsewhere one matrix product
and one softmax serve all of them, in tiles of bounded memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .ops import add_concept_map, add_prompt_maps, fused_attention, fused_prompts
from .unet import split_heads

# Numbers in a tile: 1 MiB of float32 for every thread of a CPU; elsewhere it only bounds memory.
_CACHED, _HELD = 2**18, 2**26
_PIXELS = 128  # of a tile, before it has more prompts


@dataclass(frozen=True)
class Group:
    """Prompts that are measured together.

    Attributes:
        prompts: the places of P prompts among all, those that are detailed first.
        images: the images of the batch that they are measured on; ``None`` for all.
        concepts: how many each prompt has, K.
        detailed: of how many prompts parts are kept apart.
    """

    prompts: tuple[int, ...]
    images: tuple[int, ...] | None
    concepts: int
    detailed: int

    def rows(self, images: int) -> int:
        """How many of a batch of ``images`` it is measured on, b."""
        return images if self.images is None else len(self.images)

    def mine(self, places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Of (place in a pass, image), its own: (place in the pass, row of its sums)."""
        if self.images is None:
            return list(places)
        row = {image: number for number, image in enumerate(self.images)}
        return [(place, row[image]) for place, image in places if image in row]


@dataclass(frozen=True)
class Distinct:
    """The U different tokens of a group's prompts, for the CPU's kernel.

    Attributes:
        members: ``[P, U]``, how often each prompt has a token.
        weights: ``[P, K, U]``, the weights of each prompt's concepts.
        by_layer: layer -> keys ``[heads, U, d]``.
    """

    members: torch.Tensor
    weights: torch.Tensor
    by_layer: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class GroupKeys:
    """A group's prompts, ready to meet the queries of a UNet.

    Attributes:
        weights: ``[P, K, T']``.
        by_layer: layer -> keys ``[P, heads, T', d]``; empty where the CPU's kernel takes them.
        distinct: what that kernel takes; ``None`` elsewhere.
    """

    weights: torch.Tensor
    by_layer: Mapping[str, torch.Tensor]
    distinct: Distinct | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Every layer's keys."""
        held = self.by_layer if self.distinct is None else self.distinct.by_layer
        return list(held.values())


def grouped(
    shapes: Sequence[tuple[int, int]],
    images: Sequence[tuple[int, ...] | None],
    detailed: Sequence[bool] | None = None,
) -> list[Group]:
    """The groups of prompts, each in the order of its first.

    Args:
        shapes: number of concepts and tokens of every prompt.
        images: the images that each is measured on; ``None`` for all.
        detailed: of which parts are kept apart; default all.

    Example:
        >>> [group.prompts for group in grouped([(2, 9), (2, 8), (2, 9)], [None] * 3)]
        [(0, 2), (1,)]
    """
    detailed = [True] * len(shapes) if detailed is None else detailed
    found: dict[tuple[tuple[int, int], tuple[int, ...] | None], list[int]] = {}
    for number, key in enumerate(zip(shapes, images, strict=True)):
        found.setdefault(key, []).append(number)
    return [
        Group(
            tuple(sorted(prompts, key=lambda number: not detailed[number])),
            own,
            shape[0],
            sum(detailed[number] for number in prompts),
        )
        for (shape, own), prompts in found.items()
    ]


def group_keys(
    weights: torch.Tensor,
    states: torch.Tensor,
    keys_of: Callable[[torch.Tensor], Mapping[str, torch.Tensor]],
    *,
    apart: bool = False,
) -> GroupKeys:
    """The keys of a group's prompts.

    Args:
        weights: ``[P, K, T']``, on the UNet's device.
        states: ``[P, T', D]`` hidden states.
        keys_of: of states ``[R, T, D]``, layer -> keys ``[R, heads, T, d]``; a token's key depends
            on its own state alone.
        apart: whether the keys of each prompt are kept, whatever the device.
    """
    if fused_prompts(weights) and not apart:
        return GroupKeys(weights, {}, _distinct(weights, states, keys_of))
    layers = keys_of(states)
    if not fused_attention(weights):  # the order in which one product reads them
        layers = {
            name: keys.transpose(0, 1).contiguous().transpose(0, 1) for name, keys in layers.items()
        }
    return GroupKeys(weights, layers)


def _distinct(
    weights: torch.Tensor,  # [P, K, T']
    states: torch.Tensor,  # [P, T', D]
    keys_of: Callable[[torch.Tensor], Mapping[str, torch.Tensor]],
) -> Distinct:
    prompts, _, tokens = weights.shape
    different, which = torch.unique(states.flatten(0, 1), dim=0, return_inverse=True)  # [U, D]
    by_layer = {name: keys[0].contiguous() for name, keys in keys_of(different[None]).items()}
    member = torch.nn.functional.one_hot(which).to(weights.dtype)  # [P * T', U]
    member = member.view(prompts, tokens, -1)
    return Distinct(member.sum(1), weights @ member, by_layer)


class ConceptMaps:
    """Adds concept maps of groups; keeps the memory of its tiles from call to call."""

    def __init__(self) -> None:
        self._space = torch.empty(0)

    def add(
        self, maps: Sequence[torch.Tensor], query: torch.Tensor, group: GroupKeys, layer: str
    ) -> None:
        """Adds `reference.concept_map` of prompts to each of ``maps``.

        Args:
            maps: ``[P', B, K, n]`` each, a map's pixels in a row: those of the first P' prompts are
                added.
            query: ``[B, n, heads * d]`` of the layer, any floating dtype, any strides.
            group: the prompts.
            layer: the layer's name.
        """
        if group.distinct is not None:
            own = group.distinct
            add_prompt_maps(maps, query, own.by_layer[layer], own.members, own.weights)
        elif len(maps) > 1:
            most = max(maps, key=len)
            sums = torch.zeros_like(most, memory_format=torch.contiguous_format)
            self._add(sums, query, group, layer)
            for each in maps:
                each += sums[: len(each)]
        else:
            self._add(maps[0], query, group, layer)

    @torch.no_grad()
    def _add(self, maps: torch.Tensor, query: torch.Tensor, group: GroupKeys, layer: str) -> None:
        """Without the CPU's kernel."""
        keys = group.by_layer[layer][: len(maps)]  # [P', heads, T', d]
        weights = group.weights[: len(maps)]
        query = split_heads(query, keys.shape[1])  # [B, heads, n, d]
        if fused_attention(query, keys):
            for each, one, pieces in zip(maps, keys, weights, strict=True):
                add_concept_map(each, query, one, pieces)
            return
        prompts, heads, tokens, _ = keys.shape
        batch, _, pixels, _ = query.shape
        columns = query.to(keys.dtype).transpose(-1, -2)  # [B, heads, d, n]
        merged = keys.transpose(0, 1).flatten(1, 2)  # [heads, P * T', d]
        most = _CACHED * torch.get_num_threads() if query.device.type == "cpu" else _HELD
        column = heads * tokens  # scores of one prompt at one pixel
        p_step = _within(most // (column * min(pixels, _PIXELS)), prompts)
        n_step = _within(most // (column * p_step) // 64 * 64, pixels, 64)
        b_step = _within(most // (column * p_step * n_step), batch)
        space = self._memory(b_step * column * p_step * n_step, merged)
        for b in range(0, batch, b_step):
            for p in range(0, prompts, p_step):
                rows = merged[:, p * tokens : (p + p_step) * tokens]
                pieces = weights[p : p + p_step]
                for n in range(0, pixels, n_step):
                    part = columns[b : b + b_step, :, :, n : n + n_step]
                    shape = (part.shape[0], heads, len(pieces), tokens, part.shape[-1])
                    scores = space[: torch.Size(shape).numel()].view(shape)
                    torch.matmul(rows, part, out=scores.flatten(2, 3))
                    torch.softmax(scores, dim=3, out=scores)
                    found = pieces @ scores.sum(1)  # [b, p, K, n]
                    maps[p : p + p_step, b : b + b_step, :, n : n + n_step] += found.transpose(0, 1)

    def _memory(self, count: int, like: torch.Tensor) -> torch.Tensor:
        space = self._space
        if (space.device, space.dtype) != (like.device, like.dtype) or space.numel() < count:
            self._space = torch.empty(count, dtype=like.dtype, device=like.device)
        return self._space


def _within(value: int, most: int, least: int = 1) -> int:
    return max(1, min(most, max(least, value)))
