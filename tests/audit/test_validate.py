"""Validation: a whole folder is silent, and every kind of damage is named."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from biasmap_fast.audit import render, validate
from biasmap_fast.audit.records import part_path, table_bytes
from biasmap_fast.files import sha256


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished.folder, tmp_path / "run")


def rewrite(folder, name, change, chunk=0):
    """Changes a part of a table, and its hash with it."""
    path = part_path(folder, name, chunk)
    table = pq.read_table(path)
    rows = change(table.to_pylist())
    path.write_bytes(table_bytes(pa.Table.from_pylist(rows, schema=table.schema)))
    hashes = folder / "hashes" / f"part-{chunk:05d}.json"
    stated = json.loads(hashes.read_text())
    stated["files"][path.relative_to(folder).as_posix()] = sha256(path.read_bytes())
    hashes.write_text(json.dumps(stated))


def test_a_whole_folder_has_no_differences(folder):
    assert validate(folder) == []


def test_changed_and_missing_files_are_named(folder):
    picture = next(folder.glob("pictures/*.png"))
    picture.write_bytes(picture.read_bytes() + b"x")
    assert any(f"pictures/{picture.name}: SHA-256 is" in line for line in validate(folder))
    (folder / "figures.csv").unlink()
    assert "figures.csv is missing: `biasmap report` writes it" in validate(folder)
    picture.unlink()
    lines = validate(folder)
    assert any(f"pictures/{picture.name}: cannot be read" in line for line in lines)
    assert any(line.startswith("the run is not finished") for line in lines)


def test_an_unfinished_run_is_not_whole(folder):
    for path in folder.glob("*/part-00002.*"):
        path.unlink()
    render(folder)
    (line,) = validate(folder)
    assert line == "the run is not finished: 4 of 6 pictures are drawn"


def test_figures_are_computed_again(folder):
    figures = pd.read_parquet(folder / "figures.parquet")
    figures.loc[3, "estimate"] += 1e-6
    figures.drop(index=5).to_parquet(folder / "figures.parquet")
    first, second = validate(folder)
    assert first.endswith("is missing")
    assert "estimate is" in second
    summary = json.loads((folder / "summary.json").read_text())
    summary["run"]["measured"] += 1
    (folder / "summary.json").write_text(json.dumps(summary))
    assert any(line.startswith("summary.json: run is") for line in validate(folder))


def test_records_are_compared_with_the_plan_and_themselves(folder):
    def other_seed(rows):
        return [{**rows[0], "seed": 99}, *rows[1:]]

    rewrite(folder, "pictures", other_seed)
    lines = validate(folder)
    assert any("99): the plan does not ask for it" in line for line in lines)
    assert any("its picture is not in the pictures" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"value": 1.5}, "it is measured and has no value between 0 and 1"),
        ({"status": "constant_map", "reason": "x"}, "it is not measured and has a value"),
        ({"chance": 0.5}, "its chance is not that of its setting"),
    ],
)
def test_values_that_contradict_themselves(folder, change, said):
    rewrite(folder, "measurements", lambda rows: [{**rows[0], **change}, *rows[1:]])
    assert any(line.endswith(said) for line in validate(folder))


def test_a_value_that_is_left_out_is_missed(folder):
    def fewer(rows):
        whole = next(i for i, row in enumerate(rows) if not row["part"] and not row["control"])
        return rows[:whole] + rows[whole + 1 :]

    rewrite(folder, "measurements", fewer)
    assert any("values, where other pictures have" in line for line in validate(folder))
