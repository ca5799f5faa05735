"""The command that runs the benchmarks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import run
from benchmarks.harness import Entry, Limits, Row, regressions
from benchmarks.settings import Settings, find_daam, find_ovam

ROOT = Path(__file__).resolve().parents[2]


def test_what_seems_worse_is_measured_again_if_there_is_time(
    group, clock_of, tmp_path, monkeypatch
):
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


def test_a_second_measurement_that_fails_leaves_the_first(group, clock_of, tmp_path, monkeypatch):
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


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One part, small, by the command; its results."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.run", "--set", "cpu", "--quick"]
    command += ["--part", "overlap", "--out", out, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
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
    command = [sys.executable, "-m", "benchmarks.run", "--set", "cpu", "--quick"]
    command += ["--budget", "0.1", "--out", tmp_path, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
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


def test_a_part_that_fails_leaves_a_row_and_the_others(group, tmp_path, monkeypatch):
    def failing(_settings):
        yield group(Entry("before", lambda: None))
        raise RuntimeError("out of memory")

    module = SimpleNamespace(failing=failing, good=lambda _: [group(Entry("after", lambda: None))])
    monkeypatch.setitem(sys.modules, "benchmarks.two_parts", module)
    monkeypatch.setattr(run, "PARTS", {name: ("two_parts", name) for name in ("failing", "good")})
    bench = run.Bench(Settings(torch.device("cpu"), tmp_path, quick=True), math.inf, [])
    bench.limits[1] = Limits(1.0, 1.0, None)
    bench.run(["failing", "good"], lambda: None)
    before, failed, after = bench.rows
    assert (before.name, before.status) == ("before", "ok")
    assert failed.status == "failed: RuntimeError: out of memory"
    assert failed.ours
    assert (after.name, after.status) == ("after", "ok")


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
