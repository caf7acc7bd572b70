"""Table 2 of the paper (BCSS) with the paper's own weights: what it needs, and how it is made.

The published figures are those of Danisetty et al. 2025, Table 2; ours stand beside them.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.device import resolve_device, resolve_precision
from pathsegdiff.diffusion.bundle import load_bundle
from pathsegdiff.errors import BundleError, DataError
from pathsegdiff.features.extract import extract_dataset, store_name
from pathsegdiff.features.stage_one import StageOne, View
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.segmentation.evaluate import evaluate_run
from pathsegdiff.segmentation.runs import load_run
from pathsegdiff.segmentation.train import plan_settings, train_head

COLUMNS = ("accuracy", "dice", "miou", "f1")
#: (accuracy, Dice, mIoU, F1) on the official BCSS test institutions.
PUBLISHED_TABLE2 = {
    "HIPT": (0.619, 0.353, 0.321, 0.170),
    "Res-UNet": (0.751, 0.529, 0.524, 0.658),
    "VGG16-FCN8": (0.786, 0.567, 0.577, 0.724),
    "PathSegDiff-uncond": (0.815, 0.757, 0.616, 0.757),
    "PathSegDiff": (0.826, 0.781, 0.647, 0.780),
}
#: Rows that this version computes, and the condition of each.
ROWS = {"PathSegDiff-uncond": "none", "PathSegDiff": "encoder"}
BUNDLE = "ssl-ldm-brca"

_BUNDLE_HELP = (
    "get configs/*-project.yaml and checkpoints/last.ckpt of the SSL-guided LDM (BRCA, 20x) from "
    "Google Drive folder 1kZ69wVEHV3k3Zr1hgS3kftz9cfNb9BxA, and HIPT's vit256_small_dino.pth from "
    "github.com/mahmoodlab/HIPT (git LFS), then: psd models import --ldm last.ckpt "
    "--config project.yaml --encoder vit256_small_dino.pth --out models/ssl-ldm-brca, and: "
    "make reproduce-table2 MODEL=models/ssl-ldm-brca"
)


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of the table.

    Attributes:
        name: As in the paper.
        ours: accuracy, Dice, mIoU, F1; None where this version does not compute the row.
        published: The paper's.
    """

    name: str
    ours: tuple[float, ...] | None
    published: tuple[float, ...]


def missing_for_table2(model: str, data_root: Path | None) -> list[str]:
    """What is not there, each with how to get it; empty where the table can be made."""
    missing = []
    try:
        load_bundle(model)
    except BundleError as error:
        missing.append(f"model bundle {model} ({error}): {_BUNDLE_HELP}")
    try:
        open_dataset("bcss", data_root=data_root)
    except DataError as error:
        missing.append(str(error))
    return missing


def reproduce_table2(
    out: Path,
    *,
    model: str = BUNDLE,
    data_root: Path | None = None,
    device: str = "auto",
    log: Callable[[str], None] = lambda line: None,
) -> list[TableRow]:
    """Extract, train and evaluate each row, and write ``table.md`` and ``table.csv``.

    Finished stores and runs are reused, so an interrupted call goes on where it was.
    """
    place = resolve_device(device)
    dataset = open_dataset("bcss", data_root=data_root)
    bundle = load_bundle(model)
    views = {name: View(timestep=50, conditioning=cond) for name, cond in ROWS.items()}
    stores = {
        view: out / "features" / store_name("bcss", bundle.card.name, view)
        for view in views.values()
    }
    stage_one = StageOne(
        bundle.load(device=place),
        views=list(views.values()),
        taps=[spec.name for spec in bundle.card.taps],
        precision=resolve_precision("auto", place),
        device=place,
        batch_size=3 if place.type == "cpu" else 32,
    )
    log("extracting")
    extract_dataset(dataset, bundle, stage_one, stores)
    rows = []
    for name, published in PUBLISHED_TABLE2.items():
        ours = None
        if name in views:
            log(f"training and evaluating {name}")
            store = FeatureStore.open(stores[views[name]])
            settings = plan_settings(store)
            result = train_head(store, out / "runs" / name, settings, device=place)
            found = evaluate_run(load_run(result.path, place), store).scores
            ours = tuple(float(getattr(found, column)) for column in COLUMNS)
        rows.append(TableRow(name=name, ours=ours, published=published))
    write_table(out, rows)
    return rows


def write_table(out: Path, rows: list[TableRow]) -> None:
    """Write the table as Markdown and CSV: ours beside the paper's."""
    out.mkdir(parents=True, exist_ok=True)
    header = ["row", *(f"{column}{kind}" for column in COLUMNS for kind in ("", " (paper)"))]
    body = []
    for row in rows:
        values = row.ours or (None,) * len(COLUMNS)
        cells = [row.name]
        for mine, theirs in zip(values, row.published, strict=True):
            cells += ["" if mine is None else f"{mine:.3f}", f"{theirs:.3f}"]
        body.append(cells)
    lines = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *body]]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    with (out / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *body])
