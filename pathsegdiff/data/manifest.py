"""A data set on this machine: where its files are, and its regions, read.

A manifest names pixels, not files: the container may be another one than its row says
(train_1.bmp is found as train_1.png), and the decoded pixels are held against its hashes.
Shapes: H = W = ``region_px``; H0, W0 = the source's own.
"""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

import numpy as np

from pathsegdiff.config import content_hash
from pathsegdiff.data.image import (
    IMAGE_SUFFIXES,
    file_sha256,
    image_size,
    is_jpeg,
    pixel_sha256,
    read_image,
    read_label_image,
    shown,
)
from pathsegdiff.data.labels import LabelScheme
from pathsegdiff.data.manifest_file import (
    Manifest,
    Source,
    list_manifests,
    load_manifest,
    reference,
)
from pathsegdiff.data.passes import map_threads
from pathsegdiff.data.regions import (
    RegionRule,
    Window,
    centre_offset,
    check_mpp,
    dont_care_share,
    pad_region,
    plan_windows,
    resize_image,
    resize_label,
    scaled_size,
    window_offset,
)
from pathsegdiff.errors import DataError

logger = logging.getLogger(__name__)


__all__ = [
    "Dataset",
    "Manifest",
    "Region",
    "Sample",
    "Source",
    "list_manifests",
    "load_manifest",
    "open_dataset",
]

#: Size of an image against its row: beyond this it was exported at another resolution.
_SIZE_TOLERANCE = 0.02
_WHITE = 255

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One region of a data set.

    Attributes:
        sample_id: That of its source, or SOURCE_rROWcCOL for a window.
        source: What it is cut from.
        window: Where, or None where the whole source is resized.
    """

    sample_id: str
    source: Source
    window: Window | None = None

    @property
    def split(self) -> str:
        """Part of the official split."""
        return self.source.split

    @property
    def group(self) -> str:
        """Patient, case or slide."""
        return self.source.group


@dataclass(frozen=True, kw_only=True)
class Region:
    """A sample, read.

    Attributes:
        image: (H, W, 3) uint8, H = W = ``region_px``.
        label: (H, W) uint8 class ids; K or more is not counted.
        instances: (H0, W0) int32 objects at the source's own size where the data set counts them.
        source_px: (height, width) of the source image.
        image_sha256, mask_sha256: ``pixel_sha256`` of the decoded source.
    """

    image: np.ndarray
    label: np.ndarray
    instances: np.ndarray | None
    source_px: tuple[int, int]
    image_sha256: str
    mask_sha256: str


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    """Pixels of a source at the rule's resolution.

    Attributes:
        pixels: The image, or the class ids.
        instances: Objects at the source's own size, of masks where they are counted.
        size: (height, width) of the source.
        sha256: Of its decoded pixels.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    sha256: str
    instances: np.ndarray | None = None


