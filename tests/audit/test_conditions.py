"""An audit under several conditions: the same seeds, paired differences, the ledger."""

from __future__ import annotations

import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from biasmap_fast.audit import AuditPlan, measure, run_audit, work
from biasmap_fast.audit.plan import Unit, explain
from biasmap_fast.audit.records import LEDGER_SCHEMA, RecordError, ledger_path, read_ledger


def make_plan(**changes):
    settings = {
        "model": "tiny",
        "professions": ["doctor", "pilot", "judge"],
        "axes": ["gender"],
        "prompt_template": "a photo of {profession}",
        "attribution_template": "a photo of {profession} and {demographic}",
        "conditions": ["plain", "guided"],
        "energy": {"scale": 30.0},
        "seeds": [3, 0, 8],
        "steps": 3,
        "batch_size": 4,
        "device": "cpu",
    }
    return AuditPlan(**(settings | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_sd):
    pipe = make_sd()
    folder = tmp_path_factory.mktemp("conditions") / "run"
    return run_audit(make_plan(), folder, pipe=pipe, progress=False), pipe


def rows_of(result, **wanted):
    return [
        row
        for row in result.records.to_pylist()
        if all(row[name] == value for name, value in wanted.items())
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"conditions": []}, "conditions: expected at least one, got none"),
        ({"conditions": ["plain", "plain"]}, r"got \['plain'\] more than once"),
        (
            {"conditions": ["fair"], "energy": None},
            r"conditions: expected 'plain', 'guided' or 'name=.*got 'fair'",
        ),
        ({"conditions": ["plain"]}, r"`energy` belongs to the condition 'guided', got conditions"),
        ({"energy": {"scale": math.inf}}, r"energy\.scale: Input should be a finite number"),
        ({"energy": {"strength": 1}}, r"energy\.strength: Extra inputs are not permitted"),
        ({"preset": "paper", "guidance_scale": 7.0, "seeds": [0]}, "preset 'paper' measures"),
    ],
)
def test_plan_says_what_is_wrong(changes, expected):
    with pytest.raises(ValidationError) as error:
        make_plan(**changes)
    assert re.search(expected, explain(error.value)), explain(error.value)


def test_the_energy_is_written_out_and_survives_yaml(tmp_path):
    plan = make_plan(energy=None)
    assert plan.energy is not None
    assert plan.energy.scale == 100.0
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml(), encoding="utf-8")
    assert AuditPlan.from_yaml(path) == plan
    assert make_plan(conditions=["plain"], energy=None).energy is None


def test_chunks_do_not_mix_conditions():
    chunks = make_plan().chunks()
    assert [len(chunk) for chunk in chunks] == [4, 4, 1, 4, 4, 1]
    assert [{unit.condition for unit in chunk} for chunk in chunks] == [{"plain"}] * 3 + [
        {"guided"}
    ] * 3
    assert chunks[3][0] == Unit("doctor", 3, "guided")
    assert make_plan().pictures == 18


def test_plain_records_are_those_of_a_plain_audit(finished, tmp_path):
    result, pipe = finished
    plan = make_plan(conditions=["plain"], energy=None)
    alone = run_audit(plan, tmp_path / "run", pipe=pipe, progress=False)
    assert rows_of(result, condition="plain") == alone.records.to_pylist()
    assert read_ledger(tmp_path / "run").num_rows == 0
    assert "<h2>Condition" not in alone.report.read_text()


def test_guided_records_say_what_guidance_did(finished):
    result, _ = finished
    ledger = read_ledger(result.folder)
    assert ledger.schema.equals(LEDGER_SCHEMA)
    assert ledger.num_rows == 9 * 3
    for row in rows_of(result, condition="guided"):
        own = [
            one
            for one in ledger.to_pylist()
            if (one["semantic"], one["seed"]) == (row["semantic"], row["seed"])
        ]
        assert [one["call"] for one in own] == [0, 1, 2]
        assert row["guidance_energy_first"] == own[0]["energy"]
        assert row["guidance_energy_last"] == own[-1]["energy"]
        assert (row["guidance_applied"], row["guidance_skipped"]) == (3, 0)
        # the pairs that are measured, each from the prompt that has both words
        assert own[0]["pairs"] == [f"{row['semantic']}+man", f"{row['semantic']}+woman"]
        assert own[0]["energy"] == pytest.approx(np.mean(own[0]["soft_iou"]), rel=1e-5)
    assert all(row["guidance_applied"] is None for row in rows_of(result, condition="plain"))


