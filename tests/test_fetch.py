"""Transfers: continued, checked, refused, from a server on this machine."""

import hashlib
import json
from pathlib import Path

import pytest

from pathsegdiff.errors import FetchError
from pathsegdiff.fetch import download as module
from pathsegdiff.fetch.download import (
    Remote,
    check_url,
    download,
    list_drive_folder,
    staging,
)
from pathsegdiff.fetch.licences import LICENCES_FILE, Terms, is_accepted, remember
from tests.helpers_http import act_as_drive, put_drive_folder, serving

#: Several of gdown's blocks; of a block that breaks off nothing is kept.
DATA = bytes(range(256)) * 10_000
BLOCK = 512 * 1024
SHA256 = hashlib.sha256(DATA).hexdigest()
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """No retry within a call, no pause, no proxy of this machine."""
    monkeypatch.setattr(module, "RETRIES", 0)
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server():
    """A server without pages."""
    with serving() as served:
        yield served


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"md5": MD5}, {"size": len(DATA)}, {}])
def test_a_file_arrives_whole_and_is_not_asked_for_again(server, tmp_path, known):
    remote = Remote(url=server.put("/f.bin", DATA), **known)
    seen = []
    assert download(remote, tmp_path / "x" / "f.bin", on_bytes=lambda *state: seen.append(state))
    assert (tmp_path / "x/f.bin").read_bytes() == DATA
    assert (tmp_path / "x/f.bin").stat().st_mode & 0o777 == 0o644
    assert names(tmp_path / "x") == ["f.bin"]
    assert seen[-1] == (len(DATA), len(DATA))
    assert seen[0][0] < len(DATA)
    assert not download(remote, tmp_path / "x" / "f.bin")
    assert len(server.asked) == 1


def test_a_broken_transfer_is_kept_and_the_next_call_asks_for_the_rest_only(server, tmp_path):
    remote = Remote(url=server.put("/f.bin", DATA, breaks_after=2 * BLOCK + 9), sha256=SHA256)
    with pytest.raises(FetchError, match="the connection broke off.*1,048,576 bytes are kept"):
        download(remote, tmp_path / "f.bin")
    (part,) = tmp_path.iterdir()
    assert part.name.startswith("f.bin.unchecked") and part.suffix == ".part"
    assert part.read_bytes() == DATA[: 2 * BLOCK]
    seen = []
    assert download(remote, tmp_path / "f.bin", on_bytes=lambda *state: seen.append(state))
    assert server.ranges("/f.bin")[-1] == f"bytes={2 * BLOCK}-"
    assert seen[0][0] > 2 * BLOCK  # what was there is neither asked for nor counted again
    assert (tmp_path / "f.bin").read_bytes() == DATA
    assert names(tmp_path) == ["f.bin"]


def test_within_one_call_a_broken_connection_is_taken_up_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RETRIES", 2)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    remote = Remote(url=server.put("/f.bin", DATA, breaks_after=700_000), sha256=SHA256)
    assert download(remote, tmp_path / "f.bin")
    assert server.ranges("/f.bin") == ["", f"bytes={BLOCK}-"]


def test_where_a_server_cannot_continue_everything_is_asked_for_anew(server, tmp_path):
    remote = Remote(url=server.put("/f.bin", DATA, breaks_after=600_000, ranges=False), md5=MD5)
    with pytest.raises(FetchError, match="524,288 bytes are kept"):
        download(remote, tmp_path / "f.bin")
    assert download(remote, tmp_path / "f.bin")
    assert (tmp_path / "f.bin").read_bytes() == DATA
    assert names(tmp_path) == ["f.bin"]


@pytest.mark.parametrize("size", [len(DATA), None])
def test_a_part_that_is_whole_already_does_not_block(server, tmp_path, size):
    (tmp_path / "f.bin.uncheckedabcdefgh.part").write_bytes(DATA)
    remote = Remote(url=server.put("/f.bin", DATA), sha256=SHA256, size=size)
    assert download(remote, tmp_path / "f.bin")
    assert names(tmp_path) == ["f.bin"]
    if size is not None:
        assert not server.asked


def test_a_file_that_arrived_but_was_not_checked_is_checked(server, tmp_path):
    (tmp_path / "f.bin.unchecked").write_bytes(DATA[:-1] + b"?")
    remote = Remote(url=server.put("/f.bin", DATA), sha256=SHA256)
    with pytest.raises(FetchError, match="not the expected file"):
        download(remote, tmp_path / "f.bin")
    assert download(remote, tmp_path / "f.bin")


