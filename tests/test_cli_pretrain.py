"""``psd pretrain``: all in turn, stopped and continued, refused."""

import pytest

from cli.main import run
from pathsegdiff.diffusion.bundle import load_bundle


@pytest.fixture
def common(tmp_path):
    out = str(tmp_path / "mine")
    return ["--preset", "micro", "--images", "demo", "--steps", "2", "--out", out]


@pytest.mark.parametrize("minutes", ["nan", "inf", "0"])
def test_a_time_limit_that_is_none_is_refused(common, tmp_path, minutes):
    assert run(["pretrain", "all", *common, "--minutes", minutes]) == 2
    assert not any(tmp_path.iterdir())


def test_all_makes_a_bundle_and_a_time_limit_stops_it_in_between(common, tmp_path, capsys):
    assert run(["pretrain", "all", *common, "--minutes", "1e-6"]) == 0
    assert "the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "mine").exists()
    assert run(["pretrain", "all", *common]) == 0
    assert "use it as --model" in capsys.readouterr().out
    card = load_bundle(tmp_path / "mine").card
    assert card.trained
    assert card.name == "mine"
    assert card.provenance["trained on"].endswith("images of demo")


def test_a_bundle_that_exists_is_not_overwritten(common, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert run(["pretrain", "all", *common]) == 1
    assert "exists already" in capsys.readouterr().err
