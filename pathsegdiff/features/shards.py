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
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Zstd

#: Zstandard's fastest but one: higher ones take longer and save next to nothing on int8.
ZSTD_LEVEL = 1
_CHECKSUM_BYTES = 4
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CHECKSUM = {"name": "crc32c"}
#: Bytes of a Zstandard frame's content size, by the two bits that say so.
_SIZE_BYTES = (0, 2, 4, 8)
#: A compressed chunk that is longer than twice its content and this is no chunk of ours.
_MOST_OVERHEAD = 1 << 10
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
#: Positioned reads into memory that is there; without them (Windows) zarr reads.
_CAN_READ = hasattr(os, "preadv") and sys.byteorder == "little"


@dataclass(frozen=True, kw_only=True)
class ShardFormat:
    """How the chunks of a shard are coded.

    Attributes:
        chunk: (c, m, n) of a chunk; each divides the shape of the row.
        compressed: By Zstandard, before the checksum.
    """

    chunk: tuple[int, ...]
    compressed: bool = False


def encode_shard(values: np.ndarray, shard: ShardFormat) -> bytearray:
    """The shard that holds one row of an array.

    Args:
        values: (C, M, N) numbers of the row, in the array's dtype.
        shard: How it is coded.

    Raises:
        ValueError: If the chunks do not tile the shape.
    """
    chunk = shard.chunk
    if values.ndim != len(chunk) or any(n % c for n, c in zip(values.shape, chunk, strict=True)):
        raise ValueError(f"chunks of {chunk} do not tile {values.shape}")
    little = values.dtype.newbyteorder("<")
    counts = [size // part for size, part in zip(values.shape, chunk, strict=True)]
    if shard.compressed:
        return _encode_compressed(values.astype(little, copy=False), chunk, counts)
    payload = int(np.prod(chunk)) * values.dtype.itemsize
    number = int(np.prod(counts))
    out = bytearray(number * (payload + _CHECKSUM_BYTES) + 16 * number + _CHECKSUM_BYTES)
    index = np.empty((number, 2), "<u8")
    position = 0
    for place, corner in enumerate(product(*(range(count) for count in counts))):
        where = _place(corner, chunk)
        target = np.frombuffer(out, little, payload // values.dtype.itemsize, position)
        target.reshape(chunk)[...] = values[where]
        _append_checksum(out, position, payload)
        index[place] = position, payload + _CHECKSUM_BYTES
        position += payload + _CHECKSUM_BYTES
    out[position : position + index.nbytes] = index.tobytes()
    _append_checksum(out, position, index.nbytes)
    return out


def _encode_compressed(
    values: np.ndarray, chunk: tuple[int, ...], counts: Sequence[int]
) -> bytearray:
    codec = Zstd(level=ZSTD_LEVEL)
    out, index = bytearray(), []
    for corner in product(*(range(count) for count in counts)):
        content = codec.encode(np.ascontiguousarray(values[_place(corner, chunk)]))
        index.append((len(out), len(content) + _CHECKSUM_BYTES))
        out += content + google_crc32c.value(content).to_bytes(_CHECKSUM_BYTES, "little")
    table = np.array(index, "<u8").tobytes()
    return out + table + google_crc32c.value(table).to_bytes(_CHECKSUM_BYTES, "little")


def _place(corner: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a chunk lies in the row."""
    return tuple(
        slice(first * part, (first + 1) * part) for first, part in zip(corner, chunk, strict=True)
    )


def _append_checksum(out: bytearray, start: int, length: int) -> None:
    """Write the CRC-32C of ``length`` bytes behind them."""
    checksum = google_crc32c.value(np.frombuffer(out, np.uint8, length, start))
    out[start + length : start + length + _CHECKSUM_BYTES] = checksum.to_bytes(4, "little")


def shard_format(codecs: Sequence[dict[str, Any]]) -> ShardFormat | None:
    """The format of the shards of an array, None if ``read_shard`` cannot read it.

    Args:
        codecs: Of the array's ``zarr.json``.
    """
    if not _CAN_READ or len(codecs) != 1 or codecs[0].get("name") != "sharding_indexed":
        return None
    settings = codecs[0].get("configuration", {})
    inner = list(settings.get("codecs", ()))
    compressed = len(inner) == 3 and inner[1].get("name") == "zstd"
    plain = [inner[0], inner[2]] if compressed else inner
    # A dtype of one byte has no byte order to name.
    if (
        plain not in ([_BYTES, _CHECKSUM], [{"name": "bytes"}, _CHECKSUM])
        or list(settings.get("index_codecs", ())) != [_BYTES, _CHECKSUM]
        or settings.get("index_location", "end") != "end"
    ):
        return None
    sample, *chunk = (int(side) for side in settings["chunk_shape"])
    return ShardFormat(chunk=tuple(chunk), compressed=compressed) if sample == 1 else None


def read_shard(
    file: Path,
    shape: tuple[int, ...],
    shard: ShardFormat,
    dtype: np.dtype[Any],
    where: Sequence[slice],
) -> np.ndarray:
    """A part of the row that a shard holds; of each chunk that it touches, the checksum is checked.

    Args:
        file: Local.
        shape: (C, M, N) of the row.
        shard: How it is coded.
        dtype: Of the array.
        where: One slice with step 1 per axis.

    Returns:
        The values, in memory of their own.

    Raises:
        ValueError: If the file is not a whole shard of that shape, or a checksum is wrong.
        OSError: If it cannot be read.
    """
    dtype, chunk = dtype.newbyteorder("<"), shard.chunk
    bounds = [part.indices(size)[:2] for part, size in zip(where, shape, strict=True)]
    counts = [-(-size // side) for size, side in zip(shape, chunk, strict=True)]
    payload = math.prod(chunk) * dtype.itemsize
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        end, index = _read_index(descriptor, math.prod(counts))
        # Before any memory is taken: as many bytes as the row has must be there.
        if not shard.compressed and end < len(index) * (payload + _CHECKSUM_BYTES):
            raise ValueError("the shard is too short for its chunks")
        out = np.empty([max(0, stop - start) for start, stop in bounds], dtype)
        scratch = np.empty(chunk, dtype)
        for corner in product(
            *(
                range(start // side, -(-stop // side))
                for (start, stop), side in zip(bounds, chunk, strict=True)
            )
        ):
            place = int(np.ravel_multi_index(corner, counts))
            offset, length = (int(value) for value in index[place])
            fits = length == payload + _CHECKSUM_BYTES
            if shard.compressed:
                fits = _CHECKSUM_BYTES < length <= 2 * payload + _MOST_OVERHEAD
            if not fits or offset + length > end:
                raise ValueError(f"chunk {place} of {file.name} has no place in it")
            target, source = _overlap(bounds, corner, chunk)
            into = out[target]
            # A chunk that is wanted whole goes where it belongs at once.
            whole = into.shape == chunk and into.flags.c_contiguous
            found = into if whole else scratch
            if shard.compressed:
                _read_compressed(descriptor, found, offset, length, place)
            else:
                _read_chunk(descriptor, found, offset, place)
            if not whole:
                _copy_rows(into, scratch[source])
    finally:
        os.close(descriptor)
    return out.astype(dtype.newbyteorder("="), copy=False)


def decode_chunk(content: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A chunk that stands alone in its file: Zstandard, then a CRC-32C.

    Args:
        content: Of the file.
        shape, dtype: Of the chunk; the frame must unpack to exactly that many bytes.

    Raises:
        ValueError: If it does not, the checksum is wrong, or the frame is damaged.
    """
    frame, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if google_crc32c.value(frame) != _number(checksum):
        raise ValueError("its checksum is wrong")
    size = math.prod(shape) * dtype.itemsize
    if _content_bytes(frame) != size:
        raise ValueError(f"it does not unpack to {size} bytes")
    out = np.empty(shape, dtype.newbyteorder("<"))
    try:
        Zstd().decode(frame, out=out)
    except RuntimeError as error:
        raise ValueError(f"it cannot be unpacked ({error})") from None
    return out.astype(dtype.newbyteorder("="), copy=False)


def is_plain_chunk(codecs: Sequence[dict[str, Any]]) -> bool:
    """Whether an array's chunks are what ``decode_chunk`` reads."""
    return (
        len(codecs) == 3
        and codecs[0] in (_BYTES, {"name": "bytes"})
        and codecs[1].get("name") == "zstd"
        and codecs[2] == _CHECKSUM
    )


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


def _read_compressed(
    descriptor: int, into: np.ndarray, offset: int, length: int, place: int
) -> None:
    content = os.pread(descriptor, length, offset)
    if len(content) != length:
        raise ValueError(f"chunk {place} is cut short")
    content, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if google_crc32c.value(content) != _number(checksum):
        raise ValueError(f"the checksum of chunk {place} is wrong")
    # Before anything is unpacked: a frame that is shorter would leave the rest as it was.
    if _content_bytes(content) != into.nbytes:
        raise ValueError(f"chunk {place} does not unpack to {into.nbytes} bytes")
    try:
        Zstd().decode(content, out=into)
    except RuntimeError as error:
        raise ValueError(f"chunk {place} cannot be unpacked ({error})") from None


def _content_bytes(frame: bytes) -> int | None:
    """What a Zstandard frame says that it unpacks to (RFC 8878, section 3.1.1.1)."""
    if len(frame) < 5 or frame[:4] != _ZSTD_MAGIC:
        return None
    descriptor = frame[4]
    flag, single = descriptor >> 6, descriptor >> 5 & 1
    size = _SIZE_BYTES[flag] or single
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    if not size or len(frame) < start + size:
        return None
    return _number(frame[start : start + size]) + (256 if size == 2 else 0)


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


def _copy_rows(into: np.ndarray, values: np.ndarray) -> None:
    """``into[...] = values``, half as fast again: each row of cells is one piece of memory."""
    row = np.dtype((np.void, into.shape[-1] * into.itemsize))
    into.view(row)[...] = values.view(row)


def _number(checksum: bytes | bytearray) -> int:
    return int.from_bytes(checksum, "little")
