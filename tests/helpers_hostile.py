"""Stores and files made to deceive: changed, and every checksum made to fit again."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pathsegdiff.features.seal import sealed, unsealed


def reseal(store: Path) -> None:
    """Make the checksums of a store's table and marks those of the files as they are."""
    table = _values(store / "samples.json")
    for key in table["files"]:
        table["files"][key] = [_checksum(store / key)]
    (store / "samples.json").write_bytes(sealed(table, indent=0))
    for mark in (store / "marks").glob("*.json"):
        values = _values(mark)
        for key in values["files"]:
            values["files"][key] = _checksum(store / key)
        mark.write_bytes(sealed(values, indent=1))


def change_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def change_sealed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file that carries its checksum."""
    values = _values(file)
    change(values)
    file.write_bytes(sealed(values, indent=1))


def _values(file: Path) -> dict[str, Any]:
    values = unsealed(file.read_bytes())
    values.pop("crc32", None)
    return values


def _checksum(file: Path) -> list[int]:
    content = file.read_bytes()
    return [len(content), zlib.crc32(content)]
