"""As many pictures as needed: seeds drawn in rounds until the intervals of a profession are narrow.

A run with ``precision`` h draws the plan's seeds first, then further seeds in rounds. A profession
stops as soon as, at the end of a round, the 95 % half-width (`statistics.half_width`) of the mean
of the plan's measure is at most h for each of its words under each condition. The interval that is
then shown is mean +- h: the fixed-width interval of Chow and Robbins ("On the asymptotic theory of
fixed-width sequential confidence intervals for the mean", Annals of Mathematical Statistics 36,
1965), whose coverage tends to the nominal one as h falls. The rule looks at the spread alone, never
at the mean; a confidence sequence, valid at every picture and for any rule, would be wider.

Three things keep it from stopping on a spread that is small by accident: half-widths carry a term
for that, so none is within h before about 1 / h pictures; rounds grow by a fifth, so the spread is
looked at a dozen times and not at every picture; and so a profession has mostly a few pictures more
than it needs (for normal values a few more are all it takes: Simons, ibid. 39, 1968).
docs/statistics.md has the simulated coverage.

What is drawn next follows from the plan and the records alone, at the same boundaries for all: a
run that was stopped goes on as if it had not been, on any number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .records import EMPTY, OK
from .statistics import ALIKE, FIXED_WIDTH, half_width, images_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

    from .plan import AuditPlan, Picture

GROWTH = 1.2
"""Pictures of a profession after a round, over those after the round before."""

_Part = tuple[str, str, str]  # condition, axis, demographic word


@dataclass(frozen=True)
class State:
    """Where one profession stands after its last whole round.

    Attributes:
        seeds: Pictures of each condition that were drawn for it.
        half_width: Of its widest interval; ``None`` if one of them cannot be given.
        narrow: Whether that is within the precision.
        spread: Standard deviation behind that interval, 0 for values that are alike.
    """

    seeds: int
    half_width: float | None
    narrow: bool
    spread: float | None


@dataclass(frozen=True)
class Asked:
    """The pictures that a plan and its records ask for so far.

    Attributes:
        chunks: In batches, of all rounds that have begun.
        last: Index of the last round's first chunk.
        ended: Whether nothing more will be asked once they are measured.
        rounds: How many rounds have begun.
        professions: Profession -> where it stands; none before the first round is whole, and none
            for a plan that fixes its seeds.
    """

    chunks: list[list[Picture]]
    last: int
    ended: bool
    rounds: int
    professions: dict[str, State]

    @property
    def count(self) -> int:
        """How many pictures the chunks have."""
        return sum(len(chunk) for chunk in self.chunks)


def boundaries(first: int, most: int) -> Iterator[int]:
    """Yields the pictures of a profession at the end of each round, from ``first`` to ``most``.

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


def asked(
    plan: AuditPlan, pictures: pd.DataFrame | None = None, measurements: pd.DataFrame | None = None
) -> Asked:
    """Returns what is drawn, as far as it can be said: what is left of it is the next round.

    Args:
        plan: The run's plan. One without a precision asks for its seeds, whatever the records.
        pictures: Its pictures so far: condition, profession, seed.
        measurements: Its measurements so far.

    Returns:
        The chunks up to the first round of which a picture is missing; to the last if none is.
    """
    if plan.precision is None or plan.max_seeds is None:
        return Asked(plan.chunks(), 0, True, 1, {})
    drawn: set[tuple[str, str, int]] = set()
    if pictures is not None:
        columns = (pictures[name] for name in ("condition", "profession", "seed"))
        drawn = set(zip(*columns, strict=True))
    values = {} if measurements is None else _by_profession(plan, measurements)
    sequence = plan.sequence
    chunks: list[list[Picture]] = []
    states: dict[str, State] = {}
    going, before, last, number = list(plan.professions), 0, 0, 0
    for number, count in enumerate(boundaries(len(plan.seeds), plan.max_seeds), 1):
        last = len(chunks)
        further = list(plan.pictures(going, sequence[before:count]))
        chunks += plan.chunks(further)
        if any((p.condition, p.profession, p.seed) not in drawn for p in further):
            return Asked(chunks, last, False, number, states)
        counted = set(sequence[:count])
        for profession in going:
            parts = [
                [value for seed, value in part.items() if seed in counted]
                for part in values[profession].values()
            ]
            states[profession] = _state(parts, count, plan.precision)
        going = [p for p in going if not states[p].narrow and states[p].half_width is not None]
        before = count
        if not going:
            break
    return Asked(chunks, last, True, number, states)


