"""Overlap of attribution maps: IoU and containment, hard and soft, and what chance alone gives.

IoU tells whether two masks are the same; containment, ``|A and B| / |A|``, whether the first lies
on the second ("resemblance" and "containment": Broder, SEQUENCES 1997). IoU and its soft form are
BiasMap's (arXiv 2509.13496). Of the measures tried against a planted truth (docs/validity.md),
containment recovered it best. Chance levels and corrections are this package's own.

Maps are ``[B, H, W]`` or ``[H, W]``, float16, bfloat16, float32 or float64, and finite. Values are
``[B]`` or a scalar, float32; float64 for float64 maps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import torch

from . import ops, reference

if TYPE_CHECKING:
    import numpy as np

    from .maps import AttributionMaps

Number = TypeVar("Number", float, "np.ndarray", torch.Tensor)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Finer than this, float32 maps no longer resolve the edge of the mask.
_MIN_TEMPERATURE = 1e-6
# The profession's mask and the word's: what the validity study chose.
_FRACTIONS = (0.05, 0.1)


def iou(a: torch.Tensor, b: torch.Tensor, *, fraction: float = 0.3) -> torch.Tensor:
    """Hard IoU of two maps: each mask keeps the top ``fraction`` of its map's pixels.

    ``mask = map > percentile(map)``, strictly, ``IoU = |A and B| / |A or B|``. The percentile
    interpolates linearly between order statistics and equals ``numpy.percentile`` to the last bit.
    A constant map has an empty mask; two of them have IoU 0.

    Args:
        a: First maps, ``[B, H, W]`` or ``[H, W]``.
        b: Second maps, of the same shape, dtype and device.
        fraction: Fraction of the pixels in each mask, in (0, 1].

    Returns:
        ``[B]`` or a scalar; no gradient.

    Raises:
        TypeError: Not tensors of floats.
        ValueError: Shapes, dtypes or devices differ, a map has no pixels or a value that is not
            finite, or ``fraction`` is out of range.

    Example:
        >>> a = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> float(iou(a, a.flip(1), fraction=0.5)), float(iou(a, a.flip(0), fraction=0.5))
        (1.0, 0.0)
    """
    return iou_and_empty(_stack(a, b), fraction)[0].reshape(a.shape[:-2])


def iou_and_empty(maps: torch.Tensor, fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`iou` of pairs ``[B, 2, N]`` as ``[B]``, and bool ``[B]``: True if both masks are empty."""
    result = ops.pairs_iou(maps, torch.tensor([[0, 1]]), percentile_of(fraction))
    _check_finite(result.area < 0, maps, ("a", "b"))
    return result.iou[:, 0], result.union[:, 0] == 0


def pairwise_iou(maps: torch.Tensor, *, fraction: float = 0.3) -> torch.Tensor:
    """Hard IoU of every pair of concepts, as `iou`.

    Args:
        maps: ``[B, K, H, W]``.
        fraction: Fraction of the pixels in each mask, in (0, 1].

    Returns:
        ``[B, K, K]``, symmetric; 1 on the diagonal, or 0 if that map's mask is empty.

    Raises:
        ValueError: Another shape; otherwise as `iou`.

    Example:
        >>> maps = torch.arange(8.0).reshape(1, 2, 2, 2)
        >>> pairwise_iou(maps, fraction=0.5).tolist()
        [[[1.0, 1.0], [1.0, 1.0]]]
    """
    _check_tensor("maps", maps)
    if maps.ndim != 4 or 0 in maps.shape[2:]:
        raise ValueError(f"`maps` must be [B, K, H, W] with H, W >= 1, got {_shown(maps)}")
    batch, concepts = maps.shape[:2]
    indices = torch.arange(concepts)
    flat = maps.flatten(2)  # [B, K, N]
    pairs = torch.cartesian_prod(indices, indices)
    result = ops.pairs_iou(flat, pairs, percentile_of(fraction))
    _check_finite(result.area < 0, flat)
    return result.iou.reshape(batch, concepts, concepts)


