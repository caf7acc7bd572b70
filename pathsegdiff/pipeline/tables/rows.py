"""The rows that are computed, the budget that all of them have, and what is run for each.

A row is trained and scored by the same commands that a user would type: ``psd extract``,
``psd train-head``, ``psd baseline``, ``psd eval``.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from pathsegdiff.errors import ConfigError


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
        text="a head as the paper trains it (Adam 1e-4, whole regions, the best on validation), a "
        "network on images 8 hours, or until validation stops improving",
        head=(),
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
        data_root: Folder with its images, or None.
        eval_split: Scored; None for the data set's own.
        model: Name or folder of a bundle.
        random: Folder of a bundle with the model's shapes and random weights; made where missing.
        timestep: Of the features.
        rows: Names of ``ROWS``.
        seeds, folds, limits: Every combination is run; no fold for the evaluated split.
        budget: Of ``BUDGETS``.
        precision: Of the training.
    """

    table: str
    out: Path
    dataset: str
    data_root: Path | None = None
    eval_split: str | None = None
    model: str = "tiny"
    random: Path = Path("models/tiny-random")
    timestep: int = 50
    rows: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    folds: tuple[int, ...] = ()
    limits: tuple[int | None, ...] = (None,)
    budget: str = "short"
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name in self.rows:
            if name not in ROWS:
                raise ConfigError(f"no row is called {name!r}; there are {', '.join(ROWS)}")
        if not self.rows or not self.seeds or not self.limits:
            raise ConfigError("a table needs a row, a seed and a number of images at least")
        if self.budget not in BUDGETS:
            raise ConfigError(f"--budget must be one of {', '.join(BUDGETS)}, got {self.budget!r}")

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
        """Where a store is."""
        if kind == "random":
            return self.out / "features" / "random.zarr"
        null = "-null" if kind == "none" else ""
        dataset, model = Path(self.dataset).stem, Path(self.model).name
        return self.out / "features" / f"{dataset}-{model}-t{self.timestep}{null}.zarr"

    def run(self, job: Job) -> Path:
        """Folder of a run."""
        return self.out / "runs" / job.name

    def metrics(self, job: Job, eval_split: str) -> Path:
        """The figures of a finished run."""
        part = eval_split if job.fold is None else f"fold{job.fold}"
        return self.run(job) / f"eval-{part}" / "metrics.json"

    def extractions(self, splits: list[str]) -> list[list[str]]:
        """Commands that fill the stores.

        Args:
            splits: Of the data set that are trained on or scored.
        """
        stores = self.stores()
        common = ["extract", *self._data(), "--t", str(self.timestep)]
        for split in splits:
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
        common = ["--seed", str(job.seed), "--precision", self.precision, "--out", out]
        if job.limit is not None:
            common += ["--limit-images", str(job.limit)]
        if job.fold is not None:
            common += ["--fold", str(job.fold)]
        scored = [] if self.eval_split is None or job.fold is not None else [self.eval_split]
        if row.store is None:
            split = ["--eval-split", *scored] if scored else []
            return [["baseline", job.row, *self._data(), *common, *split, *budget.baseline]]
        features = ["--features", str(self.store(row.store))]
        split = ["--split", *scored] if scored else []
        return [
            ["train-head", *features, *common, *row.arguments, *budget.head],
            ["eval", "--run", out, *features, *split],
        ]

    def _data(self) -> list[str]:
        root = [] if self.data_root is None else ["--data-root", str(self.data_root)]
        return ["--dataset", self.dataset, *root]
