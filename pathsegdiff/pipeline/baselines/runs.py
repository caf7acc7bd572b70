"""The folder of a baseline's run: the files of a head's run, with its network for the head.

RUN/config.json           every setting, the samples of each part, the network, provenance
    network.safetensors   the weights that were best on validation, or the last (--keep)
    checkpoint.pt, log.csv, curves.png, result.json   as ``psd train-head`` leaves them
    eval-SPLIT/           as ``psd eval`` leaves it
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pathsegdiff.data.manifest import Dataset
from pathsegdiff.errors import RunError
from pathsegdiff.files import file_sha256
from pathsegdiff.pipeline.baselines.images import AUGMENTATION
from pathsegdiff.pipeline.baselines.networks import STRIDE, architecture_of, build_network
from pathsegdiff.segmentation.loop import folder_name
from pathsegdiff.segmentation.runs import (
    CONFIG_FILE,
    FORMAT,
    damage_in_one_line,
    load_weights,
    no_weights,
)
from pathsegdiff.segmentation.train import KEEPS

NETWORK_FILE = "network.safetensors"
KIND = "baseline"
DEFAULT_SIZE_PX = 512
DEFAULT_MINUTES = 60.0
DEFAULT_BATCH_SIZE = 4
#: About so many validations in a training, unless they take long.
VALIDATIONS = 20
#: Where the best is kept, the training ends after so many in a row that did not improve on it.
PATIENCE = 8
WARM_UP_STEPS = 20
WEIGHT_DECAY = 0.01
_MAX_SIZE_PX = 4096


@dataclass(frozen=True, kw_only=True)
class BaselineSettings:
    """What decides the weights of a baseline, beside the data set.

    Attributes:
        name: Of the network.
        split: Trained on; None with a fold: every split.
        val: A fraction of the training groups, or a split; "0" for no validation.
        fold: Held out, or None.
        limit: Training images that are used, or None for all.
        size_px: Side that each region is resized to.
        steps: Of the optimiser, or None where the time is given.
        minutes: Of training and validation together, or None.
        batch_size: Images per step.
        learning_rate: Highest of AdamW.
        keep: The weights that are "best" on validation, or the "last".
        precision: Of the forward and backward pass.
        seed: Of the initial weights, the order, the augmentation and the parts.
        encoder_weights: SHA-256 of the file that the encoder begins with; None for its own.
    """

    name: str
    split: str | None
    val: str = "0.2"
    fold: int | None = None
    limit: int | None = None
    size_px: int = DEFAULT_SIZE_PX
    steps: int | None = None
    minutes: float | None = DEFAULT_MINUTES
    batch_size: int = DEFAULT_BATCH_SIZE
    learning_rate: float
    keep: str = "best"
    precision: str = "float32"
    seed: int = 0
    encoder_weights: str | None = None

    def __post_init__(self) -> None:
        architecture_of(self.name)
        if (self.minutes is None) == (self.steps is None):
            raise RunError("give --steps or --minutes, not both")
        for option, value in (
            ("--steps", self.steps),
            ("--batch-size", self.batch_size),
            ("--limit-images", self.limit),
        ):
            if value is not None and value < 1:
                raise RunError(f"{option} must be at least 1, got {value}")
        for option, number in (("--minutes", self.minutes), ("--lr", self.learning_rate)):
            if number is not None and not 0 < number < math.inf:
                raise RunError(f"{option} must be a number above 0, got {number}")
        if self.keep not in KEEPS:
            raise RunError(f"--keep must be one of {', '.join(KEEPS)}, got {self.keep!r}")
        # Below two cells a batch normalisation of one image would have nothing to normalise.
        if self.size_px % STRIDE or not 2 * STRIDE <= self.size_px <= _MAX_SIZE_PX:
            raise RunError(
                f"--size must be a multiple of {STRIDE} from {2 * STRIDE} to {_MAX_SIZE_PX} px, "
                f"got {self.size_px}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def length(self) -> str:
        """For people: "200 steps", "90 minutes"."""
        return f"{self.minutes:g} minutes" if self.steps is None else f"{self.steps} steps"


def fixed_method() -> dict[str, Any]:
    """What no option of a baseline changes, JSON types."""
    return {
        "optimiser": f"AdamW, weight decay {WEIGHT_DECAY}",
        "schedule": f"linear warm-up of at most {WARM_UP_STEPS} steps, cosine down to 0",
        "loss": "class-weighted cross-entropy + soft Dice",
        "augmentation": {
            "flips": True,
            "quarter_turns": True,
            **{name: list(bounds) for name, bounds in AUGMENTATION.items()},
        },
        "validations": VALIDATIONS,
        "patience": PATIENCE,
    }


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """What a baseline's run was made with.

    Attributes:
        settings: ``BaselineSettings``, JSON types.
        dataset_sha256: Of what makes regions and labels from files.
        dataset: The card of the data set, JSON types.
        network: ``network_facts``.
        class_pixels: (num_classes,) pixels of the training part.
        class_weights: (num_classes,) of the loss.
        samples: Sample ids of "train", "val" and "held_out".
        provenance: Versions, platform, device, command.
        method: What no option changes.
    """

    settings: dict[str, Any]
    dataset_sha256: str
    dataset: dict[str, Any]
    network: dict[str, Any]
    class_pixels: tuple[int, ...]
    class_weights: tuple[float, ...]
    samples: dict[str, list[str]]
    provenance: dict[str, Any]
    method: dict[str, Any] = field(default_factory=fixed_method)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"format": FORMAT, "kind": KIND, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BaselineConfig":
        """Read what ``to_dict`` wrote; KeyError, TypeError or ValueError where it did not."""
        return cls(
            settings=dict(values["settings"]),
            dataset_sha256=str(values["dataset_sha256"]),
            dataset=dict(values["dataset"]),
            network=dict(values["network"]),
            class_pixels=tuple(int(count) for count in values["class_pixels"]),
            class_weights=tuple(float(weight) for weight in values["class_weights"]),
            samples={
                part: [str(name) for name in values["samples"][part]]
                for part in ("train", "val", "held_out")
            },
            provenance=dict(values["provenance"]),
            method=dict(values["method"]),
        )

    def differences(self, other: "BaselineConfig") -> list[tuple[str, Any, Any]]:
        """(field, mine, theirs) of what decides the numbers, first the settings, then the data."""
        pairs = [
            (name, self.settings.get(name), other.settings.get(name))
            for name in {**self.settings, **other.settings}
        ]
        pairs.append(("data set", self.dataset_sha256, other.dataset_sha256))
        pairs += [
            (f"method's {name}", self.method.get(name), other.method.get(name))
            for name in {**self.method, **other.method}
        ]
        for part in ("train", "val", "held_out"):
            if self.samples[part] != other.samples[part]:
                counts = f"{len(self.samples[part])} samples", f"{len(other.samples[part])} samples"
                if counts[0] == counts[1]:
                    counts = "other samples", "these samples"
                pairs.append((f"{part} part", *counts))
        return [pair for pair in pairs if pair[1] != pair[2]]


def weights_sha256(file: Path) -> str:
    """Of the weights that an encoder begins with.

    Raises:
        RunError: If they cannot be read.
    """
    try:
        return file_sha256(file)
    except OSError as error:
        raise RunError(
            f"--encoder-weights {file} cannot be read: {error.strerror or error}"
        ) from None


def plan_baseline(
    dataset: Dataset,
    name: str,
    *,
    split: str | None = None,
    fold: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    learning_rate: float | None = None,
    encoder_weights: Path | None = None,
    **others: Any,
) -> BaselineSettings:
    """Fill in what the data set and the network decide: split, learning rate and length.

    Args:
        others: Further fields of ``BaselineSettings``.

    Raises:
        RunError: If a setting is outside what it can be.
    """
    if steps is None and minutes is None:
        minutes = DEFAULT_MINUTES
    if split is None and fold is None:
        split = dataset.manifest.default_train
    if learning_rate is None:
        learning_rate = architecture_of(name).learning_rate
    digest = None if encoder_weights is None else weights_sha256(encoder_weights)
    return BaselineSettings(
        name=name,
        split=split,
        fold=fold,
        steps=steps,
        minutes=minutes,
        learning_rate=learning_rate,
        encoder_weights=digest,
        **others,
    )


def default_baseline_name(dataset: Dataset, settings: BaselineSettings) -> str:
    """Name of a run folder: data set, network, and each setting that is not the usual one."""
    usual = plan_baseline(dataset, settings.name).to_dict()
    chosen = settings.to_dict()
    if chosen["encoder_weights"] is not None:
        chosen["encoder_weights"] = chosen["encoder_weights"][:8]
    if chosen["minutes"] not in (None, usual["minutes"]):
        chosen["minutes"] = f"{chosen['minutes']:g}"
    return folder_name(f"{dataset.name}-{settings.name}", chosen, usual)


def read_baseline(path: Path) -> BaselineConfig:
    """Read the config of a baseline's run.

    Raises:
        RunError: If it is missing, damaged, or the run is of something else.
    """
    file = path / CONFIG_FILE
    try:
        with damage_in_one_line(file):
            values = json.loads(file.read_text(encoding="utf-8"))
            if values.get("kind") == KIND and values["format"] == FORMAT:
                return BaselineConfig.from_dict(values)
    except FileNotFoundError:
        raise RunError(f"{path} is no run folder (it has no {CONFIG_FILE})") from None
    raise RunError(f"{path} is no run of `psd baseline`; choose another --out")


def load_baseline(path: Path, config: BaselineConfig) -> tuple[nn.Module, dict[str, str]]:
    """The trained network of a run, on the CPU, and the metadata of its file.

    Raises:
        RunError: If there is none yet, or it does not fit the config.
    """
    file = path / NETWORK_FILE
    if not file.is_file():
        raise no_weights(path, NETWORK_FILE, "psd baseline")
    network = build_network(
        str(config.settings["name"]),
        len(config.class_weights),
        seed=0,
        pretrained=False,
        from_file=config.settings.get("encoder_weights") is not None,
    )
    metadata = load_weights(file, network)
    return network.requires_grad_(False).eval(), metadata
