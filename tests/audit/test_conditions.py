"""An audit under the condition "guided": the same seeds, what guidance did, a compiled UNet."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from biasmap_fast.audit import run_audit
from biasmap_fast.audit.plan import Picture
from biasmap_fast.audit.records import LEDGER, read

equal = pd.testing.assert_frame_equal
pytestmark = pytest.mark.usefixtures("quick")
KEY = ["condition", "profession", "seed"]
NO_CALL = {"start": 0.9, "stop": 0.95}


@pytest.fixture(scope="module")
def plan(tiny_plan):
    return tiny_plan(conditions=["plain", "guided"], energy={"scale": 30.0}, steps=2)


@pytest.fixture(scope="module")
def guided(plan, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided") / "run"
    return run_audit(plan, folder, pipe=tiny, progress=False)


def test_chunks_do_not_mix_conditions(plan):
    conditions = [{picture.condition for picture in chunk} for chunk in plan.chunks()]
    assert conditions == [{"plain"}] * 3 + [{"guided"}] * 3
    assert plan.chunks()[3][0] == Picture("doctor", 0, "guided")


def test_plain_records_are_those_of_a_plain_audit(guided, tiny, tiny_plan, tmp_path):
    alone = run_audit(tiny_plan(steps=2), tmp_path, pipe=tiny, progress=False)
    rows = guided.measurements
    equal(rows[rows["condition"] == "plain"].reset_index(drop=True), alone.measurements)
    assert read(tmp_path, "ledger").num_rows == 0


def test_guided_records_say_what_guidance_did(guided):
    table = read(guided.folder, "ledger")
    assert table.schema.equals(LEDGER)
    ledger = table.to_pandas().set_index(KEY)
    assert len(ledger) == 6 * 2
    for _, row in guided.pictures[guided.pictures["condition"] == "guided"].iterrows():
        calls = ledger.loc[tuple(row[KEY])]
        assert calls["call"].tolist() == [0, 1]
        assert (row["energy_first"], row["energy_last"]) == tuple(calls["energy"])
        assert (row["energy_applied"], row["energy_skipped"]) == (2, 0)
        first = calls.iloc[0]
        # the pairs that are measured, each from the prompt that has both words
        assert list(first["pairs"]) == [f"{row['profession']}+{w}" for w in ("man", "woman")]
        assert first["energy"] == pytest.approx(np.mean(first["soft_iou"]), rel=1e-5)
    plain = guided.pictures[guided.pictures["condition"] == "plain"]
    assert plain["energy_applied"].isna().all()


def test_guidance_of_separate_prompts(tiny, tiny_plan, tmp_path):
    plan = tiny_plan(
        conditions=["guided"],
        attribution_template=("a photo of {profession}", "a photo of {a_demographic}"),
        seeds=[0],
    )
    result = run_audit(plan, tmp_path, pipe=tiny, progress=False)
    assert set(result.pictures["status"]) == {"ok"}
    ledger = read(tmp_path, "ledger").to_pylist()
    pairs = {(row["profession"], *row["pairs"]) for row in ledger}
    assert pairs == {(p, f"{p}+man", f"{p}+woman") for p in ("doctor", "pilot")}


def test_stopped_run_continues_with_the_same_records_and_ledger(guided, tiny, tmp_path, stops):
    stops(4)
    with pytest.raises(KeyboardInterrupt):
        run_audit(guided.plan, tmp_path, pipe=tiny, progress=False)
    # killed between the files of a chunk: its ledger is there, its pictures are not
    (tmp_path / "pictures" / "part-00003.parquet").unlink()
    assert read(tmp_path, "ledger").num_rows == 0
    stops(9)
    again = run_audit(guided.plan, tmp_path, pipe=tiny, progress=False)
    equal(again.measurements, guided.measurements)
    assert read(tmp_path, "ledger").equals(read(guided.folder, "ledger"))


@pytest.mark.parametrize(
    ("energy", "broken", "reason"),
    [
        (NO_CALL, False, "no UNet call lay between the energy's start and stop"),
        ({}, True, "guidance was skipped in 2 of 2 UNet calls (see ledger/)"),
    ],
)
def test_a_picture_that_was_hardly_guided_is_none_of_the_guided(
    tiny, tiny_plan, tmp_path, energy, broken, reason, request
):
    conditions = ["plain", "guided"]
    plan = tiny_plan(
        professions=["doctor"], seeds=[0], steps=2, conditions=conditions, energy=energy
    )
    hook = None
    if broken:  # a gradient that is not finite
        hook = tiny.unet.conv_in.register_full_backward_hook(
            lambda module, given, taken: tuple(x if x is None else x * math.nan for x in given)
        )
    try:
        result = run_audit(plan, tmp_path, pipe=tiny, progress=False)
    finally:
        if hook is not None:
            hook.remove()
    pictures = result.pictures.set_index("condition")
    assert pictures["status"].to_dict() == {"plain": "ok", "guided": "guidance_skipped"}
    assert pictures["reason"]["guided"] == reason
    assert set(result.measurements["condition"]) == {"plain"}


def test_compiled_audit(tiny, tiny_plan, tmp_path, monkeypatch):
    """Graph capture alone, over two batches: the second has recorder and hooks of its own."""
    unet = tiny.unet
    small = {"professions": ["doctor"], "seeds": [0, 1], "batch_size": 1}
    expected = run_audit(tiny_plan(**small), tmp_path / "eager", pipe=tiny, progress=False)
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plan = tiny_plan(**small, compile=True)
    result = run_audit(plan, tmp_path / "compiled", pipe=tiny, progress=False)
    torch.compiler.reset()
    assert tiny.unet is unet
    equal(result.measurements, expected.measurements, rtol=1e-4, atol=0.05)
    hashes = {
        json.loads((tmp_path / name / "environment.json").read_text())["weights_sha256"]
        for name in ("compiled", "eager")
    }
    assert len(hashes) == 1
