"""FCN-8s on VGG16 (Long et al. 2015, https://arxiv.org/abs/1411.4038), a row of the paper's tables.

Shapes: B = batch, K = classes, S = side of the images, a multiple of 32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Maps of the five pools (strides 2 to 32) and of the two convolutions that were fully connected.
_POOLED = (64, 128, 256, 512, 512)
_FULLY = 4096


class FCN8s(nn.Module):
    """VGG16's convolutions, its fully connected layers as convolutions, and three score layers.

    The scores at stride 32 are upsampled twice and those of the fourth pool added, upsampled twice
    again and those of the third added, then upsampled eightfold; the upsampling begins bilinear and
    is learned. Scores begin at zero, as in the original. There is no dropout: a training that was
    interrupted would not continue the same.

    Args:
        features: VGG16's layers up to the fifth pool, pools included.
        num_classes: K.
    """

    def __init__(self, features: nn.Sequential, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.fully_6 = nn.Sequential(
            nn.Conv2d(_POOLED[4], _FULLY, 7, padding=3, bias=False), nn.BatchNorm2d(_FULLY)
        )
        self.fully_7 = nn.Sequential(
            nn.Conv2d(_FULLY, _FULLY, 1, bias=False), nn.BatchNorm2d(_FULLY)
        )
        self.score_32 = zero_scores(nn.Conv2d(_FULLY, num_classes, 1))
        self.score_16 = zero_scores(nn.Conv2d(_POOLED[3], num_classes, 1))
        self.score_8 = zero_scores(nn.Conv2d(_POOLED[2], num_classes, 1))
        self.up_16 = bilinear_upsampling(num_classes, 2)
        self.up_8 = bilinear_upsampling(num_classes, 2)
        self.up_1 = bilinear_upsampling(num_classes, 8)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, K, S, S) logits."""
        pools = pool_maps(self.features, images)
        x = F.relu(self.fully_6(pools[4]), inplace=True)
        x = F.relu(self.fully_7(x), inplace=True)
        scores = self.up_16(self.score_32(x)) + self.score_16(pools[3])
        scores = self.up_8(scores) + self.score_8(pools[2])
        upsampled: Tensor = self.up_1(scores)
        return upsampled


def pool_maps(features: nn.Sequential, images: Tensor) -> list[Tensor]:
    """What each pool of VGG16 gives, (B, C, S / 2, S / 2) first."""
    pools = []
    x = images
    for layer in features:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
            pools.append(x)
    return pools


def zero_scores(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer of scores that has no opinion yet."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def bilinear_upsampling(channels: int, factor: int) -> nn.ConvTranspose2d:
    """Each channel upsampled by itself."""
    layer = nn.ConvTranspose2d(
        channels, channels, 2 * factor, stride=factor, padding=factor // 2, bias=False
    )
    places = torch.arange(2 * factor, dtype=torch.float32)
    weights = 1 - (places - (factor - 0.5)).abs() / factor
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        for channel in range(channels):
            layer.weight[channel, channel] = weights[:, None] * weights
    return layer
