"""A trial: a pyramid head on augmented copies, beside what train-head has now. Not part of `psd`.

    python benchmarks/pyramid_trial.py copies --data-root GLAS --out copies --number 4
    psd extract --dataset copies/copies.toml --data-root copies/data --tokens --out copies.zarr
    python benchmarks/pyramid_trial.py train --features copies.zarr --fold 0 --copies

``copies`` writes each training image of GlaS as it is (split "train") and augmented as the U-Nets
of `psd baseline` see it (split "copies"). ``train`` holds out a patient fold. Its head: on every
level a 1 x 1 convolution, then from coarse to fine twice up, add, two 3 x 3 convolutions (a feature
pyramid, Lin et al. 2017, https://arxiv.org/abs/1612.03144); on whole regions with quarter turns,
noise on the features, channel dropout, cross-entropy and soft Dice. It prints the mIoU of the
held-out fold.
"""

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.device import autocast, keep_freed_memory
from pathsegdiff.evaluation.confusion import confusion_matrix, scores
from pathsegdiff.features.store import FeatureStore, StoredSample
from pathsegdiff.pipeline.baselines.images import augment, to_tensor
from pathsegdiff.segmentation.losses import (
    class_weights,
    predict_labels,
    soft_dice_loss,
    soft_dice_sums,
    weighted_cross_entropy,
)

CPU = torch.device("cpu")
BATCH, WIDTH, WARM_UP = 4, 64, 20
NOISE, DROPOUT, WEIGHT_DECAY = 0.5, 0.3, 0.01


def main() -> None:
    """Make the copies, or train and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("copies")
    making.add_argument("--data-root", type=Path, required=True)
    making.add_argument("--number", type=int, default=4, help="of each image, itself included")
    making.add_argument("--out", type=Path, required=True)
    training = commands.add_parser("train")
    training.add_argument("--features", type=Path, required=True)
    training.add_argument("--fold", required=True)
    training.add_argument("--copies", action="store_true", help="train on them too")
    training.add_argument("--steps", type=int, default=150)
    training.add_argument("--lr", type=float, default=1e-3)
    training.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_freed_memory()
    if options.command == "copies":
        make_copies(options.data_root, options.number, options.out)
    else:
        train(options)


def make_copies(data_root: Path, number: int, out: Path) -> None:
    """Write images, masks and a manifest."""
    dataset = open_dataset("glas", data_root=data_root, splits=["train"])
    (out / "data").mkdir(parents=True)
    rows = []
    for place, sample in enumerate(dataset.samples):
        region = dataset.read(sample)
        for copy in range(number):
            image, label = to_tensor(region.image), torch.from_numpy(region.label)
            if copy:
                image, label = augment(image, label, np.random.default_rng((0, place, copy)))
            name = f"{sample.sample_id}_c{copy}"
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(out / "data" / f"{name}.png", compress_level=1)
            Image.fromarray(label.numpy()).save(out / "data" / f"{name}_anno.png")
            rows.append(
                {
                    "sample_id": name,
                    "image": f"{name}.png",
                    "mask": f"{name}_anno.png",
                    "split": "copies" if copy else "train",
                    "group": sample.group,
                    "patient_fold": sample.source.extra["patient_fold"],
                }
            )
    with (out / "copies.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = (Path(__file__).parents[1] / "data_manifests" / "glas.toml").read_text(encoding="utf-8")
    for old, new in (
        ('name = "glas"', 'name = "copies"'),
        ('splits = ["train", "testA", "testB"]', 'splits = ["train", "copies"]'),
        ('default_eval = "testB"', 'default_eval = "train"'),
        ('objects = "gland"  # one integer per gland\n', ""),
    ):
        assert old in text
        text = text.replace(old, new)
    (out / "copies.toml").write_text(text, encoding="utf-8")


class Pyramid(nn.Module):
    """Levels of features, finest first, to logits at stride 1.

    Args:
        levels: (stride, channels, mean, standard deviation) of each; strides may repeat.
        num_classes: K.
    """

    def __init__(self, levels: Sequence[tuple[int, int, Tensor, Tensor]], num_classes: int) -> None:
        super().__init__()
        self.levels = list(levels)
        self.strides = sorted({stride for stride, *_ in levels}, reverse=True)
        self.lateral = nn.ModuleList([_block(channels, 1) for _, channels, _, _ in levels])
        self.refine = nn.ModuleList(
            [nn.Sequential(_block(WIDTH, 3), _block(WIDTH, 3)) for _ in self.strides]
        )
        self.dropout = nn.Dropout2d(DROPOUT)
        self.up = nn.Sequential(_block(WIDTH, 3))
        self.classify = nn.Conv2d(WIDTH, num_classes, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, C, h, w) of each level to (B, K, H, W)."""
        hidden: Tensor | None = None
        for stride, refine in zip(self.strides, self.refine, strict=True):
            here: Tensor | None = None
            for (own, _, mean, std), lateral, values in zip(
                self.levels, self.lateral, features, strict=True
            ):
                if own != stride:
                    continue
                normal = (values - mean[:, None, None]) / std[:, None, None]
                if self.training:
                    normal = normal + NOISE * torch.randn_like(normal)
                here = lateral(normal) if here is None else here + lateral(normal)
            assert here is not None
            hidden = here if hidden is None else _twice(hidden) + here
            hidden = refine(hidden)
        assert hidden is not None
        logits = self.classify(self.up(_twice(self.dropout(hidden))))
        scale = self.strides[-1] // 2
        return F.interpolate(logits, scale_factor=scale, mode="bilinear")


