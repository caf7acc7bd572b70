"""Files after a journey: a compressed tar, and the same cut into parts of bounded size.

    NAME.json                        bytes and sha256 of every part; written last
    NAME-00.bin, NAME-01.bin, ...    a .tar.gz, cut

Nothing that comes back is trusted: hashes are compared before anything is read, only plain files
with plain names come out of a tar, and no more bytes than a limit.
"""

import gzip
import hashlib
import io
import json
import re
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import IO, Any

from pathsegdiff.data.image import shown
from pathsegdiff.errors import DataError
from pathsegdiff.files import replace_file

_KIND = "pathsegdiff parts 1"
#: Relative, no hidden or parent folders, nothing that a file system might read otherwise.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}){0,3}")
_PLAIN_FILE = (tarfile.REGTYPE, tarfile.AREGTYPE)
#: More would be no archive that this program made; it also bounds what a gzip can swell to.
_MOST_SWELLING, _MOST_BYTES, _MOST_PARTS = 16, 4 << 30, 100
_MAX_INDEX_BYTES = 1 << 20
_CHUNK = 1 << 20


def read_archive(stream: IO[bytes], size: int, folder: Path, where: str) -> None:
    """Unpack a .tar.gz into a folder that is there.

    Args:
        stream: The archive.
        size: Its bytes.
        folder: Where to; nothing is written outside it.
        where: Names the archive in messages.

    Raises:
        DataError: If it is damaged, or holds a link, a device, a name that leads elsewhere, or far
            more than its size allows.
    """
    limit = min(_MOST_BYTES, _MOST_SWELLING * size + _CHUNK)
    try:
        with gzip.GzipFile(fileobj=stream) as packed:
            bounded = _Bounded(packed, limit, where)
            # Read as a stream: never back and forth, so that the bound holds.
            with tarfile.open(fileobj=bounded, mode="r|") as archive:  # type: ignore[call-overload]
                for member in archive:
                    _take(archive, member, folder, where)
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        reason = shown(error)[:100] or type(error).__name__
        raise DataError(
            f"{where} cannot be unpacked ({reason}); it is damaged or cut off"
        ) from None


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, where: str) -> None:
    if not _NAME.fullmatch(member.name):
        raise DataError(f"{where}: it holds {shown(member.name)!r:.80}, no plain file name")
    if member.type not in _PLAIN_FILE or member.issparse():
        raise DataError(f"{where}: {member.name} is a link or a device; only plain files travel")
    target = folder / member.name
    content = archive.extractfile(member)
    assert content is not None  # of a plain file it is there
    target.parent.mkdir(parents=True, exist_ok=True)
    # "x": a name that comes twice is refused.
    with target.open("xb") as file:
        shutil.copyfileobj(content, file, _CHUNK)
    if target.stat().st_size != member.size:
        raise DataError(f"{where}: {member.name} is cut off")


class _Bounded:
    """A stream that ends with an error once it has given more than a limit."""

    def __init__(self, stream: io.BufferedIOBase, limit: int, where: str) -> None:
        self._stream, self._left, self._where = stream, limit, where

    def read(self, count: int) -> bytes:
        data = self._stream.read(count)
        self._left -= len(data)
        if self._left < 0:
            raise DataError(f"{self._where}: it unpacks to far more than its size; not ours")
        return data


def write_parts(archive: Path, out: Path, name: str, *, part_bytes: int, max_total: int) -> int:
    """Cut a file into parts with an index.

    Args:
        archive: File to cut.
        out: Folder of the parts; older ones of that name are removed.
        name: First part of their names.
        part_bytes: Most of a part.
        max_total: Most of all parts.

    Returns:
        The number of parts.

    Raises:
        DataError: If the file is larger than ``max_total``.
    """
    size = archive.stat().st_size
    if size > max_total:
        raise DataError(
            f"{name}: {size / 2**20:.1f} MiB do not travel, the limit is {max_total / 2**20:.1f} "
            "MiB; a smaller model does"
        )
    out.mkdir(parents=True, exist_ok=True)
    for old in (out / f"{name}.json", *sorted(out.glob(f"{name}-[0-9][0-9].bin"))):
        old.unlink(missing_ok=True)
    parts: list[dict[str, Any]] = []
    with archive.open("rb") as stream:
        while piece := stream.read(part_bytes):
            file = f"{name}-{len(parts):02d}.bin"
            (out / file).write_bytes(piece)
            parts.append(
                {"file": file, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()}
            )
    text = json.dumps({"kind": _KIND, "bytes": size, "parts": parts}, indent=2) + "\n"
    replace_file(out / f"{name}.json", lambda file: file.write_text(text, "utf-8"))
    return len(parts)


def has_parts(folder: Path, name: str) -> bool:
    """Whether a folder holds the index of such parts."""
    return (folder / f"{name}.json").is_file()


def read_parts(folder: Path, name: str) -> bytes:
    """Join parts, after comparing each with the index.

    Raises:
        DataError: If the index or a part is missing or damaged.
    """
    pieces = []
    for entry in _part_entries(folder / f"{name}.json", name):
        file = folder / entry["file"]
        try:
            size = file.stat().st_size
            piece = file.read_bytes() if size == entry["bytes"] else b""
        except OSError:
            raise DataError(f"{file} is missing; bring all parts that {name}.json names") from None
        if size != entry["bytes"] or hashlib.sha256(piece).hexdigest() != entry["sha256"]:
            raise DataError(f"{file} is not the file that {name}.json describes; bring it again")
        pieces.append(piece)
    return b"".join(pieces)


def _part_entries(index: Path, name: str) -> list[dict[str, Any]]:
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise DataError(f"{index} is too large to be an index of parts")
        values = json.loads(index.read_text(encoding="utf-8"))
    except OSError:
        raise DataError(f"{index} is missing; give the folder with all parts") from None
    except (ValueError, RecursionError):
        raise DataError(f"{index} is no valid JSON; bring it again") from None
    entries = values.get("parts") if isinstance(values, dict) else None
    if (
        not isinstance(entries, list)
        or values.get("kind") != _KIND
        or not 1 <= len(entries) <= _MOST_PARTS
        or not all(_is_part(entry, f"{name}-{i:02d}.bin") for i, entry in enumerate(entries))
        or sum(entry["bytes"] for entry in entries) > _MOST_BYTES
    ):
        raise DataError(f"{index} is no index of parts that this version wrote; bring it again")
    return entries


def _is_part(entry: Any, file: str) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("file") == file
        and type(entry.get("bytes")) is int
        and entry["bytes"] > 0
        and isinstance(entry.get("sha256"), str)
    )
