"""Files that are whole or not there, and their hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives a temporary path; what was written there is flushed and renamed at the end.

    Args:
        path: The file's final name; its folder must exist.

    Raises:
        OSError: The disk is full or cannot be written. Nothing is left then, and a file that had
            the name before is as it was.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "words.txt"
        >>> with writing(target) as partial:
        ...     _ = partial.write_text("doctor")
        >>> target.read_text()
        'doctor'
    """
    # The process id keeps two processes that write the same name apart.
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)  # so that the rename survives a power cut


def write_file(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all; see `writing`."""
    with writing(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all; see `writing`."""
    write_file(path, text.encode("utf-8"))


def sha256(data: bytes) -> str:
    """Returns the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal, without holding it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
