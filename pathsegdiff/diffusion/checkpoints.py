"""Turn the authors' files into a model bundle: LDM checkpoint, project YAML, encoder checkpoint.

The tensors are renamed by diffusers' own conversion. Which tensors must be there, and in which
shape, is checked before any of them is read. Nothing in the files is executed (``unpickle``).
"""

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathsegdiff.diffusion.bundle import (
    PATCH_PX,
    Bundle,
    build_part,
    check_new_folder,
    check_taps,
    check_tensors,
    describe,
    file_sha256,
    load_bundle,
    new_provenance,
    read_json,
    weights_of,
    write_card,
    write_part,
    writing_bundle,
)
from pathsegdiff.diffusion.compvis import (
    CONDITIONER_PREFIX,
    FIRST_STAGE_PREFIX,
    UNET_PREFIX,
    LdmFirstStage,
    LdmUNet,
    conditioner_shapes,
    first_stage_shapes,
    grid_conditioner_shapes,
    unet_shapes,
)
from pathsegdiff.diffusion.conditioning import GRID, KIND
from pathsegdiff.diffusion.encoder import (
    NAMED_ENCODERS,
    AnyEncoderConfig,
    EncoderConfig,
    NoEncoderConfig,
    resize_position_table,
)
from pathsegdiff.diffusion.presets import Preset
from pathsegdiff.diffusion.project import LdmProject, read_project
from pathsegdiff.diffusion.schedule import NoiseSchedule
from pathsegdiff.diffusion.taps import plan_taps
from pathsegdiff.diffusion.unet import unet_config
from pathsegdiff.diffusion.unpickle import Checkpoint, TensorRef, open_checkpoint
from pathsegdiff.errors import BundleError

logger = logging.getLogger(__name__)

