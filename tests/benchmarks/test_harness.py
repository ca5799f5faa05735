"""What a benchmark's row says, what is a regression, and what a slope; nothing is timed."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import count

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import (
    Entry,
    Limits,
    Row,
    add_rounds,
    measure,
    newest,
    peak_mib,
    regressions,
    skipped,
    slope,
    slopes,
)


def long_call(run):
    """A clock to which every call is long."""
    run()
    return 100.0


def test_entries_take_turns_and_ratios_are_those_of_a_round(group, clock_of):
    order = []
    slow, fast = (Entry(n, lambda n=n: order.append(n), calls=c) for n, c in (("a", 1), ("b", 2)))
    # warm-up, then three rounds, the second backwards; the machine is ten times slower in it
    times = [99.0, 99.0, 4.0, 4.0, 40.0, 40.0, 4.0, 2.0]
    first, second = measure(group(slow, fast), [slow, fast], None, clock_of(times))
    assert order == [*"ab", *"ab", *"ba", *"ab"]
    assert first.times_ms == [4.0, 40.0, 4.0]
    assert second.times_ms == [2.0, 20.0, 1.0]
    assert (first.ratio, second.ratio) == (1.0, 0.5)
    assert second.ratio_quartiles == (0.375, 0.5)
    assert second.median_ms == 2.0


def test_only_the_named_entry_warms_up(group):
    order = []
    entries = [Entry(n, lambda n=n: order.append(n)) for n in "ab"]
    measure(group(*entries, rounds=2, warm_up="b"), entries, None, long_call)
    assert order == [*"b", *"ab", *"ba"]


def test_a_short_call_is_timed_many_times_in_a_row(group, monkeypatch):
    now = 0.0
    order = []

    def take(name, milliseconds):
        nonlocal now
        order.append(name)
        now += milliseconds / 1e3

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)
    entries = [
        Entry("short", lambda: take("short", 4.0)),
        Entry("long", lambda: take("long", 30.0)),
    ]
    short, long = measure(group(*entries, rounds=2), entries, None)
    turn = ["short"] * 5  # 20 ms together
    assert order == ["short"] * 2 + ["long"] + [*turn, "long"] + ["long", *turn]
    assert short.times_ms == [4.0, 4.0]
    assert long.times_ms == [30.0, 30.0]


def test_a_second_measurement_adds_its_rounds(group, clock_of):
    entries = [Entry("base", lambda: None), Entry("ours", lambda: None, ours=True)]

    def rows(*times):
        warm_up = [1.0, 1.0]
        return measure(group(*entries, rounds=2), entries, None, clock_of([*warm_up, *times]))

    first = rows(1.0, 2.0, 4.0, 1.0)
    add_rounds(first, rows(10.0, 10.0, 1.0, 1.0))
    assert first[1].times_ms == [2.0, 4.0, 10.0, 1.0]
    assert (first[1].rounds, first[1].ratio) == (4, 1.5)
    failed = rows(1.0, 2.0, 1.0, 2.0)
    failed[1].status = "failed: RuntimeError: now"
    add_rounds(first, failed)
    assert first[1].rounds == first[0].rounds == 4


def test_what_fails_or_is_not_run_is_no_number(group):
    def broken():
        raise RuntimeError("out of\norder")

    entries = [
        Entry("base", lambda: 1.0),
        Entry("broken", broken),
        Entry("cannot", None, status="cannot: one image a call"),
        Entry("wrong", lambda: 1.0, error=lambda found: abs(found - 1.5), tolerance=0.1),
        Entry("shape", lambda: [1.0], error=lambda found: abs(found - 1.5)),
        Entry("nan", lambda: 1.0, error=lambda found: math.nan, tolerance=0.1),
    ]
    rows = {row.name: row for row in measure(group(*entries), entries, None)}
    assert rows["base"].status == "ok"
    assert rows["broken"].status == "failed: RuntimeError: out of order"
    for name in ("broken", "cannot"):
        assert rows[name].median_ms is rows[name].ratio is rows[name].quartiles_ms is None
    assert rows["cannot"].status == "cannot: one image a call"
    assert rows["wrong"].status.startswith("failed: error 5.0e-01")
    assert rows["shape"].status.startswith("failed: TypeError")
    assert rows["nan"].status.startswith("failed: error nan")
    assert skipped(group(), "no time").status == "skipped: no time"
    assert skipped(group(), "no time").median_ms is None


def test_the_error_is_that_of_the_first_call(group):
    calls = count()
    entries = [Entry("rotating", lambda: next(calls), error=float)]
    (row,) = measure(group(*entries), entries, None)
    assert row.error == 0.0


def test_without_a_baseline_there_is_no_ratio(group):
    entries = [Entry("base", None, status="skipped: not given"), Entry("other", lambda: None)]
    rows = measure(group(*entries), entries, None)
    assert rows[1].median_ms is not None
    assert rows[1].ratio is None


def test_after_the_deadline_two_rounds_are_made(group):
    runs = count()
    entries = [Entry("base", lambda: next(runs))]
    (row,) = measure(group(*entries, rounds=50), entries, None, long_call, deadline=0.0)
    assert row.rounds == 2
    assert next(runs) == 3  # with the warm-up


def test_the_bound_is_the_slowest_limit():
    limits = Limits(copy_gb_s=10.0, matrix_gflop_s=100.0, exponentials_g_s=1.0)
    # 10 MB are 1 ms of copying, 1e9 are 10 ms of products, 2e6 are 2 ms of exponentials
    entry = Entry("", None, bytes=1e7, flops=1e9, exponentials=2e6)
    assert limits.bound(entry) == (pytest.approx(10.0), "matrix")
    entry.flops = 0.0
    assert limits.bound(entry) == (pytest.approx(2.0), "exponentials")
    assert Limits(10.0, 100.0, None).bound(entry) == (pytest.approx(1.0), "copy")
    assert limits.bound(Entry("", None)) == (None, "")


def stored_row(**changes):
    row = Row("part", "group", "ours", "workload", "ok", 1, ours=True)
    row.ratio, row.ratio_quartiles = 0.5, (0.49, 0.51)
    row.peak_mib, row.held_kib, row.rounds = 100.0, 43.0, 5
    return {**asdict(row), **changes}


@pytest.mark.parametrize(
    ("changes", "worse"),
    [
        ({}, False),
        ({"ratio": 0.56, "ratio_quartiles": (0.55, 0.57)}, True),
        ({"ratio": 0.524, "ratio_quartiles": (0.52, 0.53)}, False),  # less than 5 %
        ({"ratio": 0.56, "ratio_quartiles": (0.55, 0.57), "rounds": 2}, False),  # less than 15 %
        ({"ratio": 0.58, "ratio_quartiles": (0.57, 0.59), "rounds": 2}, True),
        ({"ratio": 0.56, "ratio_quartiles": (0.45, 0.57)}, False),  # its own quartiles reach it
        ({"ratio": 0.40, "ratio_quartiles": (0.39, 0.41)}, False),  # better
        ({"ratio": 0.56, "ratio_quartiles": (0.55, 0.57), "ours": False}, False),  # a peer's
        ({"ratio": 0.56, "ratio_quartiles": (0.55, 0.57), "workload": "another"}, False),
        ({"ratio": 0.56, "ratio_quartiles": (0.55, 0.57), "name": "new"}, False),
        ({"ratio": None, "ratio_quartiles": None}, False),
        ({"status": "failed: RuntimeError: no"}, True),
        ({"status": "skipped: no time", "ratio": None}, False),
        ({"peak_mib": 109.0}, True),
        ({"peak_mib": 107.0}, False),  # less than 8 MiB
        ({"peak_mib": 1040.0}, True),
        ({"held_kib": 44.0}, False),  # less than a MiB
        ({"held_kib": 1100.0}, True),
    ],
)
def test_regression_rule(changes, worse):
    found = regressions([stored_row(**changes)], [stored_row()])
    assert bool(found) == worse
    assert all(line.startswith("part / group / ours: ") for line in found)


def test_a_spread_of_the_stored_run_excuses_too():
    wide = stored_row(ratio_quartiles=(0.40, 0.60))
    assert regressions([stored_row(ratio=0.56, ratio_quartiles=(0.55, 0.57))], [wide]) == []
    failed = stored_row(status="failed: then too", ratio=None)
    assert regressions([stored_row(status="failed: still")], [failed]) == []


def test_slope_is_the_exponent():
    exact = slope([(x, 3.0 * x**0.7) for x in (1.0, 2.0, 4.0, 8.0)])
    assert exact["slope"] == pytest.approx(0.7)
    assert exact["low"] == pytest.approx(0.7)
    # Two points at 1 and two at e^2, 0.2 apart each: residuals 0.1, s^2 = 0.04 / 2, sxx = 4
    noisy = slope([(1.0, math.exp(v)) for v in (-0.1, 0.1)] +
                  [(math.exp(2), math.exp(2 + v)) for v in (-0.1, 0.1)])  # fmt: skip
    half = 4.302653 * math.sqrt(0.02 / 4)  # Student's t at two degrees of freedom
    assert noisy["slope"] == pytest.approx(1.0)
    assert (noisy["low"], noisy["high"]) == (pytest.approx(1 - half), pytest.approx(1 + half))


def test_slopes_leave_out_what_was_not_measured(group, clock_of):
    entries = [Entry(str(x), lambda: None, x=float(x)) for x in (1, 2, 4)]
    one = group(*entries, slope="images")
    times = [1.0] * 3 + [1.0, 2.0, 4.0] + [4.0, 2.0, 1.0] + [1.0, 2.0, 4.0]
    rows = measure(one, entries, None, clock_of(times))
    (found,) = slopes([one], rows)
    assert found["over"] == "images"
    assert found["slope"] == pytest.approx(1.0)
    assert found["points"] == 9
    rows[0].status = "failed: RuntimeError: no"
    assert slopes([one], rows) == []  # two sizes are no line


def test_peak_is_of_the_call():
    kept = []
    before = peak_mib(lambda: kept.append(bytearray(b"x") * (64 << 20)), torch.device("cpu"))
    assert 63 <= before <= 80
    assert peak_mib(lambda: None, torch.device("cpu")) < 8


def test_newest_run_is_the_last_date(tmp_path):
    assert newest(tmp_path) is None
    for name in ("2026-11-24", "2025-12-31", "audit-cluster", "engines-sd15"):
        (tmp_path / f"{name}.json").touch()
    assert newest(tmp_path).name == "2026-11-24.json"
