"""Reading what torch.save wrote, from a source that nobody vouches for."""

import warnings
from pathlib import Path
from typing import Any

import torch

from pathsegdiff.files import refuse_packed


def load_tensors(file: Path, device: str | torch.device = "cpu") -> Any:
    """What a file of torch.save holds, if that is tensors and plain values: nothing in it can run.

    Raises:
        OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError: Or whatever else torch
            makes of a damaged or hostile file.
    """
    refuse_packed(file)
    # torch warns of what old files lack.
    with warnings.catch_warnings(action="ignore"):
        return torch.load(file, map_location=device, weights_only=True)
