"""What a report says in words: made from the summary, and claiming no more than its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .plan import AuditPlan

RHO = "\N{GREEK SMALL LETTER RHO}"
_DASH = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def number(value: float | None, digits: int = 3) -> str:
    """A value with fixed digits; a dash where there is none."""
    return _DASH if value is None else f"{value:.{digits}f}".replace("-", _MINUS)


def interval(figure: Mapping[str, Any] | None, digits: int = 2) -> str:
    """Value and interval: ``"0.31 [0.28, 0.34]"``; without an interval the value alone."""
    if figure is None or figure["value"] is None:
        return _DASH
    value = number(figure["value"], digits)
    if figure["low"] is None:
        return f"{value} (no interval, n = {figure['n']})"
    return f"{value} [{number(figure['low'], digits)}, {number(figure['high'], digits)}]"


def percent(figure: Mapping[str, Any] | None) -> str:
    """A share in percent with its interval: ``"35 [18, 57]"``."""
    if figure is None or figure["value"] is None:
        return _DASH
    value = f"{100 * figure['value']:.0f}"
    if figure["low"] is None:
        return value
    return f"{value} [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]"


def headline(plan: AuditPlan, summary: Mapping[str, Any]) -> str:
    """What was audited, in one sentence."""
    run = summary["run"]
    guidance = (
        "without classifier-free guidance"
        if plan.guidance_scale <= 1
        else f"guidance scale {plan.guidance_scale:g}"
    )
    drawn = [row["seeds"] for row in (summary["precision"] or {}).get("professions", [])]
    seeds = _count(len(plan.seeds), "seed")
    if drawn:
        seeds = (f"{min(drawn)} to " if min(drawn) < max(drawn) else "") + _count(
            max(drawn), "seed"
        )
    partly = run["images_measured_in_part"]
    text = (
        f"{run['images_measured']} of {run['images_planned']} pictures measured"
        + (f" ({partly} of them not with every word): " if partly else ": ")
        + f"{_count(len(plan.professions), 'profession')}, {seeds} each, "
        f"{plan.steps} steps, {guidance}."
    )
    if summary["precision"] is not None:
        text += f" {precision(summary['precision'])}"
    if len(plan.conditions) > 1:
        text += f" Conditions, on the same seeds: {_listed(list(plan.conditions))}."
    if run["complete"] and (failed := run["images_drawn"] - run["images_measured"]):
        reasons = _listed([name for name in run["status"] if name != "ok"])
        text += f" {_count(failed, 'picture')} could not be measured ({reasons})."
    if not run["complete"]:
        text += (
            f" The run is not finished: {run['images_drawn']} pictures were drawn so far. "
            "Start the same audit again to complete it."
        )
    return text


def precision(found: Mapping[str, Any]) -> str:
    """What a precision came to: pictures drawn, those a fixed number would have taken, the rest.

    Args:
        found: ``summary["precision"]``.
    """
    measure = _measure(found["measure"])
    goal = (
        f"in rounds until the 95 % interval of mean {measure} of a profession, with every word and "
        f"under every condition, {'was' if found['ended'] else 'is'} within "
        f"\N{PLUS-MINUS SIGN}{found['target']:g}."
    )
    if not found["ended"]:
        there = sum(row["reached"] for row in found["professions"])
        return f"Seeds are drawn {goal} So far {_count(there, 'profession')} came to that."
    texts = [f"Seeds were drawn {goal}"]
    if found["images_fixed"] is not None:
        saved = found["saved"]
        texts.append(
            f"That took {_count(found['images'], 'picture')}; with one number of seeds for every "
            f"profession the widest interval would have taken {found['images_fixed']} to be as "
            f"narrow ({abs(100 * saved):.0f} % {'fewer' if saved >= 0 else 'more'} were drawn)."
        )
    if found["not_reached"]:
        widths = {row["semantic"]: row["half_width"] for row in found["professions"]}
        told = [
            f"{p} (" + ("nothing measured" if w is None else f"±{w:.3f}") + ")"
            for p in found["not_reached"]
            for w in [widths[p]]
        ]
        texts.append(f"Not reached by {_listed(told)}.")
    return " ".join(texts)


def finding(axis: str, summary: Mapping[str, Any]) -> str:
    """What the intervals of one axis say at the plan's first percentile, in one sentence."""
    rows = _first_percentile(axis, summary)
    if not rows:
        return "Nothing was measured on this axis yet."
    measured = [row for row in rows if row["with_interval"]]
    if not measured:
        return (
            "No interval can be given: it takes at least two measured pictures of a profession "
            "whose IoU differ."
        )
    above = _listed(
        [
            f"{row['above']} of {_count(row['with_interval'], 'profession')} with "
            f"“{row['demographic']}”"
            for row in measured
        ]
    )
    below = _listed([f"{row['below']} with “{row['demographic']}”" for row in measured])
    without = {row["demographic"]: row["professions"] - row["with_interval"] for row in rows}
    text = (
        f"The 95 % interval of mean IoU lies above the chance level {measured[0]['chance']:.3f} "
        f"for {above}; below it for {below}."
    )
    if any(without.values()):
        told = [f"{n} with “{word}”" for word, n in without.items() if n]
        text += f" No interval can be given for {_listed(told)}."
    return text


