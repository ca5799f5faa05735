"""Layer weights learned on the choosing models, for the winner's form and measure.

Reported beside the protocol's candidates, and not one of them: the winner was chosen and tested
before this was run. Coordinate ascent over the layers, each weighted 0, 1 or 2, on the mean
concordance of the choosing models; then one look at the final ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .candidates import Candidate as Chosen
from .candidates import View, layer_maps, measures, overlap, pair_of_maps
from .collect import load
from .score import WORDS, Array, Truth

LEVELS = (0.0, 1.0, 2.0)


class Model:
    """One model's maps of the chosen form, layer by layer, and its truth."""

    def __init__(self, folder: Path, chosen: Chosen) -> None:
        sums, record = load(folder)
        self.truth = Truth(record)
        resized = layer_maps(sums)
        self.layers = list(resized)
        every = Chosen(**{**vars(chosen), "layers": "with mid"})
        self.maps = {  # word -> two tensors [layers, P, S, 256]
            word: tuple(
                torch.stack(side)
                for side in zip(
                    *(
                        pair_of_maps({name: maps}, record["concepts"], every, word)
                        for name, maps in resized.items()
                    ),
                    strict=True,
                )
            )
            for word in WORDS
        }
        sizes = np.mean(list(record["sizes"].values())) / 64**2
        self.measure = measures(100 * float(sizes), 100 * record["region_fraction"])[chosen.measure]

    def scores(self, weights: Sequence[float]) -> dict[str, float]:
        """Concordance and AUC with weighted layers, mean over the words."""
        factor = torch.tensor(weights)[:, None, None, None]
        values: list[Array] = []
        for word in WORDS:
            a, b = ((factor * side).sum(0) for side in self.maps[word])
            matrix = overlap(View(a), View(b), self.measure)
            values.append(matrix.diagonal(dim1=1, dim2=2).double().numpy())
        found = self.truth.scores(np.stack(values))
        return {name: float(found[name].mean()) for name in ("concordance", "auc")}


def learned(choosing: Iterable[Path], final: Iterable[Path], chosen: Chosen) -> dict[str, Any]:
    """Weights learned on the choosing models, and their scores on both groups."""
    models = [Model(folder, chosen) for folder in choosing]
    weights = [1.0] * len(models[0].layers)

    def value(trial: Sequence[float]) -> float:
        return float(np.mean([model.scores(trial)["concordance"] for model in models]))

    best, before = value(weights), -1.0
    while best > before:
        before = best
        for place in range(len(weights)):
            for level in LEVELS:
                trial = [*weights[:place], level, *weights[place + 1 :]]
                if any(trial) and (found := value(trial)) > best:
                    weights, best = trial, found
    groups = {"choosing": models, "final": [Model(folder, chosen) for folder in final]}
    return {
        "weights": dict(zip(models[0].layers, weights, strict=True)),
        **{
            name: {
                figure: [model.scores(weights)[figure] for model in own]
                for figure in ("concordance", "auc")
            }
            for name, own in groups.items()
        },
    }
