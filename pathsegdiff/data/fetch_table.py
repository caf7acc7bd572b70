"""The ``[fetch]`` table of a manifest: where a command can get the files from.

kind = "archive"   url, md5 or sha256, bytes (optional): unpacked into the data root
kind = "drive"     folder, subfolders, bytes (optional): the manifest's files of a Google Drive
                   folder; subfolders name the ones that hold them
"""

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from pathsegdiff.data.image import shown
from pathsegdiff.errors import DataError, FetchError
from pathsegdiff.fetch.archives import ARCHIVE_SUFFIXES
from pathsegdiff.fetch.download import Remote, check_drive_id, check_url

_KEYS = {
    "archive": ("kind", "url", "md5", "sha256", "bytes"),
    "drive": ("kind", "folder", "subfolders", "bytes"),
}
_DIGITS = {"md5": 32, "sha256": 64}
_MAX_BYTES = 1 << 50
_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._-]{0,127}")
_ARCHIVE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class FetchTable:
    """Where the files of a data set can be got from.

    Attributes:
        kind: "archive" or "drive".
        url: Of the archive.
        md5, sha256: Of the archive, in hex digits; one of them is "".
        folder: Id of the Google Drive folder.
        subfolders: Names of the folders that hold the manifest's files.
        size: Bytes of the archive, or about that many of all files; None where it is not known.
    """

    kind: str
    url: str = ""
    md5: str = ""
    sha256: str = ""
    folder: str = ""
    subfolders: tuple[str, ...] = ()
    size: int | None = None

    @property
    def remote(self) -> Remote:
        """The archive."""
        return Remote(url=self.url, md5=self.md5, sha256=self.sha256, size=self.size)

    @property
    def file_name(self) -> str:
        """Of the archive, without folders."""
        return _file_name(self.url)

    @classmethod
    def from_dict(cls, values: Any) -> "FetchTable":
        """Read the table.

        Raises:
            DataError: If a field is missing, unknown, or has a value it cannot have.
        """
        if not isinstance(values, dict) or values.get("kind") not in list(_KEYS):
            raise DataError(f"fetch must be a table whose kind is one of {', '.join(_KEYS)}")
        kind = values["kind"]
        for key in values:
            if key not in _KEYS[kind]:
                raise DataError(
                    f"fetch of kind {kind} has an unknown {shown(key)!r}; known: "
                    f"{', '.join(_KEYS[kind])}"
                )
        size = values.get("bytes")
        if size is not None and (type(size) is not int or not 0 < size < _MAX_BYTES):
            raise DataError(f"fetch.bytes must be a whole number above 0, got {shown(size)}")
        try:
            if kind == "archive":
                url, digits = _read_archive(values)
                return cls(kind=kind, size=size, url=url, **digits)
            folder = check_drive_id(values.get("folder"))
        except FetchError as error:
            raise DataError(f"fetch.{error}") from None
        return cls(kind=kind, size=size, folder=folder, subfolders=_read_subfolders(values))

    def check_paths(self, paths: list[str]) -> None:
        """Refuse a table that could not bring all files.

        Raises:
            DataError: If a path lies in none of the subfolders.
        """
        for path in paths:
            if self.kind == "drive" and path.split("/")[0] not in self.subfolders:
                raise DataError(
                    f"fetch.subfolders ({', '.join(self.subfolders)}) must hold every file, "
                    f"not {shown(path)}"
                )


def _read_archive(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The address, and the one hash by its name."""
    url = check_url(values.get("url"))
    name = _file_name(url)
    if not _ARCHIVE.fullmatch(name) or not name.lower().endswith(ARCHIVE_SUFFIXES):
        raise DataError(
            f"fetch.url must end in a file name with {', '.join(ARCHIVE_SUFFIXES)}, got {url!r}"
        )
    given = [kind for kind in _DIGITS if kind in values]
    if len(given) != 1:
        raise DataError("fetch of kind archive needs md5 or sha256, and not both")
    digits = values[given[0]]
    length = _DIGITS[given[0]]
    if not isinstance(digits, str) or not re.fullmatch(f"[0-9a-f]{{{length}}}", digits):
        raise DataError(
            f"fetch.{given[0]} must be {length} hex digits in lower case, got {shown(digits)!r}"
        )
    return url, {given[0]: digits}


def _read_subfolders(values: dict[str, Any]) -> tuple[str, ...]:
    names = values.get("subfolders")
    if (
        not isinstance(names, list)
        or not 0 < len(names) <= 100
        or not all(isinstance(name, str) and _FOLDER.fullmatch(name) for name in names)
    ):
        raise DataError("fetch.subfolders must be a list of names of folders")
    return tuple(names)


def _file_name(url: str) -> str:
    return unquote(urlsplit(url).path).rpartition("/")[2]
