"""The run folder: its lock, failures, full disks, kills, and what `--validate` finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from biasmap_fast import cli
from biasmap_fast.audit import AuditError, AuditPlan, draw, files, run_audit, validate, work
from biasmap_fast.audit.records import part_path, write_part

ROOT = Path(__file__).resolve().parents[2]


def make_plan(**changes):
    settings = {
        "model": "tiny",
        "professions": ["doctor", "pilot"],
        "axes": ["gender"],
        "prompt_template": "a photo of {profession}",
        "attribution_template": "a photo of {profession} and {demographic}",
        "seeds": [0, 1, 2],
        "steps": 1,
        "batch_size": 2,
        "device": "cpu",
    }
    return AuditPlan(**(settings | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_sd):
    pipe = make_sd()
    folder = tmp_path_factory.mktemp("folder") / "run"
    return run_audit(make_plan(), folder, pipe=pipe, progress=False), pipe


@pytest.fixture
def quick(monkeypatch):
    """Leaves the report out: only what is measured counts here."""
    monkeypatch.setattr("biasmap_fast.audit.run.write_report", lambda *args: None)


# --- lock ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_folder_that_is_being_written_is_refused_and_names_the_holder(
    finished, tmp_path, monkeypatch
):
    _, pipe = finished
    begun, go_on = threading.Event(), threading.Event()
    real = work.measure_chunk

    def waits(*args):
        begun.set()
        assert go_on.wait(60)
        return real(*args)

    monkeypatch.setattr(work, "measure_chunk", waits)
    plan = make_plan(professions=["doctor"], seeds=[0])
    ended = []
    first = threading.Thread(
        target=lambda: ended.append(run_audit(plan, tmp_path, pipe=pipe, progress=False))
    )
    first.start()
    try:
        assert begun.wait(60)
        with pytest.raises(AuditError, match=rf"another run \(process {os.getpid()} on .*another"):
            run_audit(plan, tmp_path, pipe=pipe, progress=False)
    finally:
        go_on.set()
        first.join()
    assert ended[0].summary["run"]["complete"]
    assert not (tmp_path / ".holder.json").exists()
    run_audit(plan, tmp_path, progress=False)  # free again


# --- kills -----------------------------------------------------------------------------------


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


def test_left_over_files_of_a_killed_run_go(finished, tmp_path):
    _, pipe = finished
    plan = make_plan(professions=["doctor"], seeds=[0])
    (tmp_path / ".plan.yaml.77.tmp").write_text("half")
    (tmp_path / ".lock").touch()
    run_audit(plan, tmp_path, pipe=pipe, progress=False)
    assert not list(tmp_path.rglob("*.tmp"))


# --- disk ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("call", [3, 9, 14])
def test_full_disk_ends_the_run_and_the_same_command_goes_on(finished, tmp_path, monkeypatch, call):
    result, pipe = finished
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(AuditError, match="No space left on device"):
        run_audit(result.plan, tmp_path, pipe=pipe, progress=False)
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(files.os, "fsync", real)
    again = run_audit(result.plan, tmp_path, pipe=pipe, progress=False)
    assert again.records.equals(result.records)
    assert validate(tmp_path) == []


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_text(path, "first")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_files_of_the_run_are_named(finished, tmp_path):
    _, pipe = finished
    plan = make_plan(professions=["doctor"], seeds=[0])
    result = run_audit(plan, tmp_path, pipe=pipe, progress=False)
    part = part_path(tmp_path, 0)
    kept = part.read_bytes()
    part.unlink()
    environment = tmp_path / "environment.json"
    whole = environment.read_bytes()
    environment.write_bytes(whole[:40])
    with pytest.raises(AuditError, match=r"environment\.json is damaged .*restore that file"):
        run_audit(plan, tmp_path, pipe=pipe, progress=False)
    environment.write_bytes(whole)
    again = run_audit(plan, tmp_path, pipe=pipe, progress=False)
    assert again.records.equals(result.records)
    assert part.read_bytes() == kept
    (tmp_path / "plan.yaml").write_text("")
    with pytest.raises(AuditError, match=r"must hold a mapping.*records are untouched"):
        run_audit(plan, tmp_path, pipe=pipe, progress=False)


# --- failures --------------------------------------------------------------------------------


def fails(monkeypatch, when):
    """Lets drawing raise what ``when(unit)`` gives, if one of the batch's units makes it."""
    real = draw.draw

    def drawing(pipe, plan, units, *args, **options):
        for unit in units:
            if error := when(unit):
                raise error
        return real(pipe, plan, units, *args, **options)

    monkeypatch.setattr("biasmap_fast.audit.measure.draw", drawing)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("a fault\nof one picture"), "error"),
    ],
)
def test_a_picture_that_raises_is_a_row_and_its_neighbours_are_measured(
    finished, tmp_path, monkeypatch, error, status
):
    result, pipe = finished
    plan = make_plan(batch_size=6)
    with monkeypatch.context() as patch:
        fails(patch, lambda unit: error if (unit.profession, unit.seed) == ("pilot", 0) else None)
        found = run_audit(plan, tmp_path, pipe=pipe, progress=False)
    rows = found.records.to_pylist()
    failed = [row for row in rows if row["status"] != "ok"]
    assert {(row["semantic"], row["seed"]) for row in failed} == {("pilot", 0)}
    assert len(failed) == 2
    assert {row["status"] for row in failed} == {status}
    assert failed[0]["reason"] == f"{type(error).__name__}: {' '.join(str(error).split())}"
    assert all(row[name] is None for row in failed for name in ("iou", "corrected", "soft_iou"))
    assert found.summary["run"]["status"] == {"ok": 10, status: 2}
    assert validate(tmp_path) == []
    good = [
        row for row in result.records.to_pylist() if (row["semantic"], row["seed"]) != ("pilot", 0)
    ]
    for row, expected in zip((row for row in rows if row["status"] == "ok"), good, strict=True):
        assert row["soft_iou"] == pytest.approx(expected["soft_iou"], rel=1e-4)
    # a run that goes on leaves it; --retry-failed does not
    assert run_audit(plan, tmp_path, progress=False).records.equals(found.records)
    again = run_audit(plan, tmp_path, pipe=pipe, progress=False, retry_failed=True)
    assert Counter(again.records["status"].to_pylist()) == {"ok": 12}


