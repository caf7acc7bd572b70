"""A second copy of a store's own metadata, from which ``psd cache repair`` puts it back.

    STORE/backup.json          samples.json and every zarr.json but those of instances, as they are

A damaged sample can be extracted again; a store that has lost what it was made with cannot. The
copy is written after the table of samples, so it may be one registration behind, and it carries a
checksum of its own (``seal``).
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pathsegdiff.errors import MALFORMED, StoreError
from pathsegdiff.features.seal import sealed, unsealed
from pathsegdiff.features.store import (
    BACKUP_KEY,
    MARKS_FOLDER,
    MAX_TABLE_BYTES,
    SAMPLES_KEY,
    Checksum,
    FeatureStore,
    accepted_checksums,
    checksum,
    resized,
)
from pathsegdiff.files import put_bytes

#: Nothing else is ever put back: a key of a hostile store may lead elsewhere.
_KEY = re.compile(r"(?:[a-z0-9_]+/)?zarr\.json|samples\.json")
#: A copy above this is refused before it is read. JSON within JSON has at most twice the bytes (the
#: table is ASCII, quotes and line breaks take a second one); the zarr.json files are small.
_MAX_BYTES = 3 * MAX_TABLE_BYTES
#: A copy may be behind while another process registers samples.
_LOOKS, _BETWEEN_LOOKS_SECONDS = 3, 0.5


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


def put_back(path: Path) -> tuple[list[str], int]:
    """Put metadata files that are missing or damaged back from the copy; nobody else may write.

    What the table of samples vouches for is left alone; where the table itself is damaged, all is
    put back as it was when the copy was made. Completion marks that no row of the table belongs to
    are taken away.

    Returns:
        Keys of the files that were put back, and how many marks were taken away.

    Raises:
        StoreError: If a file is damaged and the copy of it too, or there is no copy.
    """
    kept = _files(_read(path / BACKUP_KEY)) or {}
    content, marks = _read(path / SAMPLES_KEY), list((path / MARKS_FOLDER).glob("*.json"))
    table, todo = _table(content), {}
    if table is None and (content is not None or SAMPLES_KEY in kept or marks):
        table = _table(kept.get(SAMPLES_KEY))
        if table is None:
            raise _beyond_repair(path, SAMPLES_KEY)
        todo[SAMPLES_KEY] = kept[SAMPLES_KEY]
    # Before the first sample is registered there is no table, and the copy alone speaks.
    accepted: Mapping[str, Sequence[Checksum | None]]
    rows, accepted = table or (0, {})
    accepted = accepted or {key: [checksum(copy)] for key, copy in kept.items()}
    for key, allowed in accepted.items():
        if key == SAMPLES_KEY or checksum(_read(path / key)) in allowed:
            continue
        copies = [kept[key], _resized(kept[key], rows)] if key in kept else []
        fitting = [copy for copy in copies if checksum(copy) in allowed]
        if not fitting:
            raise _beyond_repair(path, key)
        todo[key] = fitting[0]
    # The group's own file comes last: without it this is no store.
    for key in sorted(todo, key=lambda key: key == "zarr.json"):
        put_bytes(path / key, todo[key])
    surplus = [mark for mark in marks if mark.stem.isdecimal() and int(mark.stem) >= rows]
    for mark in surplus:
        mark.unlink()
    return sorted(todo), len(surplus)


def copy_problem(store: FeatureStore) -> str | None:
    """What is wrong with a store's copy; None for a whole one, be it older than the table."""
    if store.size(BACKUP_KEY) is None:
        return "is missing"
    return "is damaged" if _kept(store) is None else None


def copy_is_older(store: FeatureStore) -> bool:
    """Whether a whole copy is older than the metadata, as after a registration that was broken off.

    A writer renews the copy a moment after the table; one that stays behind was left so. The next
    extraction renews it, and ``put_back`` mends with it all the same.
    """
    for _ in range(_LOOKS):
        kept = _kept(store)
        if kept is None or kept == {key: store.get(key) for key in kept}:
            return False
        time.sleep(_BETWEEN_LOOKS_SECONDS)
    return True


def _kept(store: FeatureStore) -> dict[str, bytes] | None:
    size = store.size(BACKUP_KEY)
    return None if size is None or size > _MAX_BYTES else _files(store.get(BACKUP_KEY))


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
    except MALFORMED:
        return None


def _table(content: bytes | None) -> tuple[int, dict[str, list[Checksum]]] | None:
    """How many samples a table lists, and what each zarr.json may be; None of a damaged one."""
    try:
        values = unsealed(content or b"")
        accepted = accepted_checksums(values)
        return len(values["samples"]), {_checked(key): accepted[key] for key in accepted}
    except MALFORMED:
        return None


def _resized(metadata: bytes, rows: int) -> bytes:
    """The copy is one registration behind where the arrays have grown since."""
    try:
        return resized(metadata, rows)
    except MALFORMED:  # of a group
        return metadata


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r:.60} is no metadata of a store")
    return key
