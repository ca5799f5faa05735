"""Every candidate measure: how two maps are made, and how their overlap is scored.

A candidate is a form (prompts, or a contrast of them), a normalisation, a set of layers, a part of
the run, a guidance branch and a measure. All measures are a function of one inner product of two
transformed maps, so every picture's map meets every other's in one product: its diagonal is the
measure, the rest the seed-shuffled null.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

import biasmap_fast as bm

SIDE = 16


@dataclass(frozen=True, order=True)
class Maps:
    """How a pair of maps is made."""

    form: str
    norm: str
    layers: str
    steps: str
    branch: str


@dataclass(frozen=True, order=True)
class Candidate(Maps):
    """A pair of maps and the measure of their overlap."""

    measure: str

    def changes(self, other: Candidate) -> int:
        """In how many of its six parts it differs from another candidate."""
        return sum(getattr(self, f.name) != getattr(other, f.name) for f in fields(self))


FORMS = ("joint", "single", "neutral", "contrast", "axis")
NORMS = ("softmax", "raw")
STEPS = ("all", "first", "middle", "last")
BRANCHES = ("uncond", "cond")  # in the order of the captured sums
LAYERS: dict[str, Callable[[str], bool]] = {
    "default": lambda name: not name.startswith("mid_block"),
    "with mid": lambda _: True,
    "decoder": lambda name: name.startswith("up_blocks"),
    "finest": lambda name: name.startswith(("down_blocks.0", "up_blocks.2")),
    "second": lambda name: name.startswith(("down_blocks.1", "up_blocks.1")),
}


def map_choices() -> Iterator[Maps]:
    for choice in itertools.product(FORMS, NORMS, LAYERS, STEPS, reversed(BRANCHES)):
        yield Maps(*choice)


def layer_maps(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every layer's sums `[P, S, K, norm, part, branch, n]` resized to ``[..., 256]``."""
    resized = {}
    for name, value in sums.items():
        side = int(value.shape[-1] ** 0.5)
        flat = value.reshape(-1, 1, side, side)
        large = torch.nn.functional.interpolate(flat, size=SIDE, mode="bilinear")
        resized[name] = large.reshape(*value.shape[:-1], SIDE * SIDE)
    return resized


Pair = tuple[torch.Tensor, torch.Tensor]


def pair_of_maps(
    layers: dict[str, torch.Tensor], concepts: list[str], maps: Maps, word: str, noun: str = "noun"
) -> Pair:
    """The maps of a profession and a demographic word, each ``[P, S, 256]``.

    ``concepts`` names the K axis of ``layers``; "control" as ``noun`` puts a word that draws
    nothing in the profession's place.
    """
    norm = NORMS.index(maps.norm)
    third = STEPS.index(maps.steps) - 1
    parts = slice(None) if maps.steps == "all" else slice(third, third + 1)
    branch = BRANCHES.index(maps.branch)

    def total(key: str) -> torch.Tensor:
        k = concepts.index(key)
        chosen = [
            value[:, :, k, norm, parts, branch].sum(2)
            for name, value in layers.items()
            if LAYERS[maps.layers](name)
        ]
        return torch.stack(chosen).sum(0)

    other = {"man": "woman", "woman": "man"}[word]
    if maps.form == "joint":
        return total(noun if noun == "control" else f"noun with {word}"), total(f"{word} with noun")
    if maps.form == "single":
        return total(noun), total(word)
    if maps.form == "neutral":
        return total(noun) - total("neutral"), total(word) - total("neutral")
    difference = total(word) - total(other)
    return total(noun), difference if maps.form == "contrast" else difference.abs()


# Measures: (transform of a, transform of b, combine(inner, sum a, sum b)).
Transform = Callable[["View"], torch.Tensor]
Measure = tuple[Transform, Transform, Callable[[Any, Any, Any], Any]]


