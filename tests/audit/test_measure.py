"""The measurements of a run: against the library's functions, their masks, and a measure added."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import biasmap_fast as bm
from biasmap_fast.audit import AuditPlan, run_audit
from biasmap_fast.audit.measure import CURVE, MEASURES, Measure, Values
from biasmap_fast.audit.records import read

SETTINGS = {"professions": ["nurse", "chef"], "seeds": [0, 1, 2], "steps": 2, "batch_size": 4}
KEY = ["condition", "profession", "seed", "axis", "word", "measure", "setting"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    plan = AuditPlan(**SETTINGS, fractions=[0.3, 0.12], sweeps=["step", "layer"], save_maps="all")
    return run_audit(plan, tmp_path_factory.mktemp("measured") / "run", progress=False)


def drawn_maps(plan, profession, prompt, layers=None):
    """Maps of the three pictures of a profession, from the library itself."""
    pipe = bm.testbed.pipeline()
    with bm.attribute(pipe, prompt, layers=layers) as recorder:
        pipe(
            [plan.prompt(profession)] * 3,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
            output_type="latent",
        )
    return recorder.maps()


def values_of(result, **wanted):
    rows = result.measurements
    for name, value in ({"part": "", "control": ""} | wanted).items():
        rows = rows[rows[name] == value]
    return rows.sort_values("seed")["value"].to_numpy()


def test_values_are_those_of_the_librarys_functions(run):
    pair = run.plan.pairs("chef")[1]
    maps = drawn_maps(run.plan, "chef", pair.profession_prompt)
    a, b = maps["chef"], maps[pair.word]
    wanted = {"profession": "chef", "word": pair.word, "axis": "gender"}
    for fraction in run.plan.fractions:
        masks = [x.numpy() > np.percentile(x.numpy(), 100 - 100 * fraction, axis=(1, 2), keepdims=1)
                 for x in (a, b)]  # fmt: skip
        expected = (masks[0] & masks[1]).sum((1, 2)) / (masks[0] | masks[1]).sum((1, 2))
        found = values_of(run, measure="iou", setting=f"{fraction:g}", **wanted)
        np.testing.assert_allclose(found, expected, atol=0.02)  # another batch: a pixel may turn
        found = values_of(run, measure="soft_iou", setting=f"{fraction:g}", **wanted)
        np.testing.assert_allclose(found, bm.soft_iou(a, b, fraction=fraction), atol=1e-3)


@pytest.mark.parametrize("control", ["", "person"])
def test_containment_is_that_of_the_decoders_maps(run, control):
    pairs = [*run.plan.pairs("chef"), *run.plan.control_pairs("chef")]
    pair = next(pair for pair in pairs if pair.control == control)
    maps = drawn_maps(run.plan, "chef", pair.profession_prompt, layers=["up_blocks"])
    expected = bm.soft_containment(maps["chef"], maps[pair.word])
    found = values_of(
        run, profession="chef", measure="containment", word=pair.word, control=control
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_every_picture_has_every_measurement(run):
    rows = run.measurements
    assert set(rows["status"]) == {"ok"}
    counts = rows.assign(kind=rows["part"].str.partition(":")[0]).groupby(
        ["kind", "control", "measure"]
    ).size() / 6  # fmt: skip
    words, fractions, blocks, layers = 2, 2, 4, 6
    curve = len({*CURVE, *run.plan.fractions})
    assert counts["", "", "iou"] == words * curve
    assert counts["", "", "soft_iou"] == words * fractions
    assert counts["", "", "containment"] == words
    for control in ("function", "object", "person"):
        assert (counts["", control, "iou"], counts["", control, "containment"]) == (fractions, 1)
    assert counts["", "swapped", "iou"] == words * fractions
    assert counts["block", "", "iou"] == words * fractions * blocks
    assert counts["step", "", "iou"] == words * 2
    assert counts["layer", "", "iou"] == words * layers
    assert len(counts) == 14
    assert rows.loc[rows["control"].isin(["function", "person"]), "axis"].eq("").all()
    chance = rows.drop_duplicates(["measure", "setting"]).set_index(["measure", "setting"])[
        "chance"
    ]
    assert chance["iou", "0.3"] == pytest.approx(0.3 / 1.7)
    assert chance["containment", "0.05 in 0.1"] == 0.1


def bits(row, side):
    packed = np.frombuffer(row[f"{side}_bits"], np.uint8)
    return np.unpackbits(packed, count=row["height"] * row["width"]).astype(bool)


def test_masks_are_those_of_what_is_measured(run):
    rows = run.measurements
    rows = rows[(rows["part"] == "") & (rows["control"] == "")].set_index(KEY)["value"]
    masks = read(run.folder, "masks").to_pylist()
    assert len(masks) == 6 * 2 * 3  # pictures, words, two fractions and containment
    for mask in masks:
        a, b = bits(mask, "profession"), bits(mask, "word")
        value = rows[tuple(mask[name] for name in KEY)]
        if mask["measure"] == "iou":
            assert (a & b).sum() / (a | b).sum() == pytest.approx(value, abs=1e-7)
        else:
            assert a.mean() == pytest.approx(0.05, abs=0.01)
            assert b.mean() == pytest.approx(0.1, abs=0.01)
            assert (a & b).sum() / a.sum() == pytest.approx(value, abs=0.15)  # soft masks


def test_maps_that_are_kept_give_the_values_again(run):
    maps = load_file(run.folder / "maps" / "001-chef-2.safetensors")
    assert len(maps) == 2 * 2 * 2  # words, measures with masks, sides
    for measured, function in (("iou", bm.iou), ("containment", bm.soft_containment)):
        a, b = (maps[f"gender/man/{measured}/{side}"] for side in ("profession", "word"))
        setting = "0.3" if measured == "iou" else "0.05 in 0.1"
        expected = values_of(
            run, profession="chef", seed=2, word="man", measure=measured, setting=setting
        )
        assert float(function(a, b)) == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.usefixtures("quick")
def test_a_measure_is_one_entry(tmp_path, monkeypatch):
    def cosine(plan, a, b, setting):
        values = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))
        return Values(values, chance=a.flatten(1).mean(1))

    monkeypatch.setitem(MEASURES, "cosine", Measure(cosine, settings=lambda plan: [(0.5,)]))
    plan = AuditPlan(**SETTINGS | {"professions": ["nurse"], "seeds": [0]})
    rows = run_audit(plan, tmp_path, progress=False).measurements
    rows = rows[rows["measure"] == "cosine"]
    assert sorted(rows["control"].unique()) == ["", "function", "object", "person", "swapped"]
    assert rows["value"].between(0, 1).all()
    assert rows["chance"].nunique() > 1  # each picture and pair its own


@pytest.mark.usefixtures("quick")
def test_what_is_turned_off_is_not_measured(tmp_path):
    plan = AuditPlan(
        **SETTINGS | {"professions": ["nurse"], "seeds": [0]},
        controls=None,
        curve=False,
        sweeps=[],
        measure="iou",
    )
    rows = run_audit(plan, tmp_path, progress=False).measurements
    assert set(rows["measure"]) == {"iou", "soft_iou"}
    assert set(rows["setting"]) == {"0.3"}
    assert set(rows["control"]) == {""}
    assert rows["part"].str.partition(":")[0].isin(["", "block"]).all()


@pytest.mark.usefixtures("quick")
def test_other_fractions_and_layers(tmp_path):
    settings = {"fractions": (0.3, 0.3), "layers": ("down_blocks", "up_blocks")}
    plan = AuditPlan(**SETTINGS | {"professions": ["nurse"]}, containment=settings)
    result = run_audit(plan, tmp_path, progress=False)
    inside = values_of(result, measure="containment", word="man")
    # masks of equal size on all the recorded maps
    overlap = values_of(result, measure="soft_iou", word="man")
    np.testing.assert_allclose(inside / (2 - inside), overlap, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_the_plans_own_layers_are_those_of_containment(tmp_path):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    plan = AuditPlan(**SETTINGS | {"professions": ["nurse"]}, layers=(layer,))
    result = run_audit(plan, tmp_path, progress=False)
    assert plan.containment_layers == (layer,)
    maps = drawn_maps(plan, "nurse", plan.pairs("nurse")[0].profession_prompt, layers=[layer])
    expected = bm.soft_containment(maps["nurse"], maps["man"])
    found = values_of(result, measure="containment", word="man")
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_blocks_that_no_map_has(tmp_path):
    containment = {"layers": ("up_blocks.7",)}
    plan = AuditPlan(professions=["nurse"], seeds=[0], steps=1, containment=containment)
    with pytest.raises(RuntimeError, match=r"blocks \['up_blocks.7'\], the maps have \['down_bl"):
        run_audit(plan, tmp_path, progress=False)
