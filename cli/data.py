"""``psd data``: the data sets that are known, what they need, are they whole; your own data."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.fetch import accept_option, fetch_data
from cli.options import PATH, data_root_option, is_quiet

if TYPE_CHECKING:  # heavy imports stay inside the commands
    from pathsegdiff.data.check import CheckReport
    from pathsegdiff.data.manifest_file import Manifest

_FINDINGS_SHOWN = 10


@click.group()
def data() -> None:
    """Data sets: what is needed, where from, is it whole.

    \b
    Example:
      psd data list
      psd data show glas
      psd data fetch glas
      psd data check glas --data-root ~/GlaS
      psd data init --images my/images --masks my/masks --out my.toml
    """


@data.command("list")
def list_data() -> None:
    """List the data sets that are known, and whether they are here.

    \b
    Example:
      psd data list
    """
    from pathsegdiff.data.manifest import data_root_of, list_manifests, load_manifest
    from pathsegdiff.errors import DataError

    for name in list_manifests():
        manifest = load_manifest(name)
        try:
            here = f"in {data_root_of(manifest)}" if manifest.root is None else "embedded"
        except DataError:
            here = f"not here; `psd data show {name}` says where to get it"
        click.echo(f"{name:8}{len(manifest.sources):>5} images  {manifest.title}")
        click.echo(f"{'':8}{here}")


@data.command()
@click.argument("name", metavar="NAME|MANIFEST")
def show(name: str) -> None:
    """Show what a data set is, where to get it and what is expected where.

    \b
    Example:
      psd data show glas
    """
    from pathsegdiff.data.manifest import load_manifest

    manifest = load_manifest(name)
    click.echo(f"{manifest.name}: {manifest.title}")
    for label, text in (
        ("licence", manifest.licence),
        ("citation", manifest.citation),
        ("home page", manifest.homepage),
        ("where", manifest.where),
        ("layout", manifest.layout),
    ):
        if text:
            click.echo(_field(label, text))
    if manifest.fetch is not None:
        click.echo(_field("fetch", f"psd data fetch {_shown_name(manifest)}"))
    _show_content(manifest)
    click.echo(_field("looked for in", _places(manifest)))


@data.command()
@click.argument("name", metavar="NAME|MANIFEST")
@data_root_option
@accept_option
@click.pass_context
def fetch(ctx: click.Context, name: str, data_root: Path | None, accept_licence: bool) -> None:
    """Get a data set from where its manifest says, and check it.

    Licence and citation are shown first and must be accepted once. The same command continues
    after an interruption, and leaves alone what is already there.

    \b
    Example:
      psd data fetch glas
      psd data fetch bcss --data-root ~/bcss --accept-licence
    """
    quiet = is_quiet(ctx)
    if not fetch_data(name, data_root, accept_licence, quiet):
        raise click.exceptions.Exit(1)


@data.command()
@click.argument("name", metavar="NAME|MANIFEST")
@data_root_option
@click.option("--split", "splits", multiple=True, help="Only this part; may be given again.")
@click.pass_context
def check(ctx: click.Context, name: str, data_root: Path | None, splits: tuple[str, ...]) -> None:
    """Decode every image and mask and hold them against the manifest.

    Exit code 1 if a file is missing, altered or unreadable, or a mask contradicts its image or the
    classes. A split that is wholly absent is no fault, unless --split names it.

    \b
    Example:
      psd data check glas --data-root ~/GlaS
      psd data check my.toml
    """
    from cli.progress import Progress
    from pathsegdiff.data.check import check_dataset

    quiet = is_quiet(ctx)
    with Progress("check", "images", quiet=quiet) as progress:
        report = check_dataset(name, data_root=data_root, splits=splits, progress=progress)
    show_report(report)
    if not report.whole:
        raise click.exceptions.Exit(1)


@data.command()
@click.option("--images", type=PATH, required=True, help="Folder of images.")
@click.option("--masks", type=PATH, required=True, help="Folder of masks; may be the same.")
@click.option(
    "--mask-suffix",
    help="What follows an image's name in its mask's, such as _anno [default: found out].",
)
@click.option("--region-px", type=int, default=768, show_default=True, help="Side of a region.")
@click.option("--resize", is_flag=True, help="Resize each image to one region.")
@click.option(
    "--window", "window_px", type=int, help="Cut windows of this side, at least --region-px."
)
@click.option("--mpp", type=float, help="Micrometres per pixel of the images, where known.")
@click.option(
    "--group-regex",
    help="Finds the patient or case in an image's path; no group is split between parts.",
)
@click.option("--out", type=PATH, required=True, help="Manifest to write: NAME.toml.")
@click.pass_context
def init(
    ctx: click.Context,
    images: Path,
    masks: Path,
    mask_suffix: str | None,
    region_px: int,
    resize: bool,
    window_px: int | None,
    mpp: float | None,
    group_regex: str | None,
    out: Path,
) -> None:
    """Write a manifest for your own images and masks (png, jpg, tif, bmp, webp).

    Classes, sizes and a split into training and test groups are found out; what was guessed is
    printed, and stands in the two files for you to edit.

    \b
    Example:
      psd data init --images my/images --masks my/masks --out my.toml
      psd data init --images scans --masks scans --mask-suffix _anno \\
          --group-regex "patient-[0-9]+" --window 800 --mpp 0.5 --out scans.toml
    """
    from cli.progress import Progress
    from pathsegdiff.data.init import init_manifest

    if resize and window_px is not None:
        raise click.UsageError("--resize and --window exclude each other")
    kind = "resize" if resize else "window" if window_px is not None else None
    quiet = is_quiet(ctx)
    with Progress("look", "images", quiet=quiet) as progress:
        result = init_manifest(
            images,
            masks,
            out,
            mask_suffix=mask_suffix,
            kind=kind,
            region_px=region_px,
            window_px=window_px,
            mpp=mpp,
            group_regex=group_regex,
            progress=progress,
        )
    manifest = result.manifest
    click.echo(f"{manifest.path}: {manifest.title}")
    for note in result.notes:
        click.echo(f"  guessed: {note}")
    total = max(1, sum(result.class_pixels))
    for entry, pixels in zip(manifest.scheme.classes, result.class_pixels, strict=True):
        click.echo(f"  class {entry.name}: {pixels / total:.1%} of the pixels")
    _show_content(manifest)
    click.echo(f"Next: edit {manifest.path} if a guess is wrong, then")
    click.echo(f"  psd extract --dataset {shlex.quote(str(manifest.path))}")


def _show_content(manifest: "Manifest") -> None:
    """Classes, region rule, and how many images and groups each split has."""
    entries = list(manifest.scheme.classes)
    if manifest.scheme.dont_care is not None:
        entries.append(manifest.scheme.dont_care)
    for entry in entries:
        codes = (
            "every code above 0 that no other class has"
            if isinstance(entry.codes, str)
            else f"code{'s'[: len(entry.codes) > 1]} {', '.join(map(str, entry.codes))}"
        )
        role = ", don't care" if entry is manifest.scheme.dont_care else ""
        role += ", objects are counted" if entry.name == manifest.scheme.objects else ""
        click.echo(_field("class", f"{entry.name}: {codes}{role}"))
    rule = manifest.rule
    if rule.kind == "resize":
        text = f"each image is resized to {rule.region_px} x {rule.region_px} px"
    else:
        scale = f" at {rule.mpp} um/px" if rule.mpp is not None else ""
        text = f"windows of {rule.window_px} px{scale}, of each a crop of {rule.region_px} px"
    click.echo(_field("region", text))
    for split in manifest.splits:
        rows = [source for source in manifest.sources if source.split == split]
        groups = len({source.group for source in rows})
        used = [
            use
            for use, chosen in (
                ("training", manifest.default_train),
                ("evaluation", manifest.default_eval),
            )
            if split == chosen
        ]
        note = f"; the default for {' and '.join(used)}" if used else ""
        click.echo(_field("split", f"{split}: {len(rows)} images of {groups} groups{note}"))
    if not manifest.grouped:
        click.echo(_field("note", "groups stand in several splits"))


def _places(manifest: "Manifest") -> str:
    if manifest.root is not None:
        return f"{manifest.root}, or --data-root"
    return f"--data-root, else $PSD_DATA/{manifest.name}, else data/{manifest.name}"


def show_report(report: "CheckReport") -> None:
    """Print what a check found."""
    click.echo(f"{report.manifest.name} in {report.root}")
    if not report.hashed:
        click.echo("The manifest has no pixel hashes: altered pixels cannot be noticed.")
    for split in report.splits:
        if split.absent:
            needed = "" if split.split in report.needed else "; it is left out"
            click.echo(f"{split.split}: none of {split.total} images is here{needed}")
            continue
        kinds = [finding.kind for finding in split.findings]
        counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
        click.echo(f"{split.split}: {', '.join([f'{split.good} of {split.total} good', *counts])}")
        for finding in split.findings[:_FINDINGS_SHOWN]:
            click.echo(f"  {finding.kind}: {finding.message}")
        if len(split.findings) > _FINDINGS_SHOWN:
            click.echo(f"  ... and {len(split.findings) - _FINDINGS_SHOWN} more")
    found = {finding.kind for split in report.splits for finding in split.findings}
    gone = found & {"missing", "altered"} or any(split.absent for split in report.splits)
    if not report.whole and gone:
        says = "where to get it" if report.manifest.root is None else "where its files should be"
        click.echo(f"`psd data show {_shown_name(report.manifest)}` says {says}.")


def _shown_name(manifest: "Manifest") -> str:
    from pathsegdiff.data.manifest_file import reference

    return reference(manifest)


def _field(label: str, text: str) -> str:
    """A label with its text; further lines stand below the first."""
    return f"  {label:14}" + text.replace("\n", "\n" + " " * 16)
