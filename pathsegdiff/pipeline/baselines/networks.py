"""The networks of the baselines, from segmentation_models_pytorch.

U-Nets (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) whose encoder is a classifier.
Shapes: B = batch, K = classes, S = ``size_px``, a multiple of 32.
"""

from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from pathsegdiff.diffusion import imagenet
from pathsegdiff.errors import RunError

PACKAGE = "segmentation-models-pytorch"
#: The encoders halve the image five times.
STRIDE = 32
#: Of the 1000-class model, what lies behind the features that a U-Net uses.
_CLASSIFIER = ("conv_head.", "bn2.", "classifier.")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One baseline.

    Attributes:
        title: For people.
        encoder: Its name in segmentation_models_pytorch.
        imagenet: Whether the encoder begins with ImageNet weights, or with random ones.
        learning_rate: The usual one: a trained encoder is moved less.
    """

    title: str
    encoder: str
    imagenet: bool
    learning_rate: float


ARCHITECTURES = {
    "res-unet": Architecture(
        title="U-Net with a ResNet-18 encoder, from scratch",
        encoder="resnet18",
        imagenet=False,
        learning_rate=1e-3,
    ),
    "effnet-unet": Architecture(
        title="U-Net with an EfficientNet-Lite0 encoder, ImageNet weights",
        encoder=f"tu-{imagenet.ARCHITECTURE}",
        imagenet=True,
        learning_rate=5e-4,
    ),
}


def build_network(name: str, num_classes: int, *, seed: int, pretrained: bool = True) -> nn.Module:
    """Build a baseline: (B, 3, S, S) images to (B, K, S, S) logits.

    Args:
        name: One of ``ARCHITECTURES``.
        num_classes: K, without don't care.
        seed: Of the random weights.
        pretrained: Load the ImageNet weights where the baseline has some; not needed where a
            trained file is loaded after.

    Raises:
        RunError: If the name is unknown, or segmentation_models_pytorch is not installed.
        BundleError: If the ImageNet weights are not installed, or are damaged.
    """
    architecture = architecture_of(name)
    try:
        # Here, and so after timm, whose import mends torchvision (``diffusion.third_party``).
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise RunError(
            f"psd baseline needs {PACKAGE} ({error}); pip install 'pathsegdiff[baselines]'"
        ) from None
    # On the CPU and from a generator of its own: the same start on every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = smp.Unet(
            architecture.encoder, encoder_weights=None, in_channels=3, classes=num_classes
        )
    if architecture.imagenet and pretrained:
        _load_encoder(network.encoder.model, imagenet.efficientnet_lite0_state())
    return network


def architecture_of(name: str) -> Architecture:
    """The baseline of that name.

    Raises:
        RunError: If there is none.
    """
    if name not in ARCHITECTURES:
        raise RunError(f"no baseline is called {name!r}; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on a device, channels last: on a CPU a step takes two thirds of the time."""
    moved = network.to(device)
    return moved.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def network_facts(name: str, network: nn.Module) -> dict[str, Any]:
    """What a run records of its network, JSON types."""
    architecture = architecture_of(name)
    return {
        "name": name,
        "title": architecture.title,
        "decoder": f"{PACKAGE} {metadata.version(PACKAGE)} Unet",
        "encoder": architecture.encoder,
        "encoder_weights": imagenet.efficientnet_lite0_facts() if architecture.imagenet else "none",
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def normalise(images: Tensor) -> Tensor:
    """(B, 3, S, S) RGB in [0, 1] as the networks expect it, from scratch as well; channels last."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in _NORMALISATION)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


_NORMALISATION = (imagenet.MEAN, imagenet.STD)


def _load_encoder(encoder: nn.Module, state: dict[str, Tensor]) -> None:
    """Load ImageNet weights; every tensor of the encoder must be there, none may be unknown."""
    features = {name: value for name, value in state.items() if not name.startswith(_CLASSIFIER)}
    encoder.load_state_dict(features, strict=True)
