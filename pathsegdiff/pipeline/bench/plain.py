"""The plain way, as one would write it for an afternoon's experiment: the rival of every ratio.

Patch by patch in float32, hooks on the UNet's blocks, every tap interpolated to the stride-4 grid,
one array file per image; training reads that file and runs the FCN in its plain form
(``FCNHead.forward_dense``). The features are the same up to rounding, so that the two can be
compared at all.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathsegdiff.diffusion.model import DiffusionModel
from pathsegdiff.features.layout import GRID_STRIDE
from pathsegdiff.products import convolve_linears, restore_linears


class PlainExtractor:
    """Stage 1 the plain way.

    Args:
        model: On its device, in float32.
        timestep: Of the features.
    """

    def __init__(self, model: DiffusionModel, timestep: int) -> None:
        self.model, self.timestep = model, timestep
        self._each_module(restore_linears)
        self._outputs: dict[str, Tensor] = {}
        self._hooks = [
            model.unet.get_submodule(spec.module_path).register_forward_hook(self._hook(spec.name))
            for spec in model.tap_specs
        ]

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._each_module(convolve_linears)

    @torch.no_grad()
    def features(self, patch: np.ndarray, noise: np.ndarray) -> Tensor:
        """One patch.

        Args:
            patch: (P, P, 3) uint8.
            noise: (C, h, w) float32.

        Returns:
            (channels, P / 4, P / 4) float32 on the model's device.
        """
        model = self.model
        image = torch.from_numpy(patch.copy()).permute(2, 0, 1)[None].float().to(model.device) / 255
        embedding, _ = model.encoder(image)
        context = model.conditioner(embedding, 1)
        encoded: Any = model.autoencoder.encode(image * 2 - 1)  # type: ignore[operator]
        latent = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        alpha = float(model.alphas_cumprod[self.timestep])
        drawn = torch.from_numpy(noise)[None].to(model.device)
        noised = alpha**0.5 * latent * model.latent_scale + (1 - alpha) ** 0.5 * drawn
        model.unet(noised, self.timestep, encoder_hidden_states=context)
        cells = model.patch_px // GRID_STRIDE
        maps = [
            F.interpolate(self._outputs[spec.name], size=(cells, cells), mode="bilinear")
            for spec in model.tap_specs
        ]
        return torch.cat(maps, dim=1)[0]

    def extract(self, patches: np.ndarray, noise: np.ndarray, file: Path) -> None:
        """Stitch one region's patches and save them as float16.

        Args:
            patches: (N, P, P, 3) uint8, row-major, of a square region.
            noise: (N, C, h, w) float32.
            file: NAME.npy.
        """
        side = round(len(patches) ** 0.5)
        found = [
            self.features(patch, drawn).half().cpu().numpy()
            for patch, drawn in zip(patches, noise, strict=True)
        ]
        rows = [np.concatenate(found[row * side : (row + 1) * side], axis=2) for row in range(side)]
        np.save(file, np.concatenate(rows, axis=1))

    def _each_module(self, change: Callable[[nn.Module], None]) -> None:
        model = self.model
        for module in (model.encoder, model.conditioner, model.autoencoder, model.unet):
            change(module)

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            self._outputs[name] = output[0] if isinstance(output, tuple) else output

        return record


def load_batch(files: Sequence[Path]) -> Tensor:
    """(B, channels, M, N) float32 of saved regions."""
    return torch.from_numpy(np.stack([np.load(file) for file in files])).float()
