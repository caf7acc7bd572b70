"""Small feature stores for tests, written by the real writer."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from pathsegdiff.config import ALL_TAPS, Recipe
from pathsegdiff.data.labels import LabelClass, LabelScheme
from pathsegdiff.data.regions import RegionRule
from pathsegdiff.features.layout import TapSpec, plan_levels
from pathsegdiff.features.store import DatasetCard, FeatureStore, StoredSample
from pathsegdiff.features.writer import SampleArrays, StoreWriter

#: Channels and strides in the proportions of the paper's taps.
TAPS = tuple(
    TapSpec(name=name, channels=channels, stride=stride)
    for name, channels, stride in zip(
        ALL_TAPS,
        (8, 8, 8, 8, 6, 6, 6, 4, 4, 4, 2, 2, 2),
        (32, 32, 32, 16, 16, 16, 8, 8, 8, 4, 4, 4, 4),
        strict=True,
    )
)
GLANDS = LabelScheme(
    classes=(
        LabelClass(name="background", colour=(240, 240, 240), codes=(0,)),
        LabelClass(name="gland", colour=(0, 114, 178), codes="positive"),
    ),
    dont_care=None,
    objects="gland",
)
TISSUE = LabelScheme(
    classes=(
        LabelClass(name="tumor", colour=(213, 94, 0), codes=(1,)),
        LabelClass(name="stroma", colour=(0, 158, 115), codes=(2,)),
        LabelClass(name="other", colour=(86, 180, 233), codes=(5,)),
    ),
    dont_care=LabelClass(name="dont_care", colour=(128, 128, 128), codes=(0,)),
    objects=None,
)


def make_card(scheme: LabelScheme, region_px: int, patch_px: int) -> DatasetCard:
    """A data set with the splits train and test."""
    return DatasetCard(
        name="shapes",
        title="Shapes",
        licence="CC0",
        scheme=scheme,
        rule=RegionRule(kind="resize", region_px=region_px, patch_px=patch_px),
        splits=("train", "test"),
        default_train="train",
        default_eval="test",
        grouped=True,
        source_mpp=0.5,
        typical_source_px=(region_px * 3 // 4, region_px),
        largest_source_px=(region_px * 3 // 4, region_px),
    )


def make_label(rng: np.random.Generator, scheme: LabelScheme, region_px: int) -> np.ndarray:
    """(H, W) uint8: discs of the other classes on class 0, a don't-care strip if any."""
    label = np.zeros((region_px, region_px), np.uint8)
    rows, columns = np.mgrid[:region_px, :region_px]
    for class_id in range(1, scheme.num_classes):
        row, column = rng.uniform(0.25, 0.75, 2) * region_px
        radius = rng.uniform(0.15, 0.3) * region_px
        label[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = class_id
    if scheme.dont_care_id is not None:
        label[:, : region_px // 8] = scheme.dont_care_id
    return label


def make_arrays(
    rng: np.random.Generator,
    label: np.ndarray,
    scheme: LabelScheme,
    taps: Sequence[TapSpec],
    patch_px: int,
    layout: str = "levels",
) -> SampleArrays:
    """Features that tell the classes apart, with noise, and what else a sample holds."""
    levels = {}
    for level in plan_levels(taps, patch_px, layout):
        coarse = label[level.stride // 2 :: level.stride, level.stride // 2 :: level.stride]
        signal = (coarse[None] * (1 + np.arange(level.channels))[:, None, None]) % 3 - 1.0
        levels[level.name] = (signal + rng.normal(0, 0.3, signal.shape)).astype(np.float32)
    side = len(label) // patch_px
    colours = np.array(
        [*scheme.colours, *[(128, 128, 128)] * (256 - len(scheme.colours))], np.uint8
    )
    instances = None
    if scheme.objects is not None:
        instances = (label == 1).astype(np.int32)[: len(label) * 3 // 4]
    return SampleArrays(
        levels=levels,
        label=label,
        image=colours[label],
        embedding=rng.normal(size=(side * side, 5)).astype(np.float32),
        instances=instances,
        image_sha256="0" * 64,
        mask_sha256="1" * 64,
    )


def open_writer(
    path: Path,
    *,
    scheme: LabelScheme = GLANDS,
    tap_specs: Sequence[TapSpec] = TAPS,
    region_px: int = 64,
    patch_px: int = 32,
    layout: str = "levels",
    **recipe: object,
) -> nullcontext[StoreWriter]:
    """Create or continue a small store; use it in a ``with``."""
    settings: dict[str, object] = {
        "model_sha256": "a" * 64,
        "dataset_sha256": "b" * 64,
        "taps": tuple(tap.name for tap in tap_specs),
        "layout": layout,
    }
    writer = StoreWriter.open(
        path,
        recipe=Recipe(**{**settings, **recipe}),  # type: ignore[arg-type]
        card=make_card(scheme, region_px, patch_px),
        model={
            "name": "shapes-model",
            "sha256": "a" * 64,
            "trained": False,
            "head_width": 16,
            "embed_dim": 5,
            "patch_px": patch_px,
        },
        levels=plan_levels(tap_specs, patch_px, layout),
        tokens=None,
        provenance={"command": "psd extract --dataset shapes", "created": "then", "device": "cpu"},
    )
    return nullcontext(writer)


def make_samples(train: int, test: int) -> list[StoredSample]:
    """Two samples to a group; ``fold`` 1 and 2 in turn over the groups."""
    rows = [("train", number) for number in range(train)]
    rows += [("test", number) for number in range(test)]
    return [
        StoredSample(
            sample_id=f"{split}_{number}",
            index=-1,
            split=split,
            group=f"{split}-{number // 2}",
            source_px=(48, 64),
            extra={"fold": str(1 + number // 2 % 2)},
        )
        for split, number in rows
    ]


def build_store(
    path: Path, *, train: int = 6, test: int = 3, seed: int = 0, **settings: object
) -> FeatureStore:
    """A complete store with ``train`` and ``test`` samples of discs; see ``open_writer``."""
    rng = np.random.default_rng(seed)
    scheme = settings.get("scheme", GLANDS)
    assert isinstance(scheme, LabelScheme)
    taps = settings.get("tap_specs", TAPS)
    with open_writer(path, **settings) as writer:  # type: ignore[arg-type]
        card = writer.store.card
        for sample in writer.register(make_samples(train, test)):
            label = make_label(rng, scheme, card.rule.region_px)
            writer.write(
                sample,
                make_arrays(
                    rng,
                    label,
                    scheme,
                    taps,
                    card.rule.patch_px,
                    writer.store.recipe.layout,  # type: ignore[arg-type]
                ),
            )
    return FeatureStore.open(path)
