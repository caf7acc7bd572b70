"""How long and how each preset is trained; measured on small trials, see docs/pretraining.md."""

from dataclasses import dataclass, field, replace

from pathsegdiff.diffusion.encoder import EncoderConfig
from pathsegdiff.diffusion.presets import PRESETS, Preset
from pathsegdiff.diffusion.pretrain.ldm import LdmSettings
from pathsegdiff.diffusion.pretrain.loop import LoopSettings
from pathsegdiff.errors import ConfigError

#: In the order in which they are trained.
PARTS = ("autoencoder", "encoder", "ldm")
#: May come after the autoencoder, on images of its own; no other part depends on it.
EXTRA_PARTS = ("decoder",)
#: What ``--encoder dino`` trains for ``tiny``: 2.7 million parameters.
DINO_ENCODER = EncoderConfig(embed_dim=192, depth=6, num_heads=3)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A preset with the training of its parts.

    Attributes:
        preset: Shapes.
        autoencoder, encoder, ldm: Loops. An encoder with ImageNet weights is not trained.
        decoder: Loop of the autoencoder's decoder alone, where that is asked for.
        diffusion: Of the diffusion model.
        prototypes: Outputs of DINO's head.
        held_out_crops: That held-out figures are measured on.
    """

    preset: Preset
    autoencoder: LoopSettings
    encoder: LoopSettings
    ldm: LoopSettings
    decoder: LoopSettings
    diffusion: LdmSettings = field(default_factory=LdmSettings)
    prototypes: int = 4096
    held_out_crops: int = 32

    def changed(
        self,
        *,
        steps: int | None = None,
        batch_size: int | None = None,
        precision: str | None = None,
        seed: int | None = None,
    ) -> "Plan":
        """The same plan with some settings of every part changed."""
        changes = {
            name: value
            for name, value in (
                ("steps", steps),
                ("batch_size", batch_size),
                ("precision", precision),
                ("seed", seed),
            )
            if value is not None
        }
        loops = {part: replace(getattr(self, part), **changes) for part in (*PARTS, *EXTRA_PARTS)}
        return replace(self, **loops)

    def with_dino_encoder(self) -> "Plan":
        """The same plan with a small vision transformer that is trained here.

        Raises:
            ConfigError: If the preset's own encoder is one already.
        """
        if isinstance(self.preset.encoder, EncoderConfig):
            raise ConfigError(f"the preset {self.preset.name} trains a transformer as it is")
        width = DINO_ENCODER.embed_dim
        conditioner = {
            **self.preset.conditioner,
            "patch_embed_dim": width,
            "region_embed_dim": width,
        }
        title = f"{self.preset.title.rpartition(', ')[0]}, ViT/16"
        preset = replace(self.preset, encoder=DINO_ENCODER, conditioner=conditioner, title=title)
        return replace(self, preset=preset)


def plan_of(preset: str) -> Plan:
    """The plan of a preset.

    Raises:
        ConfigError: If there is none.
    """
    if preset not in _PLANS:
        raise ConfigError(f"preset must be one of {', '.join(_PLANS)}, got {preset!r}")
    return _PLANS[preset]


_MICRO = LoopSettings(
    steps=20, batch_size=2, crops=((0.5, 128), (0.5, 256)), warmup_steps=5, ema_decay=0.9
)
_PLANS = {
    # Two CPU cores: 20 minutes for the autoencoder, an hour and more for the diffusion model.
    "tiny": Plan(
        preset=PRESETS["tiny"],
        autoencoder=LoopSettings(
            steps=5000,
            batch_size=1,
            crops=((0.85, 128), (0.15, 256)),
            learning_rate=2e-3,
            warmup_steps=100,
            ema_decay=0.998,
            precision="bfloat16",
        ),
        encoder=LoopSettings(steps=10_000, batch_size=32, learning_rate=5e-4, warmup_steps=1000),
        ldm=LoopSettings(
            steps=5500,
            batch_size=8,
            learning_rate=1e-3,
            warmup_steps=200,
            ema_decay=0.998,
            precision="bfloat16",
        ),
        decoder=LoopSettings(
            steps=4000,
            batch_size=1,
            crops=((0.9, 128), (0.1, 256)),
            learning_rate=1e-3,
            warmup_steps=100,
            ema_decay=0.998,
            precision="bfloat16",
        ),
    ),
    "micro": Plan(
        preset=PRESETS["micro"],
        autoencoder=_MICRO,
        encoder=replace(_MICRO, crops=((1.0, 256),)),
        ldm=replace(_MICRO, crops=((1.0, 256),)),
        decoder=_MICRO,
        prototypes=64,
        held_out_crops=4,
    ),
    # The paper's shapes, for a GPU: the schedule of Rombach et al. 2022 scaled to one card.
    "paper": Plan(
        preset=PRESETS["paper"],
        autoencoder=LoopSettings(
            steps=200_000, batch_size=16, learning_rate=1e-4, warmup_steps=2000, ema_decay=0.9999
        ),
        encoder=LoopSettings(
            steps=200_000, batch_size=128, learning_rate=5e-4, warmup_steps=10_000, ema_decay=0.9999
        ),
        ldm=LoopSettings(
            steps=400_000, batch_size=64, learning_rate=1e-4, warmup_steps=5000, ema_decay=0.9999
        ),
        decoder=LoopSettings(
            steps=50_000, batch_size=16, learning_rate=1e-4, warmup_steps=2000, ema_decay=0.9999
        ),
        prototypes=65536,
    ),
}
