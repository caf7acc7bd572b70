"""``psd pretrain``: a diffusion model of one's own."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import PATH, device_option, is_quiet, precision_option, seed_option

if TYPE_CHECKING:
    from pathsegdiff.diffusion.pretrain.loop import PretrainProgress


@click.command()
@click.argument("part", type=click.Choice(["autoencoder", "encoder", "ldm", "all", "decoder"]))
@click.option(
    "--images",
    "sources",
    multiple=True,
    required=True,
    metavar="DIR[@SCALE]|MANIFEST",
    help="Images to train on; may be given again. @2 enlarges those of a folder twofold.",
)
@click.option("--data-root", type=PATH, help="Folder with the images of a manifest.")
@click.option(
    "--preset",
    type=click.Choice(["tiny", "micro", "paper"]),
    default="tiny",
    show_default=True,
    help="tiny: hours on a CPU, minutes on a GPU; paper: days on a GPU; micro: for tests.",
)
@click.option(
    "--encoder",
    type=click.Choice(["preset", "dino"]),
    default="preset",
    show_default=True,
    help="dino: a vision transformer trained here, instead of tiny's ImageNet network.",
)
@click.option("--out", required=True, type=PATH, help="Bundle to make.")
@click.option(
    "--work",
    type=PATH,
    help="Checkpoints, logs and pictures [default: the bundle's name with -training].",
)
@click.option("--name", help="Of the bundle [default: that of --out].")
@click.option(
    "--licence", default="not stated", show_default=True, help="Of the weights, for the card."
)
@click.option(
    "--trained-on",
    metavar="TEXT",
    help="Data and their attribution, for the card [default: names and number of the images].",
)
@click.option("--steps", type=click.IntRange(1), help="Of each part [default: the preset's].")
@click.option("--batch-size", type=click.IntRange(1), help="[default: the preset's]")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Stop after this long with a checkpoint; the same command goes on.",
)
@device_option
@precision_option
@seed_option
@click.pass_context
def pretrain(
    ctx: click.Context,
    part: str,
    sources: tuple[str, ...],
    data_root: Path | None,
    preset: str,
    encoder: str,
    out: Path,
    work: Path | None,
    name: str | None,
    licence: str,
    trained_on: str | None,
    steps: int | None,
    batch_size: int | None,
    minutes: float | None,
    device: str,
    precision: str,
    seed: int,
) -> None:
    """Train an autoencoder, an encoder and a latent diffusion model: a bundle for --model.

    Running the same command again continues what was interrupted. decoder is no part of all: it
    trains the decoder of the autoencoder on, on images of its own if need be, and changes no
    feature; the next all writes the bundle with it.

    \b
    Example:
      psd pretrain all --preset tiny --images slides/patches --out models/mine
      psd pretrain all --images dev@2.2 --images roi --out models/mine --minutes 30
      psd pretrain ldm --images dev@2.2 --out models/mine
    """
    from cli.progress import Progress
    from pathsegdiff.device import resolve_device
    from pathsegdiff.diffusion.bundle import check_new_folder
    from pathsegdiff.diffusion.pretrain.images import open_pool
    from pathsegdiff.diffusion.pretrain.plans import PARTS, plan_of
    from pathsegdiff.diffusion.pretrain.run import LoopOptions, Pretraining

    if minutes is not None and not math.isfinite(minutes):  # click lets nan pass
        raise click.BadParameter(f"must be a number above 0, got {minutes}", param_hint="--minutes")
    until = None if minutes is None else time.monotonic() + 60 * minutes
    if part == "all":
        check_new_folder(out)
    work = out.with_name(f"{out.name}-training") if work is None else work
    plan = plan_of(preset).changed(
        steps=steps,
        batch_size=batch_size,
        precision=None if precision == "auto" else precision,
        seed=seed,
    )
    if encoder == "dino":
        plan = plan.with_dino_encoder()
    pool = open_pool(sources, data_root=data_root, seed=seed)
    training = Pretraining(plan, pool, work, resolve_device(device), seed)
    quiet = is_quiet(ctx)
    options = LoopOptions(stop_at=until)
    for each in PARTS if part == "all" else (part,):
        with Progress(f"pretrain {each}", "steps", quiet=quiet) as bar:

            def show(state: "PretrainProgress", bar: Progress = bar) -> None:
                shown = [f"{k} {v:.4g}" for k, v in state.figures.items() if "held" not in k]
                bar(state.step, state.total_steps, ", ".join(shown[:4]))

            done = training.train(each, options, progress=show)
        if not done:
            click.echo(f"{each}: the time is up; the same command goes on ({work / each})")
            return
        click.echo(f"{each}: finished ({work / each})")
    if part == "all":
        bundle = training.assemble(
            out,
            name=name or out.name,
            title=plan.preset.title,
            licence=licence,
            data=trained_on or _names(sources, len(pool.train)),
        )
        click.echo(f"{bundle.path}: {bundle.card.num_channels} channels; use it as --model {out}")


def _names(sources: tuple[str, ...], count: int) -> str:
    """The sources without the folders that they lie in, which say nothing elsewhere."""
    return f"{count} images of {', '.join(Path(source).name for source in sources)}"
