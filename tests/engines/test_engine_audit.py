"""The export script, and an audit of the embedded model through the engine that it writes."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import biasmap_fast as bm
from biasmap_fast import cli
from biasmap_fast.audit import report
from biasmap_fast.audit.run import AuditError
from biasmap_fast.engines import errors

PLAN = {"professions": ["doctor", "nurse"], "seeds": [0, 1], "steps": 4, "batch_size": 3}


@pytest.fixture(scope="session")
def engine(testbed_folder):
    return testbed_folder


@pytest.fixture(scope="module")
def audited(engine, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    plans = {
        "torch": bm.AuditPlan(**PLAN, save_maps="none"),
        "engine": bm.AuditPlan(**PLAN, save_maps="none", engine=str(engine)),
    }
    return {name: bm.run_audit(plan, runs / name, progress=False) for name, plan in plans.items()}


def test_the_same_table(audited):
    found, expected = (audited[name].measurements for name in ("engine", "torch"))
    key = found.columns.drop(["value", "status", "reason"]).tolist()
    assert found[key].equals(expected[key])
    assert set(found["status"]) == set(expected["status"]) == {"ok"}
    difference = (found["value"] - expected["value"]).abs()
    assert difference.max() < 0.01
    assert difference[found["measure"] != "iou"].max() < 1e-3


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of Ray's own sockets and log files
def test_workers_of_a_cluster_load_the_engine(audited, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_report", lambda *args: [])
    plan = bm.AuditPlan(**PLAN, save_maps="none", engine=str(engine))
    threads = torch.get_num_threads()
    found = bm.run_audit(
        plan, tmp_path / "run", progress=False, cluster="local", workers=1, threads=threads
    )
    assert found.measurements.equals(audited["engine"].measurements)


def test_the_run_says_what_drew(audited, engine):
    folders = {name: result.folder for name, result in audited.items()}
    said = {
        name: json.loads((folder / "environment.json").read_text())
        for name, folder in folders.items()
    }
    assert said["torch"]["engine"] is None
    assert said["engine"]["engine"]["folder"] == str(engine)
    assert said["engine"]["engine"]["opset"] == 20
    assert said["engine"]["weights_sha256"] != said["torch"]["weights_sha256"]
    with pytest.raises(AuditError, match="another plan.*engine: "):
        bm.run_audit(audited["torch"].plan, folders["engine"])


def test_the_given_pipeline_is_left_as_it_was(engine, tmp_path):
    pipe = bm.testbed.pipeline()
    unet = pipe.unet
    plan = bm.AuditPlan(**{**PLAN, "seeds": [0], "steps": 1}, engine=str(engine))
    bm.run_audit(plan, tmp_path / "run", pipe=pipe, progress=False)
    assert pipe.unet is unet
    with torch.no_grad():
        unet.conv_out.bias.add_(1e-3)
    with pytest.raises(errors.WrongModelError, match="other weights"):
        bm.run_audit(plan, tmp_path / "other", pipe=pipe, progress=False)
    half = bm.testbed.pipeline(dtype=torch.float16)
    with pytest.raises(AuditError, match="the plan says float16, the engine in .* is float32"):
        bm.run_audit(
            bm.AuditPlan(**PLAN, dtype="float16", engine=str(engine)),
            tmp_path / "half",
            pipe=half,
            progress=False,
        )


def run_cli(*arguments):
    return CliRunner().invoke(cli.app, [str(each) for each in arguments])


def test_audit_command(engine, tmp_path):
    done = run_cli(
        "audit", "--professions", "doctor,", "--seeds", "1", "--steps", "1", "--engine", engine,
        "--out", tmp_path / "run", "--no-progress",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"engine: {engine}" in (tmp_path / "run" / "plan.yaml").read_text()
    done = run_cli("audit", "--engine", tmp_path / "none", "--out", tmp_path / "two")
    assert done.exit_code == 1
    assert "write an engine with `biasmap export`" in done.output


def test_an_engine_that_cannot_guide_is_refused_before_a_picture(engine, tmp_path):
    conditions = ["--condition", "plain", "--condition", "guided"]
    done = run_cli(
        "audit", "--professions", "doctor,nurse", "--seeds", "1", "--engine", engine, *conditions,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 1
    assert "takes at most {'prompts': 1}, and {'prompts': 2} are needed" in done.output
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_a_dry_run_says_the_size_and_writes_nothing(engine, tmp_path):
    done = run_cli(
        "export", "--out", tmp_path / "e", "--dry-run", "--json", "--gradient", "16x16"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    announced = json.loads(done.stdout)
    files = sum(path.stat().st_size for path in engine.iterdir())
    assert announced["files_mib"] == pytest.approx(files / 2**20, rel=0.1)
    assert announced["shapes"] == "testbed"
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gradient", "big"], "--gradient must be HEIGHTxWIDTH"),
        (["--shapes", "sd9"], "`shapes` must be a Shapes or one of"),
        (["--maps", "all"], "`maps` must be one of"),
        (["--format", "openvino"], "`format` must be one of"),
        (["--convolutions", "fft"], "`convolutions` must be one of"),
        (["--gradient", "18x16"], "multiples of 4, got 18 x 16"),
        (["--gradient", "16x16", "--maps", "none"], "gradient graphs need maps='reduced'"),
        (["--layer", "up_blocks.9"], "no cross-attention layer matches"),
    ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_bad_flags(tmp_path, flags, message, dry_run):
    done = run_cli("export", "--out", tmp_path / "e", *flags, *dry_run)
    assert done.exit_code == 1
    assert message in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_an_existing_folder(tmp_path, dry_run):
    done = run_cli("export", "--out", tmp_path, *dry_run)
    assert done.exit_code == 1
    assert "exists: give a new folder" in done.output