def block_iou(
    maps: AttributionMaps, first: str, second: str, *, fraction: float = 0.3
) -> dict[str, torch.Tensor]:
    """`iou` of two concepts on each UNet block's own map (BiasMap's block-wise analysis).

    Args:
        maps: Recorded with ``by="block"``.
        first: A concept of ``maps``.
        second: Another one.
        fraction: Fraction of the pixels in each mask, in (0, 1].

    Returns:
        Block name -> ``[B]``, in the UNet's order.

    Raises:
        KeyError: There is no such concept.
        ValueError: The maps were not recorded by block, or as `iou`.

    Example:
        >>> from biasmap_fast import AttributionMaps
        >>> a = torch.arange(8.0).reshape(1, 2, 2, 2)
        >>> parts = {"down_blocks.0": a, "up_blocks.1": a}
        >>> maps = AttributionMaps(2 * a, ("doctor", "gender"), by="block", parts=parts)
        >>> block_iou(maps, "doctor", "gender", fraction=0.5)
        {'down_blocks.0': tensor([1.]), 'up_blocks.1': tensor([1.])}
    """
    a, b = maps.index(first), maps.index(second)
    return {
        block: iou(values[:, a], values[:, b], fraction=fraction)
        for block, values in maps.by_block.items()
    }


def soft_iou(
    a: torch.Tensor, b: torch.Tensor, *, fraction: float = 0.3, temperature: float = 0.01
) -> torch.Tensor:
    """Differentiable IoU of two maps' soft top-k masks.

    ``SoftIoU = sum(ab) / (sum a + sum b - sum(ab))`` with the masks of `soft_topk` over each
    entire map. Unchanged when a map is shifted or scaled by a positive number.

    Args:
        a: First maps, as for `iou`.
        b: Second maps.
        fraction: Fraction of the pixels in a mask, in (0, 1).
        temperature: Width of the masks' edges in units of each map's range, at least 1e-6.

    Returns:
        ``[B]`` or a scalar, differentiable in both maps.

    Raises:
        ValueError: As `iou`, or ``temperature`` is out of range.

    Example:
        >>> a = torch.rand(3, 16, 16)
        >>> torch.allclose(soft_iou(a, a * 7 + 1), soft_iou(a, a), atol=1e-5)
        True
    """
    maps = _stack(a, b)
    check_soft(fraction, temperature)
    result = ops.soft_iou(maps, torch.tensor([[0, 1]]), fraction, temperature)
    _check_finite(result.isnan(), maps, ("a", "b"))
    return result.reshape(a.shape[:-2])


def soft_topk(
    x: torch.Tensor,
    *,
    fraction: float = 0.3,
    temperature: float = 0.01,
    dim: int | tuple[int, int] = -1,
) -> torch.Tensor:
    """The exact soft top-k mask: entropic transport of the values onto {0, 1}, solved not iterated.

    ``m = sigmoid((2 x - tau) / gamma)``, the one ``tau`` with ``mean(m) = fraction``, and ``gamma =
    temperature * (max x - min x)``. The gradient is implicit, the range a constant of it.

    Give ``dim=(-2, -1)`` for maps. With ``dim=-1`` every *row* of a map gets its own top-k, which
    is what the published code does, and not what its paper says.

    Args:
        x: ``[..., N]``, or ``[..., H, W]`` with ``dim=(-2, -1)``; dtypes as for `iou`, finite.
        fraction: Mean of the mask, in (0, 1).
        temperature: Width of the mask's edge in units of the range of x, at least 1e-6.
        dim: -1, or (-2, -1) for a map's last two dimensions together.

    Returns:
        Like ``x``, float32 (float64 for float64). If x is constant: ``fraction``, gradient 0.

    Raises:
        ValueError: Another ``dim``, no values along it, or as `soft_iou`.

    Example:
        >>> mask = soft_topk(torch.linspace(0, 1, 100).reshape(10, 10), dim=(-2, -1))
        >>> round(float(mask.mean()), 5), bool(mask[0, 0] < 1e-6), bool(mask[-1, -1] > 1 - 1e-6)
        (0.3, True, True)
    """
    _check_tensor("x", x)
    check_soft(fraction, temperature)
    dims = {-1: 1, (-1,): 1, (-2, -1): 2}.get(dim)
    if dims is None:
        raise ValueError(f"`dim` must be -1 or (-2, -1), got {dim!r}")
    if x.ndim < dims or 0 in x.shape[-dims:]:
        raise ValueError(f"`x` must have values along `dim` = {dim!r}, got {_shown(x)}")
    rows = x.reshape(-1, math.prod(x.shape[-dims:]))
    mask = ops.soft_topk(rows, fraction, temperature)
    _check_finite(mask[:, :1].isnan(), rows.unsqueeze(1), ("x",))
    return mask.reshape(x.shape)


