"""The direction of imports, held against the code itself."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: A package may import the ones before it, and itself.
ORDER = (
    "errors",
    "files",
    "locks",
    "tensors",
    "interrupt",
    "config",
    "grid",
    "device",
    "products",
    "provenance",
    "fetch",
    "data",
    "diffusion",
    "evaluation",
    "features",
    "segmentation",
    "pipeline",
)
MODULES = sorted((ROOT / "pathsegdiff").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def package(name: str) -> str | None:
    """The member of ORDER that a module belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == "pathsegdiff" and len(parts) > 1 and parts[1] in ORDER else None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_comes_before_it(path):
    parts = path.relative_to(ROOT / "pathsegdiff").with_suffix("").parts
    names = imported(path)
    assert not any(name.split(".")[0] in ("click", "cli") for name in names)
    if parts[0] == "__init__":
        assert not names
        return
    later = ORDER[ORDER.index(parts[0]) + 1 :]
    assert not [name for name in names if package(name) in later]
    # Beside each other in the order, and apart: metrics know nothing of the diffusion model.
    if parts[0] == "evaluation":
        assert not [name for name in names if package(name) == "diffusion"]


def test_only_diffusion_imports_diffusers_or_timm():
    for path in MODULES:
        tops = {name.split(".")[0] for name in imported(path)}
        if tops & {"diffusers", "timm"}:
            assert path.relative_to(ROOT).parts[1] == "diffusion", path


def test_what_torch_saved_is_read_in_one_place():
    for path in MODULES:
        if "torch.load(" in path.read_text():
            assert path.relative_to(ROOT).as_posix() == "pathsegdiff/tensors.py"


def test_segmentation_takes_only_the_store_from_stage_one():
    for path in (ROOT / "pathsegdiff" / "segmentation").glob("*.py"):
        for name in imported(path):
            assert package(name) != "diffusion", path
            if package(name) == "features":
                assert name == "pathsegdiff.features" or name.startswith(
                    "pathsegdiff.features.store"
                ), path


def test_init_files_are_docstrings():
    for path in MODULES:
        if path.name == "__init__.py" and path.parent.name != "pathsegdiff":
            body = ast.parse(path.read_text()).body
            assert len(body) == 1, path
            assert isinstance(body[0], ast.Expr), path


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in memory after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(result.stdout.split())


def test_the_store_is_read_without_torch():
    loaded = loaded_by("import pathsegdiff.features.store, pathsegdiff.features.writer")
    assert "zarr" in loaded
    assert not loaded & {"torch", "diffusers", "timm"}


def test_training_and_evaluation_load_neither_diffusers_nor_timm():
    statement = (
        "import cli.train_head, cli.eval, pathsegdiff.segmentation.train, "
        "pathsegdiff.segmentation.evaluate"
    )
    loaded = loaded_by(statement)
    assert "torch" in loaded
    assert not loaded & {"diffusers", "timm", "transformers"}


def test_help_imports_nothing_heavy_and_answers_at_once():
    begin = time.perf_counter()
    loaded = loaded_by("from cli.main import run; run(['--help'])")
    assert time.perf_counter() - begin < 3.0  # half a second where nothing else runs
    assert not loaded & {"torch", "zarr", "numpy", "diffusers", "timm", "dask", "matplotlib"}
