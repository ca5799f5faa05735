"""The command line: messages, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import biasmap_fast
from biasmap_fast import pipelines
from biasmap_fast.allocator import keep_freed_memory
from biasmap_fast.audit import run, worker
from biasmap_fast.cli import app
from biasmap_fast.options import seeds

TEMPLATES = [
    "--prompt-template",
    "a photo of {profession}",
    "--attribution-template",
    "a photo of {profession} and {demographic}",
]


@pytest.fixture
def invoke(make_sd, monkeypatch):
    """Runs a command with the tiny pipeline in place of any model."""

    def load(model, **options):
        return make_sd()

    monkeypatch.setattr(worker, "load_pipeline", load)
    monkeypatch.setattr(pipelines, "load_pipeline", load)

    def call(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args])

    return call


def audit(out, *more):
    plan = ["--model", "tiny", "--professions", "doctor,judge", "--seeds", "2", "--steps", "2"]
    return ["audit", *plan, *TEMPLATES, "--out", out, "--no-progress", *more]


def test_audit_says_where_the_report_lies_and_continues(invoke, tmp_path):
    result = invoke(*audit(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in result.stdout
    assert "4 of 4 pictures measured: 2 professions, 2 seeds each, 2 steps" in result.stdout
    assert (tmp_path / "run" / "summary.json").is_file()
    again = invoke(*audit(tmp_path / "run", "--json"))
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == json.loads((tmp_path / "run/summary.json").read_text())


def test_flags_reach_the_plan_and_override_the_file(invoke, tmp_path):
    config = tmp_path / "plan.yaml"
    config.write_text("steps: 9\nbatch_size: 3\nsave_maps: none\n", encoding="utf-8")
    flags = ["--config", config, "--fraction", "0.4", "--fraction", "0.2", "--axis", "build=tall"]
    result = invoke(*audit(tmp_path / "run", *flags, "--seeds", "4-5", "--guidance-scale", "2"))
    assert result.exit_code == 0, result.output
    plan = run.load_audit(tmp_path / "run").plan
    assert (plan.steps, plan.batch_size, plan.save_maps) == (2, 3, "none")
    assert (plan.fractions, plan.seeds, plan.guidance_scale) == ((0.4, 0.2), (4, 5), 2.0)
    assert plan.axes == {"build": ("tall",)}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--fraction", "1.2"], "fractions.0: Input should be less than 1, got 1.2"),
        (["--axis", "colour"], "expected one of ['gender', 'race'] or 'name=word,word'"),
        (["--professions", "doktor"], "one of the lists ['biasmap'], got 'doktor'"),
        (["--guidance-scale", "-1"], "guidance_scale: Input should be greater than or equal to 0"),
        (["--config", "missing.yaml"], "No such file or directory: 'missing.yaml'"),
        (["--attribution-template", "x"], "a template needs {profession}"),
        (["--layer", "up_blocks.9"], "up_blocks.9"),
        (["--scheduler", "Fast"], "class name of a scheduler of diffusers"),
        (["--precision", "0.5"], "precision: Input should be less than 0.5, got 0.5"),
        (["--precision", "0.1"], "seeds: with a precision they are the first round"),
        (["--max-seeds", "9"], "`max_seeds` belongs to a precision, got 9 and no precision"),
        (["--workers", "2"], "`workers` and `threads` belong to a cluster"),
        (["--threads", "2"], "`workers` and `threads` belong to a cluster"),
    ],
)
def test_user_errors_are_one_line_without_traceback(invoke, tmp_path, flags, expected):
    if "--attribution-template" in flags:
        plan = ["audit", "--model", "tiny", "--professions", "doctor,judge", "--out", tmp_path]
        result = invoke(*plan, *flags)
    else:
        result = invoke(*audit(tmp_path / "run", *flags))
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("biasmap: error: ")
    assert expected in lines[0]
    assert "Traceback" not in result.stderr


def test_a_precision_reaches_the_plan_and_the_output(invoke, tmp_path):
    flags = ["--seeds", "10", "--precision", "0.2", "--max-seeds", "14", "--steps", "1"]
    result = invoke(*audit(tmp_path / "run", *flags, "--no-controls"))
    assert result.exit_code == 0, result.output
    plan = run.load_audit(tmp_path / "run").plan
    assert (plan.precision, len(plan.seeds), plan.max_seeds) == (0.2, 10, 14)
    assert "was within ±0.2. That took" in result.stdout
    assert "Seeds were drawn in rounds" in (tmp_path / "run/model-card.md").read_text("utf-8")


def test_refused_folder_names_the_setting(invoke, tmp_path):
    assert invoke(*audit(tmp_path / "run")).exit_code == 0
    result = invoke(*audit(tmp_path / "run", "--steps", "3"))
    assert result.exit_code == 1
    assert "another plan (setting: there, here): steps: 2, 3" in result.stderr


def test_a_plan_that_never_drew_a_picture_can_be_mended(invoke, tmp_path):
    failed = invoke(*audit(tmp_path / "run", "--layer", "typo"))
    assert failed.exit_code == 1
    assert "no cross-attention layer matches 'typo'" in failed.stderr
    assert not list((tmp_path / "run/pictures").iterdir())
    unfinished = tmp_path / "run/hashes/part-00000.json"  # of a chunk that was killed
    unfinished.touch()
    assert "another plan" in invoke(*audit(tmp_path / "run")).stderr
    unfinished.unlink()
    mended = invoke(*audit(tmp_path / "run", "--layer", "up_blocks"))
    assert mended.exit_code == 0, mended.output
    assert run.load_audit(tmp_path / "run").plan.layers == ("up_blocks",)


def test_report_is_rendered_again(invoke, tmp_path):
    assert invoke(*audit(tmp_path / "run")).exit_code == 0
    (tmp_path / "run" / "report.html").unlink()
    result = invoke("report", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "report.html").is_file()
    assert json.loads(invoke("report", tmp_path / "run", "--json").stdout)["schema_version"] == 5
    failed = invoke("report", tmp_path)
    assert failed.exit_code == 1
    assert "is no run folder: it has no plan.yaml" in failed.stderr


@pytest.mark.parametrize(
    ("flags", "status", "expected"),
    [
        (["--steps", "0"], 1, "steps: Input should be greater than or equal to 1, got 0"),
        (["--fraction", "1.5"], 1, "`fraction` must be in (0, 1), got 1.5"),
    ],
)
def test_maps_looks_at_its_numbers_first(invoke, tmp_path, flags, status, expected):
    args = ["maps", "--model", "tiny", "--prompt", "a photo of a doctor", "--concept", "doctor"]
    failed = invoke(*args, "--out", tmp_path / "m", *flags)
    assert failed.exit_code == status
    assert expected in " ".join(failed.stderr.replace("│", " ").split())
    assert not (tmp_path / "m").exists()


def test_maps_writes_overlays_and_maps(invoke, tmp_path):
    args = ["maps", "--model", "tiny", "--prompt", "a photo of a doctor", "--steps", "2"]
    args += ["--attribution-prompt", "a photo of a doctor and man", "--out", tmp_path / "m"]
    result = invoke(*args, "--concept", "doctor", "--concept", "man")
    assert result.exit_code == 0, result.output
    assert "IoU of 'doctor' and 'man', masks of 0.3 of the pixels:" in result.stdout
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {"picture.png", "overlay-doctor.png", "overlay-man.png", "maps.safetensors"}
    maps = biasmap_fast.AttributionMaps.load(tmp_path / "m" / "maps.safetensors")
    assert maps.concepts == ("doctor", "man")
    refused = invoke(*args, "--concept", "doctor", "--concept", "man", "--json")
    assert "has the files of an earlier run" in refused.stderr
    args.append("--overwrite")
    found = json.loads(invoke(*args, "--concept", "doctor", "--concept", "man", "--json").stdout)
    assert found["pairs"][0]["chance"] == pytest.approx(0.3 / 1.7)
    failed = invoke(*args, "--concept", "pilot")
    assert failed.exit_code == 1
    assert "the concept 'pilot' is not in the attribution prompt" in failed.stderr


def test_generate_draws_before_and_after(invoke, tmp_path):
    args = ["generate", "--model", "tiny", "--prompt", "a photo of a doctor", "--steps", "2"]
    args += ["--attribution-prompt", "a photo of a doctor and man", "--out", tmp_path / "g"]
    args += ["--concept", "doctor", "--concept", "man", "--seeds", "3", "--batch-size", "2"]
    result = invoke(*args, "--scale", "30")
    assert result.exit_code == 0, result.output
    assert (
        "IoU of 'doctor' and 'man', masks of 0.3 of the pixels, mean of 3 pictures:"
        in result.stdout
    )
    names = {path.name for path in (tmp_path / "g").iterdir()}
    pictures = {
        f"seed-{seed}-{when}-{what}.png"
        for seed in range(3)
        for when in ("before", "after")
        for what in ("picture", "doctor", "man")
    }
    others = {"comparison.png", "ledger.csv", "generate.json"}
    assert names == pictures | others | {"maps-before.safetensors", "maps-after.safetensors"}
    with (tmp_path / "g" / "ledger.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["call"]) for row in rows] == [
        ("0", "0"), ("1", "0"), ("0", "1"), ("1", "1"), ("2", "0"), ("2", "1"),
    ]  # fmt: skip
    found = json.loads((tmp_path / "g" / "generate.json").read_text())
    assert found["energy"]["scale"] == 30.0
    for when in ("before", "after"):
        maps = biasmap_fast.AttributionMaps.load(tmp_path / "g" / f"maps-{when}.safetensors")
        iou = biasmap_fast.iou(maps["doctor"], maps["man"], fraction=0.3)
        assert [row[f"iou_{when}"] for row in found["overlaps"]] == pytest.approx(iou.tolist())
    again = invoke(*args, "--scale", "0", "--pair", "doctor,man", "--overwrite", "--json")
    for row in json.loads(again.stdout)["overlaps"]:
        assert row["iou_before"] == row["iou_after"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--pair", "doctor"], "--pair must be two concepts, 'doctor,woman', got 'doctor'"),
        (["--pair", "doctor,pilot"], "names 'pilot', which is no concept of"),
        (["--branch", "both"], "branch: Input should be 'cond' or 'uncond', got 'both'"),
        (["--start", "0.9", "--stop", "0.1"], "got 0.9 and 0.1"),
        (["--inner-steps", "0"], "inner_steps: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_generate_says_what_is_wrong(invoke, tmp_path, flags, expected):
    args = ["generate", "--model", "tiny", "--prompt", "a doctor and man", "--out", tmp_path / "g"]
    result = invoke(*args, "--concept", "doctor", "--concept", "man", *flags)
    assert result.exit_code == 1
    assert expected in result.stderr
    assert not (tmp_path / "g").exists()


def test_flags_of_conditions_reach_the_plan(invoke, tmp_path):
    config = tmp_path / "plan.yaml"
    config.write_text("energy: {inner_steps: 2, scale: 5}\n", encoding="utf-8")
    flags = ["--condition", "plain", "--condition", "guided", "--scale", "30", "--config", config]
    result = invoke(*audit(tmp_path / "run", *flags))
    assert result.exit_code == 0, result.output
    plan = run.load_audit(tmp_path / "run").plan
    assert plan.conditions == ("plain", "guided")
    assert (plan.energy.scale, plan.energy.inner_steps) == (30.0, 2)
    assert "guided: " in result.stdout.partition("gender: ")[2]
    refused = invoke(*audit(tmp_path / "other", "--scale", "30"))
    assert "`energy` belongs to the condition 'guided'" in refused.stderr


def test_env_for_people_and_machines():
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    assert "torch" in result.stdout
    assert "backend: " in result.stdout
    found = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert {"versions", "python", "platform", "cpu", "threads", "native", "extras"} <= found.keys()
    assert found["extras"]["audit"] == "installed"
    assert found["native"]["kernels"]["cpu"] == "native"


def test_seeds_count_range_list():
    assert seeds("3") == [0, 1, 2]
    assert seeds("5-7") == [5, 6, 7]
    assert seeds("1, 9") == [1, 9]
    assert seeds("4,") == [4]


@pytest.mark.parametrize("text", ["0", "7-5", "a", "1-2-3", "", "1.5"])
def test_badseeds(text):
    result = CliRunner().invoke(app, ["audit", "--seeds", text])
    assert result.exit_code == 2
    assert "expected a count ('20'), a range ('5-24') or a list" in " ".join(
        result.stderr.replace("│", " ").split()
    )


def test_help_names_every_command_and_default():
    text = CliRunner().invoke(app, ["--help"]).stdout
    for command in ("audit", "maps", "generate", "report", "env"):
        assert command in text
    text = CliRunner().invoke(app, ["audit", "--help"], env={"COLUMNS": "200"}).stdout
    for flag in ("--model", "--professions", "--axis", "--seeds", "--fraction", "--config"):
        assert flag in text
    assert "[default: 25]" in text


def command(*args, **env):
    code = "import sys; from biasmap_fast.cli import main; sys.argv[0] = 'biasmap'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env=os.environ | env,
        check=False,
        timeout=120,
    )


def test_process_exit_codes_and_streams(tmp_path):
    version = command("--version")
    assert (version.returncode, version.stdout.strip()) == (0, biasmap_fast.__version__)
    failed = command("report", str(tmp_path))
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "Traceback" not in failed.stderr
    assert "is no run folder" in failed.stderr


def test_missing_extra_names_the_extra(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'pyarrow':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing)\n"
    )
    code = (
        "import runpy, sys; runpy.run_path(sys.argv.pop(1)); "
        "from biasmap_fast.cli import main; main()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sitecustomize.py"), "report", "runs/none"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert found.returncode == 1
    assert 'pip install "biasmap-fast[audit]"' in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt's numbers are glibc's")
def test_freed_memory_is_kept(monkeypatch):
    # in a process of its own: the setting is the whole process's
    code = """
import resource, torch
from biasmap_fast.allocator import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        a = torch.ones(2**21)  # 8 MiB
        b = torch.ones(2**21)
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
assert keep_freed_memory()
faults()
print(faults())
"""
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 100  # 2048 pages an allocation, were it given back
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()


def test_only_the_package_reports_what_it_does():
    """In a process of its own: pytest's has handlers of its own."""
    script = """
import logging
from biasmap_fast.cli import _clear_errors
with _clear_errors(verbose=False):
    logging.getLogger("onnxscript.optimizer").info("no word")
    logging.getLogger("onnxscript.optimizer").warning("a warning")
    logging.getLogger("biasmap_fast.audit").info("a step")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("biasmap: ")]
    assert said == ["biasmap: a warning", "biasmap: a step"]
