"""Overlap of attribution maps: this package against the published code, numpy and plain torch.

One thread, as numpy's percentile has no more. A bound counts the maps read once for a value, and
with a gradient read twice and written once with two exponentials a pixel: a mask at its root, and
once more for the gradient, as masks are not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import biasmap_fast as bm
from biasmap_fast import ops, presets, reference

from .harness import Entry, Group
from .settings import Settings

CONCEPTS, SIDE = 8, 64
PAIRS = torch.combinations(torch.arange(CONCEPTS))  # [28, 2]


def attribution_like(sets: int) -> torch.Tensor:
    """Maps ``[sets, CONCEPTS, SIDE, SIDE]``: coarse blobs, some noise, range about 5."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(sets, CONCEPTS, 8, 8, generator=generator) ** 2
    maps = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
    return (maps + 0.05 * torch.rand(maps.shape, generator=generator)) * 5


def published_iou(maps: np.ndarray) -> np.ndarray:
    """Each pair on its own, each mask again for every pair it is in."""
    values = []
    for concepts in maps:  # [K, N]
        for i, j in PAIRS.tolist():
            first = concepts[i] > np.percentile(concepts[i], 70)
            second = concepts[j] > np.percentile(concepts[j], 70)
            either = np.logical_or(first, second).sum()
            values.append(np.logical_and(first, second).sum() / either if either > 0 else 0)
    return np.array(values).reshape(len(maps), -1)


def batched_numpy_iou(maps: np.ndarray) -> np.ndarray:
    masks = (maps > np.percentile(maps, 70, axis=-1, keepdims=True)).astype(np.float32)
    both = masks @ masks.transpose(0, 2, 1)  # [B, K, K]
    area = masks.sum(-1)
    values: np.ndarray = both / (area[:, :, None] + area[:, None, :] - both)
    return values


def hard(sets: int) -> list[Entry]:
    maps = attribution_like(sets)
    flat = maps.flatten(2)
    array = flat.numpy()
    exact = published_iou(array).astype(np.float32)
    i, j = PAIRS.unbind(1)

    def error(values: Any) -> float:
        pairs = np.asarray(values, dtype=np.float32)
        pairs = pairs[:, i, j] if pairs.ndim == 3 else pairs
        return float(np.abs(pairs - exact).max())

    found = [
        Entry("numpy, pair by pair (published)", lambda: published_iou(array), error),
        Entry("numpy, batched", lambda: batched_numpy_iou(array), error),
        Entry("torch reference", lambda: reference.pairs_iou(flat, PAIRS, 70.0)[0], error),
        Entry(
            "pairwise_iou", lambda: bm.pairwise_iou(maps), error, "all 8 x 8 pairs", ours=True,
            tolerance=1e-6,
        ),
    ]  # fmt: skip
    for entry in found:
        entry.bytes = maps.nbytes
    return found


def with_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], maps: torch.Tensor
) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        x = maps.clone().requires_grad_()
        values = function(x)
        torch.autograd.grad(values.sum(), x)
        return values.detach()

    return run


def soft(sets: int, compiled: bool, every: bool) -> list[Entry]:
    """Of the native function alone, or beside ``every`` other."""
    maps = attribution_like(sets)
    flat = maps.flatten(2)
    checked = slice(16)  # sets; in float64 the rest would take longer than all the rounds
    exact = reference.soft_iou(flat[checked].double(), PAIRS, 0.3, 0.01)
    i, j = PAIRS.unbind(1)

    def error(values: torch.Tensor) -> float:
        return float((values[checked] - exact).abs().max())

    def pair_by_pair(x: torch.Tensor) -> torch.Tensor:
        values = [presets.paper_soft_iou(s[a], s[b]) for s in x for a, b in PAIRS.tolist()]
        return torch.stack(values).reshape(len(x), -1)

    def batched(x: torch.Tensor) -> torch.Tensor:
        return presets.paper_soft_iou(x[:, i], x[:, j])

    def plain(x: torch.Tensor) -> torch.Tensor:
        return reference.soft_iou(x, PAIRS, 0.3, 0.01)

    def side_by_side(x: torch.Tensor) -> torch.Tensor:
        values = bm.soft_iou(x[:, i].flatten(0, 1), x[:, j].flatten(0, 1))
        return values.reshape(len(x), -1)

    def native(x: torch.Tensor) -> torch.Tensor:
        return ops.soft_iou(x, PAIRS, 0.3, 0.01)

    other = "another quantity: row by row, not converged"
    found = [
        Entry(
            "unrolled, pair by pair (published)", with_gradient(pair_by_pair, maps), error, other
        ),
        Entry("unrolled, batched", with_gradient(batched, maps), error, other),
        Entry("torch reference", with_gradient(plain, flat), error),
    ]
    if compiled:
        fast = torch.compile(plain)
        found.append(Entry("torch reference, compiled", with_gradient(fast, flat), error))
    pairwise = with_gradient(side_by_side, maps)
    found.append(Entry("soft_iou, every pair's maps", pairwise, error, ours=True, tolerance=1e-5))
    once = with_gradient(native, flat)
    found.append(Entry("ops.soft_iou, each map once", once, error, ours=True, tolerance=1e-5))
    for entry in found:
        if entry.note != other:
            entry.bytes, entry.exponentials = 3 * maps.nbytes, 2 * maps.numel()
    return found if every else found[-1:]


def groups(settings: Settings) -> list[Group]:
    sets, few = (16, 1) if settings.quick else (256, 2)
    name, rounds = "SoftIoU with gradient", settings.rounds(5)

    def group(name: str, sets: int, setup: Callable[[], list[Entry]], seconds: float) -> Group:
        workload = f"{sets} sets of {CONCEPTS} concepts at {SIDE} x {SIDE}"
        return Group("overlap", name, workload, setup, rounds, seconds)

    return [
        group("hard IoU", sets, lambda: hard(sets), 18),
        group(name, few, lambda: soft(few, not settings.quick, True), 60),
        group(f"{name}, all", sets, lambda: soft(sets, False, False), 6),
    ]
