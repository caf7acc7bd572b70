"""The stage 1 loop: every region of a data set into one store per view, resuming by itself.

Reading ahead and writing behind happen on threads, so that the network sets the pace. What is
complete stays complete whatever happens: a sample's mark is written last. Several processes may run
the same extraction at once: each sample is made by the one that has its claim.
"""

import errno
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np

from pathsegdiff.config import Recipe
from pathsegdiff.data.manifest import Dataset, Region, Sample
from pathsegdiff.data.manifest_file import reference
from pathsegdiff.data.passes import iterate_threads
from pathsegdiff.device import device_name
from pathsegdiff.diffusion.bundle import Bundle
from pathsegdiff.errors import DataError, StoreError
from pathsegdiff.features.claims import Claim
from pathsegdiff.features.stage_one import PreparedRegion, RegionFeatures, StageOne, View
from pathsegdiff.features.store import DatasetCard, FeatureStore, StoredSample, sample_bytes
from pathsegdiff.features.writer import SampleArrays, StoreWriter
from pathsegdiff.files import as_file_name
from pathsegdiff.provenance import provenance

logger = logging.getLogger(__name__)

#: Called with (patches done, patches to do) of this run.
ProgressCallback = Callable[[int, int], None]
#: Regions read ahead of the network.
_READ_AHEAD = 2
#: Between two looks at what other processes work on.
_WAIT_SECONDS = 0.5
#: Files take whole blocks of a disk; most file systems have blocks of this size.
_BLOCK_BYTES = 4096
#: To tell how much room a sample takes.
_SAMPLES_LOOKED_AT = 20
#: Threads that write finished regions, by the kind of device; no more wait than are written. A CPU
#: needs seconds for a region, a GPU is faster than one thread.
WRITERS = {"cpu": 1, "cuda": 4}


@dataclass(frozen=True, kw_only=True)
class StoreResult:
    """What an extraction did to one store.

    Attributes:
        path: Of the store.
        view: That it holds.
        written: Samples that this process made.
        skipped: Samples that were complete before.
        elsewhere: Samples that another process made meanwhile.
    """

    path: Path
    view: View
    written: int
    skipped: int
    elsewhere: int


@dataclass(frozen=True, kw_only=True)
class ExtractionPlan:
    """What an extraction would do.

    Attributes:
        samples: Regions in the data set.
        patches: In all regions together.
        feature_bytes: Of all stores, before any compression; label, image and embeddings apart.
        other_bytes: Label, image and embeddings, before compression.
        seconds_per_patch: Measured on one batch of the first region, all views together.
    """

    samples: int
    patches: int
    feature_bytes: int
    other_bytes: int
    seconds_per_patch: float

    @property
    def seconds(self) -> float:
        """Expected for the whole."""
        return self.patches * self.seconds_per_patch


def store_name(dataset: str, model: str, view: View) -> str:
    """NAME-MODEL-tT[-null].zarr; the names come from a manifest and a bundle."""
    null = "-null" if view.conditioning == "none" else ""
    return as_file_name(f"{dataset}-{model}-t{view.timestep}{null}.zarr")


