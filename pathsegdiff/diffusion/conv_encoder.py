"""A convolutional patch encoder: any convolutional timm network with its stages as feature maps.

It stands where HIPT's vision transformer stands: its pooled last stage conditions the UNet. Shapes:
B = batch, D = embedding, P = patch_px, N = tokens along one side.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathsegdiff.diffusion.third_party import create_model, is_model
from pathsegdiff.errors import BundleError

#: No stage that we know has more channels; it keeps a hostile file from filling memory.
_MOST_CHANNELS = 4096
_TOKEN_STRIDE = 16


@dataclass(frozen=True, kw_only=True)
class ConvEncoderConfig:
    """Shape of a convolutional encoder; the defaults are EfficientNet-Lite0.

    Attributes:
        architecture: "cnn".
        model: Name in timm; built without asking any hub for weights.
        stages: timm's ``out_indices``, finest first.
        stage_channels: Channels of each stage.
        stage_strides: Image pixels per cell of each stage.
        image_size: P.
        mean: Of an RGB channel in [0, 1], subtracted first.
        std: Divided by.
    """

    architecture: str = "cnn"
    model: str = "tf_efficientnet_lite0"
    stages: tuple[int, ...] = (1, 2, 3, 4)
    stage_channels: tuple[int, ...] = (24, 40, 112, 320)
    stage_strides: tuple[int, ...] = (4, 8, 16, 32)
    image_size: int = 256
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def embed_dim(self) -> int:
        """D: channels of the last stage."""
        return self.stage_channels[-1]

    @property
    def token_grid(self) -> int:
        """N."""
        return self.image_size // _TOKEN_STRIDE

    @property
    def token_channels(self) -> int:
        """Channels of a token: those of the stages of stride 16 and more together."""
        return sum(
            channels
            for channels, stride in zip(self.stage_channels, self.stage_strides, strict=True)
            if stride >= _TOKEN_STRIDE
        )

    @property
    def summary(self) -> str:
        """One line for people."""
        return f"{self.model}, {self.embed_dim} channels"

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "ConvEncoderConfig":
        """Read and check what ``to_dict`` wrote.

        Raises:
            BundleError: If a value is unknown or cannot be; ``where`` names the file.
        """
        known = list(cls.__dataclass_fields__)
        odd = sorted(set(values) ^ set(known))
        if odd:
            raise BundleError(
                f"{where}: a convolutional encoder has the settings {', '.join(known)}; "
                f"differing: {', '.join(map(str, odd))}"
            )
        model = values["model"]
        # A plain name: timm reads "hf-hub:..." as an order to download.
        if not isinstance(model, str) or not model.isidentifier() or not is_model(model):
            raise BundleError(f"{where}: timm has no model called {model!r:.60}")
        lists: dict[str, tuple[Any, ...]] = {}
        for name, largest in (
            ("stages", 16),
            ("stage_channels", _MOST_CHANNELS),
            ("stage_strides", 256),
        ):
            entries = values[name]
            if (
                not isinstance(entries, list)
                or not 1 <= len(entries) <= 8
                or not all(type(v) is int and 0 <= v <= largest for v in entries)
                or len(entries) != len(values["stages"])
                or sorted(set(entries)) != sorted(entries)
            ):
                raise BundleError(
                    f"{where}: {name} must be different whole numbers up to {largest}, one per "
                    f"stage, got {entries!r:.60}"
                )
            lists[name] = tuple(entries)
        size = values["image_size"]
        if type(size) is not int or not 32 <= size <= 4096 or size % 32:
            raise BundleError(f"{where}: image_size must be a multiple of 32, got {size!r:.60}")
        strides = lists["stage_strides"]
        if sorted(strides) != list(strides) or 0 in strides or _TOKEN_STRIDE not in strides:
            raise BundleError(f"{where}: stage_strides must rise and hold {_TOKEN_STRIDE}")
        for name in ("mean", "std"):
            lists[name] = _triple(values[name], name, where)
        return cls(**{**values, **lists})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _triple(values: Any, name: str, where: str) -> tuple[float, ...]:
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(type(v) in (int, float) and abs(v) < 1e3 for v in values)
        or (name == "std" and min(values) <= 0)
    ):
        raise BundleError(f"{where}: {name} must be three numbers, got {values!r:.60}")
    return tuple(values)


class ConvEncoder(nn.Module):
    """Images -> pooled last stage (the embedding), tokens, and the stages themselves."""

    def __init__(self, config: ConvEncoderConfig) -> None:
        super().__init__()
        self.config = config
        try:
            self.network = create_model(
                config.model, pretrained=False, features_only=True, out_indices=config.stages
            )
        except (RuntimeError, AssertionError, IndexError, ValueError) as error:
            raise BundleError(
                f"the encoder {config.model} has no feature maps {config.stages}: {error!s:.100}"
            ) from None
        stages: Any = self.network.feature_info
        found = tuple(stages.channels()), tuple(stages.reduction())
        if found != (config.stage_channels, config.stage_strides):
            raise BundleError(
                f"the encoder {config.model} has stages of {found[0]} channels at strides "
                f"{found[1]}, its settings say {config.stage_channels} at {config.stage_strides}"
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network once.

        Args:
            images: (B, 3, P, P) in [0, 1].

        Returns:
            (B, D) mean of the last stage over the patch, and (B, token_channels, N, N) the stages
            from stride 16 on, enlarged bilinearly to stride 16; in the computation's dtype.
        """
        maps = self.feature_maps(images)
        return maps[-1].mean(dim=(2, 3)), self.tokens_of(maps)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Every stage, finest first: (B, C, P / stride, P / stride)."""
        mean = images.new_tensor(self.config.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.config.std).view(1, 3, 1, 1)
        dtype = next(self.network.parameters()).dtype
        return list(self.network(((images - mean) / std).to(dtype)))

    def tokens_of(self, maps: list[Tensor]) -> Tensor:
        """Tokens from what ``feature_maps`` returned."""
        coarse = [
            features
            for features, stride in zip(maps, self.config.stage_strides, strict=True)
            if stride >= _TOKEN_STRIDE
        ]
        size = coarse[0].shape[-2:]
        enlarged = [
            features
            if features.shape[-2:] == size
            else F.interpolate(features, size=size, mode="bilinear", align_corners=False)
            for features in coarse
        ]
        return torch.cat(enlarged, dim=1)
