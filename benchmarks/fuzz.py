"""Feed the readers of outside files with what nobody writes, guided by the code that it reaches.

    python benchmarks/fuzz.py TARGET --minutes 10 [--seed N] [--corpus DIR] [--findings DIR]
    python benchmarks/fuzz.py TARGET --replay FILE

TARGET is one of manifest, labels, checkpoint, project, import, bundle, store, run and archive. Each
starts from valid files of micro size that are made here. They are changed where it matters:
settings in JSON, TOML and YAML, cells of a table, instructions of a pickle, chunks of a PNG, the
index of a shard; where a checksum would hide what is behind it, it is made to fit again.

A finding is whatever is neither a result nor a ``PathSegDiffError`` of one printable line: another
exception, 1 GiB of memory above the start, 10 s of processor time for one input, a file of
somewhere else that is opened, a program that is started. It is saved with its traceback.

Needs atheris (`pip install atheris`) and Linux.
"""

import argparse
import csv
import io
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

#: Address space above what the readers take with the valid files.
MEMORY = 1 << 30
#: Processor time for one input.
SECONDS = 10
#: Of a message.
LONGEST = 3000
#: A child that is silent for this long is killed.
_SILENCE = 120
#: Exit code of a child that cannot begin.
_NO_START = 3
#: And of one that has grown by half of what an input may take, and makes room for the next.
_GROWN = 4
#: Larger inputs are not made.
_MAX_INPUT = 1 << 18
_ENTRY = struct.Struct("<HI")
_GONE = 0xFFFFFFFF
#: Bits of an input's first byte: what is made to fit again.
SEALS, CHECKSUMS, FINGERPRINT = 1, 2, 4
_ALL = SEALS | CHECKSUMS | FINGERPRINT
#: First bytes of the memory that parent and child share: executions, errors of one line, results.
_COUNTS = struct.Struct("<QQQI")

Files = dict[str, bytes]
Edit = Callable[[bytes, random.Random], bytes]


class TooSlow(BaseException):
    """An input took longer than it may."""


# Changing files

