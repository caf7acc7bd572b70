import json
import shutil

import pytest

from cli.main import run
from tests.helpers_store import build_store

SHORT = ("--steps", "3", "--batch-size", "2", "--head-width", "8")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "features" / "shapes.zarr"
    build_store(path, train=4, test=2)
    return path


@pytest.fixture
def folder(built, tmp_path, monkeypatch):
    """A working folder with one complete store under features/."""
    shutil.copytree(built, tmp_path / "features" / "shapes.zarr")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_with_nothing_named_the_newest_store_is_trained_on_and_said(folder, capsys):
    assert run(["train-head", *SHORT]) == 0
    said = capsys.readouterr()
    assert "features: features/shapes.zarr (the newest complete store)" in said.out
    name = "shapes-steps-3-batch-2-width-8"
    assert f"runs/{name}: training on train, 3 steps, batches of 2 whole 64 px regions" in said.out
    assert "random weights" in said.err
    assert (folder / "runs" / name / "head.safetensors").is_file()
    assert "kept: step" in said.out


def test_the_same_command_again_says_that_it_has_finished(folder, capsys):
    command = ["train-head", *SHORT, "--out", "runs/mine"]
    assert run(command) == 0
    capsys.readouterr()
    assert run(command) == 0
    assert "runs/mine has finished before, after 3 steps; nothing to do" in capsys.readouterr().out


def test_options_reach_the_training(folder):
    options = ["--lr", "0.01", "--crop", "32", "--augment", "flips", "--seed", "3", "--val", "0"]
    more = ["--taps", "up_08,up_05", "--schedule", "cosine", "--normalize", "none"]
    precision = [
        "--precision",
        "bfloat16",
        "--device",
        "cpu",
        "--split",
        "train",
        "--limit-images",
        "2",
    ]
    assert run(["train-head", *SHORT, *options, *more, *precision, "--out", "runs/x"]) == 0
    settings = json.loads((folder / "runs" / "x" / "config.json").read_text())["settings"]
    assert settings == {
        "split": "train",
        "val": "0",
        "fold": None,
        "limit": 2,
        "epochs": None,
        "steps": 3,
        "batch_size": 2,
        "crop_px": 32,
        "learning_rate": 0.01,
        "schedule": "cosine",
        "taps": ["up_05", "up_08"],
        "head_width": 8,
        "augment": "flips",
        "normalize": "none",
        "keep": "last",
        "precision": "bfloat16",
        "seed": 3,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--features", "nowhere.zarr"], "nowhere.zarr"),
        (["--crop", "40"], "--crop must be a multiple of 32 px"),
        (["--taps", "up_99"], "no tap is called 'up_99'"),
        (["--val", "2"], "--val must be a fraction from 0 to below 1, or a split, got 2"),
        (["--split", "testZ"], "no complete sample of split 'testZ'"),
        (["--fold", "9"], "has the folds 1, 2"),
        (["--lr", "0"], "--lr must be a number above 0"),
        (["--head-width", "10"], "--head-width must be a multiple of 4"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_1(folder, capsys, options, message):
    assert run(["train-head", *options]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in "".join(said)
    assert not (folder / "runs").exists()


def test_without_a_store_the_remedy_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["train-head"]) == 1
    assert "no complete feature store under features/; make one with" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--crop", "large"], ["--epochs", "1", "--steps", "1"], ["--batch-size", "0"]]
)
def test_bad_usage_is_exit_code_2(folder, options):
    assert run(["train-head", *options]) == 2


def test_ctrl_c_is_130_and_the_run_goes_on_afterwards(folder, capsys, monkeypatch):
    from pathsegdiff.segmentation import loop, train

    real = train._Training._train_step

    def interrupted(self, batch):
        if self.step == 2:
            raise KeyboardInterrupt
        return real(self, batch)

    command = ["train-head", *SHORT, "--out", "runs/x"]
    with monkeypatch.context() as patch:
        patch.setattr(train._Training, "_train_step", interrupted)
        patch.setattr(loop, "_CHECKPOINT_SECONDS", -1.0)
        assert run(command) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert run(command) == 0
    assert "continuing after step 2 of 3" in capsys.readouterr().err


def test_no_space_left_is_one_line(folder, capsys, monkeypatch):
    import errno

    from pathsegdiff.segmentation import train

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train, "save_weights", full)
    assert run(["train-head", *SHORT]) == 1
    assert "no space left on the disk" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    assert run(["train-head", "--help"]) == 0
    assert "psd train-head --fold 0" in capsys.readouterr().out
