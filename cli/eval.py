"""``psd eval``: stage 2, metrics."""

from pathlib import Path

import click

from cli.options import PATH, device_option, is_quiet
from cli.results import show_evaluation


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
    quiet = is_quiet(ctx)
    with Progress("eval", "images", quiet=quiet) as progress:
        found = evaluate_run(run, store, split=split, out=out, progress=progress)
    show_evaluation(found)