#: Values that somebody may come to write. "@...@" is replaced by text that no value can hold.
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 32, 64, 255, 256, 65535, 65536, 1 << 31, 1 << 32, 1 << 60,
    1 << 63, 1 << 64, 10**400, -(10**400), 0.5, -0.0, 1e-300, 1e308, float("inf"), float("nan"),
    "", " ", "a", "0", "1e400", "nan", "positive", "train", "a\nb", "\x1b[31mred", "\0", "\x7f",
    "../../etc/passwd", "/etc/passwd", "..", "a/b", "C:\\x", "²", "\ud800", "e\u0301", "x" * 5000,
    [], {}, [[]], [0], [1, 2], [0, 0, 0], ["a", "a"], {"a": 1}, {"": {}}, [None],
    "@deep@", "@deepmap@", "@hex@", "@digits@", "@exponent@",
]  # fmt: skip
_TEXTS = {
    "@deep@": "[" * 3000 + "]" * 3000,
    "@deepmap@": '{"a":' * 3000 + "1" + "}" * 3000,
    "@hex@": "0x" + "f" * 5000,
    "@digits@": "9" * 5000,
    "@exponent@": "1e999",
}


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below the top."""
    found, todo = [], [tree]
    while todo:
        node = todo.pop()
        if not isinstance(node, dict | list):
            continue
        for key in node if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            todo.append(node[key])
    return found


def change_tree(tree: Any, rng: random.Random) -> Any:
    """One to three changes of a value made of dictionaries and lists; it is changed in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(tree)
        if not places:
            return rng.choice(_VALUES)
        node, key = rng.choice(places)
        value, other = node[key], rng.choice(places)
        match rng.randrange(10):
            case 0 | 1 | 2:
                node[key] = json.loads(json.dumps(rng.choice(_VALUES)))
            case 3:
                del node[key]
            case 4:
                node[key] = json.loads(json.dumps(other[0][other[1]]))
            case 5 if isinstance(node, dict):
                node[rng.choice(("x", "", "a\nb", "\x1b[2J", "../x", "\ud800", str(key)))] = value
            case 5 | 6 if isinstance(node, list):
                node.insert(key, rng.choice((value, rng.choice(_VALUES))))
            case 6:
                node[key] = rng.choice(([value], {"a": value}))
            case 7 if isinstance(value, list) and value:
                node[key] = value * rng.choice((2, 20, 1000 // len(value)))
            case _ if isinstance(value, bool) or value is None:
                node[key] = rng.choice((not value, 0, "no"))
            case _ if isinstance(value, int | float):
                try:
                    node[key] = rng.choice(
                        (value + 1, value - 1, -value, value * 2, value * 1000, value / 2)
                    )
                except OverflowError:
                    node[key] = 1
            case _ if isinstance(value, str):
                at = rng.randint(0, len(value))
                more = rng.choice(("\n", "\x1b", "/../", "\0", ".", "0", "é", "‮", value))
                node[key] = value[:at] + more + value[at + rng.randint(0, 2) :]
    return tree


def _spell(text: str, quote: str = '"') -> bytes:
    for name, spelling in _TEXTS.items():
        text = text.replace(f"{quote}{name}{quote}", spelling)
    return text.encode("utf-8", "surrogatepass")


def change_json(content: bytes, rng: random.Random) -> bytes:
    """Of a sealed file the checksum's line is left alone."""
    first, line, rest = content.partition(b"\n")
    if line and first.startswith(b'{"crc32"'):
        return first + line + change_json(b"{" + rest, rng).removeprefix(b"{") + b"\n"
    return _spell(json.dumps(change_tree(json.loads(content), rng)))


def change_toml(content: bytes, rng: random.Random) -> bytes:
    table = change_tree(tomllib.loads(content.decode()), rng)
    return _spell("".join(f"{_key(key)} = {_toml(value)}\n" for key, value in table.items()))


def _key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{_key(key)} = {_toml(one)}" for key, one in value.items() if one is not None)
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps("" if value is None else value).replace("Infinity", "inf").replace("N", "n")


def change_yaml(content: bytes, rng: random.Random) -> bytes:
    import yaml

    tree = change_tree(yaml.safe_load(content), rng)
    text = yaml.dump(tree, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    for quote in ("'", '"'):
        text = _spell(text, quote).decode("utf-8", "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


def change_csv(content: bytes, rng: random.Random) -> bytes:
    rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    row = rng.choice(rows)
    match rng.randrange(7):
        case 0:
            rows.insert(rng.randint(0, len(rows)), list(row))
        case 1:
            rows.remove(row)
        case 2:
            row.append("x")
        case 3 if row:
            del row[rng.randrange(len(row))]
        case _ if row:
            texts = [str(value) for value in _VALUES if isinstance(value, str | int)]
            column = rng.randrange(len(row))
            row[column] = rng.choice((*texts, rng.choice(rng.choice(rows) or ["y"])))
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def _unicode(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


#: Pieces of pickles. The first are what every checkpoint has.
_PICKLES = [
    b"N", b"K\x00", b"K\x05", b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\x7f" * 8,
    b"\x8b" + struct.pack("<i", 3000) + b"\x7f" * 3000, b"G\x7f\xf0" + bytes(6), b"\x88", b"\x89",
    b")", b"]", b"}", b"\x8f", b"(", b"t", b"\x85", b"\x86", b"\x87", b"2", b"0", b"1", b"R", b"b",
    b"\x81", b"\x92", b"o", b"a", b"e", b"s", b"u", b"Q", b"d", b"l", b"\x90", b"\x91", b"\x93",
    b"\x94", b"h\x00", b"h\x01", b"h\x05", b"q\x00", b"q\x01", b".", b"(t", b"I99\n", b"I01\n",
    b"L" + b"9" * 5000 + b"L\n", b"F1e999\n", b"S'a\\x1b'\n", b"Va\\u001b\n", b"C\x02ab",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n", b"ctorch\nDoubleStorage\n", b"cargparse\nNamespace\n",
    b"cposix\nsystem\n", b"cbuiltins\neval\n", b"ca\x1b[31m\nB\n", _unicode(b"storage"),
    _unicode(b"state_dict"), _unicode(b"a\nb\x1b[31m"), _unicode(b""), _unicode(b"0"),
    _unicode("\ud800".encode("utf-8", "surrogatepass")), b")" + b"2\x86" * 60,
    b")" + b"\x85" * 5000,
    b"(" * 5000, b"]" + b"2a" * 3, _unicode(b"os") + _unicode(b"a\nsystem") + b"\x93",
]  # fmt: skip


def change_pickle(content: bytes, rng: random.Random) -> bytes:
    """Take out, repeat, put in, swap and change instructions; what follows the pickle stays."""
    import pickletools

    starts = []
    stream = io.BytesIO(content)
    with suppress(Exception), warnings.catch_warnings(action="ignore"):
        while True:
            starts.extend(position for _, _, position in pickletools.genops(stream))
    starts = [position for position in starts if position is not None]
    ends = [*starts[1:], stream.tell()]
    pieces = [content[start:end] for start, end in zip(starts, ends, strict=True)]
    rest = content[ends[-1] :] if starts else content
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randint(0, len(pieces))
        match rng.randrange(6):
            case 0 | 1:
                pieces.insert(at, rng.choice(_PICKLES))
            case 2 if pieces:
                del pieces[at % len(pieces)]
            case 3 if pieces:
                pieces[at % len(pieces)] = rng.choice(_PICKLES)
            case 4 if pieces:
                pieces.insert(at, rng.choice(pieces))
            case _ if pieces:
                piece = bytearray(pieces[at % len(pieces)])
                piece[rng.randrange(len(piece))] ^= 1 << rng.randrange(8)
                pieces[at % len(pieces)] = bytes(piece)
    return b"".join(pieces) + rest


def change_png(content: bytes, rng: random.Random) -> bytes:
    """Change one chunk, and make its checksum fit."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        length = struct.unpack(">I", content[at : at + 4])[0]
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return change_bytes(content, rng)
    place = rng.randrange(len(chunks))
    kind, data = chunks[place]
    match rng.randrange(5):
        case 0:
            chunks.insert(place, chunks[rng.randrange(len(chunks))])
        case 1:
            del chunks[place]
        case 2 if kind == b"IHDR":
            side = rng.choice((0, 1, 8, 1 << 14, 31623, 1 << 20, (1 << 31) - 1, 1 << 31))
            data = struct.pack(">I", side) + data[4:] if rng.random() < 0.5 else data
            chunks[place] = kind, data[:4] + struct.pack(">I", side) + data[8:]
        case 2 if kind == b"IDAT":
            chunks[place] = kind, zlib.compress(bytes(rng.choice((0, 1, 72, 1 << 20))))
        case 3:
            name = rng.choice((b"PLTE", b"tRNS", b"eXIf", b"iCCP", b"zTXt", b"acTL", b"gAMA"))
            chunks.insert(place, (name, change_bytes(data, rng)))
        case _:
            chunks[place] = kind, change_bytes(data, rng)
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def change_shard(content: bytes, rng: random.Random) -> bytes:
    """Change the index at the end, or the chunks, and make the index' checksum fit."""
    import google_crc32c

    changed = bytearray(content[:-4])
    if not changed:
        return change_bytes(content, rng)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(0, len(changed) - 64), len(changed))
        changed[at] = rng.choice((0, 1, 255, changed[at] ^ 1, changed[at] ^ 128))
    size = min(len(changed), 16 * rng.choice((1, 1, 2, 4)))
    checksum = google_crc32c.value(bytes(changed[-size:]))
    return bytes(changed) + checksum.to_bytes(4, "little")


def change_tar(content: bytes, rng: random.Random) -> bytes:
    """Change the headers of an archive, and make their checksums fit."""
    changed = bytearray(content)
    block = 512 * rng.randrange(max(1, len(changed) // 512))
    field, size = rng.choice(((0, 100), (124, 12), (156, 1), (157, 100), (345, 155), (257, 8)))
    value = rng.choice(
        (
            b"../x",
            b"/etc/x",
            b"a\nb",
            b"77777777777",
            b"\x80" + b"\xff" * 10,
            b"1",
            b"2",
            b"L",
            b"x",
        )
    )
    changed[block + field : block + field + size] = value[:size].ljust(size, b"\0")
    header = changed[block : block + 512]
    header[148:156] = b" " * 8
    changed[block + 148 : block + 156] = b"%06o\0 " % sum(header)
    return bytes(changed)


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    import atheris

    if rng.random() < 0.2:
        cut = rng.randint(0, len(content))
        return content[:cut]
    return bytes(atheris.Mutate(content, max(64, len(content) + 64)))


EDITS: dict[str, Edit] = {
    ".json": change_json,
    "#header": change_json,
    ".toml": change_toml,
    ".yaml": change_yaml,
    ".csv": change_csv,
    "#pickle": change_pickle,
    ".legacy": change_pickle,
    ".png": change_png,
    ".shard": change_shard,
    ".tar": change_tar,
}


# What is read


class Target:
    """A reader: valid files for it, and the call.

    Attributes:
        base: The valid files, and parts of larger ones: NAME#header of safetensors, NAME#pickle of
            a checkpoint.
        whole: The larger files of which only such a part is changed.
    """

    def __init__(self, folder: Path) -> None:
        self.base: Files = {}
        self.whole: Files = {}
        self.make(folder)

    def make(self, folder: Path) -> None:
        """Fill ``base`` and ``whole``; ``folder`` is empty and is removed afterwards."""
        raise NotImplementedError

    def read(self, folder: Path, changed: set[str]) -> None:
        """Read the files; the names of those that are not as they were are known."""
        raise NotImplementedError

    def repair(self, files: Files, flags: int) -> Files:
        """The files with what ``flags`` name made to fit again."""
        return files

    def edit_of(self, name: str) -> Edit:
        """How a file is changed."""
        return next((edit for end, edit in EDITS.items() if name.endswith(end)), change_bytes)

    def take(self, folder: Path) -> None:
        """Make every file below ``folder`` part of ``base``."""
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not path.is_file() or path.name == ".lock":
                continue
            content = path.read_bytes()
            if name.endswith(".safetensors"):
                length = 8 + int.from_bytes(content[:8], "little")
                self.whole[name] = content[length:]
                self.base[f"{name}#header"] = content[8:length]
            elif name.endswith((".ckpt", ".pth")) and zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    self.base[f"{name}#pickle"] = next(
                        archive.read(one) for one in archive.namelist() if one.endswith("data.pkl")
                    )
                self.whole[name] = content
            else:
                self.base[name] = content

    def assemble(self, files: Files) -> Files:
        """Whole files of the parts."""
        out = {}
        for name, content in files.items():
            file, _, part = name.partition("#")
            if part == "header":
                out[file] = len(content).to_bytes(8, "little") + content + self.whole[file]
            elif part == "pickle":
                made = io.BytesIO()
                with (
                    zipfile.ZipFile(io.BytesIO(self.whole[file])) as old,
                    zipfile.ZipFile(made, "w") as new,
                ):
                    for one in old.namelist():
                        new.writestr(one, content if one.endswith("data.pkl") else old.read(one))
                out[file] = made.getvalue()
            else:
                out[name] = content
        return out


def _refuse_large_images() -> None:
    """Half a gigapixel may take more than ``MEMORY``: here the limit is 4 megapixels."""
    from pathsegdiff.data import image

    image.MAX_PIXELS = 1 << 22


class ManifestTarget(Target):
    """NAME.toml and NAME.csv, and the small images that they name."""

    def make(self, folder: Path) -> None:
        _refuse_large_images()
        from tests.helpers_data import make_glas, write_manifest

        make_glas(folder, counts={"train": 2, "testB": 1}, size=(13, 18), suffix=".png")
        fetch = {"kind": "archive", "url": "https://example.org/a.zip", "md5": "0" * 32}
        drive = {"kind": "drive", "folder": "a" * 33, "subfolders": ["rgbs", "masks"]}
        region = {"kind": "window", "region_px": 64, "patch_px": 32, "window_px": 66, "mpp": 0.5}
        for name, table in (("archive", fetch), ("drive", drive)):
            rows = [
                {"sample_id": f"{name}{index}", "image": f"rgbs/{index}.png", "mask": "masks/a.png"}
                | {"split": split, "group": split, "height_px": 9, "width_px": 9}
                for index, split in enumerate(("train", "test"))
            ]
            write_manifest(folder / f"{name}.toml", rows, fetch=table, mpp=0.25, region=region)
        self.take(folder)

    def read(self, folder: Path, changed: set[str]) -> None:
        from pathsegdiff.data.check import check_dataset
        from pathsegdiff.data.manifest import Dataset, load_manifest, open_dataset
        from pathsegdiff.errors import DataError

        stems = {Path(name).stem for name in changed} or {"glaslike", "archive", "drive"}
        if any("/" in name for name in changed):
            stems.add("glaslike")
        for stem in sorted(stems & {"glaslike", "archive", "drive"}):
            manifest = load_manifest(folder / f"{stem}.toml")
            if manifest.root is not None and not manifest.root.resolve().is_relative_to(folder):
                continue  # a manifest may say where its own files are
            if manifest.rule.region_px > 512:
                continue
            with suppress(DataError):
                for report in check_dataset(folder / f"{stem}.toml").splits:
                    for finding in report.findings:
                        check_line(finding.message)
                dataset: Dataset = open_dataset(folder / f"{stem}.toml")
                for sample in dataset.samples[:2]:
                    dataset.read(sample)


class LabelsTarget(Target):
    """Masks and images of every container, and what their codes mean."""

    def make(self, folder: Path) -> None:
        import numpy as np
        from PIL import Image

        from tests.helpers_store import GLANDS, TISSUE

        _refuse_large_images()

        rng = np.random.default_rng(0)
        codes = rng.integers(0, 6, (9, 8)).astype(np.uint8)
        grey = Image.fromarray(codes)
        for suffix in ("png", "bmp", "tif", "webp"):
            grey.save(folder / f"mask.{suffix}", lossless=True)
        Image.fromarray(codes.astype(np.uint16)).save(folder / "deep.tif")
        grey.convert("P").save(folder / "palette.png", transparency=0)
        colours = Image.fromarray(rng.integers(0, 256, (9, 8, 3)).astype(np.uint8))
        for name in ("image.png", "image.jpg", "image.webp", "image.tif"):
            colours.save(folder / name)
        colours.convert("RGBA").save(folder / "image-alpha.png")
        for name, scheme in (("glands", GLANDS), ("tissue", TISSUE)):
            (folder / f"{name}.json").write_text(json.dumps(scheme.to_dict()))
        self.take(folder)

    def read(self, folder: Path, changed: set[str]) -> None:
        from pathsegdiff.data.image import image_size, pixel_sha256, read_image, read_label_image
        from pathsegdiff.data.labels import LabelScheme
        from pathsegdiff.errors import DataError

        schemes = []
        for name in ("glands", "tissue"):
            try:
                values = json.loads((folder / f"{name}.json").read_bytes())
            except (OSError, ValueError, RecursionError):
                continue  # such a file is read by a manifest or a store
            schemes.append(LabelScheme.from_dict(values))
        kinds = (".png", ".bmp", ".tif", ".webp", ".jpg")
        for name in sorted(changed or self.base):
            if not name.endswith(kinds) or not (folder / name).exists():
                continue
            with suppress(DataError):
                image_size(folder / name)
                pixel_sha256(read_image(folder / name))
            if name.startswith("image"):
                continue
            raw = read_label_image(folder / name)
            for scheme in schemes:
                with suppress(DataError):
                    scheme.apply(raw, name)
                    if scheme.objects is not None:
                        scheme.object_map(raw)
        for scheme in schemes:
            LabelScheme.from_dict(json.loads(json.dumps(scheme.to_dict())))


class CheckpointTarget(Target):
    """Checkpoints of both layouts with what trainings leave in them; every tensor is read."""

    def make(self, folder: Path) -> None:
        import collections

        import torch

        shared = torch.arange(12.0).reshape(3, 4)
        value = {
            "state_dict": collections.OrderedDict(
                weight=shared, view=shared[1:, :2], half=torch.ones(2).half()
            ),
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "hyper_parameters": argparse.Namespace(lr=1e-4, deep={"a": (1, [2, None])}),
            "epoch": 3,
        }
        torch.save(value, folder / "zip.ckpt")
        torch.save(value, folder / "four.ckpt", pickle_protocol=4)
        torch.save(value, folder / "old.legacy", _use_new_zipfile_serialization=False)
        self.take(folder)
        self.base["raw.zip"] = self.whole["zip.ckpt"]

    def read(self, folder: Path, changed: set[str]) -> None:
        from pathsegdiff.diffusion.unpickle import TensorRef, open_checkpoint

        names = {name.partition("#")[0] for name in changed or self.base}
        for name in sorted(names):
            if not (folder / name).exists():
                continue
            with open_checkpoint(folder / name) as checkpoint:
                todo, seen = [("root", checkpoint.root)], 0
                while todo and seen < 200:
                    where, value = todo.pop()
                    seen += 1
                    if isinstance(value, TensorRef):
                        checkpoint.read(where, value)
                    elif isinstance(value, dict):
                        items = list(value.items())[:20]
                        todo += [(k if isinstance(k, str) else "x", one) for k, one in items]
                    elif isinstance(value, list | tuple):
                        todo.extend((where, one) for one in value[:20])


class ProjectTarget(Target):
    """The project YAML of a latent diffusion model."""

    def make(self, folder: Path) -> None:
        import yaml

        from tests.helpers_compvis import small_project

        (folder / "project.yaml").write_text(yaml.safe_dump(small_project()))
        self.take(folder)

    def read(self, folder: Path, changed: set[str]) -> None:
        from pathsegdiff.diffusion.project import read_project

        read_project(folder / "project.yaml")


class ImportTarget(Target):
    """The authors' files together, of the smallest model of the supported kind."""

    def make(self, folder: Path) -> None:
        import torch
        import yaml

        from pathsegdiff.diffusion.project import read_project
        from tests.helpers_compvis import ldm_state, small_project, write_files

        (folder / "project.yaml").write_text(yaml.safe_dump(small_project()))
        project = read_project(folder / "project.yaml")
        state = ldm_state(project.unet, project.first_stage, (24, 12))
        write_files(folder, small_project(), state | {"scale_factor": torch.tensor(0.7)})
        self.take(folder)

    def read(self, folder: Path, changed: set[str]) -> None:
        from pathsegdiff.diffusion.checkpoints import import_bundle

        out = folder / "out"
        try:
            import_bundle(
                ldm=folder / "last.ckpt",
                project=folder / "project.yaml",
                encoder=folder / "vit.pth",
                encoder_config=folder / "encoder.json",
                out=out,
            )
        finally:
            shutil.rmtree(out, ignore_errors=True)


class BundleTarget(Target):
    """A model bundle; its card says the sha256 of the other files."""

    def make(self, folder: Path) -> None:
        from pathsegdiff.diffusion.bundle import init_bundle

        init_bundle("micro", 0, folder / "micro")
        self.take(folder)

    def repair(self, files: Files, flags: int) -> Files:
        import hashlib

        with suppress(Exception):
            card = json.loads(files["micro/model.json"])
            for name in card["files"]:
                if flags & CHECKSUMS and f"micro/{name}" in files:
                    digest = hashlib.sha256(files[f"micro/{name}"])
                    card["files"][name] = digest.hexdigest()
            return {**files, "micro/model.json": json.dumps(card).encode()}
        return files

    def read(self, folder: Path, changed: set[str]) -> None:
        from pathsegdiff.diffusion.bundle import load_bundle

        bundle = load_bundle(folder / "micro")
        _ = bundle.card.sha256
        bundle.load()


class StoreTarget(Target):
    """Feature stores of two dtypes; tables, marks and metadata carry checksums."""

    names = ("half", "int8", "packed")

    def make(self, folder: Path) -> None:
        from pathsegdiff.features.layout import TapSpec
        from tests.helpers_store import TISSUE, build_store

        taps = (
            TapSpec(name="middle", channels=2, stride=32),
            TapSpec(name="up_08", channels=2, stride=8),
            TapSpec(name="up_09", channels=4, stride=4),
        )
        small = {"tap_specs": taps, "region_px": 64, "patch_px": 32, "train": 1, "test": 1}
        build_store(folder / "half", **small)
        build_store(folder / "int8", dtype="int8", scheme=TISSUE, **small)
        build_store(folder / "packed", dtype="float16-5bit", scheme=TISSUE, **small)
        self.take(folder)

    def edit_of(self, name: str) -> Edit:
        return change_shard if "/c/" in name else super().edit_of(name)

    def repair(self, files: Files, flags: int) -> Files:
        for name in self.names:
            with suppress(Exception):
                files = self._repair(name, files, flags)
        return files

    def _repair(self, store: str, files: Files, flags: int) -> Files:
        from pathsegdiff.config import content_hash

        out = dict(files)
        if flags & FINGERPRINT:
            with suppress(Exception):
                group = json.loads(out[f"{store}/zarr.json"])
                mine = group["attributes"]["pathsegdiff"]
                mine["fingerprint"] = content_hash(mine["recipe"])[:12]
                out[f"{store}/zarr.json"] = json.dumps(group).encode()
        if flags & CHECKSUMS:
            with suppress(Exception):
                table = _unsealed(out[f"{store}/samples.json"])
                for key in table["files"]:
                    if (content := out.get(f"{store}/{key}")) is not None:
                        table["files"][key] = [[len(content), zlib.crc32(content)]]
                out[f"{store}/samples.json"] = _sealed(table)
            for name in [name for name in out if name.startswith(f"{store}/marks/")]:
                with suppress(Exception):
                    mark = _unsealed(out[name])
                    for key in mark["files"]:
                        if (content := out.get(f"{store}/{key}")) is not None:
                            mark["files"][key] = [len(content), zlib.crc32(content)]
                    out[name] = _sealed(mark)
        if flags & SEALS:
            for name in out:
                own = name in (f"{store}/samples.json", f"{store}/backup.json")
                if own or name.startswith(f"{store}/marks/"):
                    _, _, rest = out[name].partition(b"\n")
                    out[name] = b'{"crc32": %d,\n' % zlib.crc32(rest) + rest
        return out

    def read(self, folder: Path, changed: set[str]) -> None:
        from pathsegdiff.errors import StoreError
        from pathsegdiff.features.store import FeatureStore
        from pathsegdiff.features.verify import verify_sample
        from pathsegdiff.features.writer import put_metadata_back

        for name in sorted({name.split("/")[0] for name in changed or self.base} & {*self.names}):
            with suppress(StoreError):
                put_metadata_back(folder / name)
            store = FeatureStore.open(folder / name)
            with suppress(StoreError):
                store.check_arrays()
            for sample in store.samples()[:1]:
                for level in store.head_levels:
                    with suppress(StoreError):
                        store.read_level(sample, level.name, taps=[level.taps[0].name])
                        store.read_level(sample, level.name, rows=slice(1, 2))
                for read in (store.label, store.image, store.embedding, store.instances):
                    with suppress(StoreError):
                        read(sample)
                with suppress(StoreError):
                    store.dense(sample)
                with suppress(StoreError):
                    store.bytes_of(sample)
            for sample in store.samples()[:3]:
                for finding in verify_sample(store, sample):
                    check_line(finding.problem)


def _unsealed(content: bytes) -> Any:
    values = json.loads(content)
    values.pop("crc32", None)
    return values


def _sealed(values: dict[str, Any]) -> bytes:
    rest = json.dumps(values, indent=0).lstrip("{").lstrip("\n").encode() + b"\n"
    return b'{"crc32": %d,\n' % zlib.crc32(rest) + rest


class RunTarget(Target):
    """The folder of a trained head, a finished and an unfinished one, and what was scored."""

    def make(self, folder: Path) -> None:
        from pathsegdiff.segmentation.evaluate import evaluate_run
        from pathsegdiff.segmentation.runs import load_run
        from tests.helpers_head import train_small
        from tests.helpers_store import build_store

        store = build_store(folder / "store", train=4, test=1)
        train_small(store, folder / "run", steps=2, head_width=4)
        self.metrics = ""
        with suppress(Exception):
            evaluate_run(load_run(folder / "run"), store, folder / "eval")
        shutil.rmtree(folder / "store")
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".json", ".safetensors"):
                path.unlink()
        self.take(folder)

    def repair(self, files: Files, flags: int) -> Files:
        from pathsegdiff.config import content_hash

        with suppress(Exception):
            config = json.loads(files["run/config.json"])
            if flags & FINGERPRINT:
                digest = content_hash(config["features"]["recipe"])[:12]
                config["features"]["fingerprint"] = digest
                return {**files, "run/config.json": json.dumps(config).encode()}
        return files

    def read(self, folder: Path, changed: set[str]) -> None:
        from pathsegdiff.evaluation.compare import compare, read_scored
        from pathsegdiff.segmentation.loop import finished_before
        from pathsegdiff.segmentation.runs import load_run

        if not changed or any(name.startswith("run/") for name in changed):
            finished_before(folder / "run")
            load_run(folder / "run")
        for file in (folder / "eval").rglob("metrics.json"):
            scored = read_scored(file)
            compare(scored, scored, draws=5)


class ArchiveTarget(Target):
    """Archives of every kind that is unpacked."""

    def make(self, folder: Path) -> None:
        import tarfile

        content = folder / "file.txt"
        content.write_text("abc")
        with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(content, "top/file.txt")
            archive.write(content, "top/b/other.txt")
        for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
            with tarfile.open(folder / name, mode) as tar:
                tar.add(content, "top/file.txt")
        content.unlink()
        self.take(folder)

    def read(self, folder: Path, changed: set[str]) -> None:
        from pathsegdiff.fetch.archives import unpack

        for name in sorted(changed or self.base):
            try:
                if (folder / name).exists():
                    unpack(folder / name, folder / "out", folder / "work")
            finally:
                for made in ("out", "work"):
                    shutil.rmtree(folder / made, ignore_errors=True)


TARGETS: dict[str, type[Target]] = {
    "manifest": ManifestTarget,
    "labels": LabelsTarget,
    "checkpoint": CheckpointTarget,
    "project": ProjectTarget,
    "import": ImportTarget,
    "bundle": BundleTarget,
    "store": StoreTarget,
    "run": RunTarget,
    "archive": ArchiveTarget,
}


# One input: a byte of flags, then the files that are not as they were


def pack(flags: int, files: dict[str, bytes | None]) -> bytes:
    """An input; a file that is None is not there."""
    out = [bytes([flags])]
    for name, content in files.items():
        key = name.encode()
        out.append(_ENTRY.pack(len(key), _GONE if content is None else len(content)) + key)
        out.append(content or b"")
    return b"".join(out)


def unpack_input(data: bytes) -> tuple[int, dict[str, bytes | None]]:
    """What ``pack`` made; of anything else as much as there is."""
    files: dict[str, bytes | None] = {}
    at = 1
    while at + _ENTRY.size <= len(data):
        length, size = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        name = data[at : at + length].decode("utf-8", "replace")
        at += length
        files[name] = None if size == _GONE else data[at : at + size]
        at += 0 if size == _GONE else size
    return (data[0] if data else _ALL), files


def change_input(data: bytes, target: Target, rng: random.Random) -> bytes:
    """Another input: one more change, or one less."""
    flags, files = unpack_input(data)
    files = {name: content for name, content in files.items() if name in target.base}
    if files and rng.random() < 0.1:
        del files[rng.choice(list(files))]
    elif rng.random() < 0.03:
        files[rng.choice(list(target.base))] = None
    else:
        again = files and rng.random() < 0.5
        name = rng.choice(list(files if again else target.base))
        content = files.get(name)
        content = target.base[name] if content is None else content
        edit = target.edit_of(name) if rng.random() < 0.9 else change_bytes
        try:
            files[name] = edit(content, rng)
        except Exception:
            files[name] = change_bytes(content, rng)  # it cannot be taken apart any more
    if rng.random() < 0.02:
        flags ^= 1 << rng.randrange(3)
    changed = pack(flags, files)
    return changed if len(changed) <= _MAX_INPUT else pack(flags, {})


class Folder:
    """A folder that is made to hold certain files again and again; only what differs is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._there: Files = {}

    def hold(self, files: Files) -> None:
        """Write, replace and remove files."""
        for name in [name for name in self._there if name not in files]:
            (self.path / name).unlink()
            del self._there[name]
        for name, content in files.items():
            if self._there.get(name) != content:
                file = self.path / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                self._there[name] = content


class Watch:
    """Notes what a reader must not do: start programs, open what lies elsewhere."""

    _programs = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn")

    def __init__(self, folder: Path) -> None:
        self.noticed: str | None = None
        self.active = False
        homes = (folder, REPOSITORY, sys.base_prefix, *sysconfig.get_paths().values(), *sys.path)
        known = [str(Path(path).resolve()) for path in homes]
        self._known = (*known, "/proc/", "/sys/", "/usr/", "/dev/null", "/etc/mime.types")
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or self.noticed is not None:
            return
        if event in self._programs or event == "socket.connect":
            self.noticed = f"{event} {arguments!r:.200}"
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self._known):
                self.noticed = f"open {path!r:.200}"


def check_line(message: str) -> None:
    """Raise AssertionError for what is no printable line."""
    assert message.strip() and message.isprintable(), f"no printable line: {message!r:.300}"
    assert len(message) <= LONGEST, f"{len(message)} characters: {message!r:.300}"


class Runner:
    """Gives inputs to the reader and judges what comes of it."""

    def __init__(self, target: Target, folder: Path, findings: Path) -> None:
        self.target, self.folder, self.findings = target, Folder(folder), findings
        self.watch = Watch(folder)
        self.results = self.errors = 0
        self.latest = ""

    def files_of(self, data: bytes) -> tuple[Files, set[str]]:
        """What lies on the disk for an input, and which files are not as they were."""
        flags, changes = unpack_input(data)
        files: dict[str, bytes | None] = dict(self.target.base)
        files.update((name, one) for name, one in changes.items() if name in self.target.base)
        there = {name: content for name, content in files.items() if content is not None}
        changed = {name for name in files if files[name] != self.target.base[name]}
        return self.target.repair(self.target.assemble(there), flags), changed

    def judge(self, data: bytes) -> tuple[str, str] | None:
        """(kind, traceback) of a finding, or None."""
        from pathsegdiff.errors import PathSegDiffError

        files, changed = self.files_of(data)
        self.folder.hold(files)
        self.watch.noticed, self.watch.active = None, True
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with warnings.catch_warnings(action="ignore"):
                self.target.read(self.folder.path, changed)
            self.results += 1
        except PathSegDiffError as error:
            self.errors, self.latest = self.errors + 1, str(error)
            try:
                check_line(str(error))
            except AssertionError as bad:
                return _kind(error, "line"), f"{bad}\n{traceback.format_exc()}"
        except (Exception, TooSlow) as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            return _kind(error, type(error).__name__), traceback.format_exc()[-20_000:]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.watch.active = False
        if self.watch.noticed is not None:
            return f"noticed {self.watch.noticed}", self.watch.noticed
        return None

    def one(self, data: bytes) -> None:
        """Judge an input and keep what was found, once for each place in the code."""
        found = self.judge(data)
        if found is not None:
            keep(self.findings, *found, data)


def keep(folder: Path, kind: str, text: str, data: bytes) -> None:
    """Save a finding, unless there is one of its kind."""
    name = f"{zlib.crc32(kind.encode()):08x}"
    if not (folder / f"{name}.txt").exists():
        (folder / f"{name}.input").write_bytes(data)
        (folder / f"{name}.txt").write_text(f"{kind}\n{text}", errors="backslashreplace")


def _kind(error: BaseException, what: str) -> str:
    """What was raised, and the last line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}pathsegdiff{os.sep}" in frame.filename]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "elsewhere"
    return f"{what} at {where}"


# Processes


def child(options: argparse.Namespace) -> None:
    """Run until the time is over, or until the memory or the patience of the parent is."""
    try:
        import atheris
    except ImportError:
        print("fuzz.py needs atheris: pip install atheris")
        sys.exit(_NO_START)
    start = bytes([_ALL])
    with atheris.instrument_imports(include=["pathsegdiff", "zipfile", "pickletools", "tomllib"]):
        runner = _runner(options)
        for _ in range(2):
            found = runner.judge(start)
    target = runner.target
    if options.replay:
        _replay(runner, Path(options.replay).read_bytes())
        return
    with Path(options.shared).open("r+b") as file:
        shared = mmap.mmap(file.fileno(), 0)
    before = list(_COUNTS.unpack_from(shared, 0))
    if found is not None or not runner.results:
        print(f"the valid files of {options.target} are refused: {found or runner.latest}")
        sys.exit(_NO_START)
    usual = _address_space()
    limit = usual + MEMORY + MEMORY // 2
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    count = 0

    def one(data: bytes) -> None:
        nonlocal count
        shared[_COUNTS.size : _COUNTS.size + len(data)] = data
        counts = (before[0] + count, before[1] + runner.errors, before[2] + runner.results)
        _COUNTS.pack_into(shared, 0, *counts, len(data))
        runner.one(data)
        count += 1
        if count % 100 == 0 and _address_space() > usual + MEMORY // 2:
            os._exit(_GROWN)

    def mutate(data: bytes, _size: int, seed: int) -> bytes:
        return change_input(data, target, random.Random(seed))

    arguments = [
        sys.argv[0], f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-timeout=600",
        f"-max_len={_MAX_INPUT}", "-rss_limit_mb=0", "-len_control=0", "-report_slow_units=600",
        f"-artifact_prefix={options.work}/", options.corpus,
    ]  # fmt: skip
    atheris.Setup(arguments, one, custom_mutator=mutate)
    atheris.Fuzz()


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _runner(options: argparse.Namespace) -> Runner:
    def too_slow(*_: Any) -> None:
        raise TooSlow(f"more than {SECONDS} s of processor time")

    signal.signal(signal.SIGPROF, too_slow)
    seeds, work = Path(options.work) / "seeds", Path(options.work) / "files"
    for folder in (seeds, work):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    target = TARGETS[options.target](seeds)
    shutil.rmtree(seeds)
    return Runner(target, work, Path(options.findings))


def _replay(runner: Runner, data: bytes) -> None:
    files, changed = runner.files_of(data)
    for name in sorted(changed):
        name = name.partition("#")[0]
        content = files.get(name)
        print(f"{name}: {'not there' if content is None else repr(content[:2000])}")
    found = runner.judge(data)
    print("\n".join(found) if found else "a result or one line: no finding")


def _children(options: argparse.Namespace, work: Path) -> Iterator[tuple[int, list[str]]]:
    """Start children until the time is over; what ended one before is a finding."""
    shared = work / "shared"
    shared.write_bytes(bytes(_COUNTS.size + _MAX_INPUT + 1024))
    with shared.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    end = time.monotonic() + 60 * options.minutes
    seed, log = options.seed, work / "log"
    while (left := end - time.monotonic()) > 5:
        command = [
            sys.executable, __file__, options.target, "--child", "--work", str(work), "--shared",
            str(shared), "--corpus", options.corpus, "--findings", options.findings,
            "--seed", str(seed), "--seconds", str(int(left)),
        ]  # fmt: skip
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=_environment())
        last, since = -1, time.monotonic()
        while process.poll() is None:
            time.sleep(1)
            count = _COUNTS.unpack_from(memory, 0)[0]
            if count != last:
                last, since = count, time.monotonic()
            elif time.monotonic() - since > _SILENCE + SECONDS:
                process.kill()
                process.wait()
        lines = log.read_text(errors="replace").splitlines()
        if process.returncode == _NO_START:
            sys.exit(lines[-1])
        if process.returncode not in (0, _GROWN) and time.monotonic() < end:
            data = memory[_COUNTS.size : _COUNTS.size + _COUNTS.unpack_from(memory, 0)[3]]
            kind = f"the process ended with {process.returncode} after {seed}"
            keep(Path(options.findings), kind, "\n".join(lines[-60:]), data)
        yield _COUNTS.unpack_from(memory, 0)[:3], lines
        seed += 1


def _environment() -> dict[str, str]:
    """One thread; the memory of a thread pool would count as the reader's."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PSD_MODELS": "."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", default="", help="keep the inputs that reach new code here")
    parser.add_argument("--findings", default="", help="default: fuzz-TARGET in this folder")
    parser.add_argument("--replay", metavar="FILE", help="one input of a finding, again")
    for name in ("--work", "--shared"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    options.findings = str(Path(options.findings or f"fuzz-{options.target}").resolve())
    Path(options.findings).mkdir(parents=True, exist_ok=True)
    memory_disk = Path("/dev/shm")
    base = memory_disk if os.access(memory_disk, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=base) as work:
        options.work = work
        if options.replay:
            child(options)
            return
        options.corpus = str(Path(options.corpus or Path(work) / "corpus").resolve())
        Path(options.corpus).mkdir(parents=True, exist_ok=True)
        began, counts, lines, starts = time.monotonic(), (0, 0, 0), [], 0
        for now, log in _children(options, Path(work)):
            counts, starts = now, starts + 1
            lines = [line for line in log if "cov: " in line] or lines
        seconds = time.monotonic() - began
        inputs = len(list(Path(options.corpus).iterdir()))
    found = sorted(Path(options.findings).glob("*.txt"))
    reached = re.search(r"cov: \d+ ft: \d+", lines[-1]) if lines else None
    print(
        f"{options.target}: {counts[0]:,} executions in {seconds / 60:.1f} min "
        f"({counts[0] / seconds:.0f}/s), {counts[2]:,} results, {counts[1]:,} errors of one line, "
        f"{starts} processes, {inputs} inputs kept, {reached[0] if reached else 'no coverage'}, "
        f"{len(found)} findings"
    )
    for file in found:
        print(f"  {file.with_suffix('.input')}: {file.read_text().splitlines()[0]}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
