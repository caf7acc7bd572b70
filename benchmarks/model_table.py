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
from typing import Any

import numpy as np

PSD = [sys.executable, "-m", "cli"]
#: Of every row: settings were chosen before, on the patient folds of GlaS' training split
#: (docs/results.md), so every training image trains and the last weights are kept.
COMMON = shlex.split("--val 0 --keep last --batch-size 4 --precision bfloat16")
#: Of every head.
HEAD = shlex.split("--steps 200 --crop 256 --lr 1e-3 --schedule cosine --augment flips")
#: Of every U-Net: whole images, eight times the time of a head.
UNET = shlex.split("--steps 200 --size 512")
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training.

    Attributes:
        name: Of the row.
        limit: Training images; None for all.
        seed: Of weights, order and the choice of images.
    """

    name: str
    limit: int | None
    seed: int


def main() -> None:
    """Run what is missing, then write table.md and table.json, and few_labels.png where it fits."""
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
    parser.add_argument("--limit-images", default="all", metavar="N[,N...]", help="that train")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--table-only", action="store_true", help="of what there is; run nothing")
    options = parser.parse_args()
    rows = {name: ROWS[name] for name in options.rows.split(",")}
    seeds = [int(seed) for seed in options.seeds.split(",")]
    limits = [None if limit == "all" else int(limit) for limit in options.limit_images.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    if options.table_only:
        write_table(options, rows, limits, seeds)
        return
    for command in extractions(options, {row.store for row in rows.values()}):
        if not run(command, options, threads=2):
            sys.exit("a store is not whole; run the same command again")
    jobs = [
        Job(name=name, limit=limit, seed=seed)
        for limit in limits
        for seed in seeds
        for name in rows
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        # A row that fails must not cost the others.
        list(pool.map(lambda job: one_run(options, rows[job.name], job), jobs))
    if not options.dry_run:
        write_table(options, rows, limits, seeds)


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


def run_path(options: argparse.Namespace, job: Job) -> Path:
    """Folder of a run."""
    few = "" if job.limit is None else f"-{job.limit}images"
    return options.out / "runs" / f"{job.name}{few}-seed{job.seed}"


def metrics_path(options: argparse.Namespace, job: Job) -> Path:
    """Where a finished run has its figures."""
    return run_path(options, job) / f"eval-{options.eval_split}" / "metrics.json"


def is_finished(options: argparse.Namespace, job: Job) -> bool:
    """Whether a run was trained to its end and scored."""
    return (run_path(options, job) / "result.json").exists() and metrics_path(options, job).exists()


def one_run(options: argparse.Namespace, row: Row, job: Job) -> None:
    """Train and score a row with one seed, unless it has been."""
    if is_finished(options, job):
        return
    out = str(run_path(options, job))
    common = [*COMMON, "--seed", str(job.seed), "--out", out]
    if job.limit is not None:
        common += ["--limit-images", str(job.limit)]
    scored = ["--eval-split", options.eval_split]
    if row.store is None:
        run([*PSD, "baseline", job.name, *data(options), *scored, *common, *UNET], options)
        return
    features = ["--features", str(store_path(options, row.store))]
    if run([*PSD, "train-head", *features, *common, *HEAD, *row.arguments], options):
        run([*PSD, "eval", "--run", out, *features, "--split", options.eval_split], options)


def run(command: list[str], options: argparse.Namespace, threads: int = 1) -> bool:
    """Run a command, its output into a log beside the runs; whether it succeeded."""
    print(f"{time.strftime('%H:%M:%S')} psd {shlex.join(command[len(PSD) :])}", flush=True)
    if options.dry_run:
        return True
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (options.out / "log.txt").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        print(f"failed ({done.returncode}), see {options.out / 'log.txt'}", flush=True)
    return done.returncode == 0


def write_table(
    options: argparse.Namespace,
    rows: dict[str, Row],
    limits: list[int | None],
    seeds: list[int],
) -> None:
    """Mean over the seeds, lowest to highest, and the interval over images of the first seed."""
    few = len(limits) > 1
    header = [
        f"{options.eval_split}, mIoU",
        *(["images"] if few else []),
        "mean (range)",
        "95 % interval over images, one seed",
        "Dice",
        "accuracy",
        "seeds",
    ]
    lines = [header, ["---"] * len(header)]
    found: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for name, row in rows.items():
        for limit in limits:
            jobs = [Job(name=name, limit=limit, seed=seed) for seed in seeds]
            runs = [figures(options, job) for job in jobs if is_finished(options, job)]
            found[name, limit] = runs
            images = ["all" if limit is None else str(limit)] if few else []
            lines.append([row.title, *images, *cells(runs, len(seeds))])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    table = [
        {
            "row": name,
            "images": limit,
            **{column: [metrics[column] for metrics in runs] for column in COLUMNS},
        }
        for (name, limit), runs in found.items()
    ]
    (options.out / "table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    if few:
        draw(options.out / "few_labels.png", rows, found)
    print(text, end="")


def figures(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """The metrics of a finished run, and how many images it was trained on."""
    metrics = json.loads(metrics_path(options, job).read_text(encoding="utf-8"))
    config = json.loads((run_path(options, job) / "config.json").read_text(encoding="utf-8"))
    return {**metrics, "training_images": len(config["samples"]["train"])}


def cells(runs: list[dict[str, Any]], planned: int) -> list[str]:
    """Of one row: mean and range, interval, Dice, accuracy, seeds."""
    if not runs:
        return ["not run", "", "", "", f"0 of {planned}"]
    miou = [metrics["miou"] for metrics in runs]
    spread = f" ({min(miou):.3f} to {max(miou):.3f})" if runs[1:] else ""
    interval = runs[0]["intervals"]["miou"]
    incomplete = "" if len(runs) == planned else ", incomplete"
    return [
        f"{statistics.mean(miou):.3f}{spread}",
        f"{interval['low']:.3f} to {interval['high']:.3f}",
        *(f"{statistics.mean(metrics[c] for metrics in runs):.3f}" for c in ("dice", "accuracy")),
        f"{len(runs)} of {planned}{incomplete}",
    ]


def draw(
    path: Path, rows: dict[str, Row], found: dict[tuple[str, int | None], list[dict[str, Any]]]
) -> None:
    """mIoU over the number of training images that there really were."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    counts: set[int] = set()
    for name, row in rows.items():
        points = []
        for (other, _), runs in found.items():
            if other == name and runs:
                miou = [metrics["miou"] for metrics in runs]
                points.append(
                    (runs[0]["training_images"], statistics.mean(miou), min(miou), max(miou))
                )
        if points:
            points.sort()
            x, mean, low, high = (np.array(values) for values in zip(*points, strict=True))
            counts |= {int(count) for count in x}
            axes.errorbar(x, mean, yerr=[mean - low, high - mean], marker="o", capsize=3,
                          label=row.title)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(sorted(counts), [str(count) for count in sorted(counts)])
    axes.minorticks_off()
    axes.set(xlabel="training images", ylabel="mIoU")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    main()
