"""The folder of a run: what a training leaves and what evaluation and prediction read.

RUN/config.json        every setting, the samples of each part, the store's recipe, provenance
    head.safetensors   the head that was best on validation, or the last (--keep)
    checkpoint.pt      where to continue; gone once the training has finished
    log.csv            one row per validation;   curves.png  the same, drawn
    result.json        written last: the training has finished
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from pathsegdiff.config import Recipe
from pathsegdiff.errors import MALFORMED, PathSegDiffError, RunError
from pathsegdiff.features.store import DatasetCard, FeatureStore
from pathsegdiff.files import replace_file
from pathsegdiff.segmentation.head import FCNHead, HeadLevel

CONFIG_FILE = "config.json"
HEAD_FILE = "head.safetensors"
CHECKPOINT_FILE = "checkpoint.pt"
LOG_FILE = "log.csv"
CURVES_FILE = "curves.png"
RESULT_FILE = "result.json"
FORMAT = 1
_MAX_JSON_BYTES = 1 << 26
#: A head that its file falls short of by less is made all the same, to name the tensor.
_MOST_SURPLUS = 1 << 26
RANDOM_WEIGHTS = (
    "random weights: the model {name} was never trained, so these numbers are a floor, no result"
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run was made with.

    Attributes:
        settings: Of the training (``TrainSettings``), JSON types.
        store_path: Where the features lay.
        recipe: Of the features.
        card: The data set.
        model: name, sha256, trained, head_width, embed_dim and patch_px of the bundle.
        levels: What the head reads.
        num_outputs: K, one more than the classes where the data set has a don't-care class.
        head_width: W.
        class_pixels: (num_classes,) pixels of the training part.
        class_weights: (num_outputs,) of the loss.
        samples: Sample ids of "train", "val" and "held_out".
        notes: What a reader of any number of this run has to know.
        provenance: Versions, platform, device, command, and the store's own provenance.
    """

    settings: dict[str, Any]
    store_path: str
    recipe: Recipe
    card: DatasetCard
    model: dict[str, Any]
    levels: tuple[HeadLevel, ...]
    num_outputs: int
    head_width: int
    class_pixels: tuple[int, ...]
    class_weights: tuple[float, ...]
    samples: dict[str, list[str]]
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        channels = sum(level.channels for level in self.levels)
        return {
            "format": FORMAT,
            "settings": self.settings,
            "features": {
                "path": self.store_path,
                "fingerprint": self.recipe.fingerprint(),
                "recipe": self.recipe.to_dict(),
            },
            "dataset": self.card.to_dict(),
            "model": self.model,
            "head": {
                "levels": [level.to_dict() for level in self.levels],
                "channels": channels,
                "num_outputs": self.num_outputs,
                "width": self.head_width,
                "parameters": head_parameters(channels, self.num_outputs, self.head_width),
            },
            "class_pixels": list(self.class_pixels),
            "class_weights": list(self.class_weights),
            "samples": self.samples,
            "notes": list(self.notes),
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """Read what ``to_dict`` wrote.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, PathSegDiffError: If it is something
                else.
        """
        features, head = values["features"], values["head"]
        config = cls(
            settings=dict(values["settings"]),
            store_path=str(features["path"]),
            recipe=Recipe.from_dict(features["recipe"]),
            card=DatasetCard.from_dict(values["dataset"]),
            model=dict(values["model"]),
            levels=tuple(HeadLevel.from_dict(level) for level in head["levels"]),
            num_outputs=int(head["num_outputs"]),
            head_width=int(head["width"]),
            class_pixels=tuple(int(count) for count in values["class_pixels"]),
            class_weights=tuple(float(weight) for weight in values["class_weights"]),
            samples={
                part: [str(name) for name in values["samples"][part]]
                for part in ("train", "val", "held_out")
            },
            notes=tuple(str(note) for note in values["notes"]),
            provenance=dict(values["provenance"]),
        )
        if features["fingerprint"] != config.recipe.fingerprint():
            raise ValueError("its recipe does not match its fingerprint")
        for name in ("name", "sha256", "patch_px"):
            config.model[name]  # evaluation and prediction rely on them
        if not str(config.model["name"]).isprintable():
            raise ValueError(f"the model's name is {config.model['name']!r:.60}")
        return config

    def differences(self, other: "RunConfig") -> list[tuple[str, Any, Any]]:
        """(field, mine, theirs) of what decides the numbers, first the settings, then the data."""
        pairs = [
            (name, self.settings.get(name), other.settings.get(name))
            for name in sorted(set(self.settings) | set(other.settings))
        ]
        mine, theirs = self.recipe.to_dict(), other.recipe.to_dict()
        pairs += [(f"features' {name}", mine[name], theirs[name]) for name in mine]
        for part in ("train", "val", "held_out"):
            counts = f"{len(self.samples[part])} samples", f"{len(other.samples[part])} samples"
            if self.samples[part] != other.samples[part]:
                pairs.append((f"{part} part", *counts))
                if counts[0] == counts[1]:
                    pairs[-1] = (f"{part} part", "other samples", "these samples")
        return [pair for pair in pairs if pair[1] != pair[2]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained head and what it was trained with.

    Attributes:
        path: The folder.
        config: Of the run.
        head: On its device, in evaluation mode.
        metadata: Of the head file: the step, epoch and validation score that were kept.
    """

    path: Path
    config: RunConfig
    head: FCNHead
    metadata: dict[str, str]

    @property
    def num_classes(self) -> int:
        """Without don't care."""
        return self.config.card.scheme.num_classes

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.head.feature_mean.device


def build_head(config: RunConfig) -> FCNHead:
    """A head of the run's shape, with PyTorch's default initialisation."""
    return FCNHead(config.levels, config.num_outputs, config.head_width)


def head_parameters(channels: int, num_outputs: int, width: int) -> int:
    """Parameters of a head: 17,470,150 at 7296 channels, 6 outputs and width 256."""
    half, quarter = width // 2, width // 4
    convolutions = (
        (channels * 9 + 1) * width
        + (width * 16 + 1) * half
        + (half * 16 + 1) * quarter
        + (quarter * 9 + 1) * num_outputs
    )
    return convolutions + 2 * (width + half + quarter)


def random_weights_note(model: dict[str, Any]) -> tuple[str, ...]:
    """One note where the model was never trained, else none."""
    return () if model.get("trained") else (RANDOM_WEIGHTS.format(name=model.get("name", "?")),)


def read_config(path: Path) -> RunConfig:
    """Read the config of a run folder.

    Raises:
        RunError: If it is missing or is not one.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        raise RunError(f"{path} is no run folder (it has no {CONFIG_FILE}); see `psd train-head`")
    with damage_in_one_line(file):
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError("it is larger than a config can be")
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        if values.get("kind") != "baseline":
            return RunConfig.from_dict(values)
    raise RunError(f"{path} is a run of `psd baseline`, not of `psd train-head`; choose another")


@contextmanager
def damage_in_one_line(file: Path) -> Iterator[None]:
    """Say of a JSON file of a run that it is damaged, where reading it inside the block fails.

    Raises:
        RunError: Then.
    """
    try:
        yield
    except (*MALFORMED, PathSegDiffError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(
            f"{file} is damaged ({reason:.300}); train again into another --out"
        ) from None


def load_run(path: str | Path, device: str | torch.device = "cpu") -> Run:
    """Load the trained head of a run.

    Raises:
        RunError: If the folder is no run, has no head yet, or the head does not fit its config.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"there is no run {path}; train one with `psd train-head --out {path}`")
    config = read_config(path)
    file = path / HEAD_FILE
    if not file.is_file():
        raise no_weights(path, HEAD_FILE, "psd train-head")
    channels = sum(level.channels for level in config.levels)
    size = 4 * head_parameters(channels, config.num_outputs, config.head_width)
    if size > file.stat().st_size + _MOST_SURPLUS:  # before a head of any size is made
        raise RunError(
            f"{file} does not fit its config, which describes a head of {size} bytes; train again"
        )
    try:
        head = build_head(config)
    except (ValueError, RuntimeError, IndexError) as error:
        raise RunError(f"{path / CONFIG_FILE} describes no head: {error}") from None
    metadata = load_weights(file, head)
    head.requires_grad_(False).eval().to(device)
    return Run(path=path, config=config, head=head, metadata=metadata)


def check_fits(run: Run, store: FeatureStore) -> None:
    """Refuse features that the head was not trained on. A store with more samples is fine.

    Raises:
        RunError: Naming the first field that differs, both values and the remedy.
    """
    mine, theirs = run.config.recipe.to_dict(), store.recipe.to_dict()
    differing = run.config.recipe.differences(store.recipe)
    if differing:
        field_name = differing[0]
        rest = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
        raise RunError(
            f"{run.path} was trained on features with {field_name} {_short(mine[field_name])}, "
            f"{store.path} has {_short(theirs[field_name])}{rest}; use the store that it was "
            f"trained on ({run.config.store_path}), or train on this one"
        )
    if run.config.card.scheme.meaning() != store.card.scheme.meaning():
        raise RunError(f"{run.path} was trained on other classes than {store.path} holds")
    stored = {
        tap.name: (level.name, tap.stop - tap.start)
        for level in store.head_levels
        for tap in level.taps
    }
    for level in run.config.levels:
        for tap, channels in level.taps:
            if stored.get(tap) != (level.name, channels):
                raise RunError(
                    f"the head of {run.path} reads {channels} channels of {tap} at {level.name}, "
                    f"{store.path} has {stored.get(tap, 'none')}; extract again"
                )


def newest_run(runs: Path) -> Path:
    """The run under a folder whose head was written last.

    Raises:
        RunError: If there is none.
    """
    heads = [file for file in runs.glob(f"*/{HEAD_FILE}") if (file.parent / CONFIG_FILE).is_file()]
    if not heads:
        raise RunError(
            f"no trained run under {runs}/; train one with `psd train-head`, or use --run"
        )
    return max(heads, key=lambda file: (file.stat().st_mtime_ns, file.parent.name)).parent


def newest_store(features: Path) -> Path:
    """The complete feature store under a folder that was written last.

    Raises:
        RunError: If there is none.
    """
    complete: list[Path] = []
    incomplete: list[Path] = []
    for path in sorted(features.glob("*/zarr.json")):
        try:
            store = FeatureStore.open(path.parent)
            planned = store.registered()
        except PathSegDiffError:
            continue  # some other Zarr group
        done = bool(planned) and all(store.is_complete(sample) for sample in planned)
        (complete if done else incomplete).append(path.parent)
    if not complete:
        remedy = "make one with `psd extract`, or name one with --features"
        if incomplete:
            remedy = f"finish {incomplete[0]} with `psd extract`, or name it with --features"
        raise RunError(f"no complete feature store under {features}/; {remedy}")
    return max(complete, key=lambda path: ((path / "marks").stat().st_mtime_ns, path.name))


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def load_weights(file: Path, network: nn.Module) -> dict[str, str]:
    """Load a file of ``save_weights`` into a network of its shape; returns the metadata.

    Raises:
        RunError: If it is damaged, or holds other tensors or values that are not finite.
    """
    tensors, metadata = _read_tensors(file)
    expected = network.state_dict()
    odd = sorted(set(expected) ^ set(tensors))
    if odd:
        raise RunError(f"{file} does not fit its config: tensor {odd[0]} is missing or surplus")
    for name, value in expected.items():
        if tensors[name].shape != value.shape or tensors[name].dtype != value.dtype:
            raise RunError(
                f"{file} does not fit its config: {name} has shape {tuple(tensors[name].shape)} "
                f"and {tensors[name].dtype}, expected {tuple(value.shape)} and {value.dtype}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise RunError(f"{file}: {name} holds values that are not finite; train again")
    network.load_state_dict(tensors)
    return metadata


def save_weights(path: Path, network: nn.Module, metadata: dict[str, str]) -> None:
    """Write a network's tensors as safetensors, whole or not at all."""
    state = network.state_dict()
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    content = save(tensors, {"format": "pt", **metadata})
    replace_file(path, lambda file: file.write_bytes(content))


def kept_row(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The log's row that stands in the metadata of a file of ``save_weights``."""
    found: dict[str, Any] = {}
    for name, text in metadata.items():
        try:
            found[name] = json.loads(text)
        except ValueError:  # safetensors' own keys are no numbers
            continue
    return found


def no_weights(path: Path, file: str, command: str) -> RunError:
    """The error of a run without weights: in training still, or unpacked from a table's records."""
    if (path / RESULT_FILE).exists():
        return RunError(
            f"{path} has finished, but its {file} is not there (a table's records hold no "
            f"weights); train it again into another --out with `{command}`"
        )
    return RunError(f"{path} has no {file} yet; continue it with `{command}`")


def scored_step(metrics: Mapping[str, Any]) -> float:
    """Step of the weights that metrics.json was computed with.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: If it does not say.
    """
    made = metrics["provenance"]
    return float((made.get("head") or made["network"])["kept"]["step"])


def _read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{file} is damaged ({error}); train again") from None


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    text = str(value)
    return text[:12] if len(text) == 64 else text
