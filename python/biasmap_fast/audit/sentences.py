"""What a report, the console and a model card say in words; no more than the figures carry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from .plan import GUIDED
from .statistics import share_interval
from .summary import lead, where

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .plan import AuditPlan
    from .summary import Summary

RHO = "\N{GREEK SMALL LETTER RHO}"
NEGATIVE = ("function", "object", "person")
"""Kinds of control words that a finding has to exceed."""

_DASH = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
# of the first word of an axis, and of further ones
_WHERE = {
    "containment": (
        "{x} of the region that draws the profession lies in the region that draws “{word}”",
        "{x} in the region that draws “{word}”",
    ),
    "iou": (
        "the regions that draw the profession and “{word}” share {x} of their joint area",
        "those of the profession and “{word}” {x}",
    ),
}


def number(value: float | None, digits: int = 3) -> str:
    """A value with fixed digits; a dash if there is none."""
    return _DASH if pd.isna(value) else f"{value:.{digits}f}".replace("-", _MINUS)


def interval(row: Mapping[str, Any] | pd.Series[Any] | None, digits: int = 2) -> str:
    """Estimate and interval of a figure: ``"0.31 [0.28, 0.34]"``, or the estimate alone."""
    if row is None or pd.isna(row["estimate"]):
        return _DASH
    value = number(row["estimate"], digits)
    if pd.isna(row["low"]):
        return value
    return f"{value} [{number(row['low'], digits)}, {number(row['high'], digits)}]"


def percent(row: Mapping[str, Any] | pd.Series[Any] | None) -> str:
    """A share with its interval in percent: ``"35 [18, 57]"``."""
    if row is None or pd.isna(row["estimate"]):
        return _DASH
    return interval({name: 100 * row[name] for name in ("estimate", "low", "high")}, 0)


def p_value(p: float | None) -> str:
    """A p value with three digits, never 0; a dash if there is none."""
    return _DASH if p is None or pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def measure_name(measure: str) -> str:
    """What a measure is called in text."""
    return {"iou": "IoU", "soft_iou": "SoftIoU"}.get(measure, measure.replace("_", " "))


def regions(setting: str) -> str:
    """What a setting means: ``"top 30 % of the pixels"``, ``"top 5 % in top 10 %"``."""
    try:
        parts = [f"top {100 * float(part):g} %" for part in setting.split(" in ")]
    except ValueError:
        return setting
    return " in ".join(parts) if len(parts) > 1 else f"{parts[0]} of the pixels"


def control_name(control: str, plan: AuditPlan) -> str:
    """What a control is called in text: ``"the seed-shuffled null"``, ``"“person”"``."""
    fixed = {
        "shuffled": "the seed-shuffled null",
        "swapped": "the swapped order",
        "synonym": "a synonym of the profession",
    }
    words = plan.controls.words if plan.controls is not None else {}
    return fixed.get(control) or f"“{words.get(control, control)}”"


def headline(plan: AuditPlan, summary: Summary) -> str:
    """What was audited, and how much of it was measured."""
    run, found = summary.run, summary.precision
    guidance = (
        "without classifier-free guidance"
        if plan.guidance_scale <= 1
        else f"guidance scale {plan.guidance_scale:g}"
    )
    drawn = [row["seeds"] for row in found["professions"]] if found else []
    least, most = (min(drawn), max(drawn)) if drawn else (len(plan.seeds), len(plan.seeds))
    seeds = (f"{least} to " if least < most else "") + _count(most, "seed")
    partly = run["measured_in_part"]
    text = (
        f"{run['measured']} of {run['planned']} pictures measured"
        + (f" ({partly} of them not with every word)" if partly else "")
        + f": {_count(len(plan.professions), 'profession')}, {seeds} each, "
        f"{plan.steps} steps, {guidance}."
    )
    if found:
        text += f" {precision(found)}"
    if len(plan.conditions) > 1:
        text += f" Conditions, on the same seeds: {_listed(plan.conditions)}."
    if not run["complete"]:
        return (
            f"{text} The run is not finished: {run['drawn']} pictures were drawn so far. "
            "Start the same audit again to complete it."
        )
    if missing := run["drawn"] - run["measured"]:
        reasons = _listed([name for name in run["status"] if name != "ok"])
        text += f" {_count(missing, 'picture')} could not be measured ({reasons})."
    return text


def precision(found: Mapping[str, Any]) -> str:
    """What a precision came to: pictures drawn, pictures that a fixed number would have taken."""
    ended = found["ended"]
    text = (
        f"Seeds {'were' if ended else 'are'} drawn in rounds until the 95 % interval of mean "
        f"{measure_name(found['measure'])} of a profession, with every word and under every "
        f"condition, {'was' if ended else 'is'} within \N{PLUS-MINUS SIGN}{found['target']:g}."
    )
    if not ended:
        there = sum(row["reached"] for row in found["professions"])
        return f"{text} So far {_count(there, 'profession')} came to that."
    if found["pictures_fixed"] is not None:
        saved = found["saved"]
        text += (
            f" That took {_count(found['pictures'], 'picture')}; one number of seeds for every "
            f"profession would have taken {found['pictures_fixed']} for the widest interval to be "
            f"as narrow ({abs(100 * saved):.0f} % {'fewer' if saved >= 0 else 'more'} were drawn)."
        )
    widths = {row["profession"]: row["half_width"] for row in found["professions"]}
    told = [
        f"{name} ({'nothing measured' if widths[name] is None else f'±{widths[name]:.3f}'})"
        for name in found["not_reached"]
    ]
    return f"{text} Not reached by {_listed(told)}." if told else text


def console(plan: AuditPlan, summary: Summary) -> list[str]:
    """The lines that ``biasmap audit`` prints: the words of the report's first screen."""
    lines = [headline(plan, summary)]
    for axis in plan.axes:
        lines += [f"{axis}: {text}" for text in first_screen(axis, plan, summary)]
    for condition in plan.conditions[1:]:
        lines += [f"{condition}: {text}" for text in changes(condition, plan, summary)]
    return lines


