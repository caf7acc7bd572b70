"""Unpack an archive that nobody vouches for (zip, tar, tar.gz).

Every name is checked before the first byte is written, sizes are bounded by what the archive
declares and counted again while writing, and files reach their place whole: an interruption leaves
nothing half-written, and unpacking again is harmless.
"""

import errno
import filecmp
import gzip
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, cast

from pathsegdiff.errors import FetchError
from pathsegdiff.fetch.download import STAGING, check_room, one_line

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_ENTRIES = 200_000
#: An archive may grow to so many bytes, and to so many times its own size ...
MAX_BYTES = 50 * 10**9
MAX_RATIO = 200
#: ... which counts only above this: a few empty masks shrink further than that.
ALWAYS_ALLOWED = 64 << 20
_TAR_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_BLOCK = 1 << 20
#: Headers of an archive are never that long; a longer one would be read into memory.
_MAX_READ = 4 << 20
#: What macOS adds to an archive for itself.
_JUNK = "__MACOSX"


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A file of an archive: its place, bytes that it declares, and how to open it."""

    path: PurePosixPath
    size: int
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """How many files were put in place, and how many were there already."""

    written: int
    there: int


def unpack(
    archive: Path,
    folder: Path,
    work: Path,
    *,
    keep: Collection[str] = (),
    on_files: Callable[[int, int], None] | None = None,
) -> Unpacked:
    """Unpack an archive below a folder.

    Args:
        archive: Its name ends in one of ``ARCHIVE_SUFFIXES``.
        folder: Where the files go.
        work: For the files on their way; removed at the end. On the same disk as ``folder``.
        keep: Where everything lies in one folder of the archive, that folder is left out of the
            paths unless it is one of these.
        on_files: Called with (done, total).

    Raises:
        FetchError: If the archive is damaged or hostile (names that leave the folder, links,
            devices, too many entries, too many bytes), the disk is too small, or a file with
            other content stands in the way. Nothing is then put in place.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with _damage_in_one_line(archive), _opened(archive) as entries:
            entries = _without_top(entries, keep)
            check_room(folder, sum(entry.size for entry in entries))
            for done, entry in enumerate(entries, 1):
                _write(archive, entry, work / entry.path)
                if on_files is not None:
                    on_files(done, len(entries))
        return _put_in_place(work, folder, [entry.path for entry in entries])
    finally:
        shutil.rmtree(work, ignore_errors=True)


def safe_path(name: str, archive: Path) -> PurePosixPath | None:
    """Where an entry goes, relative to the folder; None for the folder itself.

    Raises:
        FetchError: If the name could lead anywhere else.
    """
    plain = re.sub(r"\A(\./)+", "", name).removesuffix("/")
    if plain in ("", ".") and not name.startswith("/"):
        return None
    parts = plain.split("/")
    if (
        not name.isprintable()
        or "\\" in name
        or re.match(r"[A-Za-z]:", plain)
        or any(part in ("", ".", "..") for part in parts)
        or parts[0].casefold() == STAGING
    ):
        raise FetchError(
            f"{one_line(archive)}: it holds {one_line(name)!r}, a name that could lead out of the "
            "folder; nothing was unpacked"
        )
    return PurePosixPath(*parts)


@contextmanager
def _opened(archive: Path) -> Iterator[list[_Entry]]:
    name = archive.name.lower()
    if name.endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            yield _checked(archive, _zip_entries(archive, file))
    elif name.endswith((".tar.gz", ".tgz")):
        with gzip.open(archive) as inner, _opened_tar(cast(IO[bytes], inner)) as tar:
            yield _checked(archive, _tar_entries(archive, tar))
    elif name.endswith(".tar"):
        with archive.open("rb") as outer, _opened_tar(outer) as tar:
            yield _checked(archive, _tar_entries(archive, tar))
    else:
        raise FetchError(
            f"{one_line(archive)} must end in one of {', '.join(ARCHIVE_SUFFIXES)} to be unpacked"
        )


def _opened_tar(plain: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=cast(IO[bytes], _ShortReads(plain)), mode="r:")


