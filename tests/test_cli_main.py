"""``psd`` itself: help, version, exit codes."""

import pytest

from cli.main import COMMANDS, run
from pathsegdiff import __version__


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_shows_an_example(command, capsys):
    assert run([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example:" in out
    assert f"psd {command}" in out


def test_help_lists_every_command_and_version_is_the_packages(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in COMMANDS)
    assert run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_table_2_says_what_is_missing_and_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PSD_DATA", raising=False)
    assert run(["reproduce", "table2"]) == 1
    err = capsys.readouterr().err
    assert "missing: model bundle ssl-ldm-brca" in err
    assert "psd models import --ldm last.ckpt" in err
    assert "missing: data set bcss" in err
    assert err.strip().splitlines()[-1].startswith("Error: table 2 needs 2 more things")
