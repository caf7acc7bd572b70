"""``psd baseline``: a network that learns from the images, a row of the comparison table."""

from pathlib import Path

import click

from cli.options import (
    PATH,
    data_root_option,
    device_option,
    parts_options,
    precision_option,
    seed_option,
)

NAMES = ("res-unet", "vgg16-fcn8", "effnet-unet")


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option("--dataset", required=True, help="A name from `psd data list`, or a manifest file.")
@data_root_option
@parts_options
@click.option(
    "--eval-split", help="Scored [default: the held-out fold, else as the data set says]."
)
@click.option("--out", type=PATH, help="Run to make or continue [default: runs/DATASET-NAME].")
@click.option(
    "--size",
    "size_px",
    type=int,
    default=512,
    show_default=True,
    metavar="PX",
    help="Side that each region is resized to; predictions are resized back.",
)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps, instead of --minutes.")
@click.option("--minutes", type=float, help="Of training and validation [default: 60].")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--lr",
    type=float,
    help="Of AdamW [default: 1e-3 for res-unet, 3e-4 for vgg16-fcn8, 5e-4 for effnet-unet].",
)
@click.option(
    "--encoder-weights",
    type=PATH,
    metavar="FILE",
    help="State dict that the encoder begins with, such as torchvision's for ImageNet.",
)
@click.option(
    "--keep",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="The weights that are best on validation (and no improvement for long ends the training), "
    "or the last.",
)
@device_option
@precision_option
@seed_option
@click.pass_context
def baseline(
    ctx: click.Context,
    name: str,
    dataset: str,
    data_root: Path | None,
    split: str | None,
    val: str,
    fold: int | None,
    limit: int | None,
    eval_split: str | None,
    out: Path | None,
    size_px: int,
    steps: int | None,
    minutes: float | None,
    batch_size: int,
    lr: float | None,
    encoder_weights: Path | None,
    keep: str,
    device: str,
    precision: str,
    seed: int,
) -> None:
    """Train a network on the images themselves and score it as `psd eval` does.

    It sees the same images, validation part and test images as `psd train-head` on a store of the
    data set. res-unet is a U-Net with a ResNet-18 encoder and vgg16-fcn8 the FCN-8s on VGG16 (with
    batch normalisation), both from scratch unless --encoder-weights is given; effnet-unet is a
    U-Net with an EfficientNet-Lite0 encoder and ImageNet weights. Running the same command again
    continues what was interrupted. Needs pip install 'pathsegdiff[baselines]'.

    \b
    Example:
      psd baseline effnet-unet --dataset glas --data-root ~/GlaS --minutes 60
      psd baseline res-unet --dataset demo --size 256 --steps 100
      psd baseline vgg16-fcn8 --dataset bcss --encoder-weights vgg16_bn-6c64b313.pth
      psd baseline effnet-unet --dataset glas --limit-images 5
    """
    if steps is not None and minutes is not None:
        raise click.UsageError("give --steps or --minutes, not both")

    from cli.progress import Progress, TrainingProgress, duration
    from cli.results import show_evaluation
    from pathsegdiff.data.manifest import open_dataset
    from pathsegdiff.device import resolve_device, resolve_precision
    from pathsegdiff.pipeline.baselines.baseline import Baseline
    from pathsegdiff.pipeline.baselines.runs import (
        PATIENCE,
        default_baseline_name,
        plan_baseline,
    )

    opened = open_dataset(dataset, data_root=data_root)
    place = resolve_device(device)
    settings = plan_baseline(
        opened,
        name,
        split=split,
        val=val,
        fold=fold,
        limit=limit,
        size_px=size_px,
        steps=steps,
        minutes=minutes,
        batch_size=batch_size,
        learning_rate=lr,
        encoder_weights=encoder_weights,
        keep=keep,
        precision=resolve_precision(precision, place),
        seed=seed,
    )
    out = Path("runs") / default_baseline_name(opened, settings) if out is None else out
    made = Baseline(opened, settings, eval_split=eval_split, encoder_weights=encoder_weights)
    patience = (
        f", at most {PATIENCE} validations without improvement"
        if made.parts.val and keep == "best"
        else ""
    )
    click.echo(
        f"{out}: {name}, {len(made.parts.train)} images of {opened.name} train and "
        f"{len(made.parts.val)} validate, {settings.length()}{patience}, batches of {batch_size} "
        f"at {size_px} px, {settings.precision}"
    )
    quiet = bool(ctx.parent and ctx.parent.params.get("quiet"))
    with TrainingProgress("baseline", quiet=quiet) as bar:
        result = made.train(out, device=place, progress=bar.show)
    if not result.steps_done_now:
        click.echo(f"{out} has finished before, after {result.steps} steps")
    else:
        click.echo(f"{result.steps} steps in {duration(result.seconds)}")
    kept = result.kept
    quality = f", validation mIoU {kept['val_miou']:.4f}" if "val_miou" in kept else ""
    click.echo(f"kept: step {kept['step']:.0f}{quality}: {out}")
    with Progress("eval", "images", quiet=quiet) as progress:
        found = made.evaluate(out, device=place, progress=progress)
    show_evaluation(found)