@pytest.mark.usefixtures("quick")
def test_a_run_in_which_everything_fails_records_nothing(finished, tmp_path, monkeypatch, caplog):
    _, pipe = finished
    fails(monkeypatch, lambda unit: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(AuditError, match=r"every picture of chunks \[0, 1, 2\].*smaller pictures"):
        run_audit(make_plan(), tmp_path / "long", pipe=pipe, progress=False)
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    said = [(record.getMessage(), bool(record.exc_info)) for record in warned]
    assert [each for each in said if " raised " in each[0]] == [
        ("2 pictures raised OutOfMemoryError: CUDA out of memory", False),
        ("1 picture raised OutOfMemoryError: CUDA out of memory", True),  # once, not six times
    ]
    short = make_plan(professions=["doctor"], seeds=[0])
    with pytest.raises(AuditError, match=r"every picture of chunks \[0\]"):
        run_audit(short, tmp_path / "short", pipe=pipe, progress=False)
    for name in ("long", "short"):
        assert not list((tmp_path / name / "records").iterdir())


@pytest.mark.usefixtures("quick")
def test_not_a_number_in_one_picture_leaves_the_others(finished, tmp_path):
    """NaN in what the UNet says of one picture of a batch."""
    result, pipe = finished

    def overflows(module, args, output):  # of both halves of the guidance batch
        output[1::2] = float("nan")

    hook = pipe.unet.conv_out.register_forward_hook(overflows)
    for images in ("all", "none"):
        plan = make_plan(professions=["doctor"], seeds=[0, 1], save_pictures=images)
        found = run_audit(plan, tmp_path / images, pipe=pipe, progress=False).records.to_pylist()
        status = {row["seed"]: row["status"] for row in found}
        assert status == {0: "ok", 1: "non_finite_picture"}
        expected = result.records.to_pylist()[0]["soft_iou"]
        assert found[0]["soft_iou"] == pytest.approx(expected, rel=1e-4)
    hook.remove()


# --- pictures that nobody looks at -----------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_only_pictures_that_are_kept_are_decoded(finished, tmp_path, monkeypatch):
    result, pipe = finished
    real, decoded = pipe.vae.decode, []

    def decode(latents, *args, **kwargs):
        decoded.append(len(latents))
        return real(latents, *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", decode)
    for images, expected in (("none", []), ("sample", [1, 1]), ("all", [2, 2, 2])):
        decoded.clear()
        plan = make_plan(save_pictures=images)
        found = run_audit(plan, tmp_path / images, pipe=pipe, progress=False)
        assert decoded == expected
        assert found.records.equals(result.records)
    for picture in (tmp_path / "sample" / "pictures").iterdir():
        other = tmp_path / "all" / "pictures" / picture.name
        from PIL import Image

        a, b = (np.asarray(Image.open(path), dtype=int) for path in (picture, other))
        assert np.abs(a - b).max() <= 1


# --- validation ------------------------------------------------------------------------------


def copied(result, target):
    import shutil

    shutil.copytree(result.folder, target)
    return target


def change_record(folder):
    path = part_path(folder, 0)
    table = pq.read_table(path)
    column = table.schema.get_field_index("iou")
    raised = pc.min_element_wise(pc.add(table["iou"], 0.01), 1.0)
    write_part(folder, 0, table.set_column(column, table.schema.field("iou"), raised))


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            change_record,
            ["records/part-00000.parquet: SHA-256 is ", "corrected is", "summary.json."],
        ),
        (edit("summary.json", '"images_measured": 6', '"images_measured": 7'), ["says 7, the rec"]),
        (
            edit("plan.yaml", "guidance_scale: 7.5", "guidance_scale: 2.0"),
            ["plan.yaml is not", "2.0"],
        ),
        (lambda folder: next((folder / "pictures").iterdir()).unlink(), ["cannot be read"]),
        (lambda folder: (folder / "summary.json").unlink(), ["summary.json is missing"]),
        (lambda folder: part_path(folder, 1).write_bytes(b"x"), ["SHA-256 is", "cannot be read"]),
        (lambda folder: part_path(folder, 1).unlink(), ["summary.json.run"]),
        (lambda folder: next((folder / "hashes").iterdir()).unlink(), ["hashes cannot be read"]),
    ],
)
def test_validate_finds_what_was_changed(finished, tmp_path, change, expected):
    result, _ = finished
    folder = copied(result, tmp_path / "run")
    assert validate(folder) == []
    change(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = validate(folder)
    for text in expected:
        assert any(text in line for line in found), found
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    done = CliRunner().invoke(cli.app, ["report", str(folder), "--validate"])
    assert done.exit_code == 1
    assert done.stdout.splitlines() == found


def test_validate_command_of_a_whole_folder(finished):
    result, _ = finished
    done = CliRunner().invoke(cli.app, ["report", str(result.folder), "--validate", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"valid": True, "differences": []}