def extract_dataset(
    dataset: Dataset,
    bundle: Bundle,
    stage_one: StageOne,
    stores: Mapping[View, Path],
    *,
    progress: ProgressCallback | None = None,
) -> list[StoreResult]:
    """Extract every region that a store does not have yet.

    Where other processes extract into the same stores, this one returns when all is complete: what
    a process that died has left is made by those that live.

    Args:
        dataset: Its samples decide what is extracted.
        bundle: Where ``stage_one`` was loaded from; its hash enters the recipe.
        stage_one: The network and its settings.
        stores: One path for each of its views.

    Raises:
        StoreError: If a store was made with other settings, holds a sample whose image or mask has
            changed since or that was removed meanwhile, or the disk is full (saying how much room
            is missing).
        DataError: If the patches of the data set are not of the model's size, or an image or mask
            cannot be read. All finished samples are kept.
    """
    if not dataset.samples:
        raise DataError(f"data set {dataset.name} has no samples to extract")
    _check_patches(dataset, stage_one)
    card = dataset_card(dataset)
    writers: dict[View, StoreWriter] = {}
    todo: dict[View, dict[str, StoredSample]] = {}
    rows = [stored_sample(dataset, sample) for sample in dataset.samples]
    for view, path in stores.items():
        writer = StoreWriter.open(
            path,
            recipe=recipe_of(dataset, bundle, stage_one, view),
            card=card,
            model=model_facts(bundle, stage_one),
            levels=stage_one.levels,
            tokens=stage_one.tokens_level,
            provenance=provenance(
                device=device_name(stage_one.device),
                extraction=_sources(dataset, bundle, stage_one),
            ),
        )
        writers[view] = writer
        registered = writer.register(rows)
        check_unchanged(
            dataset, writer.store, [row for row in registered if writer.store.is_complete(row)]
        )
        todo[view] = {
            stored.sample_id: stored
            for stored in registered
            if not writer.store.is_complete(stored)
        }
    try:
        written = _Extraction(dataset, stage_one, writers, todo, progress).run()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _no_room(writers, todo, quota=error.errno == errno.EDQUOT) from None
    for writer in writers.values():
        _check_there(dataset, writer.path)
    return [
        StoreResult(
            path=Path(path),
            view=view,
            written=written[view],
            skipped=len(dataset.samples) - len(todo[view]),
            elsewhere=len(todo[view]) - written[view],
        )
        for view, path in stores.items()
    ]


def _check_patches(dataset: Dataset, stage_one: StageOne) -> None:
    ours, theirs = stage_one.model.patch_px, dataset.rule.patch_px
    if ours != theirs:
        raise DataError(
            f"data set {dataset.name} is cut into patches of {theirs} px, the model sees {ours}; "
            f"set patch_px = {ours} in the [region] of its manifest"
        )


def _sources(dataset: Dataset, bundle: Bundle, stage_one: StageOne) -> dict[str, Any]:
    """What an extraction reads, for ``psd cache repair``: options of ``psd extract``."""
    embedded = dataset.manifest.root is not None
    return {
        "dataset": reference(dataset.manifest),
        "data_root": None if embedded else str(dataset.root.absolute()),
        "model": str(bundle.path.absolute()),
        "mpp": dataset.rule.mpp,
        # No field of the recipe; but only the same one gives the same bits.
        "batch_size": stage_one.batch_size,
    }


def plan_extraction(dataset: Dataset, bundle: Bundle, stage_one: StageOne) -> ExtractionPlan:
    """Count patches and bytes, and time one batch of the first region."""
    if not dataset.samples:
        raise DataError(f"data set {dataset.name} has no samples to extract")
    _check_patches(dataset, stage_one)
    side = dataset.rule.region_px // dataset.rule.patch_px
    sample = dataset.samples[0]
    prepared = stage_one.prepare(dataset.read(sample, seed=stage_one.seed).image, sample.sample_id)
    count = min(stage_one.batch_size, side * side)
    batch = PreparedRegion(
        patches=prepared.patches[:count], noise=prepared.noise[:count], grid=(1, count)
    )
    _ = stage_one.run(batch).levels  # the first pass allocates and warms up
    begin = time.perf_counter()
    _ = stage_one.run(batch).levels
    seconds = (time.perf_counter() - begin) / count
    levels = {level.name: level for level in stage_one.levels}
    if stage_one.tokens_level is not None:
        levels["tokens"] = stage_one.tokens_level
    features = sample_bytes(levels, side, stage_one.stored_dtype) * len(stage_one.views)
    other = 4 * dataset.rule.region_px**2 + 4 * side * side * stage_one.model.embed_dim
    return ExtractionPlan(
        samples=len(dataset.samples),
        patches=len(dataset.samples) * side * side,
        feature_bytes=features * len(dataset.samples),
        other_bytes=other * len(stage_one.views) * len(dataset.samples),
        seconds_per_patch=seconds,
    )


