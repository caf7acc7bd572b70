"""The rows that are computed, the budget that all of them have, and what is run for each.

A row is trained and scored by the same commands that a user would type: ``psd extract``,
``psd train-head``, ``psd baseline``, ``psd eval``.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathsegdiff.errors import ConfigError
from pathsegdiff.features.extract import store_name
from pathsegdiff.features.stage_one import View


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of ours.

    Attributes:
        title: As the tables name it.
        store: Whose features a head reads: "encoder", "none" (conditions of the model), or
            "random" (the model's shapes with random weights); None for a network on images.
        arguments: Of ``train-head``, beside the budget's.
    """

    title: str
    store: str | None = None
    arguments: tuple[str, ...] = ()


#: By name; that of a network on images is the one of ``psd baseline``.
ROWS = {
    "conditioned": Row(title="PathSegDiff", store="encoder"),
    "null": Row(title="PathSegDiff, null conditioning", store="none"),
    "tokens": Row(title="encoder tokens alone", store="encoder", arguments=("--taps", "tokens")),
    "both": Row(title="taps and tokens", store="encoder", arguments=("--taps", "all,tokens")),
    "random": Row(title="same shapes, random weights", store="random"),
    "res-unet": Row(title="U-Net with a ResNet-18 encoder, from scratch"),
    "vgg16-fcn8": Row(title="FCN-8s on VGG16, from scratch"),
    "effnet-unet": Row(title="U-Net with an ImageNet EfficientNet-Lite0"),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every run of a table may cost.

    Attributes:
        name: Of the option.
        text: For people.
        head: Arguments of ``train-head``.
        baseline: Of ``baseline``.
    """

    name: str
    text: str
    head: tuple[str, ...]
    baseline: tuple[str, ...]


_SHORT = "--val 0 --keep last --batch-size 4"
BUDGETS = {
    "short": Budget(
        name="short",
        text="a head 200 steps of 4 crops of 256 px, a network on images 200 steps of 4 whole "
        "images at 512 px; the last weights of a cosine, every training image trains",
        head=tuple(
            shlex.split(
                f"{_SHORT} --steps 200 --crop 256 --lr 1e-3 --schedule cosine --augment flips"
            )
        ),
        baseline=tuple(shlex.split(f"{_SHORT} --steps 200 --size 512")),
    ),
    "full": Budget(
        name="full",
        text="a head with the paper's Adam at 1e-4 on whole regions, two at a time, the best on "
        "validation; a network on images 8 hours, or until validation stops improving",
        head=("--crop", "none", "--batch-size", "2"),
        baseline=tuple(shlex.split("--minutes 480 --size 768")),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training and its scoring.

    Attributes:
        row: Its name.
        seed: Of weights, order and the choice of images.
        fold: Held out and scored; None for the evaluated split.
        limit: Training images; None for all.
    """

    row: str
    seed: int
    fold: int | None = None
    limit: int | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        few = "" if self.limit is None else f"-{self.limit}images"
        held = "" if self.fold is None else f"-fold{self.fold}"
        return f"{self.row}{few}{held}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """What a table is made from.

    Attributes:
        table: Of ``published.TABLES``.
        out: Folder of stores, runs and the table.
        dataset: Name, or path of a manifest.
        dataset_name: As the manifest says.
        data_root: Folder with its images, or None.
        train_split, eval_split: Trained on, and scored where no fold is.
        model: Name or folder of a bundle.
        model_name: As its card says.
        random: Folder of a bundle with the model's shapes and random weights.
        timestep: Of the features.
        rows: Names of ``ROWS``.
        seeds, folds, limits: Every combination is run; no fold for the evaluated split. What is
            given twice is run once.
        budget: Of ``BUDGETS``.
        precision: Of the training.

    Raises:
        ConfigError: If a row or the budget is unknown, or there is nothing to run.
    """

    table: str
    out: Path
    dataset: str
    dataset_name: str
    data_root: Path | None = None
    train_split: str
    eval_split: str
    model: str
    model_name: str
    random: Path
    timestep: int = 50
    rows: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    folds: tuple[int, ...] = ()
    limits: tuple[int | None, ...] = (None,)
    budget: str = "short"
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_rows(self.rows)
        if not self.seeds or not self.limits:
            raise ConfigError("a table needs a seed and a number of images at least")
        if self.budget not in BUDGETS:
            raise ConfigError(f"--budget must be one of {', '.join(BUDGETS)}, got {self.budget!r}")
        for name in ("rows", "seeds", "folds", "limits"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))

    def signature(self) -> dict[str, Any]:
        """What every run in a folder must have in common, JSON types."""
        budget = BUDGETS[self.budget]
        return {
            "--dataset": self.dataset_name,
            "--eval-split": self.eval_split,
            "--model": self.model_name,
            "--t": self.timestep,
            "--budget": f"{self.budget}: {shlex.join(budget.head)}; {shlex.join(budget.baseline)}",
            "--precision": self.precision,
        }

    def jobs(self) -> list[Job]:
        """Every run, one seed of all rows before the next."""
        return [
            Job(row=row, seed=seed, fold=fold, limit=limit)
            for limit in self.limits
            for seed in self.seeds
            for fold in self.folds or (None,)
            for row in self.rows
        ]

    def stores(self) -> set[str]:
        """Kinds of stores that the rows read."""
        return {store for row in self.rows if (store := ROWS[row].store) is not None}

    def store(self, kind: str) -> Path:
        """Where a store is, by the name that ``psd extract`` gives it."""
        folder = self.out / "features"
        if kind == "random":
            return folder / "random.zarr"
        view = View(timestep=self.timestep, conditioning=kind)
        return folder / store_name(self.dataset_name, self.model_name, view)

    def run(self, job: Job) -> Path:
        """Folder of a run."""
        return self.out / "runs" / job.name

    def metrics(self, job: Job) -> Path:
        """The figures of a finished run."""
        part = self.eval_split if job.fold is None else f"fold{job.fold}"
        return self.run(job) / f"eval-{part}" / "metrics.json"

    def extractions(self) -> list[list[str]]:
        """Commands that fill the stores."""
        stores = self.stores()
        common = ["extract", *self._data(), "--t", str(self.timestep)]
        # Folds are of the training split alone.
        splits = [self.train_split, *([] if self.folds else [self.eval_split])]
        for split in dict.fromkeys(splits):
            common += ["--split", split]
        commands = []
        if stores & {"encoder", "none"}:
            condition = "both" if "none" in stores else "encoder"
            out = self.out / "features" if condition == "both" else self.store("encoder")
            commands.append(
                [*common, "--model", self.model, "--cond", condition, "--tokens", "--out", str(out)]
            )
        if "random" in stores:
            out = self.store("random")
            commands.append([*common, "--model", str(self.random), "--out", str(out)])
        return commands

    def commands(self, job: Job) -> list[list[str]]:
        """Commands that train and score a run, in this order."""
        row, budget, out = ROWS[job.row], BUDGETS[self.budget], str(self.run(job))
        common = ["--split", self.train_split, "--seed", str(job.seed)]
        common += ["--precision", self.precision, "--out", out]
        if job.limit is not None:
            common += ["--limit-images", str(job.limit)]
        if job.fold is not None:
            common += ["--fold", str(job.fold)]
        if row.store is None:
            scored = [] if job.fold is not None else ["--eval-split", self.eval_split]
            return [["baseline", job.row, *self._data(), *common, *scored, *budget.baseline]]
        features = ["--features", str(self.store(row.store))]
        scored = [] if job.fold is not None else ["--split", self.eval_split]
        return [
            ["train-head", *features, *common, *row.arguments, *budget.head],
            ["eval", "--run", out, *features, *scored],
        ]

    def _data(self) -> list[str]:
        root = [] if self.data_root is None else ["--data-root", str(self.data_root)]
        return ["--dataset", self.dataset, *root]


def check_rows(rows: Sequence[str]) -> None:
    """Raise ConfigError unless each is a name of ``ROWS`` and there is one."""
    for name in rows:
        if name not in ROWS:
            raise ConfigError(f"no row is called {name!r}; there are {', '.join(ROWS)}")
    if not rows:
        raise ConfigError("a table needs a row at least")
