"""What is there: versions, machine, models, data, and what will not work."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import pathsegdiff
from pathsegdiff.data.manifest import data_root_of, list_manifests, load_manifest
from pathsegdiff.device import available_cores, has_arithmetic
from pathsegdiff.diffusion.bundle import list_bundles, load_bundle, models_dir
from pathsegdiff.errors import BundleError, DataError, StoreError
from pathsegdiff.features.claims import Claim
from pathsegdiff.features.store import FeatureStore

#: Without these nothing works, or not all of it.
NEEDED = ("torch", "diffusers", "timm", "zarr", "numcodecs", "numpy", "dask", "gdown")
#: Module, package on the index, and what needs it.
OPTIONAL = (
    ("segmentation_models_pytorch", "segmentation-models-pytorch", "psd baseline", "baselines"),
    ("lightly", "lightly", "psd pretrain encoder", "pretrain"),
)
#: Below these a data set of the paper's size does not fit.
_LITTLE_DISK, _LITTLE_MEMORY = 5e9, 8e9


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line.

    Attributes:
        section: Under which it stands.
        name: What it is about.
        text: What there is.
        problem: Whether something will not work, or not well.
    """

    section: str
    name: str
    text: str
    problem: bool = False


def examine(folder: Path) -> Iterator[Finding]:
    """Everything that a report of a problem should say.

    Args:
        folder: That commands would be run in: its disk, features/ and runs/ are looked at.
    """
    yield from _versions()
    yield from _machine(folder)
    yield from _models()
    yield from _data()
    yield from _outputs(folder)


def _versions() -> Iterator[Finding]:
    section = "versions"
    yield Finding(section=section, name="pathsegdiff", text=pathsegdiff.__version__)
    yield Finding(section=section, name="python", text=platform.python_version())
    for package in NEEDED:
        try:
            text, problem = metadata.version(package), False
        except metadata.PackageNotFoundError:
            text, problem = f"not installed: pip install {package}", True
        yield Finding(section=section, name=package, text=text, problem=problem)
    for module, package, command, extra in OPTIONAL:
        if util.find_spec(module):
            text = metadata.version(package)
        else:
            text = f"not installed; {command} needs it: pip install 'pathsegdiff[{extra}]'"
        yield Finding(section=section, name=package, text=text)


def _machine(folder: Path) -> Iterator[Finding]:
    import torch

    section = "machine"
    yield Finding(section=section, name="system", text=f"{platform.platform()}")
    yield Finding(
        section=section,
        name="processor",
        text=f"{_processor()}, {available_cores()} cores, {torch.get_num_threads()} threads",
    )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        facts = torch.cuda.get_device_properties(number)
        yield Finding(
            section=section,
            name=f"cuda:{number}",
            text=f"{facts.name}, {facts.total_memory / 1e9:.0f} GB",
        )
    if not count:
        unseen = shutil.which("nvidia-smi") is not None
        text = "none: everything runs on the processor"
        if unseen:
            text = "torch sees none, but nvidia-smi is there: install a torch with CUDA"
        yield Finding(section=section, name="cuda", text=text, problem=unseen)
    computed = [name for name in ("float32", "bfloat16", "float16") if has_arithmetic(name)]
    yield Finding(
        section=section,
        name="precision",
        text=f"the processor computes in {', '.join(computed)}; others are emulated and slow",
    )
    total, available = memory()
    yield Finding(
        section=section,
        name="memory",
        text=f"{total / 1e9:.1f} GB, {available / 1e9:.1f} GB of it free",
        problem=available < _LITTLE_MEMORY,
    )
    free = shutil.disk_usage(folder).free
    yield Finding(
        section=section, name="disk", text=f"{free / 1e9:.1f} GB free", problem=free < _LITTLE_DISK
    )
    yield _writable(folder)


def _writable(folder: Path) -> Finding:
    """Whether a store could be written here: files, and the locks that claims are."""
    place = folder / f".psd-doctor-{os.getpid()}"
    text, problem = "files and locks work here", False
    try:
        place.mkdir()
        first, second = Claim(place, 0), Claim(place, 0)
        if not first.take() or second.take():
            text, problem = "locks do not hold here: never extract twice at once into it", True
        first.release(finished=True)
    except OSError as error:
        text, problem = f"cannot be written to ({error.strerror or error}); use another", True
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Finding(section="machine", name="folder", text=f"{folder}: {text}", problem=problem)


def _models() -> Iterator[Finding]:
    section = "models"
    for name, path in list_bundles().items():
        try:
            card = load_bundle(path).card
        except BundleError as error:
            yield Finding(section=section, name=name, text=str(error), problem=True)
            continue
        weights = "trained" if card.trained else "random weights"
        yield Finding(
            section=section, name=name, text=f"whole, {weights}, {card.num_channels} channels"
        )
    yield Finding(section=section, name="others", text=f"are looked for in {models_dir()}")


def _data() -> Iterator[Finding]:
    for name in list_manifests():
        manifest = load_manifest(name)
        try:
            text = f"in {data_root_of(manifest)}"
        except DataError:
            how = f"psd data fetch {name}" if manifest.fetch else f"psd data show {name}"
            text = f"not here ({how})"
        yield Finding(section="data", name=name, text=text)


def _outputs(folder: Path) -> Iterator[Finding]:
    section = "here"
    for path in sorted(folder.glob("features/*/zarr.json")):
        name = path.parent.name
        try:
            store = FeatureStore.open(path.parent)
        except StoreError as error:
            yield Finding(section=section, name=name, text=str(error), problem=True)
            continue
        done, planned = len(store.samples()), len(store.registered())
        text = f"{done} of {planned} samples complete"
        yield Finding(section=section, name=name, text=text, problem=done < planned)
    for path in sorted(folder.glob("runs/*/config.json")):
        ended = (path.parent / "result.json").exists()
        text = "trained" if ended else "not trained to its end: run its command again"
        yield Finding(section=section, name=path.parent.name, text=text, problem=not ended)


def memory() -> tuple[int, int]:
    """Bytes of memory in all, and those that a process could have; of a container its own."""
    total = available = 0
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return total, available
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit = next(iter(_lines(Path("/sys/fs/cgroup/memory.max"))), "max")
    if limit.isdigit() and int(limit) < total:
        used = next(iter(_lines(Path("/sys/fs/cgroup/memory.current"))), "0")
        total = int(limit)
        available = min(available, max(0, total - int(used)))
    return total, available


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
