"""The run folder: who may write it, what it must hold before a run goes on, how a chunk is stored.

    plan.yaml                        the plan, every default written out
    environment.json                 versions, device, model and hash of its weights
    conditions/NAME.json             the same of a condition's own pipeline
    records/part-*.parquet           one a chunk: where it is, the chunk is measured
    ledger/, controls/, masks/       what goes beside the chunk's records (`records.SIDES`)
    pictures/*.png, maps/*.safetensors
    hashes/part-*.json               SHA-256 of the chunk's files and of the plan
    summary.json, report.html        made from the above, at any time

Every file is written under a temporary name and renamed, a chunk's records last. So a process may
be killed at any moment: what bears its final name is whole, and a chunk without records is measured
again.
"""

from __future__ import annotations

import io
import json
import logging
import os
import platform
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
from pydantic import ValidationError

from .files import sha256, write_file, write_text
from .plan import AuditPlan, explain
from .records import SIDES, part_path, read_part, side_path, table_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .measure import Chunk

logger = logging.getLogger(__name__)

_LOCK, _HOLDER = ".lock", ".holder.json"
_CHUNK_FOLDERS = ("records", *SIDES, "pictures", "maps", "hashes")


class AuditError(RuntimeError):
    """An audit cannot start or go on; what was measured before is kept."""


