"""Is a data set whole: every file there, readable, unaltered, and masks that mean something."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathsegdiff.data.arrivals import read_arrivals, verify_arrival
from pathsegdiff.data.image import pixel_sha256, read_image, read_label_image
from pathsegdiff.data.manifest import (
    check_size,
    data_root_of,
    find_files,
    root_folder,
    size_mismatch,
    verify_image,
    verify_mask,
)
from pathsegdiff.data.manifest_file import Manifest, Source, load_manifest
from pathsegdiff.data.passes import map_threads
from pathsegdiff.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: "missing", "unreadable", "altered" (pixels or size differ from the manifest) or
            "contradicting" (mask and image, or mask and label scheme).
        message: One line.
    """

    sample_id: str
    kind: str
    message: str


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What was found of one split.

    Attributes:
        total: Rows of the manifest.
        absent: No file of it is there at all: it is then left out, not broken.
        findings: In the order of the manifest.
    """

    split: str
    total: int
    absent: bool
    findings: tuple[Finding, ...]

    @property
    def good(self) -> int:
        """Rows of which nothing is wrong."""
        return self.total - len({finding.sample_id for finding in self.findings})


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was found of a data set.

    Attributes:
        hashed: Whether there are hashes to hold the files against: the manifest's of pixels, or
            those of the files as they were fetched.
        splits: Those that were asked for, in order.
        needed: Names of the splits that must be there.
    """

    manifest: Manifest
    root: Path
    hashed: bool
    splits: tuple[SplitReport, ...]
    needed: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether everything that is there is good, and something needed is there."""
        broken = any(report.findings for report in self.splits if not report.absent) or any(
            report.absent for report in self.splits if report.split in self.needed
        )
        return not broken and not all(report.absent for report in self.splits)


def check_dataset(
    name_or_path: str | Path,
    *,
    data_root: Path | None = None,
    splits: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Decode every image and mask of a data set and hold them against the manifest.

    Args:
        name_or_path, data_root: As for ``open_dataset``.
        splits: Check these, which must be there. Empty: all, and one that is wholly absent is
            no fault.
        progress: Called with (done, total) rows.

    Raises:
        DataError: If the manifest is wrong, a split unknown, or there is no such folder.
    """
    manifest = load_manifest(name_or_path)
    for split in splits:
        if split not in manifest.splits:
            raise DataError(
                f"data set {manifest.name} has no split {split!r}; "
                f"there are {', '.join(manifest.splits)}"
            )
    root = data_root_of(manifest, data_root)
    files = find_files(manifest, root)
    arrivals = read_arrivals(root_folder(manifest, data_root)[0])
    rows = [source for source in manifest.sources if not splits or source.split in splits]
    absent = {
        split
        for split in manifest.splits
        if not any(any(files[row.source_id]) for row in rows if row.split == split)
    }
    done, lock = 0, threading.Lock()

    def check(source: Source) -> list[Finding]:
        nonlocal done
        found = (
            []
            if source.split in absent
            else _check_row(manifest, source, *files[source.source_id], arrivals)
        )
        with lock:
            done += 1
            if progress is not None:
                progress(done, len(rows))
        return found

    findings = dict(
        zip((source.source_id for source in rows), map_threads(check, rows), strict=True)
    )
    return CheckReport(
        manifest=manifest,
        root=root,
        hashed=bool(arrivals) or any(row.image_sha256 or row.mask_sha256 for row in rows),
        splits=tuple(
            SplitReport(
                split=split,
                total=sum(row.split == split for row in rows),
                absent=split in absent,
                findings=tuple(
                    finding
                    for row in rows
                    if row.split == split
                    for finding in findings[row.source_id]
                ),
            )
            for split in manifest.splits
            if not splits or split in splits
        ),
        needed=tuple(splits),
    )


def _check_row(
    manifest: Manifest,
    source: Source,
    image_path: Path | None,
    mask_path: Path | None,
    arrivals: dict[str, str],
) -> list[Finding]:
    findings = []

    def note(kind: str, error: object) -> None:
        findings.append(Finding(sample_id=source.source_id, kind=kind, message=str(error)))

    def attempt(kind: str, step: Callable[[], object]) -> bool:
        try:
            step()
        except DataError as error:
            note(kind, error)
            return False
        return True

    image = mask = None
    if image_path is None:
        note("missing", f"{source.image} is not there")
    else:
        try:
            image = read_image(image_path)
        except DataError as error:
            note("unreadable", error)
        else:
            sha256, size = pixel_sha256(image), image.shape[:2]
            attempt("altered", lambda: verify_arrival(arrivals, source.image, image_path))
            if attempt("altered", lambda: verify_image(source, image_path, sha256)):
                attempt("altered", lambda: check_size(source, image_path, size))
    if mask_path is None:
        note("missing", f"{source.mask} is not there")
    else:
        try:
            mask = read_label_image(mask_path)
        except DataError as error:
            note("unreadable", error)
        else:
            codes, codes_sha256 = mask, pixel_sha256(mask)
            attempt("altered", lambda: verify_arrival(arrivals, source.mask, mask_path))
            if attempt("altered", lambda: verify_mask(source, mask_path, codes_sha256)):
                attempt("contradicting", lambda: manifest.scheme.apply(codes, str(mask_path)))
    if image is not None and mask is not None and image.shape[:2] != mask.shape:
        assert mask_path is not None  # it was read
        note("contradicting", size_mismatch(mask_path, mask.shape, image.shape[:2]))
    return findings
