"""What a training in short turns takes along: images as one archive, its state as small parts.

On a machine without network that is lent for minutes, both are brought anew each time. See
docs/pretraining.md, "Short turns on a GPU machine"; benchmarks/gpu_pretrain.py drives it.
"""

import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from pathsegdiff.data.image import read_image
from pathsegdiff.diffusion.bundle import CARD_FILE, Bundle, load_bundle, writing_bundle
from pathsegdiff.diffusion.presets import Preset
from pathsegdiff.diffusion.pretrain.images import INDEX_FILE, INDEX_KIND, PoolImage
from pathsegdiff.diffusion.pretrain.loop import CHECKPOINT_FILE, LOG_FILE, SETTINGS_FILE
from pathsegdiff.diffusion.pretrain.parcel import read_archive, read_parts, write_parts
from pathsegdiff.diffusion.pretrain.plans import PARTS
from pathsegdiff.diffusion.pretrain.run import FACTS_FILE, WEIGHTS_FILE
from pathsegdiff.diffusion.pretrain.small_state import expand, half, shrink
from pathsegdiff.errors import DataError, RunError
from pathsegdiff.files import replace_file, write_archive
from pathsegdiff.tensors import load_tensors

logger = logging.getLogger(__name__)

MAX_IMAGES_BYTES = 20_000_000
PART_BYTES = 15 << 20
MAX_TRAINING_BYTES = 55 << 20
#: Names of the parts.
TRAINING, BUNDLE = "training", "bundle"
ENCODER_FOLDER = "encoder"
_STATE_TENSORS, _STATE_FACTS = "state.safetensors", "state.json"
#: Logs and pictures up to this size travel with the rest.
_MOST_LOOK_BYTES = 1 << 20
#: Bytes per parameter of a state (small_state.py) and of what is finished.
_STATE_BYTES, _FINISHED_BYTES = 3, 2
_WEBP_EFFORT = 6
_WEBP_MOST_PX = 16383
#: Windows of this size tell which quality to try first: one per so many pixels, within bounds.
_SAMPLE_PX, _SAMPLE_EVERY, _FEWEST, _MOST = 384, 800_000, 8, 160


# -- images --


@dataclass(frozen=True, kw_only=True)
class PackedImages:
    """What ``pack_images`` made.

    Attributes:
        count: Images.
        quality: WebP quality of all of them, 0 to 100; None where the files fit as they are.
        bytes: Of the archive.
    """

    count: int
    quality: int | None
    bytes: int


def pack_images(
    images: Sequence[PoolImage],
    archive: Path,
    *,
    max_bytes: int = MAX_IMAGES_BYTES,
    encoder: Path | None = None,
) -> PackedImages:
    """Put images into one archive, as they are or as WebP of the highest quality at which they fit.

    Their sizes stay, and an index keeps order, scales and groups: a pool of the unpacked folder
    holds out the same images and cuts the same crops. A file that is there at several scales
    travels once.

    Args:
        images: As ``find_images`` found them.
        archive: File to write (.tar, compressed).
        max_bytes: The archive is smaller than that.
        encoder: Folder of a finished encoder (its weights and facts), to go along.

    Raises:
        DataError: If they do not fit at any quality, or one is too large for WebP.
        RunError: If the encoder is not finished.
    """
    along: dict[str, Path | bytes] = {}
    if encoder is not None:
        along = {f"{ENCODER_FOLDER}/{k}": v for k, v in _finished(encoder).items()}
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "images.tar"
        given = images, along, trial, max_bytes
        found = _as_they_are(*given) or _encoded(*given)
        replace_file(archive, lambda file: shutil.copyfile(trial, file))
    return found


def _as_they_are(
    images: Sequence[PoolImage], along: Mapping[str, Path | bytes], archive: Path, max_bytes: int
) -> PackedImages | None:
    """Write the archive of the files themselves; None where they are too large."""
    names = _names(images)
    if sum(file.stat().st_size for file in names) >= max_bytes:
        return None
    files = {name: file for file, name in names.items()}
    size = write_archive(archive, {INDEX_FILE: _index(images, names, None), **files, **along})
    return PackedImages(count=len(images), quality=None, bytes=size) if size < max_bytes else None


def _encoded(
    images: Sequence[PoolImage],
    along: Mapping[str, Path | bytes],
    archive: Path,
    max_bytes: int,
) -> PackedImages:
    """Write the archive of WebP files of the highest quality at which they fit."""
    wide = [image for image in images if max(image.size) > _WEBP_MOST_PX]
    if wide:
        raise DataError(
            f"{wide[0].path} has a side of more than {_WEBP_MOST_PX} px, which WebP cannot hold; "
            "cut it first"
        )
    fixed = sum(len(v) if isinstance(v, bytes) else v.stat().st_size for v in along.values())
    names = _names(images, ".webp")
    once = [{image.path: image for image in images}[file] for file in names]
    quality = _likely_quality(once, max_bytes - fixed)
    best: PackedImages | None = None
    failed = 101
    trial = archive.with_name("trial.tar")
    while 0 <= quality < failed and (best is None or best.quality != failed - 1):
        files = _encode_all(names, quality, max_bytes)
        size = max_bytes
        if files is not None:
            size = write_archive(
                trial, {INDEX_FILE: _index(images, names, quality), **files, **along}
            )
        logger.info("quality %d: %s bytes", quality, f"{size:,}" if files else "too many")
        if size < max_bytes:
            best = PackedImages(count=len(images), quality=quality, bytes=size)
            trial.replace(archive)
            quality += 1
        else:
            failed = quality
            quality -= 1
    if best is None:
        raise DataError(
            f"{len(images)} images do not fit into {max_bytes:,} bytes at any quality; take fewer, "
            "or a larger limit"
        )
    return best


