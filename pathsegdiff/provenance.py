"""What an output was made with: versions, machine and command."""

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from pathsegdiff import __version__

_PACKAGES = ("torch", "diffusers", "timm", "zarr", "numcodecs", "dask", "numpy", "pillow", "scipy")


def versions() -> dict[str, str]:
    """Of PathSegDiff, Python and the packages that decide numbers, as far as they are installed."""
    found = {"pathsegdiff": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # stage 2 runs without diffusers and timm
            continue
    return found


def provenance(**facts: Any) -> dict[str, Any]:
    """Versions, platform, time (UTC) and command line, and whatever else is told."""
    return {
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["psd", *sys.argv[1:]]) if sys.argv else "",
        **facts,
    }