def test_guidance_of_separate_prompts(finished, tmp_path):
    _, pipe = finished
    plan = make_plan(
        professions=["doctor", "judge"],
        attribution_template=("a photo of {profession}", "a photo of {a_demographic}"),
        batch_size=6,
    )
    result = run_audit(plan, tmp_path / "run", pipe=pipe, progress=False)
    guided = rows_of(result, condition="guided")
    assert {row["status"] for row in guided} == {"ok"}
    pairs = {(one["semantic"], *one["pairs"]) for one in read_ledger(result.folder).to_pylist()}
    assert pairs == {(p, f"{p}+man", f"{p}+woman") for p in ("doctor", "judge")}


def test_differences_recomputed_from_the_records(finished):
    result, _ = finished
    for found in result.summary["differences"]:
        assert (found["condition"], found["baseline"]) == ("guided", "plain")
        changes = {}
        for row in found["professions"]:
            sides = [
                {
                    one["seed"]: one["iou"]
                    for one in rows_of(
                        result,
                        condition=condition,
                        semantic=row["semantic"],
                        demographic=found["demographic"],
                    )
                }
                for condition in ("plain", "guided")
            ]
            change = [sides[1][seed] - sides[0][seed] for seed in (0, 3, 8)]
            changes[row["semantic"]] = np.mean(change)
            low, high = stats.t.interval(0.95, 2, np.mean(change), stats.sem(change))
            assert row["iou"]["value"] == pytest.approx(np.mean(change))
            assert row["iou"]["low"] == pytest.approx(max(-1, low))
            assert row["iou"]["high"] == pytest.approx(min(1, high))
        assert found["iou"]["value"] == pytest.approx(np.mean(list(changes.values())))
        difference = found["condition_iou"] - found["baseline_iou"]
        assert found["iou"]["value"] == pytest.approx(difference)
    assert len(result.summary["differences"]) == 2
    assert [row["pictures"] for row in result.summary["guidance"]] == [9, 9, 9]


def test_images_measured_under_one_condition_only_do_not_count(finished):
    from biasmap_fast.audit.compare import differences

    values = {
        ("plain", "gender", "man", 70.0): {"doctor": {0: 0.5, 1: 0.5}, "judge": {}},
        ("guided", "gender", "man", 70.0): {"doctor": {0: 0.25, 7: 0.0}, "judge": {0: 0.1}},
    }
    (found,) = differences(make_plan(), values, values)
    doctor, judge = found["professions"]
    assert doctor["iou"]["value"] == -0.25
    assert doctor["iou"]["n"] == 1
    assert judge["iou"]["value"] is None
    assert found["iou"]["value"] == -0.25


def test_killed_run_continues_with_the_same_records_and_ledger(finished, tmp_path, monkeypatch):
    result, pipe = finished
    real, done = measure.measure_chunk, []

    def stops(*args):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(args)
        return real(*args)

    monkeypatch.setattr(work, "measure_chunk", stops)
    with pytest.raises(KeyboardInterrupt):
        run_audit(make_plan(), tmp_path / "run", pipe=pipe, progress=False)
    # killed between the two files of a chunk: the ledger is there, the records are not
    (tmp_path / "run" / "records" / "part-00003.parquet").unlink()
    assert read_ledger(tmp_path / "run").num_rows == 0
    monkeypatch.setattr(work, "measure_chunk", real)
    again = run_audit(make_plan(), tmp_path / "run", pipe=pipe, progress=False)
    assert again.records.equals(result.records)
    assert read_ledger(tmp_path / "run").equals(read_ledger(result.folder))
    assert again.summary == result.summary