def recipe_of(dataset: Dataset, bundle: Bundle, stage_one: StageOne, view: View) -> Recipe:
    """The recipe of one view's store."""
    return Recipe(
        model_sha256=bundle.card.sha256,
        dataset_sha256=dataset.sha256,
        timestep=view.timestep,
        conditioning=view.conditioning,
        taps=stage_one.taps,
        dtype=stage_one.stored_dtype,
        precision=stage_one.precision,
        seed=stage_one.seed,
        layout=stage_one.layout,
        tokens=stage_one.tokens_level is not None,
    )


def model_facts(bundle: Bundle, stage_one: StageOne) -> dict[str, Any]:
    """What stage 2 is told about the bundle."""
    return {
        "name": bundle.card.name,
        "sha256": bundle.card.sha256,
        "trained": bundle.card.trained,
        "head_width": bundle.card.head_width,
        "embed_dim": stage_one.model.embed_dim,
        "patch_px": stage_one.model.patch_px,
    }


def dataset_card(dataset: Dataset) -> DatasetCard:
    """What stage 2 is told about the data set."""
    manifest = dataset.manifest
    sizes = [dataset.source_size(source) for source in dataset.sources]
    return DatasetCard(
        name=dataset.name,
        title=manifest.title,
        licence=manifest.licence,
        scheme=dataset.scheme,
        rule=dataset.rule,
        splits=tuple(manifest.splits),
        default_train=manifest.default_train,
        default_eval=manifest.default_eval,
        grouped=manifest.grouped,
        source_mpp=manifest.mpp,
        typical_source_px=mode(sizes),
        largest_source_px=(max(h for h, _ in sizes), max(w for _, w in sizes)),
    )


def stored_sample(dataset: Dataset, sample: Sample) -> StoredSample:
    """A sample as the store lists it; its index is given when it is registered."""
    return StoredSample(
        sample_id=sample.sample_id,
        index=-1,
        split=sample.split,
        group=sample.group,
        source_px=dataset.source_size(sample.source),
        extra={key: str(value) for key, value in sample.source.extra.items()},
    )


