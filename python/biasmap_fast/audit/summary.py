"""The summary of a run: one long table of figures, made from its records and from nothing else.

`measure`, `setting`, `part` and `control` are columns of the measurements, and all functions work
on whatever values they have: a new measure needs no new code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import integrate

from .records import EMPTY, OK
from .statistics import (
    FIXED_WIDTH,
    Figure,
    chance_test,
    cross_iou,
    crossed_mean_interval,
    crossed_sign_flip_test,
    holm,
    mcnemar_test,
    mean_interval,
    rank_correlation,
    share_difference,
    share_interval,
    shuffled,
    sign_flip_test,
    stable_seed,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .plan import AuditPlan

SCHEMA_VERSION = 5
MEASURED = (OK, EMPTY)
KEYS = [
    *("scope", "condition", "baseline", "axis", "profession", "word"),
    *("measure", "setting", "part", "control", "quantity"),
]
"""Columns that name a figure, in the order in which the table is sorted."""

COLUMNS = [*KEYS, "estimate", "low", "high", "n", "p", "p_adjusted", "method"]
CURVE = tuple(f"{percent / 100:g}" for percent in range(50, 0, -5))
"""Settings of IoU on the threshold curve, the largest masks first."""

_UNTESTED = ("soft_iou",)  # its column chance is that of hard masks
_PICTURE = ["condition", "profession", "seed"]
_PAIR = ["condition", "axis", "word", "measure", "setting"]


@dataclass(frozen=True)
class Summary:
    """Every figure of a run.

    Attributes:
        figures: One row per figure: `COLUMNS`, with 95 % intervals and Holm's adjusted p values.
        run: Numbers of pictures (planned, drawn, measured, measured_in_part), whether the run is
            complete, ``status`` (pictures of each), and the first ``failures`` of all ``failed``.
        precision: What a precision came to (`rounds.figures`); ``None`` for fixed seeds.
    """

    figures: pd.DataFrame
    run: dict[str, Any]
    precision: dict[str, Any] | None = None

    def find(self, **values: Any) -> pd.DataFrame:
        """Returns the figures with these values (or one of a list), see `where`."""
        return where(self.figures, **values)

    def records(self) -> list[dict[str, Any]]:
        """Returns the figures as dicts for JSON, ``None`` for numbers that a figure lacks."""
        rows = self.figures.astype(object).where(self.figures.notna(), None)
        return [
            {str(name): value for name, value in row.items()} for row in rows.to_dict("records")
        ]


def where(rows: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Rows with these values (or one of a list) in these columns."""
    for name, value in values.items():
        rows = rows[rows[name].isin(value if isinstance(value, (list, tuple)) else [value])]
    return rows


def lead(plan: AuditPlan) -> dict[str, str]:
    """Measure and setting that a report opens with, as keys of `Summary.find`."""
    return {"measure": plan.measure, "setting": plan.setting}


