"""Overlap of attribution maps: IoU and containment, hard and soft, and what chance alone gives.

IoU asks whether two masks are the same; containment, ``|A and B| / |A|``, whether the first lies on
the second ("resemblance" and "containment": Broder, SEQUENCES 1997). IoU and its soft form are
BiasMap's (arXiv 2509.13496). Of the measures tried against a planted truth (docs/validity.md),
containment recovered it best. Chance levels and corrections are this package's own.
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
# of the profession's mask and of the demographic's: what the validity study chose
_PERCENTILES = (95.0, 90.0)


def iou(a: torch.Tensor, b: torch.Tensor, *, percentile: float = 70.0) -> torch.Tensor:
    """Hard IoU of two maps: each mask is what lies strictly above the map's own percentile.

    ``mask = map > percentile(map)``, ``IoU = |A and B| / |A or B|``. The percentile interpolates
    linearly between order statistics and equals ``numpy.percentile`` to the last bit. A constant
    map has an empty mask; two of them have IoU 0 (`iou_with_flags` tells such zeros apart).

    Args:
        a: ``[B, H, W]`` or ``[H, W]``, float16, bfloat16, float32 or float64, finite.
        b: like ``a``.
        percentile: in [0, 100); 70 keeps the top 30 %.

    Returns:
        ``[B]`` (or a scalar), float32; float64 for float64 maps. Carries no gradient.

    Raises:
        TypeError: not tensors of floats.
        ValueError: shapes, dtypes or devices differ, a map has no pixels or a value is not finite,
            or ``percentile`` is out of range.

    Example:
        >>> a = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> float(iou(a, a.flip(1), percentile=50))
        1.0
        >>> float(iou(a, a.flip(0), percentile=50))
        0.0
    """
    return iou_with_flags(a, b, percentile=percentile)[0]


def pairwise_iou(maps: torch.Tensor, *, percentile: float = 70.0) -> torch.Tensor:
    """Hard IoU of every pair of concepts, see `iou`.

    Args:
        maps: ``[B, K, H, W]``, float16, bfloat16, float32 or float64, finite.
        percentile: in [0, 100).

    Returns:
        ``[B, K, K]``, symmetric; 1 on the diagonal, or 0 where that map's mask is empty.

    Raises:
        TypeError: not a tensor of floats.
        ValueError: wrong shape, a value that is not finite, or ``percentile`` out of range.

    Example:
        >>> maps = torch.arange(8.0).reshape(1, 2, 2, 2)
        >>> pairwise_iou(maps, percentile=50).tolist()
        [[[1.0, 1.0], [1.0, 1.0]]]
    """
    _check_maps(maps)
    _check_percentile(percentile)
    batch, concepts = maps.shape[:2]
    every = torch.arange(concepts)
    flat = maps.flatten(2)  # [B, K, N]
    found = ops.pairs_iou(flat, torch.cartesian_prod(every, every), percentile)
    _check_finite(found.area < 0, flat)
    return found.iou.reshape(batch, concepts, concepts)


def block_iou(
    maps: AttributionMaps, first: str, second: str, *, percentile: float = 70.0
) -> dict[str, torch.Tensor]:
    """`iou` of two concepts on each UNet block's own map (BiasMap's block-wise analysis).

    Args:
        maps: recorded with ``by="block"``.
        first: a concept of them.
        second: another.
        percentile: in [0, 100).

    Returns:
        Block name -> ``[B]``, in the UNet's order.

    Raises:
        KeyError: there is no such concept.
        ValueError: the maps were not recorded by block, or as `iou`.

    Example:
        >>> from biasmap_fast import AttributionMaps
        >>> a = torch.arange(8.0).reshape(1, 2, 2, 2)
        >>> parts = {"down_blocks.0": a, "up_blocks.1": a}
        >>> maps = AttributionMaps(2 * a, ("doctor", "gender"), by="block", parts=parts)
        >>> block_iou(maps, "doctor", "gender", percentile=50)
        {'down_blocks.0': tensor([1.]), 'up_blocks.1': tensor([1.])}
    """
    rows = [maps.index(first), maps.index(second)]
    return {
        block: iou(values[:, rows[0]], values[:, rows[1]], percentile=percentile)
        for block, values in maps.by_block.items()
    }


def iou_with_flags(
    a: torch.Tensor, b: torch.Tensor, *, percentile: float = 70.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`iou`, and where it says nothing because both masks are empty.

    Args:
        a: ``[B, H, W]`` or ``[H, W]``, float16, bfloat16, float32 or float64, finite.
        b: like ``a``.
        percentile: in [0, 100).

    Returns:
        IoU ``[B]`` and bool ``[B]`` (or scalars): True where the union is empty and the IoU 0.

    Raises:
        TypeError: as `iou`.
        ValueError: as `iou`.

    Example:
        >>> value, empty = iou_with_flags(torch.ones(4, 4), torch.ones(4, 4))
        >>> float(value), bool(empty)
        (0.0, True)
    """
    found, empty = iou_of_pairs(_stack(a, b), percentile=percentile)
    return found.reshape(a.shape[:-2]), empty.reshape(a.shape[:-2])


