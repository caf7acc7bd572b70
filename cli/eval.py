"""``psd eval``: stage 2, metrics."""

from pathlib import Path

import click

from cli.options import PATH, device_option


@click.command("eval")
@click.option("--run", "run_path", type=PATH, help="A trained run [default: newest in runs/].")
@click.option(
    "--features", type=PATH, help="Feature store [default: the one that the run was trained on]."
)
@click.option("--split", help="Scored [default: the held-out fold, else as the data set says].")
@click.option("--out", type=PATH, help="Folder for the results [default: RUN/eval-SPLIT].")
@device_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    run_path: Path | None,
    features: Path | None,
    split: str | None,
    out: Path | None,
    device: str,
) -> None:
    """Score a trained head: metrics with intervals, overlays, one report.html (stage 2).

    \b
    Example:
      psd eval
      psd eval --run runs/glas-tiny-t50 --split testA
    """
    from cli.progress import Progress
    from pathsegdiff.device import resolve_device
    from pathsegdiff.errors import RunError
    from pathsegdiff.features.store import FeatureStore
    from pathsegdiff.segmentation.evaluate import evaluate_run
    from pathsegdiff.segmentation.runs import load_run, newest_run

    if run_path is None:
        run_path = newest_run(Path("runs"))
        click.echo(f"run: {run_path} (the newest)")
    run = load_run(run_path, resolve_device(device))
    if features is None:
        features = Path(run.config.store_path)
        if not features.exists():
            raise RunError(
                f"the store {features} that {run_path} was trained on is gone; "
                "say where it is with --features"
            )
    store = FeatureStore.open(features)
    quiet = bool(ctx.parent and ctx.parent.params.get("quiet"))
    with Progress("eval", "images", quiet=quiet) as progress:
        found = evaluate_run(run, store, split=split, out=out, progress=progress)
    for note in found.notes:
        click.echo(f"note: {note}")
    unit = found.interval_unit
    scored = f"{found.samples} {'images' if unit == 'images' else 'windows'}"
    click.echo(f"{found.part}, {scored}, pooled, with 95 % intervals over {unit}:")
    for name, shown in (("accuracy", "accuracy"), ("dice", "Dice"), ("miou", "mIoU"), ("f1", "F1")):
        interval = found.intervals[name]
        value = getattr(found.scores, name)
        click.echo(f"  {shown:18} {value:.4f}  ({interval.low:.4f} to {interval.high:.4f})")
    if found.objects is not None:
        click.echo(f"  {'object F1':18} {found.objects.f1:.4f}")
        click.echo(f"  {'object Dice':18} {found.objects.dice:.4f}")
        click.echo(f"  {'object Hausdorff':18} {found.objects.hausdorff:.1f} px")
    click.echo(f"report: {found.path / 'report.html'}")
