"""ImageNet weights of an encoder, from where torchvision has them.

They are kept where torch keeps such files, so what torchvision got before is used as it is. The
file's name ends with the first eight hex digits of its SHA-256: resnet18-f37072fd.pth.
"""

import re
from pathlib import Path
from urllib.parse import urlsplit

import torch

from pathsegdiff.errors import FetchError, RunError
from pathsegdiff.fetch.download import OnBytes, Remote, download
from pathsegdiff.files import file_sha256

#: In place of a file's name: torchvision's own.
IMAGENET = "imagenet"
#: The same where they can be had, else from scratch.
AUTO = "auto"
#: Either: a word in place of a file at hand.
WORDS = (IMAGENET, AUTO)
LICENCE = "BSD 3-Clause (torchvision)"
_WEIGHTS = {
    "resnet18": "ResNet18_Weights.IMAGENET1K_V1",
    "vgg16_bn": "VGG16_BN_Weights.IMAGENET1K_V1",
}
#: Torchvision's names of them.
_FILES = frozenset({"resnet18-f37072fd.pth", "vgg16_bn-6c64b313.pth"})
_NAME = re.compile(r"[\w.]+-([0-9a-f]{8})\.pth")


def describe_weights(file: Path | None) -> str:
    """What an encoder begins with, for a row's title; a file is called ImageNet's by its name."""
    if file is None:
        return "from scratch"
    whose = "ImageNet encoder, " if file.name in _FILES else "encoder from "
    return f"{whose}{file.name}"


def imagenet_file(encoder: str) -> Path:
    """Where the weights of an encoder are, or will be.

    Args:
        encoder: "resnet18" or "vgg16_bn".

    Raises:
        RunError: If torchvision has none of it.
    """
    return _place_of(_address(encoder))


def fetch_imagenet(encoder: str, *, on_bytes: OnBytes | None = None) -> Path:
    """Get the weights of an encoder, unless they are there.

    Args:
        encoder: "resnet18" or "vgg16_bn".
        on_bytes: Called after each block with (bytes that are there, bytes in all or None).

    Returns:
        The file, checked.

    Raises:
        RunError: If torchvision has none of it.
        FetchError: If they cannot be had, or are not what their name says.
    """
    address = _address(encoder)
    file = _place_of(address)
    if file.exists():
        _check(file, file.name)
        return file
    arriving = file.with_name(f"{file.name}.arriving")
    try:
        download(Remote(url=address), arriving, on_bytes=on_bytes)
        _check(arriving, file.name)
        arriving.replace(file)
    except (FetchError, OSError) as error:
        raise FetchError(
            f"ImageNet weights of {encoder} cannot be had ({error}); give --encoder-weights a file "
            "of them, or leave it out to begin from scratch"
        ) from None
    return file


def _place_of(address: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(address).path).name


def _address(encoder: str) -> str:
    """Torchvision's own."""
    # Here: segmentation_models_pytorch brings it, and timm must have mended it first.
    import pathsegdiff.diffusion.third_party  # noqa: F401

    if encoder not in _WEIGHTS:
        raise RunError(f"torchvision has weights of {', '.join(_WEIGHTS)}, not of {encoder}")
    try:
        from torchvision.models import get_weight
    except (ImportError, RuntimeError) as error:
        raise RunError(f"--encoder-weights {IMAGENET} needs torchvision ({error})") from None
    return str(get_weight(_WEIGHTS[encoder]).url)


def _check(file: Path, name: str) -> None:
    """Raises FetchError, and removes the file, unless its hash begins as its name says."""
    said = _NAME.fullmatch(name)
    if said is None:
        raise FetchError(f"{name} does not end with a hash")
    found = file_sha256(file)
    if not found.startswith(said[1]):
        file.unlink()
        raise FetchError(f"{file} was damaged (sha256 {found:.8}) and is removed; run this again")