def _no_room(
    writers: Mapping[View, StoreWriter],
    todo: Mapping[View, Mapping[str, StoredSample]],
    *,
    quota: bool,
) -> StoreError:
    """How much room is lacking for what is not written yet; of a quota nobody knows its rest."""
    samples = needed = 0
    for view, writer in writers.items():
        left = [row for row in todo[view].values() if not writer.is_marked(row)]
        samples += len(left)
        needed += len(left) * _bytes_on_disk(writer.store)
    path = next(iter(writers.values())).path
    free = shutil.disk_usage(path).free
    # What a broken-off sample has taken is written over; the rest of it is needed at least.
    missing = max(needed - free, needed // max(samples, 1))
    needs, has, more = (f"{count / 1e6:.1f} MB" for count in (needed, free, missing))
    if quota:
        begin, free_now, room = "the disk quota is used up at", "", needs
    else:
        begin, free_now, room = "no space left on the disk of", f", {has} are free", f"{more} more"
    return StoreError(
        f"{begin} {path}: {samples} samples are not written yet and need about {needs}{free_now}; "
        f"make room for {room} and run the same command again. Everything finished so far is kept"
    )


def _bytes_on_disk(store: FeatureStore) -> int:
    """What one more sample takes: the largest of some that are there, else before compression."""
    sizes = []
    with suppress(StoreError):  # the full disk is what has to be said
        store.reload()
        for sample in store.samples()[-_SAMPLES_LOOKED_AT:]:
            sizes.append(sum(map(_in_blocks, store.file_sizes(sample))))
    if sizes:
        return max(sizes)
    shapes = store.array_shapes.values()
    return sum(_in_blocks(math.prod(shape) * np.dtype(dtype).itemsize) for shape, dtype in shapes)


def _in_blocks(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


class _Extraction:
    """One pass over what is not complete, and the wait for what other processes work on."""

    def __init__(
        self,
        dataset: Dataset,
        stage_one: StageOne,
        writers: dict[View, StoreWriter],
        todo: dict[View, dict[str, StoredSample]],
        progress: ProgressCallback | None,
    ) -> None:
        self.dataset, self.stage_one = dataset, stage_one
        self.writers, self.todo, self.progress = writers, todo, progress
        wanted = {sample_id for samples in todo.values() for sample_id in samples}
        self.samples = [sample for sample in dataset.samples if sample.sample_id in wanted]
        self.patches = (dataset.rule.region_px // dataset.rule.patch_px) ** 2
        self.written = dict.fromkeys(writers, 0)
        self._counted: set[str] = set()
        self._held: set[Claim] = set()
        self._writing: list[Future[None]] = []

    def run(self) -> dict[View, int]:
        """Make every sample that no other process makes; returns how many, by view."""
        writers_at_work = WRITERS[self.stage_one.device.type]
        with ThreadPoolExecutor(writers_at_work, "psd-write") as pool:
            writing = self._writing
            claimed = self._claimed()
            try:
                for claims, region, prepared in self._read_ahead(claimed):
                    features = self.stage_one.run(prepared, list(claims.stored))
                    while len(writing) >= writers_at_work:
                        writing.pop(0).result()
                    writing.append(pool.submit(self._write, claims, region, features))
                    for view in claims.stored:
                        self.written[view] += 1
                    self._count(claims.sample)
            finally:
                # Also after an error or Ctrl-C: what the network has finished reaches the disk.
                errors = [future.exception() for future in writing]
                for claim in list(self._held):
                    claim.release(finished=False)
            for error in errors:
                if error is not None:
                    raise error
        return self.written

    def _claimed(self) -> Iterator["_Claims | None"]:
        """The samples that this process makes, as it gets their claims.

        Yields:
            None now and then while only others have something to do, so that the caller can finish
            what it has begun.
        """
        remaining = self.samples
        told = False
        while remaining:
            later = []
            for sample in remaining:
                claims = self._claim(sample)
                if claims is not None:
                    yield claims
                # Also where another process has the sample in one of the stores.
                if claims is None or len(claims.stored) < self._lacking(sample):
                    if self._is_complete(sample):
                        self._count(sample)
                    else:
                        later.append(sample)
            if later:
                if not told:
                    logger.info("Waiting for %d samples of other processes", len(later))
                    told = True
                yield None
                if len(later) == len(remaining):
                    for future in self._writing:
                        if future.done():
                            future.result()  # its error, before a wait that may be long
                    time.sleep(_WAIT_SECONDS)
            remaining = later

    def _claim(self, sample: Sample) -> "_Claims | None":
        """Of every store that lacks a sample and where nobody works on it."""
        stored, claims = {}, {}
        for view, writer in self.writers.items():
            row = self.todo[view].get(sample.sample_id)
            claim = None if row is None else writer.claim(row)
            if row is not None and claim is not None:
                self._held.add(claim)
                stored[view], claims[view] = row, claim
        return _Claims(sample=sample, stored=stored, claims=claims) if stored else None

    def _is_complete(self, sample: Sample) -> bool:
        return all(
            writer.is_marked(self.todo[view][sample.sample_id])
            for view, writer in self.writers.items()
            if sample.sample_id in self.todo[view]
        )

    def _lacking(self, sample: Sample) -> int:
        """Stores that did not have the sample when this began."""
        return sum(sample.sample_id in rows for rows in self.todo.values())

    def _count(self, sample: Sample) -> None:
        self._counted.add(sample.sample_id)
        if self.progress is not None:
            done, total = len(self._counted), len(self.samples)
            self.progress(done * self.patches, total * self.patches)

    def _read_ahead(
        self, claimed: Iterator["_Claims | None"]
    ) -> Iterator[tuple["_Claims", Region, PreparedRegion]]:
        """Read regions and draw noise on a thread, a few ahead of the network."""

        def read(claims: _Claims) -> tuple[_Claims, Region, PreparedRegion]:
            region = self.dataset.read(claims.sample, seed=self.stage_one.seed)
            return claims, region, self.stage_one.prepare(region.image, claims.sample.sample_id)

        pool = ThreadPoolExecutor(1, "psd-read")
        try:
            pending: list[Future[tuple[_Claims, Region, PreparedRegion]]] = []
            for claims in claimed:
                if claims is not None:
                    pending.append(pool.submit(read, claims))
                while len(pending) > (_READ_AHEAD if claims is not None else 0):
                    yield pending.pop(0).result()
            for future in pending:
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _write(self, claims: "_Claims", region: Region, features: RegionFeatures) -> None:
        try:
            self._write_all(claims, region, features)
        except BaseException:
            # Nobody must wait for what this process will not make.
            for claim in claims.claims.values():
                if claim in self._held:
                    claim.release(finished=False)
                    self._held.discard(claim)
            raise

    def _write_all(self, claims: "_Claims", region: Region, features: RegionFeatures) -> None:
        for view, sample in claims.stored.items():
            levels = dict(features.levels[view])
            if features.tokens is not None:
                levels["tokens"] = features.tokens
            self.writers[view].write(
                sample,
                SampleArrays(
                    levels=levels,
                    label=region.label,
                    image=region.image,
                    embedding=features.embedding,
                    instances=region.instances,
                    image_sha256=region.image_sha256,
                    mask_sha256=region.mask_sha256,
                ),
            )
            claim = claims.claims[view]
            claim.release(finished=True)
            self._held.discard(claim)


@dataclass(frozen=True, kw_only=True)
class _Claims:
    """A sample that this process makes, and the stores that get it."""

    sample: Sample
    stored: dict[View, StoredSample]
    claims: dict[View, Claim]


def _check_there(dataset: Dataset, path: Path) -> None:
    """Look at the finished store as a reader does.

    What is written after a folder was removed makes parts of it anew, so that no write need fail.
    """
    store = FeatureStore.open(path)
    store.check_arrays()
    complete = {sample.sample_id for sample in store.samples()}
    gone = [sample.sample_id for sample in dataset.samples if sample.sample_id not in complete]
    if gone:
        raise StoreError(
            f"{path}: {len(gone)} of {len(dataset.samples)} samples are gone ({gone[0]}, ...), "
            "something else has changed the store meanwhile; run the extraction again"
        )


def check_unchanged(
    dataset: Dataset, store: FeatureStore, finished: Sequence[StoredSample]
) -> None:
    """Hold images and masks, as they are now, against the marks of samples made from them.

    Args:
        finished: With a readable mark each; others of the data set's samples need none.

    Raises:
        StoreError: If an image or mask has changed since, naming the first.
        DataError: If one cannot be read.
    """
    samples = {sample.sample_id: sample for sample in dataset.samples}
    sources: dict[str, StoredSample] = {}
    for stored in finished:
        if stored.sample_id in samples:
            sources.setdefault(samples[stored.sample_id].source.source_id, stored)
    if not sources:
        return
    logger.info("Holding %d images of finished samples against their marks", len(sources))
    chosen = list(sources.values())
    hashes = iterate_threads(
        dataset.source_hashes, (samples[stored.sample_id].source for stored in chosen)
    )
    for stored, (image, mask) in zip(chosen, hashes, strict=True):
        mark = store.read_mark(stored)
        for kind, now in (("image", image), ("mask", mask)):
            if mark[f"{kind}_sha256"] != now:
                raise StoreError(
                    f"{store.path}: the {kind} of sample {stored.sample_id} has changed "
                    "since it was extracted; put the old one back, or choose another --out"
                )
