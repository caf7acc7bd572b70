"""A second copy of a store's own metadata, from which ``psd cache repair`` puts it back.

    STORE/backup.json          samples.json and every zarr.json but those of instances, as they are

A damaged sample can be extracted again; a store that has lost what it was made with cannot. The
copy is written after the table of samples, so it may be one registration behind, and it carries a
checksum of its own (``seal``).
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pathsegdiff.errors import StoreError
from pathsegdiff.features.seal import sealed, unsealed
from pathsegdiff.features.store import (
    BACKUP_KEY,
    MARKS_FOLDER,
    SAMPLES_KEY,
    FeatureStore,
    checksum,
)
from pathsegdiff.files import put_bytes

#: Nothing else is ever put back: a key of a hostile store may lead elsewhere.
_KEY = re.compile(r"(?:[a-z0-9_]+/)?zarr\.json|samples\.json")
#: A copy above this is refused before it is read.
_MAX_BYTES = 1 << 27


def keep_copy(path: Path, keys: Iterable[str]) -> bool:
    """Write the copy, unless it is there already.

    Args:
        path: Of the store; its metadata are known to be whole.
        keys: Of the zarr.json files.

    Returns:
        Whether it was written.
    """
    names = sorted({*keys, SAMPLES_KEY})
    found = {key: (path / key).read_text("utf-8") for key in names if (path / key).exists()}
    content = sealed({"files": found}, indent=0)
    if _read(path / BACKUP_KEY) == content:
        return False
    put_bytes(path / BACKUP_KEY, content)
    return True


def put_back(path: Path) -> list[str]:
    """Put metadata files that are missing or damaged back from the copy; nobody else may write.

    What the table of samples vouches for is left alone; where the table itself is damaged, all is
    put back as it was when the copy was made.

    Returns:
        Keys of the files that were put back.

    Raises:
        StoreError: If a file is damaged and the copy of it too, or there is no copy.
    """
    kept = _files(_read(path / BACKUP_KEY))
    table = _read(path / SAMPLES_KEY)
    rows = _rows(table)
    accepted = {} if table is None else _accepted(table)
    listed = SAMPLES_KEY in (kept or {}) or any((path / MARKS_FOLDER).glob("*.json"))
    broken_table = accepted is None or (table is None and listed)
    if broken_table:
        accepted = _accepted(kept[SAMPLES_KEY]) if kept and SAMPLES_KEY in kept else None
        if accepted is None:
            raise _beyond_repair(path, SAMPLES_KEY)
    # Before the first sample is registered there is no table, and the copy alone speaks.
    accepted = accepted or {key: [checksum(content)] for key, content in (kept or {}).items()}
    wanted = {key: allowed for key, allowed in accepted.items() if key != SAMPLES_KEY}
    todo = {}
    for key, allowed in wanted.items():
        if checksum(_read(path / key)) in allowed:
            continue
        copies = [] if kept is None or key not in kept else [kept[key], _grown(kept[key], rows)]
        fitting = [copy for copy in copies if checksum(copy) in allowed]
        if not fitting:
            raise _beyond_repair(path, key)
        todo[key] = fitting[0]
    if broken_table and kept is not None:
        todo[SAMPLES_KEY] = kept[SAMPLES_KEY]
    # The group's own file comes last: without it this is no store, and is begun again.
    for key in sorted(todo, key=lambda key: key == "zarr.json"):
        put_bytes(path / key, todo[key])
    return sorted(todo)


def drop_surplus_marks(path: Path) -> int:
    """Take completion marks away that no row of the table belongs to; nobody else may write.

    Returns:
        How many.
    """
    rows = _rows(_read(path / SAMPLES_KEY))
    if rows is None:
        return 0
    surplus = [
        mark
        for mark in (path / MARKS_FOLDER).glob("*.json")
        if mark.stem.isdecimal() and int(mark.stem) >= rows
    ]
    for mark in surplus:
        mark.unlink()
    return len(surplus)


def copy_problem(store: FeatureStore) -> str | None:
    """What is wrong with a store's copy; None for a whole one."""
    size = store.size(BACKUP_KEY)
    if size is None:
        return "is missing"
    whole = size <= _MAX_BYTES and _files(store.get(BACKUP_KEY)) is not None
    return None if whole else "is damaged"


def _beyond_repair(path: Path, key: str) -> StoreError:
    return StoreError(
        f"{path}: {key} is missing or damaged, and so is its second copy in {BACKUP_KEY} (stores "
        "of earlier versions have none); delete the store and extract it again"
    )


def _read(file: Path) -> bytes | None:
    try:
        if file.stat().st_size > _MAX_BYTES:
            return None
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _files(content: bytes | None) -> dict[str, bytes] | None:
    """The copied files; None where the copy is missing or damaged."""
    try:
        values = unsealed(content or b"")["files"]
        return {_checked(key): text.encode("utf-8") for key, text in values.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _rows(table: bytes | None) -> int | None:
    """How many samples a table lists; None of a damaged one."""
    try:
        return len(unsealed(table or b"")["samples"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _grown(metadata: bytes, rows: int | None) -> bytes:
    """A copied zarr.json of an array, as it is once so many samples are registered."""
    try:
        values = json.loads(metadata)
        values["shape"][0] = rows
        return json.dumps(values, indent=2).encode()
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return metadata


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r:.60} is no metadata of a store")
    return key


def _accepted(table: bytes) -> dict[str, list[Any]] | None:
    """What the table of samples says that each zarr.json may be; None where it is damaged."""
    try:
        values = unsealed(table)["files"]
        return {
            _checked(key): [(int(size), int(crc)) for size, crc in allowed]
            for key, allowed in values.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