def summarise(
    plan: AuditPlan,
    pictures: pd.DataFrame,
    measurements: pd.DataFrame,
    *,
    truth: Iterable[Mapping[str, Any]] | None = None,
    ledger: pd.DataFrame | None = None,
    masks: pd.DataFrame | None = None,
    precision: Mapping[str, Any] | None = None,
) -> Summary:
    """Every figure of a run.

    Args:
        plan: Plan of the run.
        pictures: One row per picture.
        measurements: One row per value.
        truth: What is planted: rows with profession, and shares and overlap of each word.
        ledger: What guidance did, one row per picture and guided call.
        masks: Masks of the measured pairs.
        precision: What a precision came to (`rounds.figures`).
    """
    table = _Table(plan)
    pictures = pictures.sort_values(_PICTURE, ignore_index=True)
    measurements = measurements.sort_values([*_PICTURE, *_PAIR[1:], "part", "control"])
    values = where(measurements[measurements["value"].notna()], status=MEASURED)
    pairs, controls = where(values, control=""), values[values["control"] != ""]
    whole = where(pairs, part="")
    settings = {f"{fraction:.10g}" for fraction in plan.fractions}
    levels = {
        key: (table.matrix(rows), table.matrix(rows, "chance"))
        for key, rows in whole.groupby(_PAIR)
        if key[3] != "iou" or key[4] in settings  # the others are points of the curve
    }
    for key, (x, chance) in levels.items():
        names = dict(zip(_PAIR, key, strict=True))
        table.level(names, x, chance)
        table.controls(names, x, controls)
        before = levels.get((plan.conditions[0], *key[1:]))
        if before is not None and key[0] != plan.conditions[0]:
            name = "soft_iou" if key[3] == "soft_iou" else "iou"
            seed = table.seed("difference", names, name)
            table.differences({**names, "baseline": plan.conditions[0]}, x - before[0], seed)
    if plan.curve:
        table.curves(where(whole, measure="iou", setting=CURVE), settings)
    table.parts(pairs[pairs["part"] != ""])
    if masks is not None:
        table.null(where(masks, measure="iou"))
    _outputs(table, pictures)
    _shares(table, pictures)
    if truth is not None:
        _planted(table, truth)
    if ledger is not None and len(ledger):
        _energy(table, ledger)
    if precision is not None:
        _widths(table, precision)
    run = _run(plan, pictures, measurements, precision)
    return Summary(table.finished(), run, None if precision is None else dict(precision))


