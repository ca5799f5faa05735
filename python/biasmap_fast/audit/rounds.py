"""As many images as needed: seeds drawn in rounds until every interval of a profession is narrow.

A run with ``precision`` h draws the plan's seeds first, then further seeds in rounds. A profession
stops as soon as, at the end of a round, the 95 % half-width (`statistics.half_width`) of the mean
of the plan's measure is at most h for each of its words under each condition. The interval that is
then shown is mean +- h: the fixed-width interval of Chow and Robbins ("On the asymptotic theory of
fixed-width sequential confidence intervals for the mean", Annals of Mathematical Statistics 36,
1965), whose coverage tends to the nominal one as h falls. The rule looks at the spread alone, never
at the mean; a confidence sequence, valid at every image and for any rule, would be wider.

Three things keep it from stopping on a spread that is small by accident: half-widths carry a term
for that, so none is within h before about 1 / h images; rounds grow by a fifth, so the spread is
looked at a dozen times and not at every image; and so a profession has mostly a few images more
than it needs (for normal values a few more are all it takes: Simons, ibid. 39, 1968).
docs/statistics.md has the coverage that was simulated.

What is drawn next follows from the plan and the records alone, at the same boundaries for all: a
run that was stopped goes on as if it had not been, on any number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .records import OK
from .statistics import ALIKE, FIXED_WIDTH, half_width, images_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .plan import AuditPlan, Unit

GROWTH = 1.2
"""Images of a profession after a round, over those after the round before."""

COLUMNS = (
    *("condition", "semantic", "seed", "axis", "demographic", "percentile"),
    *("status", "iou", "containment"),
)
"""Columns of the records that decide what is drawn next."""

_Part = tuple[str, str, str]  # condition, axis, demographic word


@dataclass(frozen=True)
class State:
    """Where one profession stands after its last whole round.

    Attributes:
        seeds: images of each condition that were drawn for it.
        half_width: of its widest interval; ``None`` where one of them cannot be given.
        narrow: whether that is within the precision.
        spread: standard deviation behind that interval, 0 where values are alike.
    """

    seeds: int
    half_width: float | None
    narrow: bool
    spread: float | None


@dataclass(frozen=True)
class Asked:
    """The pictures that a plan and its records ask for so far.

    Attributes:
        chunks: in batches, of all rounds that have begun.
        last: index of the last round's first chunk.
        ended: whether nothing more will be asked once they are measured.
        rounds: how many rounds have begun.
        professions: profession -> where it stands; none before the first round is whole, and none
            of a plan that fixes its seeds.
    """

    chunks: list[list[Unit]]
    last: int
    ended: bool
    rounds: int
    professions: dict[str, State]

    @property
    def pictures(self) -> int:
        """How many pictures the chunks have."""
        return sum(len(chunk) for chunk in self.chunks)


def boundaries(first: int, most: int) -> Iterator[int]:
    """Images of a profession at the end of each round.

    Args:
        first: of the first round.
        most: of the last.

    Example:
        >>> list(boundaries(50, 100))
        [50, 60, 72, 87, 100]
    """
    count = first
    yield count
    while count < most:
        # in hundredths: 1.2 has no exact double
        count = min(most, max(count + 1, -(-count * round(100 * GROWTH) // 100)))
        yield count


def asked(plan: AuditPlan, rows: Iterable[Mapping[str, Any]] = ()) -> Asked:
    """What is drawn, as far as it can be said: what is left of it is the next round, or nothing.

    Args:
        plan: the run's plan. One without a precision asks for its seeds, whatever the records.
        rows: its records so far, with `COLUMNS` at least.

    Returns:
        The chunks up to the first round of which a picture is missing; to the last one if none is.
    """
    if plan.precision is None or plan.max_seeds is None:
        return Asked(plan.chunks(), 0, True, 1, {})
    drawn, values = _by_profession(plan, rows)
    chunks: list[list[Unit]] = []
    states: dict[str, State] = {}
    going, before, last, number = list(plan.professions), 0, 0, 0
    for number, count in enumerate(boundaries(len(plan.seeds), plan.max_seeds), 1):
        last = len(chunks)
        units = list(plan.units(going, plan.sequence[before:count]))
        chunks += plan.chunks(units)
        if any((u.condition, u.profession, u.seed) not in drawn for u in units):
            return Asked(chunks, last, False, number, states)
        known = set(plan.sequence[:count])
        for profession in going:
            parts = [
                [value for seed, value in part.items() if seed in known]
                for part in values[profession].values()
            ]
            states[profession] = _state(parts, count, plan.precision)
        going = [p for p in going if not states[p].narrow and states[p].half_width is not None]
        before = count
        if not going:
            break
    return Asked(chunks, last, True, number, states)


def figures(plan: AuditPlan, found: Asked) -> dict[str, Any] | None:
    """What the precision came to, as plain values for JSON; ``None`` where the plan has none.

    Args:
        plan: the run's plan.
        found: `asked` of its records.

    Returns:
        ``target``; ``method`` of the intervals; ``images``, as far as rounds are whole;
        ``worst_half_width``; ``images_fixed``, what a fixed number of seeds would have taken to
        come to that width (to the target, where all came to it) for the profession that needs most,
        and so for all; ``saved``, the share of those that was not drawn, negative where more was
        drawn; ``not_reached``, professions whose drawing ended before; and each profession's own.
        Figures that need all professions are ``None`` until the run has ended.
    """
    if plan.precision is None:
        return None
    states = found.professions
    widths = [state.half_width for state in states.values() if state.half_width is not None]
    images = len(plan.conditions) * sum(state.seeds for state in states.values())
    worst = max(widths) if found.ended and len(widths) == len(states) else None
    fixed = None
    if worst is not None:
        seeds = max(_fixed(state, max(worst, plan.precision)) or 0 for state in states.values())
        fixed = len(plan.conditions) * len(plan.professions) * seeds
    return {
        "target": plan.precision,
        "measure": plan.measure,
        "method": FIXED_WIDTH,
        "rounds": found.rounds,
        "ended": found.ended,
        "images": images,
        "worst_half_width": worst,
        "images_fixed": fixed,
        "saved": None if fixed is None else 1 - images / fixed,
        "not_reached": [p for p, state in states.items() if found.ended and not state.narrow],
        "professions": [
            {
                "semantic": profession,
                "seeds": state.seeds,
                "half_width": state.half_width,
                "reached": state.narrow,
                "seeds_fixed": _fixed(state, plan.precision),
            }
            for profession, state in states.items()
        ],
    }


def tell(summary: Any, precision: float) -> None:
    """Adds to every interval's method that its number of seeds was not fixed beforehand.

    Args:
        summary: figures in dicts and lists, of any depth; changed in place. Intervals of fixed
            width say so themselves and stay as they are.
        precision: the plan's.
    """
    if isinstance(summary, list):
        for one in summary:
            tell(one, precision)
        return
    if not isinstance(summary, dict):
        return
    method, low = summary.get("method"), summary.get("low")
    if isinstance(method, str) and low is not None and method != FIXED_WIDTH:
        summary["method"] = f"{method}; seeds drawn until precision {precision:g}"
        return
    for one in summary.values():
        tell(one, precision)


def _by_profession(
    plan: AuditPlan, rows: Iterable[Mapping[str, Any]]
) -> tuple[set[tuple[str, str, int]], dict[str, dict[_Part, dict[int, float]]]]:
    """Pictures that have records, and profession -> part -> seed -> value of the plan's measure."""
    parts = [
        (condition, axis, word)
        for condition in plan.conditions
        for axis, words in plan.axes.items()
        for word in words
    ]
    values: dict[str, dict[_Part, dict[int, float]]] = {
        profession: {part: {} for part in parts} for profession in plan.professions
    }
    drawn = set()
    for row in rows:
        drawn.add((row["condition"], row["semantic"], row["seed"]))
        value = row[plan.measure]
        if row["status"] == OK and row["percentile"] == plan.percentiles[0] and value is not None:
            part = (row["condition"], row["axis"], row["demographic"])
            if part in values.get(row["semantic"], {}):
                values[row["semantic"]][part][row["seed"]] = value
    return drawn, values


def _state(parts: Sequence[Sequence[float]], count: int, precision: float) -> State:
    """Where a profession stands with these values, one list a word and condition."""
    widths = [half_width(values) for values in parts]
    known = [width for width in widths if width is not None]
    if len(known) < len(widths):
        return State(count, None, False, None)
    worst = max(known)
    widest = parts[known.index(worst)]
    spread = 0.0 if float(np.ptp(widest)) <= ALIKE else float(np.std(widest, ddof=1))
    return State(count, worst, worst <= precision, spread)


def _fixed(state: State, width: float) -> int | None:
    """Images of a fixed number for a half-width, where the spread is known."""
    return None if state.spread is None else images_for(state.spread, width)
