"""Shards made in one pass are what zarr's own writer makes."""

import google_crc32c
import numpy as np
import pytest
import zarr
from numcodecs import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from pathsegdiff.features.quantize import is_compressed
from pathsegdiff.features.shards import (
    ZSTD_LEVEL,
    ShardFormat,
    encode_shard,
    read_shard,
    shard_format,
)


def make_values(shape, dtype):
    values = np.random.default_rng(0).normal(size=shape)
    return (values * 30 if dtype == "int8" else values).astype(dtype)


def make_array(folder, shape, chunk, dtype):
    compressors = [Crc32cCodec()]
    if dtype == "int8":
        compressors.insert(0, ZstdCodec(level=ZSTD_LEVEL))
    return zarr.create_array(
        str(folder / "a.zarr"),
        shape=(2, *shape),
        chunks=(1, *chunk),
        shards=(1, *shape),
        dtype=dtype,
        compressors=compressors,
        config={"write_empty_chunks": True},
    )


@pytest.mark.parametrize(
    ("shape", "chunk", "dtype"),
    [
        ((12, 8, 8), (4, 8, 8), "float16"),
        ((6, 4, 4), (6, 4, 4), "float32"),
        ((5, 2, 2), (1, 2, 2), "float16"),
        ((5, 2, 2), (1, 2, 2), "int8"),
        ((12, 8, 8), (4, 8, 8), "int8"),
        ((4, 80, 80), (2, 80, 80), "int8"),
    ],
)
def test_the_bytes_are_those_of_zarrs_writer(tmp_path, shape, chunk, dtype):
    array = make_array(tmp_path, shape, chunk, dtype)
    values = make_values(shape, dtype)
    values[0] = 0  # a chunk of zeros is a chunk like any
    array[1] = values
    written = (tmp_path / "a.zarr" / "c" / "1" / "0" / "0" / "0").read_bytes()
    shard = ShardFormat(chunk=chunk, compressed=is_compressed(str(values.dtype)))
    assert bytes(encode_shard(values, shard)) == written


@pytest.mark.parametrize("chunk", [(4, 8, 8), (4, 4, 4), (12, 16, 4)])
def test_zarr_reads_chunks_of_several_patches(tmp_path, chunk):
    """zarr writes these in Morton order, we in C order: the index says where each is."""
    array = make_array(tmp_path, (12, 16, 16), chunk, "float16")
    values = np.random.default_rng(0).normal(size=(12, 16, 16)).astype(np.float16)
    array[1] = 0
    (tmp_path / "a.zarr" / "c" / "1" / "0" / "0" / "0").write_bytes(
        encode_shard(values, ShardFormat(chunk=chunk))
    )
    np.testing.assert_array_equal(array[1], values)
    np.testing.assert_array_equal(array[1, 3:9, 2:13, 5:6], values[3:9, 2:13, 5:6])


def test_a_strided_view_is_written_as_its_values(tmp_path):
    array = make_array(tmp_path, (4, 4, 4), (2, 4, 4), "float16")
    values = np.arange(128, dtype=np.float16).reshape(4, 4, 8)[..., ::2]
    array[1] = 0
    (tmp_path / "a.zarr" / "c" / "1" / "0" / "0" / "0").write_bytes(
        encode_shard(values, ShardFormat(chunk=(2, 4, 4)))
    )
    np.testing.assert_array_equal(array[1], values)


SELECTIONS = [
    np.s_[:, :, :],
    np.s_[3:9, :, :],
    np.s_[4:8, 0:16, 0:16],
    np.s_[3:9, 2:13, 5:6],
    np.s_[11:12, 15:16, 0:4],
    np.s_[5:5, :, :],
]


@pytest.mark.parametrize("chunk", [(4, 16, 16), (4, 4, 4), (12, 16, 4), (1, 16, 16)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_what_is_read_is_what_zarr_reads(tmp_path, chunk, dtype):
    array = make_array(tmp_path, (12, 16, 16), chunk, dtype)
    array[1] = make_values((12, 16, 16), dtype)
    found = shard_format(array.metadata.to_dict()["codecs"])
    assert found == ShardFormat(chunk=chunk, compressed=dtype == "int8")
    file = tmp_path / "a.zarr" / "c" / "1" / "0" / "0" / "0"
    for where in SELECTIONS:
        values = read_shard(file, (12, 16, 16), found, array.dtype, where)
        np.testing.assert_array_equal(values, array[(1, *where)])
        assert values.dtype == array.dtype
        assert values.flags.writeable


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_every_flipped_byte_of_a_shard_is_noticed(tmp_path, dtype):
    values = make_values((4, 4, 4), dtype)
    shard = ShardFormat(chunk=(2, 4, 4), compressed=is_compressed(str(values.dtype)))
    content = encode_shard(values, shard)
    file = tmp_path / "shard"
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checksum|no place|cut short"):
            read_shard(file, (4, 4, 4), shard, values.dtype, np.s_[:, :, :])
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"checksum|no place|cut short|too short"):
            read_shard(file, (4, 4, 4), shard, values.dtype, np.s_[:, :, :])


@pytest.mark.parametrize("size", [0, 31, 33, 1 << 40])
def test_a_chunk_that_would_unpack_to_another_size_is_refused(tmp_path, size):
    """With right checksums, as someone would make it who means harm."""
    shard = ShardFormat(chunk=(2, 4, 4), compressed=True)
    frame = zstd_frame_that_promises(size)
    index = np.array([[0, len(frame) + 4]], "<u8").tobytes()
    parts = [part + google_crc32c.value(part).to_bytes(4, "little") for part in (frame, index)]
    (tmp_path / "shard").write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match=r"does not unpack to 32 bytes"):
        read_shard(tmp_path / "shard", (2, 4, 4), shard, np.dtype("int8"), np.s_[:, :, :])


def zstd_frame_that_promises(size):
    """A frame of 32 bytes of content whose header says something else."""
    frame = Zstd(level=1).encode(np.arange(32, dtype=np.int8))
    assert frame[4] == 0x20  # single segment, one byte of size
    assert frame[5] == 32
    return frame[:4] + bytes([0xE0]) + size.to_bytes(8, "little") + frame[6:]


def test_a_chunk_that_is_not_asked_for_is_not_looked_at(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float16)
    content = encode_shard(values, ShardFormat(chunk=(2, 4, 4)))
    content[3] ^= 1
    (tmp_path / "shard").write_bytes(content)
    second = read_shard(
        tmp_path / "shard", (4, 4, 4), ShardFormat(chunk=(2, 4, 4)), values.dtype, np.s_[2:4, :, :]
    )
    np.testing.assert_array_equal(second, values[2:])


def test_an_array_that_is_coded_otherwise_is_left_to_zarr(tmp_path):
    make = {"shape": (2, 4, 4, 4), "chunks": (1, 2, 4, 4), "dtype": "float16"}
    for number, more in enumerate(
        ({}, {"shards": (1, 4, 4, 4)}, {"shards": (1, 4, 4, 4), "compressors": None})
    ):
        array = zarr.create_array(str(tmp_path / f"{number}.zarr"), **make, **more)
        assert shard_format(array.metadata.to_dict()["codecs"]) is None


def test_chunks_that_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="do not tile"):
        encode_shard(np.zeros((4, 4, 4), np.float16), ShardFormat(chunk=(3, 4, 4)))