def first_screen(axis: str, plan: AuditPlan, summary: Summary) -> list[str]:
    """The answers for one axis: the verdict, how often, where, for which professions."""
    over = {word: _over_professions(axis, word, plan, summary) for word in plan.axes[axis]}
    if not any(over.values()):
        return ["Nothing was measured on this axis yet.", *_shares(axis, plan, summary)]
    beside = " and control words" if any(len(rows) > 1 for rows in over.values()) else ""
    verdicts: dict[str, list[str]] = {}
    for word, rows in over.items():
        lows = [row["low"] for row in rows.values()]
        shown = "is shown" if all(low > 0 for low in lows) else "is not shown"
        known = bool(lows) and pd.notna(lows[0])
        told = shown if known else "cannot be told with these pictures"
        verdicts.setdefault(told, []).append(f"“{word}”")
    told = _listed([f"{verdict} for {_listed(words)}" for verdict, words in verdicts.items()])
    total = len(plan.professions)
    about = "this profession" if total == 1 else "professions like these"
    texts = [
        f"Verdict for {about}: overlap with {axis} beyond chance{beside} {told}.",
        *_shares(axis, plan, summary),
        _where(axis, plan, summary),
    ]
    if total > 1:
        counts = [
            f"{len(names) or 'none'} with “{word}”"
            + (f" ({_listed(names)})" if 0 < len(names) < 6 else "")
            for word, names in surely_above(axis, plan, summary).items()
        ]
        texts.append(f"Of {total} professions, overlap beyond chance{beside}: {_listed(counts)}.")
    return texts


def _rows(axis: str, plan: AuditPlan, summary: Summary, **more: Any) -> pd.DataFrame:
    """Figures of the lead measure under the first condition."""
    names = {"condition": plan.conditions[0], "axis": axis, "part": "", "baseline": ""}
    return summary.find(**names, **lead(plan), **more)


def _over_professions(
    axis: str, word: str, plan: AuditPlan, summary: Summary
) -> dict[str, pd.Series[Any]]:
    """Control -> distance of the lead measure from it; chance, named "", is the first.

    The mean over professions; of a plan with one profession, that profession's own.
    """
    scope = "profession" if len(plan.professions) == 1 else "overall"
    rows = _rows(axis, plan, summary, word=word, scope=scope)
    chance = where(rows, quantity="corrected").dropna(subset="estimate")
    controls = where(rows, quantity="difference", control=NEGATIVE)
    return {str(row["control"]): row for _, row in pd.concat([chance, controls]).iterrows()}


def _shares(axis: str, plan: AuditPlan, summary: Summary) -> list[str]:
    words, condition = plan.axes[axis], plan.conditions[0]
    rows = summary.find(condition=condition, axis=axis, quantity="share")
    texts = []
    for word in words[1:] if len(words) == 2 else words:
        own = where(rows, word=word).sort_values("estimate", kind="stable")
        if own.empty:
            continue
        least, most = own.iloc[0], own.iloc[-1]
        text = f"How often: the classifier reads “{word}” in {_whole(least)}"
        if len(own) > 1:
            text += f" ({least['profession']}) to {_whole(most)} ({most['profession']})"
        text += " of the pictures of a profession."
        if len(words) == 2:
            n, apart = int(own["n"].max()), int(((own["low"] > 0.5) | (own["high"] < 0.5)).sum())
            counts = [k / n for k in range(n + 1) if (share_interval(k, n).low or 0.0) > 0.5]
            tells = "no share can be told from it"
            if counts:
                least_told, most_told = 100 * counts[0], 100 - 100 * counts[0]
                tells = (
                    f"only shares from {least_told:.0f} % up or {most_told:.0f} % down can be told"
                )
                tells += " from it"
            text += f" {apart} of {len(own)} surely differ from one half; with {n} pictures per "
            text += f"profession {tells}."
        texts.append(text)
    return texts


