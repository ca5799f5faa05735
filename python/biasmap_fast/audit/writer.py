"""Writing chunks to the run folder while the next ones are drawn."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from .folder import AuditError, plan_hash, store

if TYPE_CHECKING:
    from types import TracebackType

    from .measure import Chunk

# Chunks that wait to be written; when there are more, drawing waits for the disk.
_WAITING = 4
# So many chunks in a row of which nothing could be drawn are no accident.
_FAILED_IN_A_ROW = 3


class Writer:
    """Stores chunks in one thread, in the order they come; a failed write fails the run.

    A chunk of which no picture could be drawn waits until another one could: if all of them fail
    there is something wrong with the run and not with the pictures, and nothing is recorded.

    Args:
        folder: the run folder.
        measured: whether it holds measured chunks already.
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
        """Hands one chunk over.

        Raises:
            AuditError: too many chunks in a row of which nothing could be drawn.
            OSError: an earlier chunk could not be written.
        """
        if chunk.raised:
            self._failed.append((index, chunk))
            if len(self._failed) >= _FAILED_IN_A_ROW:
                raise self._hopeless()
            return
        self._measured = True
        self._write_failed()
        self._write(index, chunk)

    def flush(self) -> None:
        """Writes everything that was handed over, and waits until it is on the disk.

        Raises:
            AuditError: nothing could be drawn so far.
            OSError: a chunk could not be written.
        """
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
        """Waits until no more than so many are unwritten; raises what writing raised."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > left):
            self._waiting.popleft().result()

    def _hopeless(self) -> AuditError:
        chunks = [index for index, _ in self._failed]
        row = self._failed[-1][1].table.slice(0, 1).to_pylist()[0]
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