class _Table:
    """Rows of the figures table while they are made."""

    def __init__(self, plan: AuditPlan) -> None:
        self.plan = plan
        self.rows: list[dict[str, Any]] = []

    def add(self, names: Mapping[str, str], quantity: str, figure: Figure, p: Any = None) -> None:
        numbers = {"estimate": figure.value, "low": figure.low, "high": figure.high, "p": p}
        scope = "profession" if names.get("profession") else "overall"
        row = {**dict.fromkeys(KEYS, ""), "scope": scope, **names, "quantity": quantity}
        self.rows.append(row | numbers | {"n": figure.n, "method": figure.method})

    def matrix(self, rows: pd.DataFrame, column: str = "value") -> pd.DataFrame:
        """Values ``[professions, seeds]``, NaN for what was not measured."""
        wide = rows.pivot(index="profession", columns="seed", values=column)
        return wide.reindex([name for name in self.plan.professions if name in wide.index])

    def seed(self, what: str, names: Mapping[str, str], *more: str) -> int:
        # the words of the first edition, so that intervals stay the same
        setting = names["setting"]
        single = setting.replace(".", "", 1).isdecimal()
        fraction = float(setting) if single else self.plan.fractions[0]
        part = (names["condition"], names["axis"], names["word"], round(100 * (1 - fraction), 10))
        return stable_seed(what, *more, *part)

    def means(self, names: Any, quantity: str, x: pd.DataFrame, seed: int, lowest: float) -> None:
        """Mean of each profession, and over professions, of ``[professions, seeds]``."""
        for profession, row in x.iterrows():
            figure = mean_interval(row.dropna(), lowest=lowest)
            self.add({**names, "profession": str(profession)}, quantity, figure)
        self.add(names, quantity, crossed_mean_interval(x.to_numpy(), lowest=lowest, seed=seed))

    def level(self, names: Mapping[str, str], x: pd.DataFrame, chance: pd.DataFrame) -> None:
        """Means of one measure and their distance from chance, tested."""
        precision = self.plan.precision if lead(self.plan).items() <= names.items() else None
        seed = self.seed("overall", names)
        tested = names["measure"] not in _UNTESTED
        level, pictures = float(np.nanmean(chance)), int(chance.count().sum())
        fixed = float(np.nanmax(chance)) == float(np.nanmin(chance))
        scale = (1 / (1 - level), -level / (1 - level))
        corrected = (x - chance) / (1 - chance)
        if tested:
            self.add(names, "chance", Figure(level, None, None, pictures, "mean over pictures"))
        for profession, row in x.iterrows():
            own, kept = {**names, "profession": str(profession)}, row.dropna()
            figure = mean_interval(kept, precision=precision)
            p = chance_test(kept, chance.loc[profession, kept.index], precision)
            self.add(own, "mean", figure, p if tested else None)
            if tested:
                rest = corrected.loc[profession].dropna()
                # a constant chance keeps the cut to possible values
                of_chance = figure.scaled(*scale) if fixed else mean_interval(rest, lowest=-np.inf)
                self.add(own, "corrected", of_chance)
        figure = crossed_mean_interval(x.to_numpy(), seed=seed)
        self.add(names, "mean", figure)
        if tested:
            values = corrected.to_numpy()
            rest = crossed_mean_interval(values, lowest=-np.inf, seed=seed)
            self.add(names, "corrected", figure.scaled(*scale) if fixed else rest)

    def controls(self, names: Mapping[str, str], x: pd.DataFrame, controls: pd.DataFrame) -> None:
        """Level of every control, and the difference of the pair from it on the same pictures."""
        rows = where(controls, **{k: names[k] for k in ("condition", "measure", "setting")})
        swapped = rows["axis"].eq(names["axis"]) & rows["word"].eq(names["word"])
        for control, own in rows[rows["axis"].eq("") | swapped].groupby("control"):
            other = self.matrix(own)
            named = {**names, "control": str(control)}
            seed = self.seed("control", names, str(control))
            self.means(named, "mean", other, seed, 0.0)
            self.differences(named, x - other, seed)

    def differences(self, names: Mapping[str, str], change: pd.DataFrame, seed: int) -> None:
        """Paired differences ``[professions, seeds]``, with their tests."""
        known = [name for name in self.plan.professions if name in change.index]
        change = change.reindex(known).dropna(how="all")
        for profession, row in change.iterrows():
            own, kept = {**names, "profession": str(profession)}, row.dropna()
            self.add(own, "difference", mean_interval(kept, lowest=-1.0), sign_flip_test(kept))
        figure = crossed_mean_interval(change.to_numpy(), lowest=-1.0, seed=seed)
        self.add(names, "difference", figure, crossed_sign_flip_test(change.to_numpy()))

    def curves(self, rows: pd.DataFrame, known: set[str]) -> None:
        """Corrected IoU over the size of the masks, and its mean: the area under that curve."""
        percentiles = [round(100 - 100 * float(setting)) for setting in CURVE]
        for part, own in rows.groupby(_PAIR[:3]):
            names = dict(zip(_PAIR[:3], part, strict=True)) | {"measure": "iou"}
            own = own.assign(value=(own["value"] - own["chance"]) / (1 - own["chance"]))
            wide = own.pivot(index=["profession", "seed"], columns="setting", values="value")
            wide = wide.reindex(columns=list(CURVE)).dropna()
            for setting, q in zip(CURVE, percentiles, strict=True):
                if setting not in known:  # those have a figure of their own
                    x = self.matrix(wide[setting].rename("value").reset_index())
                    seed = stable_seed("curve", *part, q)
                    figure = crossed_mean_interval(x.to_numpy(), lowest=-1.0, seed=seed)
                    self.add({**names, "setting": setting}, "corrected", figure)
            reach = percentiles[-1] - percentiles[0]
            areas = pd.Series(integrate.trapezoid(wide.to_numpy(), percentiles) / reach, wide.index)
            x = self.matrix(areas.rename("value").reset_index())
            self.means(names, "area", x, stable_seed("curve", *part, "area"), -1.0)

    def parts(self, rows: pd.DataFrame) -> None:
        """Means of parts of the maps: blocks (of each profession too), calls, layers, branches."""
        for key, own in rows.groupby([*_PAIR, "part"]):
            names = dict(zip([*_PAIR, "part"], key, strict=True))
            kind, _, name = names["part"].partition(":")
            x = self.matrix(own)
            if kind != "block":
                seed = stable_seed("sweep", *key[:3], kind, name)
                self.add(names, "mean", crossed_mean_interval(x.to_numpy(), seed=seed))
                continue
            for profession, row in x.iterrows():
                figure = mean_interval(row.dropna())
                self.add({**names, "profession": str(profession)}, "mean", figure)
            self.add(names, "mean", _over_professions(x.mean(axis=1)))

    def null(self, masks: pd.DataFrame) -> None:
        """The seed-shuffled null of IoU; what it leaves of containment follows nothing."""
        for key, rows in masks.groupby(_PAIR):
            names = dict(zip(_PAIR, key, strict=True)) | {"control": "shuffled"}
            percentile = round(100 * (1 - float(names["setting"])), 10)
            levels, pseudo = {}, {}
            for profession in self.plan.professions:
                own = where(rows, profession=profession).sort_values("seed")
                if own.empty:
                    continue
                sides = (unpacked(own, side) for side in ("profession", "word"))
                matrix = cross_iou(*(masks.reshape(len(own), -1) for masks in sides))
                seed = stable_seed("shuffled", *key[:3], percentile, profession)
                level, difference, p, values = shuffled(matrix, seed)
                self.add({**names, "profession": profession}, "mean", level)
                self.add({**names, "profession": profession}, "difference", difference, p)
                if level.value is not None:
                    levels[profession] = level.value
                    pseudo[profession] = pd.Series(values, own["seed"])
            self.add(names, "mean", _over_professions(pd.Series(levels, dtype=float)))
            x = pd.DataFrame(pseudo, dtype=float).sort_index().T.to_numpy()
            figure = crossed_mean_interval(x, lowest=-1.0, seed=self.seed("shuffled", names))
            method = f"jackknife's pseudo-values, {figure.method}"
            self.add(names, "difference", replace(figure, method=method))

    def finished(self) -> pd.DataFrame:
        """The table, sorted, with p values adjusted over what is claimed together."""
        table = pd.DataFrame(self.rows, columns=[name for name in COLUMNS if name != "p_adjusted"])
        numbers = ["estimate", "low", "high", "p"]
        table[numbers] = table[numbers].astype(float)
        # means: all professions and words of a condition; differences: all professions
        claim = table["axis"].str.cat(table["word"], "/").where(table["quantity"] != "mean", "")
        family = ["condition", "baseline", "measure", "setting", "part", "control", "quantity"]
        tested = where(table, scope="profession").assign(claim=claim).dropna(subset="p")
        adjusted = tested.groupby([*family, "claim"])["p"].transform(lambda p: holm(list(p)))
        table["p_adjusted"] = adjusted
        if self.plan.precision is not None:
            open_ended = table["low"].notna() & table["method"].ne(FIXED_WIDTH)
            until = f"; seeds drawn until precision {self.plan.precision:g}"
            table.loc[open_ended, "method"] += until
        return table.sort_values(KEYS, ignore_index=True)[COLUMNS]