class Dataset:
    """A manifest with the place of its files; reads regions.

    Attributes:
        manifest: As it was loaded.
        root: Folder below which the files lie.
        rule: The manifest's, at the resolution that was asked for.
        splits: Those that are opened, in the manifest's order.
        sources: Of these splits, in the manifest's order.
        samples: Of these splits; the windows of one source stand together, row by row.
    """

    def __init__(
        self,
        manifest: Manifest,
        root: Path,
        rule: RegionRule,
        splits: Sequence[str],
        files: dict[str, tuple[Path, Path]],
    ) -> None:
        self.manifest = manifest
        self.root = root
        self.rule = rule
        self.splits = tuple(splits)
        self.sources = tuple(source for source in manifest.sources if source.split in splits)
        self._files = files
        self._sizes: dict[str, tuple[int, int]] = {}
        # Image and mask of two sources: enough for a reader that goes source by source.
        self._latest: _Latest[tuple[str, str], _Decoded] = _Latest(4)
        self.samples = self._make_samples()

    @property
    def name(self) -> str:
        """Of the manifest."""
        return self.manifest.name

    @property
    def scheme(self) -> LabelScheme:
        """What mask codes mean."""
        return self.manifest.scheme

    @cached_property
    def sha256(self) -> str:
        """``dataset_sha256`` at its resolution."""
        return dataset_sha256(self.manifest, self.rule)

    def split_samples(self, split: str) -> tuple[Sample, ...]:
        """The samples of one split."""
        return tuple(sample for sample in self.samples if sample.split == split)

    def image_path(self, source: Source) -> Path:
        """Where the image of a source lies."""
        return self._files[source.source_id][0]

    def mask_path(self, source: Source) -> Path:
        """Where the mask of a source lies."""
        return self._files[source.source_id][1]

    def source_size(self, source: Source) -> tuple[int, int]:
        """(height, width) of a source image, from its header.

        Raises:
            DataError: If the file cannot be read.
        """
        if source.source_id not in self._sizes:
            self._sizes[source.source_id] = image_size(self.image_path(source))
        return self._sizes[source.source_id]

    def source_scale(self, source: Source) -> float:
        """How much the pixels of a source are enlarged; where it is squeezed, the mean of both."""
        if self.rule.kind == "resize":
            height, width = self.source_size(source)
            return self.rule.region_px / (height * width) ** 0.5
        return region_scale(self.manifest, self.rule)

    def source_hashes(self, source: Source) -> tuple[str, str]:
        """``pixel_sha256`` of image and mask as they are now; the manifest is not asked.

        Raises:
            DataError: If a file cannot be read.
        """
        return (
            pixel_sha256(read_image(self.image_path(source))),
            pixel_sha256(read_label_image(self.mask_path(source))),
        )

    def read(self, sample: Sample, *, seed: int = 0) -> Region:
        """Read one region.

        Safe to call from several threads; the last two sources of a windowed data set are kept
        decoded.

        Args:
            sample: One of ``samples``.
            seed: Of the crop of a window of the training split; other splits take the middle.

        Raises:
            DataError: If a file cannot be read, differs from the manifest's hash, the mask has
                another size than the image or holds unknown codes.
        """
        image = self._decoded("image", sample.source)
        label = self._decoded("mask", sample.source)
        if image.size != label.size:
            raise size_mismatch(self.mask_path(sample.source), label.size, image.size)
        return Region(
            image=self._region(sample, image.pixels, seed, _WHITE),
            label=self._region(sample, label.pixels, seed, self.scheme.outside_id),
            instances=label.instances,
            source_px=image.size,
            image_sha256=image.sha256,
            mask_sha256=label.sha256,
        )

    def read_label(self, sample: Sample, *, seed: int = 0) -> np.ndarray:
        """The label of ``read`` without decoding the image: (H, W) uint8.

        Raises:
            DataError: As ``read``, for the mask.
        """
        label = self._decoded("mask", sample.source).pixels
        return self._region(sample, label, seed, self.scheme.outside_id)

    def _region(self, sample: Sample, pixels: np.ndarray, seed: int, outside: int) -> np.ndarray:
        side = self.rule.region_px
        window = sample.window
        if window is None:
            resize = resize_image if pixels.ndim == 3 else resize_label
            return resize(pixels, (side, side))
        slack = max(0, window.height - side), max(0, window.width - side)
        if sample.split == self.manifest.default_train:
            down, right = window_offset(seed, sample.sample_id, *slack)
        else:
            down, right = centre_offset(*slack)
        top, left = window.top + down, window.left + right
        bottom = min(top + side, window.top + window.height)
        end = min(left + side, window.left + window.width)
        # A copy: a view would keep the whole source in memory.
        return pad_region(pixels[top:bottom, left:end], side, outside).copy()

    def _decoded(self, kind: str, source: Source) -> _Decoded:
        decode = self._decode_image if kind == "image" else self._decode_mask
        if self.rule.kind == "resize":  # each source is read once
            return decode(source)
        return self._latest.get((kind, source.source_id), lambda: decode(source))

    def _decode_image(self, source: Source) -> _Decoded:
        path = self.image_path(source)
        image = read_image(path)
        size, sha256 = image.shape[:2], pixel_sha256(image)
        verify_image(source, path, sha256)
        if self.rule.kind == "window":
            image = resize_image(image, self._scaled(size))
        return _Decoded(pixels=image, size=size, sha256=sha256)

    def _decode_mask(self, source: Source) -> _Decoded:
        path = self.mask_path(source)
        raw = read_label_image(path)
        size, sha256 = raw.shape, pixel_sha256(raw)
        verify_mask(source, path, sha256)
        instances = None
        label = self.scheme.apply(raw, str(path))
        if self.rule.kind == "window":
            label = resize_label(label, self._scaled(size))
        elif self.scheme.objects is not None:
            instances = self.scheme.object_map(raw)
        return _Decoded(pixels=label, size=size, sha256=sha256, instances=instances)

    def _scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        return scaled_size(*size, region_scale(self.manifest, self.rule))

    def _make_samples(self) -> tuple[Sample, ...]:
        if self.rule.kind == "resize":
            return tuple(
                Sample(sample_id=source.source_id, source=source) for source in self.sources
            )
        filtered = self.scheme.dont_care is not None and self.rule.max_dont_care < 1
        if filtered:
            logger.info("Reading %d masks for windows without content", len(self.sources))
        per_source = map_threads(self._windows_of, self.sources)
        samples = tuple(
            Sample(
                sample_id=f"{source.source_id}_r{window.row}c{window.col}",
                source=source,
                window=window,
            )
            for source, windows in zip(self.sources, per_source, strict=True)
            for window in windows
        )
        for split in self.splits:
            if not any(sample.split == split for sample in samples):
                raise DataError(
                    f"data set {self.name}: every window of split {split} is more than "
                    f"{self.rule.max_dont_care:.0%} don't care; check the codes of its manifest"
                )
        return samples

    def _windows_of(self, source: Source) -> list[Window]:
        size = self.source_size(source)
        check_size(source, self.image_path(source), size)
        assert self.rule.window_px is not None  # the rule's own check
        windows = plan_windows(*self._scaled(size), self.rule.window_px)
        if self.scheme.dont_care is None or self.rule.max_dont_care >= 1:
            return windows
        label = self._decode_mask(source)
        if label.size != size:
            raise size_mismatch(self.mask_path(source), label.size, size)
        return [
            window
            for window in windows
            if dont_care_share(label.pixels, window, self.scheme) <= self.rule.max_dont_care
        ]


