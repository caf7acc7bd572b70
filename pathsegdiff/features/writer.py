"""Writing a feature store: one sample whole, then its completion mark (numpy and zarr only).

Several processes may write into one store. Its lock is held while the store is made and while
samples are registered; a sample is written by the process that has its claim. A mark is put on the
disk after everything that it lists.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from pathsegdiff.config import Recipe
from pathsegdiff.errors import StoreError
from pathsegdiff.features.backup import keep_copy, put_back
from pathsegdiff.features.claims import Claim
from pathsegdiff.features.layout import Level
from pathsegdiff.features.quantize import (
    SCALE_PREFIX,
    array_dtype,
    is_compressed,
    quantize,
    round_mantissa,
)
from pathsegdiff.features.seal import sealed
from pathsegdiff.features.shards import ZSTD_LEVEL, ShardFormat, encode_shard
from pathsegdiff.features.store import (
    ATTRIBUTE,
    BACKUP_KEY,
    FORMAT,
    MARKS_FOLDER,
    MAX_TABLE_BYTES,
    SAMPLES_KEY,
    DatasetCard,
    FeatureStore,
    StoredSample,
    array_shapes,
    checksum,
    mark_key,
    open_group,
    resized,
    row_key,
    with_card,
)
from pathsegdiff.files import put_bytes, sync, sync_below
from pathsegdiff.locks import alone_in

_logger = logging.getLogger(__name__)

#: Seconds that others may need to make a store, or to register their samples.
_LOCK_SECONDS = 60
#: How to ask for what an existing store was made with.
_OPTIONS = {
    "timestep": "--t",
    "conditioning": "--cond",
    "taps": "--taps",
    "dtype": "--dtype",
    "precision": "--precision",
    "seed": "--seed",
    "layout": "--layout",
    "tokens": "--tokens",
}
_SAME = {
    "model_sha256": "--model with the bundle that it was made with",
    "dataset_sha256": "the manifest and --mpp that it was made with",
}


@dataclass(frozen=True, kw_only=True)
class SampleArrays:
    """Everything that is kept of one sample.

    Attributes:
        levels: By level name, ("tokens" included where the recipe says so), (C, m, n), any float.
        label: (H, W) uint8.
        image: (H, W, 3) uint8.
        embedding: (P, D) float32.
        instances: (H0, W0) int32 at the source's size, or None where no objects are counted.
        image_sha256, mask_sha256: Of the decoded pixels that it was made from.
    """

    levels: dict[str, np.ndarray]
    label: np.ndarray
    image: np.ndarray
    embedding: np.ndarray
    instances: np.ndarray | None
    image_sha256: str
    mask_sha256: str


class StoreWriter:
    """A store open for writing."""

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        self.store = FeatureStore(path, group)
        self._by_id = {sample.sample_id: sample for sample in self.store.registered()}
        self._members: dict[str, zarr.Array] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        recipe: Recipe,
        card: DatasetCard,
        model: dict[str, Any],
        levels: Sequence[Level],
        tokens: Level | None,
        provenance: dict[str, Any],
    ) -> "StoreWriter":
        """Create a store, or continue one that was made with the same recipe.

        What the recipe does not depend on (titles, names and colours of classes, which splits are
        for what) becomes that of ``card``; the sizes of its images stay as they were.

        Raises:
            StoreError: If it was made with other settings (naming the field, both values and the
                option), is no store, is damaged, or another process keeps it locked.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not _started(path))):
            raise StoreError(f"{path} exists and is no feature store; choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if not (path / "zarr.json").exists():
                _create(path, recipe, card, model, levels, tokens, provenance)
        writer = cls(path, open_group(path, "r+"))
        check_recipe(writer.store, recipe)
        writer.store.check_arrays()
        writer._renew(card)
        return writer

    def _renew(self, card: DatasetCard) -> None:
        """Keep the card as the manifest is now."""
        known = self.store.card
        now = replace(
            card,
            source_mpp=known.source_mpp,
            typical_source_px=known.typical_source_px,
            largest_source_px=known.largest_source_px,
        )
        same = now.scheme.meaning() == known.scheme.meaning() and now.rule == known.rule
        if now == known or not same:
            return
        _logger.info("%s: names, colours and splits are now those of the manifest", self.path)
        with _locked(self.path):
            self._reload()
            self._list(self.store.registered(), now)
            self._keep_copy()
        self._group = open_group(self.path, "r+")
        self.store = FeatureStore(self.path, self._group)

    def register(self, samples: Sequence[StoredSample]) -> list[StoredSample]:
        """Give each sample its index; known ones keep theirs, new ones are appended.

        Split, group and further columns of a known one become those of the manifest as it is now.

        Args:
            samples: Their ``index`` is not looked at.

        Returns:
            The same samples as the store knows them.
        """
        with _locked(self.path):
            self._reload()
            table = list(self.store.registered())
            for sample in samples:
                known = self._by_id.get(sample.sample_id)
                index = len(table) if known is None else known.index
                table[index : index + 1] = [replace(sample, index=index)]
            if table != list(self.store.registered()):
                self._list(table)
            self._keep_copy()
        return [self._by_id[sample.sample_id] for sample in samples]

    def keep_copy(self) -> bool:
        """Write the second copy of the metadata where it is not as they are; whether it was not.

        Raises:
            StoreError: If the metadata themselves are damaged.
        """
        with _locked(self.path):
            self._reload()
            return self._keep_copy()

    def _keep_copy(self) -> bool:
        self.store.check_metadata()
        return keep_copy(self.path, self.store.metadata_keys)

    def _list(self, table: Sequence[StoredSample], card: DatasetCard | None = None) -> None:
        """Make room for every sample of the table, then write it; a card too, if one is given.

        The table says beforehand what the arrays' metadata will be, so that it fits them whenever
        this is broken off.
        """
        before = {key: (self.path / key).read_bytes() for key in self.store.metadata_keys}
        after = dict(before)
        for name in self.store.array_shapes:
            # What zarr's resize does, but on the disk before the old file is gone.
            key = f"{name}/zarr.json"
            after[key] = resized(before[key], len(table))
        if card is not None:
            after["zarr.json"] = with_card(before["zarr.json"], card)
        both = {key: [checksum(before[key]), checksum(after[key])] for key in after}
        self._put_table(self.store.registered(), both)
        # Arrays first: rows without a name are harmless, a name without a row is not.
        for key, content in after.items():
            if content != before[key]:
                put_bytes(self.path / key, content)
        self._put_table(table, {key: [checksum(content)] for key, content in after.items()})
        self._reload()

    def _put_table(self, table: Sequence[StoredSample], files: dict[str, Any]) -> None:
        rows = [sample.to_dict() for sample in table]
        content = sealed({"files": files, "samples": rows}, indent=0)
        if len(content) > MAX_TABLE_BYTES:
            raise StoreError(
                f"{self.path}: the table of {len(rows)} samples would have "
                f"{len(content) / 1e6:.0f} MB, {MAX_TABLE_BYTES / 1e6:.0f} are allowed; leave "
                "columns that nobody needs out of the manifest's table, or make several stores"
            )
        put_bytes(self.path / SAMPLES_KEY, content)

    def claim(self, sample: StoredSample) -> Claim | None:
        """Take the right to write a sample.

        Returns:
            None where another process has it, or the sample is complete.
        """
        if self.is_marked(sample):
            return None
        claim = Claim(self.path, sample.index)
        if not claim.take():
            return None
        if self.is_marked(sample):  # by the one who had the claim until now
            claim.release(finished=True)
            return None
        return claim

    def is_marked(self, sample: StoredSample) -> bool:
        """Whether the sample is complete now, whoever wrote it."""
        return (self.path / mark_key(sample.index)).exists()

    def write(self, sample: StoredSample, arrays: SampleArrays) -> None:
        """Write one sample whole, then mark it complete; have its claim.

        Raises:
            StoreError: If a shape differs from the store's, or a value is not finite in its dtype.
        """
        files: dict[str, Any] = {}
        keys = []
        for name, features in arrays.levels.items():
            values, scales = as_stored(features, self.store, name, sample)
            key, shard = self._shard(name, sample, values)
            _put_unsynced(self.path / key, shard)
            files[key] = checksum(shard)
            if scales is not None:
                keys.append(self._write_row(f"{SCALE_PREFIX}{name}", sample, scales))
        keys += [
            self._write_row(name, sample, getattr(arrays, name))
            for name in ("label", "image", "embedding")
        ]
        if arrays.instances is not None:
            for key, written in self._write_instances(sample, arrays.instances).items():
                files[key] = checksum(written)
        for key in keys:
            content = self.store.get(key)
            if content is None:
                raise StoreError(f"{self.store.path}: {key} vanished while it was being written")
            files[key] = checksum(content)
        sync_below(self.path, [self.path / key for key in files])
        mark = {
            "sample_id": sample.sample_id,
            "image_sha256": arrays.image_sha256,
            "mask_sha256": arrays.mask_sha256,
            "files": files,
        }
        put_bytes(self.path / mark_key(sample.index), sealed(mark, indent=1))

    def forget(self, *samples: StoredSample) -> None:
        """Take completion marks away, so that the samples are extracted again."""
        for sample in samples:
            (self.path / mark_key(sample.index)).unlink(missing_ok=True)
        sync(self.path / MARKS_FOLDER)
        self._reload()

    def _reload(self) -> None:
        self.store.reload()
        self._members.clear()  # they may have grown
        self._by_id = {sample.sample_id: sample for sample in self.store.registered()}

    def _member(self, name: str) -> zarr.Array:
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        # A chunk of zeros (a label without any gland) must exist too: an absent file is an error.
        return array.with_config({"write_empty_chunks": True})

    def _row(self, name: str, sample: StoredSample, values: np.ndarray) -> zarr.Array:
        """The array that a row belongs to.

        Raises:
            StoreError: If the row has another shape than the array's rows.
        """
        if name not in self._members:
            self._members[name] = self._member(name)
        array = self._members[name]
        if values.shape != array.shape[1:]:
            raise StoreError(
                f"{self.store.path}: {name} of sample {sample.sample_id} has shape "
                f"{values.shape}, the store {array.shape[1:]}"
            )
        return array

    def _shard(
        self, name: str, sample: StoredSample, features: np.ndarray
    ) -> tuple[str, bytearray]:
        """Key and bytes of one row of a level."""
        chunk = self._row(name, sample, features).chunks
        shard = ShardFormat(chunk=chunk[1:], compressed=is_compressed(self.store.recipe.dtype))
        return row_key(name, sample.index, features.ndim), encode_shard(features, shard)

    def _write_row(self, name: str, sample: StoredSample, values: np.ndarray) -> str:
        self._row(name, sample, values)[sample.index] = values
        return row_key(name, sample.index, values.ndim)

    def _write_instances(self, sample: StoredSample, instances: np.ndarray) -> dict[str, bytes]:
        """Write an array of its own, of the source's size; its files by key."""
        files: dict[str, Buffer] = {}
        array = zarr.create_array(
            MemoryStore(files),
            shape=instances.shape,
            chunks=instances.shape,
            dtype="int32",
            compressors=[ZstdCodec(), Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
        array[...] = instances
        name = f"instances/{sample.index}"
        _put_files(self.path / name, files)
        return {f"{name}/{key}": content.to_bytes() for key, content in files.items()}


def check_recipe(store: FeatureStore, recipe: Recipe) -> None:
    """Refuse a store that was made with other settings.

    Raises:
        StoreError: Naming each field that differs, both values, and the way out.
    """
    differing = store.recipe.differences(recipe)
    if not differing:
        return
    theirs, ours = store.recipe.to_dict(), recipe.to_dict()
    parts = [f"{n} {_short(theirs[n])}, this run asks for {_short(ours[n])}" for n in differing]
    remedy = " and ".join(_way_back(name, theirs[name]) for name in differing)
    raise StoreError(
        f"{store.path} was made with {'; '.join(parts)}. Use {remedy}, or another --out."
    )


def as_stored(
    features: np.ndarray, store: FeatureStore, name: str, sample: StoredSample
) -> tuple[np.ndarray, np.ndarray | None]:
    """Cast features to the store's dtype, refusing what it cannot hold.

    Returns:
        The values, and the (C,) scales of int8.

    Raises:
        StoreError: If a value is not finite after the cast (NaN, or above 65504 in float16).
    """
    stored = store.recipe.dtype
    dtype = np.dtype("float32" if stored == "int8" else array_dtype(stored))
    with np.errstate(over="ignore"):  # reported below, with the level's name
        cast = features.astype(dtype, copy=False)
        if stored == "float16-5bit":
            cast = round_mantissa(cast)
    if not _all_finite(cast):
        remedy = "use --dtype float32" if np.isfinite(features).all() else "the model is broken"
        raise StoreError(
            f"{store.path}: {name} of sample {sample.sample_id} has values that {dtype} "
            f"cannot hold; {remedy}"
        )
    return quantize(cast) if stored == "int8" else (cast, None)


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    # numpy widens half floats first; looking at the exponent's bits is several times faster.
    return not ((values.view(np.uint16) & 0x7C00) == 0x7C00).any()


def _create(
    path: Path,
    recipe: Recipe,
    card: DatasetCard,
    model: dict[str, Any],
    levels: Sequence[Level],
    tokens: Level | None,
    provenance: dict[str, Any],
) -> None:
    """Make the empty arrays, and last the group's attributes that make it a store.

    Raises:
        StoreError: If there are finished samples of a store whose attributes are gone.
    """
    finished = len(list(path.glob(f"{MARKS_FOLDER}/*.json")))
    if (path / SAMPLES_KEY).exists() and (path / BACKUP_KEY).exists():
        raise StoreError(f"{path}: its zarr.json is missing; run `psd cache repair {path}`")
    if finished:
        raise StoreError(
            f"{path}: its zarr.json is missing, but {finished} samples are complete; put the file "
            "back, or choose another --out"
        )
    (path / SAMPLES_KEY).unlink(missing_ok=True)  # no sample of it was ever finished
    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files), zarr_format=3)
    by_name = {level.name: level for level in levels}
    side = card.rule.region_px // card.rule.patch_px
    shapes = array_shapes(by_name, tokens, card.rule, model, recipe.dtype)
    for name, (shape, dtype) in shapes.items():
        level = tokens if name == "tokens" else by_name.get(name)
        if level is None:
            _create_small_array(group, name, shape, dtype)
            continue
        chunk = level.chunk(side, side, np.dtype(dtype).itemsize)
        group.create_array(
            name,
            shape=(0, *shape),
            chunks=(1, *chunk),
            shards=(1, *shape),
            dtype=dtype,
            compressors=[
                *([ZstdCodec(level=ZSTD_LEVEL)] if is_compressed(recipe.dtype) else []),
                Crc32cCodec(),
            ],
            dimension_names=("sample", "channel", "row", "column"),
        )
    if card.scheme.objects is not None:
        group.create_group("instances")
    layout = {level.name: level.to_dict() for level in levels}
    if tokens is not None:
        layout["tokens"] = tokens.to_dict()
    group.attrs[ATTRIBUTE] = {
        "format": FORMAT,
        "recipe": recipe.to_dict(),
        "fingerprint": recipe.fingerprint(),
        "dataset": card.to_dict(),
        "model": model,
        "levels": layout,
        "provenance": provenance,
    }
    made = path / ".new"
    if made.exists():  # of a making that was interrupted
        shutil.rmtree(made)
    _put_files(made, files)
    keep_copy(made, [str(file.relative_to(made).as_posix()) for file in made.rglob("zarr.json")])
    sync_below(made, [file for file in made.rglob("*") if file.is_file()])
    # The group's own zarr.json comes last: a folder without it is a store that was never finished.
    for child in sorted(made.iterdir(), key=lambda child: child.name == "zarr.json"):
        if child.name == "zarr.json":
            sync(path)
        elif (path / child.name).is_dir():  # of a making that was interrupted
            shutil.rmtree(path / child.name)
        child.replace(path / child.name)
    made.rmdir()
    sync(path)


def _create_small_array(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str) -> None:
    group.create_array(
        name,
        shape=(0, *shape),
        chunks=(1, *shape),
        dtype=dtype,
        compressors=[ZstdCodec(), Crc32cCodec()],
    )


def _started(path: Path) -> bool:
    """Whether the folder is a store, or one whose making was interrupted."""
    return any((path / name).exists() for name in ("zarr.json", BACKUP_KEY, ".new", ".lock"))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes, for the moments in which a store is made or grows.

    Raises:
        StoreError: If another process keeps it for long.
    """
    busy = StoreError(
        f"{path}: another process has kept this store locked for {_LOCK_SECONDS} s; wait for it, "
        "or stop it"
    )
    with alone_in(path, busy, seconds=_LOCK_SECONDS):
        yield


def put_metadata_back(path: Path) -> tuple[list[str], int]:
    """Mend the store's own zarr.json files and table of samples from their second copy.

    Completion marks of samples that the table does not list (it is older than they are, as in a
    copy of a store that was growing) are taken away.

    Returns:
        Keys of the files that were put back, and how many marks were taken away.

    Raises:
        StoreError: If it is no store, or a file and its copy are damaged.
    """
    if not any((path / key).is_file() for key in ("zarr.json", BACKUP_KEY)):
        if (path / SAMPLES_KEY).exists() or (path / MARKS_FOLDER).exists():
            raise StoreError(
                f"{path}: its zarr.json and {BACKUP_KEY} are both gone; delete the store and "
                "extract it again"
            )
        raise StoreError(f"{path}: there is no feature store; make one with `psd extract`")
    with _locked(path):
        return put_back(path)


def open_existing(path: str | Path) -> StoreWriter:
    """An existing store, whatever its recipe (repair needs no new settings).

    Raises:
        StoreError: If it is no store.
    """
    return StoreWriter(Path(path), open_group(path, "r+"))


def _put_files(folder: Path, files: dict[str, Buffer]) -> None:
    """Write what zarr made in memory.

    Left to itself zarr writes an array and the groups above it all at once, and where one of these
    writes fails the errors of the others are printed as tracebacks.
    """
    for key, content in files.items():
        _put_unsynced(folder / key, content.to_bytes())


def _put_unsynced(path: Path, content: bytes | bytearray) -> None:
    """Write a file; it counts once it is synced and a mark lists it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _way_back(field: str, value: Any) -> str:
    """What to ask for to get this value of a recipe's field."""
    if field in _SAME:  # nobody can give a hash as an option
        return _SAME[field]
    if isinstance(value, bool):
        return _OPTIONS[field] if value else f"--no-{_OPTIONS[field].removeprefix('--')}"
    return f"{_OPTIONS[field]} {_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    text = str(value)
    return text[:12] if len(text) == 64 else text
