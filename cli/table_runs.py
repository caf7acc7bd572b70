"""What ``psd reproduce`` runs: missing things, encoder weights, the rows of a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.table_options import TABLE_ROWS, names

if TYPE_CHECKING:
    from pathsegdiff.pipeline.tables.rows import TableSettings


def run_table(
    table: str,
    rows: tuple[str, ...],
    *,
    jobs: int | None,
    table_only: bool = False,
    any_weights: bool = False,
    encoder_weights: Mapping[str, str] | None = None,
    unconditional: str | None = None,
    **others: Any,
) -> "tuple[TableSettings, list[str]]":
    """Train and score what is not finished; the settings, and names of runs that failed.

    Args:
        any_weights: Take finished networks whatever weights they began with.
        others: Of ``plan_table``.
    """
    from pathsegdiff.device import available_cores, resolve_device
    from pathsegdiff.pipeline.tables.make import (
        make_runs,
        missing_things,
        plan_table,
        possible_rows,
        refuse_impossible,
    )

    usual = rows == names(TABLE_ROWS.get(table))
    rows = possible_rows(others["dataset"], rows, usual=usual, log=click.echo)
    given: dict[str, Any] = {"rows": rows, "unconditional": unconditional}
    weights = encoder_weights or {}
    if not table_only:
        wanted = {name: others[name] for name in ("dataset", "data_root", "model")}
        at_hand = _files_at_hand(weights)
        refuse_missing(table, missing_things(**wanted, **given, encoder_weights=at_hand))
    # Last: nothing is fetched where something else is missing.
    files, missing = _encoder_files(weights, rows, table_only=table_only)
    refuse_missing(table, missing)
    settings = plan_table(table, any_weights=any_weights, encoder_weights=files, **given, **others)
    if table_only:
        return settings, []
    refuse_impossible(
        settings.dataset,
        settings.data_root,
        train_split=settings.train_split,
        eval_split=settings.eval_split,
        folds=settings.folds,
        limits=settings.limits,
    )
    on_cpu = resolve_device("auto").type == "cpu"
    cores = available_cores()
    jobs = jobs or (min(cores, len(settings.jobs())) if on_cpu else 1)
    threads = max(1, cores // jobs) if on_cpu and jobs > 1 else None
    return settings, make_runs(settings, jobs=jobs, threads=threads, log=click.echo)


def refuse_failed(settings: "TableSettings", failed: Sequence[str]) -> None:
    """Raises: RunError: If a run failed, with the folder of what its commands printed."""
    from pathsegdiff.errors import RunError

    if failed:
        logs = settings.folder / "logs"
        raise RunError(f"{len(failed)} runs failed ({', '.join(failed[:3])}); see {logs}")


def _files_at_hand(given: Mapping[str, str]) -> dict[str, Path]:
    """The files that ``--encoder-weights`` names."""
    from pathsegdiff.pipeline.baselines.imagenet_files import WORDS

    return {name: Path(file) for name, file in given.items() if file not in WORDS}


def _encoder_files(
    given: Mapping[str, str], rows: Sequence[str], *, table_only: bool
) -> tuple[dict[str, Path], list[str]]:
    """The files of ``--encoder-weights``, fetched where torchvision's are; what cannot be had."""
    from cli.fetch import encoder_file
    from pathsegdiff.errors import FetchError, RunError
    from pathsegdiff.pipeline.baselines.imagenet_files import AUTO, imagenet_file
    from pathsegdiff.pipeline.tables.rows import ROWS

    read = {ROWS[name].encoder for name in rows if name in ROWS}
    files, missing = _files_at_hand(given), []
    for encoder in sorted((given.keys() - files.keys()) & read):
        try:
            if table_only:
                place = imagenet_file(encoder)
                file = place if given[encoder] != AUTO or place.is_file() else None
            else:
                file = encoder_file(given[encoder], encoder, False)
        except (FetchError, RunError) as error:
            missing.append(str(error))
            continue
        if file is not None:
            files[encoder] = file
    return files, missing


def refuse_missing(name: str, missing: Sequence[str]) -> None:
    """Raises: DataError: If something is missing, after a line for each."""
    from pathsegdiff.errors import DataError

    for line in missing:
        click.echo(f"missing: {line}", err=True)
    if missing:
        raise DataError(f"{name} needs {len(missing)} more things, listed above")