def _outputs(table: _Table, pictures: pd.DataFrame) -> None:
    """What the classifier reads under each condition: profession right, score, CLIP score."""
    right = _entry(pictures["labels"], "profession") == pictures["profession"]
    score = pictures["scores"].map(lambda given: next(iter(_dict(given).values()), None))
    read = pictures.assign(right=right, score=score.astype(float))
    baseline = table.plan.conditions[0]
    clip = read.dropna(subset="clip_score")
    before = table.matrix(where(clip, condition=baseline), "clip_score") / 100
    for condition in table.plan.conditions:
        names = {"scope": "run", "condition": condition}
        kept = where(read, condition=condition).dropna(subset="score")
        if len(kept):
            figure = share_interval(int(kept["right"].sum()), len(kept))
            table.add({**names, "measure": "right"}, "right", figure)
            table.add({**names, "measure": "score"}, "score", mean_interval(kept["score"]))
        x = table.matrix(where(clip, condition=condition), "clip_score") / 100  # in [0, 1]
        if x.empty:
            continue
        seed, names["measure"] = stable_seed("clip score", condition), "clip score"
        figure = crossed_mean_interval(x.to_numpy(), seed=seed).scaled(100, 0)
        table.add(names, "clip score", figure)
        if condition != baseline and len(before):
            change = (x - before).to_numpy()
            figure = crossed_mean_interval(change, lowest=-1.0, seed=seed).scaled(100, 0)
            p = crossed_sign_flip_test(change)
            table.add({**names, "baseline": baseline}, "difference", figure, p)


