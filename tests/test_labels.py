"""Raw codes to class ids."""

import numpy as np
import pytest

from pathsegdiff.data.labels import IGNORE, POSITIVE, LabelClass, LabelScheme
from pathsegdiff.data.manifest import load_manifest
from pathsegdiff.errors import DataError


def entry(name: str, codes, colour=(1, 2, 3)) -> LabelClass:
    return LabelClass(name=name, colour=colour, codes=codes)


GLANDS = LabelScheme(classes=(entry("background", (0,)), entry("gland", POSITIVE)), objects="gland")
TISSUE = LabelScheme(
    classes=(entry("tumor", (1, 19)), entry("stroma", (2,))), dont_care=entry("outside", (0,))
)


def test_codes_become_ids_counted_by_hand():
    raw = np.array([[1, 19, 2], [0, 2, 1]])
    ids = TISSUE.apply(raw, "m.png")
    assert ids.dtype == np.uint8
    assert ids.tolist() == [[0, 0, 1], [2, 1, 0]]


def test_positive_takes_every_code_above_zero_however_large():
    raw = np.array([[0, 1, 255, 65_535, 65_536, 2_000_000]], np.int32)
    assert GLANDS.apply(raw, "m.png").tolist() == [[0, 1, 1, 1, 1, 1]]


def test_positive_leaves_codes_that_another_class_names():
    scheme = LabelScheme(
        classes=(entry("background", (0,)), entry("gland", POSITIVE), entry("fat", (7,)))
    )
    assert scheme.apply(np.array([[0, 6, 7, 8]]), "m.png").tolist() == [[0, 1, 2, 1]]


def test_dont_care_comes_last_and_outside_is_dont_care_or_ignored():
    assert (TISSUE.num_classes, TISSUE.num_outputs, TISSUE.dont_care_id) == (2, 3, 2)
    assert TISSUE.outside_id == 2
    assert (GLANDS.num_classes, GLANDS.num_outputs, GLANDS.dont_care_id) == (2, 2, None)
    assert GLANDS.outside_id == IGNORE
    assert TISSUE.names == ("tumor", "stroma")
    assert TISSUE.colours == ((1, 2, 3), (1, 2, 3))


@pytest.mark.parametrize("code", [3, 255, 70_000])
def test_an_unknown_code_names_file_code_and_classes(code):
    with pytest.raises(
        DataError,
        match=rf"a/m\.png: code {code} is in no class \(tumor 1, 19; stroma 2; outside 0\); mend",
    ):
        TISSUE.apply(np.array([[1, code]]), "a/m.png")


def test_objects_are_the_raw_codes_of_their_class():
    scheme = LabelScheme(
        classes=(entry("background", (0,)), entry("fat", (7,)), entry("gland", POSITIVE)),
        objects="gland",
    )
    objects = scheme.object_map(np.array([[0, 7, 8], [300, 8, 1]]))
    assert objects.dtype == np.int32
    assert objects.tolist() == [[0, 0, 8], [300, 8, 1]]
    with pytest.raises(ValueError, match="counts no objects"):
        TISSUE.object_map(np.zeros((1, 1), int))


def test_a_table_lookup_equals_a_plain_loop():
    scheme = load_manifest("bcss").scheme
    raw = np.random.default_rng(0).integers(0, 22, (40, 30))
    everything = (*scheme.classes, scheme.dont_care)
    expected = [
        [next(i for i, entry in enumerate(everything) if code in entry.codes) for code in row]
        for row in raw.tolist()
    ]
    assert scheme.apply(raw, "m.png").tolist() == expected


@pytest.mark.parametrize("scheme", [GLANDS, TISSUE])
def test_a_scheme_survives_json(scheme):
    assert LabelScheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": []}, "2 to 100 classes besides don't care, got 0"),
        ({"classes": 3}, "classes must be a list"),
        ({"classes": [3, 4]}, "a class must be a table"),
        ({"extra": 1}, "unknown 'extra'"),
        ({"objects": "nucleus"}, r"objects must name a class \(a, b\), got 'nucleus'"),
        ({"b": {"name": "a"}}, "name 'a' stands twice"),
        ({"b": {"codes": [0]}}, "code 0 stands twice"),
        ({"b": {"codes": "negative"}}, "integers or 'positive', got 'negative'"),
        ({"b": {"codes": []}}, "one or more integers"),
        ({"b": {"codes": [-1]}}, "from 0 to 65535"),
        ({"b": {"codes": [1.5]}}, "one or more integers"),
        ({"b": {"codes": [True]}}, "one or more integers"),
        ({"b": {"codes": [65536]}}, "from 0 to 65535"),
        ({"b": {"colour": [1, 2]}}, "three integers from 0 to 255"),
        ({"b": {"colour": [1, 2, 256]}}, "three integers from 0 to 255"),
        ({"b": {"colour": "red"}}, "colour must be a list"),
        ({"b": {"name": "b\x1b[2J"}}, r"printable line, got 'b.*x1b\[2J'"),
        ({"b": {"name": ""}}, "printable line"),
        ({"b": {"size": 1}}, "a class has an unknown 'size'"),
    ],
)
def test_a_scheme_that_contradicts_itself_is_refused(change, message):
    second = {"name": "b", "colour": [0, 0, 0], "codes": [1]}
    values = {
        "classes": [{"name": "a", "colour": [0, 0, 0], "codes": [0]}, second | change.pop("b", {})],
        **change,
    }
    with pytest.raises(DataError, match=message) as caught:
        LabelScheme.from_dict(values)
    assert str(caught.value).isprintable()


def test_a_class_without_codes_is_refused():
    with pytest.raises(DataError, match="a class lacks codes; it can have name, colour, codes"):
        LabelClass.from_dict({"name": "a", "colour": [0, 0, 0]})
