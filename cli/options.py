"""Options that several commands share, so that they read the same everywhere."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

Number = TypeVar("Number", int, float)
Command = TypeVar("Command", bound=Callable[..., Any])
#: Such as a ``click.option``.
Decorator = Callable[[Any], Any]

#: A path argument that arrives as ``pathlib.Path``.
PATH = click.Path(path_type=Path)


def device_option(command: Command) -> Command:
    """``--device``: auto takes CUDA where there is one."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda[:N]",
        help="Where to compute.",
    )(command)


def seed_option(command: Command) -> Command:
    """``--seed``."""
    return click.option(
        # torch's generators take no more than 64 bits.
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(0, 2**63 - 1),
        metavar="N",
        help="Seed.",
    )(command)


def data_root_option(command: Command) -> Command:
    """``--data-root``."""
    return click.option(
        "--data-root",
        type=PATH,
        help="Folder with the images [default: $PSD_DATA/NAME, else data/NAME].",
    )(command)


def precision_option(command: Command) -> Command:
    """``--precision``: what the networks compute in."""
    return click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="What the networks compute in; auto: float32 on a CPU, bfloat16 on a GPU.",
    )(command)


def is_quiet(ctx: click.Context) -> bool:
    """Whether ``psd -q`` was asked for; of a command in a group too."""
    return bool(ctx.find_root().params.get("quiet"))


def decorated(options: Sequence[Decorator]) -> Decorator:
    """One decorator for several options, which help lists in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def parts_options(command: Command) -> Command:
    """``--split``, ``--val``, ``--fold`` and ``--limit-images``: what trains and what validates."""
    options = [
        click.option("--split", help="Trained on [default: as the data set says, usually train]."),
        click.option(
            "--val",
            default="0.2",
            show_default=True,
            metavar="FRACTION|SPLIT",
            help="Validation: a share of the training groups (patients, cases), or a split; "
            "0 for none.",
        ),
        click.option(
            "--fold",
            type=int,
            metavar="K",
            help="Hold out fold K of the data set for evaluation, train on the other folds.",
        ),
        click.option(
            "--limit-images",
            "limit",
            type=click.IntRange(1),
            metavar="N",
            help="Train on N images only, drawn by the seed; the validation part stays the same.",
        ),
    ]
    return decorated(options)(command)


def head_training_options(command: Command) -> Command:
    """How a head is trained, beside its parts, taps, width, learning rate and seed.

    The command takes them as ``**training`` and reads them with ``head_training_settings``.
    """
    options = [
        click.option(
            "--epochs", type=click.IntRange(1), help="Passes over the training part [default: 40]."
        ),
        click.option(
            "--steps", type=click.IntRange(1), help="Optimiser steps, instead of --epochs."
        ),
        click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True),
        click.option(
            "--crop",
            default="auto",
            show_default=True,
            metavar="PX|none|auto",
            help="Side of the random crops; none: whole regions; auto: whole ones up to 512 px, "
            "else 384.",
        ),
        click.option(
            "--schedule",
            type=click.Choice(["constant", "cosine"]),
            default="constant",
            show_default=True,
            help="Of the learning rate.",
        ),
        click.option(
            "--augment",
            type=click.Choice(["none", "flips"]),
            default="none",
            show_default=True,
            help="flips mirrors the feature maps at random.",
        ),
        click.option(
            "--normalize",
            type=click.Choice(["channel", "none"]),
            default="channel",
            show_default=True,
            help="Standardise each feature channel with the training part's mean and deviation.",
        ),
        click.option(
            "--keep",
            type=click.Choice(["auto", "best", "last"]),
            default="auto",
            show_default=True,
            help="The head that is best on validation, or the last; auto: the last with "
            "--schedule cosine.",
        ),
    ]
    return decorated(options)(command)


def head_training_settings(training: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``plan_settings`` that ``head_training_options`` stand for.

    Raises:
        click.UsageError: If both epochs and steps are given, or the crop is no crop.
    """
    if training["epochs"] is not None and training["steps"] is not None:
        raise click.UsageError("give --epochs or --steps, not both")
    settings = {name: value for name, value in training.items() if name != "crop"}
    keep = training["keep"]
    return {
        **settings,
        "crop_px": _parse_crop(training["crop"]),
        "keep": None if keep == "auto" else keep,
    }


def _parse_crop(text: str) -> int | str | None:
    if text in ("none", "auto"):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a number of pixels, none or auto", param_hint="--crop"
        ) from None


def numbers(text: str | None, kind: Callable[[str], Number], option: str) -> list[Any]:
    """The numbers in "1,2", each once; none where the option is not given.

    Raises:
        click.BadParameter: If it is something else.
    """
    if text is None:
        return []
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a number, or numbers with commas between", param_hint=option
        ) from None


def rate_numbers(text: str | None, option: str) -> list[float]:
    """``numbers`` that can be learning rates.

    Raises:
        click.BadParameter: If one of them is no number above 0.
    """
    found: list[float] = numbers(text, float, option)
    for rate in found:
        if not 0 < rate < math.inf:
            raise click.BadParameter(f"must be a number above 0, got {rate:g}", param_hint=option)
    return found


def seed_numbers(text: str | None, option: str) -> list[int]:
    """``numbers`` that a generator takes.

    Raises:
        click.BadParameter: If one of them is no seed.
    """
    found: list[int] = numbers(text, int, option)
    if not all(0 <= seed < 2**63 for seed in found):
        raise click.BadParameter(f"{text!r}: seeds are from 0 to 2^63 - 1", param_hint=option)
    return found
