"""What is fetched: data sets, models, an encoder's weights; terms, transfer, what came of it."""

import shlex
import sys
from pathlib import Path

import click

from cli.options import PATH, Command
from pathsegdiff.errors import FetchError
from pathsegdiff.fetch.licences import Terms


def accept_option(command: Command) -> Command:
    """``--accept-licence``."""
    return click.option(
        "--accept-licence", is_flag=True, help="Accept the terms that are shown, without a prompt."
    )(command)


def fetch_data(name: str, data_root: Path | None, accept: bool, quiet: bool) -> bool:
    """Get a data set and check it; whether it is whole."""
    from cli.data import show_report
    from cli.progress import Progress, TransferProgress
    from pathsegdiff.data.check import check_dataset
    from pathsegdiff.data.fetch import fetch_dataset, plan_fetch
    from pathsegdiff.data.manifest_file import reference
    from pathsegdiff.fetch.download import STAGING

    plan = plan_fetch(name, data_root)
    if plan.missing:
        ask_for(plan.terms, plan.root / STAGING, accept)
        with TransferProgress(quiet=quiet) as transfer:
            lines = fetch_dataset(plan, transfer.show)
        for line in lines:
            click.echo(line)
    else:
        click.echo(f"all {plan.total} files are already there")
    with Progress("check", "images", quiet=quiet) as progress:
        report = check_dataset(plan.manifest.path, data_root=plan.root, progress=progress)
    show_report(report)
    if report.whole:
        shown = shlex.quote(reference(plan.manifest))
        root = "" if data_root is None else f" --data-root {shlex.quote(str(data_root))}"
        click.echo(f"Next: psd extract --dataset {shown}{root}")
    return report.whole


def pull(name: str, out: Path | None, encoder: Path | None, accept: bool, quiet: bool) -> None:
    """Get a published model, and make the bundle if its files are of a kind that we know."""
    from cli.progress import TransferProgress
    from pathsegdiff.diffusion.pull import find_source, plan_pull, pull_model
    from pathsegdiff.fetch.download import STAGING

    plan = plan_pull(find_source(name), out, encoder)
    if not plan.done:
        ask_for(plan.source.terms, plan.root / STAGING, accept)
    with TransferProgress(quiet=quiet) as transfer:
        lines = pull_model(plan, transfer.show)
    for line in lines:
        click.echo(line)
    if plan.source.bundle:
        model = plan.source.name if out is None else shlex.quote(str(out))
        click.echo(f"Next: psd models show {model}")


def encoder_file(given: str, encoder: str, quiet: bool) -> Path | None:
    """The file that ``--encoder-weights`` names, fetched where it is torchvision's.

    Returns:
        None where the weights may be had or not ("auto"), and cannot.
    """
    from cli.progress import TransferProgress
    from pathsegdiff.errors import FetchError, RunError
    from pathsegdiff.fetch.download import State
    from pathsegdiff.pipeline.baselines.imagenet_files import (
        AUTO,
        LICENCE,
        WORDS,
        fetch_imagenet,
    )

    if given not in WORDS:
        return Path(given)

    with TransferProgress(quiet=quiet) as transfer:
        try:
            file = fetch_imagenet(
                encoder,
                on_bytes=lambda done, total: transfer.show(
                    State(label=encoder, unit="bytes", done=done, total=total)
                ),
            )
        except (FetchError, RunError) as error:
            if given != AUTO:
                raise
            click.echo(f"{error}: it begins from scratch")
            return None
    click.echo(f"encoder weights: {file}, {LICENCE}")
    return file


def ask_for(terms: Terms, folder: Path, accept: bool) -> None:
    """Show the terms and have them accepted, once for each text.

    Raises:
        FetchError: If they are not.
    """
    from pathsegdiff.fetch.licences import is_accepted, remember

    if is_accepted(folder, terms):
        return
    click.echo(terms.text)
    if not accept:
        if not _on_terminal():
            raise FetchError(
                f"the terms of {terms.name} must be accepted before anything is fetched; "
                "--accept-licence does so"
            )
        if not click.confirm("Do you accept these terms?"):
            raise FetchError(f"the terms of {terms.name} were not accepted; nothing was fetched")
    remember(folder, terms)


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


OUT_OPTION = click.option(
    "--out", type=PATH, help="Folder to make [default: NAME in the folder of models]."
)
