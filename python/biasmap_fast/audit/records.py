"""Records of an audit: one row an image, concept pair and percentile, in Parquet part files.

A part file is written under a temporary name, flushed to the disk and renamed, so a file that
bears its final name is whole. Reading checks every file; a damaged one is named, never skipped:
leaving measurements out without a word would bend every figure made from the rest.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import write_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SCHEMA_VERSION = "4"
OK = "ok"

# What makes a row unique, in the order in which records are sorted.
KEY = ("condition", "semantic", "seed", "axis", "demographic", "percentile")


class RecordError(RuntimeError):
    """A record file is damaged, foreign or contradicts another one."""


def _field(name: str, kind: pa.DataType, doc: str, *, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


_MAP = pa.map_(pa.string(), pa.float32())

SCHEMA = pa.schema(
    [
        _field("condition", pa.string(), "intervention; 'plain' for none", nullable=False),
        _field("model", pa.string(), "'testbed', directory or hub id", nullable=False),
        _field("revision", pa.string(), "commit of a hub model"),
        _field("semantic", pa.string(), "profession", nullable=False),
        _field("axis", pa.string(), "demographic axis", nullable=False),
        _field("demographic", pa.string(), "word of the axis", nullable=False),
        _field("template", pa.string(), "prompt template", nullable=False),
        _field("prompt", pa.string(), "text that drew the picture", nullable=False),
        _field("negative_prompt", pa.string(), "negative prompt, null for none"),
        _field("attribution_prompts", pa.list_(pa.string()), "texts attributed", nullable=False),
        _field("seed", pa.int64(), "of the image's own CPU generator", nullable=False),
        _field("steps", pa.int32(), "inference steps", nullable=False),
        _field("guidance_scale", pa.float64(), "classifier-free guidance", nullable=False),
        _field("scheduler", pa.string(), "scheduler class", nullable=False),
        _field("height", pa.int32(), "pixels of the picture", nullable=False),
        _field("width", pa.int32(), "pixels of the picture", nullable=False),
        _field("dtype", pa.string(), "of the weights", nullable=False),
        _field("branch", pa.string(), "guidance branch of the queries", nullable=False),
        _field("layers", pa.list_(pa.string()), "layers asked for; null for the default"),
        _field("evaluation_size", pa.int32(), "maps resized to this square; null: largest layer"),
        _field("soft_mask", pa.string(), "'exact' or 'paper'", nullable=False),
        _field("temperature", pa.float64(), "of the soft mask", nullable=False),
        _field("percentile", pa.float64(), "of the mask, 0 to 100", nullable=False),
        _field("iou", pa.float64(), "overlap of the two masks, 0 to 1"),
        _field("chance", pa.float64(), "IoU of two unrelated masks of this size", nullable=False),
        _field("corrected", pa.float64(), "(iou - chance) / (1 - chance)"),
        _field("soft_iou", pa.float64(), "overlap of the two soft masks, 0 to 1"),
        _field("empty_union", pa.bool_(), "no pixel in either mask; iou is then 0"),
        _field(
            "containment",
            pa.float64(),
            "part of the profession's soft mask inside the word's, 0 to 1; of no percentile: the "
            "same in all rows of a pair",
        ),
        _field("containment_chance", pa.float64(), "containment in an unrelated mask"),
        _field("block_iou", _MAP, "UNet block -> IoU of its own maps; null where undefined"),
        _field("semantic_low", pa.float64(), "smallest value of the profession's map"),
        _field("semantic_high", pa.float64(), "largest value of the profession's map"),
        _field("semantic_mass", pa.float64(), "mean over pixels of the profession's map"),
        _field("demographic_low", pa.float64(), "smallest value of the demographic word's map"),
        _field("demographic_high", pa.float64(), "largest value of the demographic word's map"),
        _field("demographic_mass", pa.float64(), "mean over pixels of the demographic's map"),
        _field("guidance_energy_first", pa.float64(), "energy at the first guided step"),
        _field("guidance_energy_last", pa.float64(), "energy at the last guided step"),
        _field("guidance_applied", pa.int32(), "steps with the energy's gradient"),
        _field("guidance_skipped", pa.int32(), "steps without it"),
        _field("semantic_label", pa.string(), "profession that the classifier reads"),
        _field(
            "attribute_label",
            pa.string(),
            "demographic that the classifier reads, of the axis or not",
        ),
        _field("attribute_score", pa.float64(), "the classifier's score of the picture, 0 to 1"),
        _field(
            "clip_score",
            pa.float64(),
            "CLIP score of the picture with the first condition's prompt, 0 to 100; null without "
            "CLIP",
        ),
        _field("status", pa.string(), "'ok', or what went wrong", nullable=False),
        _field("reason", pa.string(), "in words, where status is not 'ok'"),
    ],
    metadata={"biasmap_fast.schema_version": SCHEMA_VERSION},
)


LEDGER_SCHEMA = pa.schema(
    [
        _field("condition", pa.string(), "intervention", nullable=False),
        _field("semantic", pa.string(), "profession", nullable=False),
        _field("seed", pa.int64(), "of the image's own CPU generator", nullable=False),
        _field("call", pa.int32(), "UNet call of the picture, from 0", nullable=False),
        _field("timestep", pa.float64(), "of the call", nullable=False),
        _field("energy", pa.float64(), "weighted mean of the pairs' SoftIoU", nullable=False),
        _field("pairs", pa.list_(pa.string()), "'profession+word'", nullable=False),
        _field("soft_iou", pa.list_(pa.float64()), "of each pair", nullable=False),
        _field("iou", pa.list_(pa.float64()), "hard IoU of each pair", nullable=False),
        _field("gradient_norm", pa.float64(), "L2, before clipping", nullable=False),
        _field(
            "clip_factor", pa.float64(), "what the gradient was multiplied with", nullable=False
        ),
        _field("applied", pa.bool_(), "whether the prediction was changed", nullable=False),
        _field("reason", pa.string(), "why not, empty if it was", nullable=False),
    ],
    metadata={"biasmap_fast.schema_version": SCHEMA_VERSION},
)
"""What guidance did: one row a picture and guided UNet call, in ``ledger/part-*.parquet``."""

CONTROLS_SCHEMA = pa.schema(
    [
        _field("condition", pa.string(), "intervention", nullable=False),
        _field("semantic", pa.string(), "profession", nullable=False),
        _field("seed", pa.int64(), "of the image's own CPU generator", nullable=False),
        _field("kind", pa.string(), "which control, curve or sweep", nullable=False),
        _field("axis", pa.string(), "demographic axis; null for control words"),
        _field("word", pa.string(), "whose map is compared with the profession's", nullable=False),
        _field("variant", pa.string(), "UNet call, layer or branch of a sweep"),
        _field("percentile", pa.float64(), "of the mask, 0 to 100", nullable=False),
        _field("iou", pa.float64(), "overlap of the two masks, 0 to 1"),
        _field("empty_union", pa.bool_(), "no pixel in either mask; iou is then 0"),
        _field("containment", pa.float64(), "of controls: the profession's mask in the word's"),
        _field("status", pa.string(), "'ok', or what went wrong", nullable=False),
        _field("reason", pa.string(), "in words, where status is not 'ok'"),
    ],
    metadata={"biasmap_fast.schema_version": SCHEMA_VERSION},
)
"""Other overlaps on the same pictures, in ``controls/part-*.parquet`` (`controls`)."""

MASKS_SCHEMA = pa.schema(
    [
        _field("condition", pa.string(), "intervention", nullable=False),
        _field("semantic", pa.string(), "profession", nullable=False),
        _field("seed", pa.int64(), "of the image's own CPU generator", nullable=False),
        _field("axis", pa.string(), "demographic axis", nullable=False),
        _field("demographic", pa.string(), "word of the axis", nullable=False),
        _field("percentile", pa.float64(), "of the mask, 0 to 100", nullable=False),
        _field("height", pa.int32(), "of the mask", nullable=False),
        _field("width", pa.int32(), "of the mask", nullable=False),
        _field("semantic_bits", pa.binary(), "profession's mask, numpy.packbits", nullable=False),
        _field("demographic_bits", pa.binary(), "the word's mask, numpy.packbits", nullable=False),
    ],
    metadata={"biasmap_fast.schema_version": SCHEMA_VERSION},
)
"""The masks of every measured pair, in ``masks/part-*.parquet``: for the seed-shuffled null."""

SIDES = {"ledger": LEDGER_SCHEMA, "controls": CONTROLS_SCHEMA, "masks": MASKS_SCHEMA}
"""Folder of a chunk's file beside its records -> schema."""


