"""``psd predict``: both stages on image files."""

from pathlib import Path

import click

from cli.options import PATH, device_option, is_quiet


@click.command()
@click.option("--run", "run_path", type=PATH, required=True, help="A trained run.")
@click.option("--out", type=PATH, required=True, help="Folder for masks and overlays.")
@click.option(
    "--model", help="The bundle's name or folder [default: the name that the run records]."
)
@click.option(
    "--mpp",
    type=float,
    help="Micrometres per pixel of the images [default: as in the training data].",
)
@click.option("--batch-size", type=click.IntRange(1), default=3, show_default=True)
@device_option
@click.argument("images", type=PATH, nargs=-1, required=True)
@click.pass_context
def predict(
    ctx: click.Context,
    run_path: Path,
    out: Path,
    model: str | None,
    mpp: float | None,
    batch_size: int,
    device: str,
    images: tuple[Path, ...],
) -> None:
    """Segment image files of up to half a gigapixel; writes STEM_mask.png and STEM_overlay.png.

    \b
    Example:
      psd predict --run runs/demo-tiny-t50 --out predictions slide_1.png slide_2.tif
    """
    from cli.progress import Progress
    from pathsegdiff.device import resolve_device
    from pathsegdiff.pipeline.predict import bundle_of_run, predict_files
    from pathsegdiff.segmentation.runs import load_run

    run = load_run(run_path, resolve_device(device))
    bundle = bundle_of_run(run, model)
    quiet = is_quiet(ctx)
    with Progress("predict", "windows", quiet=quiet) as progress:
        found = predict_files(
            run, bundle, images, out, mpp=mpp, batch_size=batch_size, progress=progress
        )
    for prediction in found:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in prediction.class_shares.items())
        click.echo(f"{prediction.mask}: {shares}")