def contained(axis: str, plan: AuditPlan, summary: Mapping[str, Any]) -> list[str]:
    """What containment says of one axis: the finding, and how far the measure can be trusted."""
    found = summary["containment"]
    if found is None:
        return []
    condition = summary["run"]["conditions"][0]
    rows = [row for row in found["overall"] if (row["axis"], row["condition"]) == (axis, condition)]
    counts = {
        row["demographic"]: row
        for row in found["comparisons"]
        if (row["axis"], row["condition"]) == (axis, condition) and row["with_interval"]
    }
    told = [row for row in rows if row["containment"]["value"] is not None]
    if not told:
        return []
    parts = [
        f"{interval(row['containment'])} with “{row['demographic']}”"
        + _of_some(row["containment"]["n"], len(plan.professions))
        + _above_chance(counts.get(row["demographic"]))
        for row in told
    ]
    own, other = (f"{100 * fraction:g} %" for fraction in plan.containment.fractions)
    texts = [
        f"Of the place of the profession (the top {own} of its word's map) the part inside the "
        f"place of the demographic word (the top {other}) is, mean over professions, "
        f"{_listed(parts)}; {other} would be inside by chance."
    ]
    texts += _controls(axis, plan, summary, found["controls"], "containment in")
    texts += [
        rank(row)
        for row in found["rank"]
        if (row["axis"], row["condition"], row["against"]) == (axis, condition, "overlap")
    ]
    texts.append(
        "It is no size of the overlap: where that was planted, a value at or below chance did not "
        "show that the two are apart (docs/validity.md)."
    )
    return texts


def _of_some(n: int, professions: int) -> str:
    """Of how many professions a mean is, where it is not of all."""
    return "" if n == professions else f" (of {_count(n, 'profession')} that could be measured)"


def _above_chance(row: Mapping[str, Any] | None) -> str:
    """How many professions lie above chance, of those that have an interval."""
    if row is None:
        return ""
    known = row["with_interval"]
    some = "" if known == row["professions"] else " that " + ("has" if known == 1 else "have")
    return f" (above chance for {row['above']} of {_count(known, 'profession')}" + (
        f"{some} an interval)" if some else ")"
    )


def difference(row: Mapping[str, Any]) -> str:
    """What a condition changed in the measured IoU with one word, and whether the interval has 0.

    Example:
        >>> change = {"value": -0.06, "low": -0.08, "high": -0.04, "n": 20}
        >>> row = {"condition": "guided", "baseline": "plain", "demographic": "man", "iou": change}
        >>> difference({**row, "percentile": 70.0, "baseline_iou": 0.31, "condition_iou": 0.25})
        'With “man”, mean IoU is 0.310 plain and 0.250 guided: −0.060 [−0.080, −0.040] ...'
    """
    name, text = ("iou", "IoU") if "iou" in row else ("containment", "containment")
    figure = row[name]
    if figure["value"] is None:
        return f"With “{row['demographic']}”, nothing was measured under both conditions."
    text = (
        f"With “{row['demographic']}”, mean {text} is {number(row[f'baseline_{name}'])} "
        f"{row['baseline']} and {number(row[f'condition_{name}'])} {row['condition']}: "
        f"{interval(figure, 3)} on the same seeds, mean over {_count(figure['n'], 'profession')}"
    )
    if figure["low"] is None:
        return f"{text}; no interval can be given (too few pictures, or no variation)."
    holds_zero = figure["low"] <= 0.0 <= figure["high"]
    return f"{text}; the interval holds 0." if holds_zero else f"{text}."