class _ShortReads:
    """A file of which nobody reads much at once: tarfile takes headers of any declared length."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= _MAX_READ:
            raise tarfile.ReadError(f"a header of {count} bytes")
        return self._file.read(count)


def _zip_entries(archive: Path, file: zipfile.ZipFile) -> Iterator[_Entry | None]:
    for info in file.infolist():
        # ``filename`` ends at a NUL, ``orig_filename`` does not
        path = safe_path(info.orig_filename, archive)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _no_file(archive, info.filename)
        if info.flag_bits & 1:
            raise FetchError(f"{one_line(archive)} is encrypted; unpack it by hand")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FetchError(
                f"{one_line(archive)}: {one_line(info.filename)!r} is compressed in a way that is "
                "not supported; unpack it by hand"
            )
        if path is None or info.is_dir() or kind == stat.S_IFDIR:
            yield None
        else:
            yield _Entry(path=path, size=info.file_size, open=partial(file.open, info))


def _tar_entries(archive: Path, tar: tarfile.TarFile) -> Iterator[_Entry | None]:
    for member in tar:
        path = safe_path(member.name, archive)
        if member.isdir():
            yield None
        elif path is None or member.issparse() or member.type not in _TAR_FILES:
            raise _no_file(archive, member.name)
        else:
            yield _Entry(path=path, size=member.size, open=partial(_open_member, tar, member))


def _open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None  # a plain file
    return stream


def _no_file(archive: Path, name: str) -> FetchError:
    return FetchError(
        f"{one_line(archive)}: {one_line(name)!r} is a link or a device, not a file or a folder; "
        "nothing was unpacked"
    )


def _checked(archive: Path, found: Iterator[_Entry | None]) -> list[_Entry]:
    """The files, once number, sizes and names are known to be harmless; folders are None."""
    limit = _limit(archive)
    entries: list[_Entry] = []
    count = total = 0
    for entry in found:
        count += 1
        if count > MAX_ENTRIES:
            raise FetchError(
                f"{one_line(archive)} has more than {MAX_ENTRIES:,} entries; nothing was unpacked"
            )
        if entry is None or entry.path.parts[0] == _JUNK:
            continue
        total += entry.size
        if total > limit:
            raise _too_large(archive, limit)
        entries.append(entry)
    # Case is folded: on some systems two such names are one file.
    files = {str(entry.path).casefold() for entry in entries}
    folders = {str(above).casefold() for entry in entries for above in entry.path.parents}
    if len(files) < len(entries) or files & folders:
        raise FetchError(
            f"{one_line(archive)} holds two entries of the same name; nothing was unpacked"
        )
    if not entries:
        raise FetchError(f"{one_line(archive)} holds no files")
    return entries


def _limit(archive: Path) -> int:
    return min(MAX_BYTES, max(ALWAYS_ALLOWED, MAX_RATIO * archive.stat().st_size))


def _too_large(archive: Path, limit: int) -> FetchError:
    return FetchError(
        f"{one_line(archive)} would unpack to more than {limit:,} bytes, far more than its size "
        "warrants; nothing was unpacked"
    )


def _without_top(entries: list[_Entry], keep: Collection[str]) -> list[_Entry]:
    tops = {entry.path.parts[0] for entry in entries}
    if len(tops) != 1 or tops & set(keep) or any(len(entry.path.parts) == 1 for entry in entries):
        return entries
    short = [PurePosixPath(*entry.path.parts[1:]) for entry in entries]
    if any(path.parts[0].casefold() == STAGING for path in short):
        return entries
    return [
        _Entry(path=path, size=entry.size, open=entry.open)
        for path, entry in zip(short, entries, strict=True)
    ]


def _write(archive: Path, entry: _Entry, target: Path) -> None:
    """Write one file, and no byte more than it declares."""
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with entry.open() as source, target.open("xb") as file:
        while block := source.read(_BLOCK):
            written += len(block)
            if written > entry.size:
                raise _too_large(archive, entry.size)
            file.write(block)
    if written != entry.size:
        raise FetchError(
            f"{one_line(archive)} is damaged: {entry.path} has {written:,} of {entry.size:,} "
            "bytes; remove it and run the same command again"
        )


def _put_in_place(work: Path, folder: Path, paths: list[PurePosixPath]) -> Unpacked:
    """Move whole files, after a look that none of them would overwrite anything."""
    moves = []
    for path in paths:
        target = folder / path
        if target.is_file():
            if not filecmp.cmp(work / path, target, shallow=False):
                raise _in_the_way(target)
            continue
        if target.exists() or target.is_symlink() or _file_above(folder, path):
            raise _in_the_way(target)
        moves.append(path)
    for path in moves:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        (work / path).replace(target)
    return Unpacked(written=len(moves), there=len(paths) - len(moves))


def _file_above(folder: Path, path: PurePosixPath) -> bool:
    places = [folder / above for above in path.parents]
    return any((place.exists() or place.is_symlink()) and not place.is_dir() for place in places)


def _in_the_way(target: Path) -> FetchError:
    return FetchError(
        f"{one_line(target)} is there with other content than in the archive; move it away and "
        "run the same command again. Nothing was unpacked"
    )


@contextmanager
def _damage_in_one_line(archive: Path) -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        gzip.BadGzipFile,
        zlib.error,
        struct.error,
        EOFError,
        NotImplementedError,
        LookupError,
        ValueError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise _damaged(archive, error) from None
    except OSError as error:
        # A place before the file's beginning, as a damaged index can have it.
        if error.errno == errno.EINVAL:
            raise _damaged(archive, error) from None
        raise


def _damaged(archive: Path, error: Exception) -> FetchError:
    return FetchError(
        f"{one_line(archive)} is damaged, or no archive ({one_line(error, 100)}); remove it "
        "and run the same command again"
    )
