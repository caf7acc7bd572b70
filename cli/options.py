"""Options that several commands share, so that they read the same everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

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


def parts_options(command: Command) -> Command:
    """``--split``, ``--val``, ``--fold`` and ``--limit-images``: what trains and what validates."""
    for option in (
        click.option(
            "--limit-images",
            "limit",
            type=click.IntRange(1),
            metavar="N",
            help="Train on N images only, drawn by the seed; the validation part stays the same.",
        ),
        click.option(
            "--fold",
            type=int,
            metavar="K",
            help="Hold out fold K of the data set for evaluation, train on the other folds.",
        ),
        click.option(
            "--val",
            default="0.2",
            show_default=True,
            metavar="FRACTION|SPLIT",
            help="Validation: a share of the training groups (patients, cases), or a split; "
            "0 for none.",
        ),
        click.option("--split", help="Trained on [default: as the data set says, usually train]."),
    ):
        command = option(command)
    return command