def containment(
    a: torch.Tensor, b: torch.Tensor, *, fractions: tuple[float, float] = _FRACTIONS
) -> torch.Tensor:
    """The part of the first map's mask that lies inside the second map's: ``|A and B| / |A|``.

    Masks as for `iou`. Unrelated masks give ``fractions[1]``. Not symmetric: give the profession
    first. A constant first map has an empty mask and gives 0.

    Args:
        a: First maps, as for `iou`.
        b: Second maps.
        fractions: Fraction of the pixels in ``a``'s mask and in ``b``'s, each in (0, 1]. Take masks
            about as large as the regions that the concepts fill.

    Returns:
        ``[B]`` or a scalar; no gradient.

    Raises:
        ValueError: As `iou`, or not two fractions.

    Example:
        >>> a = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
        >>> b = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> float(containment(a, b, fractions=(0.5, 0.5)))
        1.0
        >>> float(containment(b, a, fractions=(0.5, 0.5)))
        0.5
    """
    maps = _stack(a, b).detach()
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # [B, 2, N]
    percentiles = [percentile_of(fraction) for fraction in two_values("fractions", fractions)]
    _check_finite(~maps.isfinite().all(), maps, ("a", "b"))
    first, second = (
        maps[:, side] > reference.percentile(maps[:, side], percentile)[:, None]
        for side, percentile in enumerate(percentiles)
    )  # [B, N]
    inside = (first & second).sum(-1).to(maps.dtype) / first.sum(-1).clamp(min=1)
    return inside.reshape(a.shape[:-2])


def soft_containment(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    fractions: tuple[float, float] = _FRACTIONS,
    temperature: float = 0.01,
) -> torch.Tensor:
    """Differentiable `containment` of two maps' soft top-k masks: ``sum(ab) / sum a``.

    Args:
        a: First maps, as for `iou`.
        b: Second maps.
        fractions: Fraction of the pixels in ``a``'s mask and in ``b``'s, each in (0, 1).
        temperature: Width of the masks' edges in units of each map's range, at least 1e-6.

    Returns:
        ``[B]`` or a scalar, differentiable in both maps.

    Raises:
        ValueError: As `containment`, or ``temperature`` is out of range.

    Example:
        >>> a = torch.rand(3, 16, 16)
        >>> bool((soft_containment(a, a) > 0.9).all())
        True
    """
    maps = _stack(a, b)  # [B, 2, N]
    for fraction in two_values("fractions", fractions):
        check_soft(fraction, temperature)
    inside = pairs_soft_containment(maps, torch.tensor([[0, 1]]), fractions, temperature)
    _check_finite(inside.isnan(), maps, ("a", "b"))
    return inside.reshape(a.shape[:-2])


def pairs_soft_containment(
    maps: torch.Tensor,
    pairs: torch.Tensor,
    fractions: tuple[float, float],
    temperature: float,
) -> torch.Tensor:
    """`soft_containment` ``[B, P]`` of pairs ``[P, 2]`` on maps ``[B, K, N]``, unchecked."""
    rows = maps.flatten(0, 1)
    first, second = (
        ops.soft_topk(rows, fraction, temperature).view(maps.shape)[:, pairs[:, side]]
        for side, fraction in enumerate(fractions)
    )  # [B, P, N]
    inside: torch.Tensor = (first * second).sum(-1) / first.sum(-1)
    return inside


def chance_iou(fraction: Number) -> Number:
    """IoU of two unrelated masks that each keep ``fraction`` of the pixels: ``p / (2 - p)``.

    The limit of many pixels; masks of few meet a little more (0.178 at 16 x 16 and p = 0.3).

    Args:
        fraction: In (0, 1); a float, numpy array or tensor.

    Returns:
        Like ``fraction``.

    Raises:
        ValueError: ``fraction`` is outside (0, 1).

    Example:
        >>> round(chance_iou(0.3), 4)
        0.1765
    """
    inside = (fraction > 0) & (fraction < 1)
    if not (inside if isinstance(inside, bool) else bool(inside.all())):
        raise ValueError(f"`fraction` must be in (0, 1), got {fraction}")
    level: Number = fraction / (2 - fraction)
    return level


