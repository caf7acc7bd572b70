"""DCAN on VGG16: objects and their contours (Chen et al. 2016, https://arxiv.org/abs/1604.02677).

CUMedVision2 of the GlaS contest. Shapes: B = batch, K = classes, S = side of the images, a multiple
of 32; (H, W) = size of an instance map.
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from pathsegdiff.evaluation.objects import DISK
from pathsegdiff.pipeline.baselines.fcn8s import bilinear_upsampling, pool_maps, zero_scores

#: Channels of the last three pools, and how far each is upsampled.
_POOLED = ((256, 8), (512, 16), (512, 32))
#: No contour, contour.
CONTOUR_OUTPUTS = 2


class DCAN(nn.Module):
    """VGG16's convolutions and, for classes and contours alike, scores of its last three pools.

    Each score map is upsampled to the image by a learned deconvolution that begins bilinear; their
    sum is the prediction, each alone is supervised too. Scores begin at zero. As in ``FCN8s`` there
    is no dropout, and the convolutions are followed by batch normalisation.

    Args:
        features: VGG16's layers up to the fifth pool, pools included.
        num_classes: K.
    """

    def __init__(self, features: nn.Sequential, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.num_classes = num_classes
        outputs = num_classes + CONTOUR_OUTPUTS
        self.scores = nn.ModuleList(
            zero_scores(nn.Conv2d(channels, outputs, 1)) for channels, _ in _POOLED
        )
        self.ups = nn.ModuleList(bilinear_upsampling(outputs, factor) for _, factor in _POOLED)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, K + 2, S, S) logits: the classes, then no contour and contour."""
        return torch.stack(self.levels(images)).sum(dim=0)

    def levels(self, images: Tensor) -> list[Tensor]:
        """What each of the three pools says alone, (B, K + 2, S, S) each."""
        pools = pool_maps(self.features, images)[-len(_POOLED) :]
        paths = zip(self.scores, self.ups, pools, strict=True)
        return [up(score(pool)) for score, up, pool in paths]


def contours_of(instances: np.ndarray) -> np.ndarray:
    """Where an object meets something else, dilated by a disk.

    Args:
        instances: (H, W) integers, 0 = background. The image's border is no contour.

    Returns:
        (H, W) bool.
    """
    edge = np.zeros(instances.shape, bool)
    for first, second in (
        (np.s_[1:, :], np.s_[:-1, :]),
        (np.s_[:, 1:], np.s_[:, :-1]),
    ):
        differ = instances[first] != instances[second]
        edge[first] |= differ & (instances[first] > 0)
        edge[second] |= differ & (instances[second] > 0)
    return ndimage.binary_dilation(edge, DISK)
