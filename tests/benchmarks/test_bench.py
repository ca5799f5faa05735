"""What a benchmark's row says, what is a regression, and what a slope; nothing is timed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import asdict
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import gpu
import harness
import kernels
import run
from biasmap_fast.cli import app
from harness import (
    Entry,
    Group,
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
from settings import Settings, find_daam, find_ovam

ROOT = Path(__file__).resolve().parents[2]


def group(*entries, rounds=3, **more):
    return Group("part", "group", "workload", lambda: entries, rounds, 1.0, **more)


def clock_of(times):
    """A clock that gives each entry's scripted times, in the order of the calls."""
    left = iter(times)

    def clock(run):
        run()
        return next(left)

    return clock


def long_call(run):
    """A clock to which every call is long."""
    run()
    return 100.0


def test_entries_take_turns_and_ratios_are_those_of_a_round():
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


def test_only_the_named_entry_warms_up():
    order = []
    entries = [Entry(n, lambda n=n: order.append(n)) for n in "ab"]
    measure(group(*entries, rounds=2, warm_up="b"), entries, None, long_call)
    assert order == [*"b", *"ab", *"ba"]


def test_a_short_call_is_timed_many_times_in_a_row(monkeypatch):
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


def test_a_second_measurement_adds_its_rounds():
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


def test_what_seems_worse_is_measured_again_while_there_is_time(tmp_path, monkeypatch):
    entries = [Entry("base", lambda: None), Entry("ours", lambda: None, ours=True)]
    warm_up = [1.0, 1.0]
    disturbed, usual = [1.0, 3.0], [1.0, 1.0]
    clock = clock_of([*warm_up, *disturbed, *warm_up, *usual * 4])
    monkeypatch.setattr(run, "wall_clock", clock)
    one = group(*entries, rounds=1)
    bench = run.Bench(Settings(torch.device("cpu"), tmp_path), 600.0, [])
    bench.limits[1] = Limits(10.0, 100.0, 1.0)
    bench.add(one)
    ours = bench.rows[1]
    assert ours.ratio == 3.0
    stored = [{**asdict(row), "ratio": 1.0, "ratio_quartiles": (1.0, 1.0)} for row in bench.rows]
    one.rounds, one.seconds = 4, 1e4
    bench.confirm(stored)
    assert ours.rounds == 1  # there is no time for it
    one.seconds = 1.0
    bench.confirm(stored)
    assert (ours.rounds, ours.ratio) == (5, 1.0)
    bench.confirm(stored)  # nothing is worse: the clock has no more times to give
    assert ours.rounds == 5


def test_a_second_measurement_that_fails_leaves_the_first(tmp_path, monkeypatch):
    entries = [Entry("base", lambda: None), Entry("ours", lambda: None, ours=True)]
    monkeypatch.setattr(run, "wall_clock", clock_of([1.0, 1.0, 1.0, 3.0]))
    one = group(*entries, rounds=1)
    bench = run.Bench(Settings(torch.device("cpu"), tmp_path), 600.0, [])
    bench.limits[1] = Limits(10.0, 100.0, 1.0)
    bench.add(one)
    stored = [{**asdict(row), "ratio": 1.0, "ratio_quartiles": (1.0, 1.0)} for row in bench.rows]

    def broken():
        raise RuntimeError("no memory")

    one.setup = broken
    bench.confirm(stored)
    assert (bench.rows[1].rounds, bench.rows[1].ratio) == (1, 3.0)


def test_what_fails_or_is_not_run_is_no_number():
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


def test_the_error_is_that_of_the_first_call():
    calls = count()
    entries = [Entry("rotating", lambda: next(calls), error=float)]
    (row,) = measure(group(*entries), entries, None)
    assert row.error == 0.0


def test_without_a_baseline_there_is_no_ratio():
    entries = [Entry("base", None, status="skipped: not given"), Entry("other", lambda: None)]
    rows = measure(group(*entries), entries, None)
    assert rows[1].median_ms is not None
    assert rows[1].ratio is None


def test_after_the_deadline_two_rounds_are_made():
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


def test_slopes_leave_out_what_was_not_measured():
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


