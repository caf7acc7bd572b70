"""Get a file from a server: resumed after an interruption, and taken only if it is the right one.

    NAME                        the file, whole and checked
    NAME.unchecked????????.part what has arrived of it; the same call continues from there
    NAME.unchecked              whole, not yet checked
    NAME.mismatch               whole, but not the file that was expected

gdown transfers the bytes, for plain addresses and for Google Drive.
"""

import hashlib
import ipaddress
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from pathsegdiff.errors import FetchError

#: Folder below a target's root for what is on its way, and for the accepted licences.
STAGING = ".fetch"
#: Attempts after a broken connection, within one call; each goes on where the last one ended.
RETRIES = 3
#: Seconds that a server may be silent.
TIMEOUT_S = 30
#: Seconds before a second try to continue a transfer.
_PAUSE_S = 1.0
#: An announcement below this is let through: its content says best what it is.
_SMALL = 1 << 20
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_URL = re.compile(r"[!-~]{1,2000}")
_DRIVE_ID = re.compile(r"[A-Za-z0-9_-]{10,200}")

#: Called with (bytes that are there, bytes in all or None).
OnBytes = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a piece of the work is.

    Attributes:
        label: What is being got.
        unit: What is counted: "bytes" or "files".
        done: Count so far.
        total: Count at the end; None where it is not known.
        note: More for people.
    """

    label: str
    unit: str
    done: int
    total: int | None
    note: str = ""


Report = Callable[[State], None]


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file on a server.

    Attributes:
        url: As ``check_url`` accepts it.
        sha256, md5: Hex digits of the whole file, or "" where they are not known.
        size: In bytes, or None.
    """

    url: str
    sha256: str = ""
    md5: str = ""
    size: int | None = None

    @property
    def digest(self) -> tuple[str, str]:
        """Name and hex digits of the hash that counts; both "" where there is none."""
        if self.sha256:
            return "sha256", self.sha256
        return ("md5", self.md5) if self.md5 else ("", "")


@dataclass(frozen=True, kw_only=True)
class DriveFile:
    """One file of a Google Drive folder; ``path`` is relative to the folder, with slashes."""

    path: str
    url: str


def check_url(text: object) -> str:
    """An address that may be asked: https, or http on this machine.

    Raises:
        FetchError: If it is anything else.
    """
    if isinstance(text, str) and _URL.fullmatch(text):
        try:
            parts = urlsplit(text)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        plain = host is not None and parts.scheme == "http" and _is_loopback(host)
        if host and "@" not in parts.netloc and (parts.scheme == "https" or plain):
            return text
    raise FetchError(f"url must be an https:// address without a password, got {one_line(text)!r}")


def check_drive_id(text: object) -> str:
    """The id of a file or folder on Google Drive.

    Raises:
        FetchError: If it cannot be one.
    """
    if isinstance(text, str) and _DRIVE_ID.fullmatch(text):
        return text
    raise FetchError(
        f"folder must be the id of a Google Drive folder (letters, digits, - and _), "
        f"got {one_line(text)!r}"
    )


def one_line(value: object, limit: int = 300) -> str:
    """Text of a server or a file as one printable line."""
    try:
        words = " ".join(str(value).split())
    except (ValueError, RecursionError):  # a number of thousands of digits, or nested for ever
        words = f"a value of type {type(value).__name__} that cannot be shown"
    text = "".join(letter if letter.isprintable() else "?" for letter in words)
    return text if len(text) <= limit else f"{text[:limit]}..."


def check_room(folder: Path, needed: int, remedy: str = "make room") -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: Where it goes; need not exist yet.
        needed: Bytes.

    Raises:
        FetchError: Saying how many bytes are needed and free.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise FetchError(
            f"{one_line(folder)}: {needed:,} bytes are needed and {free:,} are free on its disk; "
            f"{remedy}"
        )


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """The folder for what is on its way to ``root``, held against a second command.

    Raises:
        FetchError: If another command holds it.
    """
    from filelock import FileLock, Timeout

    folder = root / STAGING
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FetchError(
            f"{one_line(root)}: another command is fetching into this folder; wait for its end"
        ) from None
    try:
        yield folder
    finally:
        lock.release()


def download(remote: Remote, target: Path, *, on_bytes: OnBytes | None = None) -> bool:
    """Get a file, unless it is there already.

    Args:
        target: Where it goes. A part that an earlier call left beside it is continued.
        on_bytes: Called after each block; may raise to stop, which keeps what has arrived.

    Returns:
        False if the file was there already.

    Raises:
        FetchError: One line, if the server refuses, the connection breaks, the disk is too small
            or the file is not the expected one (it is then set aside and never taken).
    """
    if target.exists():
        _check_present(remote, target)
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    unchecked = target.with_name(f"{target.name}.unchecked")
    _tidy_parts(remote, unchecked)
    if not unchecked.exists():
        if remote.size is not None:
            check_room(target.parent, remote.size - _arrived(unchecked))
        found = _transfer(remote, unchecked, _watch(remote, target, on_bytes))
    else:
        found = _hash(unchecked, remote.digest[0])
    _verify(remote, target, unchecked, found)
    unchecked.chmod(0o644)  # gdown makes it private
    unchecked.replace(target)
    return True


