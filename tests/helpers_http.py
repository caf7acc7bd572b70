"""A file server on this machine for tests: it resumes, breaks off, refuses, moves, and lies."""

import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests


@dataclass(kw_only=True)
class Page:
    """What the server has at one path.

    Attributes:
        breaks_after: Bytes of an answer after which the connection is closed, once.
        status: Anything but 200 is answered without the content.
        location: Of a redirection.
        ranges: Whether a part of it may be asked for.
        disposition: The Content-Disposition, as Google Drive sends it with a file.
    """

    content: bytes = b""
    kind: str = "application/octet-stream"
    status: int = 200
    location: str = ""
    breaks_after: int | None = None
    ranges: bool = True
    disposition: str = ""


@dataclass(kw_only=True)
class Server:
    """The server's pages, and what was asked: (path, Range header or "", bytes sent)."""

    url: str = ""
    pages: dict[str, Page] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def put(self, path: str, content: bytes = b"", **more: object) -> str:
        """Serve something; returns its address."""
        self.pages[path] = Page(content=content, **more)  # type: ignore[arg-type]
        return f"{self.url}{path}"

    def ranges(self, path: str) -> list[str]:
        """The Range header of every request for a path."""
        return [header for asked, header in self.asked if asked == path]


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of the loopback interface."""
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            served.asked.append((self.path, wanted))
            page = served.pages.get(self.path, Page(status=404))
            if page.status != 200:
                self.send_response(page.status)
                if page.location:
                    self.send_header("Location", page.location)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            begin, size = 0, len(page.content)
            if wanted and page.ranges:
                begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if begin >= size:
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
            else:
                self.send_response(200)
            self.send_header("Content-Type", page.kind)
            self.send_header("Content-Length", str(size - begin))
            if page.disposition:
                self.send_header("Content-Disposition", page.disposition)
            self.end_headers()
            body = page.content[begin:]
            if page.breaks_after is not None:
                body, page.breaks_after = body[: page.breaks_after], None
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """A client that hangs up early is no fault."""

    server = Quiet(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def act_as_drive(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to drive.google.com go to the server; everything but loopback is an error."""
    send = requests.adapters.HTTPAdapter.send

    def elsewhere(self, request, **options):
        parts = urllib.parse.urlsplit(request.url)
        if parts.hostname == "drive.google.com":
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            request.url = f"{server.url}{path}"
        assert urllib.parse.urlsplit(request.url).hostname == "127.0.0.1"
        return send(self, request, **options)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", elsewhere)


def put_drive_folder(server: Server, folder_id: str, name: str, entries: dict[str, object]) -> None:
    """Serve a Google Drive folder: name -> content (bytes), or a folder (a dictionary).

    Ids are made of the folder's and the entry's place in it.
    """
    links = []
    for index, (entry, content) in enumerate(entries.items()):
        entry_id = f"{folder_id}-{index:02d}"
        if isinstance(content, dict):
            links.append(f'<a href="https://drive.google.com/drive/folders/{entry_id}">{entry}</a>')
            put_drive_folder(server, entry_id, entry, content)
            continue
        links.append(f'<a href="https://drive.google.com/file/d/{entry_id}/view">{entry}</a>')
        assert isinstance(content, bytes)
        server.put(
            f"/uc?id={entry_id}",
            content,
            disposition=f'attachment; filename="{entry}"',
        )
    page = f"<html><head><title>{name}</title></head><body>{''.join(links)}</body></html>"
    server.put(f"/embeddedfolderview?id={folder_id}", page.encode(), kind="text/html")
