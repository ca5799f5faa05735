"""Tables of an audit, in Parquet part files: one set of parts per chunk.

``pictures`` has one row per drawn picture, ``measurements`` one per measured value. ``ledger`` says
what guidance did, ``masks`` holds the hard masks of what was measured. Reading checks every part
against the hash that was written with it; a damaged one is named, never skipped: leaving
measurements out without a word would bend every figure made from the rest.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files import sha256

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

SCHEMA_VERSION = "5"
OK = "ok"
EMPTY = "empty"  # both masks are empty: the value is 0, and counts as measured

_VERSION_KEY = b"biasmap_fast.schema_version"
_CHUNK_FILE = re.compile(
    r"(pictures|measurements|ledger|masks|maps)/[\w.-]+\.(parquet|png|safetensors)"
)


class RecordError(RuntimeError):
    """A record file is damaged, foreign or contradicts another one."""


def _schema(*fields: tuple[str, pa.DataType, str], null: Iterable[str] = ()) -> pa.Schema:
    return pa.schema(
        [
            pa.field(name, kind, nullable=name in null, metadata={"doc": doc})
            for name, kind, doc in fields
        ],
        metadata={_VERSION_KEY: SCHEMA_VERSION},
    )


_PICTURE = (
    ("condition", pa.string(), "intervention; 'plain' for none"),
    ("profession", pa.string(), "profession"),
    ("seed", pa.int64(), "seed of the picture's CPU generator"),
)
_STATUS = (
    ("status", pa.string(), "'ok', 'empty' (both masks are empty), or what went wrong"),
    ("reason", pa.string(), "in words, if status is neither 'ok' nor 'empty'"),
)
_MEASURED = (
    ("axis", pa.string(), "demographic axis; empty for control words"),
    ("word", pa.string(), "word whose map is compared with the profession's"),
    ("measure", pa.string(), "'iou', 'soft_iou', 'containment'"),
    ("setting", pa.string(), "fractions of the pixels in the masks: '0.3', '0.05 in 0.1'"),
)

PICTURES = _schema(
    *_PICTURE,
    ("prompt", pa.string(), "text that drew the picture"),
    ("height", pa.int32(), "pixels of the picture"),
    ("width", pa.int32(), "pixels of the picture"),
    ("labels", pa.map_(pa.string(), pa.string()), "axis or 'profession' -> word that was read"),
    ("scores", pa.map_(pa.string(), pa.float64()), "axis -> the classifier's score, 0 to 1"),
    ("clip_score", pa.float64(), "CLIP score with the first condition's prompt, 0 to 100"),
    ("energy_first", pa.float64(), "energy at the first guided step"),
    ("energy_last", pa.float64(), "energy at the last guided step"),
    ("energy_applied", pa.int32(), "steps with the energy's gradient"),
    ("energy_skipped", pa.int32(), "steps without it"),
    *_STATUS,
    null=(
        *("labels", "scores", "clip_score", "reason"),
        *("energy_first", "energy_last", "energy_applied", "energy_skipped"),
    ),
)
MEASUREMENTS = _schema(
    *_PICTURE,
    *_MEASURED,
    ("part", pa.string(), "empty for the whole map; 'block:', 'step:', 'layer:', 'branch:' + name"),
    ("control", pa.string(), "empty for a demographic word, else the kind of control"),
    ("value", pa.float64(), "0 to 1"),
    ("chance", pa.float64(), "value of two unrelated masks; null where nothing was measured"),
    *_STATUS,
    null=("value", "chance", "reason"),
)
LEDGER = _schema(
    *_PICTURE,
    ("call", pa.int32(), "UNet call of the picture, from 0"),
    ("timestep", pa.float64(), "timestep of the call"),
    ("energy", pa.float64(), "weighted mean of the pairs' SoftIoU"),
    ("pairs", pa.list_(pa.string()), "'profession+word'"),
    ("soft_iou", pa.list_(pa.float64()), "SoftIoU of each pair"),
    ("iou", pa.list_(pa.float64()), "hard IoU of each pair"),
    ("gradient_norm", pa.float64(), "L2, before clipping"),
    ("clip_factor", pa.float64(), "factor of the gradient"),
    ("applied", pa.bool_(), "whether the prediction was changed"),
    ("reason", pa.string(), "why not; empty if it was"),
)
MASKS = _schema(
    *_PICTURE,
    *_MEASURED,
    ("height", pa.int32(), "rows of the mask"),
    ("width", pa.int32(), "columns of the mask"),
    ("profession_bits", pa.binary(), "the profession's mask, numpy.packbits"),
    ("word_bits", pa.binary(), "the word's mask, numpy.packbits"),
)

_KEY = tuple(name for name, *_ in _PICTURE)
_MEASURED_KEY = (*_KEY, *(name for name, *_ in _MEASURED))
# name of a table and of its folder -> schema, and the columns that make a row unique
TABLES: dict[str, tuple[pa.Schema, tuple[str, ...]]] = {
    "pictures": (PICTURES, _KEY),
    "measurements": (MEASUREMENTS, (*_MEASURED_KEY, "part", "control")),
    "ledger": (LEDGER, (*_KEY, "call")),
    "masks": (MASKS, _MEASURED_KEY),
}


def to_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Returns rows as a table of a schema; columns that a row does not have are null."""
    listed, known = list(rows), set(schema.names)
    for row in listed:
        if not row.keys() <= known:
            raise RecordError(f"a record has unknown columns {sorted(row.keys() - known)}")
    table = pa.Table.from_pylist(listed, schema=schema)
    if missing := [f.name for f in schema if not f.nullable and table[f.name].null_count]:
        raise RecordError(f"the records lack values in the required columns {missing}")
    return table