def corrected(value: Number, chance: Number | float) -> Number:
    """An overlap on a scale where chance is 0 and complete overlap is 1.

    ``(value - chance) / (1 - chance)``; negative if two masks avoid each other.

    Args:
        value: IoU or containment; a float, numpy array or tensor.
        chance: Its chance level, below 1: `chance_iou` of the fraction for IoU, the second fraction
            for containment.

    Returns:
        Like ``value``.

    Raises:
        ValueError: ``chance`` is a number outside [0, 1).

    Example:
        >>> corrected(chance_iou(0.3), chance_iou(0.3)), corrected(1.0, 0.1)
        (0.0, 1.0)
    """
    if isinstance(chance, (int, float)) and not 0.0 <= chance < 1.0:
        raise ValueError(f"`chance` must be in [0, 1), got {chance}")
    scaled: Number = (value - chance) / (1 - chance)
    return scaled


def percentile_of(fraction: float) -> float:
    """The percentile above which the top ``fraction`` of the pixels lies.

    Rounded, so that 0.3 gives the 70.0 that numpy is asked for.

    Raises:
        ValueError: ``fraction`` is outside (0, 1].
    """
    percentile = round(100.0 * (1.0 - fraction), 10)
    if not 0.0 <= percentile < 100.0:
        raise ValueError(f"`fraction` must be in (0, 1], got {fraction}")
    return percentile


def two_values(name: str, values: tuple[float, float]) -> tuple[float, float]:
    """Refuses anything but two numbers, by a ValueError."""
    if isinstance(values, (int, float)) or len(values) != 2:
        raise ValueError(
            f"`{name}` must be two numbers, of the first map's mask and of the second's, "
            f"got {values!r}"
        )
    return values


def check_soft(fraction: float, temperature: float) -> None:
    """Refuses settings of a soft mask that are out of range, by a ValueError."""
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"`fraction` must be in (0, 1), got {fraction}")
    if not _MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"`temperature` must be at least {_MIN_TEMPERATURE} and finite, got {temperature}"
        )


def _shown(x: torch.Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def _check_tensor(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"`{name}` must be float16, bfloat16, float32 or float64, got {_shown(x)}")


def _stack(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two maps ``[B, H, W]`` or ``[H, W]`` as ``[B, 2, N]``."""
    for name, x in (("a", a), ("b", b)):
        _check_tensor(name, x)
        if x.ndim not in (2, 3) or 0 in x.shape[-2:]:
            raise ValueError(
                f"`{name}` must be [B, H, W] or [H, W] with H, W >= 1, got {_shown(x)}"
            )
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"`a` and `b` must be alike, got {_shown(a)} and {_shown(b)}")
    if a.device != b.device:
        raise ValueError(f"`a` and `b` must be on one device, got {a.device} and {b.device}")
    batch = a.shape[0] if a.ndim == 3 else 1
    return torch.stack((a, b), dim=-3).reshape(batch, 2, a.shape[-2] * a.shape[-1])


def _check_finite(
    suspect: torch.Tensor, maps: torch.Tensor, names: tuple[str, ...] | None = None
) -> None:
    """Refuses maps ``[B, K, N]`` with values that are not finite.

    The ops mark such maps in their results, so that good maps are not read a second time.
    """
    if torch.compiler.is_compiling() or not bool(suspect.any()):
        return
    counts = (~maps.isfinite()).sum(dim=-1)  # [B, K]
    if not bool(counts.any()):
        raise ValueError(f"a map's range is more than {maps.dtype} holds")
    index, concept = counts.nonzero()[0].tolist()
    name = names[concept] if names else "maps"
    where = f"batch index {index}" + ("" if names else f", concept {concept}")
    raise ValueError(
        f"`{name}` must be finite: {int(counts[index, concept])} of {maps.shape[-1]} values at "
        f"{where} are NaN or infinite"
    )
