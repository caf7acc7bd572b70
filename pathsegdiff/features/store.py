"""Feature store: stitched UNet taps in Zarr v3, written by stage 1, read by stage 2 (no torch).

    STORE/zarr.json            format, recipe, fingerprint, dataset, model, levels, provenance
      stride_<s>  (S, C, H/s, W/s) float16     the taps of one spatial size; s = 4, 8, 16, 32;
                                               float32 or int8 where the recipe says so
      tokens      (S, D, H/16, W/16) float16   the encoder's patch tokens (only where asked for)
      scale_<level> (S, C) float32             only where levels are int8: value = int8 * scale
      label       (S, H, W) uint8              class ids; >= number of classes: not counted
      image       (S, H, W, 3) uint8           the region, for overlays
      embedding   (S, P, D) float32            the encoder's raw vector of each patch, row-major
      instances/<index> (H0, W0) int32         objects at the source's size, where they are counted
    STORE/samples.json         which sample is which index of S; checksums of every zarr.json
    STORE/backup.json          a second copy of samples.json and of every zarr.json (``backup``)
    STORE/marks/<index>.json   written last: the sample's files with sizes and checksums

A sample counts only once its mark exists. zarr reads an absent chunk as zeros, so a reader first
holds the sample's files against the mark; a damaged chunk fails its own CRC-32C when it is read.
Table and marks carry a checksum of their own (``seal``).
"""

import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.errors
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from pathsegdiff.config import ALL_TAPS, Recipe
from pathsegdiff.data.image import MAX_PIXELS
from pathsegdiff.data.labels import LabelScheme
from pathsegdiff.data.regions import RegionRule
from pathsegdiff.errors import MALFORMED, ConfigError, DataError, StoreError
from pathsegdiff.features.layout import GRID_STRIDE, Level
from pathsegdiff.features.quantize import SCALE_PREFIX, array_dtype, dequantize
from pathsegdiff.features.seal import unsealed
from pathsegdiff.features.shards import (
    ShardFormat,
    decode_chunk,
    is_plain_chunk,
    read_shard,
    shard_format,
)
from pathsegdiff.grid import patchwise_matrix

