"""``psd bench``: both ways compute the same, and every line of the table has its numbers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli.main import run
from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.device import computing_on, has_arithmetic
from pathsegdiff.diffusion.bundle import load_bundle
from pathsegdiff.errors import ConfigError
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.pipeline.bench import extraction
from pathsegdiff.pipeline.bench.bench import BenchSettings, facts, run_bench, table
from pathsegdiff.pipeline.bench.measure import (
    Spread,
    compute_rate,
    copy_rate,
    in_turns,
    peak_bytes,
    ratio,
)
from pathsegdiff.pipeline.bench.regions import tiled_dataset

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "micro"
    assert run(["models", "init", "--preset", "micro", "--out", str(path)]) == 0
    return path


def hold(megabytes):
    values = np.ones(megabytes << 20, np.uint8)
    assert values[-1] == 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_part_is_measured(micro, precision):
    if not has_arithmetic(precision):
        pytest.skip(f"{precision} is emulated here, which takes minutes")
    settings = BenchSettings(
        model=str(micro), samples=2, runs=2, precision=precision, device=CPU, memory=False
    )
    said = []
    # With two threads rounding moves an activation across 0, which its gradient shows whole.
    with computing_on(1):
        found = run_bench(settings, log=said.append)
    assert said[0] == "extraction, float32"
    assert set(found["extraction"]) == set(found["head"]) == {"float32", precision}
    assert found["extraction"]["float32"]["patches"] == 8
    assert found["multiply_adds_per_patch"] > 1e6
    # The same features both ways: what is left is rounding to float16, before or after.
    errors = found["tap_differences"]
    assert set(errors["float32"]) == {tap.name for tap in load_bundle(micro).card.taps}
    assert max(errors["float32"].values()) < 1e-3
    if precision == "bfloat16":
        assert 1e-3 < max(errors["bfloat16"].values()) < 0.2
    assert found["head"]["float32"]["output_difference"] < 1e-4
    assert found["head"]["float32"]["gradient_difference"] < 1e-4
    size = found["bytes_per_patch"]
    specs = load_bundle(micro).card.taps
    assert size["plain"] == pytest.approx(sum(tap.channels for tap in specs) * 64**2 * 2, rel=0.01)
    values = sum(tap.channels * (256 // tap.stride) ** 2 for tap in specs)
    assert size["features"] == pytest.approx(values * 2, rel=0.02)
    for name in ("first_layer", "step", "step_with_reading"):
        times = found["head"]["float32"][name]
        assert times["ratio"]["low"] <= times["ratio"]["median"] <= times["ratio"]["high"]
    text = table(found)
    assert f"extraction, s per patch, {precision}" in text
    assert "peak memory" not in text
    assert len({line.count("|") for line in text.splitlines()}) == 1
    assert any("multiply-adds" in line for line in facts(found))
    assert json.loads(json.dumps(found)) == found


def test_the_command_writes_every_figure(micro, tmp_path, capsys):
    file = tmp_path / "bench.json"
    options = ["--model", str(micro), "--samples", "1", "--runs", "1", "--precision", "float32"]
    plot = tmp_path / "bench.png"
    assert run(["bench", *options, "--json", str(file), "--plot", str(plot)]) == 0
    with Image.open(plot) as picture:
        assert picture.size[0] > 500
    said = capsys.readouterr().out
    assert re.search(r"peak memory of the process, training step, GB \| \d\.\d\d \| \d\.\d\d", said)
    peaks = json.loads(file.read_text())["peak_bytes"]
    assert len(peaks) == 4
    assert all(1e8 < value < 4e9 for value in peaks.values())


def test_the_plain_way_takes_its_hooks_off(micro, tmp_path):
    dataset = open_dataset("demo")
    dataset.samples = dataset.samples[:1]
    stage_one = extraction.stage_one_of(load_bundle(micro), CPU, "float32", 2)
    extraction.extract_plain(dataset, stage_one, tmp_path / "plain")
    assert not any(module._forward_hooks for module in stage_one.model.unet.modules())
    (file,) = (tmp_path / "plain").iterdir()
    stack = np.load(file, mmap_mode="r")
    assert stack.dtype == np.float16
    assert stack.shape[1:] == (128, 128)
    extraction.extract_ours(dataset, load_bundle(micro), stage_one, tmp_path / "ours.zarr")
    assert (
        stack.shape
        == FeatureStore.open(tmp_path / "ours.zarr")
        .dense(FeatureStore.open(tmp_path / "ours.zarr").samples()[0])
        .shape
    )


def test_the_first_run_of_each_side_does_not_count():
    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = in_turns(sides, 2, CPU)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == Spread(median=3.0, low=2.0, high=4.0)


def test_peak_memory_is_that_of_the_process_alone():
    held = np.ones(300 << 20, np.uint8)  # ours, not the other process's
    small, large = peak_bytes(hold, 1), peak_bytes(hold, 200)
    assert held[-1] == 1
    assert 150 << 20 < large - small < 250 << 20


def test_what_the_hardware_gives_is_a_rate():
    assert compute_rate(CPU, "float32") > 1e8
    assert copy_rate(CPU) > 1e7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "--samples must be at least 1"),
        ({"runs": 0}, "--runs must be at least 1"),
        ({"region_px": 300}, "--region must be a multiple of 256 px, got 300"),
        ({"samples": 2, "head_batch": 3}, "--head-batch 3 needs as many samples, got 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        BenchSettings(device=CPU, **settings)


def test_a_batch_that_no_region_fills_is_refused(micro):
    settings = BenchSettings(model=str(micro), batch_size=16, device=CPU)
    with pytest.raises(ConfigError, match="a region has 4 patches, got 16"):
        run_bench(settings)


def test_regions_of_any_size_are_made_of_the_embedded_images(tmp_path):
    dataset = tiled_dataset(tmp_path / "tiles", 2, 768)
    first, second = (dataset.read(sample).image for sample in dataset.samples)
    assert first.shape == second.shape == (768, 768, 3)
    demo = open_dataset("demo")
    assert np.array_equal(first[:512, :512], demo.read(demo.samples[0]).image)
    assert np.array_equal(first[:512, 512:], demo.read(demo.samples[1]).image[:, :256])
    assert np.array_equal(second[:512, :512], demo.read(demo.samples[4]).image)


def test_the_gpu_script_ends_with_every_part_and_stops_when_its_time_is_up(tmp_path):
    file = tmp_path / "gpu.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu"]
    small = ["--preset", "micro", "--batches", "2", "--head-batches", "1", "--samples", "2"]
    small += ["--region", "512"]
    subprocess.run([*script, *small, "--runs", "1", "--json", str(file)], check=True, cwd=tmp_path)
    found = json.loads(file.read_text())
    assert found["finished"]
    parts = ["ceilings", "forwards, batch 2", "extraction, batch 2", "head, batch 1"]
    assert list(found["parts"]) == parts
    forwards = found["parts"]["forwards, batch 2"]
    assert forwards["patches_per_second"]["median"] > 0
    assert forwards["multiply_adds_per_second"] > 0
    assert found["parts"]["ceilings"]["scratch_written_bytes_per_second"] > 0
    assert found["parts"]["extraction, batch 2"]["of_bare"]["median"] > 0
    subprocess.run([*script, *small, "--minutes", "0", "--json", str(file)], check=True)
    assert json.loads(file.read_text())["parts"] == {}


def test_the_rates_of_pretraining_are_measured(tmp_path):
    file = tmp_path / "rate.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "pretrain_rate.py"), "--device", "cpu"]
    small = ["--preset", "micro", "--crops", "1", "--steps", "1", "--processes", "0"]
    subprocess.run([*script, *small, "--json", str(file)], check=True, cwd=tmp_path)
    found = json.loads(file.read_text())
    assert list(found["milliseconds"]) == [
        "diffusion model, 1 crops, eager", "autoencoder, 1 crops of 128 px"
    ]  # fmt: skip
    assert all(value > 0 for value in found["milliseconds"].values())
    assert found["crops_per_second"]["threads"] > 0