def test_of_several_parts_the_longest_is_continued(server, tmp_path):
    for letter, size in (("a", 10), ("b", 500_000), ("c", 20)):
        (tmp_path / f"f.bin.unchecked{letter * 8}.part").write_bytes(DATA[:size])
    assert download(Remote(url=server.put("/f.bin", DATA), md5=MD5), tmp_path / "f.bin")
    assert server.ranges("/f.bin")[-1] == "bytes=500000-"
    assert names(tmp_path) == ["f.bin"]


def test_corrupted_bytes_are_named_by_their_hash_and_never_taken(server, tmp_path):
    wrong = DATA[:-1] + b"?"
    remote = Remote(url=server.put("/f.bin", wrong), sha256=SHA256)
    with pytest.raises(FetchError) as caught:
        download(remote, tmp_path / "f.bin")
    assert f"its sha256 is {hashlib.sha256(wrong).hexdigest()}, expected {SHA256}" in str(
        caught.value
    )
    assert "f.bin.mismatch. Run the same command again" in str(caught.value)
    assert names(tmp_path) == ["f.bin.mismatch"]
    server.put("/f.bin", DATA)
    assert download(remote, tmp_path / "f.bin")
    assert (tmp_path / "f.bin").read_bytes() == DATA


def test_a_file_of_another_size_is_not_taken(server, tmp_path):
    remote = Remote(url=server.put("/f.bin", b"x" * 99), size=100)
    with pytest.raises(FetchError, match="it has 99 bytes, expected 100"):
        download(remote, tmp_path / "f.bin")
    assert names(tmp_path) == ["f.bin.mismatch"]


def test_another_file_is_noticed_by_what_the_server_announces(server, tmp_path):
    remote = Remote(url=server.put("/f.bin", DATA), size=len(DATA) - 1)
    with pytest.raises(FetchError, match="announces 2,560,000 bytes, expected 2,559,999"):
        download(remote, tmp_path / "f.bin")
    assert not (tmp_path / "f.bin").exists()


def test_a_moved_file_is_followed(server, tmp_path):
    server.put("/new/place", DATA)
    url = server.put("/f.bin", status=301, location="/new/place")
    assert download(Remote(url=url, sha256=SHA256), tmp_path / "f.bin")
    assert [path for path, _ in server.asked] == ["/f.bin", "/new/place"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (403, "the server refuses it (status 403)"),
        (404, "there is no such file any more (status 404)"),
        (429, "too many requests (status 429)"),
        (500, "the server fails (status 500)"),
    ],
)
def test_a_refusal_is_one_line_with_the_address_and_leaves_nothing(server, tmp_path, status, said):
    url = server.put("/f.bin", status=status)
    with pytest.raises(FetchError) as caught:
        download(Remote(url=url), tmp_path / "f.bin")
    assert str(caught.value).startswith(f"{url}: {said}")
    assert "\n" not in str(caught.value)
    assert not names(tmp_path)


def test_a_refusal_keeps_what_had_arrived(server, tmp_path):
    (tmp_path / "f.bin.uncheckedabcdefgh.part").write_bytes(DATA[:1000])
    url = server.put("/f.bin", status=429)
    with pytest.raises(FetchError, match="1,000 bytes are kept"):
        download(Remote(url=url), tmp_path / "f.bin")
    assert (tmp_path / "f.bin.uncheckedabcdefgh.part").read_bytes() == DATA[:1000]


def test_a_server_that_is_not_there_and_one_that_sends_in_circles_are_one_line(server, tmp_path):
    with pytest.raises(FetchError, match="no connection to the server; check the network"):
        download(Remote(url="http://127.0.0.1:9/f.bin"), tmp_path / "f.bin")
    url = server.put("/f.bin", status=302, location="/f.bin")
    with pytest.raises(FetchError, match="the server sends in circles"):
        download(Remote(url=url), tmp_path / "f.bin")


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {}])
def test_a_web_page_instead_of_the_file_is_named_as_such(server, tmp_path, known):
    url = server.put("/f.bin", b"\n<!DOCTYPE html><html>Please log in</html>", kind="text/html")
    with pytest.raises(FetchError, match="a web page instead of the file"):
        download(Remote(url=url, **known), tmp_path / "f.bin")
    assert not names(tmp_path)