def _shares(table: _Table, pictures: pd.DataFrame) -> None:
    """Share of each word among the pictures that were read, and its change by a condition."""
    scored = pictures[pictures["scores"].map(lambda given: bool(_dict(given)))]
    for axis, words in table.plan.axes.items():
        read = pictures.assign(label=_entry(pictures["labels"], axis)).dropna(subset="label")
        # a classifier that reads other words need not know all of the axis
        foreign = set(read["label"]) - set(words)
        known = [word for word in words if not foreign or word in set(read["label"])]
        wide = read.pivot(index=["condition", "profession"], columns="seed", values="label")
        for (condition, profession), row in wide.iterrows():
            labels = row.dropna()
            part = {"condition": condition, "profession": profession}
            names = {**part, "axis": axis, "measure": "share"}
            for word in known:
                figure = share_interval(int(labels.eq(word).sum()), len(labels))
                table.add({**names, "word": word}, "share", figure)
            looked = len(where(scored, **part))
            if looked > len(labels):
                count = Figure(looked - len(labels), None, None, looked, "count of pictures")
                table.add(names, "unread", count)
        for condition in table.plan.conditions[1:]:
            for word in [word for word in known if len(words) != 2 or word == words[1]]:
                _share_change(table, wide, axis, word, condition)


def _share_change(table: _Table, wide: pd.DataFrame, axis: str, word: str, condition: str) -> None:
    baseline = table.plan.conditions[0]
    names = {"condition": condition, "baseline": baseline, "axis": axis, "word": word}
    names["measure"] = "share"
    changes = {}
    for profession in table.plan.professions:
        keys = [(baseline, profession), (condition, profession)]
        if not set(keys) <= set(wide.index):
            continue
        both = wide.loc[keys].dropna(axis=1).eq(word)
        if both.shape[1]:
            pairs = [(bool(a), bool(b)) for a, b in both.T.to_numpy()]
            named = {**names, "profession": profession}
            table.add(named, "share difference", share_difference(pairs), mcnemar_test(pairs))
            changes[profession] = both.iloc[1].astype(float) - both.iloc[0].astype(float)
    if changes:
        x = pd.DataFrame(changes).sort_index().T.to_numpy()
        figure = crossed_mean_interval(x, lowest=-1.0)
        table.add(names, "share difference", figure, crossed_sign_flip_test(x))


def _planted(table: _Table, truth: Iterable[Mapping[str, Any]]) -> None:
    """What is planted, and the rank correlation of every measure with it."""
    known = {
        (row["profession"], measure, word): value
        for row in truth
        for measure, by_word in (("overlap", row["overlap"]), ("share", row["shares"]))
        for word, value in by_word.items()
        if row["profession"] in table.plan.professions
    }
    for axis, words in table.plan.axes.items():
        for (profession, measure, word), value in known.items():
            names = {"axis": axis, "profession": profession, "word": word, "measure": measure}
            if word in words:
                table.add(names, "planted", Figure(value, None, None, 1, "as planted"))
    rows = pd.DataFrame(table.rows, columns=[*KEYS, "estimate"]).dropna(subset="estimate")
    rows = where(rows, scope="profession", quantity="mean", part="", control="")
    for key, own in rows.groupby(_PAIR):
        names = dict(zip(_PAIR, key, strict=True))
        for against in ("overlap", "share"):
            keys = [(profession, against, names["word"]) for profession in own["profession"]]
            pairs = [
                (estimate, known[name])
                for estimate, name in zip(own["estimate"], keys, strict=True)
                if name in known
            ]
            if pairs:
                figure = rank_correlation(*zip(*pairs, strict=True))
                table.add({**names, "baseline": f"planted {against}"}, "rank", figure)


