"""Checkpoints are read, and nothing in them is ever run."""

import argparse
import collections
import dataclasses
import datetime
import functools
import io
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from pathsegdiff.diffusion.unpickle import Opaque, TensorRef, open_checkpoint
from pathsegdiff.errors import BundleError

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def _save(path, value, zipped=True, **options):
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def _read(path):
    """Every tensor of a checkpoint's dictionary, read."""
    with open_checkpoint(path) as checkpoint:
        return {
            name: checkpoint.read(name, value) if isinstance(value, TensorRef) else value
            for name, value in checkpoint.root.items()
        }


def _zip_with_pickle(path, data: bytes):
    """A file that looks like torch's, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/version", "3\n")
    return path


# Reading


@LAYOUTS
def test_tensors_come_back_as_they_were(tmp_path, zipped, generator):
    shared = torch.randn(6, 4, generator=generator)
    tensors = {
        "half": torch.randn(3, 5, generator=generator).half(),
        "bfloat": torch.randn(7, generator=generator).bfloat16(),
        "double": torch.randn(2, 2, generator=generator).double(),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(0.25),
        "empty": torch.empty(0, 3),
        "whole": shared,
        "view": shared[2:4, 1:3],
        "transposed": shared.t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    loaded = _read(_save(tmp_path / "x.ckpt", tensors, zipped))
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value.detach())
    loaded["view"].zero_()  # a copy of its own
    assert loaded["whole"].abs().min() > 0


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path, zipped, protocol):
    state = collections.OrderedDict(weight=torch.ones(3), deep=torch.zeros(2))
    state._metadata = {"": {"version": 1}}
    path = _save(tmp_path / "x.ckpt", {"state_dict": state}, zipped, pickle_protocol=protocol)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.root["state_dict"]) == ["weight", "deep"]


class _Strange(dict):
    """An object with state of every kind; defined here, so that no other process knows it."""

    def __init__(self):
        super().__init__(a=1)
        self.tensor = torch.ones(2)

    def __setstate__(self, state):
        raise AssertionError("state was set")


@LAYOUTS
def test_what_training_leaves_behind_is_skipped(tmp_path, zipped):
    leftovers = {
        "hyper_parameters": argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("a/b")),
        "strange": _Strange(),
        "default": collections.defaultdict(list, a=[1]),
        "set": {1, 2},
        "frozen": frozenset({1}),
        "date": datetime.datetime(2024, 1, 1),
        "numpy": np.float64(3.5),
        "array": np.arange(3),
        "partial": functools.partial(torch.nn.Linear, 3),
        "namespace": types.SimpleNamespace(x=1),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "size": torch.Size([1, 2]),
        "class": torch.nn.Linear,
        "function": torch.nn.functional.relu,
        "module": torch.nn.Linear(2, 2),
        "complex": 1 + 2j,
        "bytes": b"abc",
        "tuple": (1, [2, {"x": None}]),
        ("odd", "key"): 1,
    }
    path = _save(tmp_path / "x.ckpt", {"w": torch.ones(2), **leftovers}, zipped)
    with open_checkpoint(path) as checkpoint:
        root = checkpoint.root
        assert torch.equal(checkpoint.read("w", root["w"]), torch.ones(2))
    assert root["tuple"] == (1, [2, {"x": None}])
    assert isinstance(root["strange"], Opaque)
    assert isinstance(root["hyper_parameters"], Opaque)
    assert "argparse.Namespace" in repr(root["hyper_parameters"])


def test_classes_that_are_not_installed_are_skipped(tmp_path, monkeypatch):
    module = types.ModuleType("lost_package")
    exec("class Config:\n    pass", module.__dict__)
    module.Config.__module__ = "lost_package"
    monkeypatch.setitem(sys.modules, "lost_package", module)
    path = _save(tmp_path / "x.ckpt", {"config": module.Config(), "w": torch.ones(1)})
    monkeypatch.delitem(sys.modules, "lost_package")
    assert _read(path)["w"].item() == 1
    assert "lost_package" not in sys.modules


# Refusing


class _Call:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


@LAYOUTS
@pytest.mark.parametrize(
    "function",
    [
        os.system,
        os.remove,
        eval,
        exec,
        open,
        getattr,
        __import__,
        subprocess.Popen,
        subprocess.check_output,
        pathlib.Path.unlink,
        torch.load,
        torch.hub.load,
        np.load,
        pickle.loads,
        torch.nn.init.constant_,
        functools.reduce,
    ],
    ids=lambda function: f"{function.__module__}.{function.__qualname__}",
)
def test_a_checkpoint_that_asks_to_run_something_is_refused(tmp_path, zipped, function):
    marker = tmp_path / "marker"
    marker.touch()
    value = {"state_dict": {"w": torch.ones(1)}, "extra": [_Call(function, f"rm {marker}")]}
    path = _save(tmp_path / "x.ckpt", value, zipped)
    with pytest.raises(BundleError, match="asks to run .* refused, nothing was run") as error:
        open_checkpoint(path)
    # a method is pickled as getattr(class, name)
    assert any(name in str(error.value) for name in (function.__name__, "builtins.getattr"))
    assert "\n" not in str(error.value)
    assert marker.exists()


def _stack_global(module, name):
    return b"\x8c%c%s\x8c%c%s\x93" % (len(module), module, len(name), name)


HOSTILE = {
    "GLOBAL": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.",
    "python 2 names": b"\x80\x02c__builtin__\neval\nX\x02\x00\x00\x00ls\x85R.",
    "INST": b"(S'ls'\niposix\nsystem\n.",
    "OBJ": b"\x80\x02(cposix\nsystem\nX\x02\x00\x00\x00lso.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\nX\x02\x00\x00\x00ls\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93)}\x92.",
    "STACK_GLOBAL": b"\x80\x04" + _stack_global(b"os", b"system") + b"\x8c\x02ls\x85R.",
    "dotted name": b"\x80\x04" + _stack_global(b"torch", b"serialization.os.system") + b")R.",
    "only named": b"\x80\x02cos\nsystem\n.",
    "in a dictionary": b"\x80\x02}X\x01\x00\x00\x00acos\nsystem\ns.",
    "result of a call": b"\x80\x02cargparse\nNamespace\n)R)R.",
    "method of a class": b"\x80\x04" + _stack_global(b"pathlib", b"Path.unlink") + b")R.",
    "some function": b"\x80\x02cmy.package\nrun_it\n)R.",
    "parameter that is a call": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n"
    b"(cos\nsystem\nN(X\x02\x00\x00\x00lst}tR.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_written_by_hand_is_refused(tmp_path, name):
    with pytest.raises(BundleError, match="asks to run"):
        open_checkpoint(_zip_with_pickle(tmp_path / "x.ckpt", HOSTILE[name]))
    plain = tmp_path / "plain.ckpt"
    plain.write_bytes(HOSTILE[name])
    with pytest.raises(BundleError):
        open_checkpoint(plain)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged or truncated: it ends early"),
        (b"\x80\x02", "it ends early"),
        (b"\x80\x02.", "its pickle is broken"),
        (b"\x80\x02\x82\x01.", "has the instruction EXT1"),
        (b"Px\n.", "has the instruction PERSID"),
        (b"\x80\x02h\x05.", "its pickle is broken"),
        (b"\x80\x02K\x01Q.", "refers to what is no storage"),
        (b"\x80\x02K\x01K\x02a.", "appends to what is no list"),
        (b"\x80\x02K\x01K\x02K\x03s.", "sets items of what is no dictionary"),
        (b"\x80\x02K\x01}b.", "sets the state of what is no object"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"abc.", "it ends early"),
        (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.", "it ends early"),
        (b"\x80\x02]r\xff\xff\xff\xff.", None),  # a memo index of 4 billion costs nothing
        (b"\x80\x02c" + b"a" * 100_000 + b"\nb\n.", "its pickle is broken"),
    ],
)
def test_a_broken_pickle_is_one_line(tmp_path, data, message):
    path = _zip_with_pickle(tmp_path / "x.ckpt", data)
    if message is None:
        open_checkpoint(path).__exit__(None, None, None)
        return
    with pytest.raises(BundleError, match=message):
        open_checkpoint(path)


def test_nested_keys_that_would_take_for_ever_to_hash_are_passed_over(tmp_path):
    # t = (); 60 times t = (t, t): 2**60 steps to hash
    data = b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s."
    with open_checkpoint(_zip_with_pickle(tmp_path / "x.ckpt", data)) as checkpoint:
        assert checkpoint.root == {}


def _claiming(tmp_path, zipped, old: bytes, new: bytes):
    """A checkpoint of one tensor whose pickle was changed."""
    assert len(old) == len(new)
    path = _save(tmp_path / "x.ckpt", {"w": torch.zeros(1000)}, zipped)
    if not zipped:
        path.write_bytes(path.read_bytes().replace(old, new))
        return path
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            changed = data.replace(old, new) if name.endswith("data.pkl") else data
            archive.writestr(name, changed)
    return path


@LAYOUTS
def test_a_storage_that_claims_more_than_there_is_is_found_before_it_is_made(tmp_path, zipped):
    # 1000 as BININT2 is M\xe8\x03; the storage's count is the first of them
    path = _claiming(tmp_path, zipped, b"M\xe8\x03", b"M\xff\xff")
    with pytest.raises(BundleError, match=r"storage .* claims|claims 65535 elements"):
        _read(path)


@LAYOUTS
@pytest.mark.parametrize(
    ("shape", "stride"), [(65535, 1), (1000, 7)], ids=["larger", "spread wider"]
)
def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path, zipped, shape, stride):
    # ... storage, offset 0, shape (1000,), stride (1,)
    old = b"K\x00M\xe8\x03\x85"
    start = b"K\x00M" + struct.pack("<H", shape) + b"\x85"
    path = _claiming(tmp_path, zipped, old, start)
    if stride != 1:
        data = path.read_bytes()
        at = data.index(start) + len(start)
        tail = data[at : at + 8].replace(b"K\x01\x85", b"K%c\x85" % stride)
        path.write_bytes(data[:at] + tail + data[at + 8 :])
        if zipped:  # the archive's checksum no longer fits, which is an error of its own
            with pytest.raises(BundleError, match="damaged or truncated"):
                _read(path)
            return
    with pytest.raises(BundleError, match=rf"w claims {shape} elements of a storage of 1000"):
        _read(path)


def test_an_expanded_tensor_is_no_weight(tmp_path):
    path = _save(tmp_path / "x.ckpt", {"w": torch.zeros(1).expand(1000, 1000)})
    with pytest.raises(BundleError, match="claims 1000000 elements of a storage of 1"):
        _read(path)


def test_a_compressed_archive_could_be_of_any_size_and_is_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10 << 20))
    with pytest.raises(BundleError, match=r"data\.pkl is compressed"):
        open_checkpoint(path)


def test_bit_rot_is_noticed(tmp_path):
    path = _save(tmp_path / "x.ckpt", {"w": torch.arange(1000.0)})
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<f", 500.0)) + 1] ^= 4
    path.write_bytes(data)
    with pytest.raises(BundleError, match="w cannot be read: Bad CRC-32"):
        _read(path)


@LAYOUTS
def test_a_truncated_file_is_one_line_wherever_it_ends(tmp_path, zipped, generator):
    value = {"state_dict": {"w": torch.randn(64, generator=generator)}, "x": argparse.Namespace()}
    data = _save(tmp_path / "whole.ckpt", value, zipped).read_bytes()
    path = tmp_path / "cut.ckpt"
    for end in range(1, len(data) - 1, 7):
        path.write_bytes(data[:end])
        with pytest.raises(BundleError, match=r"truncated|not a PyTorch checkpoint") as error:
            _read(path)
        assert "\n" not in str(error.value)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match="damaged or truncated: .*; download it again"):
        _read(path)


@LAYOUTS
def test_flipped_bytes_give_one_line_or_a_result_and_nothing_else(tmp_path, zipped):
    value = {
        "w": torch.ones(4),
        "x": argparse.Namespace(a=1),
        "y": collections.OrderedDict(b=torch.zeros(2)),
        "z": [1.5, "text", (1, 2), {"q": b"bytes"}],
    }
    data = _save(tmp_path / "whole.ckpt", value, zipped).read_bytes()
    start = data.index(b"\x80\x02") if zipped else 0
    rng = random.Random(0)
    path = tmp_path / "flipped.ckpt"
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            changed[start + rng.randrange(min(700, len(data) - start))] = rng.randrange(256)
        if zipped:  # a new archive around the pickle, so that its checksum fits
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                entries = {info.filename: archive.read(info) for info in archive.infolist()}
            name = next(name for name in entries if name.endswith("data.pkl"))
            entries[name] = bytes(changed[start : start + len(entries[name])])
            with zipfile.ZipFile(path, "w") as archive:
                for entry, content in entries.items():
                    archive.writestr(entry, content)
        else:
            path.write_bytes(changed)
        try:
            with open_checkpoint(path) as checkpoint:
                root = checkpoint.root if isinstance(checkpoint.root, dict) else {}
                for name, item in root.items():
                    if isinstance(item, TensorRef):
                        checkpoint.read(str(name), item)
        except BundleError as error:
            assert "\n" not in str(error)


# Other files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:6960cd5a\nsize 704238867\n",
            r"is a git-LFS pointer \(\d+ bytes\), not the file itself \(704238867 bytes\); "
            "fetch it with `git lfs pull`",
        ),
        (b"<!DOCTYPE html><html><head>", r"is a web page \(HTML\), not a checkpoint"),
        (b"\n  <html>\n<body>Quota exceeded</body>", r"is a web page \(HTML\)"),
        (b"\xef\xbb\xbf<!doctype HTML>", r"is a web page \(HTML\)"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a PyTorch checkpoint"),
        (b"hello, world", r"is not a PyTorch checkpoint \(it starts with b'hello, w'\)"),
        (pickle.dumps({"a": 1}), "is not a PyTorch checkpoint"),
        (b"PK\x03\x04" + bytes(100), "the index at the end of the archive is missing"),
    ],
)
def test_another_file_is_named_for_what_it_is(tmp_path, content, message):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_a_folder_and_another_archive_are_named(tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        open_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(BundleError, match="is a folder; give the checkpoint file in it"):
        open_checkpoint(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(BundleError, match=r"zip archive, but not one that torch\.save wrote"):
        open_checkpoint(tmp_path / "other.zip")


def _twice(times: int) -> bytes:
    """A tuple of two of itself, so many times: 2**times things to write out or to compare."""
    return b")" + b"2\x86" * times


_STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000N"
_LONG = b"\x8b\xb8\x0b\x00\x00" + b"\x7f" * 3000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_twice(60) + b")R.", "asks to run <tuple>"),
        (_STORAGE + _twice(60) + b"tQ.", "a storage of <tuple> elements"),
        (_STORAGE + _LONG + b"tQ.", "a storage of <int> elements"),
    ],
    ids=["call", "elements", "number"],
)
def test_a_message_about_what_is_nested_costs_nothing(tmp_path, data, message):
    with pytest.raises(BundleError, match=message):
        open_checkpoint(_zip_with_pickle(tmp_path / "x.ckpt", b"\x80\x02" + data))


def test_rebuilding_within_rebuilding_ends(tmp_path):
    rebuild = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    # (rebuild, kind, (rebuild, kind, ( ... )))
    data = b"\x80\x02" + rebuild + b"(" + (rebuild + b"N(") * 3000 + b"NN" + b"tNt" * 3000 + b"R."
    with pytest.raises(BundleError, match="its pickle is broken"):
        open_checkpoint(_zip_with_pickle(tmp_path / "x.ckpt", data))


def test_names_in_a_pickle_cannot_drive_a_terminal(tmp_path):
    data = b"\x80\x04" + _stack_global(b"os\x1b[2J", b"a\nsystem") + b")R."
    with pytest.raises(BundleError, match="asks to run") as error:
        open_checkpoint(_zip_with_pickle(tmp_path / "x.ckpt", data))
    assert str(error.value).isprintable()


def test_the_version_of_an_old_file_may_be_anything(tmp_path):
    path = _save(tmp_path / "x.ckpt", {"w": torch.ones(1)}, zipped=False)
    content = path.read_bytes()
    version = pickle.dumps(1001, protocol=2)
    huge = b"\x80\x02\x8b\xb8\x0b\x00\x00" + b"\x7f" * 3000 + b"."
    for odd in (huge, b"\x80\x02" + _twice(60) + b"."):
        path.write_bytes(content.replace(version, odd, 1))
        with pytest.raises(BundleError, match="its format version is <(int|tuple)>, not 1001"):
            open_checkpoint(path)


def test_an_encrypted_archive_is_one_line(tmp_path):
    path = _save(tmp_path / "x.ckpt", {"w": torch.ones(1)})
    content = bytearray(path.read_bytes())
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(start, at + 1)) >= 0:
            content[at + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read"):
        open_checkpoint(path)


def test_an_empty_tensor_may_not_claim_sides_that_no_memory_has(tmp_path):
    path = _save(tmp_path / "x.ckpt", {"w": torch.ones(3)})
    shape = (1 << 47, 0, 1 << 47, 1 << 47)
    with open_checkpoint(path) as checkpoint:
        ref = dataclasses.replace(checkpoint.root["w"], shape=shape, stride=(1, 1, 1, 1))
        with pytest.raises(BundleError, match="w has an impossible shape"):
            checkpoint.read("w", ref)
