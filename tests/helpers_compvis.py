"""The authors' networks in plain functions, and checkpoints in their format, for tests.

Written from the papers and from CompVis' key names, without diffusers: an independent second
implementation to hold the converted models against.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from pathsegdiff.diffusion.compvis import (
    LdmFirstStage,
    LdmUNet,
    conditioner_shapes,
    first_stage_shapes,
    grid_conditioner_shapes,
    unet_shapes,
)
from pathsegdiff.diffusion.encoder import EncoderConfig, PatchEncoder
from pathsegdiff.diffusion.project import LdmProject

State = dict[str, Tensor]


def _norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _conv(state: State, name: str, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _plain_residual(state: State, name: str, x: Tensor) -> Tensor:
    h = _conv(state, f"{name}.conv1", F.silu(_norm(state, f"{name}.norm1", x, 1e-6)), padding=1)
    h = _conv(state, f"{name}.conv2", F.silu(_norm(state, f"{name}.norm2", h, 1e-6)), padding=1)
    if f"{name}.nin_shortcut.weight" in state:
        x = _conv(state, f"{name}.nin_shortcut", x)
    return x + h


def _plain_attention(state: State, name: str, x: Tensor) -> Tensor:
    normed = _norm(state, f"{name}.norm", x, 1e-6)
    q, k, v = (_conv(state, f"{name}.{part}", normed).flatten(2) for part in "qkv")
    weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=-1)
    mixed = (v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
    return x + _conv(state, f"{name}.proj_out", mixed)


def first_stage_moments(state: State, stage: LdmFirstStage, pixels: Tensor) -> Tensor:
    """(B, 3, P, P) in [-1, 1] -> what ``quant_conv`` gives."""
    state = {k.removeprefix("first_stage_model."): v for k, v in state.items()}
    h = _conv(state, "encoder.conv_in", pixels, padding=1)
    for level in range(len(stage.channel_mult)):
        for block in range(stage.num_res_blocks):
            h = _plain_residual(state, f"encoder.down.{level}.block.{block}", h)
            if f"encoder.down.{level}.attn.{block}.q.weight" in state:
                h = _plain_attention(state, f"encoder.down.{level}.attn.{block}", h)
        if f"encoder.down.{level}.downsample.conv.weight" in state:
            padded = F.pad(h, (0, 1, 0, 1))  # right and bottom only
            h = _conv(state, f"encoder.down.{level}.downsample.conv", padded, stride=2)
    h = _plain_residual(state, "encoder.mid.block_1", h)
    h = _plain_attention(state, "encoder.mid.attn_1", h)
    h = _plain_residual(state, "encoder.mid.block_2", h)
    h = _conv(
        state, "encoder.conv_out", F.silu(_norm(state, "encoder.norm_out", h, 1e-6)), padding=1
    )
    return _conv(state, "quant_conv", h)


def _residual(state: State, name: str, x: Tensor, time: Tensor) -> Tensor:
    h = F.silu(_norm(state, f"{name}.in_layers.0", x, 1e-5))
    h = _conv(state, f"{name}.in_layers.2", h, padding=1)
    h = h + _linear(state, f"{name}.emb_layers.1", F.silu(time))[..., None, None]
    h = F.silu(_norm(state, f"{name}.out_layers.0", h, 1e-5))
    h = _conv(state, f"{name}.out_layers.3", h, padding=1)
    if f"{name}.skip_connection.weight" in state:
        x = _conv(state, f"{name}.skip_connection", x)
    return x + h


def _attend(state: State, name: str, x: Tensor, source: Tensor, heads: int) -> Tensor:
    q = _linear(state, f"{name}.to_q", x).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = _linear(state, f"{name}.to_k", source).unflatten(-1, (heads, -1)).transpose(1, 2)
    v = _linear(state, f"{name}.to_v", source).unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return _linear(state, f"{name}.to_out.0", (weights @ v).transpose(1, 2).flatten(2))


def _transformer(state: State, name: str, x: Tensor, context: Tensor, unet: LdmUNet) -> Tensor:
    heads = unet.heads(x.shape[1])
    h = _conv(state, f"{name}.proj_in", _norm(state, f"{name}.norm", x, 1e-6))
    size = h.shape[2:]
    h = h.flatten(2).transpose(1, 2)
    for depth in range(unet.transformer_depth):
        block = f"{name}.transformer_blocks.{depth}"
        norms = [
            (state[f"{block}.norm{i}.weight"], state[f"{block}.norm{i}.bias"]) for i in (1, 2, 3)
        ]
        normed = F.layer_norm(h, h.shape[-1:], *norms[0])
        h = h + _attend(state, f"{block}.attn1", normed, normed, heads)
        normed = F.layer_norm(h, h.shape[-1:], *norms[1])
        h = h + _attend(state, f"{block}.attn2", normed, context, heads)
        normed = F.layer_norm(h, h.shape[-1:], *norms[2])
        values, gate = _linear(state, f"{block}.ff.net.0.proj", normed).chunk(2, dim=-1)
        h = h + _linear(state, f"{block}.ff.net.2", values * F.gelu(gate))
    h = h.transpose(1, 2).unflatten(2, size)
    return x + _conv(state, f"{name}.proj_out", h)


def unet_forward(
    state: State, unet: LdmUNet, x: Tensor, timestep: int, context: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Taps (middle, up_00, ...) and the predicted noise."""
    state = {k.removeprefix("model.diffusion_model."): v for k, v in state.items()}
    half = unet.model_channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=x.dtype) / half)
    angles = timestep * frequencies[None].expand(len(x), half)
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    time = _linear(state, "time_embed.2", F.silu(_linear(state, "time_embed.0", time)))

    def run(block: str, h: Tensor) -> Tensor:
        for place in range(4):
            name = f"{block}.{place}"
            if f"{name}.in_layers.0.weight" in state:
                h = _residual(state, name, h, time)
            elif f"{name}.proj_in.weight" in state:
                h = _transformer(state, name, h, context, unet)
            elif f"{name}.op.weight" in state:
                h = _conv(state, f"{name}.op", h, stride=2, padding=1)
            elif f"{name}.conv.weight" in state:
                h = _conv(state, f"{name}.conv", F.interpolate(h, scale_factor=2.0), padding=1)
            elif f"{name}.weight" in state:
                h = _conv(state, name, h, padding=1)
        return h

    def count(part: str) -> int:
        return 1 + max(int(k.split(".")[1]) for k in state if k.startswith(part))

    h, skips = x, []
    for index in range(count("input_blocks")):
        h = run(f"input_blocks.{index}", h)
        skips.append(h)
    h = run("middle_block", h)
    taps = {"middle": h}
    for index in range(count("output_blocks")):
        h = run(f"output_blocks.{index}", torch.cat([h, skips.pop()], dim=1))
        taps[f"up_{index:02d}"] = h
    out = _conv(state, "out.2", F.silu(_norm(state, "out.0", h, 1e-5)), padding=1)
    return taps, out


