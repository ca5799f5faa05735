"""The planted table, as configured and as measured on renders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .config import SIZE, Person

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .world import World


@dataclass(frozen=True, slots=True)
class TruthRow:
    """What was planted for one profession.

    Attributes:
        profession: The word.
        shares: P(word | profession) for either demographic word.
        level: Overlap as configured: part of the marker that lies on the demographic region.
        overlap: The same as measured on renders, per demographic word drawn, averaged over
            every place a person can stand.
        marker_fraction: The marker's area as a fraction of the picture.
        region_fraction: The demographic region's area as a fraction of the picture.
        gap: Distance in pixels from the marker to the region; 0 where they overlap.
        colour: The marker's colour, "#rrggbb".
        shape: The marker's shape.
    """

    profession: str
    shares: dict[str, float]
    level: float
    overlap: dict[str, float]
    marker_fraction: float
    region_fraction: float
    gap: float
    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Truth:
    """The planted table: one `TruthRow` a profession, indexed by profession."""

    rows: tuple[TruthRow, ...]
    words: tuple[str, str]

    def __iter__(self) -> Iterator[TruthRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, profession: str) -> TruthRow:
        for row in self.rows:
            if row.profession == profession:
                return row
        raise KeyError(f"{profession!r} is not one of {[row.profession for row in self.rows]}")

    def table(self) -> str:
        """Returns the table as text, ordered by level and share."""
        first, second = self.words
        head = (
            f"{'profession':<12} {'P(' + second + ')':>8} {'level':>6} "
            f"{'overlap ' + first + '/' + second:>18} {'marker':>7} {'gap':>5}  colour   shape"
        )
        lines = [
            f"{r.profession:<12} {r.shares[second]:>8.2f} {r.level:>6.2f} "
            f"{r.overlap[first]:>9.3f} / {r.overlap[second]:.3f}  {r.marker_fraction:>6.2%} "
            f"{r.gap:>5.1f}  {r.colour}  {r.shape}"
            for r in sorted(self.rows, key=lambda r: (r.level, r.shares[second]))
        ]
        return "\n".join([head, *lines])


def measure_truth(world: World) -> Truth:
    """Measures the planted table on renders: the region is where man and woman differ."""
    reach_x, reach_y = world.geometry.jitter
    places = [
        (dx, dy) for dx in range(-reach_x, reach_x + 1) for dy in range(-reach_y, reach_y + 1)
    ]
    differ = {
        place: np.any(
            world.render(Person(None, world.words[0], *place))
            != world.render(Person(None, world.words[1], *place)),
            axis=-1,
        )
        for place in places
    }
    region_fraction = float(np.mean([region.mean() for region in differ.values()]))
    rows = []
    for noun, marker in world.markers.items():
        # where a marker is does not depend on who wears it, and the region is what the two words
        # decide, so one figure holds for both
        inside = [differ[place][world.marker_pixels(noun, *place)].mean() for place in places]
        overlap = dict.fromkeys(world.words, float(np.mean(inside)))
        own = np.argwhere(world.masks(Person(noun, world.words[0])).marker)  # [N, 2]
        region = np.argwhere(differ[0, 0])  # [M, 2]
        apart = float(np.linalg.norm(own[:, None] - region, axis=-1).min())
        rows.append(
            TruthRow(
                profession=noun,
                shares={world.words[0]: 1.0 - marker.share, world.words[1]: marker.share},
                level=marker.level,
                overlap=overlap,
                marker_fraction=marker.size / SIZE**2,
                region_fraction=region_fraction,
                gap=apart,
                colour="#{:02x}{:02x}{:02x}".format(*marker.colour),
                shape=marker.shape,
            )
        )
    return Truth(tuple(rows), world.words)
