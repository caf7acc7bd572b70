"""``psd`` itself: help, version, exit codes."""

import errno
import shlex

import pytest

from cli.main import COMMANDS, run
from pathsegdiff import __version__
from pathsegdiff.provenance import provenance
from tests.helpers_data import make_folders


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
    assert "missing: model ssl-ldm-brca" in err
    assert "`psd models pull ssl-ldm-brca` gets the paper's weights" in err
    assert "`psd data fetch bcss` gets it" in err
    assert "missing: data set bcss" in err
    assert err.strip().splitlines()[-1].startswith("Error: table2 needs 2 more things")


def test_a_file_where_a_folder_has_to_be_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    images, masks = make_folders(tmp_path / "mine")
    arguments = ["data", "init", "--images", str(images), "--masks", str(masks)]
    assert run([*arguments, "--out", str(tmp_path / "file" / "mine.toml")]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("Error: a ") and "choose another path" in err


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EEXIST, "a file stands where a folder has to be made; choose another path"),
        (errno.EISDIR, "a folder stands where a file has to be written; choose another path"),
        (errno.ELOOP, "the link leads back to itself; choose another path"),
        (errno.ENAMETOOLONG, "the name is too long; choose a shorter one"),
        (errno.ENOTDIR, "a part of the path is a file, not a folder; choose another path"),
    ],
)
def test_a_path_that_cannot_be_is_one_line_with_a_remedy(monkeypatch, capsys, number, message):
    def fail(**_):
        raise OSError(number, "no", "some/path")

    monkeypatch.setattr("cli.main.psd.main", fail)
    assert run(["data", "list"]) == 1
    assert capsys.readouterr().err.startswith(f"Error: {message} (some/path)")


@pytest.mark.parametrize("command", ["extract", "train-head", "demo"])
def test_a_seed_of_more_than_64_bits_is_bad_usage(capsys, command):
    assert run([command, "--seed", str(2**63)]) == 2
    assert "--seed" in capsys.readouterr().err.splitlines()[-1]


def test_the_command_in_the_provenance_can_be_pasted_into_a_shell(monkeypatch):
    arguments = ["extract", "--dataset", "my data/a.toml"]
    monkeypatch.setattr("sys.argv", ["psd", *arguments])
    assert shlex.split(provenance()["command"]) == ["psd", *arguments]