#: Parts of a training checkpoint that extraction has no use for.
IGNORED_PREFIXES = (
    "model_ema.",
    "inception.",
    "loss.",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
    "cond_stage_model_ema.",
)
#: The UNet's averaged weights among them, which --ema takes.
_AVERAGED_PREFIX = "model_ema.diffusion_model"
#: Buffers that CompVis' DDPM registers; the YAML says the same, which is checked for the schedule.
# fmt: off
IGNORED_BUFFERS = frozenset({
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "lvlb_weights", "logvar", "scale_factor", "cond_ids",
})
# fmt: on
#: The file that HIPT publishes (facts: 704,238,867 bytes).
HIPT_SHA256 = "6960cd5a8657dc8bb214671aa0c6dbd3f5b698e84386884955836487ddc89e24"


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import did.

    Attributes:
        bundle: The result.
        parameters: Part -> how many numbers the checkpoint holds of it.
        tensors: How many were read, of both checkpoints.
        ignored: Prefix or buffer -> how many tensors were left aside.
    """

    bundle: Bundle
    parameters: dict[str, int]
    tensors: int
    ignored: dict[str, int]


def import_bundle(
    *,
    ldm: Path,
    project: Path,
    encoder: Path | None,
    out: Path,
    encoder_config: Path | None = None,
    ema: bool = False,
    ignore: Sequence[str] = (),
    name: str | None = None,
    title: str = "Imported latent diffusion model",
    licence: str = "as the imported files say",
    head_width: int = 256,
    trained: bool = True,
) -> ImportReport:
    """Make a bundle of the authors' files.

    Args:
        ldm: Lightning checkpoint of the latent diffusion model.
        project: Its project YAML.
        encoder: Checkpoint of the patch encoder, as DINO or timm write it; None for a bundle that
            knows the null condition only.
        out: Folder to make.
        encoder_config: JSON with the encoder's shape, or a name in ``NAMED_ENCODERS``; None for
            HIPT's ViT-S/16.
        ema: Take the UNet's averaged weights instead of the plain ones.
        ignore: More prefixes of tensors to leave aside.
        name: Of the model; the folder's name if None.
        title: One line for people.
        licence: Of the weights.
        head_width: Channels of the segmentation head's first layer (256 in the paper).
        trained: False marks the weights as random.

    Raises:
        BundleError: One line, if a file is not what it should be, a tensor is missing, surplus or
            misshapen, or the settings ask for what we cannot compute.
    """
    check_new_folder(out)
    settings = read_project(project)
    described: AnyEncoderConfig
    if encoder is None and encoder_config is not None:
        raise BundleError(f"--encoder-config {encoder_config} describes no encoder: none is given")
    if encoder is None:
        described = NoEncoderConfig(embed_dim=settings.patch_embed_dim, image_size=PATCH_PX)
    else:
        described = _encoder_config(encoder_config)
    shape = _shape(settings, described, project, head_width)
    check_taps(plan_taps(shape.unet, 1), str(project))
    with (
        open_checkpoint(ldm) as ldm_file,
        nullcontext() if encoder is None else open_checkpoint(encoder) as encoder_file,
    ):
        vit: dict[str, TensorRef] = {}
        if encoder_file is not None:
            vit, shape = _encoder_tensors(encoder_file, shape, encoder_config)
        tensors = _state_dict(ldm_file)
        parts = {
            "unet": _unet_tensors(tensors, settings.unet, ldm, ema),
            "autoencoder": _check(tensors, FIRST_STAGE_PREFIX, first_stage_shapes, settings, ldm),
            "conditioner": _check(tensors, CONDITIONER_PREFIX, _conditioner, settings, ldm),
        }
        ignored = _leftovers(tensors, ignore, ldm, ema)
        _check_schedule(ldm_file, tensors, settings.schedule)
        shape = replace(shape, latent_scale=_latent_scale(ldm_file, tensors, settings))
        card = describe(
            shape,
            name=name or out.resolve().name,
            title=title,
            licence=licence,
            trained=trained,
            provenance=_provenance(ldm=ldm, project=project, encoder=encoder, ema=ema),
        )
        parameters = {}
        with writing_bundle(out) as folder:
            # one part at a time: the largest is the peak of the memory needed
            for part, config, state in (
                ("encoder", shape.encoder.to_dict(), vit),
                ("conditioner", shape.conditioner, parts["conditioner"]),
                ("autoencoder", shape.autoencoder, parts["autoencoder"]),
                ("unet", shape.unet, parts["unet"]),
            ):
                source = (part == "encoder" and encoder_file) or ldm_file
                loaded = {key: _read(source, key, ref) for key, ref in state.items()}
                converted = _CONVERT[part](loaded, config)
                _check_converted(part, config, converted)
                parameters[part] = sum(ref.numel for ref in state.values())
                write_part(folder, part, config, converted)
                del loaded, converted
            write_card(folder, card)
    return ImportReport(
        bundle=load_bundle(out),
        parameters=parameters,
        tensors=len(vit) + sum(len(state) for state in parts.values()),
        ignored=ignored,
    )


def _shape(
    settings: LdmProject, encoder: AnyEncoderConfig, project: Path, head_width: int
) -> Preset:
    """Everything but the weights; the latent scale is the YAML's."""
    if settings.patch_embed_dim != encoder.embed_dim:
        raise BundleError(
            f"{project}: the conditioner takes vectors of {settings.patch_embed_dim}, the encoder "
            f"gives {encoder.embed_dim}; describe the encoder with --encoder-config ("
            f"FILE, {' or '.join(NAMED_ENCODERS)})"
        )
    if encoder.image_size != PATCH_PX:
        raise BundleError(
            f"the encoder's image_size is {encoder.image_size}, it must be {PATCH_PX}: "
            "that is what it is run on, whatever its position table was trained on"
        )
    stride = 2 ** (len(settings.first_stage.channel_mult) - 1)
    levels = len(settings.unet.channel_mult)
    if PATCH_PX % (stride * 2 ** (levels - 1)):
        raise BundleError(
            f"{project}: {levels} levels on a stride of {stride} do not divide "
            f"a {PATCH_PX} px patch"
        )
    return Preset(
        name="imported",
        title="",
        head_width=head_width,
        encoder=encoder,
        conditioner=_conditioner_config(settings),
        autoencoder=_autoencoder_config(settings.first_stage, settings.scale_factor),
        unet=_unet_config(settings.unet, PATCH_PX // stride),
        schedule=settings.schedule,
        latent_scale=settings.scale_factor,
    )


def _conditioner_config(settings: LdmProject) -> dict[str, Any]:
    grid = settings.grid
    if grid is None:
        return {
            "patch_embed_dim": settings.patch_embed_dim,
            "region_embed_dim": settings.region_embed_dim,
            "context_dim": settings.unet.context_dim,
            "normalize": settings.normalize,
        }
    return {
        KIND: GRID,
        "patch_embed_dim": grid.input_channels,
        "context_dim": grid.channels,
        "depth": grid.num_layers,
        "num_heads": grid.num_heads,
        "mlp_dim": grid.mlp_dim,
        "cells": grid.cells,
        "magnifications": grid.magnifications,
        "magnification": 0,  # 20x, which is what every model here sees
    }


def _unet_config(unet: LdmUNet, latent_size: int) -> dict[str, Any]:
    heads = tuple(unet.heads(width) for width in unet.block_out_channels)
    return unet_config(
        latent_channels=unet.in_channels,
        latent_size=latent_size,
        block_out_channels=unet.block_out_channels,
        attention=unet.attention,
        layers_per_block=unet.num_res_blocks,
        num_heads=heads[0] if len(set(heads)) == 1 else heads,
        context_dim=unet.context_dim,
        transformer_depth=unet.transformer_depth,
    )


def _autoencoder_config(stage: LdmFirstStage, scale: float) -> dict[str, Any]:
    config: dict[str, Any] = {
        "_class_name": "VQModel" if stage.kind == "vq" else "AutoencoderKL",
        "in_channels": stage.in_channels,
        "out_channels": stage.out_channels,
        "down_block_types": [
            "AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D"
            for attends in stage.attention
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D"
            for attends in reversed(stage.attention)
        ],
        "block_out_channels": list(stage.block_out_channels),
        "layers_per_block": stage.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": stage.z_channels,
        "sample_size": PATCH_PX,
        "norm_num_groups": 32,
        "scaling_factor": scale,  # never diffusers' default, 0.18215
        "mid_block_add_attention": True,
    }
    if stage.kind == "vq":
        config |= {
            "num_vq_embeddings": stage.codes,
            "vq_embed_dim": stage.embed_dim,
            "norm_type": "group",
        }
    return config


def _encoder_config(file: Path | None) -> EncoderConfig:
    return EncoderConfig.from_dict(_described(file), str(file))


def _described(file: Path | None) -> Any:
    """What the user says of the encoder's shape, unchecked."""
    if file is None:
        return {}
    if str(file) in NAMED_ENCODERS:  # a file of such a name is ./uni
        return NAMED_ENCODERS[str(file)].to_dict()
    return read_json(file)


def _tensors(values: Any) -> dict[str, TensorRef]:
    """The tensors of a dictionary that was read from a checkpoint."""
    if not isinstance(values, dict):
        return {}
    return {
        name: value
        for name, value in values.items()
        if isinstance(name, str) and isinstance(value, TensorRef)
    }


def _describe_root(root: Any) -> str:
    if not isinstance(root, dict):
        return f"it holds {type(root).__name__}"
    names = [repr(key[:40] if isinstance(key, str) else type(key)) for key in list(root)[:6]]
    return f"it holds {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"


def _state_dict(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    root = checkpoint.root
    tensors = _tensors(root.get("state_dict") if isinstance(root, dict) else None)
    tensors = tensors or _tensors(root)
    if not any(name.startswith(UNET_PREFIX) for name in tensors):
        hint = "; is it the encoder's?" if isinstance(root, dict) and "teacher" in root else ""
        raise BundleError(
            f"{checkpoint.path} is no checkpoint of a latent diffusion model: it has no tensor "
            f"called {UNET_PREFIX}...; {_describe_root(root)}{hint}"
        )
    return tensors


def _check(
    tensors: Mapping[str, TensorRef],
    prefix: str,
    shapes: Any,
    settings: LdmProject,
    path: Path,
) -> dict[str, TensorRef]:
    expected = shapes(settings.first_stage if prefix == FIRST_STAGE_PREFIX else settings)
    found = {
        name: ref
        for name, ref in tensors.items()
        if name.startswith(prefix) and not name.startswith(IGNORED_PREFIXES)
    }
    check_tensors(expected, {name: ref.shape for name, ref in found.items()}, str(path))
    return found


def _conditioner(settings: LdmProject) -> dict[str, tuple[int, ...]]:
    if settings.grid is not None:
        return grid_conditioner_shapes(settings.grid)
    return conditioner_shapes(
        settings.patch_embed_dim, settings.region_embed_dim, settings.unet.context_dim
    )


def _unet_tensors(
    tensors: Mapping[str, TensorRef], unet: LdmUNet, path: Path, ema: bool
) -> dict[str, TensorRef]:
    expected = unet_shapes(unet)
    plain = {name: ref for name, ref in tensors.items() if name.startswith(UNET_PREFIX)}
    if not ema:
        check_tensors(expected, {name: ref.shape for name, ref in plain.items()}, str(path))
        return plain
    # LitEma registers buffers, whose names may have no dots
    names = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in expected}
    averaged = {name: ref for name, ref in tensors.items() if name.startswith(_AVERAGED_PREFIX)}
    if not averaged:
        raise BundleError(f"{path} has no averaged weights (model_ema.); leave --ema out")
    check_tensors(
        {names[name]: shape for name, shape in expected.items()},
        {name: ref.shape for name, ref in averaged.items()},
        str(path),
    )
    return {name: averaged[flat] for name, flat in names.items()}


def _leftovers(
    tensors: Mapping[str, TensorRef], ignore: Sequence[str], path: Path, ema: bool
) -> dict[str, int]:
    """Count what is not used, and refuse what we cannot name."""
    used = (UNET_PREFIX, FIRST_STAGE_PREFIX, CONDITIONER_PREFIX)
    prefixes = (*IGNORED_PREFIXES, *ignore)
    if ema:  # the averaged weights are used, the plain ones are not
        prefixes = (UNET_PREFIX, *prefixes)
    counts: dict[str, int] = {}
    unknown = []
    for name in tensors:
        if ema and name.startswith(_AVERAGED_PREFIX):
            continue
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is not None:
            counts[prefix] = counts.get(prefix, 0) + 1
        elif name in IGNORED_BUFFERS:
            counts["buffers"] = counts.get("buffers", 0) + 1
        elif not name.startswith(used):
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise BundleError(
            f"{path}: {len(unknown)} surplus tensors that no known part has: "
            f"{', '.join(unknown[:3])}{more}; --ignore PREFIX leaves them aside"
        )
    return counts


def _check_schedule(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorRef], schedule: NoiseSchedule
) -> None:
    """The authors' code would compute with the checkpoint's buffer: it must be the YAML's.

    Raises:
        BundleError: If they differ by more than float16 rounds.
    """
    ref = tensors.get("alphas_cumprod")
    if ref is None:
        return
    ours = schedule.alphas_cumprod()
    if ref.shape != tuple(ours.shape):
        raise BundleError(
            f"{checkpoint.path}: its noise schedule has {ref.shape} steps, the YAML's {len(ours)}"
        )
    theirs = _read(checkpoint, "alphas_cumprod", ref).double()
    worst = int((theirs - ours).abs().argmax())
    if abs(float(theirs[worst] - ours[worst])) > 1e-3:
        raise BundleError(
            f"{checkpoint.path}: its noise schedule is not the YAML's: alphas_cumprod[{worst}] is "
            f"{float(theirs[worst]):.6f} there and {float(ours[worst]):.6f} here; "
            "is it another run's YAML?"
        )


