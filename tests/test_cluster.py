"""An audit on a real Ray cluster of two CPU workers, one of which is killed."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys

import pytest
import torch

from biasmap_fast.audit import AuditError, AuditPlan, run, run_audit, validate
from biasmap_fast.audit.records import read_ledger

PLAN = {
    "professions": ["doctor", "judge", "nurse", "pilot"],
    "seeds": [0, 1, 2],
    "steps": 2,
    "batch_size": 2,
    "conditions": ["plain", "guided", "short=prompt:{profession}"],
    "save_maps": "none",
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda *args: None)


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
    assert validate(tmp_path / "two") == []
    assert torch.get_num_threads() == 1  # as in the workers
    here = run_audit(plan, tmp_path / "here", progress=False)
    assert two.records.equals(here.records)
    assert read_ledger(tmp_path / "two").equals(read_ledger(tmp_path / "here"))
    assert {row["status"] for row in two.records.to_pylist()} == {"ok"}
    assert len(seen.lost) == 1, seen.lost


def test_without_ray_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install \"biasmap-fast\[cluster\]\""):
        run_audit(AuditPlan(**PLAN), tmp_path, progress=False, cluster="local")


def test_a_loaded_pipeline_stays_here(tmp_path):
    with pytest.raises(AuditError, match="cannot be sent to the workers"):
        run_audit(AuditPlan(**PLAN), tmp_path, pipe=object(), progress=False, cluster="local")
