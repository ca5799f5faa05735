"""Deals levels, shares, sizes, shapes and marker positions to the professions of a world."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import palette
from .config import SIZE, Marker, base_masks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .config import Geometry, WorldConfig

_TOLERANCE = 0.02  # of a level; one pixel of the smallest marker is 0.012
_MARGIN = 1  # pixels between a marker and the picture's edge, wherever the person stands
_FACE = 0.12  # largest part of a marker that may hide the face outside the region
_NEAR = (1.5, 3.5)  # gap in pixels of level-0 markers that are adjacent to the region
_FAR = 9.0  # and of those that are not


def place_markers(config: WorldConfig, geometry: Geometry) -> dict[str, Marker]:
    """Returns every profession's marker, in the order of `config.professions`.

    Professions are shuffled over the full factorial levels x shares. Sizes go to mirrored pairs
    of shares, alternating from level to level, which leaves them uncorrelated with both.

    Raises:
        ValueError: If no position in the picture gives some marker its level.
    """
    rng = np.random.default_rng([config.layout_seed, 3])
    nouns = [config.professions[i] for i in rng.permutation(len(config.professions))]
    shapes = [list(palette.SHAPES)[i] for i in rng.permutation(len(palette.SHAPES))]
    colours = palette.marker_colours(len(nouns), config.palette_seed)
    positions = _Positions(geometry)
    markers = {}
    columns = len(config.shares)
    # descending level: the fullest overlaps have the fewest places to choose from
    for index in range(len(nouns) - 1, -1, -1):
        row, column = divmod(index, columns)
        pair = min(column, columns - 1 - column)
        size = config.sizes[(pair + row) % 2]
        shape = shapes[index % len(shapes)]
        level = config.levels[row]
        near = column in (0, columns - 1) if row % 2 else column in (1, 2)
        pixels = positions.next(palette.shape_pixels(shape, size), level, near=near)
        if pixels is None:
            raise ValueError(
                f"`levels` must be reachable in geometry {config.geometry!r}, got {level} for a "
                f"{shape} of {size} pixels"
            )
        noun, share = nouns[index], config.shares[column]
        markers[noun] = Marker(noun, level, share, size, shape, colours[index], pixels)
    return {noun: markers[noun] for noun in config.professions}


class _Positions:
    """Positions with a wanted overlap, each as far as possible from the earlier ones."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        masks = base_masks(geometry, 0, 0)
        self.region = masks.demographic | masks.inner  # the eyes' few pixels included
        self.face = masks.head & ~self.region
        y, x = np.mgrid[0:SIZE, 0:SIZE]
        inside = np.argwhere(self.region)  # [M, 2]
        self.distance = np.sqrt(
            ((np.stack([y, x], -1)[:, :, None] - inside) ** 2).sum(-1).min(-1)
        )  # [64, 64]
        self.used: list[NDArray[np.int64]] = []

    def next(
        self, shape: NDArray[np.int64], level: float, *, near: bool
    ) -> NDArray[np.int64] | None:
        reach = np.array(self.geometry.jitter[::-1]) + _MARGIN
        lowest = reach - shape.min(0)
        highest = SIZE - 1 - reach - shape.max(0)
        grid = np.mgrid[lowest[0] : highest[0] + 1, lowest[1] : highest[1] + 1]
        centres = grid.reshape(2, -1).T  # [N, 2]
        rows, columns = (centres[:, None] + shape).transpose(2, 0, 1)  # [N, size] each
        overlap = self.region[rows, columns].mean(1)
        gap = self.distance[rows, columns].min(1)
        allowed = (np.abs(overlap - level) <= _TOLERANCE) & (
            self.face[rows, columns].mean(1) <= _FACE
        )
        if level == 0.0:
            allowed &= (gap >= _NEAR[0]) & (gap <= _NEAR[1]) if near else gap >= _FAR
        if not allowed.any():
            return None
        centres = centres[allowed]
        centre = np.array([self.geometry.head_y, SIZE // 2])
        used = np.array(self.used or [centre])  # [K, 2]
        away = np.linalg.norm(centres[:, None] - used, axis=-1).min(1)
        best = centres[int(away.argmax())]
        self.used.append(best)
        return np.asarray(best + shape - centre, np.int64)