def dataset_sha256(manifest: Manifest, rule: RegionRule | None = None) -> str:
    """Hash of what makes regions and labels from files (``Recipe.dataset_sha256``).

    The name, the codes of each class, the resolution and the region rule. Not the rows: a store
    grows with its data set, and holds the pixels of each sample against the sample's own mark.
    Nor where the files lie, their containers, titles, class names and colours.

    Args:
        rule: None for the manifest's own.
    """
    rule = rule or _rule_at(manifest, None)
    scheme = manifest.scheme
    names = [entry.name for entry in scheme.classes]
    identity: dict[str, Any] = {
        "name": manifest.name,
        "codes": [entry.codes for entry in scheme.classes],
        "dont_care": None if scheme.dont_care is None else scheme.dont_care.codes,
        "objects": None if scheme.objects is None else names.index(scheme.objects),
        "mpp": manifest.mpp,
        "rule": rule.to_dict(),
    }
    if rule.kind == "window":
        # Windows of the training split are cropped at random, others in the middle.
        train = manifest.default_train
        rows = manifest.sources
        identity["train"] = sorted(row.source_id for row in rows if row.split == train)
    return content_hash(identity)


def open_dataset(
    name_or_path: str | Path,
    *,
    data_root: Path | None = None,
    splits: Sequence[str] = (),
    mpp: float | None = None,
) -> Dataset:
    """Find the files of a data set.

    Args:
        name_or_path: As for ``load_manifest``.
        data_root: Folder below which the files lie. Else the one that the manifest records, else
            $PSD_DATA/NAME, else ./data/NAME.
        splits: Open these, which must be there whole. Empty: all of which any file is there; the
            others are skipped with a warning.
        mpp: Micrometres per pixel of the regions, instead of the manifest's; windows only.

    Raises:
        DataError: If the manifest is wrong, a split is unknown, not there or partly there, or
            the resolution cannot be had.
    """
    manifest = load_manifest(name_or_path)
    rule = _rule_at(manifest, mpp)
    for split in splits:
        if split not in manifest.splits:
            raise DataError(
                f"data set {manifest.name} has no split {shown(split)!r}; "
                f"there are {', '.join(manifest.splits)}"
            )
    root = data_root_of(manifest, data_root)
    files = find_files(manifest, root)
    chosen = _present_splits(manifest, root, files, splits)
    paths = {
        source_id: (image, mask)
        for source_id, (image, mask) in files.items()
        if image is not None and mask is not None
    }
    return Dataset(manifest, root, rule, chosen, paths)


