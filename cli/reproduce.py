"""``psd reproduce``: the paper's tables."""

from pathlib import Path

import click

from cli.options import PATH, data_root_option, device_option


@click.group()
def reproduce() -> None:
    """The paper's tables, ours beside the published figures.

    \b
    Example:
      psd reproduce table2 --model models/ssl-ldm-brca
    """


@reproduce.command()
@click.option(
    "--model",
    default="ssl-ldm-brca",
    show_default=True,
    envvar="MODEL",
    help="The imported bundle's name or folder.",
)
@data_root_option
@click.option("--out", type=PATH, default=Path("reproduction/table2"), show_default=True)
@device_option
def table2(model: str, data_root: Path | None, out: Path, device: str) -> None:
    """Table 2: BCSS with the paper's weights.

    \b
    Example:
      psd reproduce table2 --model models/ssl-ldm-brca --data-root ~/bcss
    """
    from pathsegdiff.errors import DataError
    from pathsegdiff.pipeline.reproduce import missing_for_table2, reproduce_table2

    missing = missing_for_table2(model, data_root)
    for line in missing:
        click.echo(f"missing: {line}", err=True)
    if missing:
        raise DataError(f"table 2 needs {len(missing)} more things, listed above")
    reproduce_table2(out, model=model, data_root=data_root, device=device, log=click.echo)
    click.echo((out / "table.md").read_text())