def iou_of_pairs(
    maps: torch.Tensor, *, percentile: float = 70.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`iou_with_flags` of pairs that lie side by side, ``[B, 2, N]``; both returned ``[B]``."""
    _check_percentile(percentile)
    found = ops.pairs_iou(maps, torch.tensor([[0, 1]]), percentile)
    _check_finite(found.area < 0, maps, ("a", "b"))
    return found.iou[:, 0], found.union[:, 0] == 0


def soft_iou(
    a: torch.Tensor, b: torch.Tensor, *, fraction: float = 0.3, temperature: float = 0.01
) -> torch.Tensor:
    """Differentiable IoU of two maps' soft top-k masks.

    ``SoftIoU = sum(ab) / (sum a + sum b - sum(ab))`` with the masks of `soft_topk` over each whole
    map. Unchanged when a map is shifted or scaled by a positive number.

    Args:
        a: ``[B, H, W]`` or ``[H, W]``, float16, bfloat16, float32 or float64, finite.
        b: like ``a``.
        fraction: share of the pixels in a mask, in (0, 1).
        temperature: width of the masks' edges in units of each map's range, at least 1e-6.

    Returns:
        ``[B]`` (or a scalar), float32; float64 for float64 maps. Differentiable in both maps.

    Raises:
        TypeError: not tensors of floats.
        ValueError: shapes, dtypes or devices differ, a map has no pixels or a value is not finite,
            or a setting is out of range.

    Example:
        >>> a = torch.rand(3, 16, 16)
        >>> torch.allclose(soft_iou(a, a * 7 + 1), soft_iou(a, a), atol=1e-5)
        True
    """
    maps = _stack(a, b)
    check_soft(fraction, temperature)
    found = ops.soft_iou(maps, torch.tensor([[0, 1]]), fraction, temperature)
    _check_finite(found.isnan(), maps, ("a", "b"))
    return found.reshape(a.shape[:-2])


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
        x: ``[..., N]``, or ``[..., H, W]`` with ``dim=(-2, -1)``; float16, bfloat16, float32 or
            float64, finite.
        fraction: mean of the mask, in (0, 1).
        temperature: width of the mask's edge in units of the range of x, at least 1e-6.
        dim: -1, or (-2, -1) for a map's last two dimensions together.

    Returns:
        Like ``x``, float32 (float64 for float64). Where x is constant: ``fraction``, gradient 0.

    Raises:
        TypeError: not a tensor of floats.
        ValueError: another ``dim``, no values along it, a value that is not finite, or a setting
            out of range.

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
    a: torch.Tensor, b: torch.Tensor, *, percentiles: tuple[float, float] = _PERCENTILES
) -> torch.Tensor:
    """The part of the first map's mask that lies inside the second map's: ``|A and B| / |A|``.

    Each mask is what lies strictly above its map's own percentile, as for `iou`. Unrelated masks
    give ``1 - percentiles[1] / 100``, see `chance_containment`. Not symmetric: give the profession
    first. A constant first map has an empty mask and gives 0.

    Args:
        a: ``[B, H, W]`` or ``[H, W]``, float16, bfloat16, float32 or float64, finite.
        b: like ``a``.
        percentiles: of ``a``'s mask and of ``b``'s, each in [0, 100). Take masks about as large as
            the regions that the concepts fill.

    Returns:
        ``[B]`` (or a scalar), float32; float64 for float64 maps. Carries no gradient.

    Raises:
        TypeError: not tensors of floats.
        ValueError: shapes, dtypes or devices differ, a map has no pixels or a value is not finite,
            or a percentile is out of range.

    Example:
        >>> a = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
        >>> b = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> float(containment(a, b, percentiles=(50, 50)))
        1.0
        >>> float(containment(b, a, percentiles=(50, 50)))
        0.5
    """
    return containment_with_flags(a, b, percentiles=percentiles)[0]


def containment_with_flags(
    a: torch.Tensor, b: torch.Tensor, *, percentiles: tuple[float, float] = _PERCENTILES
) -> tuple[torch.Tensor, torch.Tensor]:
    """`containment`, and where it says nothing because the first mask is empty.

    Args:
        a: as for `containment`.
        b: as for `containment`.
        percentiles: as for `containment`.

    Returns:
        Containment ``[B]`` and bool ``[B]`` (or scalars): True where the first mask is empty.

    Raises:
        TypeError: as `containment`.
        ValueError: as `containment`.

    Example:
        >>> value, empty = containment_with_flags(torch.ones(4, 4), torch.rand(4, 4))
        >>> float(value), bool(empty)
        (0.0, True)
    """
    maps = _stack(a, b).detach()
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # [B, 2, N]
    for percentile in two_values("percentiles", percentiles):
        _check_percentile(percentile)
    _check_finite(~maps.isfinite().all(), maps, ("a", "b"))
    first, second = (
        maps[:, side] > reference.percentile(maps[:, side], percentile)[:, None]
        for side, percentile in enumerate(percentiles)
    )  # [B, N]
    area = first.sum(-1)
    inside = (first & second).sum(-1).to(maps.dtype) / area.clamp(min=1)
    return inside.reshape(a.shape[:-2]), (area == 0).reshape(a.shape[:-2])


def soft_containment(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    fractions: tuple[float, float] = (0.05, 0.1),
    temperature: float = 0.01,
) -> torch.Tensor:
    """Differentiable `containment` of two maps' soft top-k masks: ``sum(ab) / sum a``.

    The masks are those of `soft_topk` over each whole map.

    Args:
        a: ``[B, H, W]`` or ``[H, W]``, float16, bfloat16, float32 or float64, finite.
        b: like ``a``.
        fractions: share of the pixels in ``a``'s mask and in ``b``'s, each in (0, 1).
        temperature: width of the masks' edges in units of each map's range, at least 1e-6.

    Returns:
        ``[B]`` (or a scalar), float32; float64 for float64 maps. Differentiable in both maps.

    Raises:
        TypeError: not tensors of floats.
        ValueError: shapes, dtypes or devices differ, a map has no pixels or a value is not finite,
            or a setting is out of range.

    Example:
        >>> a = torch.rand(3, 16, 16)
        >>> bool((soft_containment(a, a) > 0.9).all())
        True
    """
    maps = _stack(a, b)  # [B, 2, N]
    for fraction in two_values("fractions", fractions):
        check_soft(fraction, temperature)
    found = pairs_soft_containment(maps, torch.tensor([[0, 1]]), fractions, temperature)
    _check_finite(found.isnan(), maps, ("a", "b"))
    return found.reshape(a.shape[:-2])


def pairs_soft_containment(
    maps: torch.Tensor,
    pairs: torch.Tensor,
    fractions: tuple[float, float],
    temperature: float,
) -> torch.Tensor:
    """`soft_containment` ``[B, P]`` of pairs ``[P, 2]`` on maps ``[B, K, N]``; checks nothing."""
    batch, concepts, pixels = maps.shape
    rows = maps.reshape(batch * concepts, pixels)
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
        fraction: in (0, 1); a float, numpy array or tensor. A percentile q keeps (100 - q) / 100.

    Returns:
        Like ``fraction``.

    Raises:
        ValueError: ``fraction`` outside (0, 1).

    Example:
        >>> round(chance_iou(0.3), 4)
        0.1765
    """
    inside = (fraction > 0) & (fraction < 1)
    if not (inside if isinstance(inside, bool) else bool(inside.all())):
        raise ValueError(f"`fraction` must be in (0, 1), got {fraction}")
    level: Number = fraction / (2 - fraction)
    return level


def corrected_iou(iou: Number, *, fraction: float) -> Number:
    """IoU on a scale where chance is 0 and identity is 1: ``(IoU - IoU0) / (1 - IoU0)``.

    Negative where two masks avoid one another.

    Args:
        iou: a float, numpy array or tensor.
        fraction: share of the pixels in each mask, in (0, 1).

    Returns:
        Like ``iou``.

    Raises:
        ValueError: ``fraction`` outside (0, 1).

    Example:
        >>> round(corrected_iou(0.1765, fraction=0.3), 3), corrected_iou(1.0, fraction=0.3)
        (0.0, 1.0)
    """
    chance = chance_iou(fraction)
    return (iou - chance) / (1 - chance)


def chance_containment(percentiles: tuple[float, float] = _PERCENTILES) -> float:
    """Containment of a mask in an unrelated one: the second's share of the pixels.

    Args:
        percentiles: as for `containment`.

    Returns:
        In (0, 1].

    Raises:
        ValueError: a percentile is out of range.

    Example:
        >>> round(chance_containment(), 3)
        0.1
    """
    for percentile in two_values("percentiles", percentiles):
        _check_percentile(percentile)
    return 1.0 - percentiles[1] / 100.0


def corrected_containment(
    value: Number, *, percentiles: tuple[float, float] = _PERCENTILES
) -> Number:
    """Containment on a scale where chance is 0 and "all of it inside" is 1.

    Args:
        value: a float, numpy array or tensor.
        percentiles: as for `containment`.

    Returns:
        Like ``value``; negative where a mask avoids the other.

    Raises:
        ValueError: a percentile is out of range.

    Example:
        >>> round(corrected_containment(0.1), 3), corrected_containment(1.0)
        (0.0, 1.0)
    """
    chance = chance_containment(percentiles)
    return (value - chance) / (1 - chance)


def _shown(x: torch.Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def _check_tensor(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"`{name}` must be float16, bfloat16, float32 or float64, got {_shown(x)}")


def _check_maps(maps: torch.Tensor) -> None:
    _check_tensor("maps", maps)
    if maps.ndim != 4 or 0 in maps.shape[2:]:
        raise ValueError(f"`maps` must be [B, K, H, W] with H, W >= 1, got {_shown(maps)}")


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


def _check_percentile(percentile: float) -> None:
    if not 0.0 <= percentile < 100.0:
        raise ValueError(f"`percentile` must be in [0, 100), got {percentile}")


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
    where = f"batch index {index}" if names else f"batch index {index}, concept {concept}"
    raise ValueError(
        f"`{name}` must be finite: {int(counts[index, concept])} of {maps.shape[-1]} values at "
        f"{where} are NaN or infinite"
    )
