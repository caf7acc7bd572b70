"""``psd baseline``: a network that learns from the images, a row of the comparison table."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import (
    PATH,
    data_root_option,
    device_option,
    is_quiet,
    parts_options,
    precision_option,
    seed_option,
)

if TYPE_CHECKING:
    import torch

    from pathsegdiff.pipeline.baselines.baseline import Baseline
    from pathsegdiff.pipeline.baselines.ddpmseg import DDPMSeg

#: Rows that are heads on a store: its condition (None for any), and ``--taps`` of train-head.
HEADS = {
    "pathsegdiff": ("encoder", "all"),
    "pathsegdiff-uncond": ("none", "all"),
    "hipt": (None, "tokens"),
}
#: Of heads, of networks on images, and of the ensemble that reads stores.
NAMES = (*HEADS, "res-unet", "vgg16-fcn8", "dcan", "effnet-unet", "ddpm-seg")


def _rates(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter(f"must be numbers such as 1e-3,3e-4, got {value!r}") from None


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option("--dataset", help="A name from `psd data list`, or a manifest file.")
@data_root_option
@click.option(
    "--features",
    multiple=True,
    metavar="STORE",
    help="Instead of --dataset, of a head: its store; of ddpm-seg: one for each timestep.",
)
@parts_options
@click.option(
    "--eval-split", help="Scored [default: the held-out fold, else as the data set says]."
)
@click.option("--out", type=PATH, help="Run to make or continue [default: runs/DATASET-NAME].")
@click.option(
    "--size",
    "size_px",
    type=int,
    metavar="PX",
    help="Side that each region is resized to; predictions are resized back [default: 512].",
)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps, instead of --minutes.")
@click.option("--minutes", type=float, help="Of training and validation [default: 60].")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Images [default: 4]; of ddpm-seg pixels of each classifier [default: 64].",
)
@click.option(
    "--lr",
    "rates",
    callback=_rates,
    metavar="X[,...]",
    help="Learning rate; several: the one that is best on validation after a tenth of the training "
    "[default: 1e-3 for res-unet and ddpm-seg, 3e-4 on VGG16, 5e-4 for effnet-unet].",
)
@click.option(
    "--encoder-weights",
    metavar="FILE|imagenet|auto",
    help="State dict that the encoder begins with; imagenet: torchvision's, fetched where it is "
    "not there; auto: the same where they can be had, else from scratch [default: from scratch].",
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
    dataset: str | None,
    data_root: Path | None,
    features: tuple[str, ...],
    split: str | None,
    val: str,
    fold: int | None,
    limit: int | None,
    eval_split: str | None,
    out: Path | None,
    size_px: int | None,
    steps: int | None,
    minutes: float | None,
    batch_size: int | None,
    rates: tuple[float, ...],
    encoder_weights: str | None,
    keep: str,
    device: str,
    precision: str,
    seed: int,
) -> None:
    """Train a row of the comparison table and score it as `psd eval` does.

    It sees the same images, validation part and test images as `psd train-head` on a store of the
    data set. res-unet is a U-Net with a ResNet-18 encoder; vgg16-fcn8 (FCN-8s) and dcan (objects
    and their contours) stand on VGG16 with batch normalisation; all three from scratch unless
    --encoder-weights is given. effnet-unet is a U-Net with an EfficientNet-Lite0 encoder and
    ImageNet weights. These need pip install 'pathsegdiff[baselines]'. ddpm-seg is an ensemble of
    pixel classifiers that reads stores, its authors' of t = 50, 150 and 250. Running the same
    command again continues what was interrupted. pathsegdiff, pathsegdiff-uncond and hipt are heads
    on one store, of `psd extract`, `psd extract --cond none` and `psd extract --tokens`.

    \b
    Example:
      psd baseline effnet-unet --dataset glas --data-root ~/GlaS --minutes 60
      psd baseline res-unet --dataset demo --size 256 --steps 100
      psd baseline vgg16-fcn8 --dataset bcss --encoder-weights imagenet
      psd baseline res-unet --dataset glas --lr 1e-3,3e-4,1e-4 --out runs/res-unet
      psd baseline ddpm-seg --features t50.zarr --features t150.zarr --features t250.zarr
      psd baseline hipt --features features/glas-tiny-t50.zarr --fold 0
    """
    if steps is not None and minutes is not None:
        raise click.UsageError("give --steps or --minutes, not both")
    parts = {"split": split, "val": val, "fold": fold, "limit": limit}
    others: dict[str, Any] = {"steps": steps, "keep": keep, "seed": seed, **parts}
    if batch_size is not None:
        others["batch_size"] = batch_size
    if name in HEADS:
        _refuse_given(
            name,
            "it reads --features",
            {
                "--dataset": dataset,
                "--data-root": data_root,
                "--size": size_px,
                "--minutes": minutes,
                "--encoder-weights": encoder_weights,
            },
        )
        if len(features) != 1 or len(rates) > 1:
            raise click.UsageError(f"{name} takes one --features, and one --lr at most")
        asked = {
            "--split": split,
            "--val": val,
            "--fold": fold,
            "--limit-images": limit,
            "--steps": steps,
            "--batch-size": batch_size,
            "--lr": rates[0] if rates else None,
            "--keep": keep if _is_given(ctx, "keep") else None,
            "--device": device,
            "--precision": precision,
            "--seed": seed,
        }
        _train_head(ctx, name, Path(features[0]), eval_split, out, asked)
        return
    if name == "ddpm-seg":
        _refuse_given(
            name,
            "it reads --features, in float32",
            {
                "--dataset": dataset,
                "--data-root": data_root,
                "--size": size_px,
                "--minutes": minutes,
                "--encoder-weights": encoder_weights,
                "--precision": None if precision in ("auto", "float32") else precision,
            },
        )
        if not features:
            raise click.UsageError(
                "ddpm-seg needs --features, once for each store: psd extract --t 50,150,250"
            )
        if len(rates) > 1:
            raise click.UsageError("ddpm-seg takes one --lr")
        if rates:
            others["learning_rate"] = rates[0]
        _train_ensemble(ctx, features, eval_split, out, device, others)
        return
    _refuse_given(name, "it reads images", {"--features": features or None})
    if dataset is None:
        raise click.UsageError("Missing option '--dataset'.")

    from cli.fetch import encoder_file
    from cli.progress import TrainingProgress
    from pathsegdiff.data.manifest import open_dataset
    from pathsegdiff.device import resolve_device, resolve_precision
    from pathsegdiff.pipeline.baselines.baseline import Baseline
    from pathsegdiff.pipeline.baselines.networks import architecture_of
    from pathsegdiff.pipeline.baselines.pilots import choose_rate
    from pathsegdiff.pipeline.baselines.runs import (
        PATIENCE,
        default_baseline_name,
        plan_baseline,
    )

    opened = open_dataset(dataset, data_root=data_root)
    place = resolve_device(device)
    file = None
    if encoder_weights is not None:
        file = encoder_file(encoder_weights, architecture_of(name).encoder, is_quiet(ctx))
    if size_px is not None:
        others["size_px"] = size_px
    settings = plan_baseline(
        opened,
        name,
        minutes=minutes,
        learning_rate=rates[0] if len(rates) == 1 else None,
        encoder_weights=file,
        precision=resolve_precision(precision, place),
        **others,
    )
    quiet = is_quiet(ctx)
    pilots: dict[str, float | None] = {}
    if len(rates) > 1:
        usual = default_baseline_name(opened, settings)
        name_of_all = out or Path("runs") / f"{usual}-lr-chosen"
        with TrainingProgress("pilot", quiet=quiet) as bar:
            best, pilots = choose_rate(
                opened, settings, rates, name_of_all, encoder_weights=file,
                device=place, progress=bar.show, log=click.echo,
            )  # fmt: skip
        settings = replace(settings, learning_rate=best)
    out = Path("runs") / default_baseline_name(opened, settings) if out is None else out
    made = Baseline(opened, settings, eval_split=eval_split, encoder_weights=file)
    patience = (
        f", at most {PATIENCE} validations without improvement"
        if made.parts.val and keep == "best"
        else ""
    )
    click.echo(
        f"{out}: {name}, {len(made.parts.train)} images of {opened.name} train and "
        f"{len(made.parts.val)} validate, {settings.length()}{patience}, batches of "
        f"{settings.batch_size} at {settings.size_px} px, {settings.precision}, learning rate "
        f"{settings.learning_rate:g}"
    )
    _train_and_score(made, out, place, pilots, quiet=quiet)


def _is_given(ctx: click.Context, option: str) -> bool:
    return ctx.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE


def _train_head(
    ctx: click.Context,
    name: str,
    features: Path,
    eval_split: str | None,
    out: Path | None,
    asked: dict[str, Any],
) -> None:
    """Train and score a head by a user's own commands."""
    from cli.main import run_within
    from pathsegdiff.errors import StoreError
    from pathsegdiff.features.store import FeatureStore

    condition, taps = HEADS[name]
    found = FeatureStore.open(features).recipe.conditioning
    if condition not in (None, found):
        raise StoreError(
            f"{features} was extracted with --cond {found}, {name} reads one of --cond {condition}"
        )
    if out is None:
        parts = {
            "fold": asked["--fold"],
            "images": asked["--limit-images"],
            "seed": asked["--seed"],
        }
        more = "".join(f"-{part}-{value}" for part, value in parts.items() if value is not None)
        out = Path("runs") / f"{features.stem}-{name}{more}"
    given = [part for k, v in asked.items() if v is not None for part in (k, str(v))]
    store = ["--features", str(features)]
    run_within(ctx, ["train-head", *store, "--taps", taps, "--out", str(out), *given])
    scored = [] if eval_split is None else ["--split", eval_split]
    run_within(ctx, ["eval", "--run", str(out), *store, "--device", asked["--device"], *scored])


