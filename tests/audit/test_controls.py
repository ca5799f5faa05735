"""Controls, masks and the seed-shuffled null of whole runs; what the report says of them."""

from __future__ import annotations

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from biasmap_fast.audit import AuditPlan, run_audit, sentences, work
from biasmap_fast.audit.controls import CURVE, control_pairs
from biasmap_fast.audit.masks import unpacked
from biasmap_fast.audit.records import part_path, read_side
from biasmap_fast.audit.tables import model_card

_RUNS = {}


def plan_of(**changes):
    settings = {
        "model": "tiny",
        "professions": ["doctor", "judge"],
        "axes": "gender",
        "prompt_template": "a photo of {profession}",
        "attribution_template": "a photo of {profession} and {demographic}",
        "controls": {"words": {"function": "in", "object": "cup", "person": "person"}},
        "seeds": range(5),
        "steps": 2,
        "batch_size": 4,
        "percentiles": [70, 90],
        "sweeps": ["step", "layer"],
        "save_pictures": "none",
        "save_maps": "none",
        "device": "cpu",
    }
    return AuditPlan(**(settings | changes))


@pytest.fixture
def finished(make_sd, tmp_path_factory):
    if not _RUNS:
        pipe = make_sd()
        folder = tmp_path_factory.mktemp("runs") / "finished"
        _RUNS["run"] = (run_audit(plan_of(), folder, pipe=pipe, progress=False), pipe)
    return _RUNS["run"]


def test_every_control_is_measured_on_every_picture(finished):
    result, _ = finished
    rows = read_side(result.folder, "controls").to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    counts = {}
    for row in rows:
        counts[row["kind"]] = counts.get(row["kind"], 0) + 1
    pictures, words, percentiles = 10, 2, 2
    layers = 2 + 2 + 2 + 2  # of the tiny UNet: one a down block, two an up block, without the mid
    assert counts["function"] == counts["object"] == counts["person"] == pictures * percentiles
    assert counts["swapped"] == pictures * words * percentiles
    assert counts["threshold"] == pictures * words * len(CURVE)
    assert counts["step"] == pictures * words * 2
    variants = {row["variant"] for row in rows if row["kind"] == "layer"}
    assert counts["layer"] == pictures * words * len(variants)
    assert 0 < len(variants) <= layers
    assert counts["synonym"] == pictures // 2 * percentiles  # "doctor" has one, "judge" has none


def test_threshold_curve_goes_through_the_records(finished):
    result, _ = finished
    records = {
        (row["semantic"], row["seed"], row["demographic"], row["percentile"]): row["iou"]
        for row in result.records.to_pylist()
    }
    for row in read_side(result.folder, "controls").to_pylist():
        key = (row["semantic"], row["seed"], row["word"], row["percentile"])
        if row["kind"] == "threshold" and key in records:
            assert row["iou"] == records[key]


def test_masks_give_the_recorded_overlap(finished):
    result, _ = finished
    records = {
        tuple(row[name] for name in ("semantic", "seed", "demographic", "percentile")): row["iou"]
        for row in result.records.to_pylist()
    }
    rows = read_side(result.folder, "masks").to_pylist()
    assert len(rows) == len(records) == 40
    for row in rows:
        size = row["height"], row["width"]
        a, b = unpacked(row["semantic_bits"], *size), unpacked(row["demographic_bits"], *size)
        found = records[row["semantic"], row["seed"], row["demographic"], row["percentile"]]
        assert (a & b).sum() / (a | b).sum() == pytest.approx(found, abs=1e-7)