def unpack_images(archive: Path, folder: Path) -> None:
    """Unpack images into a new folder, which ``open_pool`` reads.

    Raises:
        DataError: If the archive is missing, damaged, hostile, or holds something else.
        BundleError: If the folder is there already.
    """
    try:
        size = archive.stat().st_size
        stream = archive.open("rb")
    except OSError as error:
        raise DataError(f"{archive} cannot be read: {error.strerror}") from None
    with stream, writing_bundle(folder) as made:
        read_archive(stream, size, made, str(archive))
        if not (made / INDEX_FILE).is_file():
            raise DataError(f"{archive} is no archive of images: it has no {INDEX_FILE}")


def _names(images: Sequence[PoolImage], suffix: str | None = None) -> dict[Path, str]:
    """File -> its name in the archive, in the order of the images; each file once."""
    names: dict[Path, str] = {}
    for image in images:
        file = image.path
        names.setdefault(file, f"{len(names):05d}{suffix or file.suffix.lower()}")
    return names


def _index(images: Sequence[PoolImage], names: Mapping[Path, str], quality: int | None) -> bytes:
    entries = [
        {
            "file": names[image.path],
            "scale": float(image.scale),
            "group": image.group,
            "name": image.path.name,
        }
        for image in images
    ]
    values = {"kind": INDEX_KIND, "quality": quality, "images": entries}
    return (json.dumps(values, indent=1) + "\n").encode()


def _encode_all(names: Mapping[Path, str], quality: int, max_bytes: int) -> dict[str, bytes] | None:
    """Name -> WebP, in order; None once they are more than ``max_bytes``."""
    files: dict[str, bytes] = {}
    total = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        pending = pool.map(lambda file: _webp(read_image(file), quality), names)
        for name, data in zip(names.values(), pending, strict=True):
            files[name] = data
            total += len(data)
            if total >= max_bytes:
                pool.shutdown(wait=True, cancel_futures=True)
                return None
    return files


def _webp(pixels: np.ndarray, quality: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "WEBP", quality=quality, method=_WEBP_EFFORT)
    return data.getvalue()


