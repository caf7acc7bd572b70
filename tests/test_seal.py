import json

import pytest

from pathsegdiff.features.seal import sealed, unsealed

VALUES = {"samples": [{"sample_id": "a", "split": "train"}, {"sample_id": "ü"}], "files": {}}


@pytest.mark.parametrize("indent", [None, 0, 1])
def test_what_is_sealed_is_read_and_is_plain_json(indent):
    content = sealed(VALUES, indent=indent)
    assert unsealed(content) == VALUES
    plain = json.loads(content)
    assert isinstance(plain.pop("crc32"), int) and plain == VALUES


def test_every_flipped_bit_is_noticed():
    content = sealed(VALUES, indent=1)
    for place in range(len(content)):
        for bit in range(8):
            broken = bytearray(content)
            broken[place] ^= 1 << bit
            with pytest.raises(ValueError):
                unsealed(bytes(broken))


@pytest.mark.parametrize("length", [0, 1, 10, 40])
def test_every_truncation_is_noticed(length):
    content = sealed(VALUES)
    for cut in (content[:length], content[length + 1 :], content + b"x"):
        with pytest.raises(ValueError):
            unsealed(cut)
