"""A grid of heads on small stores."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from cli.main import run
from pathsegdiff.errors import RunError
from pathsegdiff.evaluation.compare import compare, join, read_scored, sum_runs
from pathsegdiff.evaluation.intervals import pixel_intervals
from pathsegdiff.features.writer import open_existing
from pathsegdiff.pipeline.sweep import (
    Grid,
    Job,
    Outcome,
    Point,
    default_processes,
    plan_sweep,
    run_sweep,
)
from pathsegdiff.pipeline.sweep_table import About, TableRow, cells, varied_axes, write_sweep
from pathsegdiff.segmentation import train
from pathsegdiff.segmentation.runs import scored_step
from tests.helpers_store import build_store

ROOT = Path(__file__).parents[1]
SHORT = {"steps": 2, "batch_size": 2}
OPTIONS = ("--steps", "2", "--batch-size", "2", "--head-width", "8", "--jobs", "1")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "shapes.zarr"
    build_store(path, train=4, test=2)
    return path


def lines_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_combination_is_trained_and_scored_on_validation(store, tmp_path, capsys):
    out = tmp_path / "swept"
    grid = ["--features", str(store), "--taps", "all", "--taps", "up_05,up_08"]
    grid += ["--lr", "1e-3,1e-2", "--seed", "0,1", "--out", str(out)]
    assert run(["sweep", *grid, *OPTIONS]) == 0
    rows = lines_of(out / "table.csv")
    assert len(rows) == 8
    assert {(row["taps"], row["lr"], row["seed"]) for row in rows} == {
        (taps, lr, seed)
        for taps in ("all", "up_05,up_08")
        for lr in ("0.001", "0.01")
        for seed in ("0", "1")
    }
    for row in rows:
        result = json.loads((out / "runs" / row["run"] / "result.json").read_text())
        assert row["part"] == "validation"
        assert float(row["miou"]) == pytest.approx(result["kept"]["val_miou"], abs=1e-6)
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| 2 |") == 4
    assert "Intervals and paired differences need images that are scored one by one" in table
    assert "paired 95 %" not in table
    assert table.startswith("| taps | lr | mIoU (validation) |")
    with Image.open(out / "plot.png") as drawn:
        assert drawn.width > 400


def test_a_sweep_continues_with_what_is_missing(store, tmp_path, monkeypatch, capsys):
    options = [*OPTIONS, "--features", str(store), "--out", str(tmp_path / "swept")]
    assert run(["sweep", *options, "--taps", "up_05"]) == 0
    trained = []
    really = train._Training.run

    def counted(self):
        trained.append(self.settings.taps)
        return really(self)

    monkeypatch.setattr(train._Training, "run", counted)
    assert run(["sweep", *options, "--taps", "each"]) == 0
    assert len(trained) == 13
    assert ("up_05",) not in trained
    rows = lines_of(tmp_path / "swept" / "table.csv")
    assert [row["taps"] for row in rows][:2] == ["middle", "up_00"]
    assert rows[-1]["taps"] == "all"
    assert "14 heads" in capsys.readouterr().out


def test_a_split_that_is_named_is_looked_at_once(store, tmp_path, monkeypatch):
    grid = Grid(stores=[store], widths=[8])
    jobs = plan_sweep(grid, tmp_path, eval_split="test", **SHORT)
    first = run_sweep(jobs)[0]
    assert first.part == "test"
    metrics = json.loads((jobs[0].out / "eval-test" / "metrics.json").read_text())
    assert first.scores["miou"] == metrics["miou"]
    monkeypatch.setattr("pathsegdiff.pipeline.sweep.evaluate_run", None)
    assert run_sweep(jobs)[0].scores == pytest.approx(first.scores)


def test_figures_of_an_unfinished_head_are_not_those_of_the_finished_one(store, tmp_path):
    grid = Grid(stores=[store], widths=[8])
    (job,) = plan_sweep(grid, tmp_path, eval_split="test", **SHORT)
    found = run_sweep([job])[0]
    # as `psd eval` leaves them of a run that is still training
    file = job.out / "eval-test" / "metrics.json"
    early = json.loads(file.read_text())
    assert scored_step(early) == found.kept_step
    early["provenance"]["head"]["kept"]["step"] = 0
    file.write_text(json.dumps({**early, "miou": 0.99}))
    assert run_sweep([job])[0].scores == pytest.approx(found.scores)
    assert scored_step(json.loads(file.read_text())) == found.kept_step


def test_folds_are_held_out_and_averaged(tmp_path):
    path = tmp_path / "folded.zarr"
    build_store(path, train=8, test=0)
    grid = Grid(stores=[path], widths=[8], folds=[1, 2])
    jobs = plan_sweep(grid, tmp_path / "swept", **SHORT)
    outcomes = run_sweep(jobs)
    assert [outcome.part for outcome in outcomes] == ["fold1", "fold2"]
    text = write_sweep(tmp_path / "swept", jobs, outcomes)
    mean = sum(outcome.scores["miou"] for outcome in outcomes) / 2
    assert f"| all | {mean:.3f} |" in text
    assert "fold1, fold2" in text


def test_settings_are_held_against_one_of_them_image_by_image(tmp_path):
    path = tmp_path / "folded.zarr"
    build_store(path, train=8, test=0)
    grid = Grid(stores=[path], widths=[8], folds=[1, 2], learning_rates=[1e-3, 1e-2], seeds=[0, 1])
    jobs = plan_sweep(grid, tmp_path / "swept", **SHORT)
    outcomes = run_sweep(jobs)
    told = About(
        title="Rates",
        notes=("Told.",),
        reference=("lr", 1e-2),
        published={1e-3: {"miou": 0.25, "dice": 0.4}},
        same_data=True,
    )
    text = write_sweep(tmp_path / "swept", jobs, outcomes, told)
    assert text.startswith("# Rates\n\n| lr | mIoU (fold1, fold2) | mIoU published | Dice |")
    assert "\n- Told.\n" in text
    header, _, one, other = (
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    )
    one, other = dict(zip(header, one, strict=True)), dict(zip(header, other, strict=True))

    def of_seed(rate, seed):
        wanted = (rate, seed)
        runs = [out for out in outcomes if (out.job.axes["lr"], out.job.axes["seed"]) == wanted]
        return join([read_scored(out.job.out) for out in runs])

    images = [sum_runs([of_seed(rate, seed) for seed in (0, 1)]) for rate in (1e-3, 1e-2)]
    found = compare(*images).differences["miou"]
    paired = "mIoU less that of lr 0.01 (paired 95 % interval)"
    assert one[paired] == f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
    assert other[paired] == ""
    limits = pixel_intervals(images[1].confusions, groups=images[1].groups)["miou"]
    over = "mIoU, 95 % interval over groups (patients, cases)"
    assert other[over] == f"{limits.low:.3f} to {limits.high:.3f}"
    mean = sum(out.scores["miou"] for out in outcomes if out.job.axes["lr"] == 1e-3) / 4
    assert one["mIoU, ours less published"] == f"{mean - 0.25:+.3f}"
    assert other["mIoU published"] == other["mIoU, ours less published"] == ""
    assert one["runs"] == "4"
    # of seeds without all their folds there is nothing to compare
    left = [out for out in outcomes if out.job.axes["lr"] != 1e-2 or "fold1" in out.part]
    less = write_sweep(tmp_path / "less", jobs, left, told)
    assert "paired 95 %" not in less.splitlines()[2] and "Without interval" in less
    assert "95 % interval over groups" in less.splitlines()[2]

    # and only seeds that both have are compared
    def with_seeds(seeds):
        left = [out for out in outcomes if out.job.axes["seed"] in seeds[out.job.axes["lr"]]]
        return write_sweep(tmp_path / "less", jobs, left, told)

    assert "other seeds" in with_seeds({1e-3: {1}, 1e-2: {0}})
    shared = compare(*(of_seed(rate, 1) for rate in (1e-3, 1e-2))).differences["miou"]
    shared = f"{shared.value:+.3f} ({shared.low:+.3f} to {shared.high:+.3f})"
    assert shared != one[paired] and shared in with_seeds({1e-3: {1}, 1e-2: {0, 1}})
    write_sweep(tmp_path / "swept", jobs, outcomes, told)

    page = (tmp_path / "swept/report.html").read_text()
    assert page.count("/report.html") == len(jobs) and "Told." in page
    for link in re.findall('href="([^"]+)"', page):
        assert (tmp_path / "swept" / link).is_file()


def test_processes_side_by_side_give_the_same_heads(store, tmp_path):
    grid = Grid(stores=[store], widths=[8], seeds=[0, 1])
    alone = run_sweep(plan_sweep(grid, tmp_path / "alone", **SHORT))
    together = run_sweep(plan_sweep(grid, tmp_path / "together", **SHORT), processes=2)
    assert [o.scores for o in together] == [o.scores for o in alone]
    assert [o.job.out.name for o in together] == [o.job.out.name for o in alone]


def test_a_head_that_fails_costs_no_other(store, tmp_path, capsys):
    out = tmp_path / "swept"
    blocked = out / "runs" / "shapes-steps-2-batch-2-lr-0.01-width-8"
    blocked.mkdir(parents=True)
    (blocked / "mine.txt").write_text("mine")
    options = ["--features", str(store), "--lr", "1e-2,1e-3", "--out", str(out)]
    assert run(["sweep", *options, *OPTIONS]) == 1
    said = capsys.readouterr()
    assert "1 of 2 heads failed, the first:" in said.err
    assert "no run folder" in said.err
    assert "0 of 1, incomplete" in said.out
    assert [bool(row["miou"]) for row in lines_of(out / "table.csv")] == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "much"], "'much' is not a number"),
        (["--lr", "1e-3,0"], "must be a number above 0, got 0"),
        (["--lr", ""], "'' is not a number"),
        (["--seed", ""], "'' is not a number"),
        (["--taps", "up_99"], "up_99"),
        (["--fold", "0", "--eval-split", "test"], "--eval-split cannot go with --fold"),
        (["--val", "0"], "--val 0 leaves nothing to score"),
        (["--val", "0.0"], "leaves nothing to score"),
        (["--val", "nosuch"], "nosuch"),
        (["--split", "nosuch"], "nosuch"),
        (["--fold", "9,1"], "--fold 9"),
        (["--seed", "-1"], "seeds are from 0"),
        (["--seed", str(2**70)], "seeds are from 0"),
        (["--eval-split", "absent"], "no sample of split 'absent'"),
        (["--steps", "2", "--epochs", "2"], "not both"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    store, tmp_path, capsys, options, message
):
    out = tmp_path / "swept"
    code = run(["sweep", "--features", str(store), "--out", str(out), *options])
    assert code in (1, 2)
    assert re.search(re.escape(message), capsys.readouterr().err)
    assert not out.exists()


def test_two_stores_of_one_name_are_refused(store, tmp_path):
    other = tmp_path / "shapes.zarr"
    shutil.copytree(store, other)
    with pytest.raises(RunError, match="would train into one run"):
        plan_sweep(Grid(stores=[store, other]), tmp_path / "swept", **SHORT)


def test_stores_that_nothing_else_tells_apart_are_named(store, tmp_path):
    other = tmp_path / "others.zarr"
    shutil.copytree(store, other)
    small = tmp_path / "small.zarr"
    build_store(small, train=4, test=2, dtype="int8")
    jobs = plan_sweep(Grid(stores=[store, other, small]), tmp_path / "swept", **SHORT)
    assert [job.axes["store"] for job in jobs] == ["shapes.zarr", "others.zarr", "small.zarr"]
    assert [job.axes["dtype"] for job in jobs] == ["float16", "float16", "int8"]


def test_the_table_shows_only_the_axes_that_vary():
    axes = {"data": "d", "model": "m", "t": 50, "condition": "encoder", "dtype": "float16"}
    axes |= {"store": None, "taps": "all"}
    axes |= {"lr": 1e-3, "width": 64, "images": None}
    point = Point(
        store="s", taps="all", learning_rate=1e-3, head_width=64, limit=None, fold=None, seed=0
    )
    job = Job(
        point=point, out=Path("nowhere"), axes={"seed": 0}, settings={}, eval_split=None,
        device="cpu", threads=None,
    )  # fmt: skip
    scores = dict.fromkeys(("miou", "dice", "accuracy"), 0.5)
    done = (Outcome(job=job, part="validation", scores=scores, seconds=90.0),)
    rows = [
        TableRow(axes={**axes, "t": t, "images": images}, outcomes=done if t else (), planned=1)
        for t in (0, 50)
        for images in (5, None)
    ]
    assert varied_axes(rows) == ["t", "images"]
    header, first, *_, last = cells(rows, ["testB"], About())
    assert header[:3] == ["t", "images", "mIoU (testB)"]
    assert first == ["0", "5", "", "", "", "", "", "0 of 1, incomplete"]
    assert last == ["50", "all", "0.500", "0.500", "0.500", "", "1.5", "1"]
    assert varied_axes(rows[:1]) == ["taps"]


def test_a_cpu_trains_one_head_per_core(monkeypatch):
    monkeypatch.setattr("pathsegdiff.pipeline.sweep.available_cores", lambda: 6)
    assert default_processes(torch.device("cuda")) == 1
    assert default_processes(torch.device("cpu")) == 6


def test_a_store_that_is_not_finished_is_refused(tmp_path):
    path = tmp_path / "shapes.zarr"
    opened = build_store(path, train=4, test=2)
    open_existing(path).forget(opened.samples()[1])
    with pytest.raises(RunError, match=r"lacks 1 of 4 samples \(train_1, ...\)"):
        plan_sweep(Grid(stores=[path]), tmp_path / "swept", **SHORT)


def test_stores_of_other_samples_are_not_compared(store, tmp_path):
    build_store(tmp_path / "more.zarr", train=6, test=2, dtype="float32")
    with pytest.raises(RunError, match=r"do not hold the same samples \(train_4 is in one"):
        plan_sweep(Grid(stores=[store, tmp_path / "more.zarr"]), tmp_path / "swept", **SHORT)
    # nor is a validation split of others, which scores as much as a split that is named
    build_store(tmp_path / "tested.zarr", train=4, test=3, dtype="float32")
    grid = Grid(stores=[store, tmp_path / "tested.zarr"])
    assert len(plan_sweep(grid, tmp_path / "swept", **SHORT)) == 2
    with pytest.raises(RunError, match=r"do not hold the same samples \(test_2 is in one"):
        plan_sweep(grid, tmp_path / "swept", val="test", **SHORT)


def test_a_process_that_dies_costs_no_other_head(store, tmp_path, monkeypatch):
    jobs = plan_sweep(Grid(stores=[store], widths=[8], seeds=[0, 1]), tmp_path, **SHORT)
    sample = jobs[0].out
    sample.parent.mkdir(parents=True)
    sample.write_text("a file where the run folder has to be")
    first, second = run_sweep(jobs, processes=2)
    assert "is a file" in first.error
    assert second.scores
    monkeypatch.setattr("pathsegdiff.pipeline.sweep._run_alone", kill_this_process)
    killed = run_sweep(jobs, processes=2)
    assert all("ended with code -9" in outcome.error for outcome in killed)


def kill_this_process(job, answer):
    os.kill(os.getpid(), signal.SIGKILL)


def test_ctrl_c_ends_every_head_with_a_checkpoint_and_begins_no_other(store, tmp_path):
    out = tmp_path / "swept"
    command = [sys.executable, "-m", "cli", "sweep", "--features", str(store), "--seed", "0,1,2,3"]
    long = ["--steps", "100000", "--batch-size", "1", "--head-width", "8", "--jobs", "2"]
    process = subprocess.Popen(
        [*command, *long, "--out", str(out)], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("runs/*/log.csv"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    runs = sorted((out / "runs").iterdir())
    assert len(runs) == 2
    assert all((run / "checkpoint.pt").exists() for run in runs)
    assert not list(out.glob("runs/*/result.json"))
