"""Concept maps of many attribution prompts from the same queries.

Prompts with as many tokens and as many concepts, on the same images, are a group: one matrix
product and one softmax serve all of them. Behind a causal text encoder prompts that begin alike
have the same keys there, and what is the same is computed once: of "a photo of a doctor and" with
seven last words, a third of the tokens. On a CPU the scores are computed in tiles that stay in its
cache, in memory that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .ops import add_concept_map, fused_attention
from .reference import concept_map

# Numbers in a tile: 1 MiB of float32 for every thread of a CPU; elsewhere it only bounds memory.
_CACHED, _HELD = 2**18, 2**26
_SMALL_TILE = 2**15  # numbers for which memory of one's own is not worth the slicing
_PIXELS = 128  # of a tile, before it has more prompts
# Smallest sum of exponentials that is divided by: its largest terms are then far above float32's
# smallest normal number, 2 ** -126, and those that are not do not count beside them.
_SMALL = 2.0**-60


@dataclass(frozen=True)
class Group:
    """Prompts that are measured together.

    Attributes:
        prompts: the places of P prompts among all.
        images: the images of the batch that they are measured on; ``None`` for all.
        concepts: how many each prompt has, K.
    """

    prompts: tuple[int, ...]
    images: tuple[int, ...] | None
    concepts: int

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
class Shared:
    """The U different tokens of a group's prompts.

    Attributes:
        rows: ``[P * (1 + K), U]``, first how often each prompt has a token, then the weights of
            each prompt's concepts.
        by_layer: layer -> keys ``[heads, U, d]``.
    """

    rows: torch.Tensor
    by_layer: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class GroupKeys:
    """A group's prompts, ready to meet the queries of a UNet."""

    weights: torch.Tensor  # [P, K, T']
    by_layer: Mapping[str, torch.Tensor]  # [P, heads, T', d]
    shared: Shared | None  # where enough of the tokens are the same

    def tensors(self) -> list[torch.Tensor]:
        """Every layer's keys, of the prompts and of what they share."""
        shared = [] if self.shared is None else list(self.shared.by_layer.values())
        return [*self.by_layer.values(), *shared]


def grouped(
    shapes: Sequence[tuple[int, int]], images: Sequence[tuple[int, ...] | None]
) -> list[Group]:
    """The groups of prompts, each in the order of its first.

    Args:
        shapes: number of concepts and tokens of every prompt.
        images: the images that each is measured on; ``None`` for all.

    Example:
        >>> [group.prompts for group in grouped([(2, 9), (2, 8), (2, 9)], [None] * 3)]
        [(0, 2), (1,)]
    """
    found: dict[tuple[tuple[int, int], tuple[int, ...] | None], list[int]] = {}
    for number, key in enumerate(zip(shapes, images, strict=True)):
        found.setdefault(key, []).append(number)
    return [Group(tuple(prompts), own, shape[0]) for (shape, own), prompts in found.items()]


def stacked(
    weights: Sequence[torch.Tensor],
    by_layer: Sequence[Mapping[str, torch.Tensor]],
    states: Sequence[torch.Tensor],
) -> GroupKeys:
    """A group's keys from those of its prompts: ``[K, T']``, and ``[heads, T', d]`` a layer.

    Tokens are the same whose hidden states ``[T', D]`` are.
    """
    layers = {}
    for name, first in by_layer[0].items():
        keys = [own[name] for own in by_layer]
        if fused_attention(first):
            layers[name] = torch.stack(keys)
        else:  # the order in which one product reads them
            layers[name] = torch.stack(keys, dim=1).transpose(0, 1)
    found = torch.stack(list(weights))
    return GroupKeys(found, layers, _shared(found, layers, torch.stack(list(states))))


def _shared(
    weights: torch.Tensor,  # [P, K, T']
    by_layer: Mapping[str, torch.Tensor],  # [P, heads, T', d]
    states: torch.Tensor,  # [P, T', D]
) -> Shared | None:
    if states.device.type != "cpu" or len(states) == 1:
        return None
    _, which = torch.unique(states.flatten(0, 1), dim=0, return_inverse=True)  # [P * T']
    count = int(which.max()) + 1
    prompts, concepts, tokens = weights.shape
    # what they save must pay for dividing concept by concept
    if count + prompts * concepts > 0.7 * prompts * tokens:
        return None
    member = torch.nn.functional.one_hot(which, count).to(weights.dtype)  # [P * T', U]
    member = member.view(prompts, tokens, count)  # [P, T', U]
    rows = torch.cat([member.sum(1), (weights @ member).flatten(0, 1)])
    first = torch.empty(count, dtype=torch.long).scatter_(0, which, torch.arange(len(which)))
    keys = {
        name: own.transpose(0, 1).flatten(1, 2)[:, first].contiguous()  # [heads, U, d]
        for name, own in by_layer.items()
    }
    return Shared(rows, keys)


