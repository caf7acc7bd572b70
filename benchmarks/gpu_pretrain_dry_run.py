"""Rehearse the short turns of gpu_pretrain.py on a CPU: `make gpu-pretrain-dry-run`.

Two turns with the preset micro on the embedded images: the first stops in the middle of the
diffusion model; its parts go to another folder, where another process goes on to the end. Turns
run in copies of the package, without network. Ends with an error where anything is not as it must.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from pathsegdiff.data.image import read_image
from pathsegdiff.diffusion.bundle import part_state
from pathsegdiff.diffusion.presets import PRESETS, build_random
from pathsegdiff.diffusion.pretrain import travel
from pathsegdiff.diffusion.pretrain.images import open_pool
from pathsegdiff.diffusion.pretrain.loop import CHECKPOINT_FILE
from pathsegdiff.diffusion.pretrain.plans import plan_of
from pathsegdiff.diffusion.pretrain.run import FACTS_FILE, WEIGHTS_FILE, LoopOptions, Pretraining

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "pathsegdiff" / "data" / "demo" / "images"
#: The archive of the rehearsal has to be smaller than that: 48 images do not fit losslessly.
MAX_BYTES = 1_000_000
STOP = 10
#: Imported first wherever it is on the path: a turn that reaches for the network fails.
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise OSError("the rehearsal has no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


def main() -> None:
    """Rehearse, and say what was seen."""
    begin = time.monotonic()
    torch.set_num_threads(max(1, min(4, os.cpu_count() or 1)))
    with tempfile.TemporaryDirectory(prefix="dry-run-") as folder:
        rehearse(Path(folder))
    print(f"the round trip works; {time.monotonic() - begin:.0f} s")


def rehearse(folder: Path) -> None:
    """The whole round trip."""
    encoder = random_encoder(folder / "encoder")
    archive = folder / "images.tar"
    sources = ["--pack-images", f"{IMAGES}@2.2", "--max-bytes", str(MAX_BYTES)]
    run(folder, *sources, "--archive", str(archive), "--with-encoder", str(encoder))
    check(archive.stat().st_size < MAX_BYTES, f"archive {archive.stat().st_size:,} bytes")
    travel.unpack_images(archive, folder / "images")
    before, after = open_pool([f"{IMAGES}@2.2"]), open_pool([str(folder / "images")])
    for one, other in ((before.train, after.train), (before.held_out, after.held_out)):
        facts = [[(i.group, i.scale, i.size) for i in images] for images in (one, other)]
        check(facts[0] == facts[1], f"{len(one)} images in the same order, groups and scales")
    far = (before.batch(3, 0, 8, 256).float() - after.batch(3, 0, 8, 256).float()).abs().mean()
    check(far < 12, f"the same crops are cut: {far:.1f} grey levels apart")

    settings = ["--preset", "micro", "--minutes", "60", "--device", "cpu"]
    here, there = machine(folder / "here"), machine(folder / "there")
    shutil.copyfile(archive, here / "images.tar")
    turn = ["--images", "images.tar", *settings]
    run(here, *turn, "--out", "turn_1", "--stop-at", f"ldm:{STOP}")
    check_limits(here / "turn_1")
    travel.unpack_training(here / "turn_1", folder / "work")
    state = torch.load(folder / "work" / "ldm" / CHECKPOINT_FILE, weights_only=True)
    check(state["step"] == STOP, f"the first turn stopped the diffusion model at step {STOP}")
    rows = len(state["rows"])

    (here / "images.tar").rename(there / "images.tar")
    (here / "turn_1").rename(there / "turn_1")
    shutil.rmtree(here)
    run(there, *turn, "--out", "turn_2", "--resume", "turn_1")
    check_limits(there / "turn_2")
    log = (there / "turn_2" / "log.csv").read_text().splitlines()[1:]
    steps = [int(line.split(",")[0]) for line in log]
    total = plan_of("micro").ldm.steps
    check(
        steps == sorted(set(steps)) and steps[-1] == total and steps[rows - 1] <= STOP,
        f"the second turn went on to step {steps[-1]}; its log has {len(steps)} rows, {rows} of "
        "them from the first",
    )
    run(folder, "--unpack", str(there / "turn_2"), "--to", str(folder / "bundle"))
    one_patch(folder / "bundle")

    part = there / "turn_1" / "training-00.bin"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    told = run(there, *turn, "--out", "turn_3", "--resume", "turn_1", fails=True)
    check(
        len(told) == 1 and "training-00.bin is not the file" in told[0],
        f"a damaged part is refused: {told[0]}",
    )
    tiny_fits(folder, folder / "images")


def random_encoder(folder: Path) -> Path:
    """A finished encoder of micro without training one, which would need the package lightly."""
    folder.mkdir()
    network = build_random(PRESETS["micro"], 0)["encoder"]
    save_file(part_state("encoder", network, torch.float32), folder / WEIGHTS_FILE)
    (folder / FACTS_FILE).write_text(json.dumps({"weights": "random"}))
    return folder


def machine(folder: Path) -> Path:
    """A folder with a copy of what a turn needs, as another machine would have it."""
    ignore = shutil.ignore_patterns("__pycache__", "demo", "embedded")
    shutil.copytree(ROOT / "pathsegdiff", folder / "pathsegdiff", ignore=ignore)
    (folder / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "gpu_pretrain.py", folder / "benchmarks")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    return folder


def run(folder: Path, *arguments: str, fails: bool = False) -> list[str]:
    """Run gpu_pretrain.py in a folder, on the package there if it has one.

    Returns:
        The lines of stderr.
    """
    base = folder if (folder / "pathsegdiff").is_dir() else ROOT
    result = subprocess.run(
        [sys.executable, str(base / "benchmarks" / "gpu_pretrain.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(base), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    lines = result.stdout.strip().splitlines()
    print("  $ gpu_pretrain.py", " ".join(arguments).replace(str(folder), "."))
    print("\n".join(f"    {line}" for line in lines[-1:]).replace(str(folder), "."))
    wanted = 1 if fails else 0
    check(result.returncode == wanted, f"exit code {wanted}", detail=result.stderr)
    return result.stderr.strip().splitlines()


def check_limits(out: Path) -> None:
    """What a turn leaves obeys the limits of the machine."""
    files = sorted(out.iterdir())
    sizes = [file.stat().st_size for file in files]
    parts = sum(size for file, size in zip(files, sizes, strict=True) if file.suffix == ".bin")
    check(len(files) <= 8, f"{len(files)} files")
    check(max(sizes) < 16 << 20, f"the largest has {max(sizes) / 2**20:.2f} MiB, below 16")
    check(parts <= 55 << 20, f"the parts have {parts / 2**20:.2f} MiB together, at most 55")
    plain = all(re.fullmatch(r"[A-Za-z0-9._-]+", file.name) for file in files)
    check(plain, f"plain names: {', '.join(file.name for file in files)}")


def one_patch(folder: Path) -> None:
    """The bundle loads and has features of a patch."""
    bundle = travel.load_bundle(folder)
    check(bundle.card.trained, f"the bundle {bundle.card.name} is whole and marked as trained")
    model = bundle.load()
    pixels = torch.from_numpy(read_image(next(IMAGES.glob("*.webp")))).permute(2, 0, 1)[None] / 255
    patch = torch.nn.functional.interpolate(pixels, size=(256, 256), mode="bilinear")
    context = model.context(model.embed(patch), 1)
    noised = model.add_noise(model.latent(patch), torch.zeros(1, *model.latent_shape), 50)
    taps = model.taps(noised, 50, context, [spec.name for spec in model.tap_specs])
    finite = all(torch.isfinite(tap).all() and tap.std() > 0 for tap in taps.values())
    channels = sum(tap.shape[1] for tap in taps.values())
    check(finite and channels == bundle.card.num_channels, f"one patch: {channels} channels")


def tiny_fits(folder: Path, images: Path) -> None:
    """A state of the preset tiny, of which nothing can be compressed away, obeys the limits."""
    work = folder / "tiny"
    for part, network in build_random(PRESETS["tiny"], 0).items():
        if part in ("encoder", "autoencoder"):
            (work / part).mkdir(parents=True)
            save_file(part_state(part, network, torch.float32), work / part / WEIGHTS_FILE)
            (work / part / FACTS_FILE).write_text(json.dumps({"latent_scale": 1.0}))
    plan = plan_of("tiny").changed(batch_size=1, precision="float32")
    training = Pretraining(plan, open_pool([str(images)]), work, torch.device("cpu"))
    training.train("ldm", LoopOptions(stop_at=0.0))  # one step
    file = work / "ldm" / CHECKPOINT_FILE
    state = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for value in (*state["weights"].values(), *state["ema"]["shadow_params"]):
        value += 0.01 * torch.randn(value.shape, generator=generator)
    for moment in state["optimizer"]["state"].values():
        moment["exp_avg_sq"] = torch.rand(moment["exp_avg_sq"].shape, generator=generator)
    torch.save(state, file)
    out = folder / "tiny-parts"
    count = travel.pack_training(work, out)
    print(
        f"  preset tiny: a checkpoint of {file.stat().st_size / 2**20:.1f} MiB, encoder and "
        f"autoencoder travel in {count} parts"
    )
    check_limits(out)
    travel.unpack_training(out, folder / "tiny-again")
    again = torch.load(folder / "tiny-again" / "ldm" / CHECKPOINT_FILE, weights_only=True)
    same = all(
        torch.equal(again["weights"][name], value.half().float())
        for name, value in state["weights"].items()
    )
    check(same, "its weights come back as float16 rounds them")


def check(holds: bool, what: str, detail: str = "") -> None:
    """Say what holds, or end with an error."""
    if not holds:
        print(detail, file=sys.stderr)
        sys.exit(f"NOT SO: {what}")
    print(f"  ok: {what}", flush=True)


if __name__ == "__main__":
    main()