def _latent_scale(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorRef], settings: LdmProject
) -> float:
    """The factor on latents.

    With ``scale_by_std`` CompVis' code measures it on the first training batch and keeps it as a
    buffer, which wins when the checkpoint is loaded; the YAML then holds only the start value.
    Without, the factor is a plain attribute, and a buffer of that name is passed over.
    """
    ref = tensors.get("scale_factor")
    if not settings.scale_by_std:
        return settings.scale_factor
    if ref is None or ref.numel != 1:
        raise BundleError(
            f"{checkpoint.path}: the YAML says scale_by_std, but the checkpoint has no scale_factor"
        )
    value = float(_read(checkpoint, "scale_factor", ref).reshape(()))
    if value <= 0:
        raise BundleError(f"{checkpoint.path}: scale_factor must be above 0, got {value}")
    return value


def _encoder_tensors(
    checkpoint: Checkpoint, shape: Preset, encoder_config: Path | None
) -> tuple[dict[str, TensorRef], Preset]:
    """The teacher's backbone by timm's names, and the shape with what only the tensors say."""
    root = checkpoint.root
    found: dict[str, TensorRef] = {}
    for candidate in ("teacher", "state_dict", "model", None):
        values = root.get(candidate) if isinstance(root, dict) and candidate else root
        found = _strip(_tensors(values))
        if "pos_embed" in found:
            break
    else:
        hint = ""
        if isinstance(root, dict) and "hyper_parameters" in root:
            hint = "; is it the diffusion model's?"
        raise BundleError(
            f"{checkpoint.path} is no DINO or timm checkpoint of a vision transformer: it has no "
            f"pos_embed, in a teacher or not; {_describe_root(root)}{hint}"
        )
    config = shape.encoder
    assert isinstance(config, EncoderConfig)  # HIPT's checkpoints hold transformers
    described = _described(encoder_config)
    if "mlp_ratio" not in described:
        hidden = found.get("blocks.0.mlp.fc1.weight")
        if hidden is not None and len(hidden.shape) == 2:
            config = replace(config, mlp_ratio=hidden.shape[0] / config.embed_dim)
    if "qkv_bias" not in described:
        config = replace(config, qkv_bias="blocks.0.attn.qkv.bias" in found)
    if "layer_scale" not in described:
        config = replace(config, layer_scale="blocks.0.ls1.gamma" in found)
    expected = _expected_shapes("encoder", config.to_dict())
    shapes = {name: ref.shape for name, ref in found.items()}
    table = shapes.get("pos_embed", ())
    side = round(max(table[1] - 1, 0) ** 0.5) if len(table) == 3 else 0
    if len(table) == 3 and table[1] == 1 + side * side and side >= 1:
        # resized on the way into the bundle, so its length may be another
        shapes["pos_embed"] = (table[0], expected["pos_embed"][1], table[2])
    try:
        check_tensors(expected, shapes, str(checkpoint.path))
    except BundleError as error:
        hint = (
            ""
            if encoder_config
            else " (describe another encoder than HIPT's with --encoder-config)"
        )
        raise BundleError(f"{error}{hint}") from None
    return found, replace(shape, encoder=config)