def _block(channels: int, kernel: int) -> nn.Module:
    convolution = nn.Conv2d(channels, WIDTH, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))


def _twice(values: Tensor) -> Tensor:
    return F.interpolate(values, scale_factor=2, mode="bilinear")


def train(options: argparse.Namespace) -> None:
    """Train on the other folds, score the held-out one."""
    store = FeatureStore.open(options.features)
    levels = sorted(store.head_levels, key=lambda level: level.stride)
    used = [s for s in store.samples() if s.split == "train" or options.copies]
    fold = options.fold
    chosen = [sample for sample in used if sample.extra["patient_fold"] != fold]
    held_out = [s for s in used if s.split == "train" and s.extra["patient_fold"] == fold]
    cache = {s.index: ([store.read_level(s, level.name) for level in levels], store.label(s))
             for s in (*chosen, *held_out)}  # fmt: skip
    num_classes = store.card.scheme.num_classes
    torch.manual_seed(options.seed)
    described = []
    for number, level in enumerate(levels):
        maps = [cache[s.index][0][number].astype(np.float32) for s in chosen]
        mean = np.mean([values.mean((1, 2)) for values in maps], axis=0)
        square = np.mean([(values**2).mean((1, 2)) for values in maps], axis=0)
        std = np.sqrt(np.maximum(square - mean**2, 1e-12))
        described.append(
            (level.stride, level.channels, torch.from_numpy(mean), torch.from_numpy(std))
        )
    network = Pyramid(described, num_classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=WEIGHT_DECAY)
    counts = sum(np.bincount(cache[s.index][1].ravel(), minlength=256) for s in chosen)
    weights = torch.from_numpy(class_weights(np.asarray(counts)[:num_classes], num_classes))
    for step in range(options.steps):
        rate = min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        features, labels = batch_of(chosen, cache, step, options.seed)
        network.train()
        with autocast(CPU, "bfloat16"):
            logits = network(features)
        dice = soft_dice_loss(soft_dice_sums(logits, labels, num_classes))
        loss = weighted_cross_entropy(logits, labels, weights) + dice
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    confusion = np.zeros((num_classes, num_classes), np.int64)
    with torch.no_grad():
        for sample in held_out:
            maps, label = cache[sample.index]
            logits = network([torch.from_numpy(values)[None].float() for values in maps])
            predicted = predict_labels(logits, num_classes)[0].numpy()
            confusion += confusion_matrix(label, predicted, num_classes)
    print(f"fold {fold}, {len(chosen)} regions train: mIoU {scores(confusion).miou:.4f}")


def batch_of(
    samples: Sequence[StoredSample],
    cache: dict[int, tuple[list[np.ndarray], np.ndarray]],
    step: int,
    seed: int,
) -> tuple[list[Tensor], Tensor]:
    """Whole regions, turned and mirrored, each once per epoch."""
    rng = np.random.default_rng((seed, step))
    maps, labels = [], []
    for number in range(BATCH):
        epoch, place = divmod(step * BATCH + number, len(samples))
        order = np.random.default_rng((seed, 7, epoch)).permutation(len(samples))
        features, label = cache[samples[int(order[place])].index]
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))

        def turned(values: np.ndarray, turns: int = turns, mirror: bool = mirror) -> np.ndarray:
            values = np.rot90(values, turns, (-2, -1))
            return np.ascontiguousarray(values[..., ::-1] if mirror else values)

        maps.append([turned(values) for values in features])
        labels.append(turned(label))
    stacked = [np.stack(level) for level in zip(*maps, strict=True)]
    return [torch.from_numpy(level).float() for level in stacked], torch.from_numpy(
        np.stack(labels)
    )


if __name__ == "__main__":
    main()
