"""Model bundles: one folder with everything that stage 1 needs of a model.

    model.json      the card: what the model is, its settings, the sha256 of every other file
    unet/           config.json and weights, as diffusers saves a UNet2DConditionModel
    autoencoder/    likewise, a VQModel or an AutoencoderKL
    encoder/        config.json (``EncoderConfig``, ``ConvEncoderConfig`` or ``NoEncoderConfig``)
                    and model.safetensors (timm's key names)
    conditioner/    config.json (arguments of ``Conditioner``, or of ``GridConditioner``) and
                    model.safetensors

Weights keep on disk the dtype that they came with and are computed in whatever ``load`` is asked
for. A bundle is written under another name and renamed when it is whole.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pathsegdiff import __version__
from pathsegdiff.config import ALL_TAPS, content_hash
from pathsegdiff.diffusion.autoencoder import (
    KINDS,
    build_autoencoder,
    latent_channels,
    latent_stride,
)
from pathsegdiff.diffusion.conditioning import GRID, KIND, build_conditioner, context_tokens
from pathsegdiff.diffusion.encoder import NoEncoderConfig, build_encoder, read_encoder_config
from pathsegdiff.diffusion.model import DiffusionModel
from pathsegdiff.diffusion.presets import PRESETS, Preset, build_random
from pathsegdiff.diffusion.schedule import MAX_NUMBER, NoiseSchedule, check_timestep
from pathsegdiff.diffusion.taps import TapSpec, plan_taps
from pathsegdiff.diffusion.unet import build_unet
from pathsegdiff.errors import BundleError, ConfigError
from pathsegdiff.files import file_sha256
from pathsegdiff.products import convolve_linears

logger = logging.getLogger(__name__)

CARD_FILE = "model.json"
#: Bundles that are part of the package.
EMBEDDED = Path(__file__).parent / "embedded"
#: Image pixels along one side of what every model here sees.
PATCH_PX = 256
#: Written into every card; another number is another layout of the folder.
FORMAT = 1
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
#: Part -> its weights; every part has a config.json beside them.
WEIGHT_FILES = {
    "unet": f"unet/{_DIFFUSERS_WEIGHTS}",
    "autoencoder": f"autoencoder/{_DIFFUSERS_WEIGHTS}",
    "encoder": "encoder/model.safetensors",
    "conditioner": "conditioner/model.safetensors",
}
CONFIG_FILES = {part: f"{part}/config.json" for part in WEIGHT_FILES}
#: Settings files are small; a larger one is something else.
_MAX_JSON_BYTES = 1 << 20
#: Of a condition: a grid of 32 x 32 embeddings and more.
_MAX_TOKENS = 1 << 11
#: Of a diffusers config: each is a list of blocks, a number of layers, ...
_MAX_LAYERS = 64


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What ``model.json`` says.

    Attributes:
        name: Short name.
        title: One line for people.
        licence: Of the weights.
        trained: False for random weights; everything made with such a model says so.
        patch_px: Image pixels along one side of a patch.
        head_width: Channels of the segmentation head's first layer that suit the model.
        latent_kind: "vq" (before quantisation) or "kl" (posterior mean).
        latent_scale: Multiplies the latent.
        latent_channels: C.
        latent_stride: Image pixels per latent step.
        schedule: The noise schedule.
        context_tokens: Tokens of the condition: 1 (patch), 2 (patch and region), or those of a
            grid and its magnification.
        taps: Every tap, in tap order.
        provenance: Where the weights come from; free text by key.
        files: Relative path -> sha256 of every other file.
    """

    name: str
    title: str
    licence: str
    trained: bool
    patch_px: int
    head_width: int
    latent_kind: str
    latent_scale: float
    latent_channels: int
    latent_stride: int
    schedule: NoiseSchedule
    context_tokens: int
    taps: tuple[TapSpec, ...]
    provenance: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Content hash of everything that decides a feature; names and licences do not."""
        card = self.to_dict()
        return content_hash({key: card[key] for key in _DECISIVE})

    @property
    def num_channels(self) -> int:
        """Of all taps together; 7296 for the paper's UNet."""
        return sum(tap.channels for tap in self.taps)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        side = self.patch_px // self.latent_stride
        return self.latent_channels, side, side

    def check_timestep(self, timestep: int) -> None:
        """Raise ConfigError unless a timestep lies in the schedule."""
        check_timestep(timestep, self.schedule.timesteps, f" for model {self.name}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "format": FORMAT,
            "name": self.name,
            "title": self.title,
            "licence": self.licence,
            "trained": self.trained,
            "patch_px": self.patch_px,
            "head_width": self.head_width,
            "latent": {
                "kind": self.latent_kind,
                "scale": self.latent_scale,
                "channels": self.latent_channels,
                "stride": self.latent_stride,
            },
            "schedule": self.schedule.to_dict(),
            "context_tokens": self.context_tokens,
            "taps": [
                {
                    "name": tap.name,
                    "module": tap.module_path,
                    "channels": tap.channels,
                    "stride": tap.stride,
                }
                for tap in self.taps
            ],
            "provenance": dict(self.provenance),
            "files": dict(sorted(self.files.items())),
        }

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "ModelCard":
        """Read and check what ``to_dict`` wrote.

        Raises:
            BundleError: If something is missing or cannot be; ``where`` names the file.
        """
        card = _Fields(values, where)
        if card.integer("format", 1, 1 << 30) != FORMAT:
            raise BundleError(
                f"{where}: bundle format {values['format']}, this version reads {FORMAT}; "
                "update pathsegdiff"
            )
        latent = card.fields("latent")
        schedule = card.fields("schedule")
        try:
            noise_schedule = NoiseSchedule(
                beta_schedule=schedule.text("beta_schedule"),
                beta_start=schedule.number("beta_start"),
                beta_end=schedule.number("beta_end"),
                timesteps=schedule.integer("timesteps", 1, 100_000),
            )
        except ConfigError as error:
            raise BundleError(f"{where}: {error}") from None
        taps = tuple(
            TapSpec(
                name=tap.text("name"),
                module_path=tap.text("module"),
                channels=tap.integer("channels", 1, 1 << 16),
                stride=tap.integer("stride", 1, PATCH_PX),
            )
            for tap in card.list_of_fields("taps")
        )
        return cls(
            name=card.text("name"),
            title=card.text("title"),
            licence=card.text("licence"),
            trained=card.boolean("trained"),
            patch_px=card.integer("patch_px", PATCH_PX, PATCH_PX),
            head_width=card.integer("head_width", 4, 4096),
            latent_kind=latent.choice("kind", tuple(KINDS.values())),
            latent_scale=latent.number("scale"),
            latent_channels=latent.integer("channels", 1, 256),
            latent_stride=latent.integer("stride", 1, PATCH_PX),
            schedule=noise_schedule,
            context_tokens=card.integer("context_tokens", 1, _MAX_TOKENS),
            taps=taps,
            provenance=card.texts("provenance"),
            files=card.texts("files"),
        )


