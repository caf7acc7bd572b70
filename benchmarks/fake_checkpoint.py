"""Write full-size checkpoints in the authors' formats, filled with random numbers.

The paper's checkpoints cannot be downloaded everywhere. These have the key list and shapes of the
real ones (the tests hold that list against the published code's), the leftovers of a training run,
and objects that a plain weights-only load refuses, so that an import is exercised at full size:

    python benchmarks/fake_checkpoint.py --out /tmp/fake
    psd models import --ldm /tmp/fake/last.ckpt --config /tmp/fake/project.yaml \\
      --encoder /tmp/fake/vit256.pth --random --out /tmp/fake/bundle

Disk: 1.9 GB for float32, 1.6 GB more with --ema.
"""

import argparse
from pathlib import Path

import torch
import yaml
from torch import Tensor

from pathsegdiff.diffusion.compvis import (
    LdmFirstStage,
    LdmUNet,
    conditioner_shapes,
    first_stage_shapes,
    unet_shapes,
)
from pathsegdiff.diffusion.encoder import EncoderConfig, PatchEncoder
from pathsegdiff.diffusion.schedule import NoiseSchedule

#: The paper's model, as its parameter counts give it away.
UNET = LdmUNet(
    in_channels=3,
    out_channels=3,
    model_channels=192,
    channel_mult=(1, 2, 3, 5),
    num_res_blocks=2,
    attention_resolutions=(8, 4, 2),
    num_heads=1,
    num_head_channels=None,
    transformer_depth=1,
    context_dim=512,
)
FIRST_STAGE = LdmFirstStage(
    kind="vq",
    embed_dim=3,
    z_channels=3,
    codes=8192,
    in_channels=3,
    out_channels=3,
    channels=128,
    channel_mult=(1, 2, 4),
    num_res_blocks=2,
    attention=(False, False, False),
)
PROJECT = {
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.0015,
            "linear_end": 0.0195,
            "timesteps": 1000,
            "image_size": 64,
            "channels": 3,
            "conditioning_key": "crossattn",
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 64,
                    "in_channels": 3,
                    "out_channels": 3,
                    "model_channels": 192,
                    "attention_resolutions": [8, 4, 2],
                    "num_res_blocks": 2,
                    "channel_mult": [1, 2, 3, 5],
                    "num_heads": 1,
                    "use_spatial_transformer": True,
                    "transformer_depth": 1,
                    "context_dim": 512,
                },
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.VQModelInterface",
                "params": {
                    "embed_dim": 3,
                    "n_embed": 8192,
                    "ddconfig": {
                        "double_z": False,
                        "z_channels": 3,
                        "resolution": 256,
                        "in_channels": 3,
                        "out_ch": 3,
                        "ch": 128,
                        "ch_mult": [1, 2, 4],
                        "num_res_blocks": 2,
                        "attn_resolutions": [],
                        "dropout": 0.0,
                    },
                },
            },
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.SSLEmbedder",
                "params": {"normalize_ssl": True},
            },
        },
    }
}


def random_tensors(
    shapes: dict[str, tuple[int, ...]], generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights of a size that keeps activations near 1; norms start at 1, biases near 0."""
    tensors = {}
    for name, shape in shapes.items():
        fan_in = max(1, torch.Size(shape[1:]).numel())
        values = torch.randn(shape, generator=generator) * (fan_in**-0.5 if len(shape) > 1 else 0.1)
        if len(shape) == 1 and name.endswith("weight"):
            values += 1
        tensors[name] = values.to(dtype)
    return tensors


def main() -> None:
    """Parse the arguments and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--ema", action="store_true", help="averaged weights of the UNet too")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    dtype = getattr(torch, arguments.dtype)
    arguments.out.mkdir(parents=True, exist_ok=True)

    unet = random_tensors(unet_shapes(UNET), generator, dtype)
    schedule = NoiseSchedule()
    state = {
        "betas": schedule.betas().float(),
        "alphas_cumprod": schedule.alphas_cumprod().float(),
        **unet,
        **random_tensors(first_stage_shapes(FIRST_STAGE), generator, dtype),
        **random_tensors(conditioner_shapes(384, 768, 512), generator, dtype),
        "inception.Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(1000),
    }
    if arguments.ema:
        for name, tensor in unet.items():
            state["model_ema." + name.removeprefix("model.").replace(".", "")] = tensor.clone()
    torch.save(
        {
            "state_dict": state,
            "epoch": 1,
            "global_step": 1000,
            "pytorch-lightning_version": "1.4.2",
            "callbacks": {Path: Path("checkpoints")},
            "hyper_parameters": argparse.Namespace(lr=1e-4),
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(1000)}}}],
        },
        arguments.out / "last.ckpt",
    )
    text = yaml.safe_dump(PROJECT, sort_keys=False)
    (arguments.out / "project.yaml").write_text(text, encoding="utf-8")

    # image_size 224: the published file's position table is that of its training
    vit = PatchEncoder(EncoderConfig(image_size=224)).network
    shapes = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    teacher = random_tensors(shapes, generator, dtype)
    prefixed = {f"module.backbone.{name}": value for name, value in teacher.items()}
    prefixed["module.head.last_layer.weight_v"] = torch.zeros(16, 256)
    torch.save(
        {
            "teacher": prefixed,
            "student": dict(prefixed),
            "epoch": 400,
            "args": argparse.Namespace(arch="vit_small"),
        },
        arguments.out / "vit256.pth",
    )
    for file in sorted(arguments.out.iterdir()):
        if file.is_file():
            print(f"{file}  {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
