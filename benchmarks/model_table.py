"""The rows that a model stands beside, each with the same budget: one command, resumed by itself.

    python benchmarks/model_table.py --dataset glas --data-root GLAS --out reproduction/glas-tiny

Stage 1 for the model (conditioned, null-conditioned, encoder tokens) and for the same shapes with
random weights; a head for each and for tokens and taps together; two U-Nets on the images. Every
row is trained on the same images, for a fixed number of steps, and looks at the evaluated split
once per seed. ``--limit-images 5`` makes the same table from few training images. Interrupted, it
continues: finished runs are taken as they are. ``--dry-run`` prints the commands.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PSD = [sys.executable, "-m", "cli"]
#: Of every row: settings were chosen before, on the patient folds of GlaS' training split
#: (docs/results.md), so every training image trains and the last weights are kept.
COMMON = shlex.split("--val 0 --keep last --batch-size 4")
#: Of every head.
HEAD = shlex.split("--steps 200 --crop 256 --lr 1e-3 --schedule cosine --augment flips")
#: Of every U-Net: on one core, some eight times as long as a head.
UNET = shlex.split("--steps 120 --size 512")
COLUMNS = ("miou", "dice", "accuracy")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row.

    Attributes:
        title: As the table names it.
        store: Name of the store that a head reads, or None for a network on images.
        arguments: Of train-head or baseline.
    """

    title: str
    store: str | None
    arguments: tuple[str, ...]


ROWS = {
    "conditioned": Row(title="tiny, conditioned", store="cond", arguments=()),
    "null": Row(title="tiny, null-conditioned", store="null", arguments=()),
    "random": Row(title="same shapes, random weights", store="random", arguments=()),
    "tokens": Row(title="encoder tokens alone", store="cond", arguments=("--taps", "tokens")),
    "both": Row(title="tokens and taps", store="cond", arguments=("--taps", "all,tokens")),
    "res-unet": Row(title="Res-UNet (ResNet-18), from scratch", store=None, arguments=()),
    "effnet-unet": Row(title="U-Net, ImageNet EfficientNet-Lite0", store=None, arguments=()),
}


def main() -> None:
    """Run what is missing, then write table.md and table.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--split", action="append", default=[], help="extracted; given twice")
    parser.add_argument("--eval-split", default="testB")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--random", type=Path, default=Path("models/tiny-random"))
    parser.add_argument("--t", default="50")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--limit-images", type=int, help="that train; all of them if not given")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    rows = {name: ROWS[name] for name in options.rows.split(",")}
    seeds = [int(seed) for seed in options.seeds.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    for command in extractions(options, {row.store for row in rows.values()}):
        run(command, options, threads=2)
    jobs = [(name, seed) for seed in seeds for name in rows]
    with ThreadPoolExecutor(options.jobs) as pool:
        # A row that fails must not cost the others.
        list(pool.map(lambda job: one_run(options, rows[job[0]], *job), jobs))
    if not options.dry_run:
        write_table(options, rows, seeds)


def extractions(options: argparse.Namespace, stores: set[str | None]) -> list[list[str]]:
    """Commands that fill the stores."""
    common = [*PSD, "extract", *data(options), "--t", options.t]
    for split in options.split or ["train", options.eval_split]:
        common += ["--split", split]
    commands = []
    if stores & {"cond", "null"}:
        out = str(options.out / "features")
        commands.append([*common, "--model", options.model, "--cond", "both", "--tokens",
                         "--out", out])  # fmt: skip
    if "random" in stores:
        if not options.random.exists():
            commands.append([*PSD, "models", "init", "--preset", "tiny", "--out",
                             str(options.random)])  # fmt: skip
        out = str(options.out / "features" / "random.zarr")
        commands.append([*common, "--model", str(options.random), "--out", out])
    return commands


def data(options: argparse.Namespace) -> list[str]:
    """Arguments that name the data set."""
    root = [] if options.data_root is None else ["--data-root", str(options.data_root)]
    return ["--dataset", options.dataset, *root]


def store_path(options: argparse.Namespace, store: str) -> Path:
    """Where ``extractions`` puts a store."""
    folder = options.out / "features"
    if store == "random":
        return folder / "random.zarr"
    null = "-null" if store == "null" else ""
    dataset, model = Path(options.dataset).stem, Path(options.model).name
    return folder / f"{dataset}-{model}-t{options.t}{null}.zarr"


def run_path(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Folder of a run."""
    few = "" if options.limit_images is None else f"-{options.limit_images}images"
    return options.out / "runs" / f"{name}{few}-seed{seed}"


