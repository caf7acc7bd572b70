import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from cli.baseline import HEADS, NAMES
from cli.main import run
from tests.helpers_data import make_glas

# Not imported here: timm comes first, whose import mends torchvision (diffusion.third_party).
if find_spec("segmentation_models_pytorch") is None:
    pytest.skip("the extra `baselines` is not installed", allow_module_level=True)

SHORT = ("--size", "64", "--steps", "3", "--batch-size", "2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a small data set."""
    make_glas(tmp_path, counts={"train": 6, "testA": 2, "testB": 2})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_row_is_trained_scored_and_said(folder, capsys):
    assert run(["baseline", "res-unet", "--dataset", "glaslike.toml", *SHORT]) == 0
    said = capsys.readouterr().out
    name = "glaslike-res-unet-size-64-steps-3-batch-2"
    assert f"runs/{name}: res-unet, 4 images of glaslike train and 2 validate, 3 steps" in said
    assert "at most 8 validations without improvement" in said
    assert "3 steps in " in said
    assert "kept: step " in said
    metrics = json.loads((folder / "runs" / name / "eval-testB" / "metrics.json").read_text())
    assert f"{'mIoU':18} {metrics['miou']:.4f}" in said
    assert f"object F1          {metrics['objects']['f1']:.4f}" in said
    assert f"report: runs/{name}/eval-testB/report.html" in said


def test_the_same_command_again_only_scores_again(folder, capsys):
    command = ["baseline", "res-unet", "--dataset", "glaslike.toml", *SHORT, "--out", "mine"]
    assert run(command) == 0
    assert run([*command, "--eval-split", "testA"]) == 0
    assert "mine has finished before, after 3 steps" in capsys.readouterr().out
    assert (folder / "mine" / "eval-testA" / "report.html").is_file()


def test_options_reach_the_training(folder):
    options = ["--lr", "0.01", "--val", "testA", "--limit-images", "2", "--seed", "3"]
    more = ["--split", "train", "--precision", "bfloat16", "--device", "cpu", "--out", "x"]
    root = ["--data-root", str(folder / "glaslike")]
    command = ["baseline", "effnet-unet", "--dataset", "glaslike.toml", *SHORT]
    assert run([*command, *options, *more, *root]) == 0
    config = json.loads((folder / "x" / "config.json").read_text())
    assert config["settings"] == {
        "name": "effnet-unet",
        "split": "train",
        "val": "testA",
        "fold": None,
        "limit": 2,
        "size_px": 64,
        "steps": 3,
        "minutes": None,
        "batch_size": 2,
        "learning_rate": 0.01,
        "keep": "best",
        "precision": "bfloat16",
        "seed": 3,
        "encoder_weights": None,
    }
    assert len(config["samples"]["train"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "nothing"], "no data set is called 'nothing'"),
        (["--size", "100"], "--size must be a multiple of 32"),
        (["--minutes", "0"], "--minutes must be a number above 0"),
        (["--lr", "-1"], "--lr must be a number above 0"),
        (["--val", "2"], "--val must be a fraction from 0 to below 1, or a split, got 2"),
        (["--split", "x"], "data set glaslike has no complete sample of split 'x'"),
        (["--eval-split", "x"], "no image of split 'x' is here"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_1(folder, capsys, options, message):
    assert run(["baseline", "res-unet", "--dataset", "glaslike.toml", *options]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in "".join(said)
    assert not (folder / "runs").exists()


def test_a_missing_package_is_one_line(folder, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    assert run(["baseline", "res-unet", "--dataset", "glaslike.toml", *SHORT]) == 1
    assert "pip install 'pathsegdiff[baselines]'" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--steps", "1", "--minutes", "1"], ["--batch-size", "0"]])
def test_bad_usage_is_exit_code_2(folder, options):
    assert run(["baseline", "res-unet", "--dataset", "glaslike.toml", *options]) == 2
    assert run(["baseline", "unet", "--dataset", "glaslike.toml"]) == 2
    assert run(["baseline", "res-unet"]) == 2


def test_ctrl_c_is_130_and_the_run_goes_on_afterwards(folder, capsys, monkeypatch):
    from pathsegdiff.pipeline.baselines.train import BaselineTraining

    real = BaselineTraining.loss_of

    def interrupted(self, batch):
        if self.step == 2:
            raise KeyboardInterrupt
        return real(self, batch)

    command = ["baseline", "res-unet", "--dataset", "glaslike.toml", *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr(BaselineTraining, "loss_of", interrupted)
        assert run(command) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert run(command) == 0
    assert "continuing after step 2 of 3" in capsys.readouterr().err


def test_the_names_are_those_of_the_networks():
    from pathsegdiff.pipeline.baselines import ddpmseg
    from pathsegdiff.pipeline.baselines.networks import ARCHITECTURES

    assert (*HEADS, *ARCHITECTURES, ddpmseg.NAME) == NAMES


def test_heads_are_rows_by_their_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_glas(tmp_path, counts={"train": 3, "testB": 2}, region_px=256, patch_px=256)
    assert run(["models", "init", "--preset", "micro", "--out", "micro"]) == 0
    extract = ["extract", "--dataset", "glaslike.toml", "--model", "micro", "--cond", "both"]
    assert run([*extract, "--tokens", "--out", "features"]) == 0
    capsys.readouterr()
    store = "features/glaslike-micro-t50.zarr"
    null = "features/glaslike-micro-t50-null.zarr"
    short = ["--steps", "2", "--batch-size", "1", "--keep", "last"]
    for name, path in (("pathsegdiff", store), ("pathsegdiff-uncond", null), ("hipt", store)):
        assert run(["baseline", name, "--features", path, *short]) == 0
        made = tmp_path / "runs" / f"{Path(path).stem}-{name}-seed-0"
        settings = json.loads((made / "config.json").read_text())["settings"]
        assert ("tokens" in settings["taps"]) == (name == "hipt")
        assert settings["keep"] == "last"
        metrics = json.loads((made / "eval-testB" / "metrics.json").read_text())
        assert f"{'mIoU':18} {metrics['miou']:.4f}" in capsys.readouterr().out
    assert run(["baseline", "pathsegdiff-uncond", "--features", store]) == 1
    assert "extracted with --cond encoder, pathsegdiff-uncond reads" in capsys.readouterr().err
    for wrong in (["--dataset", "glaslike.toml"], ["--features", store, "--features", null]):
        assert run(["baseline", "hipt", *wrong]) == 2


def test_the_best_of_several_rates_on_validation_is_taken(folder, capsys):
    command = ["baseline", "res-unet", "--dataset", "glaslike.toml", "--size", "64"]
    command += ["--steps", "10", "--batch-size", "2", "--lr", "1e-8,1e-3", "--out", "mine"]
    assert run(command) == 0
    said = capsys.readouterr().out
    pilots = json.loads((folder / "mine" / "pilots.json").read_text())["validation_miou"]
    assert set(pilots) == {"1e-08", "0.001"}
    best = max(pilots, key=pilots.get)
    config = json.loads((folder / "mine" / "config.json").read_text())
    assert config["settings"]["learning_rate"] == float(best)
    assert f"learning rate {best}" in said
    pilot = json.loads((folder / "mine-pilot-lr0.001" / "config.json").read_text())
    assert pilot["settings"]["steps"] == 1
    # Again: nothing is trained anew.
    assert run(command) == 0
    assert "mine has finished before, after 10 steps" in capsys.readouterr().out


def test_a_rate_that_diverges_is_out(folder, capsys, monkeypatch):
    from pathsegdiff.pipeline.baselines.train import BaselineTraining

    real = BaselineTraining.loss_of

    def loss_of(self, batch):
        loss = real(self, batch)
        return loss * float("nan") if self.settings.learning_rate > 0.01 else loss

    monkeypatch.setattr(BaselineTraining, "loss_of", loss_of)
    command = ["baseline", "res-unet", "--dataset", "glaslike.toml", "--size", "64"]
    command += ["--steps", "10", "--batch-size", "2", "--out", "mine", "--lr"]
    assert run([*command, "1e-3,1"]) == 0
    pilots = json.loads((folder / "mine" / "pilots.json").read_text())["validation_miou"]
    assert pilots["1"] is None and pilots["0.001"] >= 0
    assert "the loss is nan at step 1" in capsys.readouterr().out
    assert run([*command, "1,2"]) == 1
    assert "no rate of 1, 2 has a validation score" in capsys.readouterr().err


def test_seeds_choose_their_rates_apart(folder):
    command = ["baseline", "res-unet", "--dataset", "glaslike.toml", *SHORT, "--lr", "1e-3,1e-4"]
    for seed in ("0", "1"):
        assert run([*command, "--seed", seed]) == 0
    assert len(list((folder / "runs").glob("*-lr-chosen-pilot-*"))) == 4


def test_rates_cannot_be_chosen_without_validation(folder, capsys):
    command = ["baseline", "res-unet", "--dataset", "glaslike.toml", *SHORT, "--val", "0"]
    assert run([*command, "--lr", "1e-3,1e-4"]) == 1
    assert "--val 0 leaves none; give one rate" in capsys.readouterr().err
    assert run([*command, "--lr", "fast"]) == 2
    assert "must be numbers such as 1e-3,3e-4, got 'fast'" in capsys.readouterr().err
    assert run(["baseline", "ddpm-seg", "--features", "x", "--lr", "1,2"]) == 2
    assert "ddpm-seg takes one --lr" in capsys.readouterr().err