def _where(axis: str, plan: AuditPlan, summary: Summary) -> str:
    rows = _rows(axis, plan, summary, scope="overall", control="")
    means = where(rows, quantity="mean").set_index("word")
    chance = where(rows, quantity="chance")["estimate"].mean()
    name = measure_name(plan.measure)
    generic = (f"the {name} of the profession and “{{word}}” is {{x}}", "“{word}” {x}")
    told = [
        _WHERE.get(plan.measure, generic)[bool(index)].format(x=_whole(means.loc[word]), word=word)
        for index, word in enumerate(word for word in plan.axes[axis] if word in means.index)
    ]
    n = int(means["n"].max())
    average = "" if n == 1 else f"averaged over {n} professions, "
    return f"Where: {average}{_listed(told)} (chance {100 * chance:.0f} %)."


def above_chance(rows: pd.DataFrame) -> pd.Series[bool]:
    """Word and profession -> whether one measure lies above chance after Holm's correction."""
    own = where(rows, scope="profession", control="", baseline="", quantity=["mean", "corrected"])
    wide = own.pivot(index=["word", "profession"], columns="quantity").reindex(
        columns=[("estimate", "corrected"), ("p_adjusted", "mean")]
    )
    return (wide["estimate", "corrected"] > 0) & (wide["p_adjusted", "mean"] <= 0.05)


def surely_above(axis: str, plan: AuditPlan, summary: Summary) -> dict[str, list[str]]:
    """Word -> professions whose lead measure exceeds chance and every control word.

    Chance after Holm's correction, control words by the interval of the difference.
    """
    above = above_chance(_rows(axis, plan, summary))
    rows = _rows(axis, plan, summary, scope="profession", quantity="difference", control=NEGATIVE)
    lost = rows[~(rows["low"] > 0)][["word", "profession"]]
    beaten = set(lost.itertuples(index=False, name=None))
    return {
        word: [
            profession
            for profession in plan.professions
            if above.get((word, profession), False) and (word, profession) not in beaten
        ]
        for word in plan.axes[axis]
    }


def details(axis: str, plan: AuditPlan, summary: Summary) -> list[str]:
    """The statistics behind `first_screen`: intervals, controls, planted truth, other measures."""
    condition = plan.conditions[0]
    rows = summary.find(condition=condition, axis=axis, part="", control="", baseline="")
    tested = where(rows, scope="profession", quantity="corrected")
    texts = []
    for (measure, setting), _ in tested.groupby(["measure", "setting"]):
        family = where(rows, measure=measure, setting=setting)
        above = above_chance(family)
        overall = where(family, scope="overall")
        told = [
            f"{interval(row)} with “{row['word']}” ({int(above[row['word']].sum())} of "
            f"{len(above[row['word']])} professions above chance)"
            for _, row in where(overall, quantity="mean").iterrows()
        ]
        level = where(overall, quantity="chance")["estimate"].mean()
        name = f"{_capital(measure_name(measure))}, {regions(setting)}"
        texts.append(f"{name}: {_listed(told)}; chance {number(level, 2)}.")
    texts += [_beside(axis, word, plan, summary) for word in plan.axes[axis]]
    ranks = summary.find(condition=condition, axis=axis, quantity="rank", **lead(plan))
    texts += [rank(row) for _, row in ranks.iterrows()]
    texts.append(
        "The interval of a mean over professions is about professions like these: professions and "
        "seeds are both resampled. The interval of one profession is about this profession with "
        "other seeds, and so are the p values. “Above chance” is corrected by Holm over all "
        "professions and words."
    )
    return [text for text in texts if text]


def _beside(axis: str, word: str, plan: AuditPlan, summary: Summary) -> str:
    """Whether the lead measure exceeds the control words."""
    rows = _over_professions(axis, word, plan, summary)
    known = {kind: row for kind, row in rows.items() if kind and pd.notna(row["low"])}
    lost = {kind: row for kind, row in known.items() if not row["low"] > 0}
    told = [
        f"{control_name(kind, plan)} (by {interval(row, 3)})"
        for kind, row in (lost or known).items()
    ]
    verb = "is not shown to exceed" if lost else "exceeds"
    name = _capital(measure_name(plan.measure))
    return f"{name} with “{word}” {verb} {_listed(told)}." if told else ""


