"""``psd reproduce``'s curves (Figures 4 and 5, Table 5) and its qualitative figure."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cli.options import PATH, Decorator, decorated, numbers, rate_numbers, seed_numbers
from cli.table_options import TABLE_ROWS, common_options, encoder_weights_option, names
from cli.table_runs import refuse_failed, refuse_missing, run_table


@click.command()
@decorated(common_options("qualitative", "glas", "tiny"))
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
@encoder_weights_option
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
    encoder_weights: dict[str, str],
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

    chosen = names(rows)
    if chosen:
        check_rows(chosen)
    opened = open_dataset(dataset, data_root=data_root)
    table, usual = table_of(opened.name, Path("reproduction"))
    runs = runs or usual
    split = eval_split or opened.manifest.default_eval
    there = tuple(scored_rows(runs, split=split, seed=seed))
    chosen = chosen or there or names(TABLE_ROWS[table])
    all_there = set(chosen) <= set(there)
    made, failed = run_table(
        table,
        chosen,
        jobs=jobs,
        table_only=all_there,
        any_weights=all_there and not encoder_weights,
        encoder_weights=encoder_weights,
        dataset=dataset,
        data_root=data_root,
        eval_split=split,
        out=runs,
        seeds=(seed,),
        **_as_the_table(runs, settings),
    )
    refuse_failed(made, failed)
    picture, shown = draw_qualitative(
        opened,
        runs,
        out,
        rows=chosen,
        split=split,
        seed=seed,
        images=names(images),
        count=count,
        made_with=f"model {made.model_name}, budget {made.budget}, precision {made.precision}",
    )
    click.echo(f"{', '.join(shown)}: {picture}")


def _as_the_table(runs: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What was typed of model, budget and precision, else what the runs were made with.

    What has no option here (timestep, a model of its own for the row null) is as the runs have it.
    """
    from pathsegdiff.pipeline.tables.finished import known_signature

    known = known_signature(runs) or {}
    context = click.get_current_context()
    usual: dict[str, Any] = {
        name: known[f"--{name}"].split(":", 1)[0]
        for name in ("model", "budget", "precision")
        if context.get_parameter_source(name) is ParameterSource.DEFAULT
        and isinstance(known.get(f"--{name}"), str)
        and known[f"--{name}"] != "none"
    }
    if isinstance(known.get("--t"), int):
        usual["timestep"] = known["--t"]
    if isinstance(known.get("--unconditional"), str):
        usual["unconditional"] = known["--unconditional"]
    return {**settings, **usual}


def _curve_options(name: str) -> Decorator:
    """What the curves have in common."""
    return decorated(
        [
            *common_options(name, "glas", "tiny"),
            click.option(
                "--folds",
                metavar="K[,...]",
                help="Hold out each in turn and score it [default: 0,1,2,3 of GlaS; else the "
                "validation part].",
            ),
            click.option("--seeds", default="0", show_default=True, metavar="N[,...]"),
        ]
    )


@click.command()
@_curve_options("fig4")
@click.option("--t", default="0,25,50,100,200,400", show_default=True, metavar="T[,...]")
def fig4(t: str, **options: Any) -> None:
    """Figure 4: the diffusion timestep of the features.

    \b
    Example:
      psd reproduce fig4 --data-root ~/GlaS
    """
    _curve("fig4", t=t, **options)


@click.command()
@_curve_options("fig5")
def fig5(**options: Any) -> None:
    """Figure 5: each block of the UNet alone, and all of them.

    \b
    Example:
      psd reproduce fig5 --data-root ~/GlaS
    """
    _curve("fig5", **options)


@click.command()
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
    from pathsegdiff.pipeline.tables.make import missing_things, refuse_impossible

    # Before hours of extraction, not after.
    seed_numbers(seeds, "--seeds")
    rate_numbers(lr, "--lr")
    held_out = numbers(folds, int, "--folds")
    timesteps = tuple(numbers(t, int, "--t"))
    refuse_missing(name, missing_things(dataset, data_root, model, ("conditioned",)))
    opened = open_dataset(dataset, data_root=data_root)
    split = opened.manifest.default_train
    if folds is None and opened.name == "glas":
        folds, held_out = "0,1,2,3", [0, 1, 2, 3]
    refuse_impossible(dataset, data_root, train_split=split, eval_split=None, folds=held_out)
    card = read_card(resolve_bundle(model))
    for timestep in timesteps:
        card.check_timestep(timestep)
    called = opened.name, card.name
    extraction, stores = extraction_command(
        dataset,
        data_root,
        model,
        names=called,
        split=split,
        timesteps=timesteps,
        folder=out / "features",
    )
    heads = sweep_command(
        name, stores, split=split, folds=folds, seeds=seeds, rates=lr, budget=budget,
        precision=precision, jobs=jobs, out=out,
    )  # fmt: skip
    said = about(
        name, dataset=called[0], model=called[1], folds=folds, budget=budget, timesteps=timesteps
    )
    for command, obj in ((extraction, None), (heads, said)):
        click.echo(f"psd {' '.join(command)}")
        run_within(click.get_current_context(), command, obj)