def test_a_damaged_ledger_is_named(finished, tmp_path):
    result, _ = finished
    path = ledger_path(result.folder, 3)
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:100])
        with pytest.raises(RecordError, match=r"part-00003\.parquet cannot be read"):
            read_ledger(result.folder)
    finally:
        path.write_bytes(whole)


def test_a_picture_without_a_guided_call_is_none_of_the_guided(finished, tmp_path):
    _, pipe = finished
    energy = {"start": 0.9, "stop": 0.95}
    plan = make_plan(professions=["doctor"], seeds=[0], energy=energy)
    result = run_audit(plan, tmp_path / "run", pipe=pipe, progress=False)
    failed = rows_of(result, condition="guided")
    assert {row["status"] for row in failed} == {"guidance_skipped"}
    assert {row["reason"] for row in failed} == {
        "no UNet call lay between the energy's start and stop"
    }
    assert "1 picture could not be measured (guidance_skipped)." in result.report.read_text("utf-8")


def test_a_picture_that_was_hardly_guided_is_a_row_without_numbers(finished, tmp_path, monkeypatch):
    import biasmap_fast.evaluators as module

    _, pipe = finished
    original = module.soft_iou
    monkeypatch.setattr(module, "soft_iou", lambda *args: original(*args) * math.nan)
    plan = make_plan(professions=["doctor"], seeds=[0])
    result = run_audit(plan, tmp_path / "run", pipe=pipe, progress=False)
    failed = rows_of(result, condition="guided")
    assert {row["status"] for row in failed} == {"guidance_skipped"}
    assert all(row["iou"] is None for row in failed)
    assert {row["reason"] for row in failed} == {
        "guidance was skipped in 3 of 3 UNet calls (see ledger/)"
    }
    assert {row["status"] for row in rows_of(result, condition="plain")} == {"ok"}
    report = result.report.read_text()
    assert "3 calls of a picture (gradient is not finite)" in report


def test_report_shows_both_conditions(finished):
    result, _ = finished
    text = result.report.read_text()
    assert "Condition “guided” against “plain”" in text
    assert "it does not show that the pictures bind the two concepts any less" in text
    assert "Every call of every picture was guided." in text
    finding = re.search(r'<p class="lead">(The 95.*?)</p>', text)[1]
    assert finding.count("with “man”") == 2  # above and below, of the first condition alone
    row = result.summary["differences"][0]
    assert f"{row['baseline_iou']:.3f}" in text


def test_compiled_audit(finished, tmp_path, monkeypatch):
    """Graph capture alone, over two batches: the second has recorder and hooks of its own."""
    _, pipe = finished
    unet = pipe.unet
    small = {"conditions": ["plain"], "energy": None, "steps": 1, "professions": ["doctor"]}
    small |= {"seeds": [0, 1], "batch_size": 1}
    expected = run_audit(make_plan(**small), tmp_path / "eager", pipe=pipe, progress=False)
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plan = make_plan(**small, compile=True)
    found = run_audit(plan, tmp_path / "compiled", pipe=pipe, progress=False)
    torch.compiler.reset()
    assert pipe.unet is unet
    assert found.records.num_rows == 4
    for row, right in zip(found.records.to_pylist(), expected.records.to_pylist(), strict=True):
        assert row["status"] == right["status"] == "ok"
        assert row["soft_iou"] == pytest.approx(right["soft_iou"], rel=1e-4)
    hashes = {
        json.loads((tmp_path / name / "environment.json").read_text())["weights_sha256"]
        for name in ("compiled", "eager")
    }
    assert len(hashes) == 1


def test_guided_pictures_are_not_drawn_by_a_compiled_unet():
    with pytest.raises(ValueError, match="'guided' cannot be drawn with `compile`"):
        AuditPlan(professions=["doctor"], conditions=["plain", "guided"], compile=True)
    assert AuditPlan(professions=["doctor"], compile=True).compile
