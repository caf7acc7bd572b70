"""Pre-train in short turns on a machine that is lent for minutes and has no network.

    python benchmarks/gpu_pretrain.py --pack-images DIR@2.2 DIR --archive images.tar
    python benchmarks/gpu_pretrain.py --images images.tar --out turn_1 --minutes 9
    python benchmarks/gpu_pretrain.py --images images.tar --out turn_2 --minutes 9 --resume turn_1
    python benchmarks/gpu_pretrain.py --unpack turn_2 --to models/mine

A turn unpacks, goes on with the autoencoder, the encoder and the diffusion model until its time is
up, and leaves at most eight files below 16 MiB in --out: the state (or, at the end, the bundle) in
parts, the log and pictures. The time counts from the start of the program and includes the packing.
It needs this repository on PYTHONPATH, torch, diffusers and timm; nothing is installed or fetched.
See docs/pretraining.md.
"""

import time

_BEGAN = time.monotonic()  # before torch is imported: that takes seconds, too

import argparse  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from dataclasses import fields, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from pathsegdiff.device import resolve_device  # noqa: E402
from pathsegdiff.diffusion.bundle import check_new_folder  # noqa: E402
from pathsegdiff.diffusion.conv_encoder import ConvEncoderConfig  # noqa: E402
from pathsegdiff.diffusion.pretrain import travel  # noqa: E402
from pathsegdiff.diffusion.pretrain.images import find_images, open_pool  # noqa: E402
from pathsegdiff.diffusion.pretrain.loop import LOG_FILE, PretrainProgress  # noqa: E402
from pathsegdiff.diffusion.pretrain.parcel import has_parts  # noqa: E402
from pathsegdiff.diffusion.pretrain.plans import PARTS, Plan, plan_of  # noqa: E402
from pathsegdiff.diffusion.pretrain.run import LoopOptions, Pretraining  # noqa: E402
from pathsegdiff.errors import ConfigError, PathSegDiffError  # noqa: E402

#: What a turn leaves: so many files, and so much of logs and pictures beside the parts.
MAX_FILES, MAX_FILE_BYTES, MAX_PICTURES_BYTES = 8, (16 << 20) - 1, 6 << 20
#: Kept back for packing: seconds, but no more than this share of the time.
_RESERVE, _RESERVE_SHARE = 45.0, 0.25


