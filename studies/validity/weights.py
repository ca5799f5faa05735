"""Layer weights learned on the choosing models, for the winner's form and measure.

Reported beside the protocol's candidates, and not one of them: the winner was chosen and tested
before this was run. Coordinate ascent over the layers, each weighted 0, 1 or 2, on the mean
concordance of the choosing models; then one look at the final ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .candidates import Candidate, View, layer_maps, overlap, pair_of_maps
from .collect import load
from .score import WORDS, Array, Truth, measures_of

LEVELS = (0.0, 1.0, 2.0)


class Model:
    """One model's maps of the chosen form, layer by layer, and its truth."""

    def __init__(self, folder: Path, chosen: Candidate) -> None:
        sums, record = load(folder)
        self.truth = Truth(record)
        self.measure = measures_of(record)[chosen.measure]
        resized = layer_maps(sums)
        self.layers = list(resized)
        maps, concepts = replace(chosen, layers="with mid"), record["concepts"]
        self.maps: dict[str, tuple[torch.Tensor, ...]] = {}  # word -> [layers, P, S, 256], twice
        for word in WORDS:
            pairs = [pair_of_maps({n: x}, concepts, maps, word) for n, x in resized.items()]
            self.maps[word] = tuple(torch.stack(side) for side in zip(*pairs, strict=True))

    def scores(self, weights: Sequence[float]) -> dict[str, float]:
        """Concordance and AUC with weighted layers, mean over the words."""
        factor = torch.tensor(weights)[:, None, None, None]
        values: list[Array] = []
        for word in WORDS:
            a, b = ((factor * side).sum(0) for side in self.maps[word])
            matrix = overlap(View(a), View(b), self.measure)
            values.append(matrix.diagonal(dim1=1, dim2=2).double().numpy())
        scores = self.truth.scores(np.stack(values))
        return {name: float(scores[name].mean()) for name in ("concordance", "auc")}


def learned(choosing: Iterable[Path], final: Iterable[Path], chosen: Candidate) -> dict[str, Any]:
    """Weights learned on the choosing models, and their scores on both groups."""
    models = [Model(folder, chosen) for folder in choosing]
    weights = [1.0] * len(models[0].layers)

    def value(trial: Sequence[float]) -> float:
        return float(np.mean([model.scores(trial)["concordance"] for model in models]))

    best, before = value(weights), -1.0
    while best > before:
        before = best
        for index in range(len(weights)):
            for level in LEVELS:
                trial = [*weights[:index], level, *weights[index + 1 :]]
                if any(trial) and (mean := value(trial)) > best:
                    weights, best = trial, mean
    record: dict[str, Any] = {"weights": dict(zip(models[0].layers, weights, strict=True))}
    groups = {"choosing": models, "final": [Model(folder, chosen) for folder in final]}
    for name, group in groups.items():
        scores = [model.scores(weights) for model in group]
        record[name] = {figure: [one[figure] for one in scores] for figure in scores[0]}
    return record
