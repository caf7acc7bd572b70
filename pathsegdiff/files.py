"""Whole files: replaced at once or not at all, and their hashes (standard library only)."""

import gzip
import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside ``path``, then put it in its place in one move.

    A reader sees the old or the new content, never a part of it; after an error the old file is
    there and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write(beside)
        # The content must be on the disk before the name points at it.
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def put_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and have it on the disk."""
    replace_file(path, lambda file: file.write_bytes(content))


def write_archive(file: Path, contents: Mapping[str, Path | bytes]) -> int:
    """Write files into a .tar.gz that depends on their names and bytes alone.

    Args:
        file: Archive; replaced as a whole.
        contents: Name in the archive -> file or bytes.

    Returns:
        Its size in bytes.
    """

    def write(beside: Path) -> None:
        with (
            beside.open("wb") as raw,
            gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
        ):
            for name, content in contents.items():
                data = content if isinstance(content, bytes) else content.read_bytes()
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    replace_file(file, write)
    return file.stat().st_size


def sync(path: Path) -> None:
    """Have the system put a file's content, or a folder's list of names, on the disk now."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows opens no folders, and needs this of none
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_below(root: Path, files: Iterable[Path]) -> None:
    """``sync`` files, then the folders that lead to them from ``root``, the deepest first."""
    folders = set()
    for file in files:
        sync(file)
        folders |= {parent for parent in file.parents if parent.is_relative_to(root)}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        sync(folder)


def as_file_name(name: str) -> str:
    """A name of any characters as one that every file system holds and that leads nowhere."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def refuse_packed(path: Path) -> None:
    """Refuse a zip archive that unpacks to more than it is, before torch.load takes memory for it.

    torch.save never compresses. What is no zip archive is left to whoever reads it.

    Raises:
        ValueError: If an entry is compressed, or they hold more bytes together than the file.
        OSError: If it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError):
        return
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("it claims to hold more bytes than it has")


def file_sha256(path: Path) -> str:
    """SHA-256 (64 hex digits) of a file as it is; OSError if it cannot be read."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