#: Entries of the card that decide a feature. The files' hashes cover weights and configs.
_DECISIVE = ("format", "patch_px", "latent", "schedule", "context_tokens", "taps", "files")


class _Fields:
    """Typed reads from an untrusted JSON object; each failure is one line that names the field."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise BundleError(f"{where}: expected a JSON object, found {type(values).__name__}")
        self._values, self._where = values, where

    def _get(self, name: str, kinds: type | tuple[type, ...], what: str) -> Any:
        if name not in self._values:
            raise BundleError(f"{self._where}: {name} is missing")
        value = self._values[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise BundleError(f"{self._where}: {name} must be {what}, got {value!r:.60}")
        return value

    def text(self, name: str) -> str:
        value = self._get(name, str, "text")
        if len(value) > 1000 or not value.isprintable():
            raise BundleError(f"{self._where}: {name} must be one line of text")
        return value

    def boolean(self, name: str) -> bool:
        return self._get(name, bool, "true or false")

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._get(name, int, "a whole number")
        if not low <= value <= high:
            allowed = str(low) if low == high else f"{low} to {high}"
            raise BundleError(f"{self._where}: {name} must be {allowed}, got {value}")
        return value

    def number(self, name: str) -> float:
        value = self._get(name, (int, float), "a number")
        if not 0 < value <= MAX_NUMBER:
            raise BundleError(f"{self._where}: {name} must be above 0, got {value!r:.60}")
        return float(value)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in choices:
            raise BundleError(
                f"{self._where}: {name} must be one of {', '.join(choices)}, got {value!r}"
            )
        return value

    def texts(self, name: str) -> dict[str, str]:
        inner = self.fields(name)
        return {key: inner.text(key) for key in inner._values}

    def fail(self, name: str, allowed: str, value: Any) -> None:
        raise BundleError(f"{self._where}: {name} must be {allowed}, got {value!r:.60}")

    def fields(self, name: str) -> "_Fields":
        return _Fields(self._get(name, dict, "an object"), f"{self._where}: {name}")

    def list_of_fields(self, name: str) -> list["_Fields"]:
        values = self._get(name, list, "a list")
        return [_Fields(value, f"{self._where}: {name}[{i}]") for i, value in enumerate(values)]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A checked model folder."""

    path: Path
    card: ModelCard
    configs: dict[str, dict[str, Any]]

    def load(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> DiffusionModel:
        """Read the weights.

        Args:
            device: Where to.
            dtype: What the networks compute in; float32 whatever the files hold, unless asked.

        Raises:
            BundleError: If a weight file does not fit its config.
        """
        if not self.card.trained:
            logger.warning("model %s: random weights, its features mean nothing", self.card.name)
        parts = {part: self._load_part(part, torch.device(device), dtype) for part in WEIGHT_FILES}
        for module in parts.values():
            convolve_linears(module)
        return DiffusionModel(
            **parts,  # type: ignore[arg-type]  # the four networks by name
            tap_specs=self.card.taps,
            schedule=self.card.schedule,
            latent_scale=self.card.latent_scale,
            latent_shape=self.card.latent_shape,
            patch_px=self.card.patch_px,
        )

    def _load_part(self, part: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        file = self.path / WEIGHT_FILES[part]
        with torch.device("meta"):  # the weights come from the file: make none
            module = build_part(part, self.configs[part], str(self.path / CONFIG_FILES[part]))
        try:
            state = load_file(file, device=str(device))
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{file} is not a safetensors file: {error}") from None
        target = weights_of(part, module)
        check_tensors(
            {name: tuple(value.shape) for name, value in target.state_dict().items()},
            {name: tuple(value.shape) for name, value in state.items()},
            str(file),
        )
        # See DiffusionModel: the images come channels last, too. In one copy from the mapped file,
        # whose pages would stay in memory as long as one tensor were a view of it.
        channels_last = part in ("unet", "autoencoder")
        for name, value in state.items():
            as_asked = value.to(dtype) if value.is_floating_point() else value
            if channels_last and value.ndim == 4:
                state[name] = as_asked.clone(memory_format=torch.channels_last)
            elif as_asked is value and device.type == "cpu":
                state[name] = value.clone()
            else:
                state[name] = as_asked
            check_finite(name, state[name], str(file))
        target.load_state_dict(state, assign=True)
        return module


def check_finite(name: str, value: Tensor, where: str) -> None:
    """Refuse a weight that would spread through every feature.

    A sum shows any NaN and infinity, in a fraction of the time that looking at every number takes;
    only where it is not finite itself is the tensor looked at again.

    Raises:
        BundleError: If it holds NaN or infinity.
    """
    if not value.is_floating_point() or bool(value.sum(dtype=torch.float32).isfinite()):
        return
    if not bool(value.isfinite().all()):
        raise BundleError(
            f"{where}: {name} holds values that are not finite in {str(value.dtype)[6:]}; "
            "get the model again, or compute in float32"
        )


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare tensor names and shapes.

    Raises:
        BundleError: Naming ``where`` and the first three missing, surplus or misshapen tensors.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise BundleError(f"{where}: {_count(missing, 'missing')}")
    surplus = [name for name in found if name not in expected]
    if surplus:
        raise BundleError(f"{where}: {_count(surplus, 'surplus')}")
    wrong = [
        f"{name} is {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if found[name] != shape
    ]
    if wrong:
        raise BundleError(f"{where}: {_count(wrong, 'of another shape')}")


def _count(names: list[str], what: str) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    plural = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {plural} {what}: {', '.join(names[:3])}{more}"


def models_dir() -> Path:
    """Where named bundles live: $PSD_MODELS, else ~/.cache/pathsegdiff/models."""
    set_by_user = os.environ.get("PSD_MODELS")
    return Path(set_by_user) if set_by_user else Path.home() / ".cache" / "pathsegdiff" / "models"


def resolve_bundle(name_or_path: str | Path) -> Path:
    """Folder of a bundle: one that is embedded ("tiny"), a name in ``models_dir()``, or a path.

    Raises:
        BundleError: If there is no such bundle.
    """
    name = str(name_or_path)
    for folder in (EMBEDDED / name, Path(name), models_dir() / name):
        if (folder / CARD_FILE).is_file():
            return folder
    if Path(name).is_dir():
        raise BundleError(f"{name} is not a model bundle: it has no {CARD_FILE}")
    known = ", ".join(list_bundles())
    raise BundleError(f"no model called {name!r}: there are {known}; or give a bundle folder")


def list_bundles() -> dict[str, Path]:
    """Names that ``resolve_bundle`` knows -> folder; the embedded ones first."""
    found: dict[str, Path] = {}
    for folder in (EMBEDDED, models_dir()):
        for card in sorted(folder.glob(f"*/{CARD_FILE}")):
            if not card.parent.name.startswith("."):
                found.setdefault(card.parent.name, card.parent)
    return found


def load_bundle(name_or_path: str | Path) -> Bundle:
    """Read a bundle's card and settings, and check every file's sha256.

    Raises:
        BundleError: If there is no such bundle, or a file is missing, altered or unknown to us.
    """
    folder = resolve_bundle(name_or_path)
    card = read_card(folder)
    required = {*WEIGHT_FILES.values(), *CONFIG_FILES.values()}
    if set(card.files) != required:
        odd = sorted(set(card.files) ^ required)
        raise BundleError(
            f"{folder / CARD_FILE}: a bundle has the files {', '.join(sorted(required))}; "
            f"differing: {', '.join(odd)}"
        )
    for name, expected in card.files.items():
        file = folder / name
        if not file.is_file():
            raise BundleError(f"{folder}: {name} is missing; make the bundle again")
        if file_sha256(file) != expected:
            raise BundleError(
                f"{folder}: {name} is not the file that {CARD_FILE} describes (sha256 differs); "
                "make the bundle again"
            )
    configs = {part: read_json(folder / name) for part, name in CONFIG_FILES.items()}
    bundle = Bundle(path=folder, card=card, configs=configs)
    _check_settings(bundle)
    return bundle


def read_card(folder: Path) -> ModelCard:
    """What a bundle's ``model.json`` says; the other files are not looked at.

    Raises:
        BundleError: If it is missing or broken.
    """
    return ModelCard.from_dict(read_json(folder / CARD_FILE), str(folder / CARD_FILE))


def has_encoder(folder: Path) -> bool:
    """Whether the model of a bundle can be conditioned on patches.

    Raises:
        BundleError: If the encoder's settings are missing or broken.
    """
    file = folder / CONFIG_FILES["encoder"]
    return not isinstance(read_encoder_config(read_json(file), str(file)), NoEncoderConfig)


def _check_settings(bundle: Bundle) -> None:
    """The card must say what the four configs say.

    Raises:
        BundleError: If they contradict each other, or the UNet has another number of taps.
    """
    card, configs, folder = bundle.card, bundle.configs, bundle.path
    unet, autoencoder = configs["unet"], configs["autoencoder"]
    for part in ("unet", "autoencoder"):
        _check_diffusers_config(configs[part], str(folder / CONFIG_FILES[part]))
    encoder = read_encoder_config(configs["encoder"], str(folder / CONFIG_FILES["encoder"]))
    conditioner = _Fields(configs["conditioner"], str(folder / CONFIG_FILES["conditioner"]))
    taps = plan_taps(unet, card.latent_stride)
    check_taps(taps, str(folder))
    _check_conditioner(configs["conditioner"], conditioner)
    agreements = {
        "latent kind": (card.latent_kind, KINDS.get(autoencoder.get("_class_name", ""))),
        "latent channels": (card.latent_channels, latent_channels(autoencoder)),
        "latent stride": (card.latent_stride, latent_stride(autoencoder)),
        "taps": (card.taps, taps),
        "UNet input channels": (card.latent_channels, unet["in_channels"]),
        "context channels": (
            conditioner.integer("context_dim", 1, 1 << 16),
            unet["cross_attention_dim"],
        ),
        "embedding": (
            conditioner.integer("patch_embed_dim", 1, 1 << 16),
            encoder.embed_dim,
        ),
        "context tokens": (card.context_tokens, context_tokens(configs["conditioner"])),
        "encoder's image size": (card.patch_px, encoder.image_size),
    }
    for what, (ours, theirs) in agreements.items():
        if ours != theirs:
            raise BundleError(
                f"{folder}: its parts contradict each other, {what}: "
                f"{ours!r:.80} and {theirs!r:.80}"
            )


def _check_conditioner(config: dict[str, Any], fields: _Fields) -> None:
    if KIND not in config:
        if config.get("region_embed_dim") is not None:
            fields.integer("region_embed_dim", 1, 1 << 16)
        fields.boolean("normalize")
        return
    fields.choice(KIND, (GRID,))
    width = fields.integer("context_dim", 1, 1 << 13)
    heads = fields.integer("num_heads", 1, width)
    if width % heads:
        fields.fail("num_heads", f"a divisor of the {width} channels", heads)
    fields.integer("depth", 1, _MAX_LAYERS)
    fields.integer("mlp_dim", 1, 1 << 16)
    fields.integer("cells", 1, _MAX_TOKENS - 1)
    fields.integer("magnification", 0, fields.integer("magnifications", 1, 64) - 1)


def check_taps(taps: tuple[TapSpec, ...], where: str) -> None:
    """Refuse a UNet whose taps are not the thirteen that stores and heads know.

    Raises:
        BundleError: Saying how many there are.
    """
    if tuple(tap.name for tap in taps) != ALL_TAPS:
        raise BundleError(
            f"{where}: this UNet has {len(taps)} taps, only {len(ALL_TAPS)} are supported "
            "(four levels, two residual blocks each)"
        )


def _check_diffusers_config(config: Any, where: str) -> None:
    fields = _Fields(config, where)
    channels = config.get("block_out_channels")
    if (
        not isinstance(channels, list)
        or not 1 <= len(channels) <= 8
        or not all(type(c) is int and 1 <= c <= 1 << 14 for c in channels)
    ):
        raise BundleError(f"{where}: block_out_channels must be up to 8 whole numbers")
    fields.integer("layers_per_block", 1, 16)
    fields.integer("in_channels", 1, 1 << 14)
    for name in ("up_block_types", "down_block_types"):
        kinds = config.get(name)
        if (
            not isinstance(kinds, list)
            or len(kinds) != len(channels)
            or not all(isinstance(kind, str) for kind in kinds)
        ):
            raise BundleError(f"{where}: {name} must name one block per level")
    # Every layer is an object, made before the weights are looked at.
    for name in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        todo = [config.get(name, 1)]
        while todo:
            value = todo.pop()
            if isinstance(value, list) and len(value) <= _MAX_LAYERS:
                todo += value
            elif value is not None and not (type(value) is int and 1 <= value <= _MAX_LAYERS):
                raise BundleError(f"{where}: {name} must be 1 to {_MAX_LAYERS}, got {value!r:.60}")
    if "cross_attention_dim" in config:
        fields.integer("cross_attention_dim", 1, 1 << 16)
    else:
        fields.integer("latent_channels", 1, 256)
        if config.get("vq_embed_dim") is not None:
            fields.integer("vq_embed_dim", 1, 256)


def weights_of(part: str, module: nn.Module) -> nn.Module:
    """The module whose state dict a bundle holds: of an encoder, timm's network."""
    return module.network if part == "encoder" else module  # type: ignore[return-value]


def part_state(part: str, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of a part as a bundle holds them; counters stay integers."""
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in weights_of(part, module).state_dict().items()
    }


def build_part(part: str, config: dict[str, Any], where: str) -> nn.Module:
    if part == "encoder":
        return build_encoder(read_encoder_config(config, where))
    try:
        if part == "conditioner":
            return build_conditioner(config)
        return build_unet(config) if part == "unet" else build_autoencoder(config)
    except BundleError as error:
        raise BundleError(f"{where}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # diffusers meets settings that cannot be with any kind of exception
        reason = f"{type(error).__name__}: {error}"
        raise BundleError(f"{where}: no such model can be built ({reason:.200})") from None


def init_bundle(preset: str, seed: int, out: Path, dtype: torch.dtype = torch.float16) -> Bundle:
    """Write a bundle of random weights, marked as such.

    Args:
        preset: Name in ``PRESETS``.
        seed: Of the weights; nothing else decides them.
        out: Folder to make.
        dtype: Of the weights on disk. float16 halves the files; values above float16's resolution
            would mean nothing in random weights.

    Raises:
        ConfigError: If there is no such preset.
        BundleError: If ``out`` exists.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    shape = PRESETS[preset]
    check_new_folder(out)
    parts = build_random(shape, seed)
    card = describe(
        shape,
        name=preset if seed == 0 else f"{preset}-seed{seed}",
        title=f"{shape.title} (random weights)",
        licence="none needed: random numbers",
        trained=False,
        provenance={"made by": f"psd models init --preset {preset} --seed {seed}"},
    )
    configs = {
        "unet": dict(shape.unet),
        "autoencoder": dict(shape.autoencoder),
        "encoder": shape.encoder.to_dict(),
        "conditioner": dict(shape.conditioner),
    }
    with writing_bundle(out) as folder:
        for part, module in parts.items():
            write_part(folder, part, configs[part], part_state(part, module, dtype))
        write_card(folder, card)
    return load_bundle(out)


def describe(shape: Preset, *, trained: bool, **texts: Any) -> ModelCard:
    """The card of a model of this shape; ``texts`` are name, title, licence and provenance."""
    stride = latent_stride(shape.autoencoder)
    return ModelCard(
        trained=trained,
        patch_px=PATCH_PX,
        head_width=shape.head_width,
        latent_kind=KINDS[shape.autoencoder["_class_name"]],
        latent_scale=shape.latent_scale,
        latent_channels=latent_channels(shape.autoencoder),
        latent_stride=stride,
        schedule=shape.schedule,
        context_tokens=context_tokens(shape.conditioner),
        taps=plan_taps(shape.unet, stride),
        **texts,
    )


def check_new_folder(out: Path) -> None:
    """Raises: BundleError: If ``out`` is there already and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out} exists already; remove it or choose another --out")


@contextmanager
def writing_bundle(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` if the block succeeds.

    Raises:
        BundleError: If ``out`` exists.
    """
    check_new_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        try:
            if out.is_dir():
                out.rmdir()
            folder.rename(out)
        except OSError:
            check_new_folder(out)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_part(
    folder: Path, part: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Write one part's config.json and weights into a bundle that is being written."""
    (folder / part).mkdir()
    write_json(folder / CONFIG_FILES[part], config)
    tensors = {name: value.contiguous() for name, value in state.items()}
    save_file(tensors, folder / WEIGHT_FILES[part], metadata={"format": "pt"})


def write_card(folder: Path, card: ModelCard) -> None:
    """Write model.json, with the hash of every other file, into a bundle that is being written."""
    names = sorted({*WEIGHT_FILES.values(), *CONFIG_FILES.values()})
    files = {name: file_sha256(folder / name) for name in names}
    write_json(folder / CARD_FILE, {**card.to_dict(), "files": files})


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write readable JSON with a line end."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    """Read a small JSON file.

    Raises:
        BundleError: If it is missing, too large, or no JSON.
    """
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise BundleError(f"{file} is too large to be a settings file")
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{file} is missing") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not valid JSON: {error!s:.120}") from None


def new_provenance(**entries: str) -> dict[str, str]:
    """Provenance with the version of this program."""
    return {**entries, "written by": f"pathsegdiff {__version__}"}
