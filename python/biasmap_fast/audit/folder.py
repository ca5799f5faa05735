"""The run folder: who may write it, what it must hold before a run goes on, how chunks are stored.

    plan.yaml                        the plan, every default written out
    environment.json                 versions, device, model and hash of its weights
    conditions/NAME.json             the same for a condition with a pipeline of its own
    pictures/part-*.parquet          one per chunk: if all its files are there, it is measured
    measurements/, ledger/, masks/   the chunk's other tables (`records.TABLES`)
    pictures/*.png, maps/*.safetensors
    hashes/part-*.json               SHA-256 of the chunk's files and of the plan
    report.html and what goes with it, made from the above at any time

Every file is written under a temporary name and renamed, a chunk's part of ``pictures`` last. So a
process may be killed at any moment: what bears its final name is whole, and a chunk that lacks a
file is measured again.
"""

from __future__ import annotations

import io
import json
import logging
import os
import platform
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import filelock
from pydantic import ValidationError

from ..files import sha256, write_file, write_text
from .plan import AuditPlan, explain
from .records import TABLES, hashes_path, part_path, table_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from .chunk import Chunk

logger = logging.getLogger(__name__)

_LOCK, _HOLDER = ".lock", ".holder.json"
_CHUNK_FOLDERS = (*TABLES, "maps", "hashes")
# Chunks that wait to be written; when there are more, drawing waits for the disk.
_WAITING = 4
# So many chunks in a row of which nothing could be drawn are no accident.
_FAILED_IN_A_ROW = 3


class AuditError(RuntimeError):
    """An audit cannot start or go on; what was measured before is kept."""


