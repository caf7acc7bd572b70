"""``psd compare``: is one run better than another on the same images?"""

from pathlib import Path

import click

from cli.options import PATH


@click.command()
@click.argument("first", metavar="FIRST[,...]")
@click.argument("second", metavar="SECOND[,...]")
@click.option("--split", "part", help="What was scored, where a run has several evaluations.")
@click.option("--draws", type=click.IntRange(100, 100_000), default=2000, show_default=True)
@click.option("--out", type=PATH, help="Folder for table.md, table.csv, plot.png and report.html.")
def compare(first: str, second: str, part: str | None, draws: int, out: Path | None) -> None:
    """Compare two scored runs, image by image.

    FIRST and SECOND are runs of `psd train-head` or `psd baseline` that were scored on the same
    images, or several with commas between, such as those of all folds. Printed is the first less
    the second with the 95 % interval of the difference over the images, each draw the same for
    both: an interval without 0 is a difference. It speaks of the images; how much another seed of
    the training changes, other runs tell.

    \b
    Example:
      psd compare runs/glas-tiny-t50 runs/glas-effnet-unet
      psd compare runs/a runs/b --split testB --out compared
    """
    from pathsegdiff.evaluation.compare import compare as compare_scored
    from pathsegdiff.evaluation.compare import join, read_scored
    from pathsegdiff.pipeline.comparison import differences, extremes, scope, write_comparison

    sides = [[read_scored(path, part) for path in _paths(text)] for text in (first, second)]
    one, other = (join(side) for side in sides)
    found = compare_scored(one, other, draws=draws)
    click.echo(f"{scope(one)}: {first} less {second}")
    rows = differences(found)
    width = max(len(row.title) for row in rows)
    for row in rows:
        interval = row.interval
        click.echo(
            f"  {row.title:<{width}}  {row.first:.4f} - {row.second:.4f} = {interval.value:+.4f}  "
            f"({interval.low:+.4f} to {interval.high:+.4f}){'  differs' if row.differs else ''}"
        )
    ahead, *ends = extremes(found)
    click.echo(ahead)
    for line in ends:
        click.echo(f"  {line}")
    if out is not None:
        reports = [scored.path.parent / "report.html" for side in sides for scored in side]
        there = [report for report in reports if report.exists()]
        write_comparison(out, (first, second), one, found, there)
        click.echo(f"report: {out / 'report.html'}")


def _paths(text: str) -> list[Path]:
    """One run, or several with commas between."""
    return [Path(text)] if Path(text).exists() else [Path(part) for part in text.split(",")]
