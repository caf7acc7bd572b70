import json
import shutil

import pytest

from cli.main import run
from tests.helpers_head import train_small
from tests.helpers_store import TISSUE, build_store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a store of glands, and a run on it."""
    folder = tmp_path_factory.mktemp("cli-eval")
    store = build_store(folder / "features" / "shapes.zarr", train=4, test=2)
    train_small(store, folder / "runs" / "shapes", steps=6)
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    shutil.copytree(made / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_with_nothing_named_the_newest_run_is_scored_and_said(folder, capsys):
    assert run(["eval"]) == 0
    said = capsys.readouterr().out
    assert "run: runs/shapes (the newest)" in said
    assert "note: random weights" in said
    metrics = json.loads((folder / "runs/shapes/eval-test/metrics.json").read_text())
    for name, key in (("accuracy", "accuracy"), ("Dice", "dice"), ("mIoU", "miou"), ("F1", "f1")):
        assert f"{name:18} {metrics[key]:.4f}" in said
    assert f"object F1          {metrics['objects']['f1']:.4f}" in said
    assert "report: runs/shapes/eval-test/report.html" in said


def test_run_split_features_and_out_can_be_named(folder, made, capsys):
    options = ["--features", str(made / "features" / "shapes.zarr"), "--out", "here"]
    assert (
        run(["eval", "--run", "runs/shapes", "--split", "train", "--device", "cpu", *options]) == 0
    )
    assert "among those it was trained on" in capsys.readouterr().out
    assert (folder / "here" / "report.html").is_file()


def test_a_data_set_without_objects_has_no_object_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store = build_store(tmp_path / "features" / "tissue.zarr", train=4, test=2, scheme=TISSUE)
    train_small(store, tmp_path / "runs" / "tissue", steps=2)
    assert run(["eval"]) == 0
    assert "object" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "runs/none"], "there is no run runs/none"),
        (["--run", "runs"], "runs is no run folder"),
        (["--split", "testZ"], "no complete sample of split 'testZ' (complete: test, train)"),
        (["--features", "gone.zarr"], "gone.zarr"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_1(folder, capsys, options, message):
    assert run(["eval", *options]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_store_that_moved_is_asked_for(folder, capsys):
    config = folder / "runs" / "shapes" / "config.json"
    values = json.loads(config.read_text())
    values["features"]["path"] = "/nowhere/shapes.zarr"
    config.write_text(json.dumps(values))
    assert run(["eval"]) == 1
    assert "is gone; say where it is with --features" in capsys.readouterr().err


def test_a_head_that_does_not_fit_the_store_is_one_line(folder, tmp_path, capsys):
    build_store(tmp_path / "other.zarr", train=2, test=1, timestep=100)
    assert run(["eval", "--features", "other.zarr"]) == 1
    assert "timestep 50, other.zarr has 100" in capsys.readouterr().err


def test_without_a_run_the_remedy_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["eval"]) == 1
    assert "no trained run under runs/; train one with `psd train-head`" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    assert run(["eval", "--help"]) == 0
    assert "psd eval --run" in capsys.readouterr().out
