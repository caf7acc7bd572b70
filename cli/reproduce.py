"""``psd reproduce``: the paper's tables."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import PATH, Decorator, data_root_option, decorated, precision_option

if TYPE_CHECKING:
    from pathsegdiff.pipeline.tables.rows import TableSettings

#: Of a table, unless others are asked for.
_ROWS = {
    "table2": "tokens,res-unet,vgg16-fcn8,null,conditioned",
    "table4": "tokens,res-unet,dcan,ddpm-seg,vgg16-fcn8,null,conditioned,effnet-unet",
}


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
@click.option("--out", type=PATH, default=Path("reproduction/table1"), show_default=True)
def table1(out: Path) -> None:
    """Table 1: parameters of the networks, counted.

    \b
    Example:
      psd reproduce table1
    """
    from pathsegdiff.pipeline.tables.parameters import write_parameters

    click.echo(write_parameters(out), nl=False)
    click.echo(f"table, plot and report: {out}")


def _numbers(
    ctx: click.Context, param: click.Parameter | None, value: str | None
) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter(f"must be whole numbers such as 0,1,2, got {value!r}") from None


def _limits(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int | None, ...]:
    parts = [part.strip() for part in value.split(",")]
    if not all(part == "all" or re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts):
        raise click.BadParameter(f"must be numbers, or all, such as 5,20,all, got {value!r}")
    return tuple(None if part == "all" else int(part) for part in parts)


def _weights(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    from pathsegdiff.pipeline.baselines.imagenet_files import IMAGENET
    from pathsegdiff.pipeline.tables.rows import ENCODERS

    found: dict[str, str] = {}
    for text in value:
        encoder, _, file = text.partition("=")
        if text != IMAGENET and (encoder not in ENCODERS or not file):
            raise click.BadParameter(
                f"must be {IMAGENET} or ENCODER=FILE, ENCODER one of {', '.join(ENCODERS)}, got "
                f"{text!r}"
            )
        for name in ENCODERS if text == IMAGENET else (encoder,):
            if name in found:
                raise click.BadParameter(f"is given twice for {name}: {found[name]} and {text}")
            found[name] = file or IMAGENET
    return found


def _common_options(name: str, dataset: str, model: str) -> list[Decorator]:
    """Of every table and figure that is trained: on what, for how long, where to."""
    return [
        click.option(
            "--dataset",
            default=dataset,
            show_default=True,
            envvar="DATASET",
            help="Another data set in its place.",
        ),
        data_root_option,
        click.option(
            "--model",
            default=model,
            show_default=True,
            envvar="MODEL",
            help="A bundle's name or folder.",
        ),
        click.option(
            "--budget",
            type=click.Choice(["short", "full"]),
            default="short",
            show_default=True,
            envvar="BUDGET",
            help="Of each run: minutes on two cores, or hours (docs/reproduction.md).",
        ),
        precision_option,
        click.option(
            "--jobs", type=click.IntRange(1), help="Runs at a time [default: cores, on a GPU one]."
        ),
        click.option(
            "--out",
            type=PATH,
            default=Path("reproduction") / name,
            show_default=True,
            envvar="OUT",
        ),
    ]


def _table_options(name: str, dataset: str, model: str, rows: str) -> Decorator:
    """What the tables that are trained have in common."""
    return decorated(
        [
            *_common_options(name, dataset, model),
            click.option(
                "--eval-split",
                help="Scored [default: as the data set says, such as testB of GlaS].",
            ),
            click.option(
                "--random",
                type=PATH,
                help="Bundle of the model's shapes with random weights, for the row random "
                "[default: models/PRESET-random, made where missing].",
            ),
            click.option(
                "--unconditional",
                metavar="NAME|BUNDLE",
                help="A model of its own for the row null [default: the model with the null "
                "condition].",
            ),
            click.option(
                "--encoder-weights",
                multiple=True,
                callback=_weights,
                metavar="imagenet|ENCODER=FILE",
                help="What encoders begin with: torchvision's ImageNet weights, fetched where they "
                "are not there; or a file at hand (.pth or .safetensors, as torchvision and timm "
                "have them) of resnet18 (row res-unet) or vgg16_bn (vgg16-fcn8 and dcan), may be "
                "given for each [default: from scratch].",
            ),
            click.option("--t", "timestep", type=int, default=50, show_default=True),
            click.option(
                "--rows",
                default=rows,
                show_default=True,
                metavar="NAME[,...]",
                help="Rows of ours [all: conditioned, null, tokens, both, random, res-unet, "
                "vgg16-fcn8, dcan, ddpm-seg, effnet-unet].",
            ),
            click.option(
                "--seeds", default="0,1,2", show_default=True, callback=_numbers, metavar="N[,...]"
            ),
            click.option(
                "--folds",
                callback=_numbers,
                metavar="K[,...]",
                help="Hold these folds out and score them, instead of the official split.",
            ),
            click.option(
                "--limit-images",
                default="all",
                show_default=True,
                callback=_limits,
                metavar="N[,...]",
                help="Training images: a line for each number.",
            ),
            click.option("--table-only", is_flag=True, help="Of what there is; run nothing."),
        ]
    )


@reproduce.command()
@_table_options("table2", "bcss", "ssl-ldm-brca", _ROWS["table2"])
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
@_table_options("table4", "glas", "tiny", _ROWS["table4"])
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
@_table_options("table3", "bcss", "ssl-ldm-brca", "conditioned")
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


@reproduce.command()
@decorated(_common_options("qualitative", "glas", "tiny"))
@click.option(
    "--runs",
    type=PATH,
    help="Folder of a table [default: reproduction/table4 or table2, whichever has this data set].",
)
@click.option(
    "--rows",
    metavar="NAME[,...]",
    help="In this order [default: every row that was scored; those of the table where none was].",
)
@click.option("--eval-split", help="[default: as the data set says, such as testB of GlaS].")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the runs.")
@click.option(
    "--images",
    metavar="ID[,...]",
    help="[default: from the worst to the best image of the first row].",
)
@click.option("--count", type=click.IntRange(1), default=4, show_default=True, help="Images.")
def qualitative(
    dataset: str,
    data_root: Path | None,
    runs: Path | None,
    rows: str | None,
    eval_split: str | None,
    seed: int,
    images: str | None,
    count: int,
    out: Path,
    jobs: int | None,
    **settings: Any,
) -> None:
    """The qualitative figure: image, truth, and the prediction of every row side by side.

    Rows that have no run with this seed yet are trained and scored first, as the tables do. It
    holds pixels of the data set: mind its licence before you pass it on (GlaS: research only).

    \b
    Example:
      psd reproduce qualitative --data-root ~/GlaS
      psd reproduce qualitative --data-root ~/GlaS --rows conditioned,tokens --images testB_3
    """
    from pathsegdiff.data.manifest import open_dataset
    from pathsegdiff.pipeline.tables.qualitative import draw_qualitative, scored_rows, table_of
    from pathsegdiff.pipeline.tables.rows import check_rows

    def listed(text: str | None) -> list[str]:
        return [part.strip() for part in text.split(",")] if text else []

    chosen = listed(rows)
    if chosen:
        check_rows(chosen)
    opened = open_dataset(dataset, data_root=data_root)
    table, usual = table_of(opened.name, Path("reproduction"))
    runs = runs or usual
    split = eval_split or opened.manifest.default_eval
    there = scored_rows(runs, split=split, seed=seed)
    chosen = chosen or there or listed(_ROWS[table])
    if set(chosen) - set(there):
        made, failed = _run(
            table,
            tuple(chosen),
            jobs=jobs,
            dataset=dataset,
            data_root=data_root,
            eval_split=split,
            out=runs,
            seeds=(seed,),
            **settings,
        )
        _refuse_failed(made, failed)
    picture, shown = draw_qualitative(
        opened,
        runs,
        out,
        rows=chosen,
        split=split,
        seed=seed,
        images=listed(images),
        count=count,
    )
    click.echo(f"{', '.join(shown)}: {picture}")


def _make(
    table: str,
    *,
    rows: str,
    limit_images: tuple[int | None, ...],
    **others: Any,
) -> None:
    from pathsegdiff.pipeline.tables.write import write

    chosen = tuple(name.strip() for name in rows.split(","))
    settings, failed = _run(table, chosen, limits=limit_images, **others)
    click.echo(write(settings), nl=False)
    click.echo(f"table, plot and report: {settings.out}")
    _refuse_failed(settings, failed)


def _run(
    table: str,
    rows: tuple[str, ...],
    *,
    jobs: int | None,
    table_only: bool = False,
    encoder_weights: Mapping[str, str] | None = None,
    unconditional: str | None = None,
    **others: Any,
) -> "tuple[TableSettings, list[str]]":
    """Train and score what is not finished; the settings, and names of runs that failed."""
    from pathsegdiff.device import available_cores, resolve_device
    from pathsegdiff.pipeline.tables.make import make_runs, missing_things, plan_table

    files, missing = _encoder_files(encoder_weights or {}, rows, table_only=table_only)
    given: dict[str, Any] = {
        "rows": rows,
        "unconditional": unconditional,
        "encoder_weights": files,
    }
    if not table_only:
        wanted = {name: others[name] for name in ("dataset", "data_root", "model")}
        missing += missing_things(**wanted, **given)
    _refuse_missing(table, missing)
    settings = plan_table(table, **given, **others)
    if table_only:
        return settings, []
    on_cpu = resolve_device("auto").type == "cpu"
    cores = available_cores()
    jobs = jobs or (min(cores, len(settings.jobs())) if on_cpu else 1)
    threads = max(1, cores // jobs) if on_cpu and jobs > 1 else None
    return settings, make_runs(settings, jobs=jobs, threads=threads, log=click.echo)


def _refuse_failed(settings: "TableSettings", failed: Sequence[str]) -> None:
    from pathsegdiff.errors import RunError

    if failed:
        logs = settings.folder / "logs"
        raise RunError(f"{len(failed)} runs failed ({', '.join(failed[:3])}); see {logs}")


def _encoder_files(
    given: Mapping[str, str], rows: Sequence[str], *, table_only: bool
) -> tuple[dict[str, Path], list[str]]:
    """The files of ``--encoder-weights``, fetched where torchvision's are; what cannot be had."""
    from cli.fetch import encoder_file
    from pathsegdiff.errors import FetchError, RunError
    from pathsegdiff.pipeline.baselines.imagenet_files import IMAGENET, imagenet_file
    from pathsegdiff.pipeline.tables.rows import ROWS

    read = {ROWS[name].encoder for name in rows if name in ROWS}
    files, missing = {}, []
    for encoder, file in given.items():
        if file != IMAGENET:
            files[encoder] = Path(file)
        elif encoder in read:
            try:
                files[encoder] = (
                    imagenet_file(encoder) if table_only else encoder_file(file, encoder, False)
                )
            except (FetchError, RunError) as error:
                missing.append(str(error))
    return files, missing