def metrics_path(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a finished run has its figures."""
    return run_path(options, name, seed) / f"eval-{options.eval_split}" / "metrics.json"


def one_run(options: argparse.Namespace, row: Row, name: str, seed: int) -> None:
    """Train and score a row with one seed, unless it has been."""
    if metrics_path(options, name, seed).exists():
        return
    out = str(run_path(options, name, seed))
    common = [*COMMON, "--seed", str(seed), "--out", out]
    if options.limit_images is not None:
        common += ["--limit-images", str(options.limit_images)]
    if row.store is None:
        run(
            [*PSD, "baseline", name, *data(options), "--eval-split", options.eval_split,
             *common, *UNET, *row.arguments],
            options,
        )  # fmt: skip
        return
    features = str(store_path(options, row.store))
    run([*PSD, "train-head", "--features", features, *common, *HEAD, *row.arguments], options)
    run([*PSD, "eval", "--run", out, "--features", features, "--split", options.eval_split],
        options)  # fmt: skip


def run(command: list[str], options: argparse.Namespace, threads: int = 1) -> None:
    """Run a command, its output into a log beside the runs."""
    print(f"{time.strftime('%H:%M:%S')} psd {shlex.join(command[len(PSD) :])}", flush=True)
    if options.dry_run:
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (options.out / "log.txt").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        print(f"failed ({done.returncode}), see {options.out / 'log.txt'}", flush=True)


def write_table(options: argparse.Namespace, rows: dict[str, Row], seeds: list[int]) -> None:
    """Mean over the seeds, lowest to highest, and the interval over images of the first seed."""
    lines = [
        f"| {options.eval_split} | mIoU, mean (range) | 95 % interval over images, one seed "
        "| Dice | accuracy | seeds |",
        "|---|---|---|---|---|---|",
    ]
    table = {}
    for name, row in rows.items():
        found = []
        for seed in seeds:
            file = metrics_path(options, name, seed)
            if file.exists():
                found.append(json.loads(file.read_text(encoding="utf-8")))
        if not found:
            lines.append(f"| {row.title} | not run | | | | 0 of {len(seeds)} |")
            continue
        values = {column: [metrics[column] for metrics in found] for column in COLUMNS}
        table[name] = {"title": row.title, "seeds": len(found), **values}
        spread = f" ({min(values['miou']):.3f} to {max(values['miou']):.3f})" if found[1:] else ""
        limits = found[0]["intervals"]["miou"]
        low, high = (limits["low"], limits["high"]) if isinstance(limits, dict) else limits[-2:]
        incomplete = "" if len(found) == len(seeds) else ", incomplete"
        mean = {column: statistics.mean(values[column]) for column in COLUMNS}
        lines.append(
            f"| {row.title} | {mean['miou']:.3f}{spread} | {low:.3f} to {high:.3f} "
            f"| {mean['dice']:.3f} | {mean['accuracy']:.3f} "
            f"| {len(found)} of {len(seeds)}{incomplete} |"
        )
    few = "" if options.limit_images is None else f"-{options.limit_images}images"
    text = "\n".join(lines) + "\n"
    (options.out / f"table{few}.md").write_text(text, encoding="utf-8")
    text = json.dumps(table, indent=2) + "\n"
    (options.out / f"table{few}.json").write_text(text, encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