def table_bytes(table: pa.Table) -> bytes:
    """Returns a table as the bytes of a part file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def part_path(folder: Path, name: str, chunk: int) -> Path:
    """Returns where a chunk keeps its part of a table."""
    return folder / name / f"part-{chunk:05d}.parquet"


def hashes_path(folder: Path, chunk: int) -> Path:
    """Returns where the hashes of a chunk's files are."""
    return folder / "hashes" / f"part-{chunk:05d}.json"


def read_hashes(folder: Path, chunk: int) -> tuple[str, dict[str, str]]:
    """Reads the SHA-256 of the plan and of each file of a chunk, by its path in the folder."""
    path = hashes_path(folder, chunk)
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        plan, files = str(stated["plan_sha256"]), dict(stated["files"])
        if foreign := [name for name in files if not _CHUNK_FILE.fullmatch(name)]:
            raise ValueError(f"it names {foreign[0]!r}")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(
            f"{path} cannot be read ({error}): delete this one file and start the same audit "
            "again to draw the pictures of its chunk once more"
        ) from error
    return plan, files


def is_whole(folder: Path, chunk: int) -> bool:
    """Whether all files of a chunk are there; one that lacks a file is measured again."""
    if not part_path(folder, "pictures", chunk).exists():
        return False
    try:
        _, files = read_hashes(folder, chunk)
    except FileNotFoundError:
        return False
    return all((folder / name).is_file() for name in files)


def chunks_of(folder: Path) -> list[int]:
    """Returns the numbers of the whole chunks of a run."""
    parts = (folder / "pictures").glob("part-*.parquet")
    numbers = sorted(int(p.stem[5:]) for p in parts if p.stem[5:].isdecimal())
    return [number for number in numbers if is_whole(folder, number)]


def read_part(folder: Path, name: str, chunk: int) -> pa.Table:
    """Reads a chunk's part of a table; empty if the chunk has none."""
    schema, _ = TABLES[name]
    path = part_path(folder, name, chunk)
    stated, files = read_hashes(folder, chunk)
    if stated != (plan := sha256((folder / "plan.yaml").read_bytes())):
        raise RecordError(
            f"plan.yaml is not the file under which chunk {chunk} of {folder} was measured "
            f"(SHA-256 {plan}, was {stated}): restore it"
        )
    expected = files.get(path.relative_to(folder).as_posix())
    if expected is None:
        return schema.empty_table()
    try:
        data = path.read_bytes()
        if sha256(data) != expected:
            raise OSError(f"its SHA-256 is {sha256(data)}, was {expected} when it was measured")
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise RecordError(
            f"the record file {path} cannot be read ({error}). Nothing else was touched: delete "
            "this one file and start the same audit again to draw its pictures once more"
        ) from error
    version = (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode()
    if version != SCHEMA_VERSION or not table.schema.equals(schema, check_metadata=False):
        raise RecordError(
            f"the record file {path} has schema {version} and the columns {table.schema.names}, "
            f"expected schema {SCHEMA_VERSION} and {schema.names}; it was written by another "
            "version of biasmap-fast: use that one, or a new folder"
        )
    return table


def read(folder: Path, name: str, chunks: Sequence[int] | None = None) -> pa.Table:
    """Reads a table of a run, in canonical order whatever order it was measured in.

    Args:
        folder: The run folder.
        name: ``"pictures"``, ``"measurements"``, ``"ledger"`` or ``"masks"``.
        chunks: Numbers of the chunks; default all that are whole.
    """
    schema, key = TABLES[name]
    numbers = chunks_of(folder) if chunks is None else chunks
    tables = [read_part(folder, name, number) for number in numbers]
    table = pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()
    table = table.take(pc.sort_indices(table, sort_keys=[(column, "ascending") for column in key]))
    counts = table.select(list(key)).group_by(list(key)).aggregate([([], "count_all")])
    repeated = counts.filter(pc.field("count_all") > 1)
    if repeated.num_rows:
        first = {column: repeated[column][0].as_py() for column in key}
        raise RecordError(
            f"{repeated.num_rows} rows stand in {folder / name} more than once, the first of them "
            f"{first}; a part file was copied or renamed"
        )
    return table.replace_schema_metadata(schema.metadata)


def packed(masks: npt.NDArray[np.bool_]) -> list[bytes]:
    """Returns the bits of masks ``[R, H, W]``, row by row, the first pixel in the highest bit."""
    return [row.tobytes() for row in np.packbits(masks.reshape(len(masks), -1), axis=1)]
