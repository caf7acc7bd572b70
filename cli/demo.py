"""``psd demo``: the whole pipeline on the embedded images."""

import shlex
from pathlib import Path

import click

from cli.options import PATH, device_option, is_quiet, seed_option


@click.command()
@click.option(
    "--out",
    type=PATH,
    default=Path("demo"),
    show_default=True,
    help="Folder for features, run and report.html.",
)
@click.option("--model", default="tiny", show_default=True, help="A bundle's name or folder.")
@device_option
@seed_option
@click.pass_context
def demo(ctx: click.Context, out: Path, model: str, device: str, seed: int) -> None:
    """The whole pipeline on 48 embedded colon biopsies: extract, train, evaluate, report.

    \b
    Example:
      psd demo
      psd demo --out /tmp/demo --model models/mine
    """
    from cli.progress import Progress, TrainingProgress, duration
    from pathsegdiff.pipeline.demo import run_demo

    quiet = is_quiet(ctx)
    training = TrainingProgress(quiet=quiet)
    with Progress("extract", "patches", quiet=quiet) as extracting, training:
        result = run_demo(
            out,
            model=model,
            device=device,
            seed=seed,
            log=click.echo,
            extract_progress=extracting,
            train_progress=training.show,
        )
    click.echo("")
    for name, found in result.intervals.items():
        click.echo(
            f"  {name:<9} {found.value:.3f}   95 % interval {found.low:.3f} to {found.high:.3f}"
        )
    took = ", ".join(f"{step} {duration(value)}" for step, value in result.seconds.items())
    click.echo(f"\n{took}")
    if not result.trained:
        click.echo(
            f"The model {model} has random weights: these numbers are a floor, not a result.\n"
        )
    click.echo(f"Open {result.report} for the overlays.")
    # A run records its bundle by name, which does not lead to a folder of one's own.
    bundle = "" if model == "tiny" else f"--model {shlex.quote(model)} "
    click.echo(
        f"Next: psd predict --run {shlex.quote(str(result.run))} {bundle}"
        "--out predictions YOUR_IMAGE.png"
    )
