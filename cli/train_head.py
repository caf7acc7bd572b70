"""``psd train-head``: stage 2, training."""

from pathlib import Path
from typing import Any

import click

from cli.options import (
    PATH,
    device_option,
    head_training_options,
    head_training_settings,
    is_quiet,
    parts_options,
    precision_option,
    seed_option,
)


@click.command("train-head")
@click.option(
    "--features", type=PATH, help="Feature store [default: newest complete one in features/]."
)
@parts_options
@click.option("--out", type=PATH, help="Run to make or continue [default: runs/STORE-SETTINGS].")
@head_training_options
@click.option("--lr", type=float, default=1e-4, show_default=True, help="Learning rate of Adam.")
@click.option(
    "--taps",
    default="all",
    show_default=True,
    help="Such as up_05,up_08; all; or the encoder's tokens, alone or too: all,tokens.",
)
@click.option(
    "--head-width",
    type=click.IntRange(4),
    metavar="W",
    help="Layers of W, W/2 and W/4 channels [default: as the model says; the paper's is 256].",
)
@device_option
@precision_option
@seed_option
@click.pass_context
def train_head(
    ctx: click.Context,
    features: Path | None,
    split: str | None,
    val: str,
    fold: int | None,
    limit: int | None,
    out: Path | None,
    lr: float,
    taps: str,
    head_width: int | None,
    device: str,
    precision: str,
    seed: int,
    **training: Any,
) -> None:
    """Train the segmentation head from a feature store (stage 2).

    Running the same command again continues what was interrupted.

    \b
    Example:
      psd train-head
      psd train-head --features features/glas-tiny-t50.zarr --epochs 60 --out runs/glas
      psd train-head --fold 0 --crop none --batch-size 2
    """
    chosen = head_training_settings(training)

    from cli.progress import TrainingProgress, duration
    from pathsegdiff.config import parse_head_inputs
    from pathsegdiff.device import resolve_device, resolve_precision
    from pathsegdiff.features.store import FeatureStore
    from pathsegdiff.segmentation import train
    from pathsegdiff.segmentation.runs import newest_store, random_weights_note

    if features is None:
        features = newest_store(Path("features"))
        click.echo(f"features: {features} (the newest complete store)")
    store = FeatureStore.open(features)
    place = resolve_device(device)
    settings = train.plan_settings(
        store,
        split=split,
        val=val,
        fold=fold,
        limit=limit,
        learning_rate=lr,
        taps=None if taps == "all" else parse_head_inputs(taps),
        head_width=head_width,
        precision=resolve_precision(precision, place),
        seed=seed,
        **chosen,
    )
    out = Path("runs") / train.default_run_name(store, settings) if out is None else out
    for note in random_weights_note(store.model):
        click.echo(f"note: {note}", err=True)
    click.echo(f"{out}: {_describe(settings, store.region_px)}")
    quiet = is_quiet(ctx)
    with TrainingProgress(quiet=quiet) as bar:
        result = train.train_head(store, out, settings, device=place, progress=bar.show)
    if not result.steps_done_now:
        click.echo(f"{out} has finished before, after {result.steps} steps; nothing to do")
    else:
        click.echo(f"{result.steps} steps in {duration(result.seconds)}")
    kept = result.kept
    quality = f", validation mIoU {kept['val_miou']:.4f}" if "val_miou" in kept else ""
    click.echo(f"kept: step {kept['step']:.0f}{quality}: {out}")


def _describe(settings: Any, region_px: int) -> str:
    crop = f"whole {region_px} px regions"
    if settings.crop_px is not None:
        crop = f"{settings.crop_px} px crops of {region_px} px regions"
    length = f"{settings.epochs} epochs" if settings.steps is None else f"{settings.steps} steps"
    part = settings.split if settings.fold is None else f"all folds but {settings.fold}"
    return (
        f"training on {part}, {length}, batches of {settings.batch_size} {crop}, "
        f"head width {settings.head_width}, {settings.precision}"
    )
