"""The options that ``psd reproduce``'s tables and figures have in common."""

import re
from pathlib import Path

import click

from cli.options import (
    PATH,
    Decorator,
    data_root_option,
    decorated,
    numbers,
    precision_option,
    seed_numbers,
)

#: Of a table, unless others are asked for.
TABLE_ROWS = {
    "table2": "tokens,res-unet,vgg16-fcn8,null,conditioned",
    "table4": "tokens,res-unet,dcan,ddpm-seg,vgg16-fcn8,null,conditioned,effnet-unet",
}


def names(text: str | None) -> tuple[str, ...]:
    """The names in "a, b"; none in nothing."""
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _seeds(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    return tuple(seed_numbers(value, "--seeds"))


def _folds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    return tuple(numbers(value, int, "--folds"))


def _limits(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int | None, ...]:
    parts = [part.strip() for part in value.split(",")]
    if not all(part == "all" or re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts):
        raise click.BadParameter(f"must be numbers, or all, such as 5,20,all, got {value!r}")
    return tuple(None if part == "all" else int(part) for part in parts)


def _weights(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    from pathsegdiff.pipeline.baselines.imagenet_files import WORDS
    from pathsegdiff.pipeline.tables.rows import ENCODERS

    found: dict[str, str] = {}
    for text in value:
        encoder, _, file = text.partition("=")
        if text not in WORDS and (encoder not in ENCODERS or not file):
            raise click.BadParameter(
                f"must be {', '.join(WORDS)} or ENCODER=FILE, ENCODER one of "
                f"{', '.join(ENCODERS)}, got {text!r}"
            )
        for name in ENCODERS if text in WORDS else (encoder,):
            if name in found:
                raise click.BadParameter(f"is given twice for {name}: {found[name]} and {text}")
            found[name] = file or text
    return found


encoder_weights_option = click.option(
    "--encoder-weights",
    multiple=True,
    callback=_weights,
    metavar="imagenet|auto|ENCODER=FILE",
    help="What encoders begin with: torchvision's ImageNet weights, fetched where they are not "
    "there; auto: these where they can be had, else from scratch; or a file at hand (.pth or "
    ".safetensors, as torchvision and timm have them) of resnet18 (row res-unet) or vgg16_bn "
    "(vgg16-fcn8 and dcan), may be given for each [default: from scratch].",
)


def common_options(name: str, dataset: str, model: str) -> list[Decorator]:
    """Of every table and figure that is trained: on what, for how long, where to."""
    return [
        click.option(
            "--dataset",
            default=dataset,
            show_default=True,
            envvar="DATASET",
            help="Another data set in its place.",
        ),
        data_root_option,
        click.option(
            "--model",
            default=model,
            show_default=True,
            envvar="MODEL",
            help="A bundle's name or folder.",
        ),
        click.option(
            "--budget",
            type=click.Choice(["short", "full"]),
            default="short",
            show_default=True,
            envvar="BUDGET",
            help="Of each run: minutes on two cores, or hours (docs/reproduction.md).",
        ),
        precision_option,
        click.option(
            "--jobs", type=click.IntRange(1), help="Runs at a time [default: cores, on a GPU one]."
        ),
        click.option(
            "--out",
            type=PATH,
            default=Path("reproduction") / name,
            show_default=True,
            envvar="OUT",
        ),
    ]


def table_options(name: str, dataset: str, model: str, rows: str) -> Decorator:
    """What the tables that are trained have in common."""
    return decorated(
        [
            *common_options(name, dataset, model),
            click.option(
                "--eval-split",
                help="Scored [default: as the data set says, such as testB of GlaS].",
            ),
            click.option(
                "--random",
                type=PATH,
                help="Bundle of the model's shapes with random weights, for the row random "
                "[default: models/PRESET-random, made where missing].",
            ),
            click.option(
                "--unconditional",
                metavar="NAME|BUNDLE",
                help="A model of its own for the row null [default: the model with the null "
                "condition].",
            ),
            encoder_weights_option,
            click.option("--t", "timestep", type=int, default=50, show_default=True),
            click.option(
                "--rows",
                default=rows,
                show_default=True,
                metavar="NAME[,...]",
                help="Rows of ours [all: conditioned, null, tokens, both, random, res-unet, "
                "vgg16-fcn8, dcan, ddpm-seg, effnet-unet].",
            ),
            click.option(
                "--seeds",
                default="0,1,2",
                show_default=True,
                callback=_seeds,
                metavar="N[,...]",
            ),
            click.option(
                "--folds",
                callback=_folds,
                metavar="K[,...]",
                help="Hold these folds out and score them, instead of the official split.",
            ),
            click.option(
                "--limit-images",
                default="all",
                show_default=True,
                callback=_limits,
                metavar="N[,...]",
                help="Training images: a line for each number.",
            ),
            click.option("--table-only", is_flag=True, help="Of what there is; run nothing."),
        ]
    )
