"""``psd cache``: look into a feature store, check it, mend it, copy features out of it."""

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import PATH
from pathsegdiff.errors import printable

if TYPE_CHECKING:
    from collections.abc import Collection

    from pathsegdiff.features.store import FeatureStore, StoredSample
    from pathsegdiff.features.writer import StoreWriter


@click.group()
def cache() -> None:
    """Feature stores: contents, integrity, repair, export.

    \b
    Example:
      psd cache info features/demo-tiny-t50.zarr
      psd cache verify features/demo-tiny-t50.zarr
    """


@cache.command()
@click.argument("store", type=PATH)
def info(store: Path) -> None:
    """Print what a store holds and what it was made with.

    \b
    Example:
      psd cache info features/demo-tiny-t50.zarr
    """
    from cli.progress import size
    from pathsegdiff.features.store import FeatureStore

    opened = FeatureStore.open(store)
    recipe, card = opened.recipe, opened.card
    trained = "" if opened.model["trained"] else " (random weights)"
    click.echo(f"{opened.path}: {card.title}")
    click.echo(f"  licence      {card.licence}")
    click.echo(f"  model        {opened.model['name']}{trained}, {recipe.model_sha256[:12]}")
    click.echo(
        f"  recipe       t {recipe.timestep}, conditioning {recipe.conditioning}, "
        f"seed {recipe.seed}, computed in {recipe.precision}, stored as {recipe.dtype}"
    )
    click.echo(f"  fingerprint  {opened.fingerprint}")
    when, where = (str(opened.provenance.get(name)) for name in ("created", "device"))
    click.echo(f"  made         {printable(when)} on {printable(where)}")
    complete = {sample.index for sample in opened.samples()}
    for split in dict.fromkeys([*card.splits, *_splits(opened)]):
        rows = [sample for sample in opened.registered() if sample.split == split]
        if rows:
            done = sum(sample.index in complete for sample in rows)
            click.echo(f"  split        {split}: {done} of {len(rows)} samples complete")
    side = opened.patches_per_side
    for level in opened.levels.values():
        cells = side * level.cells_per_patch
        names = ", ".join(tap.name for tap in level.taps)
        click.echo(f"  {level.name:<12} ({level.channels}, {cells}, {cells}): {names}")
    if opened.samples():
        sizes = opened.bytes_of(opened.samples()[0])
        parts = ", ".join(f"{name} {size(count)}" for name, count in sizes.items())
        click.echo(f"  one sample   {size(sum(sizes.values()))}: {parts}")


@cache.command()
@click.argument("store", type=PATH)
def verify(store: Path) -> None:
    """Hold every file of every complete sample against its checksum; exit code 1 if one is damaged.

    \b
    Example:
      psd cache verify features/demo-tiny-t50.zarr
    """
    from pathsegdiff.errors import StoreError
    from pathsegdiff.features.backup import copy_is_older
    from pathsegdiff.features.store import BACKUP_KEY, FeatureStore
    from pathsegdiff.features.verify import verify_store

    opened = FeatureStore.open(store)
    findings = verify_store(opened)
    for finding in findings:
        where = "the store" if finding.sample is None else finding.sample.sample_id
        click.echo(f"{where}: {finding.problem}")
    damaged = {finding.sample.index for finding in findings if finding.sample is not None}
    complete, registered = len(opened.samples()), len(opened.registered())
    if damaged:
        raise StoreError(
            f"{len(damaged)} of {complete} samples are damaged; run `psd cache repair {store}`"
        )
    if findings:
        raise StoreError(
            f"{store}: its metadata have no second copy that is whole; run `psd cache repair "
            f"{store}`"
        )
    click.echo(f"{complete} complete samples, all whole: {store}")
    if complete < registered:
        click.echo(f"{registered - complete} more are listed but not complete; extract again")
    if copy_is_older(opened):
        click.echo(
            f"{BACKUP_KEY} is older than the table of samples; `psd cache repair {store}`, or the "
            "next extraction, renews it"
        )


@cache.command()
@click.argument("store", type=PATH)
@click.option("--data-root", type=PATH, help="Where the images are now [default: as recorded].")
@click.option("--model", help="Where the bundle is now [default: as recorded].")
@click.option(
    "--marks-only", is_flag=True, help="Take the marks of damaged samples away, extract nothing."
)
@click.pass_context
def repair(
    ctx: click.Context, store: Path, data_root: Path | None, model: str | None, marks_only: bool
) -> None:
    """Put the store's own files back, and extract damaged and missing samples again, with the
    store's own settings; the others are left alone.

    \b
    Example:
      psd cache repair features/demo-tiny-t50.zarr
      psd cache repair features/glas-tiny-t50.zarr --data-root /new/place/GlaS
    """
    from cli.main import run_within
    from pathsegdiff.errors import StoreError
    from pathsegdiff.features.store import BACKUP_KEY
    from pathsegdiff.features.verify import verify_store
    from pathsegdiff.features.writer import open_existing, put_metadata_back

    restored, dropped = put_metadata_back(store)
    for key in restored:
        click.echo(f"{key}: put back from the second copy in {BACKUP_KEY}")
    if dropped:
        click.echo(f"{dropped} marks of samples that the store does not list: taken away")
    try:
        writer = open_existing(store)
        findings = verify_store(writer.store)
    except StoreError as error:
        reason = str(error).split("; run `psd cache repair", 1)[0]
        raise StoreError(f"{reason}; delete the store and extract it again") from None
    if writer.keep_copy():
        restored.append(BACKUP_KEY)
        click.echo(f"{BACKUP_KEY}: written again")
    damaged = {f.sample.index: f.sample for f in findings if f.sample is not None}
    missing = [s for s in writer.store.registered() if not writer.store.is_complete(s)]
    if not damaged and not missing and not dropped:
        click.echo(f"{'repaired' if restored else 'nothing to repair'}: {store}")
        return
    if marks_only:
        _take_marks_away(writer, damaged.values(), "mark taken away")
        click.echo(f"made with: {printable(str(writer.store.provenance.get('command')))}")
        return
    # Before a mark is taken away: it must be known how to go on, and from the same pixels.
    command = _extraction(writer.store, store, data_root, model)
    known = _check_sources(writer.store, list(damaged.values()), data_root)
    _take_marks_away(writer, damaged.values(), "will be extracted again")
    unknown = [sample for sample in missing if sample.sample_id not in known]
    if unknown:
        click.echo(f"{len(unknown)} samples are not complete, and in the data set no more")
    if len(missing) > len(unknown):
        click.echo(f"{len(missing) - len(unknown)} samples are not complete and will be extracted")
    elif not damaged and not dropped:
        return
    click.echo(shlex.join(["psd", *command]))
    run_within(ctx, command)


