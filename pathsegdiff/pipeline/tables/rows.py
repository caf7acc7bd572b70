"""The rows that are computed, the budget that all of them have, and what is run for each.

A row is trained and scored by the same commands that a user would type: ``psd extract``,
``psd train-head``, ``psd baseline``, ``psd eval``.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathsegdiff.errors import ConfigError
from pathsegdiff.features.extract import store_name
from pathsegdiff.features.stage_one import View
from pathsegdiff.pipeline.baselines.ddpmseg import TIMESTEPS
from pathsegdiff.pipeline.baselines.imagenet_files import describe_weights


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of ours.

    Attributes:
        title: As the tables name it.
        store: Whose features it reads: "encoder", "none" (conditions of the model, or an
            unconditional one), "random" (the model's shapes with random weights), or "timesteps"
            (of the ensemble); None for a network on images.
        arguments: Of ``train-head``, beside the budget's.
        encoder: Of a network on images that begins from scratch: what ImageNet weights are of.
    """

    title: str
    store: str | None = None
    arguments: tuple[str, ...] = ()
    encoder: str | None = None


#: By name; that of a network on images is the one of ``psd baseline``.
ROWS = {
    "conditioned": Row(title="PathSegDiff", store="encoder"),
    "null": Row(title="null conditioning", store="none"),
    "tokens": Row(title="encoder tokens alone", store="encoder", arguments=("--taps", "tokens")),
    "both": Row(title="taps and tokens", store="encoder", arguments=("--taps", "all,tokens")),
    "random": Row(title="same shapes, random weights", store="random"),
    "res-unet": Row(title="U-Net with a ResNet-18 encoder", encoder="resnet18"),
    "vgg16-fcn8": Row(title="FCN-8s on VGG16", encoder="vgg16_bn"),
    "dcan": Row(title="DCAN on VGG16", encoder="vgg16_bn"),
    "ddpm-seg": Row(
        title=f"pixel classifiers at t = {', '.join(map(str, TIMESTEPS))}", store="timesteps"
    ),
    "effnet-unet": Row(title="U-Net with an ImageNet EfficientNet-Lite0"),
}
#: The row that learns from objects.
CONTOURS = "dcan"
#: That weights may be given to.
ENCODERS = tuple(dict.fromkeys(row.encoder for row in ROWS.values() if row.encoder is not None))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every run of a table may cost.

    Attributes:
        name: Of the option.
        text: For people.
        head: Arguments of ``train-head``.
        networks: Of ``baseline`` on images, by row.
        ensemble: Of ``baseline`` on stores.
    """

    name: str
    text: str
    head: tuple[str, ...]
    networks: Mapping[str, tuple[str, ...]]
    ensemble: tuple[str, ...]

    def commands(self) -> str:
        """All of it in one line."""
        networks = (f"{row} {shlex.join(words)}" for row, words in self.networks.items())
        return "; ".join((shlex.join(self.head), *networks, shlex.join(self.ensemble)))


def _networks(usual: str, vgg16: str) -> dict[str, tuple[str, ...]]:
    """Arguments of each network on images: those on VGG16 take four times as long for a step."""
    return {
        name: tuple(shlex.split(vgg16 if row.encoder == "vgg16_bn" else usual))
        for name, row in ROWS.items()
        if row.store is None
    }


_SHORT = "--val 0 --keep last"
_SHORT_IMAGES = f"{_SHORT} --batch-size 4 --size 256"
_FULL_IMAGES = "--minutes 480 --size 768 --lr 1e-3,3e-4,1e-4"
BUDGETS = {
    "short": Budget(
        name="short",
        text="a head 200 steps of 4 crops of 256 px, a U-Net 800 steps and a network on VGG16 200 "
        "of 4 whole images at 256 px, the last weights of a cosine; the pixel classifiers 3000 "
        "steps of 64 pixels each; every training image trains, so nothing is chosen on validation: "
        "networks have their usual learning rates",
        head=tuple(
            shlex.split(
                f"{_SHORT} --batch-size 4 --steps 200 --crop 256 --lr 1e-3 --schedule cosine "
                "--augment flips"
            )
        ),
        networks=_networks(f"{_SHORT_IMAGES} --steps 800", f"{_SHORT_IMAGES} --steps 200"),
        ensemble=tuple(shlex.split(f"{_SHORT} --steps 3000")),
    ),
    "full": Budget(
        name="full",
        text="a head with the paper's Adam at 1e-4 on whole regions, two at a time, 40 epochs with "
        "flips, the best on validation; a network on images 8 hours, or until validation stops "
        "improving, with the best of three learning rates on validation; the pixel classifiers "
        "four passes over their pixels",
        head=tuple(shlex.split("--crop none --batch-size 2 --epochs 40 --augment flips")),
        networks=_networks(_FULL_IMAGES, _FULL_IMAGES),
        ensemble=(),
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
        out: Folder of the table.
        work: Folder of stores and runs; None for ``out``.
        dataset: Name, or path of a manifest.
        dataset_name: As the manifest says.
        dataset_sha256: Of what makes regions and labels from files; None for not asked.
        data_root: Folder with its images, or None.
        train_split, eval_split: Trained on, and scored where no fold is.
        model: Name or folder of a bundle.
        model_name: As its card says.
        has_encoder: Whether it can be conditioned on patches.
        random: Folder of a bundle with the model's shapes and random weights.
        unconditional: Name or folder of the bundle of the row null; None for the model itself with
            the null condition.
        unconditional_name: As its card says.
        encoder_weights: Files of ``ENCODERS`` that networks on images begin with.
        model_sha256, unconditional_sha256, random_sha256: Of the bundles, None where one is not
            there.
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
    work: Path | None = None
    dataset: str
    dataset_name: str
    dataset_sha256: str | None = None
    data_root: Path | None = None
    train_split: str
    eval_split: str
    model: str
    model_name: str
    has_encoder: bool = True
    random: Path
    unconditional: str | None = None
    unconditional_name: str | None = None
    encoder_weights: Mapping[str, Path] = field(default_factory=dict)
    model_sha256: str | None = None
    unconditional_sha256: str | None = None
    random_sha256: str | None = None
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
            "--budget": f"{self.budget}: {budget.commands()}",
            "--precision": self.precision,
            **({"--unconditional": self.unconditional_name} if "none" in self.stores() else {}),
        }

    def weights_of(self, row: str) -> Path | None:
        """The file that a row's encoder begins with; None for a row that has none."""
        return self.encoder_weights.get(ROWS[row].encoder or "")

    def title_of(self, row: str) -> str:
        """Title of a row, which says what its encoder begins with."""
        title, file = ROWS[row].title, self.weights_of(row)
        if ROWS[row].encoder is None:
            return title
        return f"{title}, {describe_weights(file)}"

    def jobs(self) -> list[Job]:
        """Every run, one seed of all rows before the next."""
        return [
            Job(row=row, seed=seed, fold=fold, limit=limit)
            for limit in self.limits
            for seed in self.seeds
            for fold in self.folds or (None,)
            for row in self.rows
        ]

    @property
    def folder(self) -> Path:
        """Of stores and runs."""
        return self.out if self.work is None else self.work

    def stores(self) -> set[str]:
        """Kinds of stores that the rows read."""
        return {store for row in self.rows if (store := ROWS[row].store) is not None}

    def store_of(self, kind: str, timestep: int) -> Path:
        """Where a store is, by the name that ``psd extract`` gives it."""
        folder = self.folder / "features"
        if kind == "random":
            return folder / "random.zarr"
        view = View(timestep=timestep, conditioning=kind)
        model = (kind == "none" and self.unconditional_name) or self.model_name
        return folder / store_name(self.dataset_name, model, view)

    def stores_of(self, row: Row) -> list[Path]:
        """Those that a row reads."""
        assert row.store is not None
        if row.store == "timesteps":
            return [self.store_of("encoder", timestep) for timestep in TIMESTEPS]
        return [self.store_of(row.store, self.timestep)]

    def run(self, job: Job) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / job.name

    def metrics(self, job: Job) -> Path:
        """The figures of a finished run."""
        part = self.eval_split if job.fold is None else f"fold{job.fold}"
        return self.run(job) / f"eval-{part}" / "metrics.json"

    def extractions(self) -> list[list[str]]:
        """Commands that fill the stores."""
        stores = self.stores()
        common = ["extract", *self._data()]
        # Folds are of the training split alone.
        splits = [self.train_split, *([] if self.folds else [self.eval_split])]
        for split in dict.fromkeys(splits):
            common += ["--split", split]
        commands = []
        rest = [timestep for timestep in TIMESTEPS if timestep != self.timestep]
        if "timesteps" in stores and len(rest) < len(TIMESTEPS):
            stores = stores | {"encoder"}
        kinds = stores & {"encoder", "none"}
        if "none" in stores and self.unconditional is not None:
            kinds -= {"none"}
            out = self.store_of("none", self.timestep)
            model = ["--model", self.unconditional, "--cond", "none", "--out", str(out)]
            commands.append([*common, "--t", str(self.timestep), *model])
        if kinds:
            (condition,) = kinds if len(kinds) == 1 else ("both",)
            out = self.store_of("encoder" if condition == "both" else condition, self.timestep)
            if condition == "both":
                out = out.parent
            tokens = ["--tokens"] if self.has_encoder else []
            model = ["--model", self.model, "--cond", condition, *tokens, "--out", str(out)]
            commands.append([*common, "--t", str(self.timestep), *model])
        if "timesteps" in stores:
            out = self.folder / "features"
            several = ["--t", ",".join(map(str, rest)), "--model", self.model, "--out", str(out)]
            commands.append([*common, *several])
        if "random" in stores:
            out = self.store_of("random", self.timestep)
            random = ["--model", str(self.random), "--out", str(out)]
            commands.append([*common, "--t", str(self.timestep), *random])
        return commands

    def commands(self, job: Job) -> list[list[str]]:
        """Commands that train and score a run, in this order."""
        row, budget, out = ROWS[job.row], BUDGETS[self.budget], str(self.run(job))
        common = ["--split", self.train_split, "--seed", str(job.seed), "--out", out]
        precision = ["--precision", self.precision]
        if job.limit is not None:
            common += ["--limit-images", str(job.limit)]
        if job.fold is not None:
            common += ["--fold", str(job.fold)]
        eval_split = [] if job.fold is not None else ["--eval-split", self.eval_split]
        if row.store is None:
            network = ["baseline", job.row, *self._data(), *common, *precision, *eval_split]
            file = self.weights_of(job.row)
            weights = [] if file is None else ["--encoder-weights", str(file)]
            return [[*network, *weights, *budget.networks[job.row]]]
        features = [part for store in self.stores_of(row) for part in ("--features", str(store))]
        if row.store == "timesteps":
            return [["baseline", job.row, *features, *common, *eval_split, *budget.ensemble]]
        scored = [] if job.fold is not None else ["--split", self.eval_split]
        head = ["train-head", *features, *common, *precision, *row.arguments, *budget.head]
        return [head, ["eval", "--run", out, *features, *scored]]

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