def _energy(table: _Table, ledger: pd.DataFrame) -> None:
    """The ledger over the run: medians and quartiles of each call, and what was left out."""
    ledger = ledger.assign(iou=ledger["iou"].map(np.mean))
    columns = {"energy": "energy", "iou": "iou", "gradient_norm": "gradient norm"}
    for (condition, call), rows in ledger.groupby(["condition", "call"]):
        names = {"scope": "run", "condition": condition, "part": f"step:{call}"}
        for column, measure in columns.items():
            finite = rows[column][np.isfinite(rows[column])]
            if len(finite):
                low, middle, high = (float(q) for q in finite.quantile([0.25, 0.5, 0.75]))
                method = "median and quartiles over pictures"
                figure = Figure(middle, low, high, len(rows), method)
                table.add({**names, "measure": measure}, "energy", figure)
    for (condition, reason), rows in where(ledger, applied=False).groupby(["condition", "reason"]):
        names = {"scope": "run", "condition": condition, "measure": "energy"}
        figure = Figure(len(rows), None, None, len(ledger), "count of calls of a picture")
        table.add({**names, "part": f"skipped:{reason}"}, "skipped", figure)


def _widths(table: _Table, precision: Mapping[str, Any]) -> None:
    """Half-width of each profession's widest interval under a precision."""
    for row in precision["professions"]:
        names = {"profession": row["profession"], **lead(table.plan)}
        method = FIXED_WIDTH if row["reached"] else "the precision was not reached"
        figure = Figure(row["half_width"], None, None, row["seeds"], method)
        table.add(names, "half-width", figure)


def _dict(given: Any) -> dict[str, Any]:
    # Parquet gives a map as pairs, and none as None or NaN
    return dict(given) if isinstance(given, (dict, list)) else {}


def _entry(column: pd.Series[Any], name: str) -> pd.Series[Any]:
    return column.map(lambda given: _dict(given).get(name))


def unpacked(rows: pd.DataFrame, side: str) -> Any:
    """Masks ``[S, height, width]`` of one side of mask rows: ``"profession"`` or ``"word"``."""
    size = int(rows["height"].iloc[0]), int(rows["width"].iloc[0])
    bits = np.stack([np.frombuffer(packed, np.uint8) for packed in rows[f"{side}_bits"]])
    return np.unpackbits(bits, axis=1, count=size[0] * size[1]).reshape(-1, *size).astype(bool)


def _over_professions(means: pd.Series[float]) -> Figure:
    return replace(mean_interval(means), method="Student t over professions")


def _run(
    plan: AuditPlan,
    pictures: pd.DataFrame,
    measurements: pd.DataFrame,
    precision: Mapping[str, Any] | None,
) -> dict[str, Any]:
    rows = where(measurements, control="", part="")
    good = rows["status"].isin(MEASURED)
    measured, failed = (
        set(rows[kept][_PICTURE].itertuples(index=False, name=None)) for kept in (good, ~good)
    )
    planned = len(plan.conditions) * len(plan.professions) * len(plan.seeds)
    if precision is not None:
        planned = max(int(precision["pictures"]), len(pictures))
    ended = precision is None or bool(precision["ended"])
    # a picture has the first status that is not "ok", its own or that of a value
    statuses = pd.concat([pictures[[*_PICTURE, "status"]], rows[[*_PICTURE, "status"]]])
    statuses["status"] = statuses["status"].replace(EMPTY, OK)
    first = statuses.sort_values("status", key=lambda status: status.eq(OK), kind="stable")
    counts = first.drop_duplicates(_PICTURE)["status"].value_counts().sort_index()
    columns = [*_PICTURE, "axis", "word", "status", "reason"]
    failures = pd.concat([pictures[~pictures["status"].isin(MEASURED)], rows[~good]])
    failures = failures.reindex(columns=columns).fillna("").drop_duplicates(columns[:5])
    return {
        "planned": planned,
        "drawn": len(pictures),
        "measured": len(measured),
        "measured_in_part": len(measured & failed),
        "complete": ended and len(pictures) == planned,
        "status": {str(name): int(count) for name, count in counts.items()},
        "failed": len(failures),
        "failures": failures.head(50).to_dict("records"),
    }
