"""One sample of a level as the bytes of a Zarr v3 shard, written and read in one pass.

zarr itself spends about half a millisecond of Python on each chunk and copies it several times,
beside a network that wants the processor. The format is simple and fixed (Zarr v3 specification,
codec ``sharding_indexed`` 1.0): the chunks one after the other in C order, each with its CRC-32C,
then an index of (offset, bytes) with a CRC-32C of its own. The tests hold both directions against
zarr's.
"""

import math
import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

_CHECKSUM_BYTES = 4
#: What a level's array must be coded with to be read here.
_CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]
#: Positioned reads into memory that is there; without them (Windows) zarr reads.
_CAN_READ = hasattr(os, "preadv") and sys.byteorder == "little"


def encode_shard(values: np.ndarray, chunk: tuple[int, ...]) -> bytearray:
    """The shard that holds one row of an array.

    Args:
        values: (C, M, N) numbers of the row, in the array's dtype.
        chunk: (c, m, n) of a chunk; each divides the shape.

    Raises:
        ValueError: If the chunks do not tile the shape.
    """
    if values.ndim != len(chunk) or any(n % c for n, c in zip(values.shape, chunk, strict=True)):
        raise ValueError(f"chunks of {chunk} do not tile {values.shape}")
    little = values.dtype.newbyteorder("<")
    counts = [size // part for size, part in zip(values.shape, chunk, strict=True)]
    payload = int(np.prod(chunk)) * values.dtype.itemsize
    number = int(np.prod(counts))
    out = bytearray(number * (payload + _CHECKSUM_BYTES) + 16 * number + _CHECKSUM_BYTES)
    index = np.empty((number, 2), "<u8")
    position = 0
    for place, corner in enumerate(product(*(range(count) for count in counts))):
        where = tuple(
            slice(first * part, (first + 1) * part)
            for first, part in zip(corner, chunk, strict=True)
        )
        target = np.frombuffer(out, little, payload // values.dtype.itemsize, position)
        target.reshape(chunk)[...] = values[where]
        _append_checksum(out, position, payload)
        index[place] = position, payload + _CHECKSUM_BYTES
        position += payload + _CHECKSUM_BYTES
    out[position : position + index.nbytes] = index.tobytes()
    _append_checksum(out, position, index.nbytes)
    return out


def _append_checksum(out: bytearray, start: int, length: int) -> None:
    """Write the CRC-32C of ``length`` bytes behind them."""
    checksum = google_crc32c.value(np.frombuffer(out, np.uint8, length, start))
    out[start + length : start + length + _CHECKSUM_BYTES] = checksum.to_bytes(4, "little")


def inner_chunk(codecs: Sequence[dict[str, Any]]) -> tuple[int, ...] | None:
    """Shape of the chunks in a shard that ``read_shard`` can read, None if it cannot.

    Args:
        codecs: Of an array's ``zarr.json``.
    """
    if not _CAN_READ or len(codecs) != 1 or codecs[0].get("name") != "sharding_indexed":
        return None
    settings = codecs[0].get("configuration", {})
    if (
        list(settings.get("codecs", ())) != _CODECS
        or list(settings.get("index_codecs", ())) != _CODECS
        or settings.get("index_location", "end") != "end"
    ):
        return None
    return tuple(int(side) for side in settings["chunk_shape"])


def read_shard(
    file: Path,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: np.dtype[Any],
    where: Sequence[slice],
) -> np.ndarray:
    """A part of the row that a shard holds; of each chunk that it touches, the checksum is checked.

    Args:
        file: Local.
        shape: (C, M, N) of the row.
        chunk: (c, m, n) of a chunk.
        dtype: Of the array.
        where: One slice with step 1 per axis.

    Returns:
        The values, in memory of their own.

    Raises:
        ValueError: If the file is not a whole shard of that shape, or a checksum is wrong.
        OSError: If it cannot be read.
    """
    dtype = dtype.newbyteorder("<")
    bounds = [part.indices(size)[:2] for part, size in zip(where, shape, strict=True)]
    counts = [-(-size // side) for size, side in zip(shape, chunk, strict=True)]
    payload = math.prod(chunk) * dtype.itemsize
    out = np.empty([max(0, stop - start) for start, stop in bounds], dtype)
    scratch = np.empty(chunk, dtype)
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        end, index = _read_index(descriptor, math.prod(counts))
        for corner in product(
            *(
                range(start // side, -(-stop // side))
                for (start, stop), side in zip(bounds, chunk, strict=True)
            )
        ):
            place = int(np.ravel_multi_index(corner, counts))
            offset, length = (int(value) for value in index[place])
            if length != payload + _CHECKSUM_BYTES or offset + length > end:
                raise ValueError(f"chunk {place} of {file.name} has no place in it")
            target, source = _overlap(bounds, corner, chunk)
            into = out[target]
            # A chunk that is wanted whole goes where it belongs at once.
            whole = into.shape == chunk and into.flags.c_contiguous
            _read_chunk(descriptor, into if whole else scratch, offset, place)
            if not whole:
                into[...] = scratch[source]
    finally:
        os.close(descriptor)
    return out.astype(dtype.newbyteorder("="), copy=False)


def _read_index(descriptor: int, number: int) -> tuple[int, np.ndarray]:
    """Where the index of a shard begins, and its (number, 2) rows of offset and bytes."""
    size = 16 * number + _CHECKSUM_BYTES
    end = os.fstat(descriptor).st_size - size
    content = os.pread(descriptor, size, end) if end >= 0 else b""
    if len(content) != size:
        raise ValueError("the shard is too short for its index")
    if google_crc32c.value(content[:-_CHECKSUM_BYTES]) != _number(content[-_CHECKSUM_BYTES:]):
        raise ValueError("the checksum of the shard's index is wrong")
    return end, np.frombuffer(content, "<u8", 2 * number).reshape(number, 2)


def _read_chunk(descriptor: int, into: np.ndarray, offset: int, place: int) -> None:
    values = into.view(np.uint8).reshape(-1)
    checksum = bytearray(_CHECKSUM_BYTES)
    if os.preadv(descriptor, [values.data, checksum], offset) != values.size + _CHECKSUM_BYTES:
        raise ValueError(f"chunk {place} is cut short")
    if google_crc32c.value(values) != _number(checksum):
        raise ValueError(f"the checksum of chunk {place} is wrong")


def _overlap(
    bounds: Sequence[tuple[int, int]], corner: tuple[int, ...], chunk: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a chunk's part of the selection lies in the selection, and in the chunk."""
    target, source = [], []
    for (start, stop), place, side in zip(bounds, corner, chunk, strict=True):
        first, last = max(start, place * side), min(stop, (place + 1) * side)
        target.append(slice(first - start, last - start))
        source.append(slice(first - place * side, last - place * side))
    return tuple(target), tuple(source)


def _number(checksum: bytes | bytearray) -> int:
    return int.from_bytes(checksum, "little")
