"""Runs of the audit: what they leave, resume, batches, forms of prompts, statuses."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from biasmap_fast.audit import AuditError, AuditPlan, chunk, load_audit, run_audit
from biasmap_fast.audit.records import part_path
from biasmap_fast.pipelines import ModelError

equal = pd.testing.assert_frame_equal


def values(result, measure="soft_iou"):
    rows = result.measurements
    return rows.loc[rows["measure"] == measure, "value"].to_numpy()


def test_run_leaves_a_complete_folder(finished):
    names = {path.name for path in finished.folder.iterdir()}
    tables = {"pictures", "measurements", "masks"}
    assert names >= {"plan.yaml", "environment.json", "maps", "hashes", ".lock", *tables}
    assert ".holder.json" not in names
    assert len(finished.pictures) == 6
    assert set(finished.pictures["status"]) == set(finished.measurements["status"]) == {"ok"}
    assert len(list((finished.folder / "pictures").glob("*.png"))) == 2
    environment = json.loads((finished.folder / "environment.json").read_text())
    assert len(environment["weights_sha256"]) == 64
    assert environment["scheduler_config"]["beta_start"] == 0.00085
    again = load_audit(finished.folder)
    equal(again.measurements, finished.measurements)
    equal(again.pictures, finished.pictures)


def test_one_frame_has_the_measurements_with_their_pictures(finished):
    frame = finished.to_pandas()
    assert len(frame) == len(finished.measurements)
    assert set(frame["prompt"]) == {"a photo of a doctor", "a photo of a pilot"}
    assert {"value", "status", "picture_status", "clip_score"} <= set(frame.columns)


@pytest.mark.usefixtures("quick")
def test_stopped_run_continues_with_the_same_records(finished, tiny, tmp_path, stops):
    drawn = stops(2)
    with pytest.raises(KeyboardInterrupt):
        run_audit(finished.plan, tmp_path, pipe=tiny, progress=False)
    assert len(load_audit(tmp_path).pictures) == 4
    drawn.clear()
    again = run_audit(finished.plan, tmp_path, pipe=tiny, progress=False)
    assert len(drawn) == 1  # the first chunks were not measured a second time
    equal(again.measurements, finished.measurements)
    equal(again.pictures, finished.pictures)
    for name in ("pictures", "measurements", "masks"):
        for part in (finished.folder / name).glob("part-*"):
            assert (tmp_path / name / part.name).read_bytes() == part.read_bytes()


@pytest.mark.usefixtures("quick")
def test_finished_run_needs_no_model(finished):
    again = run_audit(finished.plan, finished.folder, progress=False)  # "tiny" is no model
    equal(again.measurements, finished.measurements)


@pytest.mark.usefixtures("quick")
def test_results_do_not_depend_on_the_batch_size(finished, tiny, tiny_plan, tmp_path):
    other = run_audit(tiny_plan(batch_size=1), tmp_path, pipe=tiny, progress=False)
    for measure in ("soft_iou", "containment"):
        np.testing.assert_allclose(
            values(other, measure), values(finished, measure), rtol=1e-4, atol=1e-5
        )
    difference = np.abs(values(other, "iou") - values(finished, "iou"))
    assert difference.max() <= 0.05  # a pixel at the threshold may change sides
    assert (difference == 0).mean() > 0.9


@pytest.mark.usefixtures("quick")
def test_separate_attribution_prompts(tiny, tiny_plan, tmp_path):
    template = ["a photo of {profession}", "a photo of {a_demographic}"]
    plan = tiny_plan(attribution_template=template, seeds=[0], save_maps="all")
    result = run_audit(plan, tmp_path, pipe=tiny, progress=False)
    assert set(result.pictures["status"]) == {"ok"}
    from safetensors.torch import load_file

    maps = load_file(tmp_path / "maps" / "001-pilot-0.safetensors")
    # without a joint softmax the profession's map is one and the same beside either word
    for measure in ("iou", "containment"):
        man, woman = (maps[f"gender/{word}/{measure}/profession"] for word in ("man", "woman"))
        assert torch.equal(man, woman)
    assert not torch.equal(maps["gender/man/iou/word"], maps["gender/woman/iou/word"])


@pytest.mark.usefixtures("quick")
def test_sdxl(sdxl_pipe, tiny_plan, tmp_path):
    plan = tiny_plan(seeds=[0], guidance_scale=5)
    result = run_audit(plan, tmp_path, pipe=sdxl_pipe, progress=False)
    assert set(result.pictures["status"]) == {"ok"}
    assert set(result.measurements["status"]) == {"ok"}


@pytest.mark.usefixtures("quick")
def test_paper_preset_runs(tiny, tiny_plan, tmp_path):
    plan = tiny_plan(preset="paper", seeds=[0], professions=["doctor"])
    result = run_audit(plan, tmp_path, pipe=tiny, progress=False)
    assert set(result.measurements["measure"]) == {"iou", "soft_iou"}
    assert result.measurements["value"].between(0, 1).all()


@pytest.mark.usefixtures("quick")
def test_given_pipeline_is_left_as_it_was(tiny, tiny_plan, tmp_path):
    scheduler, bar = tiny.scheduler, dict(tiny._progress_bar_config)
    plan = tiny_plan(scheduler="EulerDiscreteScheduler", seeds=[0])
    run_audit(plan, tmp_path / "run", pipe=tiny, progress=False)
    assert tiny.scheduler is scheduler
    assert tiny._progress_bar_config == bar
    said = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert said["scheduler"] == "EulerDiscreteScheduler"
    with pytest.raises(AuditError, match="class name of a scheduler.*got 'Pipeline'"):
        run_audit(tiny_plan(scheduler="Pipeline"), tmp_path / "no", pipe=tiny, progress=False)


def test_plan_of_another_run_is_refused_by_field(finished, tiny, tiny_plan):
    other = tiny_plan(steps=3, seeds=[1, 0])
    expected = r"another plan.*seeds: \(0, 1, 2\), \(1, 0\); steps: 1, 3"
    with pytest.raises(AuditError, match=expected):
        run_audit(other, finished.folder, pipe=tiny, progress=False)


def test_models_that_cannot_be_loaded(tiny, tiny_plan, tmp_path):
    (tmp_path / "model").mkdir()
    plan = tiny_plan(model=str(tmp_path / "model"))
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        run_audit(plan, tmp_path / "run", progress=False)
    with pytest.raises(AuditError, match=r"says float16 on cpu, .*UNet of float32 on cpu"):
        run_audit(tiny_plan(dtype="float16"), tmp_path / "other", pipe=tiny, progress=False)


def test_words_that_cannot_be_tokenized_are_found_before_anything_is_drawn(
    tiny, tiny_plan, tmp_path
):
    plan = tiny_plan(professions=["doctor", "representative"], batch_size=1)
    with pytest.raises(ValueError, match=r"takes at most 24: .*r \| e \| p"):
        run_audit(plan, tmp_path / "run", pipe=tiny, progress=False)
    assert not any((tmp_path / "run" / "pictures").iterdir())
    plan = tiny_plan(controls={"words": {"object": "representative"}})
    with pytest.raises(ValueError, match=r"a control cannot be measured: .*Choose other control"):
        run_audit(plan, tmp_path / "control", pipe=tiny, progress=False)


# --- statuses --------------------------------------------------------------------------------


def broken(monkeypatch, change_maps=None, change_images=None, flagged=None):
    """Lets `measure_chunk` see damaged maps or pictures."""
    real = chunk.draw

    def draw(*args):
        drawn = real(*args)
        images = np.stack(drawn.images)
        if change_images:
            change_images(images)
        for maps in drawn.maps["block"].values() if change_maps else ():
            change_maps(maps)
        return dataclasses.replace(drawn, images=list(images), filtered=flagged or drawn.filtered)

    monkeypatch.setattr(chunk, "draw", draw)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("damage", "status", "reason"),
    [
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
def test_what_is_no_picture_is_a_row_without_measurements(
    tiny, tiny_plan, tmp_path, monkeypatch, damage, status, reason
):
    broken(monkeypatch, **damage)
    plan = tiny_plan(professions=["doctor"], batch_size=3, save_pictures="all")
    result = run_audit(plan, tmp_path, pipe=tiny, progress=False)
    pictures = result.pictures.set_index("seed")
    assert pictures["status"].to_dict() == {0: "ok", 1: status, 2: "ok"}
    assert reason in pictures["reason"][1]
    assert set(result.measurements["seed"]) == {0, 2}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("value", "status", "reason"),
    [
        (math.nan, "non_finite_map", "map of 'man' are not finite"),
        (0.5, "constant_map", "map of 'man' is 0.5"),
    ],
)
def test_a_map_that_cannot_be_measured_is_told(
    tiny, tiny_plan, tmp_path, monkeypatch, value, status, reason
):
    def change(maps):
        if maps.concepts == ("doctor", "man"):
            maps.values[1, 1] = value

    broken(monkeypatch, change_maps=change)
    plan = tiny_plan(professions=["doctor"], batch_size=3, controls=None, save_pictures="all")
    result = run_audit(plan, tmp_path, pipe=tiny, progress=False)
    assert set(result.pictures["status"]) == {"ok"}
    rows = result.measurements
    failed = rows[rows["status"] != "ok"]
    # of the whole maps; those of blocks and steps are as they were
    assert set(failed["measure"]) == {"iou", "soft_iou"}
    assert set(zip(failed["seed"], failed["word"], failed["part"], strict=True)) == {(1, "man", "")}
    assert set(failed["status"]) == {status}
    assert failed["reason"].str.contains(reason, regex=False).all()
    assert failed["value"].isna().all()
    assert rows.loc[rows["status"] == "ok", "value"].notna().all()


@pytest.mark.usefixtures("quick")
def test_two_empty_masks_have_no_overlap_and_say_so(tiny, tiny_plan, tmp_path, monkeypatch):
    def change(maps):  # one low pixel: nothing lies above the 70th percentile
        maps.values[:] = 1.0
        maps.values[..., 0, 0] = 0.0

    broken(monkeypatch, change_maps=change)
    plan = tiny_plan(professions=["doctor"], seeds=[0], controls=None, save_pictures="all")
    rows = run_audit(plan, tmp_path, pipe=tiny, progress=False).measurements
    whole = rows[(rows["measure"] == "iou") & (rows["part"] == "")]
    assert set(whole["status"]) == {"empty"}
    assert set(whole["value"]) == {0.0}


def test_testbed_end_to_end(tmp_path):
    plan = AuditPlan(professions=["doctor", "judge"], seeds=range(2), steps=3)
    result = run_audit(plan, tmp_path, progress=False)
    assert set(result.pictures["status"]) == {"ok"}
    for labels in result.pictures["labels"]:
        assert set(labels) == {"profession", "gender"}
        assert labels["gender"] in ("man", "woman", None)
    assert all(0 <= scores["gender"] <= 1 for scores in result.pictures["scores"])
    assert part_path(tmp_path, "pictures", 0).exists()
