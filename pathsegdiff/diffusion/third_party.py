"""The one place that imports diffusers and timm, so that their quirks are met once.

timm needs torchvision for two pure-Python helpers. A torchvision that was built for another torch
(the CUDA build beside a CPU torch, as package indexes often serve them) cannot load its compiled
operators and then refuses to be imported at all: "operator torchvision::nms does not exist". We
use none of these operators, so where they do not load we declare their signatures, and the import
goes through.
"""

import importlib.util
import os
from pathlib import Path

import torch

#: Operators that must be declared for torchvision to import (torchvision/_meta_registrations.py).
_SIGNATURES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
#: A torch.library.Library withdraws its declarations when it is collected, so it must be kept.
_declared: list[torch.library.Library] = []


def _declare_operators_that_do_not_load() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or os.name == "nt":
        return  # Windows finds the library's own dependencies only from inside torchvision
    for library in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
            return
        except OSError:
            continue
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for signature in _SIGNATURES:
        fragment.define(signature)
    _declared.append(fragment)


_declare_operators_that_do_not_load()

from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.training_utils import EMAModel  # noqa: E402
from timm import create_model, is_model  # noqa: E402
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

__all__ = [
    "AutoencoderKL",
    "Block",
    "DDIMScheduler",
    "DDPMScheduler",
    "EMAModel",
    "UNet2DConditionModel",
    "VQModel",
    "VisionTransformer",
    "create_model",
    "is_model",
]
