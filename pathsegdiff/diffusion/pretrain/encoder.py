"""The patch encoder's training: DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294).

Two networks see crops of one image; the student learns to say of each crop what the teacher, its
running average, says of the others. Loss and projection head are lightly's.
Shapes: B = images of a batch, P = the encoder's image size.
"""

import warnings
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathsegdiff.diffusion.encoder import EncoderConfig, PatchEncoder
from pathsegdiff.diffusion.pretrain.images import ImagePool, to_unit
from pathsegdiff.diffusion.pretrain.loop import Figures, Part, StepFigures
from pathsegdiff.diffusion.pretrain.pictures import save_rows
from pathsegdiff.diffusion.pretrain.stain import jitter_stain
from pathsegdiff.errors import ConfigError

STREAM = 2
#: Views of an image: two large ones, seen by both networks, and small ones for the student.
GLOBAL_VIEWS, LOCAL_VIEWS = 2, 4
_GLOBAL_SHARE, _LOCAL_SHARE = (0.5, 1.0), (0.15, 0.4)
_STAIN_JITTER = 0.25
_TEACHER_MOMENTUM = (0.99, 1.0)


class EncoderPart(Part):
    """Trains a vision transformer without labels.

    Args:
        config: Of the encoder.
        outputs: Of the projection head; DINO's prototypes.
        pool: Images.
        seed: Of views and jitter, with the step.
        device: Where to train.
        held_out_crops: That held-out figures are measured on.

    Raises:
        ConfigError: If the package lightly is missing.
    """

    name: ClassVar[str] = "encoder"

    def __init__(
        self,
        config: EncoderConfig,
        pool: ImagePool,
        *,
        outputs: int,
        seed: int,
        device: torch.device,
        held_out_crops: int = 32,
    ) -> None:
        try:
            from lightly.loss import DINOLoss
            from lightly.models.modules import DINOProjectionHead
        except ImportError:
            raise ConfigError(
                "training an encoder needs the package lightly: pip install 'pathsegdiff[pretrain]'"
            ) from None
        self.pool, self.seed, self.device, self.config = pool, seed, device, config
        self.held_out_crops = held_out_crops

        def network() -> nn.ModuleDict:
            head = DINOProjectionHead(
                input_dim=config.embed_dim,
                hidden_dim=4 * config.embed_dim,
                bottleneck_dim=min(256, config.embed_dim),
                output_dim=outputs,
            )
            return nn.ModuleDict({"encoder": PatchEncoder(config), "head": head})

        with warnings.catch_warnings():  # lightly still builds on an older weight_norm
            warnings.simplefilter("ignore", FutureWarning)
            self.student = network().to(device)
            self.teacher = network().to(device).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.criterion = DINOLoss(output_dim=outputs, teacher_temp=0.04).to(device)

    @property
    def trained(self) -> nn.Module:
        """The student: encoder and head."""
        return self.student

    def read(self, step: int, count: int, crop_px: int) -> Tensor:
        """(B, 3, S, S) uint8."""
        return self.pool.batch(STREAM, step, count, crop_px)

    def loss(self, batch: Tensor, step: int) -> tuple[Tensor, StepFigures]:
        """Cross-entropy between what student and teacher say of different views."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        images = to_unit(batch, self.device)
        side = self.config.image_size
        views = [self._view(images, _GLOBAL_SHARE, side, generator) for _ in range(GLOBAL_VIEWS)]
        # Small views are enlarged to the one size that the position table knows.
        local = [self._view(images, _LOCAL_SHARE, side, generator) for _ in range(LOCAL_VIEWS)]
        with torch.no_grad():
            taught = [self._outputs(self.teacher, view) for view in views]
        said = [self._outputs(self.student, view) for view in views + local]
        loss = self.criterion(taught, said)
        return loss, {"loss": loss.detach()}

    def after_step(self, step: int, total_steps: int) -> None:
        """Move the teacher towards the student."""
        low, high = _TEACHER_MOMENTUM
        momentum = low + (high - low) * step / max(1, total_steps)
        with torch.no_grad():
            for kept, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                kept.lerp_(new, 1 - momentum)

    @torch.no_grad()
    def held_out(self) -> Figures:
        """How well an image is found again by its mirror image among held-out crops.

        And the spread of the embeddings: near 0 the encoder says the same of everything.
        """
        images = to_unit(
            self.pool.held_out_batch(self.held_out_crops, self.config.image_size), self.device
        )
        encoder = self.student["encoder"]
        first = F.normalize(encoder(images)[0].float(), dim=1)
        second = F.normalize(encoder(images.flip(-1))[0].float(), dim=1)
        found = (first @ second.T).argmax(1).cpu() == torch.arange(len(images))
        return {
            "held_out_found": found.float().mean().item(),
            "held_out_spread": first.std(0).mean().item() * first.shape[1] ** 0.5,
        }

    @torch.no_grad()
    def pictures(self, folder: Path, step: int) -> None:
        """Held-out crops above the first three principal components of their tokens."""
        images = to_unit(self.pool.held_out_batch(6, self.config.image_size), self.device)
        tokens = self.student["encoder"](images)[1].float()
        flat = tokens.permute(0, 2, 3, 1).flatten(0, 2)
        flat = flat - flat.mean(0)
        parts = flat @ torch.linalg.eigh(flat.T @ flat)[1][:, -3:]
        low, high = parts.quantile(0.02, dim=0), parts.quantile(0.98, dim=0)
        shades = ((parts - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
        grid = tokens.shape[-1]
        maps = shades.view(len(images), grid, grid, 3).permute(0, 3, 1, 2)
        save_rows(folder, "tokens", [images, F.interpolate(maps, size=images.shape[-2:])])

    def extra_state(self) -> dict[str, Tensor]:
        """The teacher, and the running centre of its outputs."""
        centre = {f"criterion.{k}": v for k, v in self.criterion.state_dict().items()}
        return {**{f"teacher.{k}": v for k, v in self.teacher.state_dict().items()}, **centre}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``extra_state`` gave."""
        for name, module in (("teacher", self.teacher), ("criterion", self.criterion)):
            own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(name)}
            module.load_state_dict(own)

    @staticmethod
    def _outputs(network: nn.Module, view: Tensor) -> Tensor:
        return network["head"](network["encoder"](view)[0])  # type: ignore[index]

    def _view(
        self, images: Tensor, shares: tuple[float, float], side: int, generator: torch.Generator
    ) -> Tensor:
        """One random view of each image: a square part, mirrored, its stains jittered."""
        count = len(images)
        low, high = shares
        scale = (low + (high - low) * torch.rand(count, generator=generator)).sqrt()
        centre = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - scale)[:, None]
        mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
        matrix = torch.zeros(count, 2, 3)
        matrix[:, 0, 0], matrix[:, 1, 1] = scale * mirror, scale
        matrix[:, :, 2] = centre
        grid = F.affine_grid(matrix, [count, 3, side, side], align_corners=False)
        view = F.grid_sample(
            images, grid.to(images), padding_mode="reflection", align_corners=False
        )
        return jitter_stain(view, generator, _STAIN_JITTER)
