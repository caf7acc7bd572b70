"""``psd doctor``: what is there, on one page."""

from pathlib import Path

import click


@click.command()
def doctor() -> None:
    """Show versions, machine, models, data and what will not work; paste it into a report.

    Lines that begin with ! are what to look at. Exit code 1 if there are any.

    \b
    Example:
      psd doctor
    """
    from pathsegdiff.pipeline.doctor import examine

    section = ""
    problems = 0
    for finding in examine(Path.cwd()):
        if finding.section != section:
            section = finding.section
            click.echo(section)
        problems += finding.problem
        click.echo(f"{'!' if finding.problem else ' '} {finding.name:<29} {finding.text}")
    if problems:
        click.echo(f"{problems} lines to look at, marked with !")
        raise click.exceptions.Exit(1)
    click.echo("nothing to look at")
