"""``psd extract``: stage 1."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import (
    PATH,
    data_root_option,
    device_option,
    is_quiet,
    precision_option,
    seed_option,
)

if TYPE_CHECKING:
    from pathsegdiff.features.stage_one import View


@click.command()
@click.option("--dataset", required=True, help="A name from `psd data list`, or a manifest file.")
@data_root_option
@click.option("--split", "splits", multiple=True, help="Only this part; may be given again.")
@click.option("--model", default="tiny", show_default=True, help="A bundle's name or folder.")
@click.option(
    "--t",
    "timesteps",
    default="50",
    show_default=True,
    metavar="T[,T...]",
    help="Diffusion timesteps of the features, 0-based; each gets a store of its own.",
)
@click.option(
    "--cond",
    type=click.Choice(["encoder", "none", "both"]),
    default="encoder",
    show_default=True,
    help="Condition on the encoder's vector, on nothing (null), or one store for each.",
)
@click.option("--taps", default="all", show_default=True, help="Such as up_05,up_08; or all.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32", "int8", "float16-5bit"]),
    default="float16",
    show_default=True,
    help="Of the stored features. int8 (a scale per channel and sample) takes less than half the "
    "bytes of float16, float16-5bit (a rounded mantissa) two thirds.",
)
@click.option("--mpp", type=float, help="Micrometres per pixel of a region [default: manifest's].")
@click.option(
    "--layout",
    type=click.Choice(["levels", "dense"]),
    default="levels",
    show_default=True,
    help="One array per stride, or the stack on the stride-4 grid.",
)
@click.option("--tokens/--no-tokens", default=False, help="Store the encoder's patch tokens too.")
@device_option
@precision_option
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Patches per forward [default: 3 on a CPU, 32 on a GPU].",
)
@seed_option
@click.option(
    "--out",
    type=PATH,
    help="Store to write or continue; a folder where there are "
    "several [default: features/NAME-MODEL-tT[-null].zarr].",
)
@click.option(
    "--dry-run", is_flag=True, help="Print patches, bytes and time expected; write nothing."
)
@click.pass_context
def extract(
    ctx: click.Context,
    dataset: str,
    data_root: Path | None,
    splits: tuple[str, ...],
    model: str,
    timesteps: str,
    cond: str,
    taps: str,
    dtype: str,
    mpp: float | None,
    layout: str,
    tokens: bool,
    device: str,
    precision: str,
    batch_size: int | None,
    seed: int,
    out: Path | None,
    dry_run: bool,
) -> None:
    """Cache the UNet features of every image of a data set (stage 1).

    Running the same command again finishes what was interrupted; running it several times at once,
    on machines that share the folder too, shares the work.

    \b
    Example:
      psd extract --dataset demo
      psd extract --dataset glas --data-root ~/GlaS --split train --split testB --t 50
      psd extract --dataset glas --t 50,100,200 --cond both --out features/glas
    """
    from cli.progress import Progress, duration, size
    from pathsegdiff.config import parse_taps
    from pathsegdiff.data.manifest import open_dataset
    from pathsegdiff.device import resolve_device, resolve_precision
    from pathsegdiff.diffusion.bundle import load_bundle
    from pathsegdiff.features.extract import extract_dataset, plan_extraction
    from pathsegdiff.features.stage_one import StageOne, iterate_views

    views = tuple(iterate_views(_parse_timesteps(timesteps), _CONDITIONINGS[cond]))
    tap_names = parse_taps(taps)
    opened = open_dataset(dataset, data_root=data_root, splits=splits, mpp=mpp)
    bundle = load_bundle(model)
    place = resolve_device(device)
    stage_one = StageOne(
        bundle.load(device=place),
        views=views,
        taps=tap_names,
        dtype=dtype,
        precision=resolve_precision(precision, place),
        layout=layout,
        tokens=tokens,
        seed=seed,
        device=place,
        batch_size=batch_size or (3 if place.type == "cpu" else 32),
    )
    if dry_run:
        plan = plan_extraction(opened, bundle, stage_one)
        click.echo(
            f"{plan.samples} samples, {plan.patches} patches; "
            f"{size(plan.feature_bytes)} of features and up to {size(plan.other_bytes)} of "
            f"labels and images; about {duration(plan.seconds)} "
            f"at {plan.seconds_per_patch:.3g} s per patch"
        )
        return
    stores = _stores(views, out, opened.name, bundle.card.name)
    quiet = is_quiet(ctx)
    with Progress("extract", "patches", quiet=quiet) as progress:
        results = extract_dataset(opened, bundle, stage_one, stores, progress=progress)
    for result in results:
        elsewhere = f", {result.elsewhere} by other processes" if result.elsewhere else ""
        click.echo(
            f"{result.written} samples written{elsewhere}, {result.skipped} already complete: "
            f"{result.path}"
        )


_CONDITIONINGS = {"encoder": ("encoder",), "none": ("none",), "both": ("encoder", "none")}


def _parse_timesteps(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not T or T,T,...", param_hint="--t") from None


def _stores(
    views: "tuple[View, ...]", out: Path | None, dataset: str, model: str
) -> "dict[View, Path]":
    from pathsegdiff.errors import StoreError
    from pathsegdiff.features.extract import store_name

    if out is not None and len(views) == 1:
        return {views[0]: out}
    if out is not None and (out / "zarr.json").exists():
        raise StoreError(
            f"{out} is one store, but {len(views)} timesteps and conditions need one each; "
            "give a folder as --out"
        )
    folder = Path("features") if out is None else out
    return {view: folder / store_name(dataset, model, view) for view in views}
