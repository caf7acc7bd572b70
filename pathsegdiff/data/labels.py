"""Label scheme: which raw mask codes mean which class, and the class that is not counted.

Class ids are 0 .. K-1 in the order of the scheme; the don't-care class, where a data set has one,
is K. Every consumer drops pixels whose id is K or more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pathsegdiff.data.image import shown
from pathsegdiff.errors import DataError

#: Id of pixels outside the image where the data set has no don't-care class.
IGNORE = 255
#: ``codes`` of a class that takes every code above 0 which no other class names.
POSITIVE = "positive"
_MAX_CLASSES = 100
_MAX_CODE = (1 << 16) - 1
_UNKNOWN = 254


@dataclass(frozen=True, kw_only=True)
class LabelClass:
    """One class.

    Attributes:
        name: As reports show it.
        colour: RGB, 0 to 255, of overlays.
        codes: Raw codes in the masks, or "positive": every code above 0 that no other class has.
    """

    name: str
    colour: tuple[int, int, int]
    codes: tuple[int, ...] | str

    def __post_init__(self) -> None:
        if not _is_line(self.name):
            raise DataError(f"a class name must be one printable line, got {shown(self.name)!r}")
        if len(self.colour) != 3 or not all(_is_int(c) and 0 <= c <= 255 for c in self.colour):
            raise DataError(
                f"class {self.name!r}: colour must be three integers from 0 to 255, "
                f"got {shown(list(self.colour))}"
            )
        if isinstance(self.codes, str):
            if self.codes != POSITIVE:
                raise DataError(
                    f"class {self.name!r}: codes must be integers or {POSITIVE!r}, "
                    f"got {shown(self.codes)!r}"
                )
        elif not self.codes or not all(_is_int(c) and 0 <= c <= _MAX_CODE for c in self.codes):
            raise DataError(
                f"class {self.name!r}: codes must be one or more integers from 0 to {_MAX_CODE}, "
                f"got {shown(list(self.codes))}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        codes = self.codes if isinstance(self.codes, str) else list(self.codes)
        return {"name": self.name, "colour": list(self.colour), "codes": codes}

    @classmethod
    def from_dict(cls, values: Any) -> "LabelClass":
        """Read what ``to_dict`` wrote, or a table of a manifest.

        Raises:
            DataError: If a field is missing, unknown, or has a value it cannot have.
        """
        values = _checked(values, "a class", ("name", "colour", "codes"))
        name, colour, codes = values["name"], values["colour"], values["codes"]
        if not isinstance(colour, list | tuple) or not isinstance(codes, list | tuple | str):
            raise DataError(
                f"class {shown(name)!r}: colour must be a list [red, green, blue], and codes a "
                f"list or {POSITIVE!r}"
            )
        return cls(
            name=name,
            colour=tuple(colour),
            codes=codes if isinstance(codes, str) else tuple(codes),
        )


@dataclass(frozen=True, kw_only=True)
class LabelScheme:
    """What the raw codes of a data set's masks mean.

    Attributes:
        classes: Ids 0 .. K-1 in this order.
        dont_care: Not counted anywhere and never predicted; its id is K. None where the data set
            has no such class.
        objects: Name of the class whose raw codes are one integer per object (gland), or None.
    """

    classes: tuple[LabelClass, ...]
    dont_care: LabelClass | None = None
    objects: str | None = None

    def __post_init__(self) -> None:
        if not 2 <= len(self.classes) <= _MAX_CLASSES:
            raise DataError(
                f"a label scheme has 2 to {_MAX_CLASSES} classes besides don't care, "
                f"got {len(self.classes)}"
            )
        names: list[str | int] = [entry.name for entry in self._all]
        codes: list[str | int] = [
            code
            for entry in self._all
            for code in ([entry.codes] if isinstance(entry.codes, str) else entry.codes)
        ]
        for kind, values in (("name", names), ("code", codes)):
            repeated = [value for value in dict.fromkeys(values) if values.count(value) > 1]
            if repeated:
                raise DataError(f"the {kind} {repeated[0]!r} stands twice in the classes")
        if self.objects is not None and self.objects not in self.names:
            raise DataError(
                f"objects must name a class ({', '.join(self.names)}), got {shown(self.objects)!r}"
            )

    @property
    def _all(self) -> tuple[LabelClass, ...]:
        return (*self.classes, *([self.dont_care] if self.dont_care is not None else []))

    @property
    def num_classes(self) -> int:
        """K, without don't care."""
        return len(self.classes)

    @property
    def num_outputs(self) -> int:
        """Outputs of a head: K, and one more for don't care where the scheme has it."""
        return len(self._all)

    @property
    def dont_care_id(self) -> int | None:
        """Id of the don't-care class, the last one, or None."""
        return None if self.dont_care is None else self.num_classes

    @property
    def outside_id(self) -> int:
        """Id of pixels that lie outside the image: don't care, or ``IGNORE``."""
        return IGNORE if self.dont_care is None else self.num_classes

    @property
    def names(self) -> tuple[str, ...]:
        """Of the K classes, without don't care."""
        return tuple(entry.name for entry in self.classes)

    @property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """RGB of the K classes, without don't care."""
        return tuple(entry.colour for entry in self.classes)

    def meaning(self) -> tuple[Any, ...]:
        """What decides the labels: everything but names and colours."""
        objects = None if self.objects is None else self.names.index(self.objects)
        dont_care = None if self.dont_care is None else self.dont_care.codes
        return tuple(entry.codes for entry in self.classes), dont_care, objects

    def apply(self, raw: np.ndarray, where: str) -> np.ndarray:
        """Turn raw codes into class ids.

        Args:
            raw: (H, W) integer codes.
            where: What the mask is called in a message (its file).

        Returns:
            (H, W) uint8 ids, at most K.

        Raises:
            DataError: If a code is in no class.
        """
        low, high = (int(raw.min()), int(raw.max())) if raw.size else (0, 0)
        if low < 0 or (high > _MAX_CODE and self._ids_of_codes[_MAX_CODE + 1] == _UNKNOWN):
            raise self._unknown(low if low < 0 else high, where)
        # Every code above the largest that a class can name stands in the table's last entry.
        index = np.minimum(raw, _MAX_CODE + 1) if high > _MAX_CODE else raw
        ids = self._ids_of_codes[index]
        unknown = ids == _UNKNOWN
        if unknown.any():
            raise self._unknown(int(raw[unknown][0]), where)
        return ids

    def object_map(self, raw: np.ndarray) -> np.ndarray:
        """The object of each pixel: raw codes of the class that ``objects`` names, 0 elsewhere.

        Args:
            raw: (H, W) integer codes, all of them known.

        Returns:
            (H, W) int32.

        Raises:
            ValueError: If the scheme counts no objects.
        """
        if self.objects is None:
            raise ValueError("this label scheme counts no objects")
        inside = self.apply(raw, "mask") == self.names.index(self.objects)
        return np.where(inside, raw, 0).astype(np.int32)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "classes": [entry.to_dict() for entry in self.classes],
            "dont_care": None if self.dont_care is None else self.dont_care.to_dict(),
            "objects": self.objects,
        }

    @classmethod
    def from_dict(cls, values: Any) -> "LabelScheme":
        """Read what ``to_dict`` wrote, or the ``[labels]`` table of a manifest.

        Raises:
            DataError: If a field is missing, unknown, or has a value it cannot have.
        """
        values = _checked(values, "labels", ("classes",), ("dont_care", "objects"))
        if not isinstance(values["classes"], list | tuple):
            raise DataError("labels: classes must be a list of classes")
        dont_care = values.get("dont_care")
        return cls(
            classes=tuple(LabelClass.from_dict(entry) for entry in values["classes"]),
            dont_care=None if dont_care is None else LabelClass.from_dict(dont_care),
            objects=values.get("objects"),
        )

    @cached_property
    def _ids_of_codes(self) -> np.ndarray:
        """(65537,) uint8: the id of each code; the last entry stands for every larger code."""
        table = np.full(_MAX_CODE + 2, _UNKNOWN, np.uint8)
        for class_id, entry in enumerate(self._all):
            if isinstance(entry.codes, str):
                table[1:] = class_id
        for class_id, entry in enumerate(self._all):
            if not isinstance(entry.codes, str):
                table[list(entry.codes)] = class_id
        return table

    def _unknown(self, code: int, where: str) -> DataError:
        known = "; ".join(
            f"{entry.name} {entry.codes if isinstance(entry.codes, str) else _listed(entry.codes)}"
            for entry in self._all
        )
        return DataError(
            f"{shown(where)}: code {code} is in no class ({known}); mend the mask, or add the "
            "code to a class of the manifest"
        )


def _listed(codes: Sequence[int]) -> str:
    return ", ".join(map(str, codes))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_line(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value.strip()) <= 100 and value.isprintable()


def _checked(
    values: Any, what: str, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{what} must be a table with {', '.join(required)}")
    missing = [key for key in required if key not in values]
    surplus = [key for key in values if key not in (*required, *optional)]
    if missing or surplus:
        problem = f"lacks {missing[0]}" if missing else f"has an unknown {shown(surplus[0])!r}"
        raise DataError(f"{what} {problem}; it can have {', '.join((*required, *optional))}")
    return values