def main() -> int:
    """Do what the arguments say; errors that a user can mend are one line."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever stops a turn, it packs
    try:
        if options.pack_images:
            pack_images(options)
        elif options.pack_training is not None:
            count = travel.pack_training(options.pack_training, options.out)
            print(f"{options.pack_training}: packed into {count} parts, {_size(options.out)}")
        elif options.unpack is not None:
            unpack(options.unpack, options.to)
        else:
            return turn(options)
    except PathSegDiffError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def parse() -> argparse.Namespace:
    """The command line; four modes, told apart by their first option."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--images", type=Path, help="archive (or its folder): train for a turn")
    mode.add_argument("--pack-images", nargs="+", metavar="DIR[@SCALE]|MANIFEST")
    mode.add_argument("--pack-training", type=Path, metavar="WORK", help="of psd pretrain")
    mode.add_argument("--unpack", type=Path, metavar="PARTS|ARCHIVE")
    add("--out", type=Path, help="folder of what a turn leaves, or of packed parts")
    add("--to", type=Path, help="folder to unpack into")
    pack = parser.add_argument_group("packing images")
    pack.add_argument("--archive", type=Path)
    pack.add_argument("--data-root", type=Path)
    pack.add_argument("--max-bytes", type=int, default=travel.MAX_IMAGES_BYTES)
    pack.add_argument(
        "--with-encoder",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="take a finished encoder along; without FOLDER: the preset's ImageNet weights",
    )
    train = parser.add_argument_group("a turn; all but the first three the same in every turn")
    train.add_argument("--resume", type=Path, help="--out of the turn before")
    train.add_argument("--minutes", type=float, default=9.0, help="of the turn [9]")
    train.add_argument("--device", default="auto")
    train.add_argument("--preset", default="tiny")
    train.add_argument("--encoder", choices=["preset", "dino"], default="preset")
    train.add_argument(
        "--precision", default="auto", choices=["auto", "float32", "bfloat16", "float16"]
    )
    train.add_argument("--steps", type=int, help="of each part [the preset's]")
    train.add_argument("--batch-size", type=int, help="of each part [the preset's]")
    train.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="PART.NAME=VALUE",
        help="one setting of a part's loop, or of diffusion: ldm.steps=60000 ldm.batch_size=64",
    )
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--name", help="of the bundle [the preset's]")
    train.add_argument("--licence", default="not stated", help="of the weights")
    train.add_argument(
        "--data", default="packed images", help="what it is trained on, for the card"
    )
    train.add_argument(
        "--end", action="store_true", help="train no further: a bundle of the weights so far"
    )
    train.add_argument("--stop-at", metavar="PART:STEP", help="stop there (for rehearsals)")
    options = parser.parse_args()
    for needs, name in (
        (options.pack_images, "archive"),
        (options.images or options.pack_training, "out"),
        (options.unpack, "to"),
    ):
        if needs and getattr(options, name) is None:
            parser.error(f"--{name} is missing")
    if options.minutes <= 0:
        parser.error("--minutes must be above 0")
    return options


def plan_from(options: argparse.Namespace) -> Plan:
    """The preset's plan with what the command line changes.

    Raises:
        ConfigError: If a setting does not exist or its value is no such thing.
    """
    plan = plan_of(options.preset).changed(
        steps=options.steps,
        batch_size=options.batch_size,
        precision=None if options.precision == "auto" else options.precision,
        seed=options.seed,
    )
    if options.encoder == "dino":
        plan = plan.with_dino_encoder()
    for text in options.set:
        name, _, value = text.partition("=")
        part, _, setting = name.partition(".")
        group = getattr(plan, part, None) if part in (*PARTS, "diffusion") else None
        known = [] if group is None else [field.name for field in fields(group)]
        if group is None or setting not in known:
            raise ConfigError(f"--set {text}: there is no such setting; {part} has {known}")
        plan = replace(plan, **{part: replace(group, **{setting: _value(text, value)})})
    return plan


def _value(text: str, value: str) -> Any:
    if value in ("float32", "bfloat16", "float16"):
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        raise ConfigError(f"--set {text}: {value!r} is no number, precision or list") from None
    return tuple(tuple(entry) for entry in parsed) if isinstance(parsed, list) else parsed


def pack_images(options: argparse.Namespace) -> None:
    """Make the archive of the images."""
    images = find_images(options.pack_images, data_root=options.data_root)
    with tempfile.TemporaryDirectory() as folder:
        encoder = None if options.with_encoder is None else Path(options.with_encoder)
        if options.with_encoder == "":
            plan = plan_from(options)
            if not isinstance(plan.preset.encoder, ConvEncoderConfig):
                raise ConfigError(
                    f"the encoder of {options.preset} is trained, there are no ImageNet weights of "
                    "it; give --with-encoder the folder of a trained one"
                )
            pool = open_pool(options.pack_images, data_root=options.data_root)
            work = Path(folder)
            Pretraining(plan, pool, work, resolve_device("cpu")).train("encoder", LoopOptions())
            encoder = work / "encoder"
        packed = travel.pack_images(
            images, options.archive, max_bytes=options.max_bytes, encoder=encoder
        )
    how = "as they are" if packed.quality is None else f"WebP quality {packed.quality}"
    print(f"{options.archive}: {packed.count} images, {how}, {packed.bytes:,} bytes")


def unpack(source: Path, to: Path) -> None:
    """Unpack an archive of images, a bundle, or a training, whatever it is."""
    if source.is_file():
        travel.unpack_images(source, to)
        print(f"{to}: images; use them as --images {to}")
    elif has_parts(source, travel.BUNDLE):
        bundle = travel.unpack_bundle(source, to)
        print(f"{to}: bundle {bundle.card.name}; use it as --model {to}")
    else:
        travel.unpack_training(source, to)
        print(f"{to}: a training; go on with psd pretrain --work {to}")


def turn(options: argparse.Namespace) -> int:
    """Train until the time is up, and leave what is there."""
    seconds = 60 * options.minutes
    until = _BEGAN + seconds - min(_RESERVE, _RESERVE_SHARE * seconds)
    plan = plan_from(options)
    travel.check_travels(plan.preset)
    check_new_folder(options.out)
    failure: BaseException | None = None
    with tempfile.TemporaryDirectory(prefix="gpu-pretrain-") as folder:
        scratch = Path(folder)
        images, work = options.images, scratch / "work"
        if not images.is_dir():
            images = scratch / "images"
            travel.unpack_images(options.images, images)
        if options.resume is not None:
            travel.unpack_training(options.resume, work)
        along = images / travel.ENCODER_FOLDER
        if along.is_dir() and not (work / "encoder").exists():
            shutil.copytree(along, work / "encoder")
        pool = open_pool([str(images)], seed=options.seed)
        training = Pretraining(plan, pool, work, resolve_device(options.device), options.seed)
        try:
            train(training, plan, until, options.stop_at, end=options.end)
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        try:
            state = leave(training, plan, options, scratch)
        except PathSegDiffError:
            if failure is None:
                raise
            raise failure from None  # it came before there was anything to leave
    minutes = (time.monotonic() - _BEGAN) / 60
    print(f"{state}; {minutes:.1f} min, {_size(options.out)}")
    if isinstance(failure, KeyboardInterrupt):
        return 130
    if failure is not None:
        raise failure
    return 0


def train(
    training: Pretraining, plan: Plan, until: float, stop_at: str | None, *, end: bool
) -> None:
    """Go on with one part after the other until the time is up, or end with what is there."""
    stop_part, _, stop_step = (stop_at or "").partition(":")
    shown, stopped = 0.0, False

    def progress(state: PretrainProgress) -> None:
        nonlocal shown, stopped
        now = time.monotonic()
        if now - shown > 20 or state.step == state.total_steps:
            shown = now
            figures = ", ".join(f"{k} {v:.4g}" for k, v in list(state.figures.items())[:5])
            print(f"{state.part} {state.step}/{state.total_steps} {figures}", flush=True)
        if state.part == stop_part and state.step >= int(stop_step):
            stopped = True
            signal.raise_signal(signal.SIGINT)  # the loop stops as at Ctrl-C, with a checkpoint

    # Weights from a file take no time, and where they are missing one should know at once.
    instant = isinstance(plan.preset.encoder, ConvEncoderConfig)
    for part in sorted(PARTS, key=lambda part: part != "encoder") if instant else PARTS:
        if training.finished(part):
            continue
        if time.monotonic() >= until:
            return
        steps = getattr(plan, part).steps
        options = LoopOptions(
            stop_at=until,
            report_every=max(1, min(50, steps // 20)),
            look_every=max(1, steps // 5),
            checkpoint_seconds=60,
            end=end,
        )
        try:
            if not training.train(part, options, progress=progress):
                return
        except KeyboardInterrupt:
            if stopped:
                return
            raise
        travel.round_weights(training.work / part)


def leave(training: Pretraining, plan: Plan, options: argparse.Namespace, scratch: Path) -> str:
    """Write the state or the bundle in parts, log and pictures; returns what there is in words."""
    out: Path = options.out
    unfinished = [part for part in PARTS if not training.finished(part)]
    if unfinished:
        count = travel.pack_training(training.work, out)
        state = (
            f"not finished: {', '.join(unfinished)}; {count} parts; go on with the same command, "
            f"--resume {out} and another --out"
        )
    else:
        bundle = training.assemble(
            scratch / "bundle",
            name=options.name or options.preset,
            title=plan.preset.title,
            licence=options.licence,
            data=options.data,
        )
        count = travel.pack_bundle(bundle, out)
        state = f"finished: a bundle in {count} parts; --unpack {out} --to FOLDER makes it"
    loose(training.work, out)
    return state


def loose(work: Path, out: Path) -> None:
    """Copy logs (the latest as log.csv) and pictures into ``out``, as many as it may hold."""
    room, left = MAX_FILES - len(list(out.iterdir())), MAX_PICTURES_BYTES
    latest = [work / part for part in reversed(PARTS)]
    logs = [folder / LOG_FILE for folder in latest if (folder / LOG_FILE).is_file()]
    pictures = [file for folder in latest for file in sorted(folder.glob("*.png"))]
    for file in (*logs, *pictures):
        size = file.stat().st_size
        if room and size <= left:
            latest_log = logs[:1] == [file]
            name = file.name if latest_log else f"{file.parent.name}-{file.name}"
            shutil.copyfile(file, out / name)
            room, left = room - 1, left - size


def _size(folder: Path) -> str:
    files = list(folder.iterdir())
    total = sum(file.stat().st_size for file in files)
    return f"{len(files)} files, {total / 2**20:.1f} MiB in {folder}"


if __name__ == "__main__":
    sys.exit(main())
