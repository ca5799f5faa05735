"""From the scores of all models to the choice, the test, the tables and the figure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from .candidates import PLANTED, PUBLISHED, PUBLISHED_BRANCH, Candidate
from .collect import load
from .models import GROUPS
from .score import WORDS, Truth, control, values_of
from .weights import learned

FIGURES = ("concordance", "auc", "rho", "adjacent", "quarter", "picture_auc")
GATE = 0.85
PARTS = [field.name for field in fields(Candidate)]
Array = np.ndarray[Any, np.dtype[np.float64]]


class Group:
    """The models of a group that are complete, and every candidate's figures on them.

    Attributes:
        models: name -> what `collect` wrote about it.
        passed: names of those that pass the gate.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: dict[str, dict[str, Any]] = {}
        for seed in GROUPS[folder.name].seeds:
            out = folder / f"seed-{seed}.maps"
            if not (out / "scores.parquet").is_file():
                raise FileNotFoundError(f"{out} has no scores.parquet yet")
            self.models[f"seed-{seed}"] = json.loads((out / "pictures.json").read_text())
        self.gates = {name: gate(record) for name, record in self.models.items()}
        self.passed = [name for name, found in self.gates.items() if min(found.values()) >= GATE]
        tables = [pq.read_table(folder / f"{name}.maps/scores.parquet") for name in self.passed]
        self.keys = tables[0].select([*PARTS, "word", "null"]).to_pylist()
        if any(t.select([*PARTS, "word", "null"]).to_pylist() != self.keys for t in tables[1:]):
            raise ValueError(f"the scores in {folder} are of different versions of the candidates")
        self.values = {  # figure -> [rows, models]
            name: np.stack([t[name].to_numpy() for t in tables], 1) for name in FIGURES
        }
        self.rows = {
            (Candidate(**{p: key[p] for p in PARTS}), key["word"], key["null"]): i
            for i, key in enumerate(self.keys)
        }

    def of(self, candidate: Candidate, figure: str, word: str = "each", null: str = "raw") -> Array:
        """A candidate's figure on every model; "each" is the mean of that for either word."""
        if word == "each":
            found: Array = np.mean([self.of(candidate, figure, w, null) for w in WORDS], axis=0)
            return found
        row: Array = self.values[figure][self.rows[candidate, word, null]]
        return row

    def candidates(self) -> list[Candidate]:
        return list(dict.fromkeys(candidate for candidate, _, _ in self.rows))


def gate(record: dict[str, Any]) -> dict[str, float]:
    """Mean pixel AUC of the word maps on their regions, one concept a prompt."""
    seen = [p["auc"] for p in record["pictures"] if p["auc"] is not None]
    return {word: float(np.mean([auc[word] for auc in seen])) for word in ("noun", *WORDS)}


def choose(group: Group) -> tuple[Candidate, list[Candidate], Candidate]:
    """The winner by the protocol, all within a standard error of the best, and the best."""
    eligible = [c for c in group.candidates() if c.measure != PLANTED]
    means = {c: float(group.of(c, "concordance").mean()) for c in eligible}
    best = max(eligible, key=means.__getitem__)
    spread = group.of(best, "concordance")
    limit = means[best] - spread.std(ddof=1) / math.sqrt(len(spread))
    near = [c for c in eligible if means[c] >= limit]
    return min(near, key=lambda c: (c.changes(PUBLISHED), -means[c])), near, best


def interval(values: Array) -> dict[str, Any]:
    """Mean over models with a 95 % Student interval."""
    n, mean = len(values), float(values.mean())
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return {"value": mean, "low": mean - half, "high": mean + half, "models": values.tolist()}


def described(group: Group, candidate: Candidate) -> dict[str, Any]:
    """All figures of a candidate on a group."""
    return {
        "candidate": asdict(candidate),
        "changes": candidate.changes(PUBLISHED),
        "figures": {name: interval(group.of(candidate, name)) for name in FIGURES},
        "words": {
            word: interval(group.of(candidate, "concordance", word)) for word in (*WORDS, "both")
        },
        "shuffled subtracted": interval(
            group.of(candidate, "concordance", null="shuffled subtracted")
        ),
    }


