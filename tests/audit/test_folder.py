"""The run folder: its lock, kills, full disks, damaged files, failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from biasmap_fast import files
from biasmap_fast.audit import AuditError, RecordError, chunk, load_audit, run_audit, worker
from biasmap_fast.audit.records import part_path

ROOT = Path(__file__).resolve().parents[2]
equal = pd.testing.assert_frame_equal
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run's folder."""
    return shutil.copytree(finished.folder, tmp_path / "run")


# --- lock and kills --------------------------------------------------------------------------


def test_a_folder_that_is_being_written_is_refused_and_names_the_holder(
    tiny, tiny_plan, tmp_path, monkeypatch
):
    begun, go_on = threading.Event(), threading.Event()
    real = worker.measure_chunk

    def waits(*args):
        begun.set()
        assert go_on.wait(60)
        return real(*args)

    monkeypatch.setattr(worker, "measure_chunk", waits)
    plan = tiny_plan(professions=["doctor"], seeds=[0])
    ended = []
    first = threading.Thread(
        target=lambda: ended.append(run_audit(plan, tmp_path, pipe=tiny, progress=False))
    )
    first.start()
    try:
        assert begun.wait(60)
        with pytest.raises(AuditError, match=rf"another run \(process {os.getpid()} on .*another"):
            run_audit(plan, tmp_path, pipe=tiny, progress=False)
    finally:
        go_on.set()
        first.join()
    assert len(ended[0].pictures) == 1
    assert not (tmp_path / ".holder.json").exists()
    run_audit(plan, tmp_path, progress=False)  # free again


@pytest.mark.slow
def test_an_audit_killed_at_random_moments_ends_with_the_same_files():
    """The same script with more kills and chunks: studies/kills.py."""
    command = [sys.executable, "-m", "studies.kills", "--kills", "3"]
    small = ["--professions", "2", "--seeds", "3", "--steps", "1"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout[done.stdout.index("{") :])
    assert sum(said["states"].values()) == 3
    assert said["files_compared_of_each"] > 30
    assert said["differences"] == []


def test_left_over_files_of_a_killed_run_go(tiny, tiny_plan, tmp_path):
    (tmp_path / ".plan.yaml.77.tmp").write_text("half")
    (tmp_path / ".lock").touch()
    plan = tiny_plan(professions=["doctor"], seeds=[0])
    run_audit(plan, tmp_path, pipe=tiny, progress=False)
    assert not list(tmp_path.rglob("*.tmp"))


def test_folders_that_cannot_be_used(tiny_plan, tmp_path):
    plan = tiny_plan()
    (tmp_path / "file").write_text("")
    with pytest.raises(AuditError, match="run folder .*file/run cannot be written"):
        run_audit(plan, tmp_path / "file" / "run", progress=False)
    with pytest.raises(AuditError, match="run folder .*file cannot be written"):
        run_audit(plan, tmp_path / "file", progress=False)
    with pytest.raises(AuditError, match="/proc/run cannot be written"):
        run_audit(plan, "/proc/run", progress=False)
    with pytest.raises(AuditError, match="is not empty and holds no plan.yaml"):
        run_audit(plan, tmp_path, progress=False)
    with pytest.raises(AuditError, match="is no run folder: it has no plan.yaml"):
        load_audit(tmp_path)


def test_a_folder_of_the_first_edition_is_refused_with_its_release(tiny_plan, tmp_path):
    (tmp_path / "plan.yaml").write_text("percentiles: [70.0]\n")
    (tmp_path / "records").mkdir()
    for use in (load_audit, lambda folder: run_audit(tiny_plan(), folder, progress=False)):
        with pytest.raises(
            AuditError, match=r"first edition \(records of schema 4\): read it with"
        ):
            use(tmp_path)


# --- disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [3, 20])
def test_full_disk_ends_the_run_and_the_same_command_goes_on(
    finished, tiny, tmp_path, monkeypatch, call
):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(AuditError, match="No space left on device"):
        run_audit(finished.plan, tmp_path, pipe=tiny, progress=False)
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(files.os, "fsync", real)
    again = run_audit(finished.plan, tmp_path, pipe=tiny, progress=False)
    equal(again.measurements, finished.measurements)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_text(path, "first")
    assert files.sha256_file(path) == files.sha256(b"first")
    with pytest.raises(KeyError), files.writing(path) as partial:
        partial.write_text("half")
        raise KeyError

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["masks", "measurements", "hashes", "pictures"])
def test_what_was_deleted_is_measured_again(finished, copy, tiny, stops, name):
    part = next((copy / name).glob("part-00001.*"))
    before = part.read_bytes()
    part.unlink()
    drawn = stops(2)
    again = run_audit(finished.plan, copy, pipe=tiny, progress=False)
    assert len(drawn) == 1
    assert part.read_bytes() == before
    equal(again.measurements, finished.measurements)


