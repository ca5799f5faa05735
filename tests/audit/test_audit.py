"""The audit: plan, run folder, resume, statuses, summary, report."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from biasmap_fast import testbed
from biasmap_fast.audit import (
    AuditError,
    AuditPlan,
    RecordError,
    load_audit,
    measure,
    render,
    run,
    run_audit,
    sentences,
    work,
)
from biasmap_fast.audit.plan import Unit, explain
from biasmap_fast.audit.records import (
    KEY,
    SCHEMA,
    part_path,
    read_part,
    read_records,
    to_table,
    write_part,
)
from biasmap_fast.audit.summary import summarise
from biasmap_fast.pipelines import ModelError

WEIGHTS = (testbed.WEIGHTS / "model_index.json").is_file()


def tiny_plan(**changes):
    """Three professions, three seeds, two axes, one of them not of two words."""
    settings = {
        "model": "tiny",
        "professions": ["doctor", "pilot", "judge"],
        "axes": ["gender", "build=tall,short,wide"],
        "prompt_template": "a photo of {profession}",
        "attribution_template": "a photo of {profession} and {demographic}",
        "seeds": [3, 0, 8],
        "steps": 2,
        "batch_size": 4,
        "percentiles": [70, 90],
        "device": "cpu",
    }
    return AuditPlan(**(settings | changes))


def message(error) -> str:
    return explain(error.value) if isinstance(error.value, ValidationError) else str(error.value)


# --- plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"percentiles": [70, 100]}, r"percentiles.*between 0 and 100, both excluded, got \[100"),
        ({"percentiles": [70, 70]}, r"expected each one once, got \[70"),
        ({"professions": []}, "professions: expected at least one, got none"),
        ({"professions": ["doctor", " "]}, r"professions: expected words, got \[' '\]"),
        ({"professions": "doktor"}, r"one of the lists \['biasmap'\], got 'doktor'"),
        ({"seeds": [1, 1]}, r"seeds: expected each one once, got \[1\] more than once"),
        ({"seeds": [-1]}, r"between 0 and 2\*\*63 - 1, got \[-1\]"),
        ({"axes": ["colour"]}, r"expected one of \['gender', 'race'\] or .*, got 'colour'"),
        ({"axes": {}}, "at least one demographic axis, got none"),
        ({"axes": {"gender": []}}, "axis 'gender' needs at least one word"),
        ({"axes": ["gender", "gender"]}, "each axis once, got 'gender'"),
        ({"prompt_template": "a photo"}, r"needs \{profession\} and nothing else in braces"),
        ({"prompt_template": "a {noun}"}, r"needs \{profession\}.*got 'a \{noun\}'"),
        ({"prompt_template": "photo of a {profession}"}, "brings its own article"),
        ({"prompt_template": "{profession"}, "cannot be read"),
        ({"attribution_template": "{profession}"}, r"\{a_demographic\} or \{demographic\}"),
        ({"steps": 0}, "steps: .*greater than or equal to 1, got 0"),
        ({"batch_size": 0}, "batch_size: .*got 0"),
        ({"dtype": "int8"}, "dtype: .*'float32', 'float16' or 'bfloat16', got 'int8'"),
        ({"steeps": 3}, "steeps: Extra inputs are not permitted, got 3"),
        ({"branch": "uncond", "guidance_scale": 1}, "expected guidance_scale > 1, got 1"),
        ({"preset": "paper", "branch": "cond"}, "preset 'paper' means branch='uncond', got 'cond'"),
        ({"model": "testbed", "revision": "main"}, "testbed has no revisions, got 'main'"),
        ({"professions": ["tall man"]}, "the concept 'man' once in .* got it 2 times"),
        ({"temperature": 0}, "temperature: .*got 0"),
    ],
)
def test_plan_says_what_is_wrong(changes, expected):
    with pytest.raises(ValidationError) as error:
        tiny_plan(**changes)
    text = message(error)
    assert re.search(expected, text), text
    assert "\n" not in text


def test_plan_is_complete_and_survives_yaml(tmp_path):
    plan = tiny_plan(layers=["up_blocks"], attribution_template=["{profession}", "{a_demographic}"])
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml(), encoding="utf-8")
    assert AuditPlan.from_yaml(path) == plan
    assert set(AuditPlan.model_fields) == set(plan.model_dump())
    with pytest.raises(ValidationError, match="frozen"):
        plan.steps = 3


def test_plan_defaults_follow_the_model():
    bed = AuditPlan()
    assert bed.professions == tuple(row.profession for row in testbed.truth())
    assert bed.guidance_scale == 1.0
    other = AuditPlan(model="some/model")
    assert (len(other.professions), other.guidance_scale) == (19, 7.5)
    paper = AuditPlan(model="some/model", preset="paper")
    assert (paper.branch, paper.evaluation_size, paper.soft_mask) == ("uncond", 512, "paper")
    assert (paper.steps, paper.guidance_scale, len(paper.seeds)) == (50, 7.0, 100)


def test_plan_writes_articles_and_prompts():
    plan = tiny_plan(professions=["architect", "judge"])
    assert plan.prompt("architect") == "a photo of an architect"
    first, second = plan.pairs("judge")[:2]
    assert first.texts == ["a photo of a judge and man"]
    assert second.semantic_prompt is second.demographic_prompt
    apart = tiny_plan(
        attribution_template=["a photo of {profession}", "a photo of {a_demographic}"],
        axes="age=elder,child",
    )
    pair = apart.pairs("doctor")[0]
    assert pair.texts == ["a photo of a doctor", "a photo of an elder"]
    assert (pair.semantic_prompt.concepts, pair.demographic_prompt.concepts) == (
        ("doctor",),
        ("elder",),
    )


def test_chunks_depend_on_the_plan_alone():
    plan = tiny_plan()
    chunks = plan.chunks()
    assert [len(chunk) for chunk in chunks] == [4, 4, 1]
    assert [u for chunk in chunks for u in chunk] == list(plan.units())
    assert chunks[0][:2] == [Unit("doctor", 3), Unit("doctor", 0)]


@pytest.mark.parametrize(
    ("text", "expected"), [("[1, 2]", "must hold a mapping"), ("a: [", "is not valid YAML")]
)
def test_plan_file_that_is_no_plan(tmp_path, text, expected):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        AuditPlan.from_yaml(path)


# --- records ---------------------------------------------------------------------------------


def record(plan, profession="doctor", seed=0, word="man", percentile=70.0, **changes):
    chance = (1 - percentile / 100) / (1 + percentile / 100)
    row = {
        "condition": "plain",
        "model": plan.model,
        "semantic": profession,
        "axis": "gender",
        "demographic": word,
        "template": plan.prompt_template,
        "prompt": plan.prompt(profession),
        "attribution_prompts": ["x"],
        "seed": seed,
        "steps": plan.steps,
        "guidance_scale": plan.guidance_scale,
        "scheduler": "DDIMScheduler",
        "height": 64,
        "width": 64,
        "dtype": "float32",
        "branch": "cond",
        "soft_mask": "exact",
        "temperature": 0.01,
        "percentile": percentile,
        "chance": chance,
        "status": "ok",
        "iou": 0.3,
        "corrected": (0.3 - chance) / (1 - chance),
        "soft_iou": 0.31,
        "empty_union": False,
        "block_iou": [("up_blocks.0", 0.2), ("down_blocks.0", None)],
    }
    return row | changes


def test_records_are_typed_and_sorted(tmp_path):
    plan = tiny_plan()
    write_part(tmp_path, 1, to_table([record(plan, seed=9), record(plan, "artist", seed=1)]))
    write_part(tmp_path, 0, to_table([record(plan, seed=2)]))
    table = read_records(tmp_path)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    keys = list(zip(*(table[name].to_pylist() for name in KEY), strict=True))
    assert keys == sorted(keys)
    assert table["block_iou"][0].as_py() == [
        ("up_blocks.0", pytest.approx(0.2)),
        ("down_blocks.0", None),
    ]
    assert all(SCHEMA.field(name).metadata[b"doc"] for name in SCHEMA.names)


def test_half_written_record_file_is_named(tmp_path):
    path = write_part(tmp_path, 0, to_table([record(tiny_plan())]))
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", data[:-4] + b"XXXX"):
        path.write_bytes(damaged)
        with pytest.raises(RecordError, match=r"part-00000\.parquet cannot be read.*delete this"):
            read_records(tmp_path)


def test_left_over_temporary_file_is_ignored(tmp_path):
    write_part(tmp_path, 0, to_table([record(tiny_plan())]))
    part_path(tmp_path, 1).with_name(".part-00001.parquet.7.tmp").write_bytes(b"half")
    assert read_records(tmp_path).num_rows == 1


def test_foreign_and_repeated_records_are_refused(tmp_path):
    table = to_table([record(tiny_plan())])
    path = write_part(tmp_path, 0, table)
    write_part(tmp_path, 1, table)
    with pytest.raises(RecordError, match=r"1 measurements .* more than once.*'seed': 0"):
        read_records(tmp_path)
    pq.write_table(table.drop_columns(["iou"]), path)
    with pytest.raises(RecordError, match=r"missing \['iou'\]"):
        read_part(path)


def test_incomplete_records_are_not_written():
    row = record(tiny_plan())
    with pytest.raises(RecordError, match=r"unknown columns \['iuo'\]"):
        to_table([row | {"iuo": 1}])
    with pytest.raises(RecordError, match=r"lack values in the required columns \['prompt'\]"):
        to_table([{name: value for name, value in row.items() if name != "prompt"}])


# --- runs ------------------------------------------------------------------------------------


_FINISHED = []


@pytest.fixture
def finished(make_sd, tmp_path_factory):
    """A finished run of a tiny random pipeline, and the pipeline; made once."""
    if not _FINISHED:
        pipe = make_sd()
        folder = tmp_path_factory.mktemp("runs") / "finished"
        _FINISHED.append((run_audit(tiny_plan(), folder, pipe=pipe, progress=False), pipe))
    return _FINISHED[0]


def test_run_leaves_a_complete_folder(finished):
    result, _ = finished
    names = {path.name for path in result.folder.iterdir()}
    assert names == {
        "plan.yaml",
        "environment.json",
        "records",
        "controls",
        "masks",
        "pictures",
        "maps",
        "hashes",
        ".lock",
        "summary.json",
        "figures.csv",
        "figures.parquet",
        "model-card.md",
        "report.html",
    }
    assert result.records.num_rows == 3 * 3 * 5 * 2
    assert Counter(result.records["status"].to_pylist()) == {"ok": 90}
    assert len(list((result.folder / "pictures").iterdir())) == 3
    environment = json.loads((result.folder / "environment.json").read_text())
    assert len(environment["weights_sha256"]) == 64
    assert (
        environment["versions"]["torch"] == torch.__version__.split("+")[0]
        or "+" in (environment["versions"]["torch"])
    )
    assert environment["scheduler_config"]["beta_start"] == 0.00085
    assert load_audit(result.folder).summary == result.summary


def test_records_hold_what_it_takes_to_draw_and_measure_again(finished):
    result, pipe = finished
    row = result.records.filter(
        (np.array(result.records["percentile"]) == 90)
        & (np.array(result.records["demographic"]) == "short")
        & (np.array(result.records["seed"]) == 8)
        & (np.array(result.records["semantic"]) == "judge")
    ).to_pylist()[0]
    import biasmap_fast as bm

    prompt = bm.AttributionPrompt(row["attribution_prompts"][0], (row["semantic"], "short"))
    with bm.attribute(pipe, prompt, branch=row["branch"]) as recorder:
        pipe(
            row["prompt"],
            generator=torch.Generator().manual_seed(row["seed"]),
            num_inference_steps=row["steps"],
            guidance_scale=row["guidance_scale"],
        )
    maps = recorder.maps()
    a, b = maps["judge"][0].numpy(), maps["short"][0].numpy()
    masks = [x > np.percentile(x, 90) for x in (a, b)]
    iou = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    assert row["iou"] == pytest.approx(iou, abs=1e-4)
    assert row["chance"] == pytest.approx(0.1 / 1.9)
    assert row["corrected"] == pytest.approx((row["iou"] - 0.1 / 1.9) / (1 - 0.1 / 1.9))
    assert row["soft_iou"] == pytest.approx(
        float(bm.soft_iou(maps["judge"][0], maps["short"][0], fraction=0.1)), rel=1e-3
    )
    assert row["semantic_high"] == pytest.approx(a.max(), rel=1e-4)
    assert row["demographic_mass"] == pytest.approx(b.mean(), rel=1e-4)
    assert {block for block, _ in row["block_iou"]} == {
        "down_blocks.0",
        "down_blocks.1",
        "up_blocks.1",
        "up_blocks.2",
    }


class Killed(BaseException):
    """Stands for a kill: not an `Exception`, so that nothing can swallow it."""


def test_killed_run_continues_with_the_same_records(finished, tmp_path, monkeypatch):
    result, pipe = finished
    real, calls = work.measure_chunk, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(work, "measure_chunk", dies)
    with pytest.raises(Killed):
        run_audit(result.plan, tmp_path / "run", pipe=pipe, progress=False)
    unfinished = load_audit(tmp_path / "run")
    assert unfinished.summary["run"]["complete"] is False
    assert unfinished.summary["run"]["images_drawn"] == 4
    assert "not finished" in render(tmp_path / "run").report.read_text()
    again = run_audit(result.plan, tmp_path / "run", pipe=pipe, progress=False)
    assert len(calls) == 4  # the first chunk was not measured a second time
    assert again.records.equals(result.records)
    assert again.summary == result.summary


def test_finished_run_needs_no_model(finished, monkeypatch):
    result, _ = finished

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(work, "load_pipeline", load)
    again = run_audit(result.plan, result.folder, progress=False)
    assert again.records.equals(result.records)


def test_results_do_not_depend_on_the_batch_size(finished, tmp_path):
    result, pipe = finished
    other = run_audit(tiny_plan(batch_size=1), tmp_path / "one", pipe=pipe, progress=False)
    for name in ("soft_iou", "semantic_mass", "demographic_high"):
        a, b = (np.array(r.records[name]) for r in (result, other))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    a, b = (np.array(r.records["iou"]) for r in (result, other))
    assert np.abs(a - b).max() <= 0.05  # a pixel at the threshold may change sides
    assert (a == b).mean() > 0.9


def test_separate_attribution_prompts(finished, tmp_path):
    _, pipe = finished
    plan = tiny_plan(
        attribution_template=["a photo of {profession}", "a photo of {a_demographic}"],
        axes="gender",
        seeds=[0],
    )
    result = run_audit(plan, tmp_path / "apart", pipe=pipe, progress=False)
    texts = result.records["attribution_prompts"].to_pylist()
    assert ["a photo of a doctor", "a photo of a woman"] in texts
    rows = {(r["semantic"], r["demographic"]): r for r in result.records.to_pylist()}
    # without a joint softmax the profession's map is one and the same beside either word
    man, woman = rows["pilot", "man"], rows["pilot", "woman"]
    assert man["semantic_mass"] == woman["semantic_mass"]
    assert result.report.exists()


def test_sdxl_and_two_pictures_at_once(sdxl_pipe, tmp_path):
    plan = tiny_plan(professions=["doctor", "pilot"], seeds=[0], axes="gender", guidance_scale=5)
    result = run_audit(plan, tmp_path / "run", pipe=sdxl_pipe, progress=False)
    assert Counter(result.records["status"].to_pylist()) == {"ok": 8}


def test_paper_preset_runs(finished, tmp_path):
    _, pipe = finished
    plan = tiny_plan(preset="paper", percentiles=[70], seeds=[0, 1], axes="gender")
    result = run_audit(plan, tmp_path / "paper", pipe=pipe, progress=False)
    row = result.records.to_pylist()[0]
    assert (row["branch"], row["evaluation_size"], row["soft_mask"]) == ("uncond", 512, "paper")
    assert 0 <= row["iou"] <= 1


def test_plan_of_another_run_is_refused_by_field(finished):
    result, pipe = finished
    other = tiny_plan(steps=3, seeds=[3, 0])
    with pytest.raises(
        AuditError, match=r"another plan.*seeds: \(3, 0, 8\), \(3, 0\); steps: 2, 3"
    ):
        run_audit(other, result.folder, pipe=pipe, progress=False)


def test_other_weights_are_refused(finished, tmp_path, make_sd):
    result, pipe = finished
    folder = tmp_path / "run"
    run_audit(result.plan, folder, pipe=pipe, progress=False)
    part_path(folder, 1).unlink()
    other = make_sd()
    with torch.no_grad():
        next(iter(other.unet.parameters())).add_(1)
    with pytest.raises(AuditError, match="begun with another weights_sha256"):
        run_audit(result.plan, folder, pipe=other, progress=False)


def test_damaged_part_stops_the_run_before_it_draws(finished, tmp_path, monkeypatch):
    result, pipe = finished
    folder = tmp_path / "run"
    run_audit(result.plan, folder, pipe=pipe, progress=False)
    part_path(folder, 2).unlink()
    part_path(folder, 1).write_bytes(b"PAR1 half of a file")
    monkeypatch.setattr(work, "measure_chunk", lambda *a, **k: pytest.fail("drew a picture"))
    with pytest.raises(RecordError, match=r"part-00001\.parquet cannot be read"):
        run_audit(result.plan, folder, pipe=pipe, progress=False)


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "load_pipeline", lambda *a, **k: pytest.fail("loaded the model"))
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


def test_models_that_cannot_be_loaded(tmp_path):
    (tmp_path / "model").mkdir()
    plan = tiny_plan(model=str(tmp_path / "model"))
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        run_audit(plan, tmp_path / "run", progress=False)


def test_pipeline_of_another_type_is_refused(finished, tmp_path):
    _, pipe = finished
    with pytest.raises(AuditError, match=r"says float16 on cpu, .*UNet of float32 on cpu"):
        run_audit(tiny_plan(dtype="float16"), tmp_path / "run", pipe=pipe, progress=False)


def test_given_pipeline_is_left_as_it_was(finished, tmp_path):
    _, pipe = finished
    scheduler, bar = pipe.scheduler, dict(pipe._progress_bar_config)
    plan = tiny_plan(scheduler="EulerDiscreteScheduler", seeds=[0], axes="gender")
    result = run_audit(plan, tmp_path / "run", pipe=pipe, progress=False)
    assert pipe.scheduler is scheduler
    assert pipe._progress_bar_config == bar
    assert set(result.records["scheduler"].to_pylist()) == {"EulerDiscreteScheduler"}
    with pytest.raises(AuditError, match="class name of a scheduler.*got 'Pipeline'"):
        run_audit(tiny_plan(scheduler="Pipeline"), tmp_path / "no", pipe=pipe, progress=False)


def test_concept_too_long_for_the_encoder_lists_its_tokens(finished, tmp_path):
    _, pipe = finished
    plan = tiny_plan(professions=["doctor", "judge", "representative"], batch_size=1)
    with pytest.raises(ValueError, match=r"takes at most 24: .*r \| e \| p"):
        run_audit(plan, tmp_path / "run", pipe=pipe, progress=False)
    assert not any((tmp_path / "run" / "records").iterdir())  # found before anything was drawn


# --- statuses --------------------------------------------------------------------------------


def broken(monkeypatch, change_maps=None, change_images=None, flagged=None):
    """Lets `measure_chunk` see damaged maps or pictures."""
    real = measure.draw

    def draw(*args, **options):
        drawn = real(*args, **options)
        images = np.stack(drawn.arrays)
        if change_images:
            change_images(images)
        if change_maps:
            for found in drawn.maps.values():
                change_maps(found)
        return dataclasses.replace(drawn, arrays=list(images), filtered=flagged or drawn.filtered)

    monkeypatch.setattr(measure, "draw", draw)


def set_map(value):
    def change(maps):
        maps.values[1, 0] = value

    return change


@pytest.mark.parametrize(
    ("damage", "status", "reason"),
    [
        ({"change_maps": set_map(math.nan)}, "non_finite_map", "map of 'doctor' are not finite"),
        ({"change_maps": set_map(0.5)}, "constant_map", "map of 'doctor' is 0.5"),
        (
            {"change_images": lambda images: images[1].fill(0)},
            "blank_picture",
            "every value of the picture is 0",
        ),
        (
            {"change_images": lambda images: images[1, :2].fill(np.nan)},
            "non_finite_picture",
            "values are not finite",
        ),
        ({"flagged": [False, True, False]}, "filtered_picture", "safety checker"),
    ],
)
def test_what_cannot_be_measured_is_a_row_without_numbers(
    finished, tmp_path, monkeypatch, damage, status, reason
):
    _, pipe = finished
    broken(monkeypatch, **damage)
    plan = tiny_plan(professions=["doctor"], axes="gender", save_pictures="all", save_maps="all")
    result = run_audit(plan, tmp_path / "run", pipe=pipe, progress=False)
    rows = result.records.to_pylist()
    failed = [row for row in rows if row["status"] != "ok"]
    assert {(row["seed"], row["status"]) for row in failed} == {(0, status)}
    assert len(failed) == 4  # two words, two percentiles
    for row in failed:
        assert reason in row["reason"]
        assert row["iou"] is row["corrected"] is row["soft_iou"] is row["block_iou"] is None
    group = result.summary["professions"][0]
    assert (group["n"], group["failed"]) == (2, 1)
    assert group["iou"]["n"] == 2
    assert status in result.report.read_text()


def test_a_picture_measured_with_one_word_only_is_told(finished, tmp_path, monkeypatch):
    _, pipe = finished

    def one_word(maps):
        if "man" in maps.concepts:
            maps.values[1, maps.concepts.index("man")] = 0.5

    broken(monkeypatch, change_maps=one_word)
    plan = tiny_plan(professions=["doctor"], axes="gender", save_pictures="all")
    result = run_audit(plan, tmp_path / "run", pipe=pipe, progress=False)
    found = result.summary["run"]
    assert (found["images_measured"], found["images_measured_in_part"]) == (3, 1)
    told = sentences.headline(plan, result.summary)
    assert "3 of 3 pictures measured (1 of them not with every word): " in told
    plan = tiny_plan(professions=["doctor", "judge"])
    row = {"axis": "gender", "condition": "plain", "demographic": "man"}
    mean = {"value": 0.2, "low": 0.1, "high": 0.3}
    for n, said in (
        (2, "with “man”;"),
        (1, "with “man” (of 1 profession that could be measured);"),
    ):
        part = {"overall": [row | {"containment": mean | {"n": n}}]}
        part |= {"comparisons": [], "controls": [], "rank": []}
        text = sentences.contained("gender", plan, result.summary | {"containment": part})[0]
        assert f"0.20 [0.10, 0.30] {said}" in text


# --- summary ---------------------------------------------------------------------------------


def test_summary_recomputed_from_the_records_with_numpy(finished):
    result, _ = finished
    rows = result.records.to_pylist()
    for group in result.summary["professions"]:
        own = [
            row
            for row in rows
            if all(row[name] == group[name] for name in ("semantic", "demographic", "percentile"))
        ]
        x = np.array([row["iou"] for row in own])
        chance = own[0]["chance"]
        assert group["iou"]["value"] == pytest.approx(x.mean())
        if np.ptp(x) == 0:
            assert group["iou"]["low"] is None
            assert group["side"] == "no interval"
            continue
        low, high = stats.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
        low, high = max(low, 0.0), min(high, 1.0)
        assert group["iou"]["low"] == pytest.approx(low)
        assert group["iou"]["high"] == pytest.approx(high)
        assert group["corrected"]["value"] == pytest.approx(
            np.mean([row["corrected"] for row in own])
        )
        assert group["corrected"]["high"] == pytest.approx((high - chance) / (1 - chance))
        assert group["soft_iou"]["value"] == pytest.approx(np.mean([r["soft_iou"] for r in own]))
        assert group["side"] == (
            "above" if low > chance else "below" if high < chance else "includes"
        )
        blocks = [dict(row["block_iou"])["up_blocks.1"] for row in own]
        assert group["block_iou"]["up_blocks.1"]["value"] == pytest.approx(np.mean(blocks))
    for part in result.summary["overall"]:
        own = [
            row
            for row in rows
            if (row["demographic"], row["percentile"]) == (part["demographic"], part["percentile"])
        ]
        means = [
            np.mean([row["iou"] for row in own if row["semantic"] == p])
            for p in result.plan.professions
        ]
        assert part["iou"]["value"] == pytest.approx(np.mean(means))
        assert (part["iou"]["n"], part["images"]) == (3, 9)
    for row in result.summary["comparisons"]:
        groups = [
            g
            for g in result.summary["professions"]
            if (g["demographic"], g["percentile"]) == (row["demographic"], row["percentile"])
        ]
        assert row["above"] == sum(g["side"] == "above" for g in groups)
        assert row["above_bonferroni"] <= row["above"]
        assert row["comparisons"] == 3 * 5


def test_summary_counts_pictures_once_in_shares():
    plan = AuditPlan(professions=["doctor", "judge"], seeds=range(10), axes="gender")
    labels = ["woman"] * 6 + ["man"] * 3 + [None]
    rows = [
        record(
            plan,
            seed=seed,
            word=word,
            iou=0.2 + 0.01 * seed,
            attribute_label=label,
            semantic_label="judge" if seed == 0 else "doctor",
            attribute_score=0.2 if label is None else 0.9,
        )
        for seed, label in enumerate(labels)
        for word in ("man", "woman")
    ]
    planted = [
        {"semantic": "doctor", "shares": {"man": 0.4, "woman": 0.6}, "overlap": {"woman": 0.5}}
    ]
    summary = summarise(plan, to_table(rows), planted)
    (share,) = summary["shares"]
    assert (share["n"], share["unread"]) == (9, 1)
    assert share["words"]["woman"]["value"] == pytest.approx(6 / 9)
    assert share["semantic_right"]["value"] == pytest.approx(0.9)
    (held,) = summary["testbed"]["shares"]
    assert (held["compared"], held["covered"]) == (1, 1)  # the two words of a pair miss together
    assert summary["run"] | {"images_drawn": 10, "complete": False} == summary["run"]


@pytest.mark.parametrize(
    ("words", "known"),
    [(("woman",), ["woman"]), (("person", "woman"), ["woman"]), (("young", "old"), [])],
)
def test_pictures_read_as_a_word_that_the_axis_lacks_are_in_the_denominator(words, known):
    plan = AuditPlan(
        professions=["doctor"], seeds=range(8), axes={"axis": words}, conditions=["plain", "other"],
        interventions={"other": "prompt:{profession}"},
    )  # fmt: skip
    labels = {"plain": ["woman"] * 3 + ["man"] * 5, "other": ["woman"] * 7 + ["man"]}
    rows = [
        record(
            plan, seed=seed, word=word, axis="axis", condition=condition,
            attribute_label=label, attribute_score=0.9, semantic_label="doctor",
        )
        for condition, own in labels.items()
        for seed, label in enumerate(own)
        for word in words
    ]  # fmt: skip
    summary = summarise(plan, to_table(rows))
    shares = {row["condition"]: row for row in summary["shares"]}
    changes = summary["share_differences"]
    assert [row["demographic"] for row in changes] == known
    if not known:
        assert not shares
        return
    assert list(shares["plain"]["words"]) == known
    assert (shares["plain"]["n"], shares["plain"]["words"]["woman"]["value"]) == (8, 3 / 8)
    assert shares["other"]["words"]["woman"]["value"] == 7 / 8
    assert shares["plain"]["risk_difference"] is None
    assert changes[0]["professions"][0]["risk_difference"]["value"] == pytest.approx(4 / 8)


def test_the_shares_sentence_is_of_one_axis_and_the_first_condition():
    plan = AuditPlan(
        professions=["doctor"], seeds=range(8), conditions=["plain", "other"],
        axes={"gender": ("man", "woman"), "again": ("woman", "man")},
        interventions={"other": "prompt:{profession}"},
    )  # fmt: skip
    rows = [
        record(
            plan, seed=seed, word=word, axis=axis, condition=condition, semantic_label="doctor",
            attribute_label="woman" if condition == "other" or seed % 2 else "man",
            attribute_score=0.9,
        )
        for condition in plan.conditions
        for seed in range(8)
        for axis, words in plan.axes.items()
        for word in words
    ]  # fmt: skip
    planted = [{"semantic": "doctor", "shares": {"man": 0.5, "woman": 0.5}, "overlap": {}}]
    text = sentences.shares("gender", summarise(plan, to_table(rows), planted))
    assert "in 8 of 8 pictures" in text
    assert "intervals of 1 of 1 demographic" in text


def test_a_sentence_about_a_change_has_the_means_of_the_same_pictures():
    plan = AuditPlan(
        professions=["doctor", "judge"], seeds=range(4), conditions=["plain", "other"],
        interventions={"other": "prompt:{profession}"},
    )  # fmt: skip
    rows = [
        record(
            plan,
            profession,
            seed,
            word,
            condition=condition,
            iou=0.2 if profession == "doctor" else 0.4,
        )
        for condition in plan.conditions
        for profession in plan.professions
        for seed in range(4)
        for word in ("man", "woman")
        if not (condition == "other" and profession == "doctor")  # failed there
    ]
    row = summarise(plan, to_table(rows))["differences"][0]
    assert (row["baseline_iou"], row["condition_iou"]) == (0.4, 0.4)
    assert "0.400 plain and 0.400 other: 0.000" in sentences.difference(row)
    assert "no interval can be given" in sentences.difference(row)


def test_planted_overlap_is_ranked_and_said_as_it_is():
    plan = AuditPlan(seeds=range(4))
    planted = run.planted(plan)
    level = {row["semantic"]: row["overlap"] for row in planted}
    rng = np.random.default_rng(0)
    rows = [
        record(plan, p, seed, word, iou=sign * 0.2 * level[p][word] + 0.4 + 0.01 * rng.random())
        for p in plan.professions
        for seed in plan.seeds
        for word, sign in (("man", 1), ("woman", -1))
    ]
    summary = summarise(plan, to_table(rows), planted)
    ranks = summary["testbed"]["rank"]
    assert [row["against"] for row in ranks] == ["overlap", "shares"] * 2
    man, woman = (row for row in ranks if row["against"] == "overlap")
    assert man["spearman"]["value"] > 0.9
    assert woman["spearman"]["value"] < -0.9
    assert "rose with the planted overlap" in sentences.rank(man)
    assert "ranks these professions backwards" in sentences.rank(woman)
    flat = man | {"spearman": man["spearman"] | {"value": 0.1, "low": -0.3, "high": 0.5}}
    assert "did not visibly follow" in sentences.rank(flat)
    same = man | {"spearman": man["spearman"] | {"value": 1.0, "low": None, "high": None}}
    assert "it stays open whether it follows the planted overlap" in sentences.rank(same)


# --- report ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a page would load, its tags' balance, and pictures without text."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.loads, self.open, self.silent = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        for name in ("src", "href", "xlink:href", "data", "action"):
            if values.get(name) and not values[name].startswith(("#", "data:")):
                self.loads.append(values[name])
        if tag in {"script", "link", "iframe", "object"}:
            self.loads.append(tag)
        if tag == "img" and not values.get("alt"):
            self.silent += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == []
    assert page.open == []
    assert page.silent == 0
    assert not re.search(r"url\((?!#)|@import", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert target in ids
    return text


def test_report_is_one_file_with_every_profession(finished):
    result, _ = finished
    text = check_page(result.report)
    for profession in result.plan.professions:
        assert text.count(profession) > 5
    assert text.count("data:image/webp;base64,") == 3 * 7 + 3 * 10  # two axes of 2 and 3 words
    assert "0.176" in text
    assert "chance 0.053" not in text  # the main figure is of the first percentile
    assert "Bonferroni" in text
    assert "not evidence of a cause" in text.replace("\n", " ")
    assert "binary" in text


def test_report_has_a_strip_for_every_profession(finished, tmp_path):
    _, pipe = finished
    professions = ["doctor", "nurse", "judge", "chef", "baker"]
    plan = tiny_plan(professions=professions, seeds=[0, 1], axes="gender")
    text = check_page(run_audit(plan, tmp_path / "run", pipe=pipe, progress=False).report)
    assert text.count("data:image/webp;base64,") == 5 * 7
    shown, folded = text.split("2 more professions, from the highest to the lowest")
    titles = [
        re.findall(r"<h4>(\w+)( \(\w+ \w+\)| \(median\))?</h4>", part) for part in (shown, folded)
    ]
    assert [len(part) for part in titles] == [3, 2]
    assert {name for part in titles for name, _ in part} == set(professions)
    assert all(rank for _, rank in titles[0])


def test_report_renders_from_the_folder_alone_and_identically(finished):
    result, _ = finished
    before = result.report.read_bytes()
    result.report.unlink()
    assert render(result.folder).report.read_bytes() == before


def test_report_escapes_what_others_wrote(finished, tmp_path):
    _, pipe = finished
    plan = tiny_plan(
        model="<script>alert(1)</script>",
        professions=["a&b", "$c$ <b>"],
        seeds=[0, 1],
        axes="gender",
    )
    text = check_page(run_audit(plan, tmp_path / "run", pipe=pipe, progress=False).report)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "$c$ &lt;b&gt;" in text


def test_report_without_pictures_and_with_one_image(finished, tmp_path):
    _, pipe = finished
    plan = tiny_plan(
        professions=["doctor"], seeds=[0], axes="gender", save_pictures="none", save_maps="none"
    )
    result = run_audit(plan, tmp_path / "run", pipe=pipe, progress=False)
    text = check_page(result.report)
    assert not (result.folder / "maps").exists()
    assert "data:image/" not in text
    assert "at least two measured pictures" in text
    assert result.summary["professions"][0]["iou"]["low"] is None
    assert result.summary["overall"][0]["iou"]["low"] is None


_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def in_browser(page: Path, width: int, folder: Path) -> tuple[str, Path]:
    """What the page writes to the browser's console, and a picture of it."""
    picture = folder / f"{width}.png"
    command = [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
    command += ["--hide-scrollbars"]
    command += ["--disable-component-update", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", f"--window-size={width},4000"]
    command += [f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return "\n".join(console), picture


@pytest.mark.skipif(_BROWSER is None, reason="no chromium to render the report with")
@pytest.mark.parametrize("width", [1200, 390])
def test_report_in_a_browser(finished, tmp_path, width):
    from PIL import Image

    result, _ = finished
    # the report has no script; the copy's own tells the width that the page takes
    page = tmp_path / "report.html"
    script = "<script>console.log('takes ' + document.documentElement.scrollWidth + ' px')</script>"
    page.write_text(result.report.read_text().replace("</body>", f"{script}</body>"))
    # a window is never narrower than 500 px: the phone is a frame in one
    frame = tmp_path / "frame.html"
    style = f"width: {width}px; height: 4000px; border: 0"
    frame.write_text(f'<body style="margin: 0"><iframe src="report.html" style="{style}"></iframe>')
    console, picture = in_browser(frame, 1200, tmp_path)
    assert f"takes {width} px" in console  # nothing hangs over the side
    assert len(console.splitlines()) == 1, console  # and there is no other message
    with Image.open(picture) as opened:
        assert opened.size == (1200, 4000)
        assert len(opened.convert("L").getcolors()) > 100


# --- the embedded model ----------------------------------------------------------------------


@pytest.mark.skipif(not WEIGHTS, reason="the testbed's weights are not built yet")
def test_testbed_end_to_end(tmp_path):
    plan = AuditPlan(
        professions=["doctor", "judge", "nurse", "pilot", "farmer"], seeds=range(4), steps=6
    )
    result = run_audit(plan, tmp_path / "run", progress=False)
    assert result.summary["run"]["status"] == {"ok": 40}
    assert {row["attribute_label"] for row in result.records.to_pylist()} <= {"man", "woman", None}
    assert len(result.summary["testbed"]["rank"]) == 4
    text = check_page(result.report)
    assert "Against the planted truth" in text
    for row in testbed.truth():
        if row.profession in plan.professions:
            assert f"{100 * row.shares['woman']:.0f}" in text
