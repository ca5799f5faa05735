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


def same(found, expected, columns, guided):
    """Plain pictures to 1e-6; guided ones within ``guided``, see first_edition/README.md."""
    tolerance = np.where(expected.index.get_level_values("condition") == "plain", 1e-6, guided)
    for name in columns:
        a, b = (x[name].to_numpy(dtype=float) for x in (found, expected))
        assert (np.isnan(a) == np.isnan(b)).all(), name
        wrong = np.abs(a - b) > tolerance
        assert not wrong.any(), (name, found[wrong].head(), expected[wrong].head())


def test_pictures(result):
    found, expected = both("pictures", KEY, result.pictures)
    exact = ["height", "width", "clip_score", "energy_first", "energy_applied", "energy_skipped"]
    same(found, expected, exact, guided=1e-6)
    same(found, expected, ["energy_last"], guided=2 * 0.0173)
    for name in ("prompt", "status"):
        assert found[name].tolist() == expected[name].tolist()
    for column in ("labels", "scores"):
        for condition, *pair in zip(
            found.index.get_level_values("condition"), found[column], expected[column], strict=True
        ):
            a, b = (dict(read) for read in pair)
            if column == "labels" or condition == "guided":
                assert a.keys() == b.keys()
            if condition == "plain":
                assert a == (b if column == "labels" else pytest.approx(b, abs=1e-6))


@pytest.mark.parametrize(
    ("measure", "guided"), [("iou", 0.0539), ("soft_iou", 0.0108), ("containment", 0.0031)]
)
def test_measurements(result, measure, guided):
    tables = both("measurements", MEASURED, result.measurements)
    found, expected = (table.xs(measure, level="measure", drop_level=False) for table in tables)
    same(found, expected, ["chance"], guided=1e-6)
    same(found, expected, ["value"], guided=2 * guided)
    assert found["status"].tolist() == expected["status"].tolist()


def test_masks_of_iou(result):
    masks = records.read(result.folder, "masks").to_pandas()
    found, expected = both("masks", MASKED, masks[masks["measure"] == "iou"])
    for name in ("height", "width"):
        assert found[name].tolist() == expected[name].tolist()
    for name in ("profession_bits", "word_bits"):
        bits = (table.xs("plain", level="condition")[name].tolist() for table in (found, expected))
        assert next(bits) == next(bits)