def to_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema = SCHEMA) -> pa.Table:
    """Rows as a table of a schema; columns that a row does not have are null.

    Raises:
        RecordError: a row has a column that the schema does not know, or lacks a required one.
    """
    listed = list(rows)
    known = set(schema.names)
    for row in listed:
        if not row.keys() <= known:
            raise RecordError(f"a record has unknown columns {sorted(row.keys() - known)}")
    table = pa.Table.from_pylist(listed, schema=schema)
    _check_required(table, "the records to write")
    return table


def part_path(folder: Path, chunk: int) -> Path:
    """Where chunk ``chunk`` of the run in ``folder`` keeps its records."""
    return folder / "records" / f"part-{chunk:05d}.parquet"


def write_part(folder: Path, chunk: int, table: pa.Table) -> Path:
    """Writes one part file, whole or not at all.

    Args:
        folder: the run folder.
        chunk: number of the chunk.
        table: its records.
    """
    return _write(part_path(folder, chunk), table)


def side_path(folder: Path, side: str, chunk: int) -> Path:
    """Where chunk ``chunk`` of the run in ``folder`` keeps its rows of one of `SIDES`."""
    return folder / side / f"part-{chunk:05d}.parquet"


def read_side(folder: Path, side: str) -> pa.Table:
    """One of `SIDES` of a run: of the chunks whose records are there, in the order of the chunks.

    Raises:
        RecordError: a file is damaged.
    """
    schema = SIDES[side]
    tables = []
    for part in sorted((folder / "records").glob("part-*.parquet")):
        path = folder / side / part.name
        if path.exists():
            tables.append(read_part(path, schema))
    return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()


