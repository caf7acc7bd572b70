"""Figures 4 and 5 and Table 5: what is extracted and which heads are compared.

The commands are those that a user would type; ``psd sweep`` leaves table, plot and every run.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from pathsegdiff.features.extract import store_name
from pathsegdiff.features.stage_one import View

#: (accuracy, mIoU, Dice) on the validation part of BCSS, by learning rate (Table 5).
PUBLISHED_RATES = {
    "1e-3": (0.819, 0.632, 0.769),
    "1e-4": (0.826, 0.646, 0.780),
    "1e-5": (0.821, 0.638, 0.774),
}
_SHORT = "--steps 200 --batch-size 4 --crop 256 --augment flips --keep last"
_FULL = "--crop none --batch-size 2"
_RATE = "--lr 1e-3 --schedule cosine"


def extraction_command(
    dataset: str,
    data_root: Path | None,
    model: str,
    *,
    names: tuple[str, str],
    split: str,
    timesteps: Sequence[int],
    folder: Path,
) -> tuple[list[str], list[Path]]:
    """Arguments of ``psd``, and the stores that it fills, one for each timestep.

    Args:
        names: Of the data set and the model, as their manifest and card say.
        timesteps: None twice.
    """
    views = [View(timestep=timestep, conditioning="encoder") for timestep in timesteps]
    stores = [folder / store_name(*names, view) for view in views]
    root = [] if data_root is None else ["--data-root", str(data_root)]
    out = folder if len(stores) > 1 else stores[0]
    command = ["extract", "--dataset", dataset, *root, "--split", split, "--model", model]
    return [*command, "--t", ",".join(map(str, timesteps)), "--out", str(out)], stores


def sweep_command(
    name: str,
    stores: Sequence[Path],
    *,
    split: str,
    folds: str | None,
    seeds: str,
    rates: str | None,
    budget: str,
    precision: str,
    jobs: int | None,
    out: Path,
) -> list[str]:
    """Arguments of ``psd``.

    Args:
        name: "fig4" (a store for each timestep), "fig5" (each tap) or "table5" (learning rates).
        rates: Of table5.
        budget: "short", or "full" for the paper's Adam on whole regions.
    """
    command = ["sweep", "--split", split, "--seed", seeds, "--precision", precision]
    for store in stores:
        command += ["--features", str(store)]
    if name == "fig5":
        command += ["--taps", "each"]
    if folds:
        command += ["--fold", folds]
    command += shlex.split(_SHORT if budget == "short" else _FULL)
    if rates is not None:
        command += ["--lr", rates]
    elif budget == "short":
        command += shlex.split(_RATE)
    if jobs is not None:
        command += ["--jobs", str(jobs)]
    return [*command, "--out", str(out)]


def published_note(name: str) -> str:
    """What the paper prints; empty for its figures, which have no numbers."""
    if name != "table5":
        return ""
    rows = "; ".join(
        f"{rate}: accuracy {accuracy:.3f}, mIoU {miou:.3f}, Dice {dice:.3f}"
        for rate, (accuracy, miou, dice) in PUBLISHED_RATES.items()
    )
    return f"published (Danisetty et al. 2025, Table 5, validation of BCSS): {rows}"
