"""One process at a time in a folder (filelock only); the system gives a lock back when its process
ends, however it ends."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pathsegdiff.errors import PathSegDiffError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def alone_in(folder: Path, busy: PathSegDiffError, *, seconds: float = 0) -> Iterator[None]:
    """Hold the folder's lock inside the block.

    Args:
        folder: Exists.
        busy: Raised where another process has it.
        seconds: To wait for it.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise busy from None
    try:
        yield
    finally:
        lock.release()
