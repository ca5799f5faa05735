"""Colours and marker shapes of the procedural world (see `world`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Gauge = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]

# Everything that is not a marker is desaturated, so that a saturated colour can only be a marker.
BACKGROUNDS = ((190, 196, 204), (204, 196, 186), (172, 184, 176))
SKINS = ((238, 200, 176), (208, 158, 126), (164, 118, 94))
HAIRS = ((24, 22, 28), (66, 44, 32), (106, 72, 48))
COATS = ((84, 100, 130), (100, 122, 92), (126, 104, 128))
COAT_WORDS = ("blue", "green", "purple")
EYE = HAIRS[0]

_BASE = (*BACKGROUNDS, *SKINS, *HAIRS, *COATS)
_MIN_FROM_BASE = 70.0  # distance below which a blurred marker could pass for coat or skin
_MIN_BETWEEN = 45.0
_LAB_SCALE = 2.2  # puts CIELAB distances on the scale of RGB ones


def marker_colours(count: int, seed: int) -> tuple[tuple[int, int, int], ...]:
    """Chooses saturated colours that are far from each other and from everything else.

    Farthest-point selection by the smaller of the distance in RGB, the metric of the classifier
    and of the autoencoder's loss, and the one in CIELAB, which keeps them apart for the eye too.
    The seed chooses the hue offset of the candidates and the order of the RGB triples.

    Raises:
        ValueError: If there is no room for that many colours.
    """
    rng = np.random.default_rng([seed, 11])
    offset = rng.uniform(0.0, 1.0 / 36)
    grid = [
        _hsv(hue / 36 + offset, saturation, value)
        for hue in range(36)
        for saturation in (0.65, 0.82, 1.0)
        for value in (0.58, 0.78, 1.0)
    ]
    candidates = np.array(grid, np.float64)  # [N, 3]
    from_base = _distance(candidates[:, None], np.array(_BASE, np.float64)).min(1)
    candidates = candidates[from_base >= _MIN_FROM_BASE]
    chosen = [int(rng.integers(len(candidates)))]
    nearest = _distance(candidates, candidates[chosen[0]])
    while len(chosen) < count and nearest.max() > _MIN_BETWEEN:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _distance(candidates, candidates[chosen[-1]]))
    if len(chosen) < count:
        raise ValueError(
            f"`count` must be at most {len(chosen)} separable marker colours, got {count}"
        )
    order = rng.permutation(chosen)
    return tuple((int(r), int(g), int(b)) for r, g, b in np.rint(candidates[order]))


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    rgb = np.linalg.norm(a - b, axis=-1)
    lab = np.linalg.norm(_lab(a) - _lab(b), axis=-1)
    return np.asarray(np.minimum(rgb, _LAB_SCALE * lab), np.float64)


def _lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Converts sRGB in 0..255 to CIELAB (D65), over the last axis."""
    scaled = rgb / 255.0
    linear = np.where(scaled > 0.04045, ((scaled + 0.055) / 1.055) ** 2.4, scaled / 12.92)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _hsv(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    sector = (np.array([5.0, 3.0, 1.0]) + hue * 6.0) % 6.0
    chroma = np.clip(np.minimum(sector, 4.0 - sector), 0.0, 1.0)
    r, g, b = 255.0 * value * (1.0 - saturation * chroma)
    return float(r), float(g), float(b)


def _box(x0: float, x1: float, y0: float, y1: float) -> Gauge:
    """Gauge of a rectangle around the origin: at most 1 inside it."""
    return lambda x, y: np.maximum(np.maximum(x / x1, x / x0), np.maximum(y / y1, y / y0))


def _union(*parts: Gauge) -> Gauge:
    return lambda x, y: np.minimum.reduce([part(x, y) for part in parts])


def _polygon(sides: int, turn: float) -> Gauge:
    """Gauge of a regular polygon; `turn` is the direction of one side's normal, in turns."""
    angles = 2.0 * np.pi * (np.arange(sides) / sides + turn)
    return lambda x, y: np.maximum.reduce([x * np.cos(a) + y * np.sin(a) for a in angles])


def _petals(count: int, depth: float, turn: float) -> Gauge:
    def gauge(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        angle = np.arctan2(y, x) - 2.0 * np.pi * turn
        return np.hypot(x, y) / (1.0 + depth * np.cos(count * angle))

    return gauge


# A shape is the set of the `size` pixels with the smallest gauge, so that its area is exact.
# All are compact: thin strips are what the autoencoder of an earlier trial lost.
SHAPES: dict[str, Gauge] = {
    "disc": np.hypot,
    "square": _box(-1, 1, -1, 1),
    "diamond": _polygon(4, 0.125),
    "plus": _union(_box(-1, 1, -0.4, 0.4), _box(-0.4, 0.4, -1, 1)),
    "saltire": _petals(4, 0.45, 0.125),
    "triangle up": _polygon(3, 0.25),
    "triangle down": _polygon(3, 0.75),
    "triangle left": _polygon(3, 0.0),
    "triangle right": _polygon(3, 0.5),
    "wide": _box(-1.4, 1.4, -0.7, 0.7),
    "tall": _box(-0.7, 0.7, -1.4, 1.4),
    "star": _petals(5, 0.3, -0.05),
    "trefoil": _petals(3, 0.4, 0.25),
    "tee": _union(_box(-1, 1, -0.35, 0.35), _box(-0.4, 0.4, -0.35, 1.3)),
    "ell": _union(_box(-0.4, 1.2, -0.4, 0.4), _box(-0.4, 0.4, -1.2, 0.4)),
    "tee inverted": _union(_box(-1, 1, -0.35, 0.35), _box(-0.4, 0.4, -1.3, 0.35)),
    "dome": lambda x, y: np.maximum(np.hypot(x, y), y / 0.3),
    "bowl": lambda x, y: np.maximum(np.hypot(x, y), -y / 0.3),
    "hexagon": _polygon(6, 0.0),
    "heart": lambda x, y: np.maximum(
        np.hypot(np.abs(x) - 0.5, y + 0.3) / 0.72, (np.abs(x) + y * 0.9) / 1.15
    ),
}


def shape_pixels(name: str, size: int) -> NDArray[np.int64]:
    """Returns the `size` pixels of a shape: [size, 2] int64, (y, x) offsets from its centre."""
    reach = int(np.ceil(1.2 * np.sqrt(size)))
    offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T  # [N, 2]
    gauge = SHAPES[name](offsets[:, 1].astype(np.float64), offsets[:, 0].astype(np.float64))
    order = np.lexsort((np.abs(offsets).sum(1), gauge.round(9)))[:size]
    pixels = offsets[order]
    return np.asarray(pixels - np.rint(pixels.mean(0)).astype(np.int64), np.int64)
