"""Stage 1 beside its bare forwards and beside the plain way: seconds, bytes and memory."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pathsegdiff.data.manifest import Dataset
from pathsegdiff.data.regions import cut_patches
from pathsegdiff.device import autocast
from pathsegdiff.diffusion.bundle import Bundle, load_bundle
from pathsegdiff.diffusion.model import DiffusionModel
from pathsegdiff.diffusion.schedule import add_noise
from pathsegdiff.features.extract import extract_dataset
from pathsegdiff.features.stage_one import PreparedRegion, StageOne, View
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.pipeline.bench.measure import Spread, in_turns, peak_bytes, ratio
from pathsegdiff.pipeline.bench.plain import PlainExtractor

VIEW = View(timestep=50, conditioning="encoder")
FURTHER_TIMESTEPS = (25, 50, 100)


@dataclass(frozen=True, kw_only=True)
class ExtractionSpeed:
    """What ``measure_extraction`` found.

    Attributes:
        precision, batch_size: Of ours and of the bare forwards.
        patches: Of a run.
        bare, ours, plain: Seconds per patch; plain is None where it was not asked for.
        to_plain: Seconds of the plain way over ours.
        of_bare: Seconds of the bare forwards over ours: 1 would be reading, noise, stitching and
            writing for nothing.
    """

    precision: str
    batch_size: int
    patches: int
    bare: Spread
    ours: Spread
    plain: Spread | None
    to_plain: Spread | None
    of_bare: Spread


@dataclass(frozen=True, kw_only=True)
class StoredBytes:
    """What ``measure_bytes`` found, bytes per patch.

    Attributes:
        plain: The stride-4 stack as float16.
        features: Levels with index and checksums.
        other: Image, label, embedding, instances and mark.
    """

    plain: float
    features: float
    other: float


def stage_one_of(bundle: Bundle, device: torch.device, precision: str, batch_size: int) -> StageOne:
    """Stage 1 as ``psd extract`` has it."""
    return StageOne(
        bundle.load(device=device),
        views=[VIEW],
        taps=[spec.name for spec in bundle.card.taps],
        precision=precision,
        device=device,
        batch_size=batch_size,
    )


def measure_extraction(
    dataset: Dataset,
    bundle: Bundle,
    stage_one: StageOne,
    folder: Path,
    runs: int,
    *,
    plain: bool = True,
) -> ExtractionSpeed:
    """Time whole extractions of a data set, in turns.

    Inside ours: reading and decoding images and masks, noise, networks, stitching, writing with
    checksums and marks, from an empty store. Inside the plain way: reading, noise, networks,
    interpolating, stitching, np.save. Inside the bare forwards: encoder, autoencoder encoder and
    tapped UNet, on patches in memory.

    Args:
        folder: Leaves ``store.zarr`` and ``plain/`` of the last run.
        plain: Whether the plain way takes its turns.
    """
    regions = prepare_regions(dataset, stage_one)
    patches = sum(len(region.patches) for region in regions)
    sides: dict[str, Callable[[], None]] = {
        "bare": lambda: bare_forwards(stage_one, regions),
        "ours": lambda: extract_ours(dataset, bundle, stage_one, folder / "store.zarr"),
    }
    if plain:
        sides["plain"] = lambda: extract_plain(dataset, stage_one, folder / "plain")
    seconds = in_turns(sides, runs, stage_one.device)
    per_patch = {name: [value / patches for value in values] for name, values in seconds.items()}
    return ExtractionSpeed(
        precision=stage_one.precision,
        batch_size=stage_one.batch_size,
        patches=patches,
        bare=Spread.of(per_patch["bare"]),
        ours=Spread.of(per_patch["ours"]),
        plain=Spread.of(per_patch["plain"]) if plain else None,
        to_plain=ratio(seconds["plain"], seconds["ours"]) if plain else None,
        of_bare=ratio(seconds["bare"], seconds["ours"]),
    )


def measure_further_timesteps(
    dataset: Dataset, bundle: Bundle, stage_one: StageOne, folder: Path, runs: int
) -> Spread:
    """Seconds of an extraction at three timesteps over those at one: encoder and latent are shared.

    Args:
        stage_one: Gives model, precision and batch size.
        folder: Leaves ``store.zarr``, of one timestep.
    """
    views = [View(timestep=t, conditioning=VIEW.conditioning) for t in FURTHER_TIMESTEPS]
    three = StageOne(
        stage_one.model,
        views=views,
        taps=stage_one.taps,
        precision=stage_one.precision,
        device=stage_one.device,
        batch_size=stage_one.batch_size,
    )
    paths = {view: folder / f"t{view.timestep}.zarr" for view in views}

    def extract_three() -> None:
        for path in paths.values():
            shutil.rmtree(path, ignore_errors=True)
        extract_dataset(dataset, bundle, three, paths)

    sides = {
        "one": lambda: extract_ours(dataset, bundle, stage_one, folder / "store.zarr"),
        "three": extract_three,
    }
    seconds = in_turns(sides, runs, stage_one.device)
    for path in paths.values():
        shutil.rmtree(path)
    return ratio(seconds["three"], seconds["one"])


def extract_ours(dataset: Dataset, bundle: Bundle, stage_one: StageOne, path: Path) -> None:
    """A whole extraction into a store that is not there."""
    shutil.rmtree(path, ignore_errors=True)
    extract_dataset(dataset, bundle, stage_one, {VIEW: path})


def extract_plain(dataset: Dataset, stage_one: StageOne, folder: Path) -> None:
    """The same regions and noise the plain way."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plain = PlainExtractor(stage_one.model, VIEW.timestep)
    try:
        for sample in dataset.samples:
            image = dataset.read(sample).image
            noise = stage_one.prepare(image, sample.sample_id).noise.numpy()
            patches = cut_patches(image, stage_one.model.patch_px)
            plain.extract(patches, noise, plain_file(folder, sample.sample_id))
    finally:
        plain.close()


