"""Overlap of attribution maps: this package against the published code, numpy and plain torch.

python benchmarks/overlap.py [--out DIR] [--threads N] [--rounds N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import biasmap_fast as bm
from biasmap_fast import ops, presets, reference
from harness import Variant, device_name, measure, save, show

CONCEPTS, SIDE = 8, 64
PAIRS = torch.combinations(torch.arange(CONCEPTS))  # [28, 2]


def attribution_like(sets: int) -> torch.Tensor:
    """Maps ``[sets, CONCEPTS, SIDE, SIDE]``: coarse blobs, some noise, range about 5."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(sets, CONCEPTS, 8, 8, generator=generator) ** 2
    maps = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
    return (maps + 0.05 * torch.rand(maps.shape, generator=generator)) * 5


def workload(maps: torch.Tensor) -> str:
    return f"{len(maps)} sets of {CONCEPTS} concepts at {SIDE} x {SIDE}"


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


def hard_variants(maps: torch.Tensor) -> list[Variant]:
    flat = maps.flatten(2)
    array = flat.numpy()
    exact = published_iou(array).astype(np.float32)
    i, j = PAIRS.unbind(1)

    def error(values: Any) -> float:
        pairs = np.asarray(values, dtype=np.float32)
        pairs = pairs[:, i, j] if pairs.ndim == 3 else pairs
        return float(np.abs(pairs - exact).max())

    return [
        Variant("numpy, pair by pair (published)", lambda: published_iou(array), error),
        Variant("numpy, batched", lambda: batched_numpy_iou(array), error),
        Variant("torch reference", lambda: reference.pairs_iou(flat, PAIRS, 70.0)[0], error),
        Variant("pairwise_iou", lambda: bm.pairwise_iou(maps), error, "all 8 x 8 pairs"),
    ]


def with_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], maps: torch.Tensor
) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        x = maps.clone().requires_grad_()
        values = function(x)
        torch.autograd.grad(values.sum(), x)
        return values.detach()

    return run


def soft_variants(maps: torch.Tensor, compiled: bool) -> list[Variant]:
    flat = maps.flatten(2)
    exact = reference.soft_iou(flat.double(), PAIRS, 0.3, 0.01)
    i, j = PAIRS.unbind(1)

    def error(values: torch.Tensor) -> float:
        return float((values - exact).abs().max())

    def pair_by_pair(x: torch.Tensor) -> torch.Tensor:
        values = [presets.paper_soft_iou(s[a], s[b]) for s in x for a, b in PAIRS.tolist()]
        return torch.stack(values).reshape(len(x), -1)

    other = "another quantity: row by row, not converged"
    variants = [
        Variant(
            "unrolled, pair by pair (published)", with_gradient(pair_by_pair, maps), error, other
        ),
        Variant(
            "unrolled, batched",
            with_gradient(lambda x: presets.paper_soft_iou(x[:, i], x[:, j]), maps),
            error,
            other,
        ),
        Variant(
            "torch reference",
            with_gradient(lambda x: reference.soft_iou(x, PAIRS, 0.3, 0.01), flat),
            error,
        ),
    ]
    if compiled:
        fast = torch.compile(lambda x: reference.soft_iou(x, PAIRS, 0.3, 0.01))
        variants.append(Variant("torch reference, compiled", with_gradient(fast, flat), error))

    def side_by_side(x: torch.Tensor) -> torch.Tensor:
        found = bm.soft_iou(x[:, i].flatten(0, 1), x[:, j].flatten(0, 1))
        return found.reshape(len(x), -1)

    native = with_gradient(lambda x: ops.soft_iou(x, PAIRS, 0.3, 0.01), flat)
    return [
        *variants,
        Variant("soft_iou, every pair's maps", with_gradient(side_by_side, maps), error),
        Variant("ops.soft_iou, each map once", native, error),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, default=1, help="default 1, as numpy's percentile")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sets", type=int, default=256)
    parser.add_argument("--soft-sets", type=int, default=2, help="of which SoftIoU takes so many")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    maps = attribution_like(options.sets)
    few = maps[: options.soft_sets].clone()
    hard, soft = "hard IoU", "SoftIoU with gradient"
    rows = measure(hard, workload(maps), hard_variants(maps), options.rounds)
    rows += measure(soft, workload(few), soft_variants(few, not options.no_compile), options.rounds)
    rows += measure(f"{soft}, all", workload(maps), soft_variants(maps, False)[-1:], options.rounds)
    show(rows)
    saved = save(rows, options.out, options.threads, "overlap")
    print(f"\n{device_name()}, {options.threads} thread(s): {saved}")


if __name__ == "__main__":
    main()
