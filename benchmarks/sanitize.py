"""Every CUDA kernel once on small, awkward inputs: what compute-sanitizer runs.

Inputs are made on the CPU and outputs only copied back, so that no kernel but ours runs.
"""

from __future__ import annotations

import torch

from biasmap_fast import _C, ops


def overlap(n: int, concepts: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    maps = torch.rand(2, concepts, n, generator=generator).to(dtype).cuda()
    pairs = torch.combinations(torch.arange(concepts), with_replacement=True)
    op = torch.ops.biasmap
    op.pairs_iou(maps, pairs, 70.0)
    forward = op.soft_iou(maps, pairs, 0.3, 0.01)
    upstream = torch.rand(forward[0].shape, generator=generator).cuda()
    grads = op.soft_iou_backward(upstream, maps, pairs, 0.3, 0.01, *forward)
    if not bool(grads.cpu().isfinite().all()):
        raise RuntimeError(f"soft_iou_backward: not finite at n = {n}")
    x = maps[0]
    forward = op.soft_topk(x, 0.3, 0.01)
    upstream = torch.rand(x.shape, generator=generator).cuda()
    op.soft_topk_backward(upstream, x, 0.3, 0.01, *forward)


def attention(n: int, heads: int, depth: int, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(2, n, heads * depth, generator=generator).to(dtype).cuda()
    query = query.view(2, n, heads, depth).transpose(1, 2)
    keys = torch.randn(heads, tokens, depth, generator=generator).cuda()
    weights = torch.rand(9, tokens, generator=generator).cuda()
    maps = torch.rand(2, 9, n, generator=generator).cuda()
    torch.ops.biasmap.concept_map(query, keys, weights)
    ops.add_concept_map(maps, query, keys, weights)
    grad = torch.ops.biasmap.concept_map_backward(maps, query, keys, weights)
    if not bool(grad.cpu().isfinite().all()):
        raise RuntimeError(f"concept_map_backward: not finite at n = {n}")


def main() -> None:
    if not _C.build_info()["cuda"]:
        raise SystemExit(f"{ops.__name__}: built without CUDA")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n, concepts in ((1, 2), (65, 10), (333, 3), (4096, 2), (16387, 9)):
            overlap(n, concepts, dtype)
        for n, heads, depth, tokens in (
            (1, 1, 8, 1),
            (65, 9, 40, 12),
            (33, 2, 24, 20),
            (40, 8, 160, 77),
        ):
            attention(n, heads, depth, tokens, dtype)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
