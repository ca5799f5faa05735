"""What is measured on a GPU, as far as a CPU can tell."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, kernels
from benchmarks.harness import measure
from benchmarks.settings import Settings


def test_a_native_op_that_fails_is_a_row_beside_torch(group):
    def broken(_):
        raise RuntimeError("no kernel image")

    setting = kernels.Setting(torch.device("cuda"), rounds=2, compiled=False)
    entries = setting.compare([None], (lambda _: 1.0, broken))
    rows = measure(group(*entries), entries, None)
    assert [row.name for row in rows] == ["torch reference", "native", "native, in a graph"]
    assert rows[0].status == "ok"
    assert all(row.status.startswith("failed") and row.ours for row in rows[1:])


def test_a_captured_unet_call_is_the_same_with_the_recorder(group, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "in_a_graph", lambda run, inputs: lambda: run(inputs[0]))
    entries = kernels.captured_unet(Settings(torch.device("cpu"), tmp_path), width=32, side=16)
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
