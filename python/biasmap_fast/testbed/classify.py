"""Reads pictures of the procedural world: profession, demographic, regions, plausibility.

Nothing is trained: every pixel gets the label of the nearest palette colour, and the labels are
compared with those of every picture that the world can draw (position x word x profession).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import palette
from .config import SIZE, Person, base_masks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .config import Mask
    from .world import World

PLAUSIBLE = 0.5
"""A picture below this plausibility is not of this world; its profession is reported as None."""

_UNKNOWN = 4  # labels: background, skin, hair, coat, unknown, then one per marker colour
_PARTS = 4
_MOST_COLOURS = 64
_FAR = 75.0  # RGB distance from which a colour is none of the palette's
_MARKER_SEEN = 0.4  # part of the marker's pixels that must have its colour
_SHIFT = 2  # pixels by which a generated marker may be displaced


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows.

    Attributes:
        profession: The profession whose marker was found, or None (no marker, or implausible).
        demographic: The demographic word that fits better, even if the picture is noise: look at
            `plausibility` first.
        plausibility: Agreement with the best picture that the world can draw, in [0, 1]: the mean
            over background, skin, hair, coat and marker of the IoU of drawn and expected
            pixels. Renders score 1, noise and blank pictures below `PLAUSIBLE`.
        regions: "marker" and "demographic", each [64, 64] bool, amodal; "marker" is empty without
            a profession.
    """

    profession: str | None
    demographic: str
    plausibility: float
    regions: dict[str, Mask] = field(repr=False)

    @property
    def overlap(self) -> float:
        """The part of the marker that lies on the demographic region; nan without a marker."""
        marker = self.regions["marker"]
        return float(self.regions["demographic"][marker].mean()) if marker.any() else float("nan")


