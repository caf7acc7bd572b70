"""Who works on which sample, where several processes extract into one store.

A claim is a lock on a file of the store. The system takes it back when its process ends, however it
ends, so the claim of a dead process is free at once and that of a live one never is. That holds on
one machine, and between machines where the file system passes locks on (NFS 4, most cluster file
systems).
"""

from pathlib import Path

from filelock import FileLock, Timeout

_FOLDER = ".claims"


class Claim:
    """The right to write one sample; of this process until ``release`` or its end.

    Args:
        path: Of the store.
        index: Of the sample.
    """

    def __init__(self, path: Path, index: int) -> None:
        self._file = path / _FOLDER / str(index)
        self._file.parent.mkdir(exist_ok=True)
        # Taken on one thread, given back on the one that writes.
        self._lock = FileLock(self._file, thread_local=False)

    def take(self) -> bool:
        """Whether it was free."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def release(self, *, finished: bool) -> None:
        """Give it back.

        Args:
            finished: Whether the sample is complete now: nobody needs its file any more. Whoever
                takes a claim looks for the sample's mark after that, so a file that is removed
                while others wait for it does no harm then; before, it could be taken twice.
        """
        if finished:
            self._file.unlink(missing_ok=True)
        self._lock.release()