def _refuse_missing(name: str, missing: Sequence[str]) -> None:
    """Raises: DataError: If something is missing, after a line for each."""
    from pathsegdiff.errors import DataError

    for line in missing:
        click.echo(f"missing: {line}", err=True)
    if missing:
        raise DataError(f"{name} needs {len(missing)} more things, listed above")


def _curve_options(name: str) -> Decorator:
    """What the curves have in common."""
    return decorated(
        [
            *_common_options(name, "glas", "tiny"),
            click.option(
                "--folds",
                metavar="K[,...]",
                help="Hold out each in turn and score it [default: 0,1,2,3 of GlaS; else the "
                "validation part].",
            ),
            click.option("--seeds", default="0", show_default=True, metavar="N[,...]"),
        ]
    )


@reproduce.command()
@_curve_options("fig4")
@click.option("--t", default="0,25,50,100,200,400", show_default=True, metavar="T[,...]")
def fig4(t: str, **options: Any) -> None:
    """Figure 4: the diffusion timestep of the features.

    \b
    Example:
      psd reproduce fig4 --data-root ~/GlaS
    """
    _curve("fig4", t=t, **options)


@reproduce.command()
@_curve_options("fig5")
def fig5(**options: Any) -> None:
    """Figure 5: each block of the UNet alone, and all of them.

    \b
    Example:
      psd reproduce fig5 --data-root ~/GlaS
    """
    _curve("fig5", **options)