def p_value(p: float | None) -> str:
    """A p value with three digits, never as 0; a dash where there is none.

    Example:
        >>> p_value(0.0312), p_value(0.0002)
        ('0.031', '< 0.001')
    """
    if p is None:
        return _DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def control_name(kind: str, plan: AuditPlan) -> str:
    """What a control is called in text: ``"seed-shuffled null"``, ``"“person”"``."""
    fixed = {
        "shuffled": "the seed-shuffled null",
        "swapped": "the order swapped",
        "synonym": "a synonym of the profession",
    }
    if kind in fixed:
        return fixed[kind]
    return f"“{plan.controls.words[kind]}”" if plan.controls is not None else kind


def controls(axis: str, plan: AuditPlan, summary: Mapping[str, Any]) -> list[str]:
    """Whether the IoU of one axis beats its null and its controls, a sentence or two a word."""
    rows = [
        row for row in summary["controls"] if row["percentile"] == summary["run"]["percentiles"][0]
    ]
    return _controls(axis, plan, summary, rows, "overlap with")


def _controls(
    axis: str,
    plan: AuditPlan,
    summary: Mapping[str, Any],
    rows: list[Mapping[str, Any]],
    what: str,
) -> list[str]:
    texts: list[str] = []
    for row in rows:
        if (row["axis"], row["condition"]) != (axis, summary["run"]["conditions"][0]):
            continue
        alone = len(row["professions"]) == 1  # whose own intervals are all there is
        figures = row["professions"][0] if alone else row["overall"]
        told = {kind: figures[kind]["difference"] for kind in row["exceeds"] if figures.get(kind)}
        known = {kind: figure for kind, figure in told.items() if figure["low"] is not None}
        if not known:
            continue
        lost = [kind for kind, figure in known.items() if figure["low"] <= 0.0]
        names = {kind: control_name(kind, plan) for kind in row["exceeds"]}
        text = ""
        if lost:
            text = (
                f"The {what} “{row['demographic']}” does not beat its controls: "
                + ("" if alone else "on average over professions ")
                + "it is not shown to exceed "
                + _listed([f"{names[k]} (difference {interval(known[k], 3)})" for k in lost])
                + "."
            )
        else:
            text = (
                ("The" if alone else "On average over professions the")
                + f" {what} “{row['demographic']}” exceeds "
                + _listed([f"{names[k]} (by {interval(f, 3)})" for k, f in known.items()])
                + "."
            )
        if row["above"]:
            counts = [
                f"{n} {'exceeds' if n == 1 else 'exceed'} {names[kind]}"
                for kind, n in row["exceeds"].items()
                if has_intervals(row, kind)
            ]
            if counts:
                above = _count(row["above"], "profession")
                text += f" Of the {above} above chance, {_listed(counts)}."
        if "shuffled" in lost and not any("Not exceeding" in told for told in texts):
            text += (
                " Not exceeding the seed-shuffled null: the usual places of the two words overlap, "
                "and it is not shown that they do so picture by picture; where layouts barely "
                "move, that null holds the signal itself."
            )
        texts.append(text)
    return texts


def has_intervals(row: Mapping[str, Any], kind: str) -> bool:
    """Whether any profession's difference from a control has an interval, to be counted by."""
    found = (one[kind]["difference"] for one in row["professions"] if kind in one)
    return any(figure["low"] is not None for figure in found)


def guided_maps() -> str:
    """What a lower IoU under guidance does and does not say."""
    return (
        "Guidance acts on an overlap of maps, and these maps are made while it does so. How their "
        "IoU changes shows whether it reached its own aim; it does not show that the pictures bind "
        "the two concepts any less."
    )


def multiplicity(axis: str, summary: Mapping[str, Any]) -> str:
    """How many comparisons the finding makes, and what remains of it after Bonferroni."""
    run = summary["run"]
    rows = [
        row
        for row in summary["comparisons"]
        if (row["axis"], row["condition"]) == (axis, run["conditions"][0]) and row["with_interval"]
    ]
    if not rows:
        return ""
    count = rows[0]["comparisons"]
    several = len(run["percentiles"]) > 1
    kept = _listed(
        [
            f"{row['above_bonferroni']} above and {row['below_bonferroni']} below with "
            f"“{row['demographic']}”" + several * f" at percentile {row['percentile']:g}"
            for row in rows
        ]
    )
    return (
        f"Up to {_count(count, 'interval')} at 95 %{several * ' at each percentile'}: without any "
        f"effect about {round(0.05 * count, 1):g} of them would miss the chance level by "
        "accident. With the error level shared out over all of them (Bonferroni) there remain "
        f"{kept}."
    )


