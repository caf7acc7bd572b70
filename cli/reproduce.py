"""``psd reproduce``: the paper's tables and figures."""

from pathlib import Path
from typing import Any

import click

from cli.figures import fig4, fig5, qualitative, table5
from cli.options import PATH
from cli.table_options import TABLE_ROWS, names, table_options
from cli.table_runs import refuse_failed, run_table


@click.group()
def reproduce() -> None:
    """The paper's tables, ours beside the published figures.

    \b
    Example:
      psd reproduce table1
      psd reproduce table4 --data-root ~/GlaS
      psd reproduce table2 --model models/ssl-ldm-brca --data-root ~/bcss --budget full
      psd reproduce fig4 --data-root ~/GlaS
    """


@reproduce.command()
@click.option(
    "--out", type=PATH, default=Path("reproduction/table1"), show_default=True, envvar="OUT"
)
def table1(out: Path) -> None:
    """Table 1: parameters of the networks, counted.

    \b
    Example:
      psd reproduce table1
    """
    from pathsegdiff.pipeline.tables.parameters import write_parameters

    click.echo(write_parameters(out), nl=False)
    click.echo(f"table, plot and report: {out}")


@reproduce.command()
@table_options("table2", "bcss", "ssl-ldm-brca", TABLE_ROWS["table2"])
def table2(**options: Any) -> None:
    """Table 2: BCSS.

    Extracts, trains and scores every row that is not there yet, and writes table.md, table.csv,
    plot.png and report.html. Interrupted, it continues where it was.

    \b
    Example:
      psd reproduce table2 --model models/ssl-ldm-brca --data-root ~/bcss
      psd reproduce table2 --dataset ebhi300 --data-root ~/EBHI --model tiny --seeds 0
    """
    _make("table2", **options)


@reproduce.command()
@table_options("table4", "glas", "tiny", TABLE_ROWS["table4"])
def table4(**options: Any) -> None:
    """Table 4: GlaS.

    Extracts, trains and scores every row that is not there yet, and writes table.md, table.csv,
    plot.png and report.html. Interrupted, it continues where it was.

    \b
    Example:
      psd reproduce table4 --data-root ~/GlaS
      psd reproduce table4 --data-root ~/GlaS --rows conditioned,both --limit-images 5,20,all
      psd reproduce table4 --data-root ~/GlaS --folds 0,1,2,3 --seeds 0 --out reproduction/folds
    """
    _make("table4", **options)


@reproduce.command()
@table_options("table3", "bcss", "ssl-ldm-brca", "conditioned")
@click.option(
    "--runs",
    "work",
    type=PATH,
    default=Path("reproduction") / "table2",
    show_default=True,
    help="Folder of stores and runs: those of Table 2 are its own.",
)
def table3(**options: Any) -> None:
    """Table 3: IoU of BCSS' four tissue classes (of other data: the four with most pixels).

    \b
    Example:
      psd reproduce table3 --model models/ssl-ldm-brca --data-root ~/bcss
      psd reproduce table3 --dataset my.toml --model tiny --runs reproduction/mine --table-only
    """
    _make("table3", **options)


def _make(
    table: str,
    *,
    rows: str,
    limit_images: tuple[int | None, ...],
    **others: Any,
) -> None:
    from pathsegdiff.pipeline.tables.write import write

    settings, failed = run_table(table, names(rows), limits=limit_images, **others)
    click.echo(write(settings), nl=False)
    click.echo(f"table, plot and report: {settings.out}")
    refuse_failed(settings, failed)


for figure in (table5, fig4, fig5, qualitative):
    reproduce.add_command(figure)
