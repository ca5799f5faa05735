"""Groups and clocks of the benchmarks' tests."""

from __future__ import annotations

import pytest

from benchmarks.harness import Group


@pytest.fixture
def group():
    """``group(*entries, rounds=3)``: a group of entries."""

    def make(*entries, rounds=3, **more):
        return Group("part", "group", "workload", lambda: entries, rounds, 1.0, **more)

    return make


@pytest.fixture
def clock_of():
    """``clock_of(times)``: a clock that gives scripted times, call by call."""

    def make(times):
        left = iter(times)

        def clock(run):
            run()
            return next(left)

        return clock

    return make
