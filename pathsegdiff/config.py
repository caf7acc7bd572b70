"""Settings that decide content, and their fingerprint.

Only what changes an extracted number is here. Batch size, device and worker count are arguments of
the loops that use them: they must not change the features, so they do not enter the recipe.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pathsegdiff.errors import ConfigError

#: The thirteen taps in the order in which the paper concatenates them (Danisetty et al. 2025).
ALL_TAPS: tuple[str, ...] = ("middle", *(f"up_{index:02d}" for index in range(12)))
#: The encoder's patch tokens: what a head can read beside the taps, or instead of them.
TOKENS = "tokens"
#: Everything that a head can read, in the order of its input channels.
HEAD_INPUTS: tuple[str, ...] = (*ALL_TAPS, TOKENS)
CONDITIONINGS: tuple[str, ...] = ("encoder", "none")
#: What a store can hold features in.
STORE_DTYPES: tuple[str, ...] = ("float16", "float32", "int8", "float16-5bit")
#: What the networks can compute in. It changes the numbers, so it is part of the recipe.
PRECISIONS: tuple[str, ...] = ("float32", "bfloat16", "float16")


def parse_taps(text: str) -> tuple[str, ...]:
    """Read ``all`` or a comma-separated list of taps, and put it in tap order.

    Raises:
        ConfigError: If a name is no tap, or none is named.
    """
    if text.strip() == "all":
        return ALL_TAPS
    return order_taps([name.strip() for name in text.split(",") if name.strip()])


def parse_head_inputs(text: str) -> tuple[str, ...]:
    """Read what a head reads: taps, ``all`` of them, ``tokens``, or a list of these.

    Raises:
        ConfigError: If a name is none of these, or none is named.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    expanded = [tap for name in names for tap in (ALL_TAPS if name == "all" else (name,))]
    return order_head_inputs(expanded)


def order_head_inputs(names: Sequence[str]) -> tuple[str, ...]:
    """As ``order_taps``, with the tokens last.

    Raises:
        ConfigError: If a name is no tap and not "tokens", or none is named.
    """
    taps = [name for name in names if name != TOKENS]
    ordered = order_taps(taps) if taps or TOKENS not in names else ()
    return (*ordered, TOKENS) if TOKENS in names else ordered


def order_taps(names: Sequence[str]) -> tuple[str, ...]:
    """The named taps without repeats, in the order of ``ALL_TAPS``.

    Raises:
        ConfigError: If a name is no tap, or none is named.
    """
    unknown = [name for name in names if name not in ALL_TAPS]
    if unknown:
        raise ConfigError(f"no tap is called {unknown[0]!r}; there are {', '.join(ALL_TAPS)}")
    if not names:
        raise ConfigError(f"no tap was named; give 'all' or some of {', '.join(ALL_TAPS)}")
    return tuple(tap for tap in ALL_TAPS if tap in names)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the values in a feature store; every field enters its fingerprint.

    Attributes:
        model_sha256: Content hash of the model bundle (weights, schedule, scale, conditioning).
        dataset_sha256: Hash of what makes regions and labels from files: label codes, resolution
            and region rule. The decoded pixels of each sample are hashed in its completion mark.
        timestep: t of the forward process, 0-based.
        conditioning: "encoder", or "none" for the null condition.
        taps: In tap order.
        dtype: Of the stored features (features/quantize.py says what each loses).
        precision: That the networks computed in.
        seed: Of the keyed noise and the keyed window offsets.
        layout: "levels" (one array per stride) or "dense" (the stack on the stride-4 grid).
        tokens: Whether the encoder's patch tokens are stored as a level of their own.
    """

    model_sha256: str
    dataset_sha256: str
    timestep: int = 50
    conditioning: str = "encoder"
    taps: tuple[str, ...] = ALL_TAPS
    dtype: str = "float16"
    precision: str = "float32"
    seed: int = 0
    layout: str = "levels"
    tokens: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", order_taps(self.taps))
        for name in ("model_sha256", "dataset_sha256"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be text, got {getattr(self, name)!r:.60}")
        for name, value in (("t", self.timestep), ("seed", self.seed)):
            if not isinstance(value, int):
                raise ConfigError(f"{name} must be a whole number, got {value!r:.60}")
        if self.timestep < 0:
            raise ConfigError(f"t must be 0 or more, got {self.timestep}")
        _check_choice("conditioning", self.conditioning, CONDITIONINGS)
        _check_choice("dtype", self.dtype, STORE_DTYPES)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("layout", self.layout, ("levels", "dense"))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Read what ``to_dict`` wrote.

        Raises:
            ConfigError: If a field is missing, unknown, or has a value it cannot have.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            odd = (
                sorted(set(values) ^ names) if isinstance(values, dict) else [type(values).__name__]
            )
            raise ConfigError(f"a recipe must have the fields {sorted(names)}; differing: {odd}")
        return cls(**{**values, "taps": tuple(values["taps"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in field order."""
        return {**asdict(self), "taps": list(self.taps)}

    def fingerprint(self) -> str:
        """Twelve hex digits that change whenever an extracted number could change."""
        return content_hash(self.to_dict())[:12]

    def differences(self, other: "Recipe") -> list[str]:
        """Names of the fields in which two recipes differ, in field order."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [name for name in mine if mine[name] != theirs[name]]


def content_hash(value: Any) -> str:
    """SHA-256 (64 hex digits) of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