def figures(plan: AuditPlan, so_far: Asked) -> dict[str, Any] | None:
    """Returns what the precision came to, as plain values; ``None`` for a plan without one.

    ``pictures`` counts those of whole rounds. ``pictures_fixed`` is what a fixed number of seeds
    would have taken to come to the worst half-width (to the target, if all came to it) for the
    profession that needs most, and so for all; ``saved`` the share of those that was not drawn,
    negative if more was. ``not_reached`` names professions whose drawing ended before. Figures that
    need all professions are ``None`` until the run has ended.
    """
    if plan.precision is None:
        return None
    states = so_far.professions
    widths = [state.half_width for state in states.values() if state.half_width is not None]
    pictures = len(plan.conditions) * sum(state.seeds for state in states.values())
    worst = max(widths) if so_far.ended and len(widths) == len(states) else None
    fixed = None
    if worst is not None:
        seeds = max(_fixed(state, max(worst, plan.precision)) or 0 for state in states.values())
        fixed = len(plan.conditions) * len(plan.professions) * seeds
    return {
        "target": plan.precision,
        "measure": plan.measure,
        "method": FIXED_WIDTH,
        "rounds": so_far.rounds,
        "ended": so_far.ended,
        "pictures": pictures,
        "worst_half_width": worst,
        "pictures_fixed": fixed,
        "saved": None if fixed is None else 1 - pictures / fixed,
        "not_reached": [p for p, state in states.items() if so_far.ended and not state.narrow],
        "professions": [
            {
                "profession": profession,
                "seeds": state.seeds,
                "half_width": state.half_width,
                "reached": state.narrow,
                "seeds_fixed": _fixed(state, plan.precision),
            }
            for profession, state in states.items()
        ],
    }


def _by_profession(
    plan: AuditPlan, measurements: pd.DataFrame
) -> dict[str, dict[_Part, dict[int, float]]]:
    """Profession -> part -> seed -> value of the plan's measure."""
    values: dict[str, dict[_Part, dict[int, float]]] = {
        profession: {
            (condition, axis, word): {}
            for condition in plan.conditions
            for axis, words in plan.axes.items()
            for word in words
        }
        for profession in plan.professions
    }
    rows = measurements[
        (measurements["measure"] == plan.measure)
        & (measurements["setting"] == plan.setting)
        & (measurements["part"] == "")
        & (measurements["control"] == "")
        & measurements["status"].isin([OK, EMPTY])
    ]
    columns = ("profession", "condition", "axis", "word", "seed", "value")
    for profession, *part, seed, value in zip(*(rows[name] for name in columns), strict=True):
        values[profession][part[0], part[1], part[2]][seed] = value
    return values


def _state(parts: Sequence[Sequence[float]], count: int, precision: float) -> State:
    """Where a profession stands with these values, one list per word and condition."""
    widths = [half_width(values) for values in parts]
    known = [width for width in widths if width is not None]
    if len(known) < len(widths):
        return State(count, None, False, None)
    worst = max(known)
    widest = parts[known.index(worst)]
    spread = 0.0 if float(np.ptp(widest)) <= ALIKE else float(np.std(widest, ddof=1))
    return State(count, worst, worst <= precision, spread)


def _fixed(state: State, width: float) -> int | None:
    return None if state.spread is None else images_for(state.spread, width)