def grid_context(state: State, heads: int, layers: int, embedding: Tensor, cells: int) -> Tensor:
    """ZoomLDM's condition of one 20x embedding: (D,) -> (1 + cells, channels)."""
    state = {k.removeprefix("cond_stage_model."): v for k, v in state.items()}

    def normed(name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    deviations = embedding - embedding.mean()
    spread = (deviations.square().sum() / (len(embedding) - 1)).sqrt()  # torch's std is unbiased
    grid = [state["pad_token"][0, 0]] * cells
    grid[cells // 2] = _linear(state, "dim_reduce", deviations / (spread + 1e-8))
    x = torch.stack([state["mag_embedding.weight"][0], *grid]) + state["encoder.pos_embedding"][0]
    for index in range(layers):
        layer = f"encoder.layers.encoder_layer_{index}"
        inside = normed(f"{layer}.ln_1", x)
        attention = f"{layer}.self_attention"
        joint = F.linear(
            inside, state[f"{attention}.in_proj_weight"], state[f"{attention}.in_proj_bias"]
        )
        q, k, v = (part.unflatten(1, (heads, -1)).transpose(0, 1) for part in joint.chunk(3, dim=1))
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        x = x + _linear(state, f"{attention}.out_proj", (weights @ v).transpose(0, 1).flatten(1))
        inside = F.gelu(_linear(state, f"{layer}.mlp.0", normed(f"{layer}.ln_2", x)))
        x = x + _linear(state, f"{layer}.mlp.3", inside)
    return normed("layer_norm", _linear(state, "final_proj", normed("encoder.ln", x)), 1e-5)


# Checkpoints


def small_project() -> dict[str, Any]:
    """A project YAML's content: the smallest model of the supported kind."""
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.0015,
                "linear_end": 0.0195,
                "timesteps": 1000,
                "scale_factor": 0.7,
                "conditioning_key": "crossattn",
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {
                        "in_channels": 3,
                        "out_channels": 3,
                        "model_channels": 32,
                        "attention_resolutions": [8, 4, 2],
                        "num_res_blocks": 2,
                        "channel_mult": [1, 1, 1, 2],
                        "num_heads": 2,
                        "use_spatial_transformer": True,
                        "transformer_depth": 1,
                        "context_dim": 16,
                    },
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.VQModelInterface",
                    "params": {
                        "embed_dim": 3,
                        "n_embed": 8,
                        "ddconfig": {
                            "double_z": False,
                            "z_channels": 3,
                            "resolution": 256,
                            "in_channels": 3,
                            "out_ch": 3,
                            "ch": 32,
                            "ch_mult": [1, 1, 1],
                            "num_res_blocks": 1,
                            "attn_resolutions": [],
                            "dropout": 0.0,
                        },
                    },
                },
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.SSLEmbedder",
                    "params": {"patch_embed_dim": 24, "region_embed_dim": 12},
                },
            },
        }
    }


