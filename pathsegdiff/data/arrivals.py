"""What the files of a data set were when they arrived, where its manifest does not know.

``.fetch/hashes.json`` in the data root: path of the manifest -> SHA-256 of the file.
"""

import json
import re
from pathlib import Path

from pathsegdiff.data.image import shown
from pathsegdiff.errors import DataError
from pathsegdiff.fetch.download import STAGING
from pathsegdiff.files import file_sha256, replace_file

_FILE = "hashes.json"
_SHA256 = re.compile("[0-9a-f]{64}")
_MAX_BYTES = 256 << 20


def read_arrivals(root: Path) -> dict[str, str]:
    """Path of the manifest -> SHA-256, of the files that a command fetched into a data root.

    Raises:
        DataError: If the record is damaged.
    """
    file = root / STAGING / _FILE
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too large")
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(
            isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in found.values()
        ):
            raise ValueError("it holds no hashes")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{shown(file)} is damaged ({shown(error)[:80]}); remove it, and what has been altered "
            "since the files came is not known"
        ) from None
    return found


def note_arrivals(root: Path, files: dict[str, Path]) -> None:
    """Record files that have just come; what is known of others stays.

    Args:
        root: Data root.
        files: Path of the manifest -> file.

    Raises:
        DataError: If the record is damaged.
    """
    known = read_arrivals(root) | {path: file_sha256(file) for path, file in files.items()}
    text = json.dumps(known, indent=1, sort_keys=True) + "\n"
    replace_file(root / STAGING / _FILE, lambda beside: beside.write_text(text, "utf-8"))


def verify_arrival(arrivals: dict[str, str], path: str, file: Path) -> None:
    """Hold a file against what it was when it came; one that was not fetched is let pass.

    Raises:
        DataError: If it differs, or cannot be read.
    """
    wanted = arrivals.get(path)
    if wanted is None:
        return
    try:
        found = file_sha256(file)
    except OSError as error:
        raise DataError(f"{shown(file)} cannot be read: {error.strerror or error}") from None
    if found != wanted:
        raise DataError(
            f"{shown(file)} is not the file that was fetched: SHA-256 {found[:12]}, it came with "
            f"{wanted[:12]}; delete it and fetch again"
        )
