"""Scores of every candidate on one model: does it order professions by their true overlap?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy.stats import rankdata

from .candidates import (
    Candidate,
    Measure,
    View,
    layer_maps,
    map_choices,
    measures,
    overlap,
    pair_of_maps,
)

WORDS = ("man", "woman")
NULLS = ("raw", "shuffled subtracted")
# a profession overlaps from here on; the planted levels are 0, 0.25, 0.5, 0.75 and 1
OVERLAPS = 0.05
# overlaps that are called different; half a level
APART = 0.125
# a level-0 marker nearer than this to the region is "adjacent"
ADJACENT = 5.0
Array = np.ndarray[Any, np.dtype[np.float64]]


class Truth:
    """What was drawn, and the scores of values against it.

    Attributes:
        right: `[P, S]` bool, the picture shows the profession asked for.
        overlap: `[U]`, mean true overlap of the professions that were drawn at all (`used`).
    """

    def __init__(self, record: dict[str, Any]) -> None:
        nouns = list(record["truth"])
        shape = (len(nouns), len(record["pictures"]) // len(nouns))
        self.right = np.array([p["right"] for p in record["pictures"]]).reshape(shape)
        drawn = [np.nan if p["overlap"] is None else p["overlap"] for p in record["pictures"]]
        self.pictures = np.array(drawn, np.float64).reshape(shape)
        self.used = self.right.any(1)  # [P]
        self.overlap = np.nanmean(self.pictures[self.used], 1)  # [U]
        gaps = np.array([record["truth"][noun]["gap"] for noun in nouns])[self.used]
        t, level = self.overlap, np.rint(self.overlap * 4) / 4
        apart, over = t <= OVERLAPS, t > OVERLAPS
        self.pairs = {  # [U, U] bool: the first is the more overlapping
            "concordance": t[:, None] - t[None] > APART,
            "auc": over[:, None] & apart[None],
            "adjacent": over[:, None] & (apart & (gaps < ADJACENT))[None],
            "quarter": (level == 0.75)[:, None] & (level == 0.25)[None],
        }

    def means(self, values: Array) -> Array:
        """Means `[..., U]` of `[..., P, S]` over the pictures that show their profession."""
        right = self.right[self.used]  # [U, S]
        found: Array = np.where(right, values[..., self.used, :], 0.0).sum(-1) / right.sum(-1)
        return found

    def scores(self, values: Array) -> dict[str, Array]:
        """Figure -> `[C]` of what C candidates say of every picture, `[C, P, S]`.

        nan if no two professions can be told apart by the figure.
        """
        x = self.means(values)  # [C, U]
        wins = (np.sign(x[:, :, None] - x[:, None]) + 1) / 2  # [C, U, U], ties half
        found = {
            name: wins[:, pairs].mean(1) if pairs.any() else np.full(len(x), np.nan)
            for name, pairs in self.pairs.items()
        }
        ranks, own = wins.sum(2), rankdata(self.overlap)  # [C, U], [U]
        ranks, own = ranks - ranks.mean(1, keepdims=True), own - own.mean()
        norms = np.linalg.norm(ranks, axis=1) * np.linalg.norm(own)
        found["rho"] = np.divide(ranks @ own, norms, out=np.full(len(x), np.nan), where=norms > 0)
        flat, drawn = values[:, self.right], self.pictures[self.right]
        above, below = flat[:, drawn > OVERLAPS], flat[:, drawn <= OVERLAPS]
        found["picture_auc"] = (np.sign(above[:, :, None] - below[:, None]).mean((1, 2)) + 1) / 2
        return found


def score_model(sums: dict[str, torch.Tensor], record: dict[str, Any]) -> pa.Table:
    """One row a candidate, word (or "both") and null ("raw", "shuffled subtracted")."""
    layers = layer_maps(sums)
    truth = Truth(record)
    every = measures_of(record)
    tables = []
    for maps in map_choices():
        found: dict[tuple[str, str], list[Array]] = {}  # (word, null) -> [P, S] a measure
        for word in WORDS:
            a, b = pair_of_maps(layers, record["concepts"], maps, word)
            first, second = View(a), View(b)
            for measure in every.values():
                matrix = overlap(first, second, measure).double().numpy()  # [P, S, S]
                for null, values in _with_null(matrix).items():
                    found.setdefault((word, null), []).append(values)
        for null in NULLS:
            both = [
                (a + b) / 2 for a, b in zip(*(found[word, null] for word in WORDS), strict=True)
            ]
            found["both", null] = both
        for (word, null), parts in found.items():
            columns = {name: [value] * len(every) for name, value in asdict(maps).items()}
            columns |= {"measure": list(every), "word": [word] * len(every)}
            columns |= {"null": [null] * len(every)}
            tables.append(pa.table(columns | truth.scores(np.stack(parts))))
    return pa.concat_tables(tables)


def measures_of(record: dict[str, Any]) -> dict[str, Measure]:
    """All measures by name, for a model's planted sizes."""
    sizes = float(np.mean(list(record["sizes"].values()))) / 64**2
    return measures(100 * sizes, 100 * record["region_fraction"])


def values_of(
    sums: dict[str, torch.Tensor],
    record: dict[str, Any],
    candidate: Candidate,
    word: str,
    noun: str = "noun",
) -> Array:
    """What a candidate says of every picture, `[P, S]`."""
    measure = measures_of(record)[candidate.measure]
    a, b = pair_of_maps(layer_maps(sums), record["concepts"], candidate, word, noun)
    values: Array = overlap(View(a), View(b), measure).diagonal(dim1=1, dim2=2).double().numpy()
    return values


def _with_null(matrix: Array) -> dict[str, Array]:
    """The measure `[P, S]`, and the measure less its mean over other seeds' demographic maps."""
    raw = matrix.diagonal(axis1=1, axis2=2)
    seeds = matrix.shape[1]
    null = (matrix.sum(2) - raw) / max(1, seeds - 1)
    return dict(zip(NULLS, (raw, raw - null), strict=True))
