"""``psd models``."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import psd, run
from pathsegdiff.diffusion.bundle import load_bundle

GOLDEN = Path(__file__).parent / "golden"


def _run(*arguments):
    return CliRunner().invoke(psd, [str(argument) for argument in arguments])


def _import(case, out, *more):
    folder = GOLDEN / case
    return _run(
        "models",
        "import",
        "--ldm",
        folder / "ldm.ckpt",
        "--config",
        folder / "project.yaml",
        "--encoder",
        folder / "vit256.pth",
        "--encoder-config",
        folder / "encoder.json",
        "--out",
        out,
        *more,
    )


def test_init_writes_a_bundle_and_says_that_it_is_random(tmp_path):
    result = _run("models", "init", "--preset", "micro", "--seed", 3, "--out", tmp_path / "m")
    assert result.exit_code == 0, result.output
    assert (
        result.output == f"random weights: micro-seed3, 13 taps, 272 channels: {tmp_path / 'm'}\n"
    )
    assert not load_bundle(tmp_path / "m").card.trained


def test_import_counts_what_it_read(tmp_path):
    result = _import("vq_f4", tmp_path / "bundle", "--name", "small", "--random")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "871 tensors read, 0 missing, 0 unexpected",
        "left aside: buffers 4, inception. 1, model_ema. 2",
        "parameters: encoder 103,056, conditioner 2,368, autoencoder 729,406, unet 1,991,107",
        f"small, 13 taps, 544 channels: {tmp_path / 'bundle'}",
    ]
    assert not load_bundle(tmp_path / "bundle").card.trained


def test_show_says_what_matters(tmp_path):
    assert _import("kl_f8", tmp_path / "bundle", "--licence", "CC0").exit_code == 0
    text = _run("models", "show", tmp_path / "bundle").output
    for part in (
        "licence             CC0",
        "latent              4 x 32 x 32 (kl), scale 0.18215",
        "context             1 token",
        "schedule            scaled_linear 0.0015 to 0.0195, 1000 steps",
        "taps                13, 544 channels",
        "from: ldm           ldm.ckpt, sha256",
        "up_11 32@8",
    ):
        assert part in text


def test_list_names_what_is_there_and_what_is_broken(tmp_path, monkeypatch):
    monkeypatch.setenv("PSD_MODELS", str(tmp_path))
    _run("models", "init", "--preset", "micro", "--out", tmp_path / "mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.json").write_text(json.dumps({"format": 1}))
    lines = _run("models", "list").output.splitlines()
    assert lines[0].startswith("tiny  trained  1296 channels")
    assert lines[1].startswith("broken  unusable: ")
    assert lines[2].startswith("mine  random weights  272 channels")
    assert str(tmp_path) in lines[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nothing"], "no model called 'nothing'"),
        (["init", "--preset", "micro", "--out", str(GOLDEN)], "exists already"),
        (
            ["import", "--ldm", "a", "--config", "b", "--encoder", "c", "--out", "d"],
            "b does not exist",
        ),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_1(
    arguments, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert run(["models", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_every_command_shows_an_example():
    for command in ([], ["list"], ["show"], ["init"], ["import"]):
        assert "Example:" in _run("models", *command, "--help").output