def test_peaks_come_from_processes_of_their_own():
    options = run.parser().parse_args(["--set", "cpu", "--quick"])
    name = "testbed, 1 image(s), 10 steps"
    plain, absent = (Row("recorder", name, each, "", "ok", 1) for each in ("plain", "nobody"))
    run.peak_in_process(plain, options)
    assert 0.0 <= plain.peak_mib < 2000.0
    assert not plain.note
    run.peak_in_process(absent, options)
    assert absent.peak_mib is None
    assert absent.note.startswith("; peak failed: failed: ValueError")


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


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One part, small, by the command; its results."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, ROOT / "benchmarks/run.py", "--set", "cpu", "--quick"]
    command += ["--part", "overlap", "--out", out, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    (path,) = out.glob("*/*.json")
    assert json.loads(path.read_text()) == record
    return record


@pytest.mark.slow
def test_a_run_leaves_rows_with_errors_limits_and_ratios(quick):
    rows = {(row["group"], row["name"]): row for row in quick["rows"]}
    assert {row["status"] for row in rows.values()} == {"ok"}
    ours = rows["hard IoU", "pairwise_iou"]
    assert ours["error"] == 0.0
    assert ours["bound_ms"] > 0
    assert ours["bound_by"] == "copy"
    assert quick["limits"]["1"]["copy_gb_s"] > 0
    assert quick["peers"] == {"OVAM": "skipped: no --ovam DIR", "DAAM": "skipped: no --daam DIR"}
    assert regressions(quick["rows"], quick["rows"]) == []
    worse = deepcopy(quick["rows"])
    for row in worse:
        row["ratio"] *= 2
        row["ratio_quartiles"] = [2 * end for end in row["ratio_quartiles"]]
    assert len(regressions(worse, quick["rows"])) == sum(row["ours"] for row in worse)


def test_without_time_every_group_is_skipped(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/run.py", "--set", "cpu", "--quick"]
    command += ["--budget", "0.1", "--out", tmp_path, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert {row["status"].partition(":")[0] for row in record["rows"]} == {"skipped"}
    assert {row["part"] for row in record["rows"]} == {
        "overlap", "peers", "recorder", "audits", "guidance", "engines",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize("part", run.PARTS)
def test_groups_are_named_once_and_say_their_part(part, tmp_path):
    settings = Settings(torch.device("cpu"), tmp_path, quick=True)
    found = list(run.groups_of(part, settings))
    assert {each.part for each in found} == {part}
    names = [each.name + each.workload for each in found]
    assert len(set(names)) == len(names)


def test_a_part_that_fails_leaves_a_row_and_the_others(tmp_path, monkeypatch):
    def failing(_settings):
        yield group(Entry("before", lambda: None))
        raise RuntimeError("out of memory")

    module = SimpleNamespace(failing=failing, good=lambda _: [group(Entry("after", lambda: None))])
    monkeypatch.setitem(sys.modules, "two_parts", module)
    monkeypatch.setattr(run, "PARTS", {name: ("two_parts", name) for name in ("failing", "good")})
    bench = run.Bench(Settings(torch.device("cpu"), tmp_path, quick=True), math.inf, [])
    bench.limits[1] = Limits(1.0, 1.0, None)
    bench.run(["failing", "good"], lambda: None)
    before, failed, after = bench.rows
    assert (before.name, before.status) == ("before", "ok")
    assert failed.status == "failed: RuntimeError: out of memory"
    assert failed.ours
    assert (after.name, after.status) == ("after", "ok")


def test_a_native_op_that_fails_is_a_row_beside_torch():
    def broken(_):
        raise RuntimeError("no kernel image")

    setting = kernels.Setting(torch.device("cuda"), rounds=2, compiled=False)
    entries = kernels.compare(setting, [None], lambda _: 1.0, broken, None, None, kernels.Work())
    rows = measure(group(*entries), entries, None)
    assert [row.name for row in rows] == ["torch reference", "native", "native, in a graph"]
    assert rows[0].status == "ok"
    assert all(row.status.startswith("failed") and row.ours for row in rows[1:])


@pytest.mark.slow
def test_a_captured_unet_call_is_the_same_with_the_recorder(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "in_a_graph", lambda run, inputs: lambda: run(inputs[0]))
    entries = kernels.captured_unet(Settings(torch.device("cpu"), tmp_path), width=32)
    rows = measure(group(*entries, rounds=1), entries, None)
    assert [(row.name, row.status) for row in rows] == [("plain", "ok"), ("recorder", "ok")]
    assert rows[1].error == 0.0


def test_steps_on_a_gpu_have_shares_of_eight_minutes(monkeypatch):
    assert sum(gpu.SHARES.values()) <= 470
    monkeypatch.setattr(gpu, "BEGUN", time.monotonic() - 30.0)  # the build left 50 s
    assert gpu.limit("tests") == pytest.approx(50 + gpu.SHARES["tests"], abs=1)


def test_a_step_past_its_limit_ends_with_all_it_started(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "limit", lambda _: 1.0)
    code = f"echo said; sleep 60 & echo $! > {tmp_path}/child; wait"
    step = gpu.run("build", ["sh", "-c", code])
    assert (step.status, step.output) == ("failed (over 1 s)", "said")
    assert step.seconds < 30  # the child held the output open
    status = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"
    assert gpu.run("build", ["no-such-command"]).status.startswith("failed ([Errno 2]")


def test_only_whole_runs_and_long_parts_are_kept():
    def placed(*given):
        options = run.parser().parse_args(given)
        return run.place(options, "Some CPU 3").relative_to(ROOT).parts

    assert placed()[:3] == ("benchmarks", "results", "some-cpu-3")
    assert placed("--part", "overlap")[:2] == placed("--quick")[:2] == ("runs", "bench")
    long = placed("--part", "engines-sd15")
    assert long == ("benchmarks", "results", "some-cpu-3", "engines-sd15.json")
    assert placed("--part", "engines-sd15", "--quick")[0] == "runs"


def test_a_peer_that_cannot_be_imported_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="--ovam must be a checkout"):
        find_ovam(tmp_path)
    (tmp_path / "ovam/stable_diffusion").mkdir(parents=True)
    (tmp_path / "ovam/stable_diffusion/__init__.py").write_text("import no_such_module_of_2020\n")
    peer = find_ovam(tmp_path)
    assert peer.load is None
    assert peer.status.startswith("cannot: import fails, ModuleNotFoundError")
    assert find_ovam(None).status == "skipped: no --ovam DIR"
    monkeypatch.setitem(sys.modules, "daam", None)
    assert find_daam(tmp_path).status.startswith("cannot: import fails")


def test_bench_command_says_where_the_benchmarks_are(tmp_path):
    done = CliRunner().invoke(app, ["bench", "--checkout", str(tmp_path)])
    assert done.exit_code == 1
    assert "give --checkout DIR" in done.output
    command = [sys.executable, "-m", "biasmap_fast.cli", "bench", "--", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--ovam DIR" in done.stdout
