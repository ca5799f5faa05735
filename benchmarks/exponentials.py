"""How fast a GPU takes exponentials: a Triton kernel that does little else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

STEPS = 64


@triton.jit  # type: ignore[untyped-decorator]
def _chain(x_ptr, out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    for _ in tl.static_range(STEPS):
        x = tl.exp2(-x)
    tl.store(out_ptr + at, x)


def take_exponentials(x: torch.Tensor) -> torch.Tensor:
    """``STEPS`` exponentials of every number of ``x``, whose size is a multiple of 1024."""
    out = torch.empty_like(x)
    _chain[(x.numel() // 1024,)](x, out, STEPS, 1024)
    return out