class ConceptMaps:
    """Adds concept maps of groups; keeps the memory of its tiles from call to call."""

    def __init__(self) -> None:
        self._space = torch.empty(0)

    @torch.no_grad()
    def add(self, maps: torch.Tensor, query: torch.Tensor, group: GroupKeys, layer: str) -> None:
        """Adds `reference.concept_map` of every prompt.

        Args:
            maps: ``[P, B, K, n]``, contiguous but for the first dimension.
            query: ``[B, heads, n, d]`` of the layer, any floating dtype, any strides.
            group: the prompts.
            layer: the layer's name.
        """
        if group.shared is not None and self._add_shared(maps, query, group.shared, layer):
            return
        keys, weights = group.by_layer[layer], group.weights
        if fused_attention(query, keys):
            for own, one, pieces in zip(maps, keys, weights, strict=True):
                add_concept_map(own, query, one, pieces)
            return
        prompts, heads, tokens, _ = keys.shape
        batch, _, pixels, _ = query.shape
        if prompts == 1 and batch * heads * tokens * pixels <= _SMALL_TILE:
            maps[0] += concept_map(query, keys[0], weights[0])
            return
        columns = query.to(keys.dtype).transpose(-1, -2)  # [B, heads, d, n]
        merged = keys.transpose(0, 1).flatten(1, 2)  # [heads, P * T', d]
        on_cpu = query.device.type == "cpu"
        most = _CACHED * torch.get_num_threads() if on_cpu else _HELD
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
                    own = columns[b : b + b_step, :, :, n : n + n_step]
                    shape = (own.shape[0], heads, len(pieces), tokens, own.shape[-1])
                    scores = space[: torch.Size(shape).numel()].view(shape)
                    torch.matmul(rows, own, out=scores.flatten(2, 3))
                    torch.softmax(scores, dim=3, out=scores)
                    found = pieces @ scores.sum(1)  # [b, p, K, n]
                    maps[p : p + p_step, b : b + b_step, :, n : n + n_step] += found.transpose(0, 1)

    def _add_shared(
        self, maps: torch.Tensor, query: torch.Tensor, shared: Shared, layer: str
    ) -> bool:
        """The same from tokens that are computed once; False, and nothing added, if it cannot be.

        Exponentials are taken of the difference to the largest score of all prompts. Where a
        prompt's own are all far below it, theirs would lose their digits.
        """
        keys, rows = shared.by_layer[layer], shared.rows
        heads, tokens, _ = keys.shape
        prompts, batch, concepts, pixels = maps.shape
        columns = query.to(keys.dtype).transpose(-1, -2)  # [B, heads, d, n]
        column = heads * (tokens + len(rows))
        most = _CACHED * torch.get_num_threads()
        n_step = _within(most // column // 64 * 64, pixels, 64)
        b_step = _within(most // (column * n_step), batch)
        space = self._memory(b_step * column * n_step, keys)
        total = torch.empty(prompts, batch, concepts, pixels, dtype=keys.dtype)
        for b in range(0, batch, b_step):
            for n in range(0, pixels, n_step):
                own = columns[b : b + b_step, :, :, n : n + n_step]
                shape = torch.Size((own.shape[0], heads, tokens, own.shape[-1]))
                scores = space[: shape.numel()].view(shape)
                torch.matmul(keys, own, out=scores)
                scores.sub_(scores.amax(2, keepdim=True)).exp_()
                out = torch.Size((*shape[:2], len(rows), shape[3]))
                sums = space[shape.numel() :][: out.numel()].view(out)
                torch.matmul(rows, scores, out=sums)
                over = sums[:, :, :prompts]  # [b, heads, P, n]
                if not float(over.min()) >= _SMALL:  # not of a NaN either, which hides others
                    return False
                parts = sums[:, :, prompts:].view(*shape[:2], prompts, concepts, shape[3])
                parts /= over.unsqueeze(3)  # [b, heads, P, K, n]
                total[:, b : b + b_step, :, n : n + n_step] = parts.sum(1).transpose(0, 1)
        maps += total
        return True

    def _memory(self, count: int, like: torch.Tensor) -> torch.Tensor:
        space = self._space
        if (space.device, space.dtype) != (like.device, like.dtype) or space.numel() < count:
            self._space = torch.empty(count, dtype=like.dtype, device=like.device)
        return self._space


def _within(value: int, most: int, least: int = 1) -> int:
    return max(1, min(most, max(least, value)))