def root_folder(manifest: Manifest, data_root: Path | None = None) -> tuple[Path, str]:
    """The data root, whether it is there or not, and which setting named it."""
    if data_root is not None:
        return Path(data_root), "--data-root"
    if manifest.root is not None:
        return manifest.root, "root of the manifest"
    if os.environ.get("PSD_DATA"):
        return Path(os.environ["PSD_DATA"]) / manifest.name, "PSD_DATA"
    return Path("data") / manifest.name, "the default; or give --data-root"


def data_root_of(manifest: Manifest, data_root: Path | None = None) -> Path:
    """The folder below which the files of a data set are looked for.

    An archive often unpacks into a folder of its own: where the root holds a single folder and
    nothing else, that one is meant.

    Raises:
        DataError: If there is no such folder.
    """
    root, option = root_folder(manifest, data_root)
    if not root.is_dir():
        raise DataError(
            f"data set {manifest.name}: there is no folder {shown(root)} ({option})"
            + _hint(manifest)
        )
    entries = [entry for entry in root.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
    expected = {
        PurePosixPath(path).parts[0]
        for source in manifest.sources
        for path in (source.image, source.mask)
    }
    if len(entries) == 1 and entries[0].is_dir() and entries[0].name not in expected:
        return entries[0]
    return root


def find_files(manifest: Manifest, root: Path) -> dict[str, tuple[Path | None, Path | None]]:
    """Where image and mask of each source lie; None for what is not there.

    The path of the manifest, or the same stem in another container, lossless ones first.
    """
    folders: dict[Path, dict[str, list[str]]] = {}

    def find(relative: str) -> Path | None:
        path = root / relative
        if path.parent not in folders:
            folders[path.parent] = _images_by_stem(path.parent)
        names = folders[path.parent].get(path.stem, [])
        if path.name in names:
            return path
        return path.parent / names[0] if names else None

    return {
        source.source_id: (find(source.image), find(source.mask)) for source in manifest.sources
    }


def verify_image(source: Source, path: Path, sha256: str) -> None:
    """Hold the decoded pixels of an image against the manifest.

    Decoders may round a JPEG's pixels differently. Where the manifest also knows the file, and it
    is that very file, the difference is a warning.

    Raises:
        DataError: If they differ.
    """
    if source.image_sha256 in ("", sha256):
        return
    if source.image_file_sha256 and is_jpeg(path) and file_sha256(path) == source.image_file_sha256:
        logger.warning(
            "%s: this JPEG decoder gives other pixels than the manifest's; the file is right",
            shown(path),
        )
        return
    raise _altered("image", source, path)


def verify_mask(source: Source, path: Path, sha256: str) -> None:
    """Hold the decoded codes of a mask against the manifest.

    Raises:
        DataError: If they differ.
    """
    if source.mask_sha256 not in ("", sha256):
        raise _altered("mask", source, path)


def check_size(source: Source, path: Path, size: tuple[int, int]) -> None:
    """Refuse an image whose size says that it was exported at another resolution.

    Raises:
        DataError: If a side is more than 2 % off the manifest's.
    """
    if source.size_px is None:
        return
    if any(
        abs(here - there) > max(2, _SIZE_TOLERANCE * there)
        for here, there in zip(size, source.size_px, strict=True)
    ):
        raise DataError(
            f"{shown(path)} is {size[0]} x {size[1]} px, the manifest says "
            f"{source.size_px[0]} x {source.size_px[1]}; get it at the manifest's resolution"
        )


def size_mismatch(mask: Path, mask_px: tuple[int, int], image_px: tuple[int, int]) -> DataError:
    """The error for a mask of another size than its image."""
    return DataError(
        f"{shown(mask)} is {mask_px[0]} x {mask_px[1]} px, its image "
        f"{image_px[0]} x {image_px[1]}; a mask must have the size of its image"
    )


def region_scale(manifest: Manifest, rule: RegionRule) -> float:
    """How much a source is scaled before it is cut into windows."""
    if rule.mpp is None or manifest.mpp is None:
        return 1.0
    return manifest.mpp / rule.mpp


class _Latest(Generic[Key, Value]):
    """The last few values that were made, each made once even where threads ask together."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, _Entry[Value]] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is None:
                entry = _Entry()
            self._entries[key] = entry
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        with entry.lock:  # one maker at a time; what raises is made again by the next
            if not entry.values:
                entry.values.append(make())
            return entry.values[0]

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self._size,)  # another process decodes for itself


class _Entry(Generic[Value]):
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: list[Value] = []


def _rule_at(manifest: Manifest, mpp: float | None) -> RegionRule:
    if mpp is None:
        return manifest.rule
    if manifest.rule.kind == "resize":
        raise DataError(
            f"data set {manifest.name} is resized to {manifest.rule.region_px} px; a resolution "
            "(--mpp) applies to data sets that are cut into windows"
        )
    if manifest.mpp is None:
        raise DataError(
            f"data set {manifest.name} does not say its own resolution; add mpp to "
            f"{shown(manifest.path)}"
        )
    check_mpp("mpp", mpp)
    return replace(manifest.rule, mpp=mpp)


def _images_by_stem(folder: Path) -> dict[str, list[str]]:
    """Image files of a folder, the preferred container of each stem first."""
    found: dict[str, list[str]] = {}
    try:
        entries = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return found
    for name in entries:
        stem, dot, suffix = name.rpartition(".")
        if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES:
            found.setdefault(stem, []).append(name)
    for names in found.values():
        names.sort(key=lambda name: IMAGE_SUFFIXES.index(Path(name).suffix.lower()))
    return found


def _hint(manifest: Manifest) -> str:
    name = reference(manifest)
    fetch = "" if manifest.fetch is None else f"; `psd data fetch {name}` gets it"
    return f"{fetch}; see `psd data show {name}` for what is expected and where to get it"


def _present_splits(
    manifest: Manifest,
    root: Path,
    files: dict[str, tuple[Path | None, Path | None]],
    wanted: Sequence[str],
) -> list[str]:
    """The splits to open: those wanted, else all that are there; whole, or it is an error."""
    hint = _hint(manifest)
    present = []
    for split in manifest.splits:
        if wanted and split not in wanted:
            continue
        rows = [source for source in manifest.sources if source.split == split]
        missing = [
            relative
            for source in rows
            for relative, path in zip(
                (source.image, source.mask), files[source.source_id], strict=True
            )
            if path is None
        ]
        if not missing:
            present.append(split)
        elif len(missing) < 2 * len(rows):
            listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise DataError(
                f"data set {manifest.name}, split {split}: {len(missing)} of {2 * len(rows)} "
                f"files are not under {shown(root)}: {listed}{hint}"
            )
        elif wanted:
            raise DataError(
                f"data set {manifest.name}: no file of split {split} is under {shown(root)} "
                f"(looked for {rows[0].image} and {len(missing) - 1} more){hint}"
            )
        else:
            logger.warning(
                "Split %s of %s is left out: none of its files is under %s",
                split,
                manifest.name,
                shown(root),
            )
    if not present:
        raise DataError(
            f"data set {manifest.name}: none of its files is under {shown(root)} "
            f"(looked for {manifest.sources[0].image}){hint}"
        )
    return present


def _altered(kind: str, source: Source, path: Path) -> DataError:
    return DataError(
        f"sample {source.source_id}: the pixels of {kind} {shown(path)} differ from the "
        "manifest's; get the file again, or write a new manifest for your own files"
    )