def test_a_damaged_table_stops_the_run_before_it_draws(finished, copy, tiny, stops):
    stops(0)
    part_path(copy, "pictures", 2).unlink()
    path = part_path(copy, "measurements", 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(RecordError, match=r"part-00001\.parquet cannot be read"):
        run_audit(finished.plan, copy, pipe=tiny, progress=False)


@pytest.mark.parametrize("text", ['{"versions": ', "[1, 2]", "7"])
def test_a_damaged_environment_is_named(finished, copy, tiny, text):
    part_path(copy, "pictures", 0).unlink()
    (copy / "environment.json").write_text(text)
    with pytest.raises(AuditError, match=r"environment\.json is damaged .*restore that file"):
        run_audit(finished.plan, copy, pipe=tiny, progress=False)


def test_a_damaged_plan_is_named(finished, copy):
    (copy / "plan.yaml").write_text("")
    with pytest.raises(AuditError, match=r"must hold a mapping.*records are untouched"):
        run_audit(finished.plan, copy, progress=False)
    (copy / "plan.yaml").write_text(finished.plan.to_yaml() + "\n# edited\n")
    with pytest.raises(RecordError, match=r"plan\.yaml is not the file under which chunk 0"):
        load_audit(copy)


def test_other_weights_are_refused(finished, copy, make_sd):
    part_path(copy, "pictures", 1).unlink()
    other = make_sd()
    with torch.no_grad():
        next(iter(other.unet.parameters())).add_(1)
    with pytest.raises(AuditError, match="begun with another weights_sha256"):
        run_audit(finished.plan, copy, pipe=other, progress=False)


# --- failures --------------------------------------------------------------------------------


def fails(monkeypatch, when):
    """Lets drawing raise what ``when(picture)`` gives, if one of the batch's pictures makes it."""
    real = chunk.draw

    def drawing(pipe, plan, pictures, *args):
        for picture in pictures:
            if error := when(picture):
                raise error
        return real(pipe, plan, pictures, *args)

    monkeypatch.setattr(chunk, "draw", drawing)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("a fault\nof one picture"), "error"),
    ],
)
def test_a_picture_that_raises_is_a_row_and_its_neighbours_are_measured(
    finished, tiny, tiny_plan, tmp_path, monkeypatch, error, status
):
    plan = tiny_plan(batch_size=6)
    with monkeypatch.context() as patch:
        fails(patch, lambda p: error if (p.profession, p.seed) == ("pilot", 0) else None)
        result = run_audit(plan, tmp_path, pipe=tiny, progress=False)
    pictures = result.pictures.set_index(["profession", "seed"])
    failed = pictures[pictures["status"] != "ok"]
    assert failed["status"].to_dict() == {("pilot", 0): status}
    assert failed["reason"].item() == f"{type(error).__name__}: {' '.join(str(error).split())}"
    rows = finished.measurements
    good = rows[(rows["profession"] != "pilot") | (rows["seed"] != 0)].reset_index(drop=True)
    equal(result.measurements, good, rtol=1e-4, atol=0.05)
    # a run that goes on leaves it; --retry-failed does not
    equal(run_audit(plan, tmp_path, progress=False).pictures, result.pictures)
    again = run_audit(plan, tmp_path, pipe=tiny, progress=False, retry_failed=True)
    assert Counter(again.pictures["status"]) == {"ok": 6}


def test_a_run_in_which_everything_fails_records_nothing(
    tiny, tiny_plan, tmp_path, monkeypatch, caplog
):
    fails(monkeypatch, lambda picture: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(AuditError, match=r"every picture of chunks \[0, 1, 2\].*smaller pictures"):
        run_audit(tiny_plan(), tmp_path / "long", pipe=tiny, progress=False)
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    said = [(record.getMessage(), bool(record.exc_info)) for record in warned]
    assert [each for each in said if " raised " in each[0]] == [
        ("2 pictures raised OutOfMemoryError: CUDA out of memory", False),
        ("1 picture raised OutOfMemoryError: CUDA out of memory", True),  # once, not six times
    ]
    short = tiny_plan(professions=["doctor"], seeds=[0])
    with pytest.raises(AuditError, match=r"every picture of chunks \[0\]"):
        run_audit(short, tmp_path / "short", pipe=tiny, progress=False)
    for name in ("long", "short"):
        assert not list((tmp_path / name / "pictures").iterdir())


@pytest.mark.parametrize("images", ["all", "none"])
def test_not_a_number_in_one_picture_leaves_the_others(finished, tiny, tiny_plan, tmp_path, images):
    """NaN in what the UNet says of one picture of a batch."""

    def overflows(module, args, output):  # of both halves of the guidance batch
        output[1::2] = float("nan")

    hook = tiny.unet.conv_out.register_forward_hook(overflows)
    try:
        plan = tiny_plan(professions=["doctor"], seeds=[0, 1], save_pictures=images)
        result = run_audit(plan, tmp_path, pipe=tiny, progress=False)
    finally:
        hook.remove()
    status = result.pictures.set_index("seed")["status"].to_dict()
    assert status == {0: "ok", 1: "non_finite_picture"}
    rows = finished.measurements
    expected = rows[(rows["profession"] == "doctor") & (rows["seed"] == 0)].reset_index(drop=True)
    equal(result.measurements, expected, rtol=1e-4, atol=0.05)


def test_only_pictures_that_are_kept_are_decoded(finished, tiny, tiny_plan, tmp_path, monkeypatch):
    real, decoded = tiny.vae.decode, []

    def decode(latents, *args, **kwargs):
        decoded.append(len(latents))
        return real(latents, *args, **kwargs)

    monkeypatch.setattr(tiny.vae, "decode", decode)
    for images, expected in (("none", []), ("all", [2, 2, 2])):
        decoded.clear()
        plan = tiny_plan(save_pictures=images)
        result = run_audit(plan, tmp_path / images, pipe=tiny, progress=False)
        assert decoded == expected
        equal(result.measurements, finished.measurements)
    for picture in (finished.folder / "pictures").glob("*.png"):
        other = tmp_path / "all" / "pictures" / picture.name
        a, b = (np.asarray(Image.open(path), dtype=int) for path in (picture, other))
        assert np.abs(a - b).max() <= 1
