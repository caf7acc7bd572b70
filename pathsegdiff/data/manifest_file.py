"""The two files of a manifest: read, and checked whole.

    NAME.toml   title, licence, citation, where to get it, label codes -> classes, region rule,
                how a command gets it ([fetch], optional)
    NAME.csv    one row per source image: sample_id, image, mask, split, group, pixel hashes

Manifests are passed around, and paths and ids of theirs reach the file system: nothing in them is
taken on trust.
"""

import csv
import io
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pathsegdiff
from pathsegdiff.data.fetch_table import FetchTable
from pathsegdiff.data.image import IMAGE_SUFFIXES, MAX_PIXELS, shown
from pathsegdiff.data.labels import LabelScheme
from pathsegdiff.data.regions import RegionRule, check_mpp
from pathsegdiff.errors import DataError

REQUIRED_COLUMNS = ("sample_id", "image", "mask", "split", "group")
#: Columns with a meaning of their own; all others are kept in ``Source.extra``.
_OPTIONAL_COLUMNS = ("image_sha256", "mask_sha256", "image_file_sha256", "height_px", "width_px")
_REQUIRED_KEYS = ("name", "title", "licence", "labels", "region", "splits")
_TEXTS = ("title", "licence", "citation", "homepage", "where", "layout")
_OPTIONAL_KEYS = (
    *_TEXTS[2:],
    "mpp",
    "grouped",
    "default_train",
    "default_eval",
    "root",
    "embedded",
    "fetch",
)
#: Also the name of files that are made from samples: no separator, no leading dot, not too long.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAME_RULE = "letters, digits, dots, underscores and hyphens, at most 128"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_TOML_BYTES = 1 << 20
_MAX_CSV_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Source:
    """One row of a manifest: a source image with its mask.

    Attributes:
        source_id: Unique; letters, digits, dots, underscores and hyphens.
        image, mask: Paths relative to the data root, with forward slashes.
        split: Part of the official split.
        group: Patient, case or slide.
        image_sha256, mask_sha256: ``pixel_sha256`` of the decoded pixels, or "".
        image_file_sha256: Of a JPEG file itself, or "": decoders may differ in a JPEG's pixels.
        size_px: (height, width), or None.
        extra: The other columns.
    """

    source_id: str
    image: str
    mask: str
    split: str
    group: str
    image_sha256: str = ""
    mask_sha256: str = ""
    image_file_sha256: str = ""
    size_px: tuple[int, int] | None = None
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a data set is made of, whether or not its files are here.

    Attributes:
        name: As in ``psd data list``, or of the user's own manifest.
        title, licence, citation, homepage: For people.
        where: How to get it.
        layout: What is expected where below the data root.
        mpp: Micrometres per pixel of the source images, or None.
        scheme: What mask codes mean.
        rule: How a source becomes regions.
        splits: Names in order.
        default_train, default_eval: The splits that training and evaluation take unless told.
        grouped: Whether no group stands in two splits.
        sources: In the order of the file.
        path: Of the TOML file.
        root: Of the files, where the manifest itself says so; else None.
        fetch: How ``psd data fetch`` gets the files; None where it cannot.
    """

    name: str
    title: str
    licence: str
    citation: str
    homepage: str
    where: str
    layout: str
    mpp: float | None
    scheme: LabelScheme
    rule: RegionRule
    splits: tuple[str, ...]
    default_train: str
    default_eval: str
    grouped: bool
    sources: tuple[Source, ...]
    path: Path
    root: Path | None
    fetch: FetchTable | None

    @property
    def has_whole_objects(self) -> bool:
        """Whether regions are whole images whose masks number objects."""
        return self.scheme.objects is not None and self.rule.kind == "resize"


def list_manifests() -> list[str]:
    """Names of the data sets that are known, sorted."""
    return sorted({path.stem for folder in _manifest_folders() for path in folder.glob("*.toml")})


def load_manifest(name_or_path: str | Path) -> Manifest:
    """Read a manifest and check all of it.

    Args:
        name_or_path: A name of ``list_manifests``, or the path of a TOML file.

    Raises:
        DataError: If there is none, or something in it is missing, unknown or hostile.
    """
    path = _find_manifest(name_or_path)
    table = _read_toml(path)
    _check_keys(path, table)
    texts = {key: _text(path, key, table.get(key, "")) for key in _TEXTS}
    name = table["name"]
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise DataError(f"{shown(path)}: name must be {NAME_RULE}, got {shown(name)!r}")
    splits = table["splits"]
    if (
        not isinstance(splits, list)
        or not splits
        or not all(isinstance(split, str) and NAME.fullmatch(split) for split in splits)
        or len(set(splits)) != len(splits)
    ):
        raise DataError(f"{shown(path)}: splits must be a list of different names")
    defaults = {
        "default_train": "train" if "train" in splits else splits[0],
        "default_eval": "test" if "test" in splits else splits[-1],
    }
    for key in defaults:
        defaults[key] = table.get(key, defaults[key])
        if defaults[key] not in splits:
            raise DataError(
                f"{shown(path)}: {key} must be one of {', '.join(splits)}, "
                f"got {shown(defaults[key])!r}"
            )
    grouped = table.get("grouped", False)
    if not isinstance(grouped, bool):
        raise DataError(f"{shown(path)}: grouped must be true or false, got {shown(grouped)!r}")
    mpp = table.get("mpp")
    try:
        check_mpp("mpp", mpp)
        scheme = LabelScheme.from_dict(table["labels"])
        rule = RegionRule.from_dict(table["region"])
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from None
    if rule.kind == "window" and rule.mpp is not None and mpp is None:
        raise DataError(f"{shown(path)}: region has an mpp, so the manifest needs one too")
    if rule.kind == "window" and scheme.objects is not None:
        raise DataError(
            f"{shown(path)}: objects are counted only where whole images are resized; "
            "take labels.objects out, or use region kind resize"
        )
    sources = _read_sources(path.with_suffix(".csv"), splits)
    if grouped:
        _check_groups(path.with_suffix(".csv"), sources)
    fetch = None
    if "fetch" in table:
        try:
            fetch = FetchTable.from_dict(table["fetch"])
            fetch.check_paths([file for row in sources for file in (row.image, row.mask)])
        except DataError as error:
            raise DataError(f"{shown(path)}: {error}") from None
    return Manifest(
        name=name,
        **texts,
        mpp=None if mpp is None else float(mpp),
        scheme=scheme,
        rule=rule,
        splits=tuple(splits),
        **defaults,
        grouped=grouped,
        sources=sources,
        path=path,
        root=_own_root(path, table),
        fetch=fetch,
    )


def reference(manifest: Manifest) -> str:
    """What a user calls this manifest on the command line."""
    built_in = manifest.path.parent in _manifest_folders()
    return manifest.name if built_in else shown(manifest.path)


def _manifest_folders() -> list[Path]:
    """Of an installed wheel, and of a checkout."""
    package = Path(pathsegdiff.__file__).parent
    folders = (package / "data_manifests", package.parent / "data_manifests")
    return [folder for folder in folders if folder.is_dir()]


def _find_manifest(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if not text.endswith(".toml") and NAME.fullmatch(text):
        for folder in _manifest_folders():
            if (folder / f"{text}.toml").is_file():
                return folder / f"{text}.toml"
        raise DataError(
            f"no data set is called {text!r}; there are {', '.join(list_manifests())}, or give "
            "the path of a manifest (.toml; `psd data init` writes one)"
        )
    path = Path(name_or_path)
    if "\0" in text or not path.is_file():
        raise DataError(f"{shown(text)}: there is no such manifest; `psd data init` writes one")
    if path.suffix != ".toml":
        raise DataError(f"{shown(text)} is no manifest; give the .toml file")
    return path


def _read_limited(path: Path, limit: int) -> str:
    try:
        if path.stat().st_size > limit:
            raise DataError(f"{shown(path)} is larger than {limit >> 20} MiB: that is no manifest")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{shown(path)}: there is no such file; a manifest is NAME.toml beside NAME.csv"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{shown(path)} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror or error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    text = _read_limited(path, _MAX_TOML_BYTES)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise DataError(f"{shown(path)} is not valid TOML: {shown(error)}") from None
    except RecursionError:
        raise DataError(f"{shown(path)} is not valid TOML: it is nested too deeply") from None


def _check_keys(path: Path, table: dict[str, Any]) -> None:
    known = (*_REQUIRED_KEYS, *_OPTIONAL_KEYS)
    for key in _REQUIRED_KEYS:
        if key not in table:
            raise DataError(f"{shown(path)} lacks {key}; needed are {', '.join(_REQUIRED_KEYS)}")
    for key in table:
        if key not in known:
            raise DataError(f"{shown(path)}: unknown key {shown(key)!r}; known: {', '.join(known)}")


def _text(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > 10_000:
        raise DataError(f"{shown(path)}: {key} must be a text of at most 10,000 characters")
    # These are printed: no control characters, which could drive a terminal.
    lines = [value] if key in ("title", "licence", "homepage") else value.split("\n")
    if not all(line.isprintable() for line in lines):
        raise DataError(f"{shown(path)}: {key} holds a control character; write it as plain text")
    return value.strip()


def _own_root(path: Path, table: dict[str, Any]) -> Path | None:
    embedded, root = table.get("embedded"), table.get("root")
    if embedded is not None:
        if not isinstance(embedded, str) or not NAME.fullmatch(embedded):
            raise DataError(f"{shown(path)}: embedded must be {NAME_RULE}")
        return Path(__file__).parent / embedded
    if root is None:
        return None
    if not isinstance(root, str) or not root or not root.isprintable():
        raise DataError(f"{shown(path)}: root must be the path of a folder, got {shown(root)!r}")
    return path.parent / root


def _read_sources(path: Path, splits: Sequence[str]) -> tuple[Source, ...]:
    text = _read_limited(path, _MAX_CSV_BYTES)
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    sources: list[Source] = []
    seen: dict[str, str] = {}
    try:
        header = next(rows, [])
        _check_header(path, header)
        for row in rows:
            where = f"{shown(path)}, line {rows.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(f"{where}: {len(row)} fields, the header has {len(header)}")
            source = _read_source(where, dict(zip(header, row, strict=True)), splits)
            # Ids name files, which some systems do not tell apart by case.
            for kind, value in (("sample_id", source.source_id), ("image", source.image)):
                if seen.setdefault(f"{kind} {value.casefold()}", where) is not where:
                    raise DataError(
                        f"{where}: {kind} {value!r} stands twice; each row is an image of its own"
                    )
            sources.append(source)
    except csv.Error as error:
        raise DataError(f"{shown(path)}, line {rows.line_num}: {shown(error)}") from None
    if not sources:
        raise DataError(f"{shown(path)} lists no images")
    for split in splits:
        if not any(source.split == split for source in sources):
            raise DataError(f"{shown(path)}: no row is of split {split!r}")
    return tuple(sources)


def _check_header(path: Path, header: Sequence[str]) -> None:
    missing = [column for column in REQUIRED_COLUMNS if column not in header]
    other = next((mark for mark in ";\t" if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        raise DataError(
            f"{shown(path)} has {other!r} between its columns; save it with commas between them"
        )
    if missing:
        raise DataError(
            f"{shown(path)} lacks the column {missing[0]}; needed are {', '.join(REQUIRED_COLUMNS)}"
        )
    for column in header:
        if not column.isprintable() or len(column) > 100:
            raise DataError(
                f"{shown(path)}: the name of column {shown(column)[:100]!r} must be one line of at "
                "most 100 printable characters; write it anew"
            )
    if len(set(header)) != len(header):
        raise DataError(f"{shown(path)}: a column stands twice in the header")


def _read_source(where: str, row: dict[str, str], splits: Sequence[str]) -> Source:
    for column, value in row.items():
        if not value.isprintable() or len(value) > 1000:
            raise DataError(
                f"{where}: {shown(column)} holds a control character or more than 1000 "
                f"characters: {shown(value)[:80]!r}"
            )
    if not NAME.fullmatch(row["sample_id"]):
        raise DataError(f"{where}: sample_id must be {NAME_RULE}, got {row['sample_id']!r}")
    for column in ("image", "mask"):
        _check_relative(f"{where}: {column}", row[column])
    if row["split"] not in splits:
        raise DataError(f"{where}: split must be one of {', '.join(splits)}, got {row['split']!r}")
    if not row["group"].strip():
        raise DataError(f"{where}: group is empty; repeat the sample_id where each stands alone")
    for column in ("image_sha256", "mask_sha256", "image_file_sha256"):
        if row.get(column) and not _SHA256.fullmatch(row[column]):
            raise DataError(f"{where}: {column} must be 64 hex digits, got {row[column]!r}")
    known = (*REQUIRED_COLUMNS, *_OPTIONAL_COLUMNS)
    return Source(
        source_id=row["sample_id"],
        image=row["image"],
        mask=row["mask"],
        split=row["split"],
        group=row["group"],
        image_sha256=row.get("image_sha256", ""),
        mask_sha256=row.get("mask_sha256", ""),
        image_file_sha256=row.get("image_file_sha256", ""),
        size_px=_size(where, row.get("height_px", ""), row.get("width_px", "")),
        extra={column: value for column, value in row.items() if column not in known},
    )


def _check_relative(where: str, value: str) -> None:
    """Only a path that stays below the data root on every system."""
    parts = value.split("/")
    if (
        not value
        or "\\" in value
        or PurePosixPath(value).is_absolute()
        or re.match(r"[A-Za-z]:", value)
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise DataError(
            f"{where} must be a path below the data root with forward slashes and no '..', "
            f"got {value!r}"
        )
    if PurePosixPath(value).suffix.lower() not in IMAGE_SUFFIXES:
        raise DataError(f"{where} must end in one of {', '.join(IMAGE_SUFFIXES)}, got {value!r}")


def _size(where: str, height: str, width: str) -> tuple[int, int] | None:
    if not height and not width:
        return None
    sides = [int(text) if re.fullmatch(r"[0-9]{1,7}", text) else 0 for text in (height, width)]
    if not 0 < sides[0] * sides[1] <= MAX_PIXELS:
        raise DataError(
            f"{where}: height_px and width_px must be integers above 0, of at most "
            f"{MAX_PIXELS:,} pixels together, got {height!r} and {width!r}"
        )
    return sides[0], sides[1]


def _check_groups(path: Path, sources: Iterable[Source]) -> None:
    split_of: dict[str, str] = {}
    for source in sources:
        split = split_of.setdefault(source.group, source.split)
        if split != source.split:
            raise DataError(
                f"{shown(path)}: group {source.group!r} stands in {split} and in {source.split}; "
                "move it whole into one, or set grouped = false in the manifest"
            )