def _take_marks_away(writer: "StoreWriter", samples: "Collection[StoredSample]", what: str) -> None:
    if samples:
        writer.forget(*samples)
    for sample in samples:
        click.echo(f"{sample.sample_id}: {what}")


def _extraction(
    opened: "FeatureStore", store: Path, data_root: Path | None, model: str | None
) -> list[str]:
    """The arguments of ``psd`` that finish a store: from its recipe, and where things were.

    Raises:
        StoreError: If the store does not record what it was made from.
    """
    from pathsegdiff.errors import StoreError

    was = opened.provenance.get("extraction")
    if not isinstance(was, dict) or not isinstance(was.get("dataset"), str):
        raise StoreError(
            f"{store} does not say what it was made from; use --marks-only, and run its `psd "
            "extract` again by hand"
        )
    recipe = opened.recipe
    command = ["extract", "--dataset", was["dataset"], "--out", str(store)]
    command += ["--model", str(model or was.get("model")), "--t", str(recipe.timestep)]
    command += ["--cond", recipe.conditioning, "--taps", ",".join(recipe.taps)]
    command += ["--dtype", recipe.dtype, "--precision", recipe.precision]
    command += ["--seed", str(recipe.seed), "--layout", recipe.layout]
    command += ["--tokens"] if recipe.tokens else []
    root = _root(opened, data_root)
    command += [] if root is None else ["--data-root", str(root)]
    command += [] if was.get("mpp") is None else ["--mpp", str(was["mpp"])]
    command += [] if was.get("batch_size") is None else ["--batch-size", str(was["batch_size"])]
    for split in _splits(opened):
        command += ["--split", split]
    return command


def _root(opened: "FeatureStore", data_root: Path | None) -> Path | None:
    """Where the images are: as asked for, else as recorded."""
    recorded = opened.provenance["extraction"].get("data_root")
    return data_root or (None if recorded is None else Path(recorded))


def _splits(opened: "FeatureStore") -> list[str]:
    return sorted({sample.split for sample in opened.registered()})


def _check_sources(
    opened: "FeatureStore", damaged: "list[StoredSample]", data_root: Path | None
) -> set[str]:
    """Refuse to make samples again that cannot be, or from other pixels as far as marks can tell.

    Returns:
        The data set's samples by name.

    Raises:
        StoreError: If an image or mask has changed since, or the data set has the sample no more.
    """
    from pathsegdiff.data.manifest import open_dataset
    from pathsegdiff.errors import StoreError
    from pathsegdiff.features.extract import check_unchanged

    was = opened.provenance["extraction"]
    dataset = open_dataset(
        was["dataset"],
        data_root=_root(opened, data_root),
        splits=_splits(opened),
        mpp=was.get("mpp"),
    )
    known = {sample.sample_id for sample in dataset.samples}
    for sample in damaged:
        if sample.sample_id not in known:
            raise StoreError(
                f"{opened.path}: sample {sample.sample_id} is damaged, and the data set has it no "
                "more; put its row back, or take its mark away with --marks-only"
            )
    readable = []
    for sample in damaged:
        with contextlib.suppress(StoreError):  # a mark that is damaged itself knows nothing
            opened.read_mark(sample)
            readable.append(sample)
    check_unchanged(dataset, opened, readable)
    return known


@cache.command()
@click.argument("store", type=PATH)
@click.option("--sample", "sample_ids", multiple=True, help="Only this sample; may be given again.")
@click.option("--out", type=PATH, required=True, help="Folder for SAMPLE_ID.npz files.")
def export(store: Path, sample_ids: tuple[str, ...], out: Path) -> None:
    """Write samples as NPZ for other tools: the dense map f, label and image.

    f is float16 of a store of float16, else float32.

    \b
    Example:
      psd cache export features/demo-tiny-t50.zarr --sample GT2012118-1-400-001 --out exported
    """
    import numpy as np

    from pathsegdiff.errors import StoreError
    from pathsegdiff.features.store import FeatureStore

    opened = FeatureStore.open(store)
    by_id = {sample.sample_id: sample for sample in opened.samples()}
    unknown = [name for name in sample_ids if name not in by_id]
    if unknown:
        raise StoreError(f"{store} has no complete sample {unknown[0]!r}; see `psd cache info`")
    out.mkdir(parents=True, exist_ok=True)
    # int8 has scales, and so values that float16 may not hold.
    dtype = "float16" if opened.recipe.dtype.startswith("float16") else "float32"
    for name in sample_ids or by_id:
        sample = by_id[name]
        np.savez(
            out / f"{name}.npz",
            features=opened.dense(sample).astype(dtype),
            taps=np.array(opened.tap_names),
            label=opened.label(sample),
            image=opened.image(sample),
        )
        click.echo(f"{out / f'{name}.npz'}")
