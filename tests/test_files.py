"""Files are replaced whole or not at all."""

import zipfile

import pytest

from pathsegdiff import files
from pathsegdiff.files import as_file_name, refuse_packed, replace_file


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "head"
    file.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        replace_file(file, fail)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    replace_file(path, lambda file: file.write_bytes(b"old"))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, lambda file: file.write_bytes(b"new"))
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_the_folder_is_made(tmp_path):
    replace_file(tmp_path / "a" / "b" / "file", lambda file: file.write_text("there"))
    assert (tmp_path / "a" / "b" / "file").read_text() == "there"


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"no archive at all")
    refuse_packed(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/0", bytes(1000))
    refuse_packed(path)
    claims = bytearray(path.read_bytes())
    at = claims.index(b"PK\x01\x02") + 24  # the size, in the index at the end
    claims[at : at + 4] = (1 << 31).to_bytes(4, "little")
    path.write_bytes(claims)
    with pytest.raises(ValueError, match="claims to hold more bytes than it has"):
        refuse_packed(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/0", bytes(1000))
    with pytest.raises(ValueError, match=r"compressed, which torch\.save never does"):
        refuse_packed(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glas-tiny-t50.zarr", "glas-tiny-t50.zarr"),
        ("../up/and\\away", ".._up_and_away"),
        ("a b:c*d\n", "a_b_c_d_"),
        ("Gewebeproben-Köln_1", "Gewebeproben-Köln_1"),
    ],
)
def test_a_name_becomes_one_that_every_file_system_holds(name, expected):
    assert as_file_name(name) == expected