def rank(row: Mapping[str, Any]) -> str:
    """Whether measured IoU followed what is planted: what the interval says, no more."""
    figure = row["spearman"]
    planted = "planted overlap" if row["against"] == "overlap" else "planted share"
    where = f"Containment in “{row['demographic']}”"
    if "percentile" in row:
        where = f"IoU with “{row['demographic']}” at percentile {row['percentile']:g}"
    if figure["value"] is None:
        return f"{where}: no rank correlation can be computed (n = {figure['n']})."
    told = f"Spearman {RHO} = {interval(figure)}, n = {figure['n']} professions"
    if figure["low"] is None:
        return (
            f"{where}: {told}; without an interval it stays open whether it follows the {planted}."
        )
    if figure["low"] > 0:
        return f"{where} rose with the {planted} ({told})."
    overlap = row["against"] == "overlap"
    if figure["high"] < 0:
        return f"{where} fell as the {planted} rose ({told})" + (
            ": in this form the measure ranks these professions backwards, so a higher value must "
            "not be read as more entanglement."
            if overlap
            else "."
        )
    return f"{where} did not visibly follow the {planted} ({told}: the interval holds 0)" + (
        "; differences between professions must not be read as differences in entanglement."
        if overlap
        else "."
    )


def shares(axis: str, summary: Mapping[str, Any]) -> str:
    """How many share intervals of an axis hold the planted share under the first condition."""
    part = (axis, summary["run"]["conditions"][0])
    held = [row for row in summary["testbed"]["shares"] if (row["axis"], row["condition"]) == part]
    compared, covered = (sum(row[name] for row in held) for name in ("compared", "covered"))
    asked = [
        row["semantic_right"]
        for row in summary["shares"]
        if (row["axis"], row["condition"]) == part
    ]
    pictures = sum(figure["n"] for figure in asked)
    right = sum(round(figure["value"] * figure["n"]) for figure in asked)
    return (
        f"The classifier reads the profession that was asked for in {right} of {pictures} "
        "pictures. "
        f"The Wilson intervals of {covered} of {compared} demographic shares hold the planted "
        f"share; intervals that are right would hold about {round(0.95 * compared)}."
    )


def limits(plan: AuditPlan, summary: Mapping[str, Any]) -> list[str]:
    """What the numbers do not carry."""
    texts = [
        "Overlap of attention maps is evidence that two words attend to the same place of a "
        "picture. It is not evidence of a cause, and not of what viewers of the pictures see.",
        "The chance level holds for two unrelated masks of this size. Two words that have nothing "
        "to do with each other can still exceed it on one centred face, because both avoid the "
        "background; and maps that compete for one softmax can fall below it. A mask of the top "
        f"{100 - plan.percentiles[0]:g} % is mostly background where the region is small.",
        "Control words are other words, not neutral ones: each brings its own meaning and its own "
        "place in the picture. Exceeding them is needed for a claim, and is not proof of one.",
        "Intervals reflect the seeds drawn here. The mean over professions describes professions "
        "like these; a profession's interval says nothing about prompts in other words.",
        "The demographic words are this plan's words ("
        + "; ".join(f"{axis}: {', '.join(words)}" for axis, words in plan.axes.items())
        + "). They are captions' words, coarse and mostly binary, and describe how something is "
        "depicted, not persons.",
        "This is not a fairness metric in any legal sense, and passing it certifies nothing.",
    ]
    if plan.precision is not None:
        texts.append(
            f"Seeds were drawn until the intervals of mean {_measure(plan.measure)} were narrow. "
            "Those intervals allow for it; every other interval and test takes the number of seeds "
            "as given, which holds as far as the spread of one figure says nothing of the mean of "
            "another (docs/statistics.md)."
        )
    if isinstance(plan.attribution_template, str):
        texts.insert(
            2,
            "Profession and demographic word stand in one attribution prompt, as in the published "
            "method. They share one softmax and so compete for pixels, and in a causal text "
            "encoder the later word has seen the earlier one.",
        )
    if summary["testbed"] is not None:
        texts.append(
            "The testbed is a drawing convention with a planted bias. It shows whether the "
            "instrument measures what it says; it says nothing about people or other models."
        )
    if summary["shares"]:
        texts.append(
            "Shares count what a classifier reads in the pictures; its errors are not in the "
            "intervals."
        )
    return texts


def _first_percentile(axis: str, summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Comparisons of the first condition at the first percentile."""
    run = summary["run"]
    wanted = (axis, run["conditions"][0], run["percentiles"][0])
    return [
        row
        for row in summary["comparisons"]
        if (row["axis"], row["condition"], row["percentile"]) == wanted
    ]


def _measure(name: str) -> str:
    return "IoU" if name == "iou" else name


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
