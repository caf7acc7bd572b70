"""Everything that ``psd bench`` measures, as one dictionary and one table."""

import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pathsegdiff.device import device_name
from pathsegdiff.diffusion.bundle import load_bundle
from pathsegdiff.errors import ConfigError
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.pipeline.bench import extraction, head, reading
from pathsegdiff.pipeline.bench.measure import compute_rate, copy_rate
from pathsegdiff.pipeline.bench.regions import check_region_px, tiled_dataset
from pathsegdiff.provenance import versions


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured, and how often.

    Attributes:
        model: Name or folder of a bundle.
        samples: Regions, of the embedded images.
        region_px: Side of a region.
        batch_size: Patches per forward of ours.
        head_batch: Regions per training step.
        runs: Of each side, taking turns.
        precision: Of ours beside the plain way's float32, measured after float32 itself.
        device: Where to compute.
        memory: Whether peak memory is measured too, in processes of their own.
    """

    model: str = "tiny"
    samples: int = 8
    region_px: int = 512
    batch_size: int = 4
    head_batch: int = 1
    runs: int = 5
    precision: str = "float32"
    device: torch.device
    memory: bool = True

    def __post_init__(self) -> None:
        for option, value in (
            ("--samples", self.samples),
            ("--batch-size", self.batch_size),
            ("--head-batch", self.head_batch),
            ("--runs", self.runs),
        ):
            if value < 1:
                raise ConfigError(f"{option} must be at least 1, got {value}")
        if self.head_batch > self.samples:
            raise ConfigError(
                f"--head-batch {self.head_batch} needs as many samples, got {self.samples}"
            )
        check_region_px(self.region_px)


def run_bench(
    settings: BenchSettings, *, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measure everything; JSON types.

    Args:
        log: Called with a line before each part.
    """
    bundle = load_bundle(settings.model)
    patches = (settings.region_px // bundle.card.patch_px) ** 2
    if settings.batch_size > patches:
        # A batch never mixes regions: a larger one would be measured under a wrong name.
        raise ConfigError(
            f"--batch-size: a region has {patches} patches, got {settings.batch_size}; "
            "use a larger --region"
        )
    device = settings.device
    precisions = list(dict.fromkeys(("float32", settings.precision)))
    found: dict[str, Any] = {
        "settings": {**asdict(settings), "device": str(device)},
        "model": {"name": bundle.card.name, "channels": bundle.card.num_channels},
        "device": device_name(device),
        "processor": platform.processor() or platform.machine(),
        "versions": versions(),
    }
    with tempfile.TemporaryDirectory(prefix="psd-bench-") as temporary:
        folder = Path(temporary)
        dataset = tiled_dataset(folder / "tiles", settings.samples, settings.region_px)
        for precision in precisions:
            log(f"extraction, {precision}")
            stage_one = extraction.stage_one_of(bundle, device, precision, settings.batch_size)
            found.setdefault("extraction", {})[precision] = asdict(
                extraction.measure_extraction(dataset, bundle, stage_one, folder, settings.runs)
            )
            store = FeatureStore.open(folder / "store.zarr")
            found.setdefault("tap_differences", {})[precision] = extraction.tap_differences(
                store, folder / "plain"
            )
            if precision == "float32":
                found["bytes_per_patch"] = asdict(extraction.measure_bytes(store, folder / "plain"))
                found["multiply_adds_per_patch"] = extraction.count_multiply_adds(stage_one.model)
        log("further timesteps")
        found["three_timesteps"] = asdict(
            extraction.measure_further_timesteps(
                dataset, bundle, stage_one, folder, max(1, settings.runs // 2)
            )
        )
        store = FeatureStore.open(folder / "store.zarr")
        width = int(store.model["head_width"])
        for precision in precisions:
            log(f"head, {precision}")
            found.setdefault("head", {})[precision] = asdict(
                head.measure_head(
                    store,
                    folder / "plain",
                    device,
                    precision=precision,
                    batch_size=settings.head_batch,
                    width=width,
                    runs=settings.runs,
                )
            )
        log("reading")
        found["reading"] = asdict(reading.measure_reading(store, folder / "mapped", settings.runs))
        log("what the hardware gives")
        found["ceilings"] = {
            "multiply_adds_per_second": {p: compute_rate(device, p) for p in precisions},
            "copy_bytes_per_second": copy_rate(device),
        }
        if settings.memory:
            log("memory")
            found["peak_bytes"] = _peaks(settings, folder, width)
    return found


def _peaks(settings: BenchSettings, folder: Path, width: int) -> dict[str, int]:
    device, store = str(settings.device), str(folder / "store.zarr")
    plain = folder / "plain"
    step = (device, "float32", settings.head_batch, width)
    extracted = partial(
        extraction.peak_of_extraction,
        str(folder / "tiles" / "tiles.toml"),
        settings.model,
        device,
        settings.batch_size,
        folder,
    )
    return {
        "extraction, ours": extracted(plain=False),
        "extraction, plain": extracted(plain=True),
        "training step, ours": head.peak_of_step(store, plain, *step, True),
        "training step, plain": head.peak_of_step(store, plain, *step, False),
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: one line per comparison, ours, plain and the ratio with its range over the runs."""
    lines = [["", "plain", "ours", "times better", "runs from ... to"], ["---"] * 5]
    for precision, speed in found["extraction"].items():
        lines.append(
            [
                f"extraction, s per patch, {precision} (plain: float32)",
                f"{speed['plain']['median']:.3f}",
                f"{speed['ours']['median']:.3f}",
                *_ratio(speed["to_plain"]),
            ]
        )
        lines.append(
            [
                f"of the bare forwards, {precision}, batch {speed['batch_size']}",
                "",
                f"{speed['of_bare']['median']:.2f}",
                "",
                f"{speed['of_bare']['low']:.2f} to {speed['of_bare']['high']:.2f}",
            ]
        )
    three = found["three_timesteps"]
    lines.append(
        [
            f"three timesteps, seconds over those of one, {list(found['extraction'])[-1]}",
            "3",
            f"{three['median']:.2f}",
            f"{3 / three['median']:.2f}",
            f"{3 / three['high']:.2f} to {3 / three['low']:.2f}",
        ]
    )
    size = found["bytes_per_patch"]
    lines.append(
        [
            "features, MB per patch",
            f"{size['plain'] / 1e6:.2f}",
            f"{size['features'] / 1e6:.2f}",
            f"{size['plain'] / size['features']:.2f}",
            "",
        ]
    )
    for precision, speed in found["head"].items():
        for name, title in _HEAD_LINES:
            times = speed[name]
            lines.append(
                [
                    f"{title}, s, {precision}",
                    f"{times['plain']['median']:.3f}",
                    f"{times['ours']['median']:.3f}",
                    *_ratio(times["ratio"]),
                ]
            )
    speed = found["reading"]
    lines.append(
        [
            "reading, GB/s (plain: memory map)",
            f"{speed['memmap_bytes_per_second']['median'] / 1e9:.2f}",
            f"{speed['bytes_per_second']['median'] / 1e9:.2f}",
            *_ratio(speed["of_memmap"]),
        ]
    )
    lines.append(
        ["reading the finest tap alone, share of the time", "", f"{speed['one_tap_share']:.3f}"]
        + [""] * 2
    )
    peaks = found.get("peak_bytes", {})
    for what in ("extraction", "training step"):
        if peaks:
            plain, ours = (peaks[f"{what}, {side}"] for side in ("plain", "ours"))
            lines.append(
                [
                    f"peak memory of the process, {what}, GB",
                    f"{plain / 1e9:.2f}",
                    f"{ours / 1e9:.2f}",
                    f"{plain / ours:.2f}",
                    "",
                ]
            )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def facts(found: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know, a line each."""
    model, settings = found["model"], found["settings"]
    lines = [
        f"{model['name']}, {model['channels']} channels; {settings['samples']} regions of "
        f"{settings['region_px']} px; {found['device']}, {found['processor']}; "
        f"medians of {settings['runs']} runs, the sides taking turns"
    ]
    needed = found["multiply_adds_per_patch"]
    for precision, rate in found["ceilings"]["multiply_adds_per_second"].items():
        seconds = found["extraction"][precision]["bare"]["median"]
        lines.append(
            f"{precision}: a patch is {needed / 1e9:.3g} billion multiply-adds, a large matrix "
            f"product or convolution runs {rate / 1e9:.4g} billion a second; so "
            f"{needed / rate:.3g} s at best, the bare forwards take {seconds:.3g} s"
        )
    for precision, errors in found["tap_differences"].items():
        worst = max(errors, key=errors.__getitem__)
        lines.append(
            f"{precision}: features differ from the plain ones by {min(errors.values()):.1e} to "
            f"{errors[worst]:.1e} ({worst}; norms, stored as float16)"
        )
    first = found["head"]["float32"]
    lines.append(
        f"the head's outputs differ by {first['output_difference']:.1e}, its first gradient by "
        f"{first['gradient_difference']:.1e} (of the largest value, float32)"
    )
    return lines


def _ratio(values: dict[str, float]) -> list[str]:
    return [f"{values['median']:.2f}", f"{values['low']:.2f} to {values['high']:.2f}"]


_HEAD_LINES = (
    ("first_layer", "head's first layer, forward and gradient"),
    ("step", "head's step"),
    ("step_with_reading", "four steps with reading"),
)