class View:
    """Maps ``[P, S, N]`` and what several measures need of them, computed once."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.masks: dict[tuple[str, float], torch.Tensor] = {}

    @cached_property
    def ranks(self) -> torch.Tensor:
        """Ranks of the pixels in 0..1."""
        return self.values.argsort(-1).argsort(-1).float() / (self.values.shape[-1] - 1)

    @cached_property
    def ordered(self) -> torch.Tensor:
        return self.values.sort(-1).values

    @cached_property
    def mass(self) -> torch.Tensor:
        """What lies above the map's minimum, as a distribution."""
        above = self.values - self.values.amin(-1, keepdim=True)
        return above / above.sum(-1, keepdim=True).clamp(min=1e-12)

    def top(self, percent: float) -> torch.Tensor:
        """The package's hard mask: strictly above the percentile."""
        if ("top", percent) not in self.masks:
            # linear between order statistics, as numpy's percentile and the package's
            place = (1 - percent / 100) * (self.values.shape[-1] - 1)
            below = int(place)
            low, high = (self.ordered[..., i : i + 1] for i in (below, below + 1))
            edge = low + (place - below) * (high - low)
            self.masks["top", percent] = (self.values > edge).float()
        return self.masks["top", percent]

    def soft(self, percent: float) -> torch.Tensor:
        """The package's soft mask."""
        if ("soft", percent) not in self.masks:
            self.masks["soft", percent] = bm.soft_topk(self.values, fraction=percent / 100)
        return self.masks["soft", percent]


def standard(x: torch.Tensor) -> torch.Tensor:
    """Mean 0 and norm 1."""
    x = x - x.mean(-1, keepdim=True)
    length: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp(min=1e-12)


def _jaccard(inner: Any, a: Any, b: Any) -> Any:
    return inner / (a + b - inner).clamp(min=1e-12)


def _plain(inner: Any, _a: Any, _b: Any) -> Any:
    return inner


def _per_first(inner: Any, a: Any, _b: Any) -> Any:
    return inner / a.clamp(min=1e-12)


def measures(marker_percent: float, region_percent: float) -> dict[str, Measure]:
    """All measures by name; the planted sizes are only for the one called "IoU planted sizes"."""

    def top(percent: float) -> Transform:
        return lambda view: view.top(percent)

    def soft(percent: float) -> Transform:
        return lambda view: view.soft(percent)

    ranks: Transform = lambda view: view.ranks  # noqa: E731
    root: Transform = lambda view: view.mass.sqrt()  # noqa: E731
    values: Transform = lambda view: standard(view.values)  # noqa: E731
    rank_values: Transform = lambda view: standard(view.ranks)  # noqa: E731
    found: dict[str, Measure] = {}
    for p in (50, 30, 20, 10, 5):
        found[f"IoU top {p} %"] = (top(p), top(p), _jaccard)
    for p in (30, 10, 5):
        found[f"SoftIoU {p} %"] = (soft(p), soft(p), _jaccard)
    # of the profession's mask, the part inside the demographic's: as the planted overlap is defined
    for own, p in itertools.product((3, 5, 10), (30, 20, 10)):
        found[f"top {own} % inside top {p} %"] = (top(own), top(p), _per_first)
    for own, p in ((5, 20), (5, 10), (10, 20)):
        found[f"soft {own} % inside soft {p} %"] = (soft(own), soft(p), _per_first)
    for p in (10, 5):
        # how high the demographic's map ranks where the profession's mask is
        found[f"rank under top {p} %"] = (top(p), ranks, _per_first)
        found[f"rank under soft {p} %"] = (soft(p), ranks, _per_first)
    found["rank under mass"] = (lambda view: view.mass, ranks, _plain)
    found["rank correlation"] = (rank_values, rank_values, _plain)
    found["correlation"] = (values, values, _plain)
    found["Bhattacharyya"] = (root, root, _plain)
    found[PLANTED] = (top(marker_percent), top(region_percent), _jaccard)
    return found


PLANTED = "IoU planted sizes"
PUBLISHED = Candidate("joint", "softmax", "default", "all", "cond", "IoU top 30 %")
PUBLISHED_BRANCH = Candidate("joint", "softmax", "default", "all", "uncond", "IoU top 30 %")


def overlap(a: View, b: View, measure: Measure) -> torch.Tensor:
    """Every seed's first map against every seed's second: ``[P, S, S]``."""
    first, second, combine = measure
    x, y = first(a), second(b)  # [P, S, N]
    inner = x @ y.transpose(1, 2)  # [P, S, S]
    result: torch.Tensor = combine(inner, x.sum(-1)[:, :, None], y.sum(-1)[:, None, :])
    return result
