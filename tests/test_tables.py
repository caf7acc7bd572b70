"""The paper's tables: rows are run by the commands of a user, and stand beside what was printed."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cli.main import run
from cli.table_options import TABLE_ROWS
from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.diffusion.bundle import read_card
from pathsegdiff.diffusion.pretrain.parcel import read_archive
from pathsegdiff.errors import ConfigError, RunError
from pathsegdiff.evaluation.compare import compare, join, read_scored
from pathsegdiff.files import file_sha256
from pathsegdiff.pipeline.baselines.networks import ARCHITECTURES, build_network
from pathsegdiff.pipeline.tables import curves, make, rows
from pathsegdiff.pipeline.tables.columns import columns_of
from pathsegdiff.pipeline.tables.finished import refuse_others, write_signature
from pathsegdiff.pipeline.tables.make import make_runs, missing_things
from pathsegdiff.pipeline.tables.plots import TableRow
from pathsegdiff.pipeline.tables.published import COLUMNS, MEAN, TABLES
from pathsegdiff.pipeline.tables.qualitative import draw_qualitative, table_of
from pathsegdiff.pipeline.tables.records import write_records
from pathsegdiff.pipeline.tables.rows import BUDGETS, ROWS, Job, TableSettings
from pathsegdiff.pipeline.tables.write import collect, title_of, write
from tests.helpers_data import make_bcss
from tests.helpers_stage_one import write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of five images and a micro bundle."""
    made = tmp_path_factory.mktemp("tables")
    write_dataset(made / "data", train=3, test=2)
    assert run(["models", "init", "--preset", "micro", "--out", str(made / "micro")]) == 0
    return made


@pytest.fixture
def quick(monkeypatch):
    """Few steps, and commands in this process."""
    head = ("--val", "0", "--keep", "last", "--steps", "2", "--crop", "256")
    images = ("--val", "0", "--keep", "last", "--steps", "2", "--size", "64")
    budget = replace(BUDGETS["short"], head=head, networks=dict.fromkeys(ROWS, images))
    monkeypatch.setitem(rows.BUDGETS, "short", budget)
    said = []

    def start(self, command, log, threads):
        said.append(command)
        return run(command)

    monkeypatch.setattr(make._Running, "start", start)
    return said


def settings_of(folder, out, **others):
    usual = {
        "table": "table4",
        "out": out,
        "dataset": str(folder / "data" / "discs.toml"),
        "dataset_name": "discs",
        "train_split": "train",
        "eval_split": "test",
        "model": str(folder / "micro"),
        "model_name": "micro",
        "random": folder / "micro",
        "rows": ("conditioned", "null", "tokens"),
        "seeds": (0,),
        "precision": "float32",
    }
    return TableSettings(**{**usual, **others})


