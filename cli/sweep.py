"""``psd sweep``: a grid of heads over stores that are there."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import (
    PATH,
    device_option,
    head_training_options,
    head_training_settings,
    is_quiet,
    numbers,
    precision_option,
    rate_numbers,
    seed_numbers,
)

if TYPE_CHECKING:
    from pathsegdiff.pipeline.sweep import Outcome


@click.command()
@click.option(
    "--features",
    "stores",
    type=PATH,
    multiple=True,
    required=True,
    help="Feature store; give one for each timestep, condition or model to compare.",
)
@click.option(
    "--taps",
    multiple=True,
    help="As train-head has it, given once per setting; each: every tap alone, and all "
    "[default: all].",
)
@click.option("--lr", default="1e-4", show_default=True, metavar="X[,X...]", help="Learning rates.")
@click.option("--head-width", "widths", metavar="W[,W...]", help="[default: as the model says]")
@click.option(
    "--limit-images", "limits", metavar="N[,N...]", help="Training images [default: all]."
)
@click.option(
    "--fold",
    "folds",
    metavar="K[,K...]",
    help="Hold out each of these folds in turn and score it, instead of the validation part.",
)
@click.option("--seed", "seeds", default="0", show_default=True, metavar="N[,N...]", help="Seeds.")
@click.option("--split", help="Trained on [default: as the data set says, usually train].")
@click.option(
    "--val",
    default="0.2",
    show_default=True,
    metavar="FRACTION|SPLIT",
    help="Validation: a share of the training groups, or a split.",
)
@click.option(
    "--eval-split", help="Score this split instead of the validation part: for the last look only."
)
@head_training_options
@device_option
@precision_option
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Trainings side by side [default: one per core with a thread each; one on a GPU].",
)
@click.option("--out", type=PATH, default=Path("sweeps/sweep"), show_default=True)
@click.pass_context
def sweep(
    ctx: click.Context,
    stores: tuple[Path, ...],
    taps: tuple[str, ...],
    lr: str,
    widths: str | None,
    limits: str | None,
    folds: str | None,
    seeds: str,
    split: str | None,
    val: str,
    eval_split: str | None,
    device: str,
    precision: str,
    jobs: int | None,
    out: Path,
    **training: Any,
) -> None:
    """Train a head for every combination of the settings given, and compare them.

    Stores are only read. Each head is a run as `psd train-head` makes it, in OUT/runs; the same
    command again continues what was interrupted. Leaves table.md, table.csv, plot.png and
    report.html: means over folds and seeds; with --fold or --eval-split also the interval (over
    images; of folds over groups, such as patients), and the difference from the first setting
    with its paired interval.

    \b
    Example:
      psd extract --dataset glas --t 0,50,100 --out features/glas
      psd sweep --features features/glas/glas-tiny-t0.zarr \\
          --features features/glas/glas-tiny-t50.zarr --fold 0,1,2,3 --steps 200 --out sweeps/t
      psd sweep --features features/glas/glas-tiny-t50.zarr --taps each --out sweeps/taps
      psd sweep --features features/glas/glas-tiny-t50.zarr --lr 1e-4,1e-3 --seed 0,1,2
    """
    chosen = head_training_settings(training)

    from cli.progress import Progress
    from pathsegdiff.config import ALL_TAPS
    from pathsegdiff.device import available_cores, resolve_device, resolve_precision
    from pathsegdiff.errors import RunError
    from pathsegdiff.pipeline.sweep import Grid, default_processes, plan_sweep, run_sweep
    from pathsegdiff.pipeline.sweep_table import TABLE_FILES, write_sweep

    place = resolve_device(device)
    wanted = [tap for text in taps or ("all",) for tap in _expanded(text, ALL_TAPS)]
    grid = Grid(
        stores=stores,
        taps=list(dict.fromkeys(wanted)),
        learning_rates=rate_numbers(lr, "--lr"),
        widths=numbers(widths, int, "--head-width") or [None],
        limits=numbers(limits, int, "--limit-images") or [None],
        folds=numbers(folds, int, "--fold") or [None],
        seeds=seed_numbers(seeds, "--seed"),
    )
    processes = min(jobs or default_processes(place), len(list(grid.points())))
    planned = plan_sweep(
        grid,
        out,
        eval_split=eval_split,
        device=str(place),
        threads=max(1, available_cores() // processes) if place.type == "cpu" else None,
        split=split,
        val=val,
        precision=resolve_precision(precision, place),
        **chosen,
    )
    click.echo(f"{out}: {len(planned)} heads, {processes} at a time")
    quiet = is_quiet(ctx)
    outcomes: list[Outcome] = []
    with Progress("sweep", "heads", quiet=quiet) as bar:

        def done(count: int, total: int, outcome: "Outcome") -> None:
            outcomes.append(outcome)
            score = f"mIoU {outcome.scores['miou']:.4f}" if outcome.scores else "failed"
            bar(count, total, f"{outcome.job.out.name}: {score}")

        bar(0, len(planned))
        try:
            run_sweep(planned, processes=processes, done=done)
        finally:
            # Also after Ctrl-C: what is there can be looked at, marked as incomplete.
            table = write_sweep(out, planned, outcomes, ctx.obj) if outcomes else ""
    click.echo(table)
    click.echo(f"{out}: {', '.join(TABLE_FILES)}")
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(outcomes)} heads failed, the first: {failed[0].error}"
        )


def _expanded(text: str, taps: tuple[str, ...]) -> tuple[str, ...]:
    return (*taps, "all") if text == "each" else (text,)
