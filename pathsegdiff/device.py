"""Which device and precision to compute in (torch is imported when asked)."""

from typing import TYPE_CHECKING

from pathsegdiff.config import PRECISIONS
from pathsegdiff.errors import ConfigError

if TYPE_CHECKING:
    import torch


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
    return name