@reproduce.command()
@_curve_options("table5")
@click.option("--lr", default="1e-3,1e-4,1e-5", show_default=True, metavar="X[,...]")
def table5(lr: str, **options: Any) -> None:
    """Table 5: the head's learning rate (the paper's is of BCSS, on validation).

    \b
    Example:
      psd reproduce table5 --data-root ~/GlaS
      psd reproduce table5 --dataset bcss --data-root ~/bcss --model models/ssl-ldm-brca
    """
    _curve("table5", lr=lr, **options)


def _curve(
    name: str,
    *,
    dataset: str,
    data_root: Path | None,
    model: str,
    folds: str | None,
    seeds: str,
    budget: str,
    precision: str,
    jobs: int | None,
    out: Path,
    t: str = "50",
    lr: str | None = None,
) -> None:
    """Extract what is not cached, then compare heads, both by a user's commands."""
    from cli.main import run_within
    from pathsegdiff.data.manifest import open_dataset
    from pathsegdiff.diffusion.bundle import read_card, resolve_bundle
    from pathsegdiff.pipeline.tables.curves import about, extraction_command, sweep_command
    from pathsegdiff.pipeline.tables.make import missing_things

    _refuse_missing(name, missing_things(dataset, data_root, model, ("conditioned",)))
    opened = open_dataset(dataset, data_root=data_root)
    split = opened.manifest.default_train
    timesteps = tuple(dict.fromkeys(_numbers(click.get_current_context(), None, t)))
    names = opened.name, read_card(resolve_bundle(model)).name
    extraction, stores = extraction_command(
        dataset,
        data_root,
        model,
        names=names,
        split=split,
        timesteps=timesteps,
        folder=out / "features",
    )
    if folds is None and opened.name == "glas":
        folds = "0,1,2,3"
    heads = sweep_command(
        name, stores, split=split, folds=folds, seeds=seeds, rates=lr, budget=budget,
        precision=precision, jobs=jobs, out=out,
    )  # fmt: skip
    said = about(
        name, dataset=names[0], model=names[1], folds=folds, budget=budget, timesteps=timesteps
    )
    for command, obj in ((extraction, None), (heads, said)):
        click.echo(f"psd {' '.join(command)}")
        run_within(click.get_current_context(), command, obj)