def variants(winner: Candidate) -> dict[str, Candidate]:
    """What the tables show: the winner, the published form, and what lies between."""
    found = {"winner": winner, "published": PUBLISHED, "published, uncond": PUBLISHED_BRANCH}
    for part in PARTS:
        if getattr(winner, part) != getattr(PUBLISHED, part):
            back = replace(winner, **{part: getattr(PUBLISHED, part)})
            found[f"winner, published {part}"] = back
    for part, value in (("form", "single"), ("norm", "raw"), ("steps", "first")):
        if getattr(winner, part) != value:
            found[f"winner, {part} {value}"] = replace(winner, **{part: value})
    found["winner, planted sizes"] = replace(winner, measure=PLANTED)
    return found


def summarise(runs: Path) -> dict[str, Any]:
    """The whole study as one record; the final group only if it is complete."""
    choosing = Group(runs / "choosing")
    winner, near, best = choose(choosing)
    record: dict[str, Any] = {
        "candidates": len(choosing.candidates()),
        "winner": asdict(winner),
        "best": asdict(best),
        "within one standard error": len(near),
        "packaged": packaged(runs, {"winner": winner, "published": PUBLISHED}),
        "groups": {},
    }
    groups = {"choosing": choosing}
    if complete(runs / "final"):
        groups["final"] = Group(runs / "final")
        folders = [
            [group.folder / f"{name}.maps" for name in group.passed] for group in groups.values()
        ]
        record["learned layers"] = learned(folders[0], folders[1], winner)
    for name, group in groups.items():
        measures = dict.fromkeys(c.measure for c in group.candidates())
        record["groups"][name] = {
            "gates": group.gates,
            "passed": group.passed,
            "profession_right": {
                model: float(np.mean([p["right"] for p in one["pictures"]]))
                for model, one in group.models.items()
            },
            "variants": {k: described(group, c) for k, c in variants(winner).items()},
            "measures": {
                maps: {m: described(group, replace(like, measure=m)) for m in measures}
                for maps, like in (("winner", winner), ("published", PUBLISHED))
            },
            "best": described(
                group,
                max(
                    (c for c in group.candidates() if c.measure != PLANTED),
                    key=lambda c: float(group.of(c, "concordance").mean()),
                ),
            ),
            "difference": interval(
                group.of(winner, "concordance") - group.of(PUBLISHED, "concordance")
            ),
            "control": controls(group, winner),
            "levels": {
                name: levels(group, candidate)
                for name, candidate in (("winner", winner), ("published", PUBLISHED))
            },
        }
    return record


def complete(folder: Path) -> bool:
    """Whether every model of a group has its scores."""
    seeds = GROUPS[folder.name].seeds
    return all((folder / f"seed-{seed}.maps/scores.parquet").is_file() for seed in seeds)


