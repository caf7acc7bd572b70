"""``psd doctor``: one page, and every line of it true."""

import builtins
import json
import shutil
from importlib import metadata

import pytest

from cli.main import run
from pathsegdiff import __version__
from pathsegdiff.features import claims
from pathsegdiff.pipeline import doctor
from tests.helpers_store import build_store, make_samples, open_writer


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """A working folder, a folder of models, and no data."""
    monkeypatch.setenv("PSD_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("PSD_DATA", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(doctor, "_LITTLE_DISK", 0)
    monkeypatch.setattr(doctor, "_LITTLE_MEMORY", 0)
    return work


def page(capsys, code=0):
    """Lines by the name that they are about; a problem's begin with !."""
    assert run(["doctor"]) == code
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if line[:2] in ("  ", "! "):
            name, _, text = line[2:].partition(" ")
            found[name] = line[0].strip() + text.strip()
    return found


def test_a_healthy_place_has_nothing_to_look_at(capsys, empty):
    found = page(capsys)
    assert found["pathsegdiff"] == __version__
    assert found["torch"] == metadata.version("torch")
    assert found["tiny"].startswith("whole, trained, 1296 channels")
    assert found["glas"] == "not here (psd data fetch glas)"
    assert found["ebhi"] == "not here (psd data show ebhi)"
    assert found["folder"] == f"{empty}: files and locks work here"
    assert "float32" in found["precision"]
    assert not list(empty.iterdir())  # it leaves nothing


def test_what_will_not_work_is_marked(capsys, empty, monkeypatch):
    def version(package, real=metadata.version):
        if package == "timm":
            raise metadata.PackageNotFoundError
        return real(package)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "_LITTLE_DISK", float("inf"))
    monkeypatch.setattr(claims.Claim, "take", lambda self: True)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    found = page(capsys, code=1)
    assert found["timm"] == "!not installed: pip install timm"
    assert found["disk"].startswith("!")
    assert "!" in found["folder"] and "never extract twice at once" in found["folder"]
    if "cuda" in found:
        assert found["cuda"].startswith("!torch sees none, but nvidia-smi is there")


def test_models_stores_and_runs_are_listed_with_their_state(capsys, empty, tmp_path):
    assert run(["models", "init", "--preset", "micro", "--out", str(tmp_path / "models/mine")]) == 0
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "model.json").write_text("{}")
    build_store(empty / "features" / "whole.zarr", train=2, test=1)
    with open_writer(empty / "features" / "part.zarr") as writer:
        writer.register(make_samples(2, 1))
    build_store(empty / "features" / "bad.zarr", train=1, test=1)
    (empty / "features" / "bad.zarr" / "samples.json").write_text("[]")
    for name in ("done", "begun"):
        (empty / "runs" / name).mkdir(parents=True)
        (empty / "runs" / name / "config.json").write_text(json.dumps({}))
    (empty / "runs" / "done" / "result.json").write_text("{}")
    found = page(capsys, code=1)
    assert found["mine"].startswith("whole, random weights")
    assert found["broken"].startswith("!")
    assert found["whole.zarr"] == "3 of 3 samples complete"
    assert found["part.zarr"] == "!0 of 3 samples complete"
    assert found["bad.zarr"].startswith("!") and "samples.json is damaged" in found["bad.zarr"]
    assert found["done"] == "trained"
    assert found["begun"] == "!not trained to its end: run its command again"


def test_a_folder_that_cannot_be_written_to_is_said(empty, monkeypatch):
    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.Path, "mkdir", refuse)
    finding = doctor._writable(empty)
    assert finding.problem
    assert "cannot be written to (Permission denied)" in finding.text


def test_the_memory_of_a_container_is_its_own(monkeypatch):
    files = {
        "/sys/fs/cgroup/memory.max": ["2000000000"],
        "/sys/fs/cgroup/memory.current": ["500000000"],
        "/proc/meminfo": ["MemAvailable: 9000000 kB"],
    }
    monkeypatch.setattr(doctor, "_lines", lambda path: files.get(str(path), []))
    assert doctor.memory() == (2_000_000_000, 1_500_000_000)
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    total, available = doctor.memory()
    assert total > 2_000_000_000 and available == 9_216_000_000


def test_a_machine_for_stage_two_alone_gets_its_page_too(capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] in ("diffusers", "timm"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "whole" in page(capsys)["tiny"]
