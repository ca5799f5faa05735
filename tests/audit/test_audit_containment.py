"""Containment in an audit: its records, summary and report, against the library's functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import biasmap_fast as bm
from biasmap_fast.audit import AuditPlan, run_audit
from biasmap_fast.audit.records import read_side
from biasmap_fast.audit.sentences import contained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    plan = AuditPlan(
        professions=["nurse", "judge", "chef"], seeds=[0, 1, 2], steps=4, percentiles=[70, 90]
    )
    return run_audit(plan, tmp_path_factory.mktemp("contained") / "run", progress=False)


def test_records_hold_the_functions_value_of_the_decoders_maps(run):
    pipe = bm.testbed.pipeline()
    pair = run.plan.pairs("chef")[1]
    with bm.attribute(pipe, pair.semantic_prompt, layers=["up_blocks"]) as recorder:
        pipe(
            [run.plan.prompt("chef")] * 3,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
            output_type="latent",
        )
    maps = recorder.maps()
    expected = bm.soft_containment(maps["chef"], maps[pair.demographic])
    rows = [
        row
        for row in run.records.to_pylist()
        if (row["semantic"], row["demographic"]) == ("chef", pair.demographic)
    ]
    for percentile in (70.0, 90.0):
        found = [row["containment"] for row in rows if row["percentile"] == percentile]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert {row["containment_chance"] for row in rows} == {0.1}


def test_summary_and_words(run):
    found = run.summary["containment"]
    rows = run.records.to_pylist()
    for row in found["professions"]:
        own = [
            one["containment"]
            for one in rows
            if one["percentile"] == 70.0
            and (one["semantic"], one["demographic"]) == (row["semantic"], row["demographic"])
        ]
        assert row["containment"]["value"] == pytest.approx(np.mean(own))
        assert row["containment"]["n"] == row["n"] == 3
        corrected = (row["containment"]["value"] - 0.1) / 0.9
        assert row["corrected"]["value"] == pytest.approx(corrected)
        assert "percentile" not in row
    assert len(found["professions"]) == 6
    first, *middle, limit = contained("gender", run.plan, run.summary)
    beside, ranks = middle[:2], middle[2:]
    assert all("containment in “" in text for text in beside)
    assert "the top 5 % of its word's map" in first
    assert "10 % would be inside by chance" in first
    assert limit.startswith("It is no size of the overlap")
    assert len(ranks) == 2
    guided = [{**row, "condition": "guided"} for row in found["rank"]]
    both = {**run.summary, "containment": {**found, "rank": found["rank"] + guided}}
    assert contained("gender", run.plan, both) == [first, *middle, limit]
    assert ranks[0].startswith("Containment in “man”")
    text = run.report.read_text()
    assert first.replace("'", "&#39;") in text
    assert first.partition(" is, mean")[0] in (run.folder / "model-card.md").read_text()
    assert (run.folder / "figures.csv").read_text().count('"containment",') == 6 + 2
    assert "containment of the profession in the word, chance level 0.100" in text


def test_control_words_have_containment_too(run):
    pipe = bm.testbed.pipeline()
    control = run.plan.pair("chef", "person", "person")
    with bm.attribute(pipe, control.semantic_prompt, layers=["up_blocks"]) as recorder:
        pipe(
            [run.plan.prompt("chef")] * 3,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
            output_type="latent",
        )
    maps = recorder.maps()
    expected = bm.soft_containment(maps["chef"], maps["person"])
    rows = [
        row
        for row in read_side(run.folder, "controls").to_pylist()
        if (row["semantic"], row["kind"], row["percentile"]) == ("chef", "person", 70.0)
    ]
    found = [row["containment"] for row in sorted(rows, key=lambda row: row["seed"])]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    own = [
        row["containment"]
        for row in run.records.to_pylist()
        if (row["semantic"], row["demographic"], row["percentile"]) == ("chef", "man", 70.0)
    ]
    (part,) = (row for row in run.summary["containment"]["controls"] if row["demographic"] == "man")
    (chef,) = (row for row in part["professions"] if row["semantic"] == "chef")
    assert chef["person"]["level"]["value"] == pytest.approx(np.mean(found))
    difference = np.mean(own) - np.mean(found)
    assert chef["person"]["difference"]["value"] == pytest.approx(difference)
    assert "shuffled" not in chef


def test_iou_alone(tmp_path):
    plan = AuditPlan(professions=["nurse"], seeds=[0], steps=2, measure="iou")
    result = run_audit(plan, tmp_path / "run", progress=False)
    assert result.summary["containment"] is None
    assert result.records["containment"].null_count == result.records.num_rows
    assert contained("gender", plan, result.summary) == []
    assert "ontainment" not in result.report.read_text().partition('id="settings"')[0]


def test_other_fractions_and_layers(tmp_path):
    settings = {"fractions": (0.3, 0.3), "layers": ("down_blocks", "up_blocks")}
    plan = AuditPlan(professions=["nurse"], seeds=[0, 1], steps=2, containment=settings)
    result = run_audit(plan, tmp_path / "run", progress=False)
    for row in result.records.to_pylist():  # masks of equal size on all the recorded maps
        inside = row["containment"]
        assert inside / (2 - inside) == pytest.approx(row["soft_iou"], abs=1e-5)


def test_the_published_preset_measures_iou_alone():
    assert AuditPlan(professions=["nurse"], preset="paper").measure == "iou"
    with pytest.raises(ValueError, match="preset 'paper' means measure='iou', got 'containment'"):
        AuditPlan(professions=["nurse"], preset="paper", measure="containment")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fractions": (0.05, 1.0)}, "fractions must lie between 0 and 1"),
        ({"fractions": (0.05,)}, "fractions"),
        ({"layer": ["up_blocks"]}, "layer"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AuditPlan(professions=["nurse"], containment=settings)


def test_the_plans_own_layers_are_those_of_containment(tmp_path):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    options = {"professions": ["nurse"], "seeds": [0], "steps": 2, "layers": (layer,)}
    result = run_audit(AuditPlan(**options), tmp_path / "run", progress=False)
    assert result.plan.containment_layers == (layer,)
    pair = result.plan.pairs("nurse")[0]
    pipe = bm.testbed.pipeline()
    with bm.attribute(pipe, pair.semantic_prompt, layers=[layer]) as recorder:
        pipe(
            [result.plan.prompt("nurse")],
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(0)],
            output_type="latent",
        )
    maps = recorder.maps()
    expected = float(bm.soft_containment(maps["nurse"], maps[pair.demographic]))
    assert result.records["containment"][0].as_py() == pytest.approx(expected, abs=1e-4)


def test_blocks_that_no_map_has(tmp_path):
    plan = AuditPlan(
        professions=["nurse"], seeds=[0], steps=2, containment={"layers": ("up_blocks.7",)}
    )
    with pytest.raises(RuntimeError, match=r"blocks \['up_blocks.7'\], the maps have \['down_bl"):
        run_audit(plan, tmp_path / "run", progress=False)