def _strip(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Names without the prefixes of DistributedDataParallel and DINO, without the training head."""
    stripped = {}
    for name, ref in tensors.items():
        short = name.removeprefix("module.").removeprefix("backbone.")
        if not short.startswith("head."):
            stripped[short] = ref
    return stripped


def _read(checkpoint: Checkpoint, name: str, ref: TensorRef) -> Tensor:
    tensor = checkpoint.read(name, ref)
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    if not tensor.is_floating_point():
        raise BundleError(f"{checkpoint.path}: {name} holds {tensor.dtype}, not weights")
    if not torch.isfinite(tensor).all():
        raise BundleError(f"{checkpoint.path}: {name} holds values that are not finite")
    return tensor


# Conversion: the checkpoint's names -> the bundle's


def _convert_unet(state: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint(state, config)


def _convert_autoencoder(state: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers' conversion and the two things it leaves out: the codebook, attention per level."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_vae_checkpoint,
        update_vae_attentions_ldm_to_diffusers,
    )

    converted = convert_ldm_vae_checkpoint(state, config)
    plain = {name.removeprefix(FIRST_STAGE_PREFIX): value for name, value in state.items()}
    codebook = "quantize.embedding.weight"
    if codebook in plain:
        converted[codebook] = plain[codebook]
    levels = len(config["block_out_channels"])
    for level in range(levels):
        for old, new in (
            (f"encoder.down.{level}.attn", f"encoder.down_blocks.{level}.attentions"),
            (f"decoder.up.{level}.attn", f"decoder.up_blocks.{levels - 1 - level}.attentions"),
        ):
            keys = [name for name in plain if name.startswith(f"{old}.")]
            for key in keys:
                converted.pop(key, None)
            update_vae_attentions_ldm_to_diffusers(
                keys, converted, plain, mapping={"old": old, "new": new}
            )
    return converted


def _convert_conditioner(state: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    plain = {name.removeprefix(CONDITIONER_PREFIX): value for name, value in state.items()}
    if config.get(KIND) != GRID:
        return plain
    converted = {}
    for name, value in plain.items():
        for theirs, ours in _GRID_NAMES:
            name = re.sub(theirs, ours, name)
        converted[name] = value
    return converted


#: torchvision's names of a transformer -> timm's.
_GRID_NAMES = (
    (r"^encoder\.layers\.encoder_layer_([0-9]+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.", ""),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)


def _convert_encoder(state: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    if not state:
        return {}
    grid = (config.get("input_size") or config["image_size"]) // config["patch_size"]
    return {**state, "pos_embed": resize_position_table(state["pos_embed"], grid)}


_CONVERT = {
    "unet": _convert_unet,
    "autoencoder": _convert_autoencoder,
    "conditioner": _convert_conditioner,
    "encoder": _convert_encoder,
}


def _expected_shapes(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        module = build_part(part, dict(config), f"{part} of the imported files")
    target = weights_of(part, module)
    return {name: tuple(value.shape) for name, value in target.state_dict().items()}


def _check_converted(part: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """0 missing, 0 surplus for the model that will load it.

    Raises:
        BundleError: If the conversion lost or made a tensor.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    check_tensors(_expected_shapes(part, config), shapes, f"{part}, converted by diffusers")


def _provenance(*, ldm: Path, project: Path, encoder: Path | None, ema: bool) -> dict[str, str]:
    from_encoder = "none"
    if encoder is not None:
        digits = file_sha256(encoder)
        from_encoder = f"{encoder.name}, sha256 {digits}"
        from_encoder += " (HIPT ViT-256 as published)" if digits == HIPT_SHA256 else ""
    return new_provenance(
        **{
            "ldm": f"{ldm.name}, sha256 {file_sha256(ldm)}",
            "project": f"{project.name}, sha256 {file_sha256(project)}",
            "encoder": from_encoder,
            "UNet weights": "averaged (EMA)" if ema else "plain",
        }
    )