@contextmanager
def open_folder(plan: AuditPlan, folder: Path) -> Iterator[None]:
    """Holds the run folder for this process: made if it is new, checked if a run goes on.

    The lock is the kernel's (``flock``), so it ends with the process, however that ends.
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
        _check_plan(plan, folder)  # another run may have begun it before the lock was held
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
    elif read_plan(folder).differences(plan):  # nothing was stored under the other plan
        for path in (folder / "environment.json", *(folder / "conditions").glob("*.json")):
            path.unlink(missing_ok=True)
        write_text(folder / "plan.yaml", plan.to_yaml())
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "hashes").mkdir(exist_ok=True)


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _check_plan(plan: AuditPlan, folder: Path) -> None:
    if (folder / "plan.yaml").exists():
        stored = any(any((folder / name).glob("*")) for name in _CHUNK_FOLDERS)
        differences = read_plan(folder).differences(plan)
        if differences and stored:
            raise AuditError(
                f"{folder} holds an audit of another plan (setting: there, here): "
                f"{'; '.join(differences)}. Use another folder, or the same plan to continue"
            )
    elif folder.is_dir() and any(not _may_be_left(path.name) for path in folder.iterdir()):
        raise AuditError(f"{folder} is not empty and holds no plan.yaml: give a new folder")


def _may_be_left(name: str) -> bool:
    # by a run that was killed before it wrote its plan
    return name in (_LOCK, _HOLDER) or (name.startswith(".") and name.endswith(".tmp"))


def read_plan(folder: Path) -> AuditPlan:
    """Reads the plan of a run folder."""
    path = folder / "plan.yaml"
    if not path.is_file():
        raise AuditError(f"{folder} is no run folder: it has no plan.yaml")
    if (folder / "records").is_dir():
        raise AuditError(
            f"{folder} was written by the first edition (records of schema 4): read it with "
            '`pip install "biasmap-fast==0.1.*"`, or start its audit anew in another folder'
        )
    try:
        return AuditPlan.from_yaml(path)
    except ValidationError as error:
        raise AuditError(f"{path} is not a plan of this version: {explain(error)}") from error
    except ValueError as error:
        raise AuditError(f"{error}. The records are untouched: restore the plan") from error


def check_environment(folder: Path, here: dict[str, Any], condition: str | None = None) -> None:
    """Keeps what measures; if a run goes on, compares it with what began the run.

    Args:
        folder: The run folder.
        here: `environment.describe` and `environment.describe_pipeline` of the pipeline.
        condition: The condition that has this pipeline to itself; ``None`` for the plan's model.
    """
    path = folder / ("environment.json" if condition is None else f"conditions/{condition}.json")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        begun = {"begun": datetime.now(UTC).isoformat(timespec="seconds"), **here}
        write_text(path, json.dumps(begun, indent=1) + "\n")
        return
    try:
        began = dict(json.loads(path.read_text(encoding="utf-8")))
        before = {name: began[name] for name in ("weights_sha256", "scheduler_config", "versions")}
    except (ValueError, KeyError, TypeError) as error:
        raise AuditError(
            f"{path} is damaged ({error}), so it cannot be told whether the same weights go on. "
            "The records are untouched: restore that file, or use another folder"
        ) from error
    of = "" if condition is None else f" of the condition {condition!r}"
    for name in ("weights_sha256", "scheduler_config"):
        if before[name] != here[name]:
            raise AuditError(
                f"{folder} was begun with another {name}{of}: expected {before[name]}, got "
                f"{here[name]}. Records of two models must not be mixed: use another folder"
            )
    if before["versions"] != here["versions"]:
        told = (folder, of, before["versions"], here["versions"])
        logger.warning("%s was begun with other versions%s: %s, now %s", *told)
    if began.get("source_sha256") != here.get("source_sha256"):
        logger.warning("the code%s has changed since %s was begun", of, folder)


def plan_hash(folder: Path) -> str:
    """Returns the SHA-256 of ``plan.yaml`` as it stands."""
    return sha256((folder / "plan.yaml").read_bytes())


def store(folder: Path, index: int, chunk: Chunk, plan_sha256: str) -> None:
    """Writes all files of a chunk: images, maps, tables, hashes, and its pictures table last."""
    from safetensors.torch import save

    files: dict[Path, bytes] = {}
    for name, image in chunk.images.items():
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        files[folder / "pictures" / f"{name}.png"] = buffer.getvalue()
    for name, maps in chunk.maps.items():
        files[folder / "maps" / f"{name}.safetensors"] = save(maps)
    for name, table in chunk.tables.items():
        files[part_path(folder, name, index)] = table_bytes(table)
    hashes = {path.relative_to(folder).as_posix(): sha256(data) for path, data in files.items()}
    text = json.dumps({"plan_sha256": plan_sha256, "files": hashes}, indent=1) + "\n"
    last = part_path(folder, "pictures", index)
    pictures = files.pop(last)
    last.unlink(missing_ok=True)  # of a chunk that is measured again: its hashes go first
    for path, data in {**files, hashes_path(folder, index): text.encode(), last: pictures}.items():
        path.parent.mkdir(exist_ok=True)
        write_file(path, data)


class Writer:
    """Stores chunks in one thread while the next ones are drawn, in the order they come.

    A chunk of which no picture could be drawn waits until another one could: if all of them fail
    there is something wrong with the run and not with the pictures, and nothing is recorded.

    Args:
        folder: The run folder.
        measured: Whether it holds measured chunks already.
    """

    def __init__(self, folder: Path, *, measured: bool) -> None:
        self._folder = folder
        self._plan_hash = plan_hash(folder)
        self._measured = measured
        self._failed: list[tuple[int, Chunk]] = []
        self._pool = ThreadPoolExecutor(1, "biasmap-writer")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._pool.shutdown(wait=True)  # what was handed over is whole and worth keeping

    def add(self, index: int, chunk: Chunk) -> None:
        """Hands one chunk over."""
        if chunk.raised:
            self._failed.append((index, chunk))
            if len(self._failed) >= _FAILED_IN_A_ROW:
                raise self._hopeless()
            return
        self._measured = True
        self._write_failed()
        self._write(index, chunk)

    def flush(self) -> None:
        """Writes everything that was handed over, and waits until it is on the disk."""
        if self._failed and not self._measured:
            raise self._hopeless()
        self._write_failed()
        self._wait(0)

    def _write_failed(self) -> None:
        for index, chunk in self._failed:
            self._write(index, chunk)
        self._failed.clear()

    def _write(self, index: int, chunk: Chunk) -> None:
        self._wait(_WAITING)
        self._waiting.append(self._pool.submit(store, self._folder, index, chunk, self._plan_hash))

    def _wait(self, left: int) -> None:
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > left):
            self._waiting.popleft().result()

    def _hopeless(self) -> AuditError:
        chunks = [index for index, _ in self._failed]
        row = self._failed[-1][1].tables["pictures"].slice(0, 1).to_pylist()[0]
        advice = (
            "one picture alone takes too much memory: use smaller pictures, another dtype or "
            "another device"
            if row["status"] == "out_of_memory"
            else "see the log for where it was raised"
        )
        return AuditError(
            f"every picture of chunks {chunks} failed, the last chunk's first with "
            f"{row['reason']!r}; none of them is recorded, what was measured before stays in "
            f"{self._folder}: {advice}, then start the same audit again"
        )
