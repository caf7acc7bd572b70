"""Archives: what is unpacked, and what is refused."""

import io
import stat
import struct
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from pathsegdiff.errors import FetchError
from pathsegdiff.fetch import archives
from pathsegdiff.fetch.archives import safe_path, unpack
from tests.helpers_archives import content, make, make_tar, make_zip

FILES = {"train/a.bmp": b"a" * 1000, "train/b.bmp": b"b" * 10, "read me.txt": b"read"}


@pytest.fixture
def out(tmp_path) -> Path:
    """Folder to unpack into; work lies in its .work."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
def test_files_come_to_their_places_and_a_second_time_changes_nothing(tmp_path, out, name):
    archive = make(tmp_path / name, FILES)
    seen = []
    result = unpack(archive, out, out / ".work", on_files=lambda *counts: seen.append(counts))
    assert (result.written, result.there) == (3, 0)
    assert content(out) == FILES
    assert seen == [(1, 3), (2, 3), (3, 3)]
    again = unpack(archive, out, out / ".work")
    assert (again.written, again.there) == (0, 3)
    assert content(out) == FILES


def test_the_one_folder_around_everything_is_left_out_unless_it_is_wanted(tmp_path, out):
    files = {"My Data (2016)/x/1.bmp": b"1", "My Data (2016)/2.bmp": b"2", "__MACOSX/._x": b""}
    archive = make(tmp_path / "a.zip", files)
    unpack(archive, out, out / ".work")
    assert content(out) == {"x/1.bmp": b"1", "2.bmp": b"2"}
    unpack(archive, out / "kept", out / ".work", keep=["My Data (2016)"])
    assert sorted(content(out / "kept")) == ["My Data (2016)/2.bmp", "My Data (2016)/x/1.bmp"]


def test_a_tar_of_the_current_folder_is_unpacked(tmp_path, out):
    top = tarfile.TarInfo("./")
    top.type = tarfile.DIRTYPE
    unpack(make_tar(tmp_path / "a.tar", {"./x/1": b"1"}, top), out, out / ".work", keep=["x"])
    assert content(out) == {"x/1": b"1"}


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/x", "C:/x", "C:x", "a\\..\\..\\x", "a//x", "a/./x", "a\x1b[2Jx",
     "a\nx", ".fetch/licences.json", ".FETCH/x", "..", "./../x"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_name_that_could_lead_elsewhere_is_refused_and_nothing_is_unpacked(
    tmp_path, out, kind, name
):
    archive = make(tmp_path / kind, {"good": b"good", name: b"bad"})
    with pytest.raises(FetchError, match="a name that could lead out of the folder") as caught:
        unpack(archive, out, out / ".work")
    assert str(caught.value).isprintable()
    assert content(tmp_path) == {kind: archive.read_bytes()}


def test_a_name_that_hides_behind_a_nul_is_refused(tmp_path, out):
    archive = make_zip(tmp_path / "a.zip", {"abc.bmp": b"x", "good": b""})
    archive.write_bytes(archive.read_bytes().replace(b"abc.bmp", b"a\0c.bmp"))
    with pytest.raises(FetchError, match="could lead out of the folder"):
        unpack(archive, out, out / ".work")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path, out, kind):
    member = tarfile.TarInfo("innocent")
    member.type, member.linkname = kind, "../../outside"
    archive = make_tar(tmp_path / "a.tar.gz", {"good": b"good"}, member)
    with pytest.raises(FetchError, match="'innocent' is a link or a device"):
        unpack(archive, out, out / ".work")
    assert not content(out)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip_are_refused(tmp_path, out, kind):
    info = zipfile.ZipInfo("innocent")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good", b"good")
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(FetchError, match="'innocent' is a link or a device"):
        unpack(tmp_path / "a.zip", out, out / ".work")
    assert not content(out)


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz"])
def test_a_bomb_is_refused_by_what_it_declares(tmp_path, out, monkeypatch, kind):
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 1 << 20)
    archive = make(tmp_path / kind, {"zeros": bytes(4 << 20)})
    assert archive.stat().st_size * archives.MAX_RATIO < 4 << 20
    with pytest.raises(FetchError, match="would unpack to more than 1,048,576 bytes"):
        unpack(archive, out, out / ".work")
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 8 << 20)
    assert unpack(archive, out, out / ".work").written == 1
    monkeypatch.setattr(archives, "MAX_BYTES", 3 << 20)
    with pytest.raises(FetchError, match="more than 3,145,728 bytes"):
        unpack(archive, out, out / ".work")


def test_a_zip_that_declares_less_than_it_holds_is_refused(tmp_path, out):
    archive = make_zip(tmp_path / "a.zip", {"zeros": bytes(100_000), "good": b"x"})
    lie, truth = struct.pack("<L", 10), struct.pack("<L", 100_000)
    data = archive.read_bytes()
    assert data.count(truth) == 2  # the local header and the directory
    archive.write_bytes(data.replace(truth, lie))
    with pytest.raises(FetchError, match="damaged"):
        unpack(archive, out, out / ".work")
    assert not content(out)


def test_bytes_are_counted_while_they_are_written(tmp_path):
    entry = archives._Entry(
        path=PurePosixPath("x"), size=5, open=lambda: io.BytesIO(b"longer than five")
    )
    with pytest.raises(FetchError, match="more than 5 bytes"):
        archives._write(tmp_path / "a.zip", entry, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b""


def test_a_file_that_ends_early_is_damage(tmp_path):
    entry = archives._Entry(path=PurePosixPath("x"), size=5, open=lambda: io.BytesIO(b"four"))
    with pytest.raises(FetchError, match="damaged: x has 4 of 5 bytes"):
        archives._write(tmp_path / "a.zip", entry, tmp_path / "x")


def test_a_sparse_file_in_a_tar_is_refused(tmp_path, out):
    member = tarfile.TarInfo("holes")
    member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}
    archive = make_tar(tmp_path / "a.tar", {}, member)
    with pytest.raises(FetchError, match="'holes' is a link or a device"):
        unpack(archive, out, out / ".work")


def test_an_encrypted_zip_is_named_as_such(tmp_path, out):
    archive = make_zip(tmp_path / "a.zip", {"x": b"x"})
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag in the directory
    archive.write_bytes(data)
    with pytest.raises(FetchError, match="is encrypted; unpack it by hand"):
        unpack(archive, out, out / ".work")


def test_a_tar_header_of_any_length_is_not_read_into_memory(tmp_path, out):
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 64 << 20
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(member, io.BytesIO(bytes(64 << 20)))
    with pytest.raises(FetchError, match=r"damaged, or no archive \(a header of 67"):
        unpack(tmp_path / "a.tar.gz", out, out / ".work")


def test_too_many_entries_are_refused(tmp_path, out, monkeypatch):
    monkeypatch.setattr(archives, "MAX_ENTRIES", 2)
    with pytest.raises(FetchError, match="more than 2 entries"):
        unpack(make(tmp_path / "a.tar", FILES), out, out / ".work")


@pytest.mark.parametrize("other", ["X.bmp", "x.bmp/y"])
def test_two_entries_of_one_name_are_refused(tmp_path, out, other):
    with pytest.raises(FetchError, match="two entries of the same name"):
        unpack(make(tmp_path / "a.zip", {"x.bmp": b"1", other: b"2"}), out, out / ".work")


@pytest.mark.parametrize("in_the_way", ["file", "folder", "file above"])
def test_what_is_there_is_never_overwritten(tmp_path, out, in_the_way):
    archive = make(tmp_path / "a.zip", FILES)
    if in_the_way == "folder":
        (out / "train/b.bmp").mkdir(parents=True)
    elif in_the_way == "file":
        (out / "train").mkdir()
        (out / "train/b.bmp").write_bytes(b"B" * 10)
    else:
        (out / "train").write_bytes(b"mine")
    before = content(out)
    with pytest.raises(FetchError, match="is there with other content than in the archive"):
        unpack(archive, out, out / ".work")
    assert content(out) == before


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("spoil", ["cut", "text", "flip"])
def test_a_damaged_archive_is_one_line_and_leaves_nothing(tmp_path, out, name, spoil):
    archive = make(tmp_path / name, {"a": bytes(range(256)) * 40, "b": b"b" * 5000})
    data = bytearray(archive.read_bytes())
    if spoil == "flip":
        data[0:20] = b"\xff" * 20
    archive.write_bytes({"cut": data[: len(data) // 3], "text": b"not here" * 99}.get(spoil, data))
    with pytest.raises(FetchError, match="damaged") as caught:
        unpack(archive, out, out / ".work")
    assert "\n" not in str(caught.value)
    assert not content(out)


def test_an_index_that_points_before_the_file_is_damage(tmp_path, out):
    archive = make(tmp_path / "a.zip", FILES)
    data = bytearray(archive.read_bytes())
    place = data.rindex(b"PK\5\6") + 16  # where the index begins; entries move by what is missing
    start = int.from_bytes(data[place : place + 4], "little")
    data[place : place + 4] = (start + 100).to_bytes(4, "little")
    archive.write_bytes(data)
    with pytest.raises(FetchError, match=r"a\.zip is damaged, or no archive"):
        unpack(archive, out, out / ".work")
    assert not content(out)


def test_an_interruption_while_unpacking_leaves_nothing(tmp_path, out):
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    archive = make(tmp_path / "a.zip", FILES)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, out, out / ".work", on_files=stop)
    assert not content(out)
    assert unpack(archive, out, out / ".work").written == 3


def test_an_archive_of_another_kind_is_refused(tmp_path, out):
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    with pytest.raises(FetchError, match=r"a\.rar must end in one of \.zip, \.tar"):
        unpack(tmp_path / "a.rar", out, out / ".work")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("x", b"x")
    with pytest.raises(FetchError, match="compressed in a way that is not supported"):
        unpack(tmp_path / "a.zip", out, out / ".work")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, out, monkeypatch):
    archive = make(tmp_path / "a.zip", FILES)
    usage = archives.shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1013))
    with pytest.raises(FetchError, match="1,014 bytes are needed and 1,013 are free"):
        unpack(archive, out, out / ".work")
    assert not content(out)


def test_harmless_names_are_taken_as_they_are(tmp_path):
    for name in ("a b (1)/é.png", "..a/b..", "a...b", ".hidden/x"):
        assert safe_path(name, tmp_path) == PurePosixPath(name)
    assert safe_path("a/b/", tmp_path) == PurePosixPath("a/b")
    assert safe_path("./", tmp_path) is None