ENCODER = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 16, "image_size": 256}


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Float32 weights that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        fan_in = max(1, math.prod(shape[1:]))
        values = torch.randn(shape, generator=generator) * (fan_in**-0.5 if len(shape) > 1 else 0.1)
        is_scale = len(shape) == 1 and name.endswith("weight")
        state[name] = values + 1 if is_scale else values
    return state


def ldm_state(
    unet: LdmUNet, stage: LdmFirstStage, dims: tuple[int, int | None], seed: int = 0
) -> State:
    """Every tensor of a latent diffusion model; ``dims`` are those of patch and region."""
    shapes = {
        **unet_shapes(unet),
        **first_stage_shapes(stage),
        **conditioner_shapes(*dims, unet.context_dim),
    }
    return random_state(shapes, seed)


def zoom_project() -> dict[str, Any]:
    """The same with ZoomLDM's conditioner, and what else its YAML has."""
    project = small_project()
    params = project["model"]["params"]
    params |= {"use_ema": True, "x_feat_extracted": True, "cond_stage_key": "hybrid"}
    params["unet_config"]["params"] |= {"use_fp16": True, "use_checkpoint": True}
    params["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.EmbeddingViT2_5",
        "params": {
            "feat_key": "ssl_feat",
            "mag_key": "mag",
            "num_layers": 2,
            "num_heads": 4,
            "input_channels": 24,
            "hidden_channels": 16,
            "output_channels": 16,
            "vit_mlp_dim": 40,
            "p_uncond": 0.1,
        },
    }
    return project


def zoom_state(settings: LdmProject) -> State:
    """Every tensor of a ZoomLDM."""
    assert settings.grid is not None
    shapes = {
        **unet_shapes(settings.unet),
        **first_stage_shapes(settings.first_stage),
        **grid_conditioner_shapes(settings.grid),
    }
    return random_state(shapes)


def averaged_state(state: State) -> State:
    """The averaged weights that LitEma would keep of the UNet: the plain ones and one."""
    return {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value + 1
        for name, value in state.items()
        if name.startswith("model.")
    }


def encoder_state(table_side: int = 14) -> State:
    """Tensors of the encoder that ``ENCODER`` describes, by timm's names."""
    config = EncoderConfig.from_dict({**ENCODER, "image_size": 16 * table_side}, "test")
    vit = PatchEncoder(config).network
    return random_state({k: tuple(v.shape) for k, v in vit.state_dict().items()}, seed=1)


def write_files(
    folder: Path, project: dict[str, Any], state: State, **more: Any
) -> dict[str, Path]:
    """The three files of an import and the encoder's JSON -> keyword arguments of import_bundle."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "ldm": folder / "last.ckpt",
        "project": folder / "project.yaml",
        "encoder": folder / "vit.pth",
        "encoder_config": folder / "encoder.json",
    }
    torch.save(
        {"state_dict": state, "hyper_parameters": argparse.Namespace(lr=1e-4), **more}, files["ldm"]
    )
    files["project"].write_text(yaml.safe_dump(project), encoding="utf-8")
    teacher = {f"module.backbone.{name}": value for name, value in encoder_state().items()}
    teacher["module.head.mlp.0.weight"] = torch.zeros(2, 2)
    torch.save({"teacher": teacher, "epoch": 3}, files["encoder"])
    files["encoder_config"].write_text(json.dumps(ENCODER), encoding="utf-8")
    return files
