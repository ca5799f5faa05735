"""Tables of an audit: typed, sorted, checked against their hashes."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from biasmap_fast.audit import RecordError, records
from biasmap_fast.audit.chunk import Chunk
from biasmap_fast.audit.folder import plan_hash, store
from biasmap_fast.audit.records import MASKS, MEASUREMENTS, PICTURES, TABLES, part_path, read

PICTURE = {"condition": "plain", "profession": "doctor", "seed": 0}
ROW = PICTURE | {"prompt": "a photo", "height": 8, "width": 8, "status": "ok"}
VALUE = PICTURE | {
    "axis": "gender",
    "word": "man",
    "measure": "iou",
    "setting": "0.3",
    "part": "",
    "control": "",
    "value": 0.3,
    "chance": 0.18,
    "status": "ok",
}


def write(folder, index, rows, values=()):
    """Stores a chunk of these rows."""
    (folder / "plan.yaml").touch()
    tables = {
        "pictures": records.to_table(rows, PICTURES),
        "measurements": records.to_table(values, MEASUREMENTS),
        "masks": MASKS.empty_table(),
    }
    store(folder, index, Chunk(tables, {}, {}), plan_hash(folder))
    return part_path(folder, "measurements", index)


def test_tables_are_typed_and_sorted(tmp_path):
    write(tmp_path, 1, [ROW | {"seed": 9}, ROW | {"profession": "artist", "seed": 1}])
    write(tmp_path, 0, [ROW | {"seed": 2, "labels": [("gender", None)]}])
    table = read(tmp_path, "pictures")
    assert table.schema.equals(PICTURES, check_metadata=True)
    assert table["seed"].to_pylist() == [1, 2, 9]
    assert table["labels"].to_pylist()[1] == [("gender", None)]
    for name, (schema, _) in TABLES.items():
        assert all(schema.field(column).metadata[b"doc"] for column in schema.names)
        assert read(tmp_path, name).schema.equals(schema, check_metadata=True)


@pytest.mark.parametrize("damage", ["half", "empty", "bit", "foreign"])
def test_a_file_that_is_not_the_one_that_was_written_is_named(tmp_path, damage):
    path = write(tmp_path, 0, [ROW], [VALUE])
    data = path.read_bytes()
    if damage == "foreign":
        pq.write_table(MEASUREMENTS.empty_table().drop_columns(["value"]), path)
    else:
        flipped = data[:60] + bytes([data[60] ^ 1]) + data[61:]
        path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "bit": flipped}[damage])
    with pytest.raises(
        RecordError, match=r"part-00000\.parquet cannot be read.*SHA-256.*delete th"
    ):
        read(tmp_path, "measurements")
    assert read(tmp_path, "pictures").num_rows == 1


def test_columns_of_another_version_are_refused(tmp_path):
    path = write(tmp_path, 0, [ROW], [VALUE])
    table = pq.read_table(path)
    hashes = records.hashes_path(tmp_path, 0)
    for changed in (
        table.drop_columns(["value"]),
        table.replace_schema_metadata({b"biasmap_fast.schema_version": b"4"}),
    ):
        path.write_bytes(records.table_bytes(changed))
        stated = json.loads(hashes.read_text())
        stated["files"]["measurements/part-00000.parquet"] = records.sha256(path.read_bytes())
        hashes.write_text(json.dumps(stated))
        with pytest.raises(RecordError, match="written by another version of biasmap-fast"):
            read(tmp_path, "measurements")


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"plan_sha256": 1}', "[" * 100_000]
    + [
        json.dumps({"plan_sha256": "", "files": {name: ""}})
        for name in ("/dev/zero", "../plan.yaml", "pictures/../../x.png", "hashes/x.png")
    ],
)
def test_hashes_that_cannot_be_are_refused(tmp_path, text):
    write(tmp_path, 0, [ROW])
    records.hashes_path(tmp_path, 0).write_text(text)
    with pytest.raises(RecordError, match=r"hashes/part-00000\.json cannot be read.*delete this"):
        read(tmp_path, "pictures")


def test_another_plan_than_that_of_the_records_is_refused(tmp_path):
    write(tmp_path, 0, [ROW])
    (tmp_path / "plan.yaml").write_text("steps: 50")
    with pytest.raises(RecordError, match=r"plan\.yaml is not the file under which chunk 0"):
        read(tmp_path, "pictures")


@pytest.mark.parametrize("name", ["measurements", "masks", "hashes", "pictures"])
def test_a_chunk_that_lacks_a_file_is_not_there(tmp_path, name):
    write(tmp_path, 0, [ROW])
    write(tmp_path, 1, [ROW | {"seed": 1}])
    next((tmp_path / name).glob("part-00000.*")).unlink()
    assert records.chunks_of(tmp_path) == [1]
    assert read(tmp_path, "pictures")["seed"].to_pylist() == [1]


def test_repeated_rows_are_refused(tmp_path):
    write(tmp_path, 0, [ROW], [VALUE])
    write(tmp_path, 1, [ROW | {"seed": 1}], [VALUE])
    with pytest.raises(RecordError, match=r"1 rows stand in .* more than once.*'seed': 0"):
        read(tmp_path, "measurements")


def test_incomplete_rows_are_not_written():
    with pytest.raises(RecordError, match=r"unknown columns \['promt'\]"):
        records.to_table([ROW | {"promt": "x"}], PICTURES)
    with pytest.raises(RecordError, match=r"lack values in the required columns \['prompt'\]"):
        records.to_table([{k: v for k, v in ROW.items() if k != "prompt"}], PICTURES)


def test_masks_are_numpys_bits():
    mask = np.array([[[True, False], [True, False]]])
    assert records.packed(mask) == [b"\xa0"]