def test_shuffled_null_is_that_of_the_masks(finished):
    result, _ = finished
    row = result.summary["controls"][0]
    masks = [
        one
        for one in read_side(result.folder, "masks").to_pylist()
        if (one["semantic"], one["demographic"], one["percentile"]) == ("doctor", "man", 70.0)
    ]
    values = []
    for i in masks:
        for j in masks:
            a, b = (
                unpacked(one[f"{side}_bits"], one["height"], one["width"])
                for one, side in ((i, "semantic"), (j, "demographic"))
            )
            values.append(((a & b).sum() / (a | b).sum(), i["seed"] == j["seed"]))
    same, other = ([v for v, s in values if s == kind] for kind in (True, False))
    doctor = row["professions"][0]["shuffled"]
    assert (row["demographic"], row["percentile"]) == ("man", 70.0)
    assert doctor["level"]["value"] == pytest.approx(np.mean(other))
    assert doctor["difference"]["value"] == pytest.approx(np.mean(same) - np.mean(other))
    assert len(other) == doctor["level"]["n"] == 20


def test_resumed_run_has_identical_nulls_and_controls(finished, tmp_path, monkeypatch):
    result, pipe = finished
    real, done = work.measure_chunk, []

    def stops(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(args)
        return real(*args)

    monkeypatch.setattr(work, "measure_chunk", stops)
    with pytest.raises(KeyboardInterrupt):
        run_audit(plan_of(), tmp_path / "run", pipe=pipe, progress=False)
    part_path(tmp_path / "run", 0).unlink()  # its masks and controls are left over
    monkeypatch.setattr(work, "measure_chunk", real)
    again = run_audit(plan_of(), tmp_path / "run", pipe=pipe, progress=False)
    assert again.summary == result.summary
    for side in ("controls", "masks"):
        assert read_side(again.folder, side).equals(read_side(result.folder, side))


def test_nulls_do_not_depend_on_the_division_into_chunks(finished):
    from biasmap_fast.audit.nulls import summarise_controls, sweep_curves, threshold_curves

    result, _ = finished
    plan = plan_of()
    order = np.random.default_rng(0)
    controls, masks = (read_side(result.folder, side) for side in ("controls", "masks"))
    mixed = [table.take(order.permutation(table.num_rows)) for table in (controls, masks)]
    iou = {
        (row["condition"], row["axis"], row["demographic"], row["percentile"]): {}
        for row in result.records.to_pylist()
    }
    for row in result.records.to_pylist():
        part = (row["condition"], row["axis"], row["demographic"], row["percentile"])
        iou[part].setdefault(row["semantic"], {})[row["seed"]] = row["iou"]
    above = {part: ["doctor"] for part in iou}
    one, other = (
        summarise_controls(plan, iou, *tables, above) for tables in ((controls, masks), mixed)
    )
    assert one == other
    assert threshold_curves(plan, controls) == threshold_curves(plan, mixed[0])
    assert sweep_curves(controls) == sweep_curves(mixed[0])


def test_controls_can_be_turned_off(finished, tmp_path):
    _, pipe = finished
    plan = plan_of(controls=None, curve=False, sweeps=[], seeds=[0, 1])
    result = run_audit(plan, tmp_path / "run", pipe=pipe, progress=False)
    assert not (result.folder / "controls").exists()
    assert result.summary["curves"] == result.summary["sweeps"] == []
    assert control_pairs(plan, "doctor") == []
    assert "Nulls and controls" in result.report.read_text()  # the masks are kept all the same


def test_words_that_cannot_be_controls():
    with pytest.raises(ValidationError, match="the concept 'photo' once"):
        plan_of(controls={"words": {"object": "photo"}})
    with pytest.raises(ValidationError, match="'branch' needs classifier-free guidance"):
        plan_of(guidance_scale=1.0, sweeps=["branch"])
    said = AuditPlan(
        model="tiny",
        prompt_template="{profession}",
        attribution_template="{profession} in {demographic}",
    )
    assert "function" not in said.controls.words


def figure(value, low, high):
    return {"value": value, "low": low, "high": high, "n": 20}


@pytest.mark.parametrize("alone", [False, True])  # one profession has no mean over professions
@pytest.mark.parametrize(
    ("low", "said"), [(-0.01, "does not beat its controls"), (0.01, "exceeds “person” (by")]
)
def test_report_says_whether_a_finding_beats_its_controls(low, said, alone):
    here = {"person": {"difference": figure(0.02, low, 0.05)}}
    nowhere = {"person": {"difference": figure(0.02, None, None)}}
    row = {
        "condition": "plain",
        "axis": "gender",
        "demographic": "man",
        "percentile": 70.0,
        "above": 3,
        "exceeds": {"person": 2},
        "overall": nowhere if alone else here,
        "professions": [{"semantic": "doctor", **here}] * (1 if alone else 3),
    }
    plan = AuditPlan()
    run_part = {"conditions": ["plain"], "percentiles": [70.0]}
    (text,) = sentences.controls("gender", plan, {"controls": [row], "run": run_part})
    assert said in text
    assert ("on average over professions" in text.lower()) != alone
    assert "Of the 3 professions above chance, 2 exceed “person”." in text


def test_a_null_that_could_not_be_measured_is_not_counted():
    nothing = {"difference": figure(None, None, None)}
    here = {"person": {"difference": figure(0.02, 0.01, 0.05)}, "shuffled": nothing}
    row = {
        "condition": "plain",
        "axis": "gender",
        "demographic": "man",
        "percentile": 70.0,
        "above": 1,
        "exceeds": {"shuffled": 0, "person": 1},
        "overall": here,
        "professions": [{"semantic": "doctor", **here}] * 2,
    }
    run_part = {"conditions": ["plain"], "percentiles": [70.0]}
    (text,) = sentences.controls("gender", AuditPlan(), {"controls": [row], "run": run_part})
    assert "Of the 1 profession above chance, 1 exceeds “person”." in text
    assert "null" not in text


@pytest.mark.parametrize("percentiles", [[70.0], [70.0, 90.0]])
def test_what_remains_after_bonferroni_is_told_of_every_percentile(percentiles):
    rows = [
        {
            "axis": "gender",
            "condition": "plain",
            "demographic": "man",
            "percentile": percentile,
            "comparisons": 20,
            "with_interval": 20,
            "above_bonferroni": place,
            "below_bonferroni": 0,
        }
        for place, percentile in enumerate(percentiles)
    ]
    run_part = {"conditions": ["plain"], "percentiles": percentiles}
    text = sentences.multiplicity("gender", {"comparisons": rows, "run": run_part})
    if len(percentiles) == 1:
        assert "there remain 0 above and 0 below with “man”." in text
    else:
        assert "Up to 20 intervals at 95 % at each percentile: without" in text
        assert "0 above and 0 below with “man” at percentile 70" in text
        assert "1 above and 0 below with “man” at percentile 90" in text


def test_tables_hold_the_summarys_figures(finished):
    result, _ = finished
    table = pq.read_table(result.folder / "figures.parquet")
    assert table.schema.metadata[b"biasmap_fast.schema_version"] == b"5"
    with (result.folder / "figures.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == table.num_rows
    rows = table.to_pylist()
    for group in result.summary["professions"]:
        (own,) = (
            row
            for row in rows
            if row["figure"] == "iou"
            and all(row[k] == group[k] for k in ("semantic", "demographic", "percentile"))
        )
        assert (own["value"], own["low"], own["p_holm"]) == (
            group["iou"]["value"],
            group["iou"]["low"],
            group["p_holm"],
        )
    assert any(row["figure"] == "iou minus shuffled" for row in rows)


def test_model_card_escapes_what_others_wrote(finished):
    result, _ = finished
    plan = plan_of(model="<script>|x", axes="so*rt=tall,short", controls=None)
    card = model_card(plan, {**result.summary, "controls": [], "overall": []})
    assert "<script" not in card
    assert "so\\*rt" in card.lower()
    assert "not evidence of a cause" in model_card(result.plan, result.summary)