def rank(row: pd.Series[Any]) -> str:
    """Whether a measure follows what is planted: what the interval says, no more."""
    planted = row["baseline"]
    name = f"{_capital(measure_name(row['measure']))} with “{row['word']}”"
    if pd.isna(row["estimate"]):
        return f"{name}: no rank correlation with the {planted} can be computed (n = {row['n']})."
    told = f"Spearman {RHO} = {interval(row)}, n = {row['n']} professions"
    if pd.isna(row["low"]):
        return f"{name}: {told}; without an interval it is open whether it follows the {planted}."
    if row["low"] > 0:
        return f"{name} rises with the {planted} ({told})."
    falls = row["high"] < 0
    verb = "falls with" if falls else "is not shown to follow"
    caution = ""
    if planted == "planted overlap":
        caution = (
            ": it ranks these professions backwards, so a higher value is not more overlap"
            if falls
            else "; differences between professions must not be read as differences in overlap"
        )
    return f"{name} {verb} the {planted} ({told}){caution}."


def changes(condition: str, plan: AuditPlan, summary: Summary) -> list[str]:
    """What a condition changes against the first one, on the same seeds."""
    rows = summary.find(scope="overall", condition=condition, baseline=plan.conditions[0])
    measures = {plan.measure: plan.setting}
    measures.setdefault("iou", f"{plan.fractions[0]:.10g}")
    texts = []
    for measure, setting in measures.items():
        own = where(rows, measure=measure, setting=setting, quantity="difference")
        for _, row in own.iterrows():
            texts.append(_change(f"{measure_name(measure)} with “{row['word']}”", row))
    for _, row in where(rows, quantity="share difference").iterrows():
        texts.append(_change(f"the share of pictures read as “{row['word']}”", row))
    if condition == GUIDED:
        texts.append(
            "Guidance acts on the overlap of maps that are made while it does so: a lower overlap "
            "shows that it reached its own aim, not that the pictures bind the two words less."
        )
    return texts


def _change(name: str, row: pd.Series[Any]) -> str:
    if pd.isna(row["estimate"]):
        return f"{_capital(name)}: nothing was measured under both conditions."
    if pd.isna(row["low"]):
        return f"{_capital(name)} changes by {interval(row, 3)}; no interval can be given."
    if row["low"] <= 0 <= row["high"]:
        return f"No change of {name} is shown: {interval(row, 3)}."
    if row["estimate"] > 0:
        return f"{_capital(name)} rises by {interval(row, 3)}."
    fall = {"estimate": -row["estimate"], "low": -row["high"], "high": -row["low"]}
    return f"{_capital(name)} falls by {interval(fall, 3)}."


def limits(plan: AuditPlan, summary: Summary) -> list[str]:
    """What the numbers do not carry."""
    axes = "; ".join(f"{axis}: {', '.join(words)}" for axis, words in plan.axes.items())
    texts = [
        "Overlap of attention maps shows that two words attend to the same pixels. It is not "
        "evidence of a cause, and not of what viewers of the pictures see.",
        "The chance level holds for two unrelated regions of this size. Two words that have "
        "nothing to do with each other can exceed it on one centred face, because both avoid the "
        "background; a value at or below chance does not show that two words are apart.",
        "Regions of a fixed size are partly background if what a word draws is small.",
        "Control words are other words, not neutral ones. Exceeding them is needed for a claim, "
        "and is no proof of it.",
        "Figures hold for these prompts; other words for the same thing were not drawn.",
        f"The demographic words are this plan's ({axes}). They are captions' words, coarse and "
        "mostly binary, and describe how something is depicted, not persons.",
        "This is not a fairness metric in any legal sense, and passing it certifies nothing.",
    ]
    if isinstance(plan.attribution_template, str):
        texts.append(
            "Profession and demographic word share one attribution prompt, as in the published "
            "method: they compete for pixels, and the later word has seen the earlier one."
        )
    if plan.precision is not None:
        texts.append(
            f"Seeds were drawn until the intervals of mean {measure_name(plan.measure)} were "
            "narrow. Those intervals allow for it; every other interval and test takes the number "
            "of seeds as given (docs/statistics.md)."
        )
    if len(summary.find(quantity="planted")):
        texts.append(
            "The embedded model draws a convention with a planted bias. It shows whether the "
            "instrument measures what it says, and nothing about people or other models."
        )
    if len(summary.find(quantity="share")):
        texts.append(
            "Shares count what a classifier reads in the pictures; its errors are not in the "
            "intervals."
        )
    return texts


def _whole(row: Any) -> str:
    return f"{100 * row['estimate']:.0f} %"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