@contextmanager
def open_folder(plan: AuditPlan, folder: Path) -> Iterator[None]:
    """Holds the run folder for this process: made if it is new, checked if a run goes on.

    The lock is the kernel's (``flock``), so it ends with the process, however that ends.

    Raises:
        AuditError: another process holds the folder, it holds another plan or other files, or it
            cannot be written.
    """
    _check_plan(plan, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / _LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise AuditError(
            f"{folder} is being written by another run{_holder(folder)}. Wait until it has ended, "
            "or give another folder"
        ) from None
    except OSError as error:
        raise AuditError(f"the run folder {folder} cannot be written: {error}") from error
    try:
        _check_plan(plan, folder)  # it may have been begun while the lock was not ours
        try:
            _begin(plan, folder)
        except OSError as error:
            raise AuditError(f"the run folder {folder} cannot be written: {error}") from error
        yield
    finally:
        (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()


def _begin(plan: AuditPlan, folder: Path) -> None:
    for name in (".", *_CHUNK_FOLDERS, "conditions"):
        for left_over in (folder / name).glob(".*.tmp"):  # of a run that was killed
            left_over.unlink(missing_ok=True)
    holder = {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(folder / _HOLDER, json.dumps(holder) + "\n")
    if not (folder / "plan.yaml").exists():
        write_text(folder / "plan.yaml", plan.to_yaml())
    elif read_plan(folder).differences(plan):  # of which nothing was stored
        for path in (folder / "environment.json", *(folder / "conditions").glob("*.json")):
            path.unlink(missing_ok=True)
        write_text(folder / "plan.yaml", plan.to_yaml())
    (folder / "records").mkdir(exist_ok=True)
    (folder / "hashes").mkdir(exist_ok=True)


def _holder(folder: Path) -> str:
    """Who holds the folder, as far as it says so."""
    try:
        found = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return f" (process {found['pid']} on {found['host']}, since {found['since']})"
    except (OSError, ValueError, KeyError):
        return ""


def _check_plan(plan: AuditPlan, folder: Path) -> None:
    if (folder / "plan.yaml").exists():
        differences = read_plan(folder).differences(plan)
        if differences and _stored(folder):
            raise AuditError(
                f"{folder} holds an audit of another plan (setting: there, here): "
                f"{'; '.join(differences)}. Use another folder, or the same plan to continue"
            )
    elif folder.is_dir() and any(not _ours(path.name) for path in folder.iterdir()):
        raise AuditError(f"{folder} is not empty and holds no plan.yaml: give a new folder")


def _stored(folder: Path) -> bool:
    """Whether there is a file of any chunk, of one that was not finished too."""
    return any(any((folder / name).glob("*")) for name in _CHUNK_FOLDERS)


def _ours(name: str) -> bool:
    """Whether a run that was killed before it wrote its plan may have left this."""
    return name in (_LOCK, _HOLDER) or (name.startswith(".") and name.endswith(".tmp"))


def read_plan(folder: Path) -> AuditPlan:
    """The plan of a run folder.

    Raises:
        AuditError: there is none, or it cannot be read.
    """
    path = folder / "plan.yaml"
    if not path.is_file():
        raise AuditError(f"{folder} is no run folder: it has no plan.yaml")
    try:
        return AuditPlan.from_yaml(path)
    except ValidationError as error:
        raise AuditError(f"{path} is not a plan of this version: {explain(error)}") from error
    except ValueError as error:
        raise AuditError(
            f"{error}. The records are untouched: give the plan back what it said"
        ) from error


def finished(folder: Path, chunk: int) -> bool:
    """Whether a chunk's records are there.

    Raises:
        RecordError: they are there and damaged.
    """
    path = part_path(folder, chunk)
    if not path.exists():
        return False
    read_part(path)  # a damaged file must stop the run before hours are spent on the rest
    return True


def check_environment(folder: Path, found: dict[str, Any], condition: str | None = None) -> None:
    """Keeps what measures; of a run that goes on, compares it with what began it.

    Args:
        folder: the run folder.
        found: `environment.describe` and `environment.describe_pipeline` of the pipeline.
        condition: the condition that has this pipeline of its own; ``None`` for the plan's model.

    Raises:
        AuditError: the run was begun with other weights or another scheduler.
    """
    path = folder / ("environment.json" if condition is None else f"conditions/{condition}.json")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        begun = {"begun": datetime.now(UTC).isoformat(timespec="seconds"), **found}
        write_text(path, json.dumps(begun, indent=1) + "\n")
        return
    try:
        began = json.loads(path.read_text(encoding="utf-8"))
        before = {name: began[name] for name in ("weights_sha256", "scheduler_config", "versions")}
    except (ValueError, KeyError) as error:
        raise AuditError(
            f"{path} is damaged ({error}), so it cannot be told whether the same weights go on. "
            "The records are untouched: restore that file, or use another folder"
        ) from error
    of = "" if condition is None else f" of the condition {condition!r}"
    for name in ("weights_sha256", "scheduler_config"):
        if before[name] != found[name]:
            raise AuditError(
                f"{folder} was begun with another {name}{of}: expected {before[name]}, got "
                f"{found[name]}. Records of two models must not be mixed: use another folder"
            )
    if before["versions"] != found["versions"]:
        logger.warning(
            "%s was begun with other versions%s: %s, now %s",
            folder,
            of,
            before["versions"],
            found["versions"],
        )
    if began.get("source_sha256") != found.get("source_sha256"):
        logger.warning("the code%s has changed since %s was begun", of, folder)


def hashes_path(folder: Path, chunk: int) -> Path:
    """Where the hashes of a chunk's files are."""
    return folder / "hashes" / f"part-{chunk:05d}.json"


def plan_hash(folder: Path) -> str:
    """SHA-256 of ``plan.yaml`` as it stands."""
    return sha256((folder / "plan.yaml").read_bytes())


def store(folder: Path, index: int, chunk: Chunk, plan_sha256: str) -> None:
    """Writes all files of one chunk: pictures, maps, sides, hashes, and its records last.

    Raises:
        OSError: the disk is full or cannot be written; the chunk then has no records.
    """
    from safetensors.torch import save

    files: dict[Path, bytes] = {}
    for name, picture in chunk.pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        files[folder / "pictures" / f"{name}.png"] = buffer.getvalue()
    for name, maps in chunk.maps.items():
        files[folder / "maps" / f"{name}.safetensors"] = save(maps)
    for side, table in chunk.sides.items():
        files[side_path(folder, side, index)] = table_bytes(table)
    records = part_path(folder, index)
    files[records] = table_bytes(chunk.table)
    hashes = {path.relative_to(folder).as_posix(): sha256(data) for path, data in files.items()}
    text = json.dumps({"plan_sha256": plan_sha256, "files": hashes}, indent=1) + "\n"
    last = files.pop(records)
    records.unlink(missing_ok=True)  # of a chunk that is measured again: its hashes go first
    for path, data in {**files, hashes_path(folder, index): text.encode(), records: last}.items():
        path.parent.mkdir(exist_ok=True)
        write_file(path, data)
