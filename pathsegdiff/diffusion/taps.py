"""The taps: UNet submodules whose outputs are the features, and how they are recorded.

Tap ``middle`` is the bottleneck, ``up_00`` .. the output blocks in the order of CompVis'
``output_blocks``. There a block ends with the upsampler where it has one, so such a tap lies after
the upsampler and not after the last attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TapSpec:
    """One tap of a UNet.

    Attributes:
        name: "middle" or "up_NN".
        module_path: Submodule of diffusers' UNet whose output it is.
        channels: Of the output.
        stride: Image pixels per step of the output.
    """

    name: str
    module_path: str
    channels: int
    stride: int


class _AllTapsRecorded(Exception):  # noqa: N818 (a signal, no error)
    """Leaves the forward pass: no later module is needed."""


def plan_taps(config: dict[str, Any], latent_stride: int) -> tuple[TapSpec, ...]:
    """Every tap of a UNet, in tap order.

    Args:
        config: ``config.json`` of the UNet.
        latent_stride: Image pixels per latent step.
    """
    channels = list(reversed(config["block_out_channels"]))
    levels = len(channels)
    layers = int(config["layers_per_block"]) + 1
    taps = [
        TapSpec(
            name="middle",
            module_path="mid_block",
            channels=channels[0],
            stride=latent_stride * 2 ** (levels - 1),
        )
    ]
    for block, block_type in enumerate(config["up_block_types"]):
        stride = latent_stride * 2 ** (levels - 1 - block)
        inner = "attentions" if block_type == "CrossAttnUpBlock2D" else "resnets"
        for layer in range(layers):
            upsamples = layer == layers - 1 and block < levels - 1
            part = "upsamplers.0" if upsamples else f"{inner}.{layer}"
            taps.append(
                TapSpec(
                    name=f"up_{len(taps) - 1:02d}",
                    module_path=f"up_blocks.{block}.{part}",
                    channels=channels[block],
                    stride=stride // 2 if upsamples else stride,
                )
            )
    return tuple(taps)


@contextmanager
def capture_taps(unet: nn.Module, module_paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record named submodules' outputs of the one forward pass inside the block.

    The pass is left, and with it the block, as soon as every output is there: what comes after the
    last tap would be computed for nothing. So the block must not need what the UNet returns.

    Args:
        unet: Left without hooks at the end, also after an error.
        module_paths: Submodules; no repeats.

    Yields:
        A dictionary that a forward pass inside the block fills: module path -> output.
    """
    captured: dict[str, Tensor] = {}
    handles = []
    try:
        for path in module_paths:
            hook = partial(_record, captured, path, len(module_paths))
            handles.append(unet.get_submodule(path).register_forward_hook(hook))
        yield captured
    except _AllTapsRecorded:
        pass
    finally:  # also when a name is wrong or the forward raises: a left hook keeps tensors alive
        for handle in handles:
            handle.remove()


def _record(
    captured: dict[str, Tensor],
    path: str,
    wanted: int,
    module: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> None:
    # Down blocks return (hidden_states, residuals); the tap is the first.
    captured[path] = output[0] if isinstance(output, tuple) else output
    if len(captured) == wanted:
        raise _AllTapsRecorded
