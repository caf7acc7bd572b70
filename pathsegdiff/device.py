"""Device, precision and memory of a computation (torch is imported when asked)."""

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pathsegdiff.config import PRECISIONS
from pathsegdiff.errors import ConfigError

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger(__name__)

#: glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD (malloc.h), and what they are set to, in bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_KEPT_BLOCK = 2**31 - 1, 2**30


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for the next tensor instead of giving it back each time.

    glibc maps every block above a few megabytes anew, and the system clears its pages one fault at
    a time: a fifth of the time of stage 1 and of a head's training step on a CPU. Results are the
    same bits. At most 2 GiB that nobody uses stay with the process, which ends with it.

    Returns:
        Whether it is so now; False on systems without glibc, where nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK) and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    )


def wait_without_spinning() -> bool:
    """Let OpenMP's threads sleep while they wait for each other; call it before torch is imported.

    They spin by default, which is a little faster on idle cores. Beside any other process it is
    several times slower, since a thread that waits keeps the one it waits for from its core. A
    user's own OMP_WAIT_POLICY is left alone.

    Returns:
        Whether it is so, or will be.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


def available_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resolve_device(name: str) -> "torch.device":
    """Read ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: If there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device {name} asked for, but torch sees {count} CUDA devices; use cpu")
    return device


def resolve_precision(name: str, device: "torch.device") -> str:
    """``auto`` is float32 on a CPU and bfloat16 (float16 before Ampere) on a GPU.

    Raises:
        ConfigError: If the name is no precision.
    """
    import torch

    if name == "auto":
        if device.type == "cpu":
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if name not in PRECISIONS:
        raise ConfigError(f"precision must be auto or one of {', '.join(PRECISIONS)}, got {name!r}")
    if device.type == "cpu" and not has_arithmetic(name):
        _logger.warning(
            "this processor has no %s arithmetic: it is emulated, which is many times slower than "
            "--precision float32",
            name,
        )
    return name


def has_arithmetic(precision: str) -> bool:
    """Whether the processor computes in a precision itself; convolutions say so best."""
    import torch

    if precision == "float32":
        return True
    known = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    supported = getattr(torch.ops.mkldnn, known[precision], None)
    return supported is None or bool(supported())


def autocast(device: "torch.device", precision: str) -> "torch.autocast":
    """The context that computes in a precision; it does nothing in float32."""
    import torch

    dtypes = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = dtypes[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def training_layout(device: "torch.device") -> "torch.memory_format":
    """In which convolutions train fastest; they turn their input into the layout of their weights.

    Channels last, but not on a CPU without AVX-512, for which oneDNN has only a slow gradient of
    the weights in that layout (measured by benchmarks/layouts.py).
    """
    import torch

    if device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return torch.contiguous_format
    return torch.channels_last


@contextmanager
def computing_on(threads: int | None) -> Iterator[None]:
    """Let torch compute on so many threads of this process; on as many as before where None."""
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_name(device: "torch.device") -> str:
    """Name of the hardware, for provenance."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