def _train_ensemble(
    ctx: click.Context,
    features: tuple[str, ...],
    eval_split: str | None,
    out: Path | None,
    device: str,
    others: dict[str, Any],
) -> None:
    from pathsegdiff.device import resolve_device
    from pathsegdiff.pipeline.baselines.ddpmseg import DDPMSeg
    from pathsegdiff.pipeline.baselines.pixels import open_stores

    place = resolve_device(device)
    made = DDPMSeg(open_stores(features), eval_split=eval_split, **others)
    out = Path("runs") / made.default_name() if out is None else out
    click.echo(
        f"{out}: ddpm-seg at t = {', '.join(map(str, made.timesteps))}, {made.reader.channels} "
        f"channels, {len(made.parts.train)} images of {made.card.name} train and "
        f"{len(made.parts.val)} validate, batches of {made.settings.batch_size} pixels"
    )
    _train_and_score(made, out, place, quiet=is_quiet(ctx))


def _train_and_score(
    made: "Baseline | DDPMSeg",
    out: Path,
    place: "torch.device",
    pilots: dict[str, float | None] | None = None,
    *,
    quiet: bool,
) -> None:
    from cli.progress import Progress, TrainingProgress, duration
    from cli.results import show_evaluation
    from pathsegdiff.pipeline.baselines.pilots import write_pilots

    with TrainingProgress("baseline", quiet=quiet) as bar:
        result = made.train(out, device=place, progress=bar.show)
    if not result.steps_done_now:
        click.echo(f"{result.path} has finished before, after {result.steps} steps")
    else:
        click.echo(f"{result.steps} steps in {duration(result.seconds)}")
    kept = result.kept
    quality = f", validation mIoU {kept['val_miou']:.4f}" if "val_miou" in kept else ""
    click.echo(f"kept: step {kept['step']:.0f}{quality}: {result.path}")
    if pilots:  # before the run is scored: then it counts as finished, whatever it lacks
        write_pilots(out, pilots)
    with Progress("eval", "images", quiet=quiet) as progress:
        found = made.evaluate(out, device=place, progress=progress)
    show_evaluation(found)


def _refuse_given(name: str, reason: str, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if value is not None:
            raise click.UsageError(f"{name} has no {option}: {reason}")
