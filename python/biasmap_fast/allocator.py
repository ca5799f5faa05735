"""The C library's allocator, for processes of our own: the command line and its workers."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Lets this process keep up to 1 GiB that it has freed, instead of asking for it again.

    glibc gives freed memory back at once, and a network's forward pass on a CPU then waits for the
    kernel to clear the same pages in every layer. Allocations
    above 32 MiB are not kept. Variables of the user's (``MALLOC_TRIM_THRESHOLD_`` and the like,
    ``GLIBC_TUNABLES``) have their way.

    Returns:
        Whether it was done: not where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, 2**30) and mallopt(_MMAP_THRESHOLD, 2**25))