FORMAT = 2
ATTRIBUTE = "pathsegdiff"
SAMPLES_KEY = "samples.json"
BACKUP_KEY = "backup.json"
MARKS_FOLDER = "marks"
#: A table of samples above this is refused before it is read; 10,000 samples have 3 MB.
MAX_TABLE_BYTES = 1 << 27
#: And so are other JSON files.
_MAX_JSON_BYTES = 1 << 22
#: Also the name of files that are made of a sample: no separator, no leading dot, not too long.
_SAMPLE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,159}")
#: A file of a sample, as its mark lists it; nothing outside the store.
_SAMPLE_FILE = re.compile(r"instances/[0-9]+/zarr\.json|[a-z0-9_]+(/[0-9]+)?/c(/[0-9]+)+")
#: Of other texts of a store.
_MAX_TEXT = 10_000
#: The most that a bundle can have of what a store says of its model.
_MODEL_NUMBERS = {"embed_dim": 1 << 16, "head_width": 1 << 12, "patch_px": 1 << 10}
_MARK = re.compile(r"([0-9]{1,9})\.json")
#: All that a writer ever uses inside an array.
_CODECS = ("bytes", "zstd", "crc32c")
#: (bytes, CRC-32) of a file.
Checksum = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class StoredSample:
    """One region of the store.

    Attributes:
        sample_id: Unique within the data set.
        index: Its place on the first axis of every array.
        split: Part of the official split.
        group: Patient, case or slide; never in two parts of a grouped split.
        source_px: (height, width) of the image that it was made from.
        extra: Further columns of the manifest ("patient_fold").
    """

    sample_id: str
    index: int
    split: str
    group: str
    source_px: tuple[int, int]
    extra: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the index is the place in the list."""
        return {
            "sample_id": self.sample_id,
            "split": self.split,
            "group": self.group,
            "source_px": list(self.source_px),
            "extra": self.extra,
        }

    @classmethod
    def from_dict(cls, index: int, values: dict[str, Any]) -> "StoredSample":
        """Read what ``to_dict`` wrote; KeyError, TypeError or ValueError where it did not."""
        if not _SAMPLE_ID.fullmatch(values["sample_id"]):
            raise ValueError(f"sample_id {values['sample_id']!r:.60}")
        return cls(
            sample_id=values["sample_id"],
            index=index,
            split=_line(values["split"]),
            group=_line(values["group"]),
            source_px=_pair(values["source_px"]),
            extra={_line(key): _line(value) for key, value in values["extra"].items()},
        )


@dataclass(frozen=True, kw_only=True)
class DatasetCard:
    """What stage 2 needs to know of the data set, without its manifest.

    Attributes:
        source_mpp: Micrometres per pixel of its images, where the manifest states it.
        typical_source_px: The commonest (height, width) of its images at their own mpp;
            prediction scales a new image as the region rule scaled these.
        largest_source_px: The largest height and the largest width.
    """

    name: str
    title: str
    licence: str
    scheme: LabelScheme
    rule: RegionRule
    splits: tuple[str, ...]
    default_train: str
    default_eval: str
    grouped: bool
    source_mpp: float | None
    typical_source_px: tuple[int, int]
    largest_source_px: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "title": self.title,
            "licence": self.licence,
            "scheme": self.scheme.to_dict(),
            "rule": self.rule.to_dict(),
            "splits": list(self.splits),
            "default_train": self.default_train,
            "default_eval": self.default_eval,
            "grouped": self.grouped,
            "source_mpp": self.source_mpp,
            "typical_source_px": list(self.typical_source_px),
            "largest_source_px": list(self.largest_source_px),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DatasetCard":
        """Read what ``to_dict`` wrote; KeyError, TypeError, ValueError or DataError otherwise."""
        return cls(
            name=_line(values["name"]),
            title=_line(values["title"]),
            licence=_line(values["licence"]),
            scheme=LabelScheme.from_dict(values["scheme"]),
            rule=RegionRule.from_dict(values["rule"]),
            splits=tuple(_line(split) for split in values["splits"]),
            default_train=_line(values["default_train"]),
            default_eval=_line(values["default_eval"]),
            grouped=bool(values["grouped"]),
            source_mpp=None if values["source_mpp"] is None else float(values["source_mpp"]),
            typical_source_px=_pair(values["typical_source_px"]),
            largest_source_px=_pair(values["largest_source_px"]),
        )


class FeatureStore:
    """A store open for reading; only complete samples exist for it.

    Attributes:
        path: As it was given.
        recipe: What decided the values.
        fingerprint: Of the recipe.
        provenance: Versions, device and command that made it.
        card: The data set.
        model: name, sha256, trained, head_width, embed_dim and patch_px of the bundle.
        levels: By name, finest first.
        tokens_level: The encoder's patch tokens, or None.
    """

    def __init__(self, path: str | Path, group: zarr.Group) -> None:
        self.path = str(path)
        self._group = group
        self._checked: set[int] = set()
        self._arrays: dict[str, zarr.Array] = {}
        self._formats: dict[str, ShardFormat | None] = {}
        try:
            self._read_attributes(dict(group.attrs))
        except StoreError:
            self._refuse_altered_attributes()
            raise
        self.reload()
        self._check_metadata("zarr.json")

    @classmethod
    def open(cls, path: str | Path) -> "FeatureStore":
        """Open a store for reading.

        Raises:
            StoreError: If nothing is there, or it is no feature store of this format.
        """
        return cls(path, open_group(path))

    def reload(self) -> None:
        """Look again at which samples exist and are complete (another process may be writing)."""
        # Marks first: a writer lists a sample before it marks it, so no mark can be without a row.
        self._complete = self._read_complete()
        self._samples, self._metadata = self._read_table()
        self._arrays.clear()  # they may have grown
        self._formats.clear()
        if self._complete and max(self._complete) >= len(self._samples):
            raise StoreError(
                f"{self.path}: {SAMPLES_KEY} lists {len(self._samples)} samples, but number "
                f"{max(self._complete)} is marked complete; {_mend(self.path)}"
            )

    # -- what it is --

    @cached_property
    def tap_names(self) -> tuple[str, ...]:
        """In tap order, which is the channel order of the dense map."""
        return self.recipe.taps

    @property
    def head_levels(self) -> tuple[Level, ...]:
        """What a head can read: the levels, and the tokens where the store has them."""
        tokens = () if self.tokens_level is None else (self.tokens_level,)
        return (*self.levels.values(), *tokens)

    @property
    def metadata_keys(self) -> list[str]:
        """Every zarr.json of the store, but for those of instances."""
        groups = ["zarr.json"]
        if self.card.scheme.objects is not None:
            groups.append("instances/zarr.json")
        return [*groups, *(f"{name}/zarr.json" for name in self.array_shapes)]

    @cached_property
    def array_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape of one sample and dtype of every array but ``instances``."""
        return array_shapes(
            self.levels, self.tokens_level, self.card.rule, self.model, self.recipe.dtype
        )

    @cached_property
    def num_channels(self) -> int:
        """Of the dense map: 7296 for every tap of the paper's model."""
        return sum(level.channels for level in self.levels.values())

    @property
    def region_px(self) -> int:
        """Side of a region in pixels."""
        return self.card.rule.region_px

    @property
    def patch_px(self) -> int:
        """Side of a patch in pixels."""
        return self.card.rule.patch_px

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a region."""
        return self.region_px // self.patch_px

    def samples(self, split: str | None = None) -> tuple[StoredSample, ...]:
        """The complete samples of a split, or of all of them, in the order of their index."""
        return tuple(
            sample
            for sample in self._samples
            if sample.index in self._complete and (split is None or sample.split == split)
        )

    def registered(self) -> tuple[StoredSample, ...]:
        """Every sample that an extraction has planned so far, complete or not."""
        return tuple(self._samples)

    def is_complete(self, sample: StoredSample) -> bool:
        """Whether the sample has its completion mark."""
        return sample.index in self._complete

    # -- reading --

    def read_level(
        self,
        sample: StoredSample,
        level: str,
        *,
        rows: slice | None = None,
        columns: slice | None = None,
        taps: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Features of one sample at one level.

        Args:
            rows, columns: Cells to read; all of them where None.
            taps: Some of the level's, all where None. Only their bytes are read.

        Returns:
            (C, m, n) in the stored dtype, float32 of a store of int8. Element (c, i, j) is centred
            on region pixel row ``(i + 0.5) * stride``, column ``(j + 0.5) * stride``.

        Raises:
            StoreError: If the sample is incomplete or damaged.
            KeyError: If there is no such level, or a tap does not belong to it.
        """
        spec = self.level(level)
        wanted = [tap.name for tap in spec.taps] if taps is None else list(taps)
        missing = [name for name in wanted if name not in {tap.name for tap in spec.taps}]
        if missing:
            raise KeyError(f"{level} has no tap {missing[0]!r}")
        runs = _runs([tap for tap in spec.taps if tap.name in wanted])
        parts = [
            self._read_features(sample, level, (slice(start, stop), rows, columns))
            for start, stop in runs
        ]
        if self.recipe.dtype == "int8":
            scales = self._read(sample, f"{SCALE_PREFIX}{level}", ())
            parts = [
                dequantize(part, scales[start:stop])
                for part, (start, stop) in zip(parts, runs, strict=True)
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def level(self, name: str) -> Level:
        """The level of that name, the tokens included; KeyError if there is none."""
        if name == "tokens" and self.tokens_level is not None:
            return self.tokens_level
        return self.levels[name]

    def label(self, sample: StoredSample) -> np.ndarray:
        """(H, W) uint8 class ids; an id of ``card.scheme.num_classes`` or more is not counted."""
        return self._read(sample, "label", ())

    def image(self, sample: StoredSample) -> np.ndarray:
        """(H, W, 3) uint8 RGB region."""
        return self._read(sample, "image", ())

    def embedding(self, sample: StoredSample) -> np.ndarray:
        """(P, D) float32: the encoder's raw vector of each patch, row-major."""
        return self._read(sample, "embedding", ())

    def instances(self, sample: StoredSample) -> np.ndarray | None:
        """(H0, W0) int32 objects at the source's own size, or None where none are counted."""
        if self.card.scheme.objects is None:
            return None
        return self._read(sample, f"instances/{sample.index}", None)

    def dense(self, sample: StoredSample) -> np.ndarray:
        """The paper's dense map f: every tap on the stride-4 grid, in tap order.

        Bilinear per patch (equation 4), so that nothing crosses a patch border.

        Returns:
            (C, H/4, W/4) float32; (7296, 192, 192) for a 768 px region at paper size.
        """
        cells = self.patch_px // GRID_STRIDE
        maps: dict[str, np.ndarray] = {}
        for level in self.levels.values():
            features = self.read_level(sample, level.name).astype(np.float32)
            if level.stride != GRID_STRIDE:
                matrix = patchwise_matrix(self.patches_per_side, level.cells_per_patch, cells)
                features = matrix @ features @ matrix.T
            for tap in level.taps:
                maps[tap.name] = features[tap.start : tap.stop]
        return np.concatenate([maps[tap] for tap in ALL_TAPS if tap in maps])

    # -- integrity --

    def check_arrays(self) -> None:
        """Open every array, whatever samples it holds.

        Raises:
            StoreError: If one is missing, or has another shape or dtype than the store says.
        """
        self.check_metadata()
        for name in self.array_shapes:
            self._array(name)

    def check_metadata(self) -> None:
        """Hold every zarr.json against the table of samples, where there is one yet.

        Raises:
            StoreError: If one is missing or damaged.
        """
        for key in self._metadata:
            self._check_metadata(key)

    def check_sample(self, sample: StoredSample) -> None:
        """Hold the sample's files against its mark (existence and size, once per reader).

        Raises:
            StoreError: If mark or file is missing, the mark unreadable, a file of another size.
        """
        if sample.index in self._checked:
            return
        for key, (size, _) in self.read_mark(sample)["files"].items():
            there = self.size(key)
            if there != size:
                found = "is missing" if there is None else f"has {there} bytes instead of {size}"
                raise StoreError(
                    f"{self.path}: sample {sample.sample_id} is damaged, {key} {found}; "
                    f"{_mend(self.path)}"
                )
        self._checked.add(sample.index)

    def read_mark(self, sample: StoredSample) -> dict[str, Any]:
        """The completion mark: files {key: (bytes, CRC-32)}, image_sha256, mask_sha256.

        Raises:
            StoreError: If there is none, it is unreadable, or speaks of another sample.
        """
        content = self._get_json(mark_key(sample.index))
        if content is None:
            raise StoreError(
                f"{self.path}: sample {sample.sample_id} is not complete; "
                "run the extraction again to finish it"
            )
        try:
            mark = unsealed(content)
            files = {str(k): (int(size), int(crc)) for k, (size, crc) in mark["files"].items()}
            hashes = {name: str(mark[name]) for name in ("image_sha256", "mask_sha256")}
            if mark["sample_id"] != sample.sample_id or not files:
                raise ValueError("it speaks of another sample")
            for key in files:
                if not _SAMPLE_FILE.fullmatch(key):
                    raise ValueError(f"it lists {key!r:.60}")
        except MALFORMED as error:
            raise StoreError(
                f"{self.path}: the completion mark of sample {sample.sample_id} is damaged "
                f"({error!s:.200}); {_mend(self.path)}"
            ) from None
        return {"files": files, **hashes}

    def get(self, key: str) -> bytes | None:
        """The bytes of one file of the store, or None."""
        buffer = sync(self._group.store.get(self._key(key), default_buffer_prototype()))
        return None if buffer is None else buffer.to_bytes()

    def size(self, key: str) -> int | None:
        """The bytes that one file of the store has, or None."""
        try:
            return int(sync(self._group.store.getsize(self._key(key))))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _get_json(self, key: str) -> bytes | None:
        """As ``get``; a file that no honest store has is refused before it is read."""
        size = self.size(key)
        if size is not None and size > _MAX_JSON_BYTES:
            raise StoreError(
                f"{self.path}: {key} has {size} bytes, more than any store's; {_mend(self.path)}"
            )
        return None if size is None else self.get(key)

    def bytes_of(self, sample: StoredSample) -> dict[str, int]:
        """Bytes on disk of one complete sample, by array."""
        sizes: dict[str, int] = {}
        for key, (size, _) in self.read_mark(sample)["files"].items():
            array = key.split("/", 1)[0]
            sizes[array] = sizes.get(array, 0) + size
        return sizes

    def file_sizes(self, sample: StoredSample) -> list[int]:
        """Bytes of each file of one complete sample, its mark among them."""
        sizes = [size for size, _ in self.read_mark(sample)["files"].values()]
        return [*sizes, self.size(mark_key(sample.index)) or 0]

    # -- inside --

    def _key(self, key: str) -> str:
        prefix = self._group.path
        return f"{prefix}/{key}" if prefix else key

    def _array(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            if not name.startswith("instances/"):
                self._check_metadata(f"{name}/zarr.json")
            try:
                self._check_layout(name)
                array = self._group[name]
                if not isinstance(array, zarr.Array):
                    raise ValueError("it is no array")
            except (*MALFORMED, zarr.errors.BaseZarrError) as error:
                raise StoreError(
                    f"{self.path}: array {name} is missing or damaged ({error!s:.200}); "
                    f"{_mend(self.path)}"
                ) from None
            if name.startswith("instances/"):
                return array  # of one sample: kept, they would fill the memory of a long pass
            self._arrays[name] = array
        return self._arrays[name]

    def _check_metadata(self, key: str) -> None:
        """Hold a zarr.json against the checksum in the table of samples, where there is one yet.

        Raises:
            StoreError: If it is another.
        """
        for _ in range(2):
            accepted = self._metadata.get(key, ())
            if not self._metadata or checksum(self._get_json(key)) in accepted:
                return
            self.reload()  # another process may have registered samples since
        what = f"array {key.split('/', 1)[0]}" if "/" in key else "the store itself"
        raise StoreError(
            f"{self.path}: {what} is missing or damaged ({key} has another checksum than "
            f"{SAMPLES_KEY} says); {_mend(self.path)}"
        )

    def _check_instances(self, sample: StoredSample, key: str) -> None:
        if checksum(self._get_json(key)) != self.read_mark(sample)["files"].get(key):
            raise StoreError(
                f"{self.path}: sample {sample.sample_id} is damaged, {key} has another checksum; "
                f"{_mend(self.path)}"
            )

    def _check_layout(self, name: str) -> None:
        """An array must be what a writer makes, before zarr makes anything of its metadata.

        Its shape and dtype are those that the store says, a sample is one file, and no codec stands
        in it but those that a writer uses: so a row unpacks to as many bytes as the store says.

        Raises:
            ValueError, or another of ``MALFORMED``: If it is something else.
        """
        metadata = json.loads(self._get_json(f"{name}/zarr.json") or b"null")
        if metadata is None:
            raise ValueError("there is no such file")
        rows, *shape = metadata["shape"]
        if name.startswith("instances/"):
            shape, row, dtype = [rows, *shape], [], "int32"
            sound = len(shape) == 2 and all(_whole(side) > 0 for side in shape)
            if not sound or math.prod(shape) > MAX_PIXELS:
                raise ValueError(f"objects of shape {shape!r:.60}")
            expected = shape
        else:
            sides, dtype = self.array_shapes[name]
            row, expected = [1], list(sides)
            if not 0 <= _whole(rows) < 1 << 32:
                raise ValueError(f"it has {rows!r:.60} rows")
        if shape != expected or metadata["data_type"] != dtype:
            raise ValueError(
                f"it has rows of shape {shape!r:.60} and dtype {metadata['data_type']!r:.60}, "
                f"the store says {expected} and {dtype}"
            )
        if (
            metadata["node_type"] != "array"
            or metadata["chunk_grid"]["name"] != "regular"
            or metadata["chunk_grid"]["configuration"]["chunk_shape"] != [*row, *expected]
            or metadata.get("storage_transformers")
        ):
            raise ValueError("a sample of it is not one file")
        codecs = metadata["codecs"]
        if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
            settings = codecs[0]["configuration"]
            chunk = settings["chunk_shape"]
            sides_of = zip([*row, *expected], chunk, strict=True)
            if not all(_whole(part) > 0 and side % part == 0 for side, part in sides_of):
                raise ValueError(f"chunks of {chunk!r:.60} do not tile {expected}")
            if not {codec["name"] for codec in settings["index_codecs"]} <= {"bytes", "crc32c"}:
                raise ValueError("its index has an unknown codec")
            codecs = settings["codecs"]
        for codec in codecs:
            if codec["name"] not in _CODECS:
                raise ValueError(f"it has the codec {codec['name']!r:.60}")

    def _read(
        self, sample: StoredSample, name: str, where: tuple[slice | None, ...] | None
    ) -> np.ndarray:
        if sample.index not in self._complete:
            raise StoreError(
                f"{self.path}: sample {sample.sample_id} is not complete; "
                "run the extraction again to finish it"
            )
        self.check_sample(sample)
        if name.startswith("instances/"):
            self._check_instances(sample, f"{name}/zarr.json")
        array = self._array(name)
        try:
            if not where:
                # One chunk, which zarr would unpack to whatever it claims.
                codecs: Any = array.metadata.to_dict()["codecs"]
                if not is_plain_chunk(list(codecs)):
                    raise ValueError("its codecs are not those of a store")
                shape = array.shape if where is None else array.shape[1:]
                start = f"{name}/c/" if where is None else f"{name}/c/{sample.index}/"
                key = start + "/".join("0" for _ in shape)
                return decode_chunk(self.get(key) or b"", shape, array.dtype)
            selection = tuple(slice(None) if part is None else part for part in where)
            row: tuple[int | slice, ...] = (sample.index, *selection)
            return np.asarray(array[row])
        except (*MALFORMED, RuntimeError, zarr.errors.BaseZarrError) as error:
            # A chunk whose checksum or compressed stream is wrong.
            raise StoreError(
                f"{self.path}: sample {sample.sample_id} is damaged in {name} ({error!s:.200}); "
                f"{_mend(self.path)}"
            ) from None

    def _read_features(
        self, sample: StoredSample, name: str, where: tuple[slice | None, ...]
    ) -> np.ndarray:
        """As ``_read``, several times faster where the store lies on a local disk."""
        array = self._array(name)
        if name not in self._formats:
            codecs: Any = array.metadata.to_dict()["codecs"]
            local = isinstance(array.store, LocalStore)
            self._formats[name] = shard_format(codecs) if local else None
        shard = self._formats[name]
        if shard is None or sample.index not in self._complete:
            return self._read(sample, name, where)
        self.check_sample(sample)
        root = array.store.root  # type: ignore[attr-defined]
        file = root / self._key(row_key(name, sample.index, array.ndim - 1))
        selection = [slice(None) if part is None else part for part in where]
        try:
            return read_shard(file, array.shape[1:], shard, array.dtype, selection)
        except (ValueError, FileNotFoundError) as error:
            raise StoreError(
                f"{self.path}: sample {sample.sample_id} is damaged in {name} ({error!s:.200}); "
                f"{_mend(self.path)}"
            ) from None

    def _read_attributes(self, attributes: dict[str, Any]) -> None:
        values = attributes.get(ATTRIBUTE)
        if not isinstance(values, dict):
            raise StoreError(
                f"{self.path} is a Zarr group but no feature store; make one with `psd extract`"
            )
        if values.get("format") != FORMAT:
            raise StoreError(
                f"{self.path} has store format {values.get('format')!r}, this version reads "
                f"{FORMAT}; extract it again"
            )
        try:
            self.recipe = Recipe.from_dict(values["recipe"])
            self.fingerprint = str(values["fingerprint"])
            self.provenance = dict(values["provenance"])
            self.card = DatasetCard.from_dict(values["dataset"])
            self.model = dict(values["model"])
            for name, most in _MODEL_NUMBERS.items():
                if not 0 < _whole(self.model[name]) <= most:
                    raise ValueError(f"a model with {name} {self.model[name]!r:.60}")
            if not isinstance(self.model["trained"], bool):
                raise ValueError("a model that is neither trained nor not")
            for name in ("name", "sha256"):
                _line(self.model[name])
            levels = {
                str(name): Level.from_dict(str(name), level)
                for name, level in values["levels"].items()
            }
            for level in levels.values():
                if level.cells_per_patch > self.card.rule.patch_px:
                    raise ValueError(f"{level.name} has {level.cells_per_patch!r:.60} cells")
        except (*MALFORMED, ConfigError, DataError) as error:
            raise StoreError(
                f"{self.path}: its attributes are damaged ({error!r:.300}); {_mend(self.path)}"
            ) from None
        if self.fingerprint != self.recipe.fingerprint():
            raise StoreError(
                f"{self.path}: its recipe does not match its fingerprint {self.fingerprint}; "
                "the attributes were altered, extract it again"
            )
        self.tokens_level = levels.pop("tokens", None)
        self.levels = levels

    def _refuse_altered_attributes(self) -> None:
        """Rather than say what became of them, say that they were others once.

        Raises:
            StoreError: If the table of samples says so; of an older format it says nothing.
        """
        try:
            self._metadata = self._read_table()[1]
        except StoreError:
            return
        self._check_metadata("zarr.json")

    def _read_table(self) -> tuple[list[StoredSample], dict[str, list[Checksum]]]:
        """The samples, and what every zarr.json of the store but instances' may be.

        That is one checksum each, and two while samples are registered.
        """
        size = self.size(SAMPLES_KEY)
        if size is None:
            return [], {}
        if size > MAX_TABLE_BYTES:
            raise StoreError(f"{self.path}: {SAMPLES_KEY} has {size} bytes, more than a table can")
        try:
            table = unsealed(self.get(SAMPLES_KEY) or b"")
            samples = [
                StoredSample.from_dict(index, row) for index, row in enumerate(table["samples"])
            ]
            files = accepted_checksums(table)
        except MALFORMED as error:
            raise StoreError(
                f"{self.path}: {SAMPLES_KEY} is damaged ({error!r:.300}); {_mend(self.path)}"
            ) from None
        if len({sample.sample_id for sample in samples}) != len(samples):
            raise StoreError(
                f"{self.path}: {SAMPLES_KEY} is damaged (a sample stands in it twice); "
                f"{_mend(self.path)}"
            )
        return samples, files

    def _read_complete(self) -> set[int]:
        async def names() -> list[str]:
            return [name async for name in self._group.store.list_dir(self._key(MARKS_FOLDER))]

        return {int(match[1]) for name in sync(names()) if (match := _MARK.fullmatch(name))}


def open_group(path: str | Path, mode: str = "r") -> zarr.Group:
    """Open the Zarr group of a store.

    Raises:
        StoreError: If nothing is there, or it is no Zarr group.
    """
    try:
        metadata = Path(path) / "zarr.json"
        if metadata.is_file() and metadata.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"its zarr.json has {metadata.stat().st_size} bytes")
        # Not what the group may repeat of its arrays: their own files are what is checked.
        return zarr.open_group(
            str(path),
            mode=mode,  # type: ignore[arg-type]
            zarr_format=3,
            use_consolidated=False,
        )
    except FileNotFoundError:
        if (Path(path) / BACKUP_KEY).exists():
            raise StoreError(f"{path}: its zarr.json is missing; {_mend(path)}") from None
        raise StoreError(
            f"{path}: there is no feature store; make one with `psd extract`"
        ) from None
    except (*MALFORMED, zarr.errors.BaseZarrError) as error:
        reason = f"{error!s:.200}" or type(error).__name__
        raise StoreError(
            f"{path} cannot be read as a feature store ({reason}); {_mend(path)}"
        ) from None


def _mend(path: str | Path) -> str:
    return f"run `psd cache repair {path}`"


def array_shapes(
    levels: dict[str, Level],
    tokens: Level | None,
    rule: RegionRule,
    model: dict[str, Any],
    dtype: str,
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape of one sample and dtype of every array but ``instances``.

    Args:
        dtype: Of the features; levels of int8 have an array of scales each.
    """
    side = rule.region_px // rule.patch_px
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for level in [*levels.values(), *([tokens] if tokens is not None else [])]:
        cells = side * level.cells_per_patch
        shapes[level.name] = ((level.channels, cells, cells), array_dtype(dtype))
        if dtype == "int8":
            shapes[f"{SCALE_PREFIX}{level.name}"] = ((level.channels,), "float32")
    region = (rule.region_px, rule.region_px)
    shapes["label"] = (region, "uint8")
    shapes["image"] = ((*region, 3), "uint8")
    shapes["embedding"] = ((side * side, int(model["embed_dim"])), "float32")
    return shapes


def checksum(content: bytes | bytearray | None) -> Checksum | None:
    """As the table and the marks list it; None of a file that is not there."""
    return None if content is None else (len(content), zlib.crc32(content))


def accepted_checksums(table: dict[str, Any]) -> dict[str, list[Checksum]]:
    """What a table of samples says that each zarr.json may be; one of ``MALFORMED`` if nothing."""
    return {
        str(key): [(int(size), int(crc)) for size, crc in accepted]
        for key, accepted in table["files"].items()
    }


def resized(metadata: bytes, rows: int) -> bytes:
    """The zarr.json of an array with so many samples, byte by byte what zarr's resize writes.

    Raises:
        One of ``MALFORMED``: If it is no array's.
    """
    values = json.loads(metadata)
    values["shape"][0] = rows
    return json.dumps(values, indent=2).encode()


def with_card(metadata: bytes, card: DatasetCard) -> bytes:
    """The group's zarr.json with another card, formatted as ``resized`` does.

    Raises:
        One of ``MALFORMED``: If it is no store's.
    """
    values = json.loads(metadata)
    values["attributes"][ATTRIBUTE]["dataset"] = card.to_dict()
    return json.dumps(values, indent=2).encode()


def mark_key(index: int) -> str:
    """Where the completion mark of a sample lies."""
    return f"{MARKS_FOLDER}/{index:08d}.json"


def row_key(name: str, index: int, dimensions: int) -> str:
    """Where the one file of a sample's row of an array lies."""
    return "/".join([name, "c", str(index), *("0" for _ in range(dimensions))])


def sample_bytes(levels: dict[str, Level], patches_per_side: int, dtype: str) -> int:
    """Bytes of one sample's features before any compression."""
    cells = (level.channels * level.cells_per_patch**2 for level in levels.values())
    return sum(cells) * patches_per_side**2 * np.dtype(array_dtype(dtype)).itemsize


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    if not all(1 <= _whole(side) <= MAX_PIXELS for side in (first, second)):
        raise ValueError(f"not a size: {values!r:.60}")
    return first, second


def _whole(value: object) -> int:
    """A whole number; ValueError of anything else."""
    if type(value) is not int:
        raise ValueError(f"not a whole number: {value!r:.60}")
    return value


def _line(value: object) -> str:
    """Text that may be printed; ValueError of anything else."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError(f"not a line of text: {value!r:.60}")
    return value


def _runs(taps: Sequence[Any]) -> list[tuple[int, int]]:
    """Join neighbouring tap slices, so that a whole level is one read."""
    runs: list[tuple[int, int]] = []
    for tap in taps:
        if runs and runs[-1][1] == tap.start:
            runs[-1] = (runs[-1][0], tap.stop)
        else:
            runs.append((tap.start, tap.stop))
    return runs
