"""``psd models``: model bundles."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.fetch import OUT_OPTION, accept_option, pull
from cli.options import PATH, is_quiet, seed_option

if TYPE_CHECKING:
    from pathsegdiff.diffusion.bundle import Bundle

_DTYPES = ("float16", "float32")


@click.group()
def models() -> None:
    """Model bundles: list, show, pull, import, init.

    \b
    Example:
      psd models list
      psd models show tiny
    """


@models.command("list")
def list_models() -> None:
    """List the models that --model knows by name.

    \b
    Example:
      psd models list
    """
    from pathsegdiff.diffusion.bundle import list_bundles, models_dir, read_card
    from pathsegdiff.errors import BundleError

    for name, folder in list_bundles().items():
        try:
            card = read_card(folder)
        except BundleError as error:  # one bad folder must not hide the others
            click.echo(f"{name}  unusable: {error}")
            continue
        weights = "trained" if card.trained else "random weights"
        click.echo(f"{name}  {weights}  {card.num_channels} channels  {card.title}")
    click.echo(f"other bundles: put them in {models_dir()}, or give their folder")


@models.command()
@click.argument("model", metavar="NAME|BUNDLE")
def show(model: str) -> None:
    """Show what a model is, and check that it is whole.

    \b
    Example:
      psd models show tiny
    """
    from pathsegdiff.diffusion.bundle import load_bundle
    from pathsegdiff.diffusion.encoder import read_encoder_config

    bundle = load_bundle(model)
    card = bundle.card
    schedule = card.schedule
    encoder = read_encoder_config(bundle.configs["encoder"], str(bundle.path))
    channels, height, width = card.latent_shape
    lines = {
        "title": card.title,
        "weights": "trained" if card.trained else "random weights",
        "licence": card.licence,
        "patch": f"{card.patch_px} px",
        "encoder": encoder.summary,
        "context": f"{card.context_tokens} tokens" if card.context_tokens > 1 else "1 token",
        "latent": f"{channels} x {height} x {width} ({card.latent_kind}), "
        f"scale {card.latent_scale:g}",
        "schedule": f"{schedule.beta_schedule} {schedule.beta_start:g} to {schedule.beta_end:g}, "
        f"{schedule.timesteps} steps",
        "taps": f"{len(card.taps)}, {card.num_channels} channels",
        "head width": str(card.head_width),
        "sha256": card.sha256,
        "folder": str(bundle.path),
        **{f"from: {source}": text for source, text in card.provenance.items()},
    }
    click.echo(card.name)
    for label, text in lines.items():
        click.echo(f"  {label:<20}{text}")
    click.echo("  " + "  ".join(f"{tap.name} {tap.channels}@{tap.stride}" for tap in card.taps))


@models.command("pull")
@click.argument("name", metavar="ssl-ldm-brca|hipt|zoomldm-brca")
@OUT_OPTION
@click.option(
    "--encoder",
    type=PATH,
    help="Of zoomldm-brca: UNI's pytorch_model.bin, which you have to ask for "
    "[default: none, and so the null condition only].",
)
@accept_option
@click.pass_context
def pull_model(
    ctx: click.Context, name: str, out: Path | None, encoder: Path | None, accept_licence: bool
) -> None:
    """Get a published model, and make a bundle of it where its files allow.

    ssl-ldm-brca is the paper's: the SSL-guided LDM of breast tissue at 20x, with HIPT's encoder.
    zoomldm-brca is a later one, of several magnifications. hipt is the paper's encoder alone, kept
    as a file. Licence and citation are shown first and must be accepted once. The same command
    continues after an interruption.

    \b
    Example:
      psd models pull ssl-ldm-brca
      psd models pull hipt --out weights/hipt --accept-licence
    """
    pull(name, out, encoder, accept_licence, is_quiet(ctx))


@models.command()
@click.option(
    "--preset",
    type=click.Choice(["paper", "tiny", "micro"]),
    default="tiny",
    show_default=True,
    help="paper: the paper's shapes (1 GB); tiny: the same structure, small; micro: for tests.",
)
@seed_option
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    default="float16",
    show_default=True,
    help="Of the weights on disk; float16 halves the files.",
)
@click.option("--out", required=True, type=PATH, help="Folder to make.")
def init(preset: str, seed: int, dtype: str, out: Path) -> None:
    """Make a bundle of random weights, marked as such.

    \b
    Example:
      psd models init --preset tiny --seed 0 --out bundles/tiny0
    """
    import torch

    from pathsegdiff.diffusion.bundle import init_bundle

    bundle = init_bundle(preset, seed, out, dtype=getattr(torch, dtype))
    click.echo(f"random weights: {_summary(bundle)}")


@models.command("import")
@click.option("--ldm", required=True, type=PATH, help="Lightning checkpoint of the LDM (.ckpt).")
@click.option("--config", required=True, type=PATH, help="Its project YAML.")
@click.option(
    "--encoder",
    required=True,
    type=PATH,
    metavar="FILE|none",
    help="Checkpoint of the encoder, as DINO or timm write it; none: the null condition only.",
)
@click.option(
    "--encoder-config",
    type=PATH,
    metavar="FILE|hipt|uni",
    help="JSON with the encoder's shape, or a published one [default: hipt, a ViT-S/16].",
)
@click.option("--ema/--no-ema", default=False, help="Take the UNet's averaged weights.")
@click.option(
    "--ignore",
    multiple=True,
    metavar="PREFIX",
    help="Leave tensors of this prefix aside; may be given again.",
)
@click.option("--name", help="Of the model [default: the folder's].")
@click.option("--title", default="Imported latent diffusion model", help="One line for people.")
@click.option("--licence", default="as the imported files say", help="Of the weights.")
@click.option(
    "--head-width",
    default=256,
    show_default=True,
    type=click.IntRange(4, 4096),
    help="Channels of the segmentation head's first layer.",
)
@click.option("--random", "is_random", is_flag=True, help="Mark the weights as random.")
@click.option("--out", required=True, type=PATH, help="Folder to make.")
def import_model(
    ldm: Path,
    config: Path,
    encoder: Path,
    encoder_config: Path | None,
    ema: bool,
    ignore: tuple[str, ...],
    name: str | None,
    title: str,
    licence: str,
    head_width: int,
    is_random: bool,
    out: Path,
) -> None:
    """Make a bundle of the authors' checkpoints, without running anything in them.

    \b
    Example:
      psd models import --ldm last.ckpt --config project.yaml \\
        --encoder vit256_small_dino.pth --out bundles/brca
      psd models import --ldm weights.ckpt --config config.yaml --ema \\
        --encoder pytorch_model.bin --encoder-config uni --out bundles/zoomldm
    """
    from pathsegdiff.diffusion.checkpoints import import_bundle

    report = import_bundle(
        ldm=ldm,
        project=config,
        encoder=None if str(encoder) == "none" else encoder,
        encoder_config=encoder_config,
        out=out,
        ema=ema,
        ignore=ignore,
        name=name,
        title=title,
        licence=licence,
        head_width=head_width,
        trained=not is_random,
    )
    parts = ", ".join(f"{part} {count:,}" for part, count in report.parameters.items())
    click.echo(f"{report.tensors} tensors read, 0 missing, 0 unexpected")
    if report.ignored:
        aside = ", ".join(f"{prefix} {count}" for prefix, count in report.ignored.items())
        click.echo(f"left aside: {aside}")
    click.echo(f"parameters: {parts}")
    click.echo(_summary(report.bundle))


def _summary(bundle: "Bundle") -> str:
    card = bundle.card
    return f"{card.name}, {len(card.taps)} taps, {card.num_channels} channels: {bundle.path}"