def levels(group: Group, candidate: Candidate) -> dict[str, Any]:
    """Why an AUC is what it is: each planted level against level 0, and the measured values.

    For every level: AUC against level 0, mean over words, and mean measured value, over models.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name in group.passed:
        sums, record = load(group.folder / f"{name}.maps")
        truth = Truth(record)
        values = [truth.means(values_of(sums, record, candidate, word)) for word in WORDS]
        planted = np.array([row["level"] for row in record["truth"].values()])[truth.used]
        for level in np.unique(planted):
            own = found.setdefault(f"{level:g}", {"auc": [], "value": []})
            own["value"].append(float(np.mean([x[planted == level].mean() for x in values])))
            wins = [
                np.sign(x[planted == level][:, None] - x[planted == 0][None]).mean() for x in values
            ]
            own["auc"].append(float((np.mean(wins) + 1) / 2))
    return {
        level: {name: interval(np.array(x)) for name, x in own.items()}
        for level, own in found.items()
    }


def packaged(runs: Path, candidates: dict[str, Candidate]) -> dict[str, Any]:
    """The packaged model, trained five times as long as the others; it chose and tests nothing."""
    sums, record = load(runs / "packaged.maps")
    truth = Truth(record)
    found: dict[str, Any] = {"gate": gate(record)}
    for name, candidate in candidates.items():
        scores = [truth.scores(values_of(sums, record, candidate, word)[None]) for word in WORDS]
        found[name] = {f: float(np.mean([one[f][0] for one in scores])) for f in FIGURES}
    return found


def controls(group: Group, winner: Candidate) -> dict[str, Any]:
    """The winner's concordance with "photo" in the profession's place, over models and words."""
    found = []
    for name in group.passed:
        sums, record = load(group.folder / f"{name}.maps")
        found.append(np.mean(list(control(sums, record, winner).values())))
    return interval(np.array(found))


def everything(runs: Path) -> pa.Table:
    """Every candidate on both groups: means over models, and the standard error of the first."""
    columns: dict[str, Any] = {}
    for name in ("choosing", "final"):
        if not complete(runs / name):
            continue
        group = Group(runs / name)
        columns |= {part: [key[part] for key in group.keys] for part in (*PARTS, "word", "null")}
        for figure, values in group.values.items():
            columns[f"{name} {figure}"] = values.mean(1).astype(np.float32)
        error = group.values["concordance"].std(1, ddof=1) / math.sqrt(len(group.passed))
        columns[f"{name} concordance se"] = error.astype(np.float32)
    return pa.table(columns)


def profession_points(
    folder: Path, names: Iterable[str], candidate: Candidate
) -> tuple[Array, Array]:
    """True overlap and measured value (mean of both words) of every profession and model."""
    truths, values = [], []
    for name in names:
        sums, record = load(folder / f"{name}.maps")
        truth = Truth(record)
        per_word = [values_of(sums, record, candidate, word) for word in WORDS]
        truths.append(truth.overlap)
        values.append(truth.means(np.mean(per_word, axis=0)))
    return np.concatenate(truths), np.concatenate(values)


def plot(runs: Path, record: dict[str, Any], path: Path) -> None:
    """Measured against true overlap, published and chosen, and all candidates on both groups."""
    from matplotlib.figure import Figure

    last = "final" if "final" in record["groups"] else "choosing"
    passed = record["groups"][last]["passed"]
    winner = Candidate(**record["winner"])
    figure = Figure(figsize=(13, 4.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, candidate, title in (
        (left, PUBLISHED, "published: IoU of the top 30 %"),
        (middle, winner, f"chosen: {winner.measure}, {winner.layers} layers"),
    ):
        x, y = profession_points(runs / last, passed, candidate)
        axes.scatter(x, y, s=14, color="#0072B2", alpha=0.6, linewidths=0)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("true overlap drawn, a profession and model each")
        axes.set_ylabel("measured, mean of both words")
    table = everything(runs)
    raw = np.array([n == "raw" for n in table["null"].to_pylist()])
    raw &= np.array([w == "both" for w in table["word"].to_pylist()])
    if last == "final":
        x, y = (table[f"{g} concordance"].to_numpy()[raw] for g in ("choosing", "final"))
        right.scatter(
            x, y, s=3, color="#999999", linewidths=0, label="all candidates", rasterized=True
        )
        marks: list[tuple[Candidate, str, str, str]] = [
            (PUBLISHED, "published", "#D55E00", "s"),
            (winner, "chosen", "#0072B2", "o"),
        ]
        for candidate, label, colour, shape in marks:
            keep = raw & matches(table, candidate)
            spot = [table[f"{g} concordance"].to_numpy()[keep] for g in ("choosing", "final")]
            right.scatter(*spot, s=50, color=colour, marker=shape, label=label, zorder=3)
        right.plot([0.3, 1], [0.3, 1], color="#333333", linewidth=0.8)
        right.set_title("concordance with the truth, both words", loc="left", fontsize=10)
        right.set_xlabel("models that chose")
        right.set_ylabel("final models")
        right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.grid(color="#e3e3e3", linewidth=0.6)
    figure.savefig(path, dpi=110)


def matches(table: pa.Table, candidate: Candidate) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows are of one candidate."""
    same = [
        np.array([value == getattr(candidate, part) for value in table[part].to_pylist()])
        for part in PARTS
    ]
    found: np.ndarray[Any, np.dtype[np.bool_]] = np.logical_and.reduce(same)
    return found
