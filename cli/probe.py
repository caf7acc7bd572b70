"""``psd probe``: one patch through stage 1, every number saved."""

from pathlib import Path

import click

from cli.options import PATH


@click.command()
@click.option("--model", default="tiny", show_default=True, help="A bundle's name or folder.")
@click.option("--image", required=True, type=PATH, help="Image file of one patch (256 x 256).")
@click.option("--t", "timestep", default=50, show_default=True, help="Diffusion timestep, 0-based.")
@click.option(
    "--noise",
    type=PATH,
    help="NPY file with the noise, (1, C, h, w) or (C, h, w) [default: drawn for seed 0 and the "
    "image's name].",
)
@click.option(
    "--cond",
    type=click.Choice(["encoder", "none"]),
    default="encoder",
    show_default=True,
    help="Condition on the encoder's vector, or on nothing (null).",
)
@click.option("--full", is_flag=True, help="Also eps_pred and the other condition's context.")
@click.option("--out", required=True, type=PATH, help="NPZ file to write.")
def probe(
    model: str,
    image: Path,
    timestep: int,
    noise: Path | None,
    cond: str,
    full: bool,
    out: Path,
) -> None:
    """Run one patch through stage 1 in float32 and save every number.

    The NPZ holds embedding, context, latent, noised_latent, middle and up_00 .. up_11 at native
    size, batch axis first.

    \b
    Example:
      psd probe --model bundles/brca --image patch.png --t 50 --out probe.npz
    """
    import numpy as np

    from pathsegdiff.diffusion.bundle import load_bundle
    from pathsegdiff.diffusion.probe import probe_file

    arrays = probe_file(
        load_bundle(model), image, timestep, noise=noise, conditioning=cond, full=full
    )
    if out.suffix != ".npz":  # numpy would add it silently
        out = out.with_name(f"{out.name}.npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # numpy's stub knows no such call
    click.echo(f"{len(arrays)} arrays in {out}")