def _likely_quality(images: Sequence[PoolImage], max_bytes: int) -> int:
    """The highest quality at which a sample of windows says that all will fit."""
    areas = np.cumsum([image.size[0] * image.size[1] for image in images])
    rng = np.random.default_rng(0)
    windows = []
    count = int(np.clip(areas[-1] // _SAMPLE_EVERY, _FEWEST, _MOST))
    for place in (np.arange(count) + 0.5) / count * areas[-1]:
        pixels = read_image(images[int(np.searchsorted(areas, place))].path)
        y, x = (int(rng.integers(max(1, side - _SAMPLE_PX + 1))) for side in pixels.shape[:2])
        windows.append(np.ascontiguousarray(pixels[y : y + _SAMPLE_PX, x : x + _SAMPLE_PX]))

    def fits(quality: int) -> bool:
        share = np.mean([len(_webp(w, quality)) / (w.shape[0] * w.shape[1]) for w in windows])
        return float(share) * float(areas[-1]) < max_bytes

    low, high = 0, 101
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# -- the training --


def pack_training(
    work: Path,
    out: Path,
    *,
    part_bytes: int = PART_BYTES,
    max_total: int = MAX_TRAINING_BYTES,
) -> int:
    """Write all that the other side needs to go on with a training.

    Of a finished part that is its weights (float16) and facts, of the running one its checkpoint in
    the small form of small_state.py; settings, logs and pictures go along. The training that goes
    on is the unpacked one: both sides then have the same rounded weights.

    Args:
        work: Working folder of ``Pretraining``.
        out: Folder of the parts.
        part_bytes: Most of a part.
        max_total: Most of all parts.

    Returns:
        The number of parts.

    Raises:
        RunError: If the folder holds no training, or one that is damaged.
        DataError: If it is larger than ``max_total``.
    """
    contents: dict[str, Path | bytes] = {}
    for part in PARTS:
        folder = work / part
        if (folder / FACTS_FILE).is_file():
            files = _finished(folder)
        elif (folder / CHECKPOINT_FILE).is_file():
            files = _running(folder)
        else:
            continue
        for file in _to_look_at(folder):
            files[file.name] = file
        contents |= {f"{part}/{name}": content for name, content in files.items()}
    if not contents:
        raise RunError(f"{work} holds no training; nothing to pack")
    return _pack(contents, out, TRAINING, part_bytes, max_total)


def unpack_training(parts: Path, work: Path) -> None:
    """Make a working folder of what ``pack_training`` wrote.

    Args:
        parts: Folder with all parts and their index.
        work: Folder to make.

    Raises:
        DataError: If a part is missing or damaged, or their content is not what it must be.
        BundleError: If the working folder is there already.
    """
    data = read_parts(parts, TRAINING)
    where = str(parts / f"{TRAINING}.json")
    with writing_bundle(work) as made:
        read_archive(io.BytesIO(data), len(data), made, where)
        for part in PARTS:
            folder = made / part
            if (folder / _STATE_FACTS).is_file():
                _restore_checkpoint(folder, f"{where}: {part}")
    logger.info("%s: unpacked into %s", where, work)


def pack_bundle(
    bundle: Bundle, out: Path, *, part_bytes: int = PART_BYTES, max_total: int = MAX_TRAINING_BYTES
) -> int:
    """Write a bundle as parts; returns their number.

    Raises:
        DataError: If it is larger than ``max_total``.
    """
    names = [CARD_FILE, *bundle.card.files]
    contents: dict[str, Path | bytes] = {name: bundle.path / name for name in names}
    return _pack(contents, out, BUNDLE, part_bytes, max_total)


def unpack_bundle(parts: Path, folder: Path) -> Bundle:
    """Make a bundle of what ``pack_bundle`` wrote.

    Raises:
        DataError: If a part is missing or damaged.
        BundleError: If the folder is there already, or the content is no whole bundle.
    """
    data = read_parts(parts, BUNDLE)
    with writing_bundle(folder) as made:
        read_archive(io.BytesIO(data), len(data), made, str(parts / f"{BUNDLE}.json"))
        load_bundle(made)
    return load_bundle(folder)


def round_weights(folder: Path) -> None:
    """Round a finished part's weights to float16 at once, as they travel and as a bundle has them.

    What is trained on top of them then does not depend on where a turn ended.

    Raises:
        RunError: If they are missing or damaged.
    """
    state = _halves(folder / WEIGHTS_FILE)
    replace_file(folder / WEIGHTS_FILE, lambda file: save_file(state, file))


def check_travels(preset: Preset, max_total: int = MAX_TRAINING_BYTES) -> None:
    """Refuse a model whose state would be too large, before it is trained.

    Raises:
        RunError: Saying how large it would be.
    """
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in module.parameters())
            for name, module in preset.build().items()
        }
    finished = counts.pop("encoder") + counts.pop("autoencoder")
    size = _FINISHED_BYTES * finished + _STATE_BYTES * sum(counts.values())
    if size > max_total:
        raise RunError(
            f"the state of preset {preset.name} takes {size / 2**20:.0f} MiB, "
            f"{max_total / 2**20:.0f} MiB travel; train it where it can stay: psd pretrain"
        )


def _pack(
    contents: Mapping[str, Path | bytes], out: Path, name: str, part_bytes: int, max_total: int
) -> int:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / f"{name}.tar"
        write_archive(archive, contents)
        return write_parts(archive, out, name, part_bytes=part_bytes, max_total=max_total)


def _finished(folder: Path) -> dict[str, Path | bytes]:
    """What a finished part leaves, weights as float16."""
    facts = folder / FACTS_FILE
    if not facts.is_file():
        raise RunError(f"{folder} is no finished part of a training: it has no {FACTS_FILE}")
    return {WEIGHTS_FILE: save(_halves(folder / WEIGHTS_FILE)), FACTS_FILE: facts}


def _halves(file: Path) -> dict[str, Tensor]:
    try:
        return {name: half(value, name) for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file} is missing or damaged ({error!s:.80}); train it again") from None


def _running(folder: Path) -> dict[str, Path | bytes]:
    """The small form of a running part's checkpoint."""
    file = folder / CHECKPOINT_FILE
    try:
        tensors, facts = shrink(load_tensors(file))
        return {_STATE_TENSORS: save(tensors), _STATE_FACTS: json.dumps(facts).encode()}
    except RunError:
        raise
    except Exception as error:  # torch names a broken file in a dozen ways
        raise RunError(f"{file} is no checkpoint of a training ({error!s:.80})") from None


def _restore_checkpoint(folder: Path, where: str) -> None:
    tensors, facts = folder / _STATE_TENSORS, folder / _STATE_FACTS
    try:
        state = expand(load_file(tensors), json.loads(facts.read_text(encoding="utf-8")))
    except Exception as error:  # hostile or of another version: in a dozen ways, too
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise DataError(f"{where}: the state is not what it must be ({reason})") from None
    replace_file(folder / CHECKPOINT_FILE, lambda file: torch.save(state, file))
    tensors.unlink()
    facts.unlink()


def _to_look_at(folder: Path) -> list[Path]:
    """Settings, log and small pictures of a part."""
    files = [folder / SETTINGS_FILE, folder / LOG_FILE, *sorted(folder.glob("*.png"))]
    return [file for file in files if file.is_file() and file.stat().st_size <= _MOST_LOOK_BYTES]
