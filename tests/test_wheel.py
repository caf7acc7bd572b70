"""The built wheel works in an environment without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def call(*command: object, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("pathsegdiff", "cli", "data_manifests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    call(*pip, "--wheel-dir", folder, copy, cwd=folder)
    return next(folder.glob("pathsegdiff-*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel; its dependencies are those of the running one.

    A line in a .pth file puts the dependencies on the path but follows no .pth file there, so the
    editable checkout is not among them.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    call(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    call(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=folder)
    return folder


def test_the_wheel_carries_every_module(wheel):
    with zipfile.ZipFile(wheel) as archive:
        there = set(archive.namelist())
    modules = {
        str(file.relative_to(ROOT)) for name in ("pathsegdiff", "cli") for file in
        (ROOT / name).rglob("*.py")
    }  # fmt: skip
    assert len(modules) > 100
    assert not modules - there


def test_the_wheel_carries_manifests_and_the_demo_images(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for manifest in ("bcss", "demo", "ebhi", "ebhi300", "glas"):
        assert f"pathsegdiff/data_manifests/{manifest}.toml" in names
        assert f"pathsegdiff/data_manifests/{manifest}.csv" in names
    assert sum(name.startswith("pathsegdiff/data/demo/") for name in names) >= 80
    assert not [name for name in names if name.startswith("tests")]
    assert not [name for name in names if "testB" in name or "train_1." in name]


def test_psd_from_the_wheel_is_not_the_checkout(environment, tmp_path):
    code = "import pathsegdiff, cli.main; print(pathsegdiff.__file__, cli.main.__file__)"
    for path in call(environment / "bin" / "python", "-c", code, cwd=tmp_path).split():
        assert Path(path).is_relative_to(environment)
    assert "glas" in call(environment / "bin" / "psd", "data", "list", cwd=tmp_path)


def test_the_wheel_extracts_trains_and_evaluates_the_demo(environment, tmp_path):
    psd = environment / "bin" / "psd"
    variables = {"PSD_MODELS": str(tmp_path / "models")}
    call(psd, "models", "init", "--preset", "micro", "--out", "micro", cwd=tmp_path, **variables)
    call(psd, "demo", "--model", "micro", cwd=tmp_path, **variables)
    assert "random weights" in (tmp_path / "demo" / "report.html").read_text().lower()