def test_rows_are_run_once_and_stand_beside_the_published_ones(folder, tmp_path, quick):
    out = tmp_path / "t"
    settings = settings_of(folder, out)
    make_runs(settings, jobs=1, threads=None, log=lambda line: None)
    assert [command[0] for command in quick] == ["extract", *["train-head", "eval"] * 3]
    text = write(settings)
    make_runs(settings, jobs=1, threads=None, log=lambda line: None)
    assert len(quick) == 7

    found = {row.title: row for row in collect(settings)[1]}
    assert list(found) == [
        "HIPT",
        "Res-UNet",
        "CUMedVision2",
        "DDPMSeg",
        "CIMD",
        "MedSegDiff",
        "PathSegDiff-uncond",
        "PathSegDiff",
    ]
    metrics = json.loads((out / "runs/tokens-seed0/eval-test/metrics.json").read_text())
    assert found["HIPT"].mean("miou") == metrics["miou"]
    assert found["HIPT"].difference("miou") == pytest.approx(metrics["miou"] - 0.591)
    assert found["MedSegDiff"].mean("miou") is None
    assert (
        "| MedSegDiff |  |  |  |  |  |  | 0.778 |  | 0.852 |  |  |  |  | published only |" in text
    )
    seconds = json.loads((out / "runs/tokens-seed0/result.json").read_text())["seconds"]
    (line,) = (
        line for line in text.splitlines() if line.startswith("| HIPT | encoder tokens alone |")
    )
    assert f" {seconds / 60:.1f} | 1 of 1 |" in line
    assert "Minutes of training are by the clock, of one run, its mean, on cpu (" in text
    model = json.loads((out / "runs/tokens-seed0/config.json").read_text())["model"]
    assert (
        f"model micro with random weights, sha256 {model['sha256'][:12]};" in text
        and "Seeds: 0; fewer" in text
    )
    assert "not on glas: they do not compare" in text
    with (out / "table.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 9
    page = (out / "report.html").read_text()
    assert 'href="runs/conditioned-seed0/eval-test/report.html"' in page
    assert "data:image/png;base64," in page
    assert (out / "plot.png").stat().st_size > 5000
    for row in ("conditioned", "null", "tokens"):
        found = json.loads((out / f"runs/{row}-seed0/eval-test/metrics.json").read_text())
        title = {"conditioned": "PathSegDiff", "null": "PathSegDiff-uncond", "tokens": "HIPT"}[row]
        classes = "".join(f"<td>{one['iou']:.3f}</td>" for one in found["per_class"])
        assert f"<tr><td>{title}</td>{classes}</tr>" in page
        worst, best = sorted(found["images"], key=lambda image: image["miou"])
        ends = (f"{image['sample_id']} {image['miou']:.3f}" for image in (worst, best))
        assert f"<tr><td>{title}</td>{''.join(f'<td>{end}</td>' for end in ends)}</tr>" in page
        assert f"<tr><td>{row}-seed0/eval-test</td><td>{found['accuracy']:.3f}</td>" in page
    reads = {
        "conditioned": "features of micro at t = 50, run conditioned-seed0",
        "null": "features of micro at t = 50, null-conditioned, run null-seed0",
        "tokens": "the encoder&#x27;s tokens of micro alone, run tokens-seed0",
    }
    for row, said in reads.items():
        assert said in (out / f"runs/{row}-seed0/eval-test/report.html").read_text()
    alien = shutil.copytree(out / "runs/tokens-seed0", out / "runs/both-seed0")
    write(settings)
    assert "both-seed0" not in (out / "report.html").read_text()
    shutil.rmtree(alien)

    file = out / "runs/tokens-seed0/result.json"
    whole = file.read_text()
    for minutes, threads, is_long in ((29, 1, False), (31, 1, True), (16, 2, True), (14, 2, False)):
        took = {"seconds": 60 * minutes, "device": f"cpu (x86_64, {threads} threads)"}
        file.write_text(json.dumps({**json.loads(whole), **took}))
        said = "Longer than the 15 minutes on 2 cores that a run should take: HIPT."
        assert (said in write(settings)) == is_long
    file.write_text(whole)
    for name in ("result.json", "eval-test/metrics.json", "config.json"):
        file = out / "runs/tokens-seed0" / name
        whole = file.read_bytes()
        for damaged in (whole[:-40], b"[]", b"{}"):
            file.write_bytes(damaged)
            with pytest.raises(RunError, match=r"tokens-seed0 is damaged .*; delete it and make"):
                write(settings)
        file.write_bytes(whole)
    assert write(settings) == text


def test_folds_and_few_images_are_lines_and_runs_of_their_own(folder, tmp_path, quick):
    settings = settings_of(folder, tmp_path / "t", rows=("conditioned",), limits=(1, None))
    make_runs(settings, jobs=1, threads=None, log=lambda line: None)
    ours = [row for row in collect(settings)[1] if row.planned]
    assert [(row.limit, len(row.runs), row.planned) for row in ours] == [(None, 1, 1), (1, 1, 1)]
    config = json.loads((tmp_path / "t/runs/conditioned-1images-seed0/config.json").read_text())
    assert len(config["samples"]["train"]) == 1
    more = replace(settings, seeds=(0, 1))
    assert "1 of 2, incomplete" in write(more)
    assert "Incomplete (runs are missing): PathSegDiff" in write(more)
    held = Job(row="conditioned", seed=0, fold=2, limit=5)
    assert held.name == "conditioned-5images-fold2-seed0"
    folded = replace(settings, folds=(2,))
    train, scored = folded.commands(held)
    assert train[train.index("--fold") + 1] == "2"
    assert "--split" not in scored
    assert folded.metrics(held).parent.name == "eval-fold2"
    # Heads and networks on images: the same images, whatever else the data set has.
    (network,) = folded.commands(replace(held, row="res-unet"))
    assert all(c[c.index("--split") + 1] == "train" for c in (train, network))
    assert all(command.count("--split") == 1 for command in folded.extractions())


def test_folds_of_a_seed_are_one_sample_of_images(folder, tmp_path, quick):
    write_dataset(tmp_path / "folded", train=4, test=1)
    rows_of = (tmp_path / "folded" / "discs.csv").read_text().splitlines()
    folds = ["fold", *(str(number % 2) for number in range(5))]
    table = "\n".join(f"{row},{fold}" for row, fold in zip(rows_of, folds, strict=True))
    (tmp_path / "folded" / "discs.csv").write_text(table + "\n")
    settings = settings_of(
        folder,
        tmp_path / "t",
        dataset=str(tmp_path / "folded" / "discs.toml"),
        rows=("conditioned", "tokens"),
        folds=(0, 1),
    )
    make_runs(settings, jobs=1, threads=None, log=lambda line: None)
    found = {row.name: row for row in collect(settings)[1] if row.planned}
    paths = [str(path) for path in found["tokens"].files()[0]]
    assert [path.split("/")[-3:-1] for path in paths] == [
        ["tokens-fold0-seed0", "eval-fold0"],
        ["tokens-fold1-seed0", "eval-fold1"],
    ]
    joined = [join([read_scored(path) for path in found[name].files()[0]])
              for name in ("tokens", "conditioned")]  # fmt: skip
    difference = compare(*joined).differences["miou"]
    assert len(joined[0].sample_ids) == 4
    said = f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
    assert said in write(settings)
    (settings.out / "runs/tokens-fold1-seed0/result.json").unlink()
    text = write(settings)
    assert said not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| HIPT |")]
    assert "| a fold is missing |" in line and "| 1 of 2, incomplete |" in line


def test_a_network_on_images_is_a_row_and_a_failure_costs_only_its_row(folder, tmp_path, quick):
    pytest.importorskip("segmentation_models_pytorch")
    settings = settings_of(folder, tmp_path / "t", rows=("res-unet", "null"))
    (tmp_path / "t/runs").mkdir(parents=True)
    (tmp_path / "t/runs/null-seed0").write_text("in the way")
    said = []
    make_runs(settings, jobs=1, threads=None, log=said.append)
    assert [line for line in said if line.startswith("failed: null-seed0 (it said nothing), see ")]
    ours = {row.name: row for row in collect(settings)[1] if row.planned}
    assert len(ours["res-unet"].runs) == 1
    assert not ours["null"].runs


def test_pixel_classifiers_are_a_row_that_reads_three_stores(folder, tmp_path, quick, monkeypatch):
    budget = replace(BUDGETS["short"], ensemble=("--val", "0", "--keep", "last", "--steps", "2"))
    monkeypatch.setitem(rows.BUDGETS, "short", budget)
    settings = settings_of(folder, tmp_path / "t", rows=("ddpm-seg", "conditioned"))
    make_runs(settings, jobs=1, threads=None, log=lambda line: None)
    # The store of t = 50 is the one that the heads read, tokens and all.
    kinds = [command[0] for command in quick]
    assert kinds == ["extract", "extract", "baseline", "train-head", "eval"]
    assert quick[1][quick[1].index("--t") + 1] == "150,250"
    ours = {row.name: row for row in collect(settings)[1] if row.planned}
    (figures,) = ours["ddpm-seg"].runs
    assert [recipe["recipe"]["timestep"] for recipe in figures["provenance"]["features"]] == [
        50, 150, 250,
    ]  # fmt: skip
    # Another timestep of the heads: the three are extracted beside it.
    other = replace(settings, timestep=20)
    assert [command[command.index("--t") + 1] for command in other.extractions()] == [
        "20",
        "50,150,250",
    ]
    assert replace(other, rows=("ddpm-seg",)).extractions() == other.extractions()[1:]


def test_a_table_of_finished_runs_needs_neither_images_nor_bundle(
    folder, tmp_path, quick, monkeypatch, capsys
):
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    command = ["reproduce", "table4", "--dataset", str(data / "discs.toml"), "--seeds", "0"]
    command += ["--rows", "null", "--jobs", "1", "--out", str(tmp_path / "t"), "--model"]
    assert run([*command, str(folder / "micro")]) == 0
    text = (tmp_path / "t" / "table.md").read_text()
    shutil.rmtree(data / "images")
    shutil.rmtree(tmp_path / "t" / "features")
    assert run([*command, "gone", "--table-only"]) == 0
    assert (tmp_path / "t" / "table.md").read_text() == text
    assert run([*command, "gone"]) == 1


def test_a_table_is_made_again_of_its_records_and_goes_on(folder, tmp_path, quick):
    command = ["reproduce", "table4", "--dataset", str(folder / "data" / "discs.toml")]
    command += ["--model", str(folder / "micro"), "--precision", "float32", "--jobs", "1"]
    command += ["--rows", "conditioned,tokens"]
    out = tmp_path / "t"
    assert run([*command, "--seeds", "0", "--out", str(out)]) == 0
    config = out / "runs/tokens-seed0/config.json"
    values = json.loads(config.read_text())
    words = "--data-root '/srv/a patient/b' --encoder-weights resnet18=/srv/a/c.pth --out runs/d"
    values["provenance"]["command"] = f"psd baseline tokens {words}"
    config.write_text(json.dumps(values))
    (config.parent / "pilots.json").write_text('{"validation_miou": {"0.1": 0.5}}')
    pilot = out / "runs/tokens-seed0-pilot-lr0.1"
    pilot.mkdir()
    shutil.copy(config.parent / "result.json", pilot)
    assert run([*command, "--seeds", "0", "--out", str(out), "--table-only"]) == 0
    first = (out / "records.tar.gz").read_bytes()
    assert run([*command, "--seeds", "0", "--out", str(out), "--table-only"]) == 0
    assert (out / "records.tar.gz").read_bytes() == first

    again = tmp_path / "again"
    again.mkdir()
    with io.BytesIO(first) as stream:
        read_archive(stream, len(first), again, "records")
    files = {file.relative_to(again).as_posix() for file in again.rglob("*") if file.is_file()}
    chose = {"runs/tokens-seed0/pilots.json", "runs/tokens-seed0-pilot-lr0.1/result.json"}
    assert files == {"settings.json", *chose} | {
        f"runs/{row}-seed0/{name}"
        for row in ("conditioned", "tokens")
        for name in ("config.json", "log.csv", "result.json", "eval-test/metrics.json")
    }
    for name in files:
        text = (again / name).read_text()
        assert str(tmp_path) not in text and str(folder) not in text and "/srv" not in text
    values = json.loads((again / "runs/tokens-seed0/config.json").read_text())
    assert values["provenance"]["command"] == (
        "psd baseline tokens --data-root b --encoder-weights resnet18=c.pth --out runs/d"
    )
    assert values["features"]["path"] == "discs-micro-t50.zarr"
    assert run([*command, "--seeds", "0", "--out", str(again), "--table-only"]) == 0
    assert (again / "table.md").read_text() == (out / "table.md").read_text()
    assert (again / "table.csv").read_text() == (out / "table.csv").read_text()

    del quick[:]
    assert run([*command, "--seeds", "0,1", "--out", str(again)]) == 0
    trained = [said[said.index("--out") + 1] for said in quick if said[0] == "train-head"]
    assert [Path(name).name for name in trained] == ["conditioned-seed1", "tokens-seed1"]

    (out / "runs/tokens-seed0-pilot-0").mkdir()
    (out / "runs/tokens-seed0-pilot-0/config.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json is damaged .*; delete its folder"):
        write_records(settings_of(folder, out))
    # Records that were put beside runs that are not there yet are not lost.
    assert write_records(settings_of(folder, out, seeds=(7,))) is None
    assert (out / "records.tar.gz").read_bytes() == first


def test_objects_stand_beside_published_objects(folder, tmp_path, quick):
    pytest.importorskip("segmentation_models_pytorch")
    settings = settings_of(folder, tmp_path / "t", rows=("dcan",))
    make_runs(settings, jobs=1, threads=None, log=lambda line: None)
    text = write(settings)
    metrics = json.loads((tmp_path / "t/runs/dcan-seed0/eval-test/metrics.json").read_text())
    objects = metrics["objects"]
    assert f"CUMedVision2, by objects: Dice {objects['dice']:.3f} (published 0.868)" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| CUMedVision2 |")]
    assert "0.868" not in line  # no object's figure in a column of pixels


def test_a_title_says_what_was_scored(tmp_path):
    usual = settings_of(tmp_path, tmp_path, dataset_name="glas", eval_split="testB")
    assert title_of(usual) == "Table 4: GlaS, glands on testB: ours and the published figures"
    folded = title_of(replace(usual, folds=(0, 1)))
    assert folded == "Table 4: held-out folds of glas, and the published figures"
    other = title_of(replace(usual, eval_split="testA"))
    assert other == "Table 4: glas, scored on testA, not testB, and the published figures"


def test_a_split_that_is_not_the_papers_is_not_held_against_it(folder, tmp_path, monkeypatch):
    paper = replace(TABLES["table4"], dataset="discs", split="test")
    monkeypatch.setitem(TABLES, "table4", paper)
    compared = "mIoU, ours less paper"
    for split, is_said in (("test", False), ("other", True)):
        settings = settings_of(folder, tmp_path / split, eval_split=split)
        assert (compared not in write(settings)) == is_said
        table = (tmp_path / split / "table.md").read_text()
        assert ("Ours were scored on other, the published ones on test" in table) == is_said


def test_table_3_is_of_single_classes_and_takes_the_runs_of_table_2(
    folder, tmp_path, quick, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    common = ["--dataset", str(folder / "data" / "discs.toml"), "--model", str(folder / "micro")]
    common += ["--seeds", "0", "--jobs", "1"]
    assert run(["reproduce", "table2", *common, "--rows", "conditioned"]) == 0
    done = len(quick)
    assert run(["reproduce", "table3", *common]) == 0
    assert len(quick) == done
    text = (tmp_path / "reproduction/table3/table.md").read_text()
    metrics = json.loads(
        (tmp_path / "reproduction/table2/runs/conditioned-seed0/eval-test/metrics.json").read_text()
    )
    # Another data set's own classes, the ones with most pixels first; nothing published fits them.
    names = [one["name"] for one in sorted(metrics["per_class"], key=lambda one: -one["pixels"])]
    title, _, header, _, *lines = text.splitlines()
    assert title == "# Table 3 on discs, not bcss: a stand-in"
    assert header.startswith(f"| row | ours is | IoU {names[0]} ours | IoU {names[1]} ours |")
    (ours,) = [line for line in lines if line.startswith("| PathSegDiff |")]
    assert f"{metrics['per_class'][0]['iou']:.3f}" in ours
    assert f"{metrics['miou']:.3f}" in ours and "0.710" not in ours
    assert "weakly supervised" not in text and "published only" not in text
    page = (tmp_path / "reproduction/table3/report.html").read_text()
    assert 'href="../table2/runs/conditioned-seed0/eval-test/report.html"' in page


def test_windows_with_dont_care_and_five_classes_make_tables_2_and_3(
    folder, tmp_path, quick, monkeypatch
):
    """BCSS' shape: 22 codes in five classes, windows of 800 px at half the images' resolution."""
    monkeypatch.chdir(tmp_path)
    common = ["--dataset", str(make_bcss(tmp_path, patch_px=256)), "--seeds", "0", "--jobs", "1"]
    common += ["--model", str(folder / "micro")]
    rows = "conditioned,null,tokens,res-unet"
    assert run(["reproduce", "table2", *common, "--rows", rows]) == 0
    out = tmp_path / "reproduction"
    text = (out / "table2/table.md").read_text()
    assert text.startswith("# Table 2 on bcsslike, not bcss: a stand-in")
    # Rows that only were not asked for are no rows that nobody can run.
    assert text.count("| 1 of 1 |") == 4 and text.count("| not run |") == 1
    assert "published only" not in text
    counted = set()
    for row in rows.split(","):
        found = json.loads((out / f"table2/runs/{row}-seed0/eval-test/metrics.json").read_text())
        counted.add(sum(sum(line) for line in found["confusion"]["counts"]))
        assert [one["name"] for one in found["per_class"]] == found["confusion"]["names"]
    assert len(counted) == 1  # the same pixels, don't care left out of all
    config = json.loads((out / "table2/runs/conditioned-seed0/config.json").read_text())
    assert config["head"]["num_outputs"] == 6
    metrics = json.loads((out / "table2/runs/conditioned-seed0/eval-test/metrics.json").read_text())
    assert metrics["provenance"]["interval_unit"] == "source images"
    assert run(["reproduce", "table3", *common]) == 0
    text = (out / "table3/table.md").read_text()
    pixels = {one["name"]: one["pixels"] for one in metrics["per_class"]}
    least = min(pixels, key=pixels.get)
    assert all((f"| IoU {name} ours |" in text) == (name != least) for name in pixels)


def test_a_row_of_objects_needs_objects(folder, tmp_path, quick, capsys):
    toml = (folder / "data" / "discs.toml").read_text()
    plain = tmp_path / "plain"
    shutil.copytree(folder / "data", plain)
    (plain / "discs.toml").write_text(toml.replace('objects = "disc"\n', ""))
    dataset = ["--dataset", str(plain / "discs.toml"), "--model", str(folder / "micro")]
    table = ["reproduce", "table4", *dataset, "--out", str(tmp_path / "t")]
    assert run([*table, "--rows", "dcan,tokens"]) == 1
    assert "numbers none in whole images; --rows tokens" in capsys.readouterr().err
    assert not quick and not (tmp_path / "t").exists()
    assert run([*table, "--rows", "dcan"]) == 1
    assert "choose another row" in capsys.readouterr().err
    # Of the table's own rows it is left out, as make DATASET=... could not name others.
    assert run([*table, "--table-only"]) == 0
    said = capsys.readouterr().out
    assert "left out: the row dcan learns the contours of objects" in said
    assert said.count("| 0 of 3, incomplete |") == len(TABLE_ROWS["table4"].split(",")) - 1


def test_the_qualitative_figure_shows_every_row_from_the_worst_to_the_best(
    folder, tmp_path, quick, capsys
):
    out = tmp_path / "t"
    command = ["reproduce", "qualitative", "--dataset", str(folder / "data" / "discs.toml")]
    command += ["--runs", str(out), "--out", str(tmp_path / "q"), "--jobs", "1"]
    command += ["--model", str(folder / "micro"), "--precision", "float32"]
    assert run([*command, "--rows", "conditioned"]) == 0  # rows without a run are made
    assert run([*command, "--rows", "tokens,conditioned"]) == 0
    trained = [words for words in quick if words[0] == "train-head"]
    assert len(trained) == 2
    capsys.readouterr()
    assert run(command) == 0
    said = capsys.readouterr().out
    assert [words for words in quick if words[0] == "train-head"] == trained
    with Image.open(tmp_path / "q" / "qualitative.png") as picture:
        wide, high = picture.size
    assert wide > 4 * 320 and high > 2 * 320
    metrics = json.loads((out / "runs/conditioned-seed0/eval-test/metrics.json").read_text())
    ordered = sorted(metrics["images"], key=lambda image: image["dice"])
    assert said.startswith(", ".join(image["sample_id"] for image in ordered))
    with (tmp_path / "q" / "table.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["image", "Dice, PathSegDiff", "Dice, tokens"]
    assert [line[:2] for line in lines] == [
        [image["sample_id"], f"{image['dice']:.3f}"] for image in ordered
    ]
    page = (tmp_path / "q" / "report.html").read_text()
    assert "data:image/png;base64," in page and "tokens-seed0/eval-test/report.html" in page
    assert run([*command, "--rows", "tokens", "--images", "test_1", "--count", "1"]) == 0
    with Image.open(tmp_path / "q" / "qualitative.png") as picture:
        assert picture.size[0] < wide and picture.size[1] < high
    for options, message in (
        (["--images", "nobody"], "image 'nobody' is not among those of test"),
        (["--rows", "null", "--model", "absent"], "missing: model absent"),
        (["--rows", "null", "--precision", "auto"], "made with --precision float32"),
        (["--rows", "what"], "no row is called 'what'"),
    ):
        assert run([*command, *options]) == 1
        assert message in capsys.readouterr().err
    dataset = open_dataset(folder / "data" / "discs.toml")
    for rows_, seed, message in (([], 3, "any row with seed 3"), (["null"], 0, "null")):
        with pytest.raises(RunError, match=f"has no scored run of {message}"):
            draw_qualitative(
                dataset, out, tmp_path / "q", rows=rows_, split="test", seed=seed, made_with=""
            )
    # what is not typed is as the runs are; what is typed is not passed over
    usual = command[: command.index("--model")]
    assert run([*usual, "--count", "1"]) == 0
    table = (tmp_path / "q" / "table.md").read_text()
    assert "model micro, budget short, precision float32" in table
    assert "Images of test of discs, the worst of PathSegDiff" in table
    assert run([*usual, "--budget", "full"]) == 1
    assert "was made with --budget short" in capsys.readouterr().err
    (out / "runs/tokens-seed0/eval-test/predictions/test_0.png").unlink()
    assert run(command) == 1
    assert "test_0.png is missing: score the run again" in capsys.readouterr().err
    (out / "runs/tokens-seed0/eval-test/metrics.json").write_text('{"images": [')
    assert run([*usual, "--rows", "tokens"]) == 1
    assert "metrics.json is damaged (JSONDecodeError" in capsys.readouterr().err


def test_the_qualitative_figure_finds_the_table_of_its_data(tmp_path):
    for name, usual in (("glas", "table4"), ("bcss", "table2"), ("mine", "table4")):
        assert table_of(name, tmp_path) == (usual, tmp_path / usual)
    for table, name in (("table2", "mine"), ("table4", "glas")):
        (tmp_path / table).mkdir()
        (tmp_path / table / "settings.json").write_text(json.dumps({"--dataset": name}))
    assert table_of("mine", tmp_path) == ("table2", tmp_path / "table2")
    (tmp_path / "table4/settings.json").write_text("[")
    assert table_of("glas", tmp_path) == ("table4", tmp_path / "table4")


def test_table_3_of_bcss_holds_its_four_classes_against_the_published_ones():
    classes = ["tumor", "stroma", "inflammatory", "necrosis", "other"]
    per_class = [
        {"name": name, "iou": 0.5 + 0.1 * k, "pixels": k} for k, name in enumerate(classes)
    ]
    found = columns_of(TABLES["table3"], same_dataset=True, metrics=[])
    assert list(found.titles.values()) == ["IoU TUM", "IoU STR", "IoU LYM", "IoU NEC", "mIoU of 4"]
    figures = found.figures({"per_class": per_class})
    assert (
        figures["TUM"] == 0.5 and figures["NEC"] == 0.8 and figures["mean"] == pytest.approx(0.65)
    )
    per_class[3]["iou"] = None
    assert found.figures({"per_class": per_class})["mean"] is None


def test_random_weights_are_made_in_the_models_shapes(folder, tmp_path, quick):
    settings = settings_of(folder, tmp_path / "t", rows=("random",))
    make_runs(settings, jobs=1, threads=None, log=lambda line: None)
    assert quick[0][quick[0].index("--out") + 1].endswith("features/random.zarr")
    assert len(collect(settings)[1][-1].runs) == 1
    digests = (read_card(folder / "micro").sha256, "f" * 64)
    refuse_others(replace(settings, random_sha256=digests[0]))
    with pytest.raises(RunError, match="random-seed0 was made with another model of this name"):
        refuse_others(replace(settings, random_sha256=digests[1]))
    other = replace(settings, random=tmp_path / "none", out=tmp_path / "u")
    with pytest.raises(RunError, match="no preset with the"):
        make_runs(other, jobs=1, threads=None, log=lambda line: None)
    wrong = replace(settings, model="tiny", out=tmp_path / "v")
    with pytest.raises(RunError, match="has not the shapes of tiny"):
        make_runs(wrong, jobs=1, threads=None, log=lambda line: None)


def test_what_is_missing_is_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make, "find_spec", lambda name: None)
    model, data, package = missing_things("glas", tmp_path, "absent", ["null", "res-unet"])
    assert "; `psd models pull ssl-ldm-brca` gets the paper's weights" in model
    assert "psd models import" in model
    assert str(tmp_path) in data
    assert "`psd data fetch glas` gets it" in data
    assert "pip install 'pathsegdiff[baselines]'" in package
    assert run(["reproduce", "table2", "--data-root", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "table2 needs 3 more things, listed above" in capsys.readouterr().err


def test_an_unconditional_model_of_its_own_stands_in_the_null_row(folder, tmp_path, quick, capsys):
    other = tmp_path / "other"
    preset = ["--preset", "micro", "--seed", "1", "--out", str(other)]
    assert run(["models", "init", *preset]) == 0
    out = tmp_path / "t"
    command = ["reproduce", "table4", "--dataset", str(folder / "data" / "discs.toml")]
    command += ["--model", str(folder / "micro"), "--t", "100", "--seeds", "0", "--jobs", "1"]
    command += ["--out", str(out)]
    both = [*command, "--rows", "conditioned,null", "--unconditional"]
    assert run([*both, str(tmp_path / "absent")]) == 1
    assert "missing: --unconditional" in capsys.readouterr().err
    assert run([*both, str(other)]) == 0
    extractions = [line for line in quick if line[0] == "extract"]
    assert [line[line.index("--cond") + 1] for line in extractions] == ["none", "encoder"]
    assert [line[line.index("--model") + 1] for line in extractions] == [
        str(other), str(folder / "micro")
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "PathSegDiff-uncond: the bundle micro-seed1, conditioned on nothing." in said
    read = json.loads((out / "runs/null-seed0/config.json").read_text())
    assert read["model"]["name"] == "micro-seed1"
    # their predictions are drawn as they are, by no option more
    drawn = ["reproduce", "qualitative", *command[2:4], "--out", str(tmp_path / "drawn")]
    assert run([*drawn, "--runs", str(out), "--count", "1"]) == 0
    assert {path.name for path in (tmp_path / "drawn").iterdir()} >= {"qualitative.png"}

    # rows that do not read it may come without it; the row itself may not change its model
    assert run([*command, "--rows", "conditioned"]) == 0
    later = [*command[:-1], str(tmp_path / "later"), "--rows"]
    assert run([*later, "conditioned"]) == 0
    assert run([*later, "conditioned,null", "--unconditional", str(other)]) == 0
    assert run([*command, "--rows", "null"]) == 1
    assert "made with --unconditional micro-seed1, this asks for None" in capsys.readouterr().err
    alone = [*command, "--rows", "null", "--unconditional", str(other)]
    alone[alone.index("--model") + 1] = "absent"
    assert run(alone) == 0


def test_networks_begin_with_weights_at_hand_and_their_row_says_so(
    folder, tmp_path, quick, capsys, monkeypatch
):
    encoders = {name: architecture.encoder for name, architecture in ARCHITECTURES.items()}
    for name, row in ROWS.items():
        assert row.encoder is None or row.encoder == encoders[name]
    file, other = tmp_path / "resnet18.pth", tmp_path / "other.pth"
    for path, seed in ((file, 5), (other, 6)):
        torch.save(build_network("res-unet", 2, seed=seed).encoder.state_dict(), path)
    out = tmp_path / "t"
    command = ["reproduce", "table4", "--dataset", str(folder / "data" / "discs.toml")]
    command += ["--rows", "res-unet", "--seeds", "0", "--jobs", "1", "--out", str(out)]
    weights = ["--encoder-weights", f"resnet18={file}"]
    assert run([*command, "--encoder-weights", f"resnet50={file}"]) == 2
    assert "ENCODER one of resnet18, vgg16_bn" in capsys.readouterr().err
    assert run([*command, "--encoder-weights", "resnet18=absent.pth"]) == 1
    assert "missing: --encoder-weights resnet18=absent.pth" in capsys.readouterr().err
    assert run([*command, *weights, "--encoder-weights", "vgg16_bn=absent.pth"]) == 0
    assert "U-Net with a ResNet-18 encoder, encoder from resnet18.pth" in capsys.readouterr().out
    config = json.loads((out / "runs/res-unet-seed0/config.json").read_text())
    assert config["network"]["encoder_weights"]["sha256"] == file_sha256(file)
    done = len(quick)
    assert run([*command, *weights]) == 0 and len(quick) == done
    for asked, digest in (([], "none"), (["--encoder-weights", f"resnet18={other}"], "sha256")):
        assert run([*command, *asked]) == 1
        assert f"than this asks for ({digest}" in capsys.readouterr().err
    assert run([*command, *weights, "--table-only"]) == 0
    drawn = ["reproduce", "qualitative", *command[2:4], "--runs", str(out)]
    drawn += ["--out", str(tmp_path / "drawn"), "--count", "1", "--model", str(folder / "micro")]
    assert run(drawn) == 0 and run([*drawn, *weights]) == 0
    assert run([*drawn, "--encoder-weights", f"resnet18={other}"]) == 1
    assert "than this asks for (sha256" in capsys.readouterr().err
    # figures of an earlier stage of the same network are made again
    metrics = out / "runs/res-unet-seed0/eval-test/metrics.json"
    found = json.loads(metrics.read_text())
    found["provenance"]["network"]["kept"]["step"] = 1
    metrics.write_text(json.dumps(found))
    assert run([*command, *weights]) == 0 and len(quick) == done + 1
    assert json.loads(metrics.read_text())["provenance"]["network"]["kept"]["step"] == 2
    monkeypatch.setattr(
        "pathsegdiff.pipeline.baselines.imagenet_files.imagenet_file", lambda _: file
    )
    assert run([*command, "--encoder-weights", "imagenet", "--table-only"]) == 0
    file.unlink()
    assert run([*command, *weights, "--table-only"]) == 1
    assert "cannot be read: No such file" in capsys.readouterr().err


def test_runs_of_another_model_of_the_same_name_are_refused(folder, tmp_path, quick, capsys):
    command = ["reproduce", "table4", "--dataset", str(folder / "data" / "discs.toml")]
    command += [
        "--rows",
        "conditioned",
        "--seeds",
        "0",
        "--jobs",
        "1",
        "--out",
        str(tmp_path / "t"),
    ]
    assert run([*command, "--model", str(folder / "micro")]) == 0
    other = tmp_path / "micro"
    assert run(["models", "init", "--preset", "micro", "--seed", "1", "--out", str(other)]) == 0
    card = other / "model.json"
    card.write_text(card.read_text().replace("micro-seed1", "micro"))
    capsys.readouterr()
    assert run([*command, "--model", str(other)]) == 1
    said = capsys.readouterr().err
    assert "conditioned-seed0 was made with another model of this name: sha256" in said


def test_a_model_without_an_encoder_makes_the_null_row_alone(folder, tmp_path, quick, capsys):
    blind = tmp_path / "blind"
    shutil.copytree(folder / "micro", blind)
    (blind / "encoder/config.json").write_text(
        json.dumps({"architecture": "none", "embed_dim": 32, "image_size": 256})
    )
    save_file({}, blind / "encoder/model.safetensors")
    card = json.loads((blind / "model.json").read_text())
    card["files"] |= {name: file_sha256(blind / name) for name in card["files"]}
    (blind / "model.json").write_text(json.dumps(card))

    command = ["reproduce", "table4", "--dataset", str(folder / "data" / "discs.toml")]
    command += ["--model", str(blind), "--seeds", "0", "--jobs", "1", "--out", str(tmp_path / "t")]
    assert run([*command, "--rows", "conditioned,null,ddpm-seg"]) == 1
    said = capsys.readouterr().err
    assert "has no patch encoder, which the rows conditioned, ddpm-seg need; --rows null" in said
    assert run([*command, "--rows", "null"]) == 0
    assert [line[0] for line in quick] == ["extract", "train-head", "eval"]
    assert "--tokens" not in quick[0] and quick[0][quick[0].index("--cond") + 1] == "none"


def test_runs_of_other_settings_in_the_same_folder_are_refused(folder, tmp_path, quick, capsys):
    command = ["reproduce", "table4", "--dataset", str(folder / "data" / "discs.toml")]
    command += ["--rows", "null,null", "--jobs", "1", "--out", str(tmp_path / "t")]
    model = ["--model", str(folder / "micro")]
    assert run([*command, *model, "--seeds", "0,0"]) == 0
    assert "| 1 of 1 |" in capsys.readouterr().out
    done = len(quick)
    for options, said in (
        (["--model", "tiny"], "--model micro, this asks for tiny"),
        ([*model, "--t", "100"], "--t 50, this asks for 100"),
        ([*model, "--budget", "full"], "--budget short: "),
    ):
        assert run([*command, *options]) == 1
        assert said in capsys.readouterr().err
    assert len(quick) == done
    (tmp_path / "t/runs/null-seed1").write_text("in the way")
    assert run([*command, *model, "--seeds", "0,1"]) == 1
    assert "1 runs failed (null-seed1)" in capsys.readouterr().err
    assert "1 of 2, incomplete" in (tmp_path / "t" / "table.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "conditioned,what"], "no row is called 'what'; there are conditioned"),
        (["--folds", "x"], "'x' is not a number, or numbers with commas between"),
        (["--seeds", "x"], "'x' is not a number, or numbers with commas between"),
        (["--seeds", "-1"], "seeds are from 0 to 2^63 - 1"),
        (["--limit-images", "0"], "must be numbers, or all, such as 5,20,all, got '0'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message, capsys):
    assert run(["reproduce", "table4", *options]) != 0
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--budget must be one of short, full, got 'x'"):
        settings_of(Path(), Path(), budget="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["table4", "--rows", "null", "--folds", "9"], "fold"),
        (["table4", "--rows", "null", "--eval-split", "nosuch"], "has no split 'nosuch'"),
        (["fig4", "--folds", "0,x"], "'0,x' is not a number"),
        (["fig4", "--folds", "9"], "fold"),
        (["fig4", "--t", "50,x"], "'50,x' is not a number"),
        (["fig5", "--seeds", "zero"], "'zero' is not a number"),
        (["table5", "--lr", "1e-3,abc"], "'1e-3,abc' is not a number"),
        (["table5", "--lr", "1e-3,0"], "must be a number above 0, got 0"),
        (["table5", "--lr", ""], "'' is not a number"),
        (["fig4", "--t", "50,1000"], "t must be in [0, 999] for model micro"),
        (["table4", "--rows", "null", "--t", "5000"], "t must be in [0, 999] for model micro"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_extracted(
    folder, tmp_path, quick, capsys, options, message
):
    place = ["--dataset", str(folder / "data" / "discs.toml"), "--model", str(folder / "micro")]
    assert run(["reproduce", *options, *place, "--out", str(tmp_path / "t")]) != 0
    assert message in capsys.readouterr().err
    assert not quick and not (tmp_path / "t").exists()


def test_every_finished_run_is_held_against_what_is_asked_for(folder, tmp_path, quick, monkeypatch):
    pytest.importorskip("segmentation_models_pytorch")
    budget = replace(
        rows.BUDGETS["short"], ensemble=("--val", "0", "--keep", "last", "--steps", "2")
    )
    monkeypatch.setitem(rows.BUDGETS, "short", budget)
    out = tmp_path / "t"
    card = read_card(folder / "micro")
    settings = settings_of(
        folder,
        out,
        rows=("conditioned", "res-unet", "ddpm-seg"),
        model_sha256=card.sha256,
        dataset_sha256=open_dataset(folder / "data" / "discs.toml").sha256,
    )
    refuse_others(settings)
    assert make_runs(settings, jobs=1, threads=None, log=lambda line: None) == []
    refuse_others(settings)

    @contextmanager
    def changed(run_of, *keys, value):
        file = out / "runs" / run_of / "config.json"
        text = file.read_text()
        config = json.loads(text)
        part = config
        for key in keys[:-1]:
            part = part[key]
        assert part[keys[-1]] != value
        part[keys[-1]] = value
        file.write_text(json.dumps(config))
        yield
        file.write_text(text)

    other = "0" * 64
    for run_of, keys, value, message in (
        ("res-unet-seed0", ("settings", "steps"), 5, "made with --steps 5, this asks for 2"),
        ("res-unet-seed0", ("settings", "size_px"), 96, "made with --size 96, this asks for 64"),
        ("res-unet-seed0", ("settings", "limit"), 2, "made with --limit-images 2, this asks for N"),
        ("res-unet-seed0", ("settings", "precision"), "bfloat16", "trained in bfloat16"),
        ("res-unet-seed0", ("dataset_sha256",), other, "other regions or classes of discs"),
        ("conditioned-seed0", ("settings", "keep"), "best", "made with --keep best"),
        ("conditioned-seed0", ("model", "sha256"), other, "another model of this name"),
        (
            "conditioned-seed0",
            ("features", "recipe", "timestep"),
            400,
            "made with features of t = 400, this asks for 50",
        ),
        ("ddpm-seg-seed0", ("network", "model_sha256"), other, "another model of this name"),
        ("ddpm-seg-seed0", ("network", "timesteps"), [50], "made with features of t = 50, this"),
    ):
        with changed(run_of, *keys, value=value), pytest.raises(RunError, match=message):
            refuse_others(settings)
    # Also where the folder's own file is gone or says nothing.
    (out / "settings.json").write_text("{}")
    with pytest.raises(RunError, match="settings.json is damaged"):
        refuse_others(settings)
    (out / "settings.json").unlink()
    refuse_others(settings)
    with pytest.raises(RunError, match="this asks for"):
        refuse_others(replace(settings, budget="full"))
    free = replace(settings, precision="auto")
    refuse_others(free)
    precision = changed("res-unet-seed0", "settings", "precision", value="bfloat16")
    with precision, pytest.raises(RunError, match="trained in different precisions: .* in bfloat"):
        refuse_others(free)
    # A folder in which nothing was made binds nobody.
    empty = replace(settings, out=tmp_path / "empty")
    empty.out.mkdir()
    write_signature(replace(empty, timestep=999))
    refuse_others(empty)


def test_rows_without_all_runs_are_compared_where_both_have_them():
    def row(values):
        runs = tuple(
            {"seed": seed, "fold": fold, "miou": value, "path": f"{seed}-{fold}"}
            for (seed, fold), value in values.items()
        )
        return TableRow(
            name="n", title="n", limit=None, runs=runs, planned=4, folds=2, published=None
        )

    ours = row({(0, 0): 0.7, (0, 1): 0.5, (1, 0): 0.7, (1, 1): 0.5})
    # Its first seed lacks a fold: the second counts, by itself.
    partial = row({(0, 0): 0.68, (1, 0): 0.68, (1, 1): 0.51})
    assert list(partial.files()) == [1] and list(ours.files()) == [0, 1]
    assert partial.mean("miou") == pytest.approx(0.6233, abs=1e-4)
    assert partial.means_beside(ours, "miou") == (
        pytest.approx(0.6233, abs=1e-4),
        pytest.approx(0.6333, abs=1e-4),
    )
    assert row({}).means_beside(ours, "miou") is None


def test_an_interrupt_ends_every_command_with_a_checkpoint(folder, tmp_path):
    """As Ctrl-C does it: to the whole group; and a second call goes on from there."""
    out = tmp_path / "t"
    script = (
        "import sys; from dataclasses import replace; from cli.main import run\n"
        "from pathsegdiff.pipeline.tables import rows\n"
        "head = ('--val', '0', '--keep', 'last', '--steps', '100000', '--crop', '256')\n"
        "rows.BUDGETS['short'] = replace(rows.BUDGETS['short'], head=head)\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    command = ["reproduce", "table4", "--rows", "conditioned", "--seeds", "0,1", "--jobs", "2"]
    command += ["--dataset", str(folder / "data" / "discs.toml"), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command, "--model", str(folder / "micro")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    logs = [out / "logs" / f"conditioned-seed{seed}.txt" for seed in (0, 1)]
    deadline = time.monotonic() + 120
    while not all(log.exists() and "/100000 steps" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, 2)
    said = process.communicate(timeout=120)[0].decode()
    assert process.returncode != 0
    assert "Traceback" not in said
    for seed in (0, 1):
        assert (out / "runs" / f"conditioned-seed{seed}" / "checkpoint.pt").exists()
        assert "Traceback" not in logs[seed].read_text()


def test_published_rates_stand_beside_ours_of_the_same_data():
    said = curves.about(
        "table5", dataset="bcss", model="m", folds=None, budget="full", timesteps=(50,)
    )
    assert said.same_data and said.reference == ("lr", 1e-4)
    assert said.published[1e-4] == {"accuracy": 0.826, "miou": 0.646, "dice": 0.780}
    assert not any("do not compare" in note for note in said.notes)
    assert not curves.about(
        "fig5", dataset="bcss", model="m", folds="0", budget="short", timesteps=(50,)
    ).published


@pytest.mark.parametrize(
    ("name", "options", "lines"),
    [
        ("fig4", ["--t", "10,50"], 2),
        ("fig5", [], 14),
        ("table5", ["--lr", "1e-3,1e-4"], 2),
    ],
)
def test_curves_are_sweeps_of_stores_that_are_extracted_once(
    folder, tmp_path, monkeypatch, capsys, name, options, lines
):
    monkeypatch.setattr(curves, "_SHORT", "--steps 1 --batch-size 2 --crop 256 --keep last")
    command = ["reproduce", name, "--dataset", str(folder / "data" / "discs.toml"), *options]
    command += ["--model", str(folder / "micro"), "--out", str(tmp_path / "c"), "--jobs", "1"]
    if name == "fig5":  # two of the fourteen heads are enough
        real = curves.sweep_command
        monkeypatch.setattr(
            curves,
            "sweep_command",
            lambda *a, **k: [
                "--taps=up_05" if part == "each" else part
                for part in real(*a, **k)
                if part != "--taps"
            ],
        )
        lines = 1
    assert run(command) == 0
    said = capsys.readouterr().out
    table = (tmp_path / "c" / "table.md").read_text().splitlines()
    assert len([line for line in table if line.startswith("| ")]) == lines + 2
    title = {"fig4": "Figure 4: the", "fig5": "Figure 5: each", "table5": "Table 5: the"}[name]
    assert table[0].startswith(f"# {title}") and table[0].endswith(", on discs")
    assert ("not on bcss: the published do not compare" in said) == (name == "table5")
    assert ("| 0.646 |" in said) == (name == "table5")
    assert "less published" not in said
    page = (tmp_path / "c" / "report.html").read_text()
    assert table[0][2:] in page and "data:image/png;base64," in page
    assert len(list((tmp_path / "c" / "features").glob("*.zarr"))) == (2 if name == "fig4" else 1)


def test_parameters_are_counted_in_the_networks(tmp_path, capsys):
    out = tmp_path / "table1"
    assert run(["reproduce", "table1", "--out", str(out)]) == 0
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "| SSL-guided LDM | 478,619,777 | 478,619,777 | +0 |" in text
    assert "| FCN | 17,470,150 | 17,470,150 | +0 |" in text
    assert "| HIPT | 21,688,704 | 21,665,664 | +23,040 |" in text
    with (out / "table.csv").open(newline="") as file:
        assert [len(line) for line in csv.reader(file)] == [4] * 4
    assert "published" in (out / "report.html").read_text()
    with Image.open(out / "plot.png") as drawn:
        assert drawn.width > 400
    counted, printed = re.search(r"\| HIPT \| ([\d,]+) \| ([\d,]+) \|", text).groups()
    difference = int(counted.replace(",", "")) - int(printed.replace(",", ""))
    assert difference == 60 * 384


def test_every_published_row_that_is_ours_exists():
    for table in TABLES.values():
        ours = [row.ours for row in table.rows if row.ours is not None]
        assert len(set(ours)) == len(ours)
        assert set(ours) <= set(ROWS)
        columns = {*table.classes, MEAN} if table.classes else set(COLUMNS)
        for row in table.rows:
            assert set(row.figures) <= columns
            assert all(0 < value < 1 for value in row.figures.values())
