"""The networks of the baselines; encoders and U-Nets are segmentation_models_pytorch's.

U-Nets (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) whose encoder is a classifier,
FCN-8s and DCAN. Shapes: B = batch, K = classes, S = ``size_px``, a multiple of 32.
"""

import pickle
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pathsegdiff.device import training_layout
from pathsegdiff.diffusion import imagenet
from pathsegdiff.errors import RunError
from pathsegdiff.pipeline.baselines.dcan import DCAN
from pathsegdiff.pipeline.baselines.fcn8s import FCN8s
from pathsegdiff.tensors import load_tensors

PACKAGE = "segmentation-models-pytorch"
#: The encoders halve the image five times.
STRIDE = 32
#: Of a 1000-class model, what lies behind the features that are used here.
_CLASSIFIER = ("conv_head.", "bn2.", "classifier.", "fc.")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One baseline.

    Attributes:
        title: For people.
        encoder: Its name in segmentation_models_pytorch.
        decoder: "Unet", "FCN-8s", or "DCAN", which predicts the contours of objects as well.
        imagenet: Whether the encoder begins with the ImageNet weights that a package brings.
        learning_rate: The usual one: a trained encoder is moved less.
    """

    title: str
    encoder: str
    decoder: str = "Unet"
    imagenet: bool = False
    learning_rate: float


ARCHITECTURES = {
    "res-unet": Architecture(
        title="U-Net with a ResNet-18 encoder",
        encoder="resnet18",
        learning_rate=1e-3,
    ),
    "vgg16-fcn8": Architecture(
        title="FCN-8s on VGG16 with batch normalisation",
        encoder="vgg16_bn",
        decoder="FCN-8s",
        learning_rate=3e-4,
    ),
    "dcan": Architecture(
        title="DCAN on VGG16 with batch normalisation",
        encoder="vgg16_bn",
        decoder="DCAN",
        learning_rate=3e-4,
    ),
    "effnet-unet": Architecture(
        title="U-Net with an EfficientNet-Lite0 encoder",
        encoder=f"tu-{imagenet.ARCHITECTURE}",
        imagenet=True,
        learning_rate=5e-4,
    ),
}


def build_network(
    name: str,
    num_classes: int,
    *,
    seed: int,
    pretrained: bool = True,
    encoder_weights: Path | None = None,
    from_file: bool = False,
) -> nn.Module:
    """Build a baseline: (B, 3, S, S) images to (B, K, S, S) logits, (B, K + 2, S, S) of DCAN.

    Args:
        name: One of ``ARCHITECTURES``.
        num_classes: K, without don't care.
        seed: Of the random weights.
        pretrained: Load the ImageNet weights where the baseline has some; not needed where a
            trained file is loaded after.
        encoder_weights: Of the encoder, in torchvision's or timm's names; its own where None.
        from_file: Whether a trained file that is loaded after began with such weights: they expect
            images with ImageNet's mean and deviation.

    Raises:
        RunError: If the name is unknown, segmentation_models_pytorch is not installed, or the
            weights do not fit.
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
        network: nn.Module
        if architecture.decoder != "Unet":
            encoder = smp.encoders.get_encoder(architecture.encoder, weights=None)
            kind = DCAN if architecture.decoder == "DCAN" else FCN8s
            network = kind(encoder.features, num_classes)
        else:
            network = smp.Unet(
                architecture.encoder, encoder_weights=None, in_channels=3, classes=num_classes
            )
    _expect(network, _IMAGENET if encoder_weights or from_file else _HALVES)
    if encoder_weights is not None:
        _load_file(architecture, network, encoder_weights)
    elif architecture.imagenet and pretrained:
        _load_encoder(network, imagenet.efficientnet_lite0_state())
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
    """The network on a device, in the layout that trains fastest there."""
    moved = network.to(device)
    return moved.to(memory_format=training_layout(device))  # type: ignore[call-overload]


def network_facts(
    name: str, network: nn.Module, encoder_weights: Path | None = None, sha256: str | None = None
) -> dict[str, Any]:
    """What a run records of its network, JSON types; ``sha256`` is of ``encoder_weights``."""
    architecture = architecture_of(name)
    weights: str | dict[str, str] = "none"
    if encoder_weights is not None:
        weights = {"file": encoder_weights.name, "sha256": str(sha256)}
    elif architecture.imagenet:
        weights = imagenet.efficientnet_lite0_facts()
    begins = "from scratch" if weights == "none" else "trained encoder"
    return {
        "name": name,
        "title": f"{architecture.title}, {begins}",
        "decoder": f"{architecture.decoder} ({PACKAGE} {metadata.version(PACKAGE)})",
        "encoder": architecture.encoder,
        "encoder_weights": weights,
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def normalise(images: Tensor, network: nn.Module) -> Tensor:
    """(B, 3, S, S) RGB in [0, 1] as the network expects it."""
    mean, std = network.get_buffer("pixel_mean"), network.get_buffer("pixel_std")
    return ((images - mean) / std).contiguous()


#: Mean and deviation of a pixel: EfficientNet-Lite's, and of networks that begin from scratch.
_HALVES = (imagenet.MEAN, imagenet.STD)
_IMAGENET = (imagenet.USUAL_MEAN, imagenet.USUAL_STD)


def _expect(network: nn.Module, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    """Settings and no weights: in no state dict, but where the network is."""
    for name, values in zip(("pixel_mean", "pixel_std"), statistics, strict=True):
        network.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)


def _load_encoder(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load an encoder's weights; all of its tensors must be there, none may be unknown.

    Raises:
        RuntimeError: Otherwise.
    """
    features = {name: value for name, value in state.items() if not name.startswith(_CLASSIFIER)}
    if isinstance(network, FCN8s | DCAN):
        target: Any = network.features
        features = {name.removeprefix("features."): value for name, value in features.items()}
    else:
        target = network.encoder
        target = getattr(target, "model", target)  # timm's model within the package's wrapper
    target.load_state_dict(features, strict=True)


def _load_file(architecture: Architecture, network: nn.Module, file: Path) -> None:
    try:
        state = load_file(file) if file.suffix == ".safetensors" else load_tensors(file)
        _load_encoder(network, dict(state))
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError, EOFError,
            KeyError, pickle.UnpicklingError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch advises to let the file run its code
            reason = "it is no file of tensors alone"
        raise RunError(
            f"--encoder-weights {file} does not fit {architecture.encoder}: {reason}; give the "
            "state dict of that network, as torchvision and timm have it"
        ) from None
