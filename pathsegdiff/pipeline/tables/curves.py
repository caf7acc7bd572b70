"""Figures 4 and 5 and Table 5: what is extracted and which heads are compared.

The commands are those that a user would type; ``psd sweep`` leaves table, plot and every run.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pathsegdiff.features.extract import store_name
from pathsegdiff.features.stage_one import View
from pathsegdiff.pipeline.sweep_table import About

#: On the validation part of BCSS, by learning rate (Table 5).
PUBLISHED_RATES = {
    1e-3: {"accuracy": 0.819, "miou": 0.632, "dice": 0.769},
    1e-4: {"accuracy": 0.826, "miou": 0.646, "dice": 0.780},
    1e-5: {"accuracy": 0.821, "miou": 0.638, "dice": 0.774},
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


def about(
    name: str, *, dataset: str, model: str, folds: str | None, budget: str, timesteps: Sequence[int]
) -> About:
    """What the table says beside its figures.

    Args:
        dataset, model: As their manifest and card say.
    """
    title, paper, reference = _CURVES[name]
    where = f"held-out folds {folds} of its training split" if folds else "its validation part"
    heads = _FULL
    if budget == "short":
        heads = _SHORT if name == "table5" else f"{_SHORT} {_RATE}"
    notes = [
        f"Ours: model {model} on {dataset}, {where}"
        + (f", t = {timesteps[0]}" if len(timesteps) == 1 else "")
        + f"; every head: psd train-head {heads}, or as the rows say.",
        f"Published: Danisetty et al. 2025, 'PathSegDiff', {paper}.",
    ]
    same = name == "table5" and dataset == "bcss"
    if name == "table5" and not same:
        notes.append(f"Ours were made on {dataset}, not on bcss: the published do not compare.")
    return About(
        title=f"{title}, on {dataset}",
        notes=tuple(notes),
        reference=reference,
        published=PUBLISHED_RATES if name == "table5" else {},
        same_data=same,
    )


#: Title, what was published, and the setting that the paper uses.
_CURVES: dict[str, tuple[str, str, tuple[str, Any]]] = {
    "fig4": ("Figure 4: the diffusion timestep", "Figure 4, which has no numbers", ("t", 50)),
    "fig5": ("Figure 5: each block alone", "Figure 5, which has no numbers", ("taps", "all")),
    "table5": (
        "Table 5: the learning rate of the head",
        "Table 5, validation of BCSS, constant rates",
        ("lr", 1e-4),
    ),
}
