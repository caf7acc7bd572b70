"""Stage 1 for one region: patches -> embedding, latent, noise -> taps -> stitched level maps.

Shapes: P = patches of a region in row-major order, B = patches in one batch, C = channels of a
tap, m, n = rows and columns of a tap for one patch, M, N = of the stitched level.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pathsegdiff.config import order_taps
from pathsegdiff.data.regions import cut_patches
from pathsegdiff.device import autocast
from pathsegdiff.diffusion.model import DiffusionModel
from pathsegdiff.diffusion.noise import patch_noise
from pathsegdiff.diffusion.schedule import add_noise, check_timestep
from pathsegdiff.errors import ConfigError
from pathsegdiff.features.layout import GRID_STRIDE, Level, TapSlice, TapSpec, plan_levels

_TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    # The writer rounds these.
    "int8": torch.float32,
    "float16-5bit": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class View:
    """One way of looking at the same patches: a timestep and a condition."""

    timestep: int
    conditioning: str


@dataclass(frozen=True, kw_only=True)
class PreparedRegion:
    """What stage 1 reads of a region; made ahead of the network, on the CPU.

    Attributes:
        patches: (P, 3, p, p) uint8.
        noise: (P, C, h, w) float32, one keyed draw per patch, the same for every view.
        grid: (rows, columns) of patches.
    """

    patches: Tensor
    noise: Tensor
    grid: tuple[int, int]


class RegionFeatures:
    """What stage 1 makes of a region.

    On a GPU its arrays are still on their way when it is returned: the next region is computed
    while they are copied. Asking for any of them waits.

    Args:
        maps: For each view, level name -> (C, M, N) in the store's dtype (float32 for int8).
        embedding: (P, D) float32, the encoder's raw vectors.
        tokens: (D, M, N) patch tokens likewise, or None where not asked for.
        stream: That copies to the host, None on a CPU.
    """

    def __init__(
        self,
        maps: Mapping[View, Mapping[str, Tensor]],
        embedding: Tensor,
        tokens: Tensor | None,
        stream: "torch.cuda.Stream | None" = None,
    ) -> None:
        copied = partial(_to_host, stream=stream)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        self._levels = {
            view: {name: copied(values) for name, values in arrays.items()}
            for view, arrays in maps.items()
        }
        self._embedding = copied(embedding)
        self._tokens = None if tokens is None else copied(tokens)
        self._arrived = None if stream is None else stream.record_event()

    @property
    def levels(self) -> dict[View, dict[str, np.ndarray]]:
        """For each view, level name -> (C, M, N)."""
        self._wait()
        return {
            view: {name: values.numpy() for name, values in arrays.items()}
            for view, arrays in self._levels.items()
        }

    @property
    def embedding(self) -> np.ndarray:
        """(P, D) float32."""
        self._wait()
        return self._embedding.numpy()

    @property
    def tokens(self) -> np.ndarray | None:
        """(D, M, N), or None."""
        self._wait()
        return None if self._tokens is None else self._tokens.numpy()

    def _wait(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()


class StageOne:
    """The frozen model with everything that decides its output, ready to be run on regions."""

    def __init__(
        self,
        model: DiffusionModel,
        *,
        views: Sequence[View],
        taps: Sequence[str],
        dtype: str = "float16",
        precision: str = "float32",
        layout: str = "levels",
        tokens: bool = False,
        seed: int = 0,
        device: torch.device | None = None,
        batch_size: int = 4,
    ) -> None:
        """Plan the levels.

        Args:
            model: On ``device``, with float32 weights; a lower ``precision`` runs under autocast.
            views: Each costs one UNet forward per patch; encoder and latent are shared.

        Raises:
            ConfigError: If a timestep lies outside the model's schedule, a tap is unknown, or the
                model has no encoder and one is asked for.
        """
        steps = len(model.alphas_cumprod)
        for view in views:
            check_timestep(view.timestep, steps, "")
        model.check_condition(encoder=tokens or any(v.conditioning == "encoder" for v in views))
        if batch_size < 1:
            raise ConfigError(f"batch size must be at least 1, got {batch_size}")
        self.model = model
        self.views = tuple(views)
        self.taps = order_taps(taps)
        self.stored_dtype = dtype
        self.dtype = _TORCH_DTYPES[dtype]
        self.precision = precision
        self.layout = layout
        self.seed = seed
        self.device = device or torch.device("cpu")
        self.batch_size = batch_size
        self.levels = plan_levels(
            [
                TapSpec(name=spec.name, channels=spec.channels, stride=spec.stride)
                for spec in model.tap_specs
                if spec.name in self.taps
            ],
            model.patch_px,
            layout,
        )
        self.tokens_level = token_level(model) if tokens else None
        on_gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None

    def prepare(self, image: np.ndarray, sample_id: str) -> PreparedRegion:
        """Cut a region and draw its noise.

        Args:
            image: (H, W, 3) uint8, sides that are multiples of the patch.
            sample_id: Keys the noise, with the seed and the patch's row and column.
        """
        size = self.model.patch_px
        rows, columns = image.shape[0] // size, image.shape[1] // size
        patches = np.ascontiguousarray(cut_patches(image, size).transpose(0, 3, 1, 2))
        shape = self.model.latent_shape
        noise = np.stack(
            [
                patch_noise(self.seed, sample_id, row, column, shape)
                for row in range(rows)
                for column in range(columns)
            ]
        )
        tensors = torch.from_numpy(patches), torch.from_numpy(noise)
        if self._stream is not None:  # only pinned memory is copied without waiting
            tensors = tensors[0].pin_memory(), tensors[1].pin_memory()
        return PreparedRegion(patches=tensors[0], noise=tensors[1], grid=(rows, columns))

    @torch.inference_mode()
    def run(self, region: PreparedRegion, views: Sequence[View] | None = None) -> RegionFeatures:
        """Embed, encode and noise each patch, and tap ONE UNet forward per patch and view.

        A batch never mixes regions, so the same device and batch size give the same bits.

        Args:
            views: Some of the planned ones; all of them where None.
        """
        views = self.views if views is None else tuple(views)
        rows, columns = region.grid
        maps = {view: self._empty(self.levels, region.grid) for view in views}
        token_levels = () if self.tokens_level is None else (self.tokens_level,)
        token_maps = self._empty(token_levels, region.grid)
        embeddings = []
        for start in range(0, rows * columns, self.batch_size):
            stop = min(start + self.batch_size, rows * columns)
            images = region.patches[start:stop].to(self.device, non_blocking=True).float() / 255
            noise = region.noise[start:stop].to(self.device, non_blocking=True)
            with autocast(self.device, self.precision):
                if self.tokens_level is None:
                    embedding = self.model.embed(images)
                else:
                    embedding, tokens = self.model.embed_with_tokens(images)
                    self._place(
                        token_maps["tokens"], self.tokens_level, {"tokens": tokens}, start, columns
                    )
                latent = self.model.latent(images).float()
            embeddings.append(embedding.float())
            for view in views:
                with autocast(self.device, self.precision):
                    taps = self._taps(latent, noise, embedding, view)
                for level in self.levels:
                    self._place(maps[view][level.name], level, taps, start, columns)
        return RegionFeatures(maps, torch.cat(embeddings), token_maps.get("tokens"), self._stream)

    def _taps(
        self, latent: Tensor, noise: Tensor, embedding: Tensor, view: View
    ) -> dict[str, Tensor]:
        condition = embedding if view.conditioning == "encoder" else None
        context = self.model.context(condition, len(latent))
        x_t = add_noise(latent, noise, view.timestep, self.model.alphas_cumprod)
        return self.model.taps(x_t, view.timestep, context, self.taps)

    def _empty(self, levels: Sequence[Level], grid: tuple[int, int]) -> dict[str, Tensor]:
        return {
            level.name: torch.empty(
                (
                    level.channels,
                    grid[0] * level.cells_per_patch,
                    grid[1] * level.cells_per_patch,
                ),
                dtype=self.dtype,
                device=self.device,
            )
            for level in levels
        }

    def _place(
        self, out: Tensor, level: Level, taps: dict[str, Tensor], start: int, columns: int
    ) -> None:
        """Put a batch of tap maps where their patches lie in the stitched level."""
        cells = level.cells_per_patch
        for tap in level.taps:
            values = taps[tap.name]
            if self.layout == "dense" and level.stride == GRID_STRIDE:
                values = to_grid(values, cells)
            stored = values.to(self.dtype)
            for offset, patch in enumerate(stored):
                row, column = divmod(start + offset, columns)
                out[
                    tap.start : tap.stop,
                    row * cells : (row + 1) * cells,
                    column * cells : (column + 1) * cells,
                ] = patch


def to_grid(tap: Tensor, cells: int) -> Tensor:
    """Bilinear upsampling of one tap, patch by patch, to the stride-4 grid (equation 4).

    Args:
        tap: (B, C, m, n).
        cells: Of the grid along one side of a patch (64 for 256 px).

    Returns:
        (B, C, cells, cells) float32.
    """
    return F.interpolate(tap.float(), size=(cells, cells), mode="bilinear", align_corners=False)


def token_level(model: DiffusionModel) -> Level:
    """The level that holds the encoder's patch tokens."""
    stride = model.patch_px // model.token_grid
    slices = (TapSlice(name="tokens", start=0, stop=model.token_channels),)
    return Level(name="tokens", stride=stride, cells_per_patch=model.token_grid, taps=slices)


def _to_host(values: Tensor, stream: "torch.cuda.Stream | None") -> Tensor:
    """A tensor on the CPU; with a stream, one that is filled as soon as the stream gets to it."""
    if stream is None:
        return values.cpu()
    with torch.cuda.stream(stream):
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        values.record_stream(stream)  # its memory is not used anew before that
    return host


def iterate_views(timesteps: Sequence[int], conditionings: Sequence[str]) -> Iterator[View]:
    """Every timestep with every condition, in the order given, none twice."""
    for timestep in dict.fromkeys(timesteps):
        for conditioning in dict.fromkeys(conditionings):
            yield View(timestep=timestep, conditioning=conditioning)
