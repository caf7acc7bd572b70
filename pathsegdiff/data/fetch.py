"""Get a data set: its archive, or its files from a Google Drive folder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pathsegdiff.data.arrivals import note_arrivals
from pathsegdiff.data.fetch_table import FetchTable
from pathsegdiff.data.image import shown
from pathsegdiff.data.manifest import data_root_of, find_files, root_folder
from pathsegdiff.data.manifest_file import Manifest, load_manifest
from pathsegdiff.errors import FetchError
from pathsegdiff.fetch.archives import unpack
from pathsegdiff.fetch.download import (
    DriveFile,
    Remote,
    Report,
    State,
    bytes_there,
    check_room,
    download,
    list_drive_folder,
    staging,
)
from pathsegdiff.fetch.licences import Terms


@dataclass(frozen=True, kw_only=True)
class FetchPlan:
    """What would be fetched.

    Attributes:
        table: The manifest's.
        root: Data root; need not exist.
        missing: Paths of the manifest that are not there yet, in its order.
        total: How many paths the manifest has.
    """

    manifest: Manifest
    table: FetchTable
    root: Path
    missing: tuple[str, ...]
    total: int

    @property
    def terms(self) -> Terms:
        """Licence and citation, for the user to accept."""
        manifest = self.manifest
        lines = [f"{manifest.name}: {manifest.title}", f"licence: {manifest.licence}"]
        if manifest.citation:
            lines.append(f"citation: {_flat(manifest.citation)}")
        if manifest.homepage:
            lines.append(f"home page: {manifest.homepage}")
        return Terms(name=manifest.name, text="\n".join(lines))


def plan_fetch(name_or_path: str | Path, data_root: Path | None = None) -> FetchPlan:
    """Look what of a data set is missing.

    Args:
        name_or_path, data_root: As for ``open_dataset``; the folder need not exist.

    Raises:
        DataError: If the manifest is wrong.
        FetchError: If it does not say where a command could get the files.
    """
    manifest = load_manifest(name_or_path)
    if manifest.fetch is None:
        raise FetchError(
            f"data set {manifest.name} cannot be fetched by a command (its manifest has no "
            f"[fetch]); by hand: {_where(manifest)}"
        )
    root, _ = root_folder(manifest, data_root)
    paths = [path for row in manifest.sources for path in (row.image, row.mask)]
    missing = paths
    if root.is_dir():
        files = find_files(manifest, data_root_of(manifest, root))
        missing = [
            path
            for row in manifest.sources
            for path, file in zip((row.image, row.mask), files[row.source_id], strict=True)
            if file is None
        ]
    return FetchPlan(
        manifest=manifest,
        table=manifest.fetch,
        root=root,
        missing=tuple(missing),
        total=len(paths),
    )


def fetch_dataset(plan: FetchPlan, report: Report) -> list[str]:
    """Get what is missing; an interrupted call is continued by the next one.

    Returns:
        What happened, a line each.

    Raises:
        FetchError: If something cannot be got; it says how to get it by hand.
    """
    with staging(plan.root) as folder:
        if plan.table.kind == "archive":
            return _fetch_archive(plan, folder, report)
        if plan.table.size is not None:
            share = plan.table.size * len(plan.missing) // plan.total
            check_room(plan.root, share, "make room, or choose another --data-root")
        with _by_hand(plan):
            return _fetch_drive(plan, report)


@contextmanager
def _by_hand(plan: FetchPlan) -> Iterator[None]:
    """Errors say how to do without this command."""
    try:
        yield
    except FetchError as error:
        manifest = plan.manifest
        raise FetchError(
            f"{error}. Or put the files there by hand: {_where(manifest)} "
            f"Layout: {_flat(manifest.layout)}"
        ) from None


def _where(manifest: Manifest) -> str:
    """How to get the files without this command."""
    by_hand = _flat(manifest.where) or "its manifest does not say how"
    return by_hand + (f" (home page: {manifest.homepage})" if manifest.homepage else "")


def _fetch_archive(plan: FetchPlan, folder: Path, report: Report) -> list[str]:
    table = plan.table
    archive = folder / table.file_name

    def on_bytes(done: int, total: int | None) -> None:
        report(State(label=table.file_name, unit="bytes", done=done, total=total))

    def on_files(done: int, total: int) -> None:
        report(State(label="unpack", unit="files", done=done, total=total))

    remedy = "make room, or choose another --data-root"
    if table.size is not None and not archive.exists():
        check_room(folder, table.size - bytes_there(archive), remedy)
    with _by_hand(plan):
        new = download(table.remote, archive, on_bytes=on_bytes)
    kind, digits = table.remote.digest
    lines = [f"{table.file_name}: {'whole' if new else 'already there'}, {kind} {digits}"]
    rows = plan.manifest.sources
    tops = {path.split("/")[0] for row in rows for path in (row.image, row.mask) if "/" in path}
    result = unpack(archive, plan.root, folder / "unpacking", keep=tops, on_files=on_files)
    archive.unlink()
    there = f", {result.there} were there already" if result.there else ""
    return [*lines, f"unpacked {result.written} files into {shown(plan.root)}{there}"]


def _fetch_drive(plan: FetchPlan, report: Report) -> list[str]:
    root = data_root_of(plan.manifest, plan.root)
    missing, total = plan.missing, plan.total
    urls = _find_on_drive(list_drive_folder(plan.table.folder), missing)
    absent = [path for path in missing if path not in urls]
    if not urls:
        raise FetchError(
            f"Google Drive folder {plan.table.folder} holds none of {len(missing)} files, such as "
            f"{missing[0]}; it has been changed"
        )
    here = total - len(missing)
    arrived: dict[str, Path] = {}
    try:
        for count, (path, url) in enumerate(urls.items()):

            def on_bytes(done: int, size: int | None, path: str = path, count: int = count) -> None:
                name = path.rpartition("/")[2]
                report(_drive_state(plan, here + count, f"{name}, {done:,} bytes"))

            if download(Remote(url=url), root / path, on_bytes=on_bytes):
                arrived[path] = root / path
    finally:  # also of those that came before an error
        note_arrivals(plan.root, arrived)
    report(_drive_state(plan, here + len(urls), ""))
    lines = [f"{len(urls)} files from Google Drive, {here} were there already"]
    if absent:
        lines.append(f"the Drive folder lacks {len(absent)} files, such as {absent[0]}")
    return lines


def _drive_state(plan: FetchPlan, done: int, note: str) -> State:
    return State(label=plan.manifest.name, unit="files", done=done, total=plan.total, note=note)


def _find_on_drive(listed: Sequence[DriveFile], wanted: Sequence[str]) -> dict[str, str]:
    """Path of the manifest -> address; the folder may lie deeper on Drive than in the manifest."""
    by_name: dict[str, list[DriveFile]] = {}
    for file in listed:
        by_name.setdefault(file.path.rpartition("/")[2], []).append(file)
    found: dict[str, str] = {}
    for path in wanted:
        for file in by_name.get(path.rpartition("/")[2], []):
            if file.path == path or file.path.endswith(f"/{path}"):
                found.setdefault(path, file.url)
    return found


def _flat(text: str) -> str:
    return " ".join(text.split())