class Classifier:
    """Compares pictures of a world with every picture that the world can draw.

    Raises:
        ValueError: If the world has more than 64 colours.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.nouns = list(world.markers)
        self._kinds = _UNKNOWN + 1 + len(self.nouns)
        colours: list[tuple[tuple[int, int, int], int]] = []
        parts = (palette.BACKGROUNDS, palette.SKINS, palette.HAIRS, palette.COATS)
        for label, part in enumerate(parts):
            colours += [(colour, label) for colour in part]
        for index, noun in enumerate(self.nouns):
            colours.append((world.markers[noun].colour, _UNKNOWN + 1 + index))
        if len(colours) > _MOST_COLOURS:
            raise ValueError(
                f"a world may have {_MOST_COLOURS} colours at most for its classifier, got "
                f"{len(colours)}"
            )
        self._colours = torch.tensor([c for c, _ in colours], dtype=torch.float32)  # [C, 3]
        self._labels = torch.tensor([label for _, label in colours], dtype=torch.uint8)  # [C]
        plain = [
            world.render(Person(None, word, *at)) for at in world.positions for word in world.words
        ]
        shape = (len(world.positions), len(world.words), SIZE * SIZE)
        self._templates = self.label(np.stack(plain)).reshape(shape)  # [P, 2, 4096] uint8
        self._markers = np.zeros((len(world.positions), len(self.nouns), SIZE, SIZE), np.bool_)
        for p, at in enumerate(world.positions):
            for k, noun in enumerate(self.nouns):
                self._markers[p, k][world.marker_pixels(noun, *at)] = True
        self._marker_bits = _bits(self._markers.reshape(*self._markers.shape[:2], -1))  # [P, K, 64]
        self._demographic = [base_masks(world.geometry, *at).demographic for at in world.positions]

    def label(self, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Labels every pixel of [N, 64, 64, 3] uint8 by its nearest palette colour.

        Returns:
            [N, 64 * 64] uint8: 0 background, 1 skin, 2 hair, 3 coat, 4 unknown, 5 + k marker k.
        """
        flat = torch.from_numpy(np.ascontiguousarray(pictures)).view(-1, 3).float()
        # Most * (|pixel - colour|^2 - |pixel|^2) + number of the colour: one minimum finds both,
        # and in whole numbers below 2^24 it is exact
        number = torch.arange(float(len(self._colours)))
        apart = (_MOST_COLOURS * self._colours.square().sum(1) + number)[:, None]
        distance = torch.addmm(apart, self._colours, flat.T, alpha=-2.0 * _MOST_COLOURS)
        nearest = distance.amin(0)  # [N * 4096]
        index = nearest.remainder(_MOST_COLOURS)
        labels = self._labels[index.long()]
        square = (nearest - index) / _MOST_COLOURS + flat.square().sum(1)
        labels[square > _FAR**2] = _UNKNOWN
        return labels.view(len(pictures), -1).numpy()

    def __call__(self, images: Any) -> list[Reading]:
        """Returns one `Reading` per picture, in any form that `as_pictures` accepts."""
        pictures = as_pictures(images)
        return [
            self._read(labels)
            # in parts: the distances take half a megabyte per picture
            for first in range(0, len(pictures), 64)
            for labels in self.label(pictures[first : first + 64])
        ]

    def _read(self, labels: NDArray[np.uint8]) -> Reading:
        # agreement with (position, word, profession) = with the person without a marker,
        # less what the marker hides of it, plus what has the marker's colour
        equal = _bits(self._templates == labels)  # [P, 2, 64]
        drawn = labels == np.arange(_UNKNOWN + 1, self._kinds)[:, None]  # [K, 4096]
        drawn_bits = _bits(drawn)  # [K, 64]
        least = _MARKER_SEEN * _count(self._marker_bits[0])  # [K]
        plain = _count(equal)  # [P, 2]
        score = np.full((*plain.shape, 1 + len(self.nouns)), -1)  # [P, 2, 1 + K]
        score[..., 0] = plain
        # a marker cannot show where there is too little of its colour: two or three may
        for k in np.nonzero(_count(drawn_bits) >= least)[0]:
            marker = self._marker_bits[:, k]  # [P, 64]
            shown = _count(marker & drawn_bits[k])  # [P]
            fits = plain - _count(equal & marker[:, None]) + shown[:, None]  # [P, 2]
            score[..., 1 + k] = np.where(shown[:, None] >= least[k], fits, -1)
        place, word, choice = np.unravel_index(score.argmax(), score.shape)
        return self._report(labels, int(place), int(word), int(choice) - 1, drawn)

    def _report(
        self,
        labels: NDArray[np.uint8],
        place: int,
        word: int,
        noun: int,
        drawn: NDArray[np.bool_],
    ) -> Reading:
        marker = np.zeros((SIZE, SIZE), np.bool_)
        if noun >= 0:
            marker = self._find_marker(self._markers[place, noun], drawn[noun].reshape(SIZE, SIZE))
        expected = self._templates[place, word].copy()
        expected[marker.ravel()] = _UNKNOWN + 1 + noun
        both, have, want = (
            np.bincount(values, minlength=self._kinds)
            for values in (labels[labels == expected], labels, expected)
        )
        either = have + want - both
        parts = [*range(_PARTS), *([_UNKNOWN + 1 + noun] if noun >= 0 else [])]
        agreement = both[parts] / np.maximum(either[parts], 1)
        plausibility = float(np.mean(agreement))
        if plausibility < PLAUSIBLE:
            noun, marker = -1, np.zeros_like(marker)
        return Reading(
            profession=self.nouns[noun] if noun >= 0 else None,
            demographic=self.world.words[word],
            plausibility=plausibility,
            regions={"marker": marker, "demographic": self._demographic[place].copy()},
        )

    @staticmethod
    def _find_marker(expected: Mask, drawn: Mask) -> Mask:
        """Moves the expected marker by a pixel or two to where its colour is."""
        rows, columns = np.nonzero(expected)
        shifts = np.mgrid[-_SHIFT : _SHIFT + 1, -_SHIFT : _SHIFT + 1].reshape(2, -1, 1)
        framed = np.pad(drawn, _SHIFT)
        hits = framed[rows + shifts[0] + _SHIFT, columns + shifts[1] + _SHIFT].sum(axis=1)
        best = int(hits.argmax())
        if hits[best] <= hits[len(hits) // 2]:  # no displacement, in the middle
            return expected
        moved = np.zeros_like(framed)
        moved[rows + shifts[0, best] + _SHIFT, columns + shifts[1, best] + _SHIFT] = True
        return moved[_SHIFT:-_SHIFT, _SHIFT:-_SHIFT]


def _bits(masks: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """`[..., 64 * n]` bool as `[..., n]` uint64."""
    return np.packbits(masks, axis=-1).view(np.uint64)


def _count(bits: NDArray[np.uint64]) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = np.bitwise_count(bits).sum(axis=-1, dtype=np.int64)
    return counts


def as_pictures(images: Any) -> NDArray[np.uint8]:
    """Converts images to [N, 64, 64, 3] uint8.

    Args:
        images: One or several 64 x 64 PIL images; a uint8 array or tensor [N, 64, 64, 3] or
            [64, 64, 3]; a float tensor [N, 3, 64, 64] or float array [N, 64, 64, 3] in 0..1, as
            pipelines return for "pt" and "np".

    Raises:
        ValueError: If the images have another form.
    """
    if isinstance(images, torch.Tensor):
        tensor = images.detach().cpu()
        if tensor.is_floating_point() and tensor.ndim >= 3 and tensor.shape[-3] == 3:
            tensor = tensor.movedim(-3, -1)
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    elif isinstance(images, Sequence) and not isinstance(images, str | bytes):
        empty = np.zeros((0, SIZE, SIZE, 3), np.uint8)
        return np.concatenate([empty, *map(as_pictures, images)])
    elif hasattr(images, "convert"):
        array = np.asarray(images.convert("RGB"))
    elif isinstance(images, np.ndarray):
        array = images
    else:
        raise ValueError(
            "`images` must be PIL images, a uint8 or float array or a tensor, "
            f"got {type(images).__name__}"
        )
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(
            f"`images` must be [N, {SIZE}, {SIZE}, 3] (float tensors [N, 3, {SIZE}, {SIZE}]), "
            f"got {list(array.shape)}"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < -0.01 or array.max() > 1.01:
            raise ValueError(
                "float `images` must be finite and in 0..1, got values from "
                f"{array.min():.3g} to {array.max():.3g}"
            )
        array = np.rint(array.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"`images` must be uint8 or floating point, got {array.dtype}")
    return array
