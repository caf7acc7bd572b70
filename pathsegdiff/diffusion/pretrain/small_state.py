"""A checkpoint of the training loop in a small form: 3 bytes per parameter instead of 16.

What is left out comes back by itself:

- weights are rounded to float16, as a bundle has them in the end;
- their average is kept as its distance from them, in 255 steps per output row;
- Adam's first moment starts from zero: with beta1 = 0.9 it forgets within some ten steps;
- Adam's second moment is kept as the means of its rows and columns, whose product stands for it
  (Adafactor, Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235). With beta2 = 0.99 the true
  one is back within some hundred steps. Until then no step is too large: whatever the second moment
  starts from, the gradients g_i since then, latest first, give a step of at most
  |sum 0.1 * 0.9^i g_i| / sqrt(sum 0.01 * 0.99^i g_i^2) <= sqrt(1 / (1 - 0.81 / 0.99)) = 2.35
  learning rates (Cauchy-Schwarz), as for Adam at any time.

Shapes: O = output rows of a parameter, K = its other entries.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pathsegdiff.errors import RunError

#: Entries of the average's state that are plain numbers.
_AVERAGE = (
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
)
_PLAIN = ("step", "seconds", "rows", "hardware", "scaler")


def shrink(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Make the small form.

    Args:
        state: What ``TrainingLoop.save`` writes.

    Returns:
        Tensors by name, and what else there is as plain JSON types.

    Raises:
        RunError: If a weight is above what float16 holds.
    """
    tensors: dict[str, Tensor] = {}
    for group in ("weights", "extra"):
        tensors |= {f"{group}/{name}": half(value, name) for name, value in state[group].items()}
    shadows, moments = state["ema"]["shadow_params"], state["optimizer"]["state"]
    names = _parameter_names(state["weights"], shadows)
    for number, shadow in enumerate(shadows):
        name = names[number]
        if name is None:
            average = half(shadow, f"average {number}") if shadow.ndim > 1 else shadow.contiguous()
            tensors[f"average/{number}"] = average
        else:
            levels, scales = _to_levels(shadow - tensors[f"weights/{name}"].float())
            tensors[f"average_levels/{number}"] = levels
            tensors[f"average_scales/{number}"] = scales
    for number, moment in moments.items():
        second = moment["exp_avg_sq"].float()
        if second.ndim < 2:
            tensors[f"second/{number}"] = second.contiguous()
        else:
            rows, columns = second.flatten(1).mean(1), second.flatten(1).mean(0)
            tensors[f"second_rows/{number}"], tensors[f"second_columns/{number}"] = rows, columns
    facts = {
        **{name: state[name] for name in _PLAIN if name in state},
        "average": {name: state["ema"][name] for name in _AVERAGE},
        "average_of": names,
        "strides": [list(shadow.stride()) for shadow in shadows],
        "groups": state["optimizer"]["param_groups"],
        "adam_steps": {str(number): float(m["step"]) for number, m in moments.items()},
    }
    return tensors, facts


def expand(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Make a checkpoint of the small form, as ``TrainingLoop.save`` writes it.

    Raises:
        KeyError, ValueError, TypeError, RuntimeError: If something is missing or does not fit; the
            caller knows the file's name.
    """
    weights = {name: _single(value) for name, value in _below(tensors, "weights/")}
    shadows = []
    for number, name in enumerate(facts["average_of"]):
        key = f"average_levels/{number}"
        if key in tensors:
            distance = _from_levels(tensors[key], tensors[f"average_scales/{number}"])
            shadow = weights[name] + distance
        else:
            shadow = _single(tensors[f"average/{number}"])
        shadows.append(_laid_out(shadow, facts["strides"][number]))
    moments = {}
    for key, steps in facts["adam_steps"].items():
        shadow = shadows[int(key)]
        if shadow.ndim < 2:
            second = tensors[f"second/{key}"]
        else:
            second = _product(tensors[f"second_rows/{key}"], tensors[f"second_columns/{key}"])
        laid_out = torch.empty_like(shadow)
        laid_out.copy_(second.view(shadow.shape))
        moments[int(key)] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": torch.zeros_like(shadow),
            "exp_avg_sq": laid_out,
        }
    groups = [{**group, "betas": tuple(group["betas"])} for group in facts["groups"]]
    return {
        **{name: facts[name] for name in _PLAIN if name in facts},
        "weights": weights,
        "extra": {name: _single(value) for name, value in _below(tensors, "extra/")},
        "optimizer": {"state": moments, "param_groups": groups},
        "ema": {**facts["average"], "shadow_params": shadows},
    }


def half(value: Tensor, name: str) -> Tensor:
    """A tensor for a file: float32 as float16, anything else as it is.

    Raises:
        RunError: If a value is above what float16 holds; ``name`` is in the message.
    """
    if value.dtype != torch.float32:
        return value.contiguous()
    rounded = value.to(torch.float16).contiguous()
    if not torch.isfinite(rounded).all():
        raise RunError(f"{name} has values that float16 cannot hold; this training cannot travel")
    return rounded


def _single(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.float16 else value


def _below(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), value


def _parameter_names(weights: Mapping[str, Tensor], shadows: list[Tensor]) -> list[str | None]:
    """Weight that each average is kept as the distance from; None where it is kept as it is.

    The next of its shape, since both lists are in one order. A wrong one would do no harm but that
    the distance is larger, and its levels coarser; from a far one it is not taken.
    """
    names: list[str | None] = []
    candidates = [(name, value) for name, value in weights.items() if value.ndim > 1]
    position = 0
    for shadow in shadows:
        found = None
        for place in range(position, len(candidates)):
            name, value = candidates[place]
            if value.shape == shadow.shape:
                found, position = name if _are_near(shadow, value) else None, place + 1
                break
        names.append(found)
    return names


def _are_near(shadow: Tensor, weight: Tensor) -> bool:
    return bool((shadow - weight).norm() < 0.5 * weight.norm() + 1e-6)


def _to_levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """(O, ...) float -> int8 of the same shape, and (O,) float32 scales."""
    scales = values.flatten(1).abs().amax(1) / 127
    levels = values.flatten(1) / scales.clamp_min(1e-30)[:, None]
    return levels.round().to(torch.int8).view(values.shape), scales


def _from_levels(levels: Tensor, scales: Tensor) -> Tensor:
    return (levels.flatten(1).float() * scales[:, None]).view(levels.shape)


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """(O,), (K,) means -> (O, K), exact where one is proportional to the other throughout."""
    return rows[:, None] * columns[None, :] / rows.mean().clamp_min(1e-38)


def _laid_out(value: Tensor, strides: list[int]) -> Tensor:
    """The same values in the memory order that the training had; fused Adam asks for that."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True))
    if min(strides, default=0) < 0 or last >= max(1, value.numel()):
        raise ValueError("strides that no tensor of this shape has")
    return torch.empty_strided(value.shape, strides).copy_(value)