def ledger_path(folder: Path, chunk: int) -> Path:
    """Where chunk ``chunk`` of the run in ``folder`` keeps its ledger."""
    return side_path(folder, "ledger", chunk)


def read_ledger(folder: Path) -> pa.Table:
    """What guidance did in a run, see `read_side`."""
    return read_side(folder, "ledger")


def table_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a part file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _write(path: Path, table: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, table_bytes(table))
    return path


def read_part(path: Path, schema: pa.Schema = SCHEMA) -> pa.Table:
    """Reads and checks one part file.

    Raises:
        RecordError: the file is not whole, or has other columns; the message says what to do.
    """
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowInvalid, pa.ArrowSerializationError, OSError) as error:
        raise RecordError(
            f"the record file {path} cannot be read ({error}). Nothing else was touched: delete "
            "this one file and start the same audit again to measure its images once more"
        ) from error
    if not table.schema.equals(schema, check_metadata=False):
        difference = _difference(table.schema, schema)
        raise RecordError(
            f"the record file {path} does not have this version's columns ({difference}); it was "
            "written by another version of biasmap-fast: use that one, or a new folder"
        )
    return table


def read_records(folder: Path) -> pa.Table:
    """All records of a run in canonical order (`KEY`), whatever order they were measured in.

    Args:
        folder: the run folder.

    Raises:
        RecordError: a damaged or foreign part file, or two rows for one measurement.
    """
    tables = [read_part(path) for path in sorted((folder / "records").glob("part-*.parquet"))]
    table = pa.concat_tables([SCHEMA.empty_table(), *tables]).combine_chunks()
    table = table.take(pc.sort_indices(table, sort_keys=[(name, "ascending") for name in KEY]))
    counts = table.select(list(KEY)).group_by(list(KEY)).aggregate([([], "count_all")])
    repeated = counts.filter(pc.field("count_all") > 1)
    if repeated.num_rows:
        first = {name: repeated[name][0].as_py() for name in KEY}
        raise RecordError(
            f"{repeated.num_rows} measurements stand in the records of {folder} more than once, "
            f"the first of them {first}; a part file was copied or renamed"
        )
    return table.replace_schema_metadata(SCHEMA.metadata)


def _check_required(table: pa.Table, what: str) -> None:
    missing = [f.name for f in table.schema if not f.nullable and table[f.name].null_count]
    if missing:
        raise RecordError(f"{what} lack values in the required columns {missing}")


def _difference(found: pa.Schema, expected: pa.Schema) -> str:
    missing = [name for name in expected.names if name not in found.names]
    added = [name for name in found.names if name not in expected.names]
    changed = [
        f"{f.name}: expected {f.type}, got {found.field(f.name).type}"
        for f in expected
        if f.name in found.names and found.field(f.name).type != f.type
    ]
    return f"missing {missing}, unknown {added}, changed {changed}"