def test_an_lfs_pointer_is_named_as_such(server, tmp_path):
    pointer = (
        b"version https://git-lfs.github.com/spec/v1\n"
        b"oid sha256:6960cd5a8657dc8bb214671aa0c6dbd3f5b698e84386884955836487ddc89e24\n"
        b"size 704238867\n"
    )
    assert len(pointer) == 134
    remote = Remote(url=server.put("/f.pth", pointer), sha256=SHA256, size=len(DATA))
    with pytest.raises(FetchError, match=r"the git LFS pointer \(134 bytes\) instead of the file"):
        download(remote, tmp_path / "f.pth")
    assert not names(tmp_path)


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"size": len(DATA)}])
def test_another_file_of_that_name_is_never_overwritten(server, tmp_path, known):
    (tmp_path / "f.bin").write_bytes(b"mine")
    with pytest.raises(FetchError, match="is there already, but is another file"):
        download(Remote(url=server.put("/f.bin", DATA), **known), tmp_path / "f.bin")
    assert (tmp_path / "f.bin").read_bytes() == b"mine"
    assert not server.asked


def free(monkeypatch, count: int) -> None:
    """The disk has so many bytes left."""
    usage = module.shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=count))


def test_a_disk_that_is_too_small_is_told_before_the_server_is_asked(server, tmp_path, monkeypatch):
    free(monkeypatch, 1_000_000)
    remote = Remote(url=server.put("/f.bin", DATA), size=len(DATA))
    with pytest.raises(FetchError, match="2,560,000 bytes are needed and 1,000,000 are free"):
        download(remote, tmp_path / "f.bin")
    assert not server.asked
    # What is there already needs no room.
    (tmp_path / "f.bin.uncheckedabcdefgh.part").write_bytes(DATA[:1_800_000])
    assert download(remote, tmp_path / "f.bin")


def test_a_disk_that_is_too_small_for_what_is_announced_is_told(server, tmp_path, monkeypatch):
    free(monkeypatch, 1_000_000)
    with pytest.raises(FetchError, match="are needed and 1,000,000 are free"):
        download(Remote(url=server.put("/f.bin", DATA)), tmp_path / "f.bin")
    assert not (tmp_path / "f.bin").exists()


def test_an_interruption_keeps_the_part(server, tmp_path):
    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    remote = Remote(url=server.put("/f.bin", DATA), sha256=SHA256)
    with pytest.raises(KeyboardInterrupt):
        download(remote, tmp_path / "f.bin", on_bytes=stop)
    (part,) = tmp_path.iterdir()
    kept = part.stat().st_size
    assert 0 < kept < len(DATA)
    assert download(remote, tmp_path / "f.bin")
    assert server.ranges("/f.bin")[-1] == f"bytes={kept}-"


def test_a_fault_of_our_own_is_not_called_the_servers(server, tmp_path):
    def fail(done: int, total: int | None) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        download(Remote(url=server.put("/f.bin", DATA)), tmp_path / "f.bin", on_bytes=fail)


def test_two_commands_do_not_fetch_into_one_folder(tmp_path):
    with (
        staging(tmp_path),
        pytest.raises(FetchError, match="another command is fetching"),
        staging(tmp_path),
    ):
        pass
    with staging(tmp_path) as folder:
        assert folder == tmp_path / ".fetch"


@pytest.mark.parametrize(
    "url", ["https://example.org/x.zip", "http://localhost:80/x", "http://127.0.0.1/x",
            "http://[::1]:1/x"],
)  # fmt: skip
def test_addresses_that_may_be_asked(url):
    assert check_url(url) == url


@pytest.mark.parametrize(
    "url",
    ["http://example.org/x", "http://127.0.0.1.example.org/x", "ftp://localhost/x", "file:///etc/x",
     "https://", "https:///x", "https://user:word@example.org/x", "https://example.org/a b",
     "https://example.org/\n", "https://example.org:port/", "https://[::1", 7, None, "",
     "http://localhost@example.org/"],
)  # fmt: skip
def test_addresses_that_may_not_be_asked(url):
    with pytest.raises(FetchError, match="url must be an https:// address"):
        check_url(url)


# --- Google Drive

FOLDER = "1zqbdkQF8i5cEmZOGmbdQm-EP8dRYtvss"


def test_a_drive_folder_is_listed_with_all_it_holds(server, monkeypatch):
    act_as_drive(server, monkeypatch)
    many = {f"{index:03d}.png": b"x" for index in range(60)}
    put_drive_folder(server, FOLDER, "all", {"masks": many, "readme.txt": b"r"})
    files = list_drive_folder(FOLDER)
    assert [file.path for file in files] == [f"masks/{name}" for name in many] + ["readme.txt"]
    assert files[0].url == f"https://drive.google.com/uc?id={FOLDER}-00-00"


