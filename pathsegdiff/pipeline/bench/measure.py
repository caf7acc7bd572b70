"""Side by side: turns, medians, ratios; peak memory of a process; what the hardware gives."""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pathsegdiff.device import autocast, keep_freed_memory

#: Side of the square matrices and bytes of the copy that show what the hardware gives.
_MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
#: Batch, channels and side of the convolution that does so too.
_CONVOLVED = {"cpu": (1, 256, 128), "cuda": (32, 512, 128)}
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_CEILING_RUNS = 5


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Values of several runs.

    Attributes:
        median, low, high: Of them.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value at least."""
        return cls(median=statistics.median(values), low=min(values), high=max(values))


def in_turns(
    sides: Mapping[str, Callable[[], object]], runs: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each side, one after the other in each run, after one run that does not count.

    Turns keep what else the machine does, and its clock, from favouring one side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(runs + 1):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            synchronize(device)
            if run:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times faster, run by run."""
    return Spread.of([a / b for a, b in zip(slow, fast, strict=True)])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Largest resident memory of a fresh process that calls ``function`` and nothing else.

    Args:
        function: Of a module, since the process is spawned.
        arguments: Picklable.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_call_and_look, function, arguments, torch.get_num_threads()).result()


def _call_and_look(function: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    keep_freed_memory()
    function(*arguments)
    return largest_resident_bytes()


def largest_resident_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would start from what the process held that this one was spawned from.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not there on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compute_rate(device: torch.device, precision: str) -> float:
    """Multiply-adds per second of a large matrix product or convolution, the ceiling of networks.

    The better of the two: they come from different libraries, of which either may be the slower.
    """
    side, convolved = _MATMUL_SIDE[device.type], _CONVOLVED[device.type]
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    batch, channels, pixels = convolved
    images = torch.randn(batch, channels, pixels, pixels, device=device)
    kernels = torch.randn(channels, channels, 3, 3, device=device)

    def product() -> None:
        with torch.inference_mode(), autocast(device, precision):
            torch.mm(left, right)

    def convolution() -> None:
        with torch.inference_mode(), autocast(device, precision):
            F.conv2d(images, kernels, padding=1)

    seconds = in_turns({"product": product, "convolution": convolution}, _CEILING_RUNS, device)
    return max(
        side**3 / min(seconds["product"]),
        9 * batch * (channels * pixels) ** 2 / min(seconds["convolution"]),
    )


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy in the device's memory reads (and as many that it writes)."""
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = in_turns({"copy": lambda: _copy(target, source)}, _CEILING_RUNS, device)["copy"]
    return source.numel() / min(seconds)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
