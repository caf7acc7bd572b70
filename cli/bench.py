"""``psd bench``: our two stages beside the plain way, on this machine."""

import json
from pathlib import Path

import click

from cli.options import PATH, device_option


@click.command()
@click.option("--model", default="tiny", show_default=True, help="A bundle's name or folder.")
@click.option(
    "--samples", type=int, default=8, show_default=True, help="Regions, of the embedded images."
)
@click.option("--region", type=int, default=512, show_default=True, help="Side of a region, px.")
@click.option("--runs", type=int, default=5, show_default=True, help="Of each side, in turns.")
@click.option("--batch-size", type=int, default=4, show_default=True, help="Patches per forward.")
@click.option(
    "--head-batch", type=int, default=1, show_default=True, help="Regions per training step."
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Measured after float32, beside the same plain way; auto: bfloat16, unless the processor "
    "has to emulate it.",
)
@click.option("--memory/--no-memory", default=True, show_default=True, help="Peak memory too.")
@device_option
@click.option("--json", "file", type=PATH, help="Write every figure there.")
@click.option("--plot", type=PATH, help="Draw the ratios there (PNG).")
def bench(
    model: str,
    samples: int,
    region: int,
    runs: int,
    batch_size: int,
    head_batch: int,
    precision: str,
    memory: bool,
    device: str,
    file: Path | None,
    plot: Path | None,
) -> None:
    """Measure extraction, store and head training beside the plain way.

    The plain way: patch by patch in float32 with hooks, every tap interpolated to the stride-4
    grid, one array file per image, the FCN in its plain form. Works on embedded images.

    \b
    Example:
      psd bench
      psd bench --model models/ssl-ldm-brca --region 768 --samples 2 --runs 3
    """
    from pathsegdiff.device import has_arithmetic, resolve_device
    from pathsegdiff.files import replace_file
    from pathsegdiff.pipeline.bench.bench import BenchSettings, facts, run_bench, table
    from pathsegdiff.pipeline.bench.plot import draw

    place = resolve_device(device)
    if precision == "auto":
        fast = place.type != "cpu" or has_arithmetic("bfloat16")
        precision = "bfloat16" if fast else "float32"
    settings = BenchSettings(
        model=model,
        samples=samples,
        region_px=region,
        runs=runs,
        batch_size=batch_size,
        head_batch=head_batch,
        precision=precision,
        device=place,
        memory=memory,
    )
    found = run_bench(settings, log=lambda line: click.echo(f"measuring {line}", err=True))
    click.echo(table(found))
    for line in facts(found):
        click.echo(line)
    if file is not None:
        text = json.dumps(found, indent=2) + "\n"
        replace_file(file, lambda beside: beside.write_text(text, encoding="utf-8"))
        click.echo(f"every figure: {file}")
    if plot is not None:
        replace_file(plot, lambda beside: draw(found, beside))
        click.echo(f"ratios: {plot}")