def list_drive_folder(folder_id: str) -> list[DriveFile]:
    """Every file of a public Google Drive folder and of the folders in it.

    Raises:
        FetchError: If Drive refuses, or its page cannot be read.
    """
    import gdown

    what = f"Google Drive folder {check_drive_id(folder_id)}"
    with _errors_in_one_line(what, None):
        files = gdown.download_folder(
            id=folder_id, skip_download=True, quiet=True, use_cookies=False, timeout=TIMEOUT_S
        )
    return [
        DriveFile(
            path=PurePosixPath(*Path(file.path).parts).as_posix(),
            url=f"https://drive.google.com/uc?id={check_drive_id(file.id)}",
        )
        for file in files
        if not isinstance(file, str)  # with skip_download none is
    ]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_present(remote: Remote, target: Path) -> None:
    """Raises: FetchError: If a file of that name is there and is another one."""
    kind, expected = remote.digest
    if not target.is_file():
        raise FetchError(f"{one_line(target)} is in the way: it is no file; move it away")
    size = target.stat().st_size
    found = _hash(target, kind)
    if found != expected:
        raise FetchError(
            f"{one_line(target)} is there already, but is another file: its {kind} is {found}, "
            f"expected {expected}; move it away and run the same command again"
        )
    if not kind and remote.size not in (None, size):
        raise FetchError(
            f"{one_line(target)} is there already, but is another file: it has {size:,} bytes, "
            f"expected {remote.size:,}; move it away and run the same command again"
        )


def _parts(unchecked: Path) -> list[Path]:
    """What gdown has left of a transfer."""
    pattern = re.compile(re.escape(unchecked.name) + r".{8}\.part")
    return [path for path in unchecked.parent.iterdir() if pattern.fullmatch(path.name)]


def _arrived(unchecked: Path) -> int:
    return sum(path.stat().st_size for path in _parts(unchecked))


def bytes_there(target: Path) -> int:
    """Of a target, whole or as far as earlier calls got it."""
    if target.exists():
        return target.stat().st_size
    unchecked = target.with_name(f"{target.name}.unchecked")
    if unchecked.exists():
        return unchecked.stat().st_size
    return _arrived(unchecked) if target.parent.is_dir() else 0


def _tidy_parts(remote: Remote, unchecked: Path) -> None:
    """Keep one part at most, and none that is whole: no server can continue such a one."""
    parts = sorted(_parts(unchecked), key=lambda path: path.stat().st_size)
    for path in parts[:-1]:
        path.unlink()
    for path in parts[-1:]:
        size = path.stat().st_size
        if remote.size is not None and size == remote.size and not unchecked.exists():
            path.replace(unchecked)
        elif remote.size is not None and size >= remote.size:
            path.unlink()


def _watch(remote: Remote, target: Path, on_bytes: OnBytes | None) -> OnBytes:
    """``on_bytes``, after a look at what the server announced."""
    looked = False

    def watch(done: int, total: int | None) -> None:
        nonlocal looked
        if not looked and total is not None:
            looked = True
            if remote.size is not None and total != remote.size and total > _SMALL:
                raise FetchError(
                    f"{remote.url}: the server announces {total:,} bytes, expected "
                    f"{remote.size:,}; it is another file"
                )
            check_room(target.parent, total - done)
        if on_bytes is not None:
            on_bytes(done, total)

    return watch


def _transfer(remote: Remote, unchecked: Path, on_bytes: OnBytes) -> str:
    """Bring all bytes to ``unchecked``; the hex digits of their hash, "" where none is known."""
    import gdown

    for attempt in range(3):
        hasher = _hasher(remote.digest[0])
        try:
            with _errors_in_one_line(remote.url, unchecked):
                gdown.download(
                    remote.url,
                    str(unchecked),
                    quiet=True,
                    resume=True,
                    use_cookies=False,
                    timeout=TIMEOUT_S,
                    retries=RETRIES,
                    progress=on_bytes,
                    hasher=hasher,
                )
            return hasher.hexdigest() if hasher is not None else ""
        except _NotContinuedError:
            # A single refusal may be a busy server's. A second one: it cannot continue at all, or
            # the part is whole already; then everything is asked for anew.
            if attempt == 0:
                time.sleep(_PAUSE_S)
            else:
                for path in _parts(unchecked):
                    path.unlink()
    raise FetchError(
        f"{remote.url}: the server does not continue a transfer, and the connection breaks; "
        "run the same command again"
    )