def test_a_file_of_drive_is_continued_like_any_other(server, tmp_path, monkeypatch):
    act_as_drive(server, monkeypatch)
    put_drive_folder(server, FOLDER, "all", {"last.ckpt": DATA})
    (file,) = list_drive_folder(FOLDER)
    server.pages[f"/uc?id={FOLDER}-00"].breaks_after = 600_000
    with pytest.raises(FetchError, match="524,288 bytes are kept"):
        download(Remote(url=file.url), tmp_path / "last.ckpt")
    assert download(Remote(url=file.url), tmp_path / "last.ckpt")
    assert server.ranges(f"/uc?id={FOLDER}-00")[-1] == f"bytes={BLOCK}-"
    assert (tmp_path / "last.ckpt").read_bytes() == DATA


def test_a_large_file_of_drive_is_confirmed(server, tmp_path, monkeypatch):
    act_as_drive(server, monkeypatch)
    server.put(
        "/uc?id=abcdefghijkl",
        b'<html><form id="download-form" action="https://drive.google.com/download">'
        b'<input type="hidden" name="confirm" value="t"></form></html>',
        kind="text/html",
    )
    server.put("/download?confirm=t", DATA, disposition='attachment; filename="x"')
    url = "https://drive.google.com/uc?id=abcdefghijkl"
    assert download(Remote(url=url, sha256=SHA256), tmp_path / "x")


def test_a_used_up_quota_of_drive_is_one_line(server, tmp_path, monkeypatch):
    act_as_drive(server, monkeypatch)
    server.put(
        "/uc?id=abcdefghijkl",
        b'<html>\n<p class="uc-error-subcaption">Too many users have viewed this file.</p></html>',
        kind="text/html",
    )
    with pytest.raises(FetchError) as caught:
        download(Remote(url="https://drive.google.com/uc?id=abcdefghijkl"), tmp_path / "x")
    assert "Google Drive refuses it (Too many users have viewed this file.)" in str(caught.value)
    assert "in a day" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ({"status": 404}, r"there is no such file any more \(status 404\)"),
        ({"status": 429}, r"too many requests \(status 429\)"),
        ({"content": b"<html>", "kind": "text/html"}, "structure may have changed"),
        (
            {"content": f'<title>x</title><a href="https://drive.google.com/drive/folders/{FOLDER}">'
             "x</a>".encode()},
            "cannot be understood",
        ),
    ],
)  # fmt: skip
def test_a_drive_folder_that_cannot_be_read_is_one_line(server, monkeypatch, page, said):
    act_as_drive(server, monkeypatch)
    server.put(f"/embeddedfolderview?id={FOLDER}", **page)
    with pytest.raises(FetchError, match=f"Google Drive folder {FOLDER}: .*{said}") as caught:
        list_drive_folder(FOLDER)
    assert "\n" not in str(caught.value)


def test_an_id_that_is_none_is_refused_before_drive_is_asked():
    with pytest.raises(FetchError, match="folder must be the id of a Google Drive folder"):
        list_drive_folder("../../etc")


# --- licences


def test_a_text_is_accepted_once_and_another_text_anew(tmp_path):
    terms = Terms(name="glas", text="research only")
    assert not is_accepted(tmp_path, terms)
    remember(tmp_path, terms)
    remember(tmp_path, Terms(name="bcss", text="CC0"))
    assert is_accepted(tmp_path, terms)
    assert not is_accepted(tmp_path, Terms(name="glas", text="research only, and cite us"))
    assert not is_accepted(tmp_path, Terms(name="other", text="research only"))
    record = json.loads((tmp_path / LICENCES_FILE).read_text())
    assert record["glas"]["sha256"] == hashlib.sha256(b"research only").hexdigest()
    assert len(record["glas"]["accepted"].split("-")) == 3


@pytest.mark.parametrize("text", ["", "[]", '{"glas": 3}', "[" * 100_000])
def test_a_damaged_record_means_that_nothing_was_accepted(tmp_path, text):
    (tmp_path / LICENCES_FILE).write_text(text)
    terms = Terms(name="glas", text="research only")
    assert not is_accepted(tmp_path, terms)
    remember(tmp_path, terms)
    assert is_accepted(tmp_path, terms)
