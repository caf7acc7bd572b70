"""A small trained run for tests of evaluation and prediction."""

from pathlib import Path

import torch

from pathsegdiff.features.store import FeatureStore
from pathsegdiff.segmentation.loop import TrainResult
from pathsegdiff.segmentation.train import plan_settings, train_head


def train_small(store: FeatureStore, out: Path, **settings: object) -> TrainResult:
    """Train a head of width 8 on a small store, on one thread."""
    usual: dict[str, object] = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "head_width": 8}
    progress = settings.pop("progress", None)
    if "epochs" in settings:
        usual.pop("steps")
    planned = plan_settings(store, **{**usual, **settings})  # type: ignore[arg-type]
    return train_head(store, out, planned, progress=progress)  # type: ignore[arg-type]


def state(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a head file."""
    from safetensors.torch import load_file

    return load_file(path / "head.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two heads are equal to the last bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