def plain_file(folder: Path, sample_id: str) -> Path:
    """Where the plain way keeps a sample."""
    return folder / f"{sample_id.replace('/', '_')}.npy"


def prepare_regions(dataset: Dataset, stage_one: StageOne) -> list[PreparedRegion]:
    """All regions of a data set with their noise, in memory."""
    return [
        stage_one.prepare(dataset.read(sample).image, sample.sample_id)
        for sample in dataset.samples
    ]


@torch.inference_mode()
def bare_forwards(stage_one: StageOne, regions: Sequence[PreparedRegion]) -> None:
    """The networks alone."""
    model, device, size = stage_one.model, stage_one.device, stage_one.batch_size
    for region in regions:
        for start in range(0, len(region.patches), size):
            images = region.patches[start : start + size].to(device).float() / 255
            noise = region.noise[start : start + size].to(device)
            with autocast(device, stage_one.precision):
                context = model.context(model.embed(images), len(images))
                latent = model.latent(images).float()
                x_t = add_noise(latent, noise, VIEW.timestep, model.alphas_cumprod)
                model.taps(x_t, VIEW.timestep, context, stage_one.taps)


def measure_bytes(store: FeatureStore, plain: Path) -> StoredBytes:
    """Bytes per patch of both, from the files as they lie on the disk."""
    samples = store.samples()
    patches = len(samples) * store.patches_per_side**2
    features = other = 0
    for sample in samples:
        for array, size in store.bytes_of(sample).items():
            if array in store.levels:
                features += size
            else:
                other += size
    files = sum(file.stat().st_size for file in plain.glob("*.npy"))
    return StoredBytes(plain=files / patches, features=features / patches, other=other / patches)


def tap_differences(store: FeatureStore, plain: Path) -> dict[str, float]:
    """For each tap the largest ``|ours - plain| / |plain|`` (norms) over the samples of a store.

    Both are float16 as they are read; ours is interpolated after that, theirs before.
    """
    taps = _dense_slices(store)
    largest = dict.fromkeys(taps, 0.0)
    for sample in store.samples():
        theirs = np.load(plain_file(plain, sample.sample_id), mmap_mode="r")
        ours = store.dense(sample)
        for tap, channels in taps.items():
            expected = theirs[channels].astype(np.float32)
            error = np.linalg.norm(ours[channels] - expected) / np.linalg.norm(expected)
            largest[tap] = max(largest[tap], float(error))
    return largest


def _dense_slices(store: FeatureStore) -> dict[str, slice]:
    """Channels of each tap in the dense map."""
    counts = {
        tap.name: tap.stop - tap.start for level in store.levels.values() for tap in level.taps
    }
    slices, start = {}, 0
    for tap in store.tap_names:
        slices[tap] = slice(start, start + counts[tap])
        start += counts[tap]
    return slices


def count_multiply_adds(model: DiffusionModel) -> float:
    """Of one patch through encoder, autoencoder encoder and tapped UNet."""
    from torch.utils.flop_counter import FlopCounterMode

    size = model.patch_px
    images = torch.rand(1, 3, size, size, device=model.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        context = model.context(model.embed(images), 1)
        model.taps(model.latent(images), VIEW.timestep, context, [s.name for s in model.tap_specs])
    return counter.get_total_flops() / 2


def peak_of_extraction(
    dataset: str, model: str, device: str, batch_size: int, folder: Path, *, plain: bool
) -> int:
    """Peak memory of an extraction in float32, in a process of its own.

    Args:
        dataset: Name, or path of a manifest.
        model: A bundle's name or folder.
        plain: The plain way.
    """
    return peak_bytes(_extract_alone, dataset, model, device, batch_size, str(folder), plain)


def _extract_alone(
    dataset: str, model: str, device: str, batch_size: int, folder: str, plain: bool
) -> None:
    from pathsegdiff.data.manifest import open_dataset

    opened = open_dataset(dataset)
    bundle = load_bundle(model)
    stage_one = stage_one_of(bundle, torch.device(device), "float32", batch_size)
    if plain:
        extract_plain(opened, stage_one, Path(folder) / "alone")
    else:
        extract_ours(opened, bundle, stage_one, Path(folder) / "alone.zarr")