class _NotContinuedError(Exception):
    """The server did not send the rest that was asked for."""


@contextmanager
def _errors_in_one_line(what: str, unchecked: Path | None) -> Iterator[None]:
    """Turn what gdown, requests and urllib3 raise into a FetchError.

    Args:
        what: The address, or what it stands for.
        unchecked: Where the bytes go; None where no bytes are kept.
    """
    import gdown
    import requests
    import urllib3

    try:
        yield
    except FetchError:
        raise
    except requests.exceptions.HTTPError as error:
        status = None if error.response is None else error.response.status_code
        reason = _refusal(status)
    except gdown.FileURLRetrievalError as error:
        reason = f"Google Drive refuses it ({one_line(error.__context__ or error)})"
        reason += "; where its quota is used up, run the same command again in a day"
    except (gdown.DownloadError, requests.exceptions.RequestException) as error:
        if "did not honor the requested byte range" in str(error):
            raise _NotContinuedError from None
        reason = _breakdown(error)
    except (
        urllib3.exceptions.HTTPError,
        # gdown reads what a server sends without much suspicion
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"the server's answer cannot be understood ({type(error).__name__}: "
        reason += f"{one_line(error, 100)}); try again later"
    else:
        return
    kept = 0 if unchecked is None else _arrived(unchecked)
    more = f"; {kept:,} bytes are kept, and the same command continues there" if kept else ""
    raise FetchError(f"{what}: {reason}{more}") from None


def _refusal(status: int | None) -> str:
    if status in (401, 403):
        return f"the server refuses it (status {status}); see its home page for who may have it"
    if status in (404, 410):
        return f"there is no such file any more (status {status}); see its home page"
    if status == 429:
        return "too many requests (status 429); wait and run the same command again"
    return f"the server fails (status {status}); run the same command again later"


def _breakdown(error: Exception) -> str:
    """What went wrong with a connection, for people."""
    import requests

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(causes) < 20:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    again = "run the same command again"
    for kind, text in (
        (requests.exceptions.SSLError, "its certificate cannot be trusted; check the clock"),
        (requests.exceptions.ProxyError, "the proxy gives no connection; check $HTTPS_PROXY"),
        (requests.exceptions.TooManyRedirects, "the server sends in circles; see its home page"),
        (requests.exceptions.Timeout, f"no answer within {TIMEOUT_S} s; {again}"),
    ):
        if any(isinstance(one, kind) for one in causes):
            return text
    status = re.search(r"status code ([0-9]{3})", str(error))
    if status:
        return _refusal(int(status[1]))
    if "incomplete" in str(error) or any(
        isinstance(one, requests.exceptions.ChunkedEncodingError) for one in causes
    ):
        return f"the connection broke off; {again}"
    if any(isinstance(one, requests.exceptions.ConnectionError) for one in causes):
        return f"no connection to the server; check the network and {again}"
    return f"{one_line(error)}; {again}"


def _verify(remote: Remote, target: Path, unchecked: Path, found: str) -> None:
    """Raises: FetchError: If the file is not the expected one; it is removed or set aside."""
    size = unchecked.stat().st_size
    with unchecked.open("rb") as file:
        begin = file.read(1024)
    expected_kind, expected = remote.digest
    where = f"{remote.url}: "
    if begin.startswith(_LFS_POINTER):
        unchecked.unlink()
        raise FetchError(
            f"{where}the server sent the git LFS pointer ({size:,} bytes) instead of the file it "
            "stands for; its LFS quota may be used up: run the same command again later"
        )
    if re.match(rb"\s*(<!doctype html|<html)", begin, re.IGNORECASE):
        unchecked.unlink()
        raise FetchError(
            f"{where}the server sent a web page instead of the file; it may have moved, or ask "
            "for a login: see its home page"
        )
    if found != expected:
        problem = f"its {expected_kind} is {found}, expected {expected}"
    elif remote.size not in (None, size):
        problem = f"it has {size:,} bytes, expected {remote.size:,}"
    else:
        return
    aside = target.with_name(f"{target.name}.mismatch")
    unchecked.replace(aside)
    raise FetchError(
        f"{where}what arrived is not the expected file: {problem}; it is set aside as "
        f"{one_line(aside)}. Run the same command again; if that says the same, the file has been "
        "changed by its publisher"
    )


def _hasher(kind: str) -> "hashlib._Hash | None":
    return hashlib.new(kind, usedforsecurity=False) if kind else None


def _hash(path: Path, kind: str) -> str:
    hasher = _hasher(kind)
    if hasher is None:
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hasher).hexdigest()
