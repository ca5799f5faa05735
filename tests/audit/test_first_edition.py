"""The same plan gives the same values as the first edition (first_edition/README.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from biasmap_fast import testbed
from biasmap_fast.audit import AuditPlan, records, run_audit

FIXTURE = Path(__file__).parent / "first_edition"
KEY = ["condition", "profession", "seed"]
MASKED = [*KEY, "axis", "word", "measure", "setting"]
MEASURED = [*MASKED, "part", "control"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    plan = AuditPlan(
        professions=[row.profession for row in testbed.truth()][:4],
        axes="gender",
        seeds=range(5),
        conditions=["plain", "guided"],
        energy={"scale": 30.0},
        fractions=[0.3, 0.1],
        sweeps=["step", "layer", "branch"],
        save_pictures="none",
        save_maps="none",
        batch_size=8,
        guidance_scale=3.0,
        steps=10,
    )
    return run_audit(plan, tmp_path_factory.mktemp("first") / "run", progress=False)


def both(name, key, frame):
    expected = pd.read_parquet(FIXTURE / f"{name}.parquet").set_index(key).sort_index()
    found = frame.set_index(key).sort_index()
    assert not expected.index.has_duplicates
    assert not found.index.has_duplicates
    assert found.index.difference(expected.index).tolist() == []
    assert expected.index.difference(found.index).tolist() == []
    return found.loc[expected.index], expected


def same(found, expected, columns):
    for name in columns:
        a, b = (x[name].to_numpy(dtype=float) for x in (found, expected))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=name)


def test_pictures(result):
    found, expected = both("pictures", KEY, result.pictures)
    numbers = ["height", "width", "clip_score", "energy_first", "energy_last"]
    same(found, expected, [*numbers, "energy_applied", "energy_skipped"])
    for name in ("prompt", "status"):
        assert found[name].tolist() == expected[name].tolist()
    labels = [dict(read) for read in expected["labels"]]
    assert [dict(read) for read in found["labels"]] == labels
    for read, right in zip(found["scores"], expected["scores"], strict=True):
        assert dict(read) == pytest.approx(dict(right), abs=1e-6)


def test_measurements(result):
    found, expected = both("measurements", MEASURED, result.measurements)
    same(found, expected, ["value", "chance"])
    assert found["status"].tolist() == expected["status"].tolist()


def test_masks_of_iou(result):
    masks = records.read(result.folder, "masks").to_pandas()
    found, expected = both("masks", MASKED, masks[masks["measure"] == "iou"])
    for name in ("height", "width", "profession_bits", "word_bits"):
        assert found[name].tolist() == expected[name].tolist()
