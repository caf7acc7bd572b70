"""Write full-size checkpoints in the authors' formats, filled with random numbers.

The paper's checkpoints cannot be downloaded everywhere. These have the key list and shapes of the
real ones (the tests hold that list against the published code's), the leftovers of a training run,
and objects that a plain weights-only load refuses, so that an import is exercised at full size:

    python benchmarks/fake_checkpoint.py --out /tmp/fake
    psd models import --ldm /tmp/fake/last.ckpt --config /tmp/fake/project.yaml \\
      --encoder /tmp/fake/vit256.pth --random --out /tmp/fake/bundle

With --zoomldm the files are those of ZoomLDM and UNI:

    python benchmarks/fake_checkpoint.py --out /tmp/zoom --zoomldm --ema
    psd models import --ldm /tmp/zoom/weights.ckpt --config /tmp/zoom/config.yaml --ema \\
      --encoder /tmp/zoom/pytorch_model.bin --encoder-config uni --random --out /tmp/zoom/bundle

Disk: 1.9 GB for float32 (3.2 GB with --zoomldm), 1.6 GB more with --ema.
"""

import argparse
import copy
from pathlib import Path

import torch
import yaml
from torch import Tensor

from pathsegdiff.diffusion.compvis import (
    LdmFirstStage,
    LdmGridConditioner,
    LdmUNet,
    conditioner_shapes,
    first_stage_shapes,
    grid_conditioner_shapes,
    unet_shapes,
)
from pathsegdiff.diffusion.encoder import NAMED_ENCODERS, EncoderConfig, PatchEncoder
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


GRID_CONDITIONER = {
    "target": "ldm.modules.encoders.modules.EmbeddingViT2_5",
    "params": {
        "feat_key": "ssl_feat",
        "mag_key": "mag",
        "num_layers": 12,
        "input_channels": 1024,
        "hidden_channels": 512,
        "vit_mlp_dim": 2048,
        "p_uncond": 0.1,
    },
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
    parser.add_argument("--zoomldm", action="store_true", help="ZoomLDM and UNI instead")
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
        **random_tensors(
            grid_conditioner_shapes(LdmGridConditioner())
            if arguments.zoomldm
            else conditioner_shapes(384, 768, 512),
            generator,
            dtype,
        ),
        "inception.Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(1000),
    }
    if arguments.ema:
        for name, tensor in unet.items():
            state["model_ema." + name.removeprefix("model.").replace(".", "")] = tensor.clone()
    if arguments.zoomldm:
        del state["inception.Conv2d_1a_3x3.conv.weight"]
        _write_zoomldm(arguments.out, state, generator, dtype)
    else:
        _write_ssl_ldm(arguments.out, state, generator, dtype)
    for file in sorted(arguments.out.iterdir()):
        if file.is_file():
            print(f"{file}  {file.stat().st_size:,} bytes")


def _write_zoomldm(
    out: Path, state: dict[str, Tensor], generator: torch.Generator, dtype: torch.dtype
) -> None:
    torch.save(state, out / "weights.ckpt")
    project = copy.deepcopy(PROJECT)
    project["model"]["params"]["cond_stage_config"] = GRID_CONDITIONER
    text = yaml.safe_dump(project, sort_keys=False)
    (out / "config.yaml").write_text(text, encoding="utf-8")
    torch.save(_encoder(NAMED_ENCODERS["uni"], generator, dtype), out / "pytorch_model.bin")


def _encoder(
    config: EncoderConfig, generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Tensor]:
    vit = PatchEncoder(config).network
    shapes = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    return random_tensors(shapes, generator, dtype)


def _write_ssl_ldm(
    out: Path, state: dict[str, Tensor], generator: torch.Generator, dtype: torch.dtype
) -> None:
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
        out / "last.ckpt",
    )
    text = yaml.safe_dump(PROJECT, sort_keys=False)
    (out / "project.yaml").write_text(text, encoding="utf-8")

    # image_size 224: the published file's position table is that of its training
    teacher = _encoder(EncoderConfig(image_size=224), generator, dtype)
    prefixed = {f"module.backbone.{name}": value for name, value in teacher.items()}
    prefixed["module.head.last_layer.weight_v"] = torch.zeros(16, 256)
    torch.save(
        {
            "teacher": prefixed,
            "student": dict(prefixed),
            "epoch": 400,
            "args": argparse.Namespace(arch="vit_small"),
        },
        out / "vit256.pth",
    )


if __name__ == "__main__":
    main()
