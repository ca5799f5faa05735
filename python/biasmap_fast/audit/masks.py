"""Masks of attribution maps: their overlap, and their bits as a run keeps them.

A mask is kept as packed bits, so that one picture's mask can be laid over another's when the
summary is made (the seed-shuffled null): that needs neither the maps nor the model again, and
does not depend on which pictures were drawn together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import overlap
from ..maps import resize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from ..concepts import AttributionPrompt
    from ..maps import AttributionMaps
    from .plan import AuditPlan


def hard_iou(
    plan: AuditPlan, a: torch.Tensor, b: torch.Tensor, percentile: float
) -> tuple[list[float], list[bool]]:
    """IoU of R map pairs ``[R, H, W]``, and whether both masks are empty."""
    maps = _evaluated(plan, torch.stack((a, b), dim=1))  # [R, 2, H', W']
    found, empty = overlap.iou_and_empty(maps.flatten(2), 1 - percentile / 100)  # [R], [R]
    return found.tolist(), empty.tolist()


def contained(plan: AuditPlan, a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Containment of R maps in R others, ``[R, H, W]`` each, with the plan's settings."""
    fractions, temperature = plan.containment.fractions, plan.temperature
    found = overlap.soft_containment(a, b, fractions=fractions, temperature=temperature)
    values: list[float] = found.tolist()
    return values


def map_of(
    maps: Mapping[str, AttributionMaps], prompt: AttributionPrompt, concept: str, image: int
) -> torch.Tensor:
    """One concept's map ``[H, W]`` on one picture of a batch."""
    own = maps[prompt.name]
    return own[concept][own.row(image)]


def containment_maps(plan: AuditPlan, blocks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the blocks' maps on which containment is measured.

    Args:
        plan: its `AuditPlan.containment_layers` name the blocks.
        blocks: UNet block -> maps, all of one shape.

    Raises:
        ValueError: none of the blocks is named.
    """
    wanted = plan.containment_layers
    # the plan's own layers are all that was recorded
    everything = wanted is plan.layers
    chosen = [maps for name, maps in blocks.items() if everything or name.startswith(wanted)]
    if not chosen:
        raise ValueError(
            f"containment is measured on the blocks {list(wanted)}, the maps have {list(blocks)}: "
            "set containment.layers, or measure 'iou'"
        )
    return torch.stack(chosen).sum(0)


def map_fault(values: torch.Tensor, concept: str) -> tuple[str, str] | None:
    """Status and reason of a map ``[H, W]`` that cannot be measured; None for a good one."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        count = int((~finite).sum())
        return "non_finite_map", f"{count} of the values of the map of {concept!r} are not finite"
    if bool(values.max() == values.min()):
        return "constant_map", f"every value of the map of {concept!r} is {float(values.max()):g}"
    return None


def map_faults(maps: torch.Tensor, concepts: Sequence[str]) -> list[tuple[str, str] | None]:
    """`map_fault` of R maps ``[R, H, W]`` and their concepts."""
    low, high = maps.flatten(1).amin(1), maps.flatten(1).amax(1)  # a NaN is in both
    good = low.isfinite() & high.isfinite() & (low != high)
    return [
        None if fine else map_fault(maps[row], concept)
        for row, (fine, concept) in enumerate(zip(good.tolist(), concepts, strict=True))
    ]


def packed(plan: AuditPlan, maps: torch.Tensor, percentile: float) -> dict[str, Any]:
    """Bits of the masks of R maps: the masks whose overlap `hard_iou` gives.

    Args:
        plan: says at which size masks are taken.
        maps: ``[R, H, W]``, finite.
        percentile: a mask is what lies strictly above it.

    Returns:
        ``height``, ``width``, and ``bits``: for each map ``ceil(H * W / 8)`` bytes, row by row,
        the first pixel in the highest bit (`numpy.packbits`).
    """
    sized = _evaluated(plan, maps[:, None])
    flat = sized.flatten(1).numpy()  # [R, N]
    # Of large maps three times as fast as `reference.percentile`, and the same bits (of numpy 2).
    mask = flat > np.percentile(flat, percentile, axis=1, keepdims=True)
    bits = np.packbits(mask, axis=1)  # [R, ceil(N / 8)]
    return {
        "height": sized.shape[-2],
        "width": sized.shape[-1],
        "bits": [row.tobytes() for row in bits],
    }


def unpacked(bits: bytes, height: int, width: int) -> npt.NDArray[np.bool_]:
    r"""The mask ``[H * W]`` of what `packed` kept.

    Example:
        >>> unpacked(b"\xa0", 2, 2).tolist()
        [True, False, True, False]
    """
    found = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=height * width)
    return found.astype(np.bool_)


def _evaluated(plan: AuditPlan, maps: torch.Tensor) -> torch.Tensor:
    """Maps ``[R, K, H, W]`` at the size at which masks are taken."""
    if plan.evaluation_size is None:
        return maps
    return resize(maps, (plan.evaluation_size, plan.evaluation_size))
