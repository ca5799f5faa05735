"""An audit on a real Ray cluster of two CPU workers, one of which is killed."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from biasmap_fast.audit import AuditError, AuditPlan, cluster, run, run_audit
from biasmap_fast.audit.records import read

equal = pd.testing.assert_frame_equal

PLAN = {
    "professions": ["doctor", "judge", "nurse", "pilot"],
    "seeds": [0, 1, 2],
    "steps": 2,
    "batch_size": 2,
    "conditions": ["plain", "guided", "short=prompt:{profession}"],
    "save_maps": "none",
}


class Kills(logging.Handler):
    """Kills the first worker when a second one has begun and chunks are on their way."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.pids = []
        self.lost = []

    def emit(self, record):
        text = record.getMessage()
        if found := re.search(r"a worker has begun: process (\d+)", text):
            self.pids.append(int(found[1]))
        if "was lost with chunk" in text:
            self.lost.append(text)


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of Ray's own sockets and log files
def test_two_workers_of_which_one_is_killed(tmp_path, monkeypatch):
    plan = AuditPlan(**PLAN)
    seen = Kills(tmp_path)
    logger = logging.getLogger("biasmap_fast.audit.cluster")
    logger.addHandler(seen)
    level = logger.level
    logger.setLevel(logging.INFO)
    real, stored = run.Writer.add, []

    def add(writer, index, chunk):
        stored.append(index)
        real(writer, index, chunk)
        if len(stored) == 3:  # midway
            os.kill(seen.pids[0], signal.SIGKILL)

    monkeypatch.setattr(run.Writer, "add", add)
    try:
        two = run_audit(plan, tmp_path / "two", progress=False, cluster="local", workers=2)
    finally:
        logger.removeHandler(seen)
        logger.setLevel(level)
    assert len(set(seen.pids)) >= 2
    assert sorted(set(stored)) == list(range(len(plan.chunks())))
    assert torch.get_num_threads() == 1  # as in the workers
    here = run_audit(plan, tmp_path / "here", progress=False)
    equal(two.measurements, here.measurements)
    equal(two.pictures, here.pictures)
    for name in ("ledger", "masks"):
        assert read(tmp_path / "two", name).equals(read(tmp_path / "here", name))
    assert set(two.pictures["status"]) == {"ok"}
    assert len(seen.lost) == 1, seen.lost


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_two_workers_draw_the_same_rounds(tmp_path):
    settings = {"precision": 0.1, "seeds": range(10), "max_seeds": 14, "steps": 2, "batch_size": 4}
    plan = AuditPlan(professions=["doctor", "firefighter"], save_maps="none", **settings)
    two = run_audit(plan, tmp_path / "two", progress=False, cluster="local", workers=2)
    here = run_audit(plan, tmp_path / "here", progress=False)
    assert len(two.pictures) > 20  # more than the first round
    equal(two.measurements, here.measurements)


def test_without_ray_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install \"biasmap-fast\[cluster\]\""):
        run_audit(AuditPlan(**PLAN), tmp_path, progress=False, cluster="local")


def test_a_loaded_pipeline_stays_here(tmp_path):
    with pytest.raises(AuditError, match="cannot be sent to the workers"):
        run_audit(AuditPlan(**PLAN), tmp_path, pipe=object(), progress=False, cluster="local")


# --- what a local cluster does not do when one wants it --------------------------------------


class Lost(Exception):
    pass


class FakeRay:
    """Ray as far as `Cluster` uses it, in this process; a job may be lost with its worker."""

    exceptions = SimpleNamespace(RayTaskError=LookupError, RayError=Lost)

    def __init__(self, resources, lost=lambda name, args: False, found=lambda worker: "same"):
        self.resources, self.lost, self.found = resources, lost, found
        self.started = 0

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return self.resources

    def kill(self, actor):
        pass

    def remote(self, device):
        return SimpleNamespace(options=lambda **given: SimpleNamespace(remote=self.start))

    def start(self, plan, folder, threads):
        self.started += 1
        names = {"weights_sha256": self.found(self.started), "scheduler_config": 0, "versions": 0}
        says = {
            "begin": lambda: (names, f"worker {self.started}"),
            "run": lambda units: ({}, ("measured", units)),
            "give_up": lambda units, reason: ({}, ("failed", units, reason)),
        }
        return SimpleNamespace(
            **{
                name: SimpleNamespace(remote=lambda *args, n=name, f=call: (n, f, args))
                for name, call in says.items()
            }
        )

    def wait(self, jobs, num_returns):
        return jobs[:1], jobs[1:]

    def get(self, job):
        name, call, args = job
        if self.lost(name, args):
            raise Lost(f"the worker died in {name}")
        return call(*args)


def faked(monkeypatch, ray, workers=None, **settings):
    monkeypatch.setattr(cluster, "_ray", lambda: ray)
    return cluster.Cluster(AuditPlan(**PLAN, **settings), "local", workers=workers)


def test_a_chunk_that_costs_three_workers_is_given_up(monkeypatch):
    ray = FakeRay({"CPU": 2.0}, lost=lambda name, args: name == "run" and args[0] == ("bad",))
    todo = [(0, ("good",)), (1, ("bad",)), (2, ("good", "too"))]
    with faked(monkeypatch, ray) as source:
        assert source.describe()["weights_sha256"] == "same"
        found = {index: chunk for _, index, chunk in source.results(todo)}
    assert found[0] == ("measured", ("good",))
    assert found[2] == ("measured", ("good", "too"))
    assert found[1][:2] == ("failed", ("bad",))
    assert found[1][2] == "3 workers were lost while they measured its chunk"
    assert ray.started == 2 + 3


def test_workers_that_never_begin_end_the_run(monkeypatch):
    ray = FakeRay({"CPU": 2.0}, lost=lambda name, args: name == "begin")
    with (
        pytest.raises(AuditError, match=r"3 workers were lost before .*the worker died in begin"),
        faked(monkeypatch, ray) as source,
    ):
        source.describe()


def test_a_worker_with_other_weights_is_refused(monkeypatch):
    ray = FakeRay({"CPU": 2.0}, found=lambda worker: f"hash {worker}")
    with (
        pytest.raises(AuditError, match="worker 2 has another weights_sha256 .*hash 1, got hash 2"),
        faked(monkeypatch, ray) as source,
    ):
        source.wait_for_all()


@pytest.mark.parametrize(
    ("resources", "workers", "settings", "expected"),
    [
        ({"CPU": 2.0}, 3, {}, "room for 2 workers of 1 CPU each, asked for 3"),
        (
            {"CPU": 8.0},
            None,
            {"device": "cuda"},
            "room for 0 workers of one GPU each.*draws on 'cuda'",
        ),
        ({"CPU": 2.0}, 0, {}, "at least one worker and one thread, got 0 and 1"),
    ],
)
def test_clusters_that_are_too_small(monkeypatch, resources, workers, settings, expected):
    with (
        pytest.raises((AuditError, ValueError), match=expected),
        faked(monkeypatch, FakeRay(resources), workers, **settings),
    ):
        pass
