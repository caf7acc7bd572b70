"""Read the project YAML of a latent diffusion run, as the code of its authors reads it.

Only settings that change what the networks compute are read; every one of them must be one that we
can honour, since a setting that is passed over gives wrong features without any error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pathsegdiff.diffusion.compvis import LdmFirstStage, LdmGridConditioner, LdmUNet
from pathsegdiff.diffusion.schedule import MAX_NUMBER, NoiseSchedule
from pathsegdiff.errors import BundleError, ConfigError

#: Project files have about 3 kB; a larger one is something else, and a megabyte takes a minute.
_MAX_YAML_BYTES = 1 << 16
#: Aliases multiply when merged; honest project files have none.
_MAX_ALIASES = 16
_MAX_DEPTH = 32
#: Of a single value: a number of more digits could not even be written in a message.
_MAX_VALUE = 1000

#: CompVis' name -> diffusers' name, which is ours.
_BETA_SCHEDULES = {
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "cosine": "squaredcos_cap_v2",
}
#: Last part of ``cond_stage_config.target`` -> (default D, default region D or None).
_CONDITIONERS: dict[str, tuple[int, int | None]] = {
    "PatchEmbedder": (768, None),
    "SSLEmbedder": (384, 768),
}
#: ZoomLDM's, and the cells of its grid, which its code does not take from the setting.
_GRID_CONDITIONER = "EmbeddingViT2_5"
_GRID_CELLS = 64
#: UNet options that change the network and that diffusers' UNet cannot follow -> what they must be.
_UNET_MUST_BE: dict[str, tuple[Any, ...]] = {
    "dims": (2,),
    "conv_resample": (True,),
    "use_spatial_transformer": (True,),
    "use_scale_shift_norm": (False,),
    "resblock_updown": (False,),
    "num_classes": (None,),
    "n_embed": (None,),
    "disable_self_attentions": (None, False),
    "use_linear_in_transformer": (False,),
    "use_new_attention_order": (False,),
}
_FIRST_STAGE_MUST_BE: dict[str, tuple[Any, ...]] = {
    "resamp_with_conv": (True,),
    "use_linear_attn": (False,),
    "attn_type": ("vanilla",),
    "tanh_out": (False,),
    "give_pre_end": (False,),
}
#: Options without a default in the authors' code, or whose default is not what we support.
_REQUIRED = object()


@dataclass(frozen=True, kw_only=True)
class LdmProject:
    """What a project YAML says.

    Attributes:
        unet: The UNet.
        first_stage: The autoencoder.
        resolution: Pixels along one side that the autoencoder was trained on.
        schedule: The noise schedule.
        scale_factor: Multiplies the latent.
        scale_by_std: Whether the checkpoint's own ``scale_factor`` counts instead.
        patch_embed_dim: D of the patch embedding.
        region_embed_dim: Of the region embedding; None for a model with one token.
        normalize: Whether embeddings are scaled to unit norm first.
        grid: The conditioner where it is ZoomLDM's, whose embeddings are always standardised.
    """

    unet: LdmUNet
    first_stage: LdmFirstStage
    resolution: int
    schedule: NoiseSchedule
    scale_factor: float
    scale_by_std: bool
    patch_embed_dim: int
    region_embed_dim: int | None
    normalize: bool
    grid: LdmGridConditioner | None = None


def read_project(path: Path) -> LdmProject:
    """Read a project YAML.

    Raises:
        BundleError: If it is no project of a latent diffusion model, or sets what we cannot honour.
    """
    root = _Node(_load_yaml(path), str(path), "")
    params = root.node("model").node("params")
    conditioning_key = params.get("conditioning_key", "crossattn")
    if conditioning_key != "crossattn":
        params.fail("conditioning_key", "'crossattn'", conditioning_key)
    if params.get("parameterization", "eps") != "eps":
        params.fail("parameterization", "'eps'", params.get("parameterization", None))
    unet = _read_unet(params.node("unet_config").node("params"))
    first_stage, resolution = _read_first_stage(params.node("first_stage_config"))
    if unet.in_channels != first_stage.embed_dim or unet.out_channels != first_stage.embed_dim:
        raise BundleError(
            f"{path}: the UNet takes {unet.in_channels} and gives {unet.out_channels} channels, "
            f"the first stage makes {first_stage.embed_dim}"
        )
    conditioner = params.node("cond_stage_config")
    grid = None
    if conditioner.text("target").rpartition(".")[2] == _GRID_CONDITIONER:
        grid = _read_grid(conditioner.node("params"), unet.context_dim)
        patch_dim, region_dim, normalize = grid.input_channels, None, False
    else:
        patch_dim, region_dim, normalize = _read_conditioner(conditioner, unet.context_dim)
    return LdmProject(
        unet=unet,
        first_stage=first_stage,
        resolution=resolution,
        schedule=_read_schedule(params),
        scale_factor=params.number("scale_factor", 1.0),
        scale_by_std=params.boolean("scale_by_std", False),
        patch_embed_dim=patch_dim,
        region_embed_dim=region_dim,
        normalize=normalize,
        grid=grid,
    )


def _read_schedule(params: "_Node") -> NoiseSchedule:
    name = params.get("beta_schedule", "linear")
    if name not in _BETA_SCHEDULES:
        params.fail("beta_schedule", f"one of {', '.join(_BETA_SCHEDULES)}", name)
    if name == "cosine" and params.number("cosine_s", 8e-3) != 8e-3:
        params.fail("cosine_s", "0.008", params.get("cosine_s", None))
    try:
        return NoiseSchedule(  # the defaults are those of CompVis' DDPM
            beta_schedule=_BETA_SCHEDULES[name],
            beta_start=params.number("linear_start", 1e-4),
            beta_end=params.number("linear_end", 2e-2),
            timesteps=params.integer("timesteps", 1000, most=100_000),
        )
    except ConfigError as error:
        raise BundleError(f"{params.where}: {error}") from None


def _read_unet(params: "_Node") -> LdmUNet:
    params.check(_UNET_MUST_BE, {"use_spatial_transformer": False})
    mult = params.integers("channel_mult", (1, 2, 4, 8), most=64)
    blocks = params.get("num_res_blocks", _REQUIRED)
    if isinstance(blocks, list):  # one per level in later versions of the code
        if len(set(map(repr, blocks))) != 1 or len(blocks) != len(mult):
            params.fail("num_res_blocks", "the same for every level", blocks)
        params = params.replaced("num_res_blocks", blocks[0])
    context = params.get("context_dim", _REQUIRED)
    if isinstance(context, list) and len(context) == 1:
        params = params.replaced("context_dim", context[0])
    model_channels = params.integer("model_channels", most=4096)
    # CompVis: -1 stands for "not set" in both, and head channels count if they are set
    heads = params.integer("num_heads", -1, least=-1, most=1024)
    head_channels = params.integer("num_head_channels", -1, least=-1, most=4096)
    if heads < 1 and head_channels < 1:
        params.fail("num_heads or num_head_channels", "above 0", None)
    unet = LdmUNet(
        in_channels=params.integer("in_channels", most=256),
        out_channels=params.integer("out_channels", most=256),
        model_channels=model_channels,
        channel_mult=mult,
        num_res_blocks=params.integer("num_res_blocks", most=16),
        attention_resolutions=params.integers("attention_resolutions", most=1024),
        num_heads=heads if head_channels < 1 else None,
        num_head_channels=head_channels if head_channels >= 1 else None,
        transformer_depth=params.integer("transformer_depth", 1, most=64),
        context_dim=params.integer("context_dim", most=1 << 16),
    )
    if mult[0] != 1:  # its last convolution takes model_channels, whatever the first level has
        params.fail("channel_mult", "a list that starts with 1", list(mult))
    if model_channels % 32:
        params.fail("model_channels", "a multiple of 32, for the 32 groups of GroupNorm", None)
    for width in unet.block_out_channels:
        divisor = unet.num_heads if unet.num_heads is not None else unet.num_head_channels
        if divisor is None or divisor > width or (unet.num_heads is None and width % divisor):
            params.fail("num_heads or num_head_channels", f"a divisor of {width} channels", divisor)
    return unet


def _read_first_stage(node: "_Node") -> tuple[LdmFirstStage, int]:
    target = node.text("target").rpartition(".")[2]
    if target not in ("VQModelInterface", "VQModel", "AutoencoderKL"):
        node.fail("target", "VQModelInterface or AutoencoderKL", target)
    kind = "kl" if target == "AutoencoderKL" else "vq"
    params = node.node("params")
    config = params.node("ddconfig")
    config.check(_FIRST_STAGE_MUST_BE, {})
    if config.boolean("double_z", True) != (kind == "kl"):
        config.fail("double_z", f"{kind == 'kl'} for a {target}", config.get("double_z", True))
    mult = config.integers("ch_mult", (1, 2, 4, 8), most=64)
    resolution = config.integer("resolution", most=1 << 16)
    attends = config.integers("attn_resolutions", most=1 << 16)
    stage = LdmFirstStage(
        kind=kind,
        embed_dim=params.integer("embed_dim", most=256),
        z_channels=config.integer("z_channels", most=256),
        codes=params.integer("n_embed", most=1 << 24) if kind == "vq" else 0,
        in_channels=config.integer("in_channels", most=256),
        out_channels=config.integer("out_ch", most=256),
        channels=config.integer("ch", most=4096),
        channel_mult=mult,
        num_res_blocks=config.integer("num_res_blocks", most=16),
        attention=tuple(resolution // 2**level in attends for level in range(len(mult))),
    )
    if stage.in_channels != 3 or stage.out_channels != 3:
        config.fail("in_channels and out_ch", "3", (stage.in_channels, stage.out_channels))
    if stage.channels % 32:
        config.fail("ch", "a multiple of 32, for the 32 groups of GroupNorm", stage.channels)
    if kind == "kl" and stage.embed_dim != stage.z_channels:
        params.fail("embed_dim", f"z_channels ({stage.z_channels})", stage.embed_dim)
    return stage, resolution


def _read_conditioner(node: "_Node", context_dim: int) -> tuple[int, int | None, bool]:
    target = node.text("target").rpartition(".")[2]
    if target not in _CONDITIONERS:
        node.fail("target", " or ".join((*_CONDITIONERS, _GRID_CONDITIONER)), target)
    patch_default, region_default = _CONDITIONERS[target]
    params = node.node("params", optional=True)
    target_dim = params.integer("target_dim", context_dim, most=1 << 16)
    if target_dim != context_dim:
        params.fail("target_dim", f"the UNet's context_dim ({context_dim})", target_dim)
    region = None
    if region_default is not None:
        region = params.integer("region_embed_dim", region_default, most=1 << 16)
    return (
        params.integer("patch_embed_dim", patch_default, most=1 << 16),
        region,
        params.boolean("normalize_ssl", False),
    )


def _read_grid(params: "_Node", context_dim: int) -> LdmGridConditioner:
    for name, default, must in (
        ("hidden_channels", _REQUIRED, context_dim),
        ("output_channels", 512, context_dim),
        ("seq_length", _GRID_CELLS, _GRID_CELLS),
    ):
        found = params.integer(name, default, most=1 << 16)
        if found != must:
            params.fail(name, str(must), found)
    usual = LdmGridConditioner()
    heads = params.integer("num_heads", usual.num_heads, most=1024)
    if context_dim % heads:
        params.fail("num_heads", f"a divisor of {context_dim} channels", heads)
    return LdmGridConditioner(
        input_channels=params.integer("input_channels", usual.input_channels, most=1 << 16),
        channels=context_dim,
        num_layers=params.integer("num_layers", usual.num_layers, most=64),
        num_heads=heads,
        mlp_dim=params.integer("vit_mlp_dim", usual.mlp_dim, most=1 << 16),
        cells=_GRID_CELLS,
        magnifications=params.integer("mag_levels", usual.magnifications, most=64),
    )


def _load_yaml(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_YAML_BYTES:
            raise BundleError(f"{path} is too large to be a project YAML; is it the checkpoint?")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise BundleError(f"{path} is a folder; give the project YAML in it") from None
    except UnicodeDecodeError:
        raise BundleError(f"{path} is not a text file; give the project YAML") from None
    try:
        _check_yaml_size(text, path)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise BundleError(f"{path} is not valid YAML: {line:.160}") from None


def _check_yaml_size(text: str, path: Path) -> None:
    """Look at the YAML event by event, before anything is built of it."""
    aliases = depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_VALUE:
            raise BundleError(f"{path} is no project YAML: a value has {len(event.value)} letters")
        if aliases > _MAX_ALIASES:
            raise BundleError(f"{path} has more than {_MAX_ALIASES} YAML aliases; write them out")
        if depth > _MAX_DEPTH:
            raise BundleError(f"{path} is not valid YAML for a project: nested too deeply")


class _Node:
    """Typed reads from one mapping of the YAML; each failure is one line that names the setting."""

    def __init__(self, values: Any, where: str, path: str) -> None:
        if not isinstance(values, Mapping):
            raise BundleError(
                f"{where} is not the project YAML of a latent diffusion model: "
                f"{path or 'its top'} is no mapping"
            )
        self._values: Mapping[str, Any] = values
        self.where, self._path = where, path

    def replaced(self, name: str, value: Any) -> "_Node":
        return _Node({**self._values, name: value}, self.where, self._path)

    def _name(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def fail(self, name: str, allowed: str, value: Any) -> None:
        got = "" if value is None else f", got {value!r:.60}"
        raise BundleError(f"{self.where}: {self._name(name)} must be {allowed}{got}")

    def get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise BundleError(f"{self.where}: {self._name(name)} is missing")
            return default
        return value

    def node(self, name: str, optional: bool = False) -> "_Node":
        value = self.get(name, {} if optional else _REQUIRED)
        return _Node(value, self.where, self._name(name))

    def check(self, allowed: dict[str, tuple[Any, ...]], defaults: dict[str, Any]) -> None:
        for name, values in allowed.items():
            value = self.get(name, defaults.get(name, values[0]))
            if value not in values:
                self.fail(name, " or ".join(repr(one) for one in values), value)

    def text(self, name: str) -> str:
        value = self.get(name, _REQUIRED)
        if not isinstance(value, str):
            self.fail(name, "text", value)
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return value

    def integer(
        self, name: str, default: Any = _REQUIRED, *, least: int = 1, most: int = 1 << 30
    ) -> int:
        return self._integer(name, self.get(name, default), least, most)

    def _integer(self, name: str, value: Any, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            self.fail(name, f"a whole number from {least} to {most}", repr(value))
        return value

    def integers(
        self, name: str, default: Any = _REQUIRED, *, most: int = 1 << 30
    ) -> tuple[int, ...]:
        values = self.get(name, default)
        if not isinstance(values, list | tuple) or len(values) > 16:
            self.fail(name, "a list of up to 16 whole numbers", values)
        return tuple(self._integer(name, value, 1, most) for value in values)

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, str):  # YAML 1.1 reads 1e-4, without a point, as text
            try:
                value = float(value)
            except ValueError:
                self.fail(name, "a number", value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(name, "a number", value)
        if not 0 < value <= MAX_NUMBER:
            self.fail(name, "a number above 0", value)
        return float(value)
