"""Read the tensors of a PyTorch checkpoint without running anything that it holds.

A checkpoint is a pickle, and a pickle is a program: unpickling calls whatever it names. Here the
program is only looked at. ``pickletools`` (standard library) splits it into instructions, and a
small machine carries out those that build dictionaries, lists, tuples and plain values. A tensor
becomes a ``TensorRef`` (storage, offset, shape, stride), read from the file when asked for, so that
optimiser state and other leftovers cost nothing. Every other object becomes an ``Opaque``: a name,
without behaviour. No class or function that the file names is ever imported or called.

A file that asks to call what no honest checkpoint calls (``os.system``, ``eval``, ...) is refused
altogether, rather than read around: somebody tampered with it, so its weights are no better.

Both layouts of ``torch.save`` are read: the zip archive and the older stream of pickles.
"""

import os
import pickletools
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from pathsegdiff.errors import BundleError

#: Largest pickle that is looked at, and most instructions. A checkpoint with optimiser state and
#: averaged weights of the paper's model has a pickle of about 1 MB.
_MAX_PICKLE_BYTES = 64 << 20
_MAX_INSTRUCTIONS = 5_000_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}

#: Modules of which a checkpoint has no reason to name anything.
# fmt: off
_FORBIDDEN_MODULES = frozenset({
    "_io", "_osx_support", "_posixsubprocess", "_pyio", "_thread", "_winapi", "ast", "asyncio",
    "atexit", "bdb", "cProfile", "cffi", "code", "codeop", "commands", "concurrent", "ctypes",
    "_ctypes", "dill", "cloudpickle", "distutils", "doctest", "ensurepip", "faulthandler",
    "fcntl", "fileinput", "ftplib", "gc", "glob", "http", "idlelib", "imaplib", "imp",
    "importlib", "inspect", "io", "joblib", "linecache", "marshal", "mmap", "multiprocessing",
    "nntplib", "nt", "ntpath", "operator", "_operator", "os", "pdb", "pickle", "_pickle",
    "cPickle", "pip", "pkgutil", "platform", "poplib", "popen2", "posix", "posixpath",
    "profile", "pty", "py_compile", "pydoc", "requests", "resource", "runpy", "sched", "select",
    "setuptools", "shelve", "shlex", "shutil", "signal", "site", "smtplib", "socket",
    "socketserver", "sqlite3", "ssl", "subprocess", "sys", "tarfile", "telnetlib", "tempfile",
    "threading", "timeit", "trace", "traceback", "tracemalloc", "turtle", "urllib", "urllib2",
    "venv", "webbrowser", "winreg", "wsgiref", "xmlrpc", "zipapp", "zipfile", "zipimport",
})
# fmt: on
#: The types among the builtins; the functions (eval, exec, getattr, open, ...) are forbidden.
# fmt: off
_BUILTIN_TYPES = frozenset({
    "dict", "list", "set", "frozenset", "tuple", "int", "long", "float", "complex", "str",
    "unicode", "basestring", "bytes", "bytearray", "bool", "object", "slice", "range", "xrange",
    "type", "NoneType", "Ellipsis", "NotImplemented", "property", "staticmethod", "classmethod",
    "super",
})
# fmt: on
#: Functions and lower-case classes that honest checkpoints call; all of them are skipped.
# fmt: off
_SKIPPED_CALLS = frozenset({
    "copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__", "_codecs.encode",
    "collections.defaultdict", "collections.deque", "functools.partial", "datetime.datetime",
    "datetime.date", "datetime.time", "datetime.timedelta", "datetime.timezone", "numpy.dtype",
    "numpy.ndarray", "torch.device", "torch.dtype", "torch.finfo",
    "torch.serialization._get_layout", "torch.storage._load_from_bytes",
    "torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_wrapper_subclass",
})
# fmt: on
#: numpy's own unpickling helpers, wherever the version keeps them.
# fmt: off
_NUMPY_HELPERS = frozenset({
    "scalar", "_reconstruct", "_frombuffer", "__randomstate_ctor", "__bit_generator_ctor",
    "__generator_ctor",
})
# fmt: on
_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = frozenset(
    {
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
    }
)
#: What reading an entry of a damaged archive can raise; RuntimeError is an encrypted one.
_UNREADABLE = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError)
#: What a broken pickle can raise while it is carried out.
_BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError)
_REBUILD_PARAMETER = frozenset(
    {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
)


class _DamagedError(Exception):
    """The pickle cannot be what it claims; the message says why."""


class _HostileError(Exception):
    """The pickle asks for something that no checkpoint needs; the message is its name."""


class Opaque:
    """Stands for an object that was skipped. It has a name and no behaviour."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<skipped {self.name:.80}>"


class _Global(Opaque):
    """A class or function that the pickle names; never looked up."""


@dataclass(frozen=True)
class StorageRef:
    """A block of numbers in the file."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor in the file, as a view of a storage (offset and stride in elements)."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of an element."""
        return self.storage.dtype

    @property
    def numel(self) -> int:
        """Elements, by the shape."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class Checkpoint:
    """An open checkpoint; use as a context manager.

    Attributes:
        path: The file.
        root: What was saved, usually a dictionary; tensors are ``TensorRef``.
    """

    def __init__(self, path: Path, stream: IO[bytes], root: Any, storages: "_Storages") -> None:
        self.path = path
        self.root = root
        self._stream = stream
        self._storages = storages
        self._last: tuple[str, Tensor] | None = None

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._last = None
        self._stream.close()

    def read(self, name: str, ref: TensorRef) -> Tensor:
        """Read one tensor into memory of its own.

        Args:
            name: For the message.
            ref: From ``root``.

        Raises:
            BundleError: If the tensor does not lie within its storage, or the file is damaged.
        """
        last = ref.offset + sum(
            (size - 1) * step for size, step in zip(ref.shape, ref.stride, strict=True)
        )
        storage = ref.storage
        # More elements than the storage has would be an expanded view: no weight is one, and its
        # copy could be of any size.
        if ref.numel > storage.numel or (ref.numel and last >= storage.numel):
            raise BundleError(
                f"{self.path}: {name} claims {ref.numel} elements of a storage of {storage.numel}"
            )
        if self._last is None or self._last[0] != storage.key:
            self._last = None  # free it before the next one is read
            try:
                self._last = storage.key, self._storages.read(storage)
            except (_DamagedError, *_UNREADABLE) as error:
                raise BundleError(f"{self.path}: {name} cannot be read: {error}") from None
        try:
            view = torch.as_strided(self._last[1], ref.shape, ref.stride, ref.offset)
            whole = ref.numel == storage.numel and view.is_contiguous()
            return view if whole else view.clone(memory_format=torch.contiguous_format)
        except RuntimeError:  # of an empty tensor, whose other sides can be anything
            raise BundleError(f"{self.path}: {name} has an impossible shape") from None


class _Storages:
    """Where the numbers of a checkpoint lie."""

    def check(self, storage: StorageRef) -> None:
        """Raises: _DamagedError: If the file holds another number of bytes."""
        raise NotImplementedError

    def read(self, storage: StorageRef) -> Tensor:
        """(numel,) in the dtype of the storage."""
        raise NotImplementedError


def open_checkpoint(path: Path) -> Checkpoint:
    """Open what ``torch.save`` wrote, without running any of it.

    Raises:
        BundleError: One line saying what the file is instead: missing, empty, a git-LFS pointer, an
            HTML page, truncated, another format, or a pickle that asks to run something.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise BundleError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise BundleError(f"{path} is a folder; give the checkpoint file in it") from None
    try:
        start = stream.read(1024)
        _refuse_other_files(path, start)
        if start.startswith(b"PK\x03\x04"):
            root, storages = _read_zip(path, stream)
        else:
            root, storages = _read_legacy(path, stream, start)
        return Checkpoint(path, stream, root, storages)
    except _HostileError as error:
        stream.close()
        raise BundleError(
            f"{path} asks to run {error} when it is loaded, which no checkpoint needs; refused, "
            "nothing was run. Get the file from its authors again"
        ) from None
    except _DamagedError as error:
        stream.close()
        raise BundleError(f"{path} is damaged or truncated: {error}; download it again") from None
    except BaseException:
        stream.close()
        raise


def _refuse_other_files(path: Path, start: bytes) -> None:
    if not start:
        raise BundleError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        size = next((line[5:] for line in start.split(b"\n") if line.startswith(b"size ")), b"?")
        raise BundleError(
            f"{path} is a git-LFS pointer ({path.stat().st_size} bytes), not the file itself "
            f"({size.decode('ascii', 'replace')} bytes); fetch it with `git lfs pull`"
        )
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise BundleError(
            f"{path} is a web page (HTML), not a checkpoint; the download ended at a login or "
            "confirmation page: download it in a browser"
        )


def _read_zip(path: Path, stream: IO[bytes]) -> tuple[Any, _Storages]:
    try:
        archive = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise _DamagedError("the index at the end of the archive is missing") from None
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BundleError(f"{path} is a zip archive, but not one that torch.save wrote")
    prefix = pickles[0][: -len("data.pkl")]
    if f"{prefix}constants.pkl" in entries:
        raise BundleError(f"{path} is a TorchScript program, not a checkpoint")
    storages = _ZipStorages(archive, entries, prefix)
    order = storages.read_record("byteorder", 16) if f"{prefix}byteorder" in entries else b"little"
    if order != sys.byteorder.encode():
        raise BundleError(f"{path} was saved on a machine of another byte order")
    machine = _Machine(storages.check)
    data = storages.read_record("data.pkl", _MAX_PICKLE_BYTES)
    return machine.run(_Bounded(_BytesReader(data), len(data))), storages


class _ZipStorages(_Storages):
    def __init__(
        self, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], prefix: str
    ) -> None:
        self._archive = archive
        self._entries = entries
        self._prefix = prefix

    def check(self, storage: StorageRef) -> None:
        info = self._info(f"data/{storage.key}")
        expected = storage.numel * storage.dtype.itemsize
        if info.file_size != expected:
            raise _DamagedError(
                f"storage {storage.key} claims {expected} bytes, the archive holds {info.file_size}"
            )

    def read(self, storage: StorageRef) -> Tensor:
        self.check(storage)
        buffer = bytearray(storage.numel * storage.dtype.itemsize)
        if not buffer:
            return torch.empty(0, dtype=storage.dtype)
        with self._archive.open(self._info(f"data/{storage.key}")) as member:
            # readinto of a zip member goes through small buffers; 16 MB pieces keep it fast
            view, done = memoryview(buffer), 0
            while done < len(buffer):
                piece = member.read(min(16 << 20, len(buffer) - done))
                if not piece:
                    raise _DamagedError("it ends early")
                view[done : done + len(piece)] = piece
                done += len(piece)
            member.read(1)  # reaching the end makes zipfile compare the checksum
        return torch.frombuffer(buffer, dtype=storage.dtype)

    def read_record(self, name: str, largest: int) -> bytes:
        info = self._info(name)
        if info.file_size > largest:
            raise _DamagedError(f"{name} has {info.file_size} bytes, more than any checkpoint's")
        try:
            return self._archive.read(info)
        except _UNREADABLE as error:
            raise _DamagedError(f"{name} cannot be read ({error})") from None

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = self._entries.get(f"{self._prefix}{name}")
        if info is None:
            raise _DamagedError(f"the archive has no {name}")
        # torch never compresses; a compressed entry could unpack to any size
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > info.compress_size:
            raise _DamagedError(f"{name} is compressed, which torch.save never does")
        return info


def _read_legacy(path: Path, stream: IO[bytes], start: bytes) -> tuple[Any, _Storages]:
    stream.seek(0)
    size = os.fstat(stream.fileno()).st_size
    bounded = _Bounded(stream, size)
    storages = _LegacyStorages(stream)
    try:
        magic = _Machine(storages.check).run(bounded) if start[:1] == b"\x80" else None
    except _DamagedError:
        magic = None
    if magic != _LEGACY_MAGIC:
        raise BundleError(
            f"{path} is not a PyTorch checkpoint (it starts with {start[:8]!r}); "
            "give the .ckpt or .pth file itself"
        )
    version = _Machine(storages.check).run(bounded)
    if version != 1001:
        raise _DamagedError(f"its format version is {_shown(version)}, not 1001")
    info = _Machine(storages.check).run(bounded)
    if isinstance(info, dict) and info.get("little_endian") is not (sys.byteorder == "little"):
        raise BundleError(f"{path} was saved on a machine of another byte order")
    root = _Machine(storages.note).run(bounded)
    keys = _Machine(storages.check).run(bounded)
    storages.locate(keys, size)
    return root, storages


class _LegacyStorages(_Storages):
    """Storages follow the pickles: in the order of a list of keys, a count and the numbers."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._claimed: dict[str, StorageRef] = {}
        self._positions: dict[str, int] = {}

    def note(self, storage: StorageRef) -> None:
        known = self._claimed.setdefault(storage.key, storage)
        if known != storage:
            raise _DamagedError(f"storage {storage.key} is described in two ways")

    def locate(self, keys: Any, size: int) -> None:
        if not isinstance(keys, list):
            raise _DamagedError("the list of its storages is missing")
        for key in keys:
            storage = self._claimed.get(key) if isinstance(key, str) else None
            count = self._stream.read(8)
            if storage is None or len(count) != 8:
                raise _DamagedError("it ends early" if storage else "an unknown storage is listed")
            position = self._stream.tell()
            end = position + storage.numel * storage.dtype.itemsize
            if int.from_bytes(count, "little", signed=True) != storage.numel or end > size:
                raise _DamagedError(
                    f"storage {key} claims {storage.numel} elements, more than the file holds"
                )
            self._positions[key] = position
            self._stream.seek(end)

    def check(self, storage: StorageRef) -> None:
        raise _DamagedError("a storage stands where none can be")

    def read(self, storage: StorageRef) -> Tensor:
        if storage.key not in self._positions:
            raise _DamagedError(f"the file has no storage {storage.key}")
        buffer = bytearray(storage.numel * storage.dtype.itemsize)
        if not buffer:
            return torch.empty(0, dtype=storage.dtype)
        self._stream.seek(self._positions[storage.key])
        if self._stream.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise _DamagedError("it ends early")
        return torch.frombuffer(buffer, dtype=storage.dtype)


class _BytesReader:
    """Reads bytes that are in memory; slicing never makes more than there is."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        end = len(self._data) if count < 0 else self._at + count
        piece = self._data[self._at : end]
        self._at += len(piece)
        return piece

    def readline(self, limit: int) -> bytes:
        end = self._data.find(b"\n", self._at, self._at + limit)
        return self.read((end + 1 if end >= 0 else self._at + limit) - self._at)


class _Bounded:
    """What ``pickletools`` reads from: never asked for more bytes than the file has."""

    def __init__(self, stream: Any, size: int) -> None:
        self._stream, self._size = stream, size

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= min(self._size - self._stream.tell(), _MAX_PICKLE_BYTES):
            raise _DamagedError("it ends early")
        return self._stream.read(count)

    def readline(self) -> bytes:
        return self._stream.readline(1 << 16)


class _Machine:
    """Carries out the harmless instructions of one pickle."""

    def __init__(self, check_storage: Callable[[StorageRef], None]) -> None:
        self._check_storage = check_storage
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: _Bounded) -> Any:
        """The value that the pickle builds.

        Raises:
            _DamagedError: If it is no whole pickle.
            _HostileError: If it asks to call what no checkpoint calls.
        """
        try:
            with warnings.catch_warnings():
                # pickletools warns of odd escapes in texts, which a damaged file is full of
                warnings.simplefilter("ignore", DeprecationWarning)
                return self._run(stream)
        except _BROKEN as error:
            raise _DamagedError(f"its pickle is broken ({type(error).__name__})") from None

    def _run(self, stream: _Bounded) -> Any:
        for name, argument in _instructions(stream):
            if name == "STOP":
                return self._stack.pop()
            if name in _VALUES:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name not in _IGNORED:
                handler = getattr(self, f"_op_{name.lower()}", None)
                if handler is None:
                    raise _DamagedError(f"its pickle has the instruction {name}")
                handler(argument)
        raise _DamagedError("its pickle does not end")

    # Stack and memo

    def _op_mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _op_pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _op_pop_mark(self, _: Any) -> None:
        self._pop_mark()

    def _op_dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _op_put(self, index: Any) -> None:
        self._memo[int(index)] = self._stack[-1]

    _op_binput = _op_long_binput = _op_put

    def _op_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _op_get(self, index: Any) -> None:
        self._stack.append(self._memo[int(index)])

    _op_binget = _op_long_binget = _op_get

    # Containers

    def _op_tuple(self, _: Any) -> None:
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def _op_tuple1(self, _: Any) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _op_tuple2(self, _: Any) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _op_tuple3(self, _: Any) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _op_list(self, _: Any) -> None:
        items = self._pop_mark()
        self._stack.append(items)

    def _op_dict(self, _: Any) -> None:
        items = self._pop_mark()
        self._stack.append({})
        self._set_items(items)

    def _op_append(self, _: Any) -> None:
        item = self._stack.pop()
        self._extend([item])

    def _op_appends(self, _: Any) -> None:
        items = self._pop_mark()
        self._extend(items)

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise _DamagedError("its pickle appends to what is no list")

    def _op_setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _op_setitems(self, _: Any) -> None:
        items = self._pop_mark()
        self._set_items(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Opaque):
            return
        if not isinstance(target, dict):
            raise _DamagedError("its pickle sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # other keys are no names of tensors, and hashing a nested one could take for ever
            if isinstance(key, str | int | float | bytes):
                target[key] = value

    def _op_additems(self, _: Any) -> None:
        self._pop_mark()

    def _op_frozenset(self, _: Any) -> None:
        self._pop_mark()
        self._stack.append(Opaque("builtins.frozenset"))

    # Objects

    def _op_global(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(_check_global(module, name))

    def _op_stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _DamagedError("its pickle names a class by what is no text")
        self._stack.append(_check_global(module, name))

    def _op_binpersid(self, _: Any) -> None:
        self._stack.append(self._storage(self._stack.pop()))

    def _storage(self, identifier: Any) -> StorageRef | Opaque:
        if isinstance(identifier, tuple) and identifier[:1] in (("module",), (b"module",)):
            return Opaque("the source text of a class")  # the old layout carries it along
        if (
            not isinstance(identifier, tuple)
            or len(identifier) < 5
            or identifier[0] not in ("storage", b"storage")
            or not isinstance(identifier[1], _Global)
        ):
            raise _DamagedError("its pickle refers to what is no storage")
        _, kind, key, _, numel = identifier[:5]
        if len(identifier) > 5 and identifier[5] is not None:
            raise _DamagedError("it has storages within storages, as only torch 0.x wrote them")
        dtype = _STORAGE_DTYPES.get(kind.name.rpartition(".")[2])
        if dtype is None:
            raise _DamagedError(f"it has a storage of the unknown kind {kind.name!r:.60}")
        if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 48:
            raise _DamagedError(f"it has a storage of {_shown(numel)} elements")
        storage = StorageRef(key, dtype, numel)
        self._check_storage(storage)
        return storage

    def _op_reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def _op_inst(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        arguments = tuple(self._pop_mark())
        self._stack.append(self._call(_check_global(module, name), arguments))

    def _op_obj(self, _: Any) -> None:
        items = self._pop_mark()
        self._stack.append(self._call(items[0], tuple(items[1:])))

    def _op_newobj(self, _: Any) -> None:
        self._stack.pop()
        self._stack.append(self._instance(self._stack.pop()))

    def _op_newobj_ex(self, _: Any) -> None:
        self._stack.pop()
        self._op_newobj(None)

    def _instance(self, kind: Any) -> Any:
        if not isinstance(kind, _Global):
            raise _DamagedError("its pickle makes an object of what is no class")
        return {} if kind.name == _ORDERED_DICT else Opaque(kind.name)

    def _op_build(self, _: Any) -> None:
        self._stack.pop()  # the state of an object that was skipped, or attributes of a dictionary
        if not isinstance(self._stack[-1], Opaque | dict | TensorRef):
            raise _DamagedError("its pickle sets the state of what is no object")

    def _call(self, function: Any, arguments: Any) -> Any:
        """What a call would give; only the calls that make tensors and dictionaries give one."""
        if not isinstance(function, _Global):
            # e.g. the result of a call that was skipped: only an attack chains calls
            raise _HostileError(_shown(function))
        if not isinstance(arguments, tuple):
            raise _DamagedError("its pickle calls something without arguments")
        if function.name in _REBUILD_TENSOR:
            return _tensor(function.name, arguments)
        if function.name in _REBUILD_PARAMETER:
            return arguments[0]
        if function.name == "torch._tensor._rebuild_from_type_v2":
            return self._call(arguments[0], arguments[2])
        if function.name == _ORDERED_DICT:
            pairs = arguments[0] if arguments else []
            if not isinstance(pairs, list):
                return Opaque(function.name)
            return {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str)}
        if not _is_skipped_call(function.name):
            raise _HostileError(function.name)
        return Opaque(function.name)


#: Instructions that push their argument.
# fmt: off
_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "FLOAT", "BINFLOAT",
})
# fmt: on
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Opaque("builtins.set"),
}
_IGNORED = frozenset({"PROTO", "FRAME"})


def _shown(value: Any) -> str:
    """A value for a message; of what could be nested or of any length only its kind."""
    if isinstance(value, Opaque):
        return value.name
    if isinstance(value, str | bytes):
        return repr(value[:40])
    if isinstance(value, float | None) or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    return f"<{type(value).__name__}>"


def _instructions(stream: _Bounded) -> Iterator[tuple[str, Any]]:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
        if count >= _MAX_INSTRUCTIONS:
            raise _DamagedError("its pickle is longer than any checkpoint's")
        yield opcode.name, argument


def _check_global(module: str, name: str) -> _Global:
    """Name a class or function, unless naming it is already suspicious.

    Raises:
        _HostileError: If it is.
    """
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    full = f"{module}.{name}"
    parts = name.split(".")
    # "torch" + "os.system" reaches os through an attribute: look at those parts too
    if module.split(".")[0] in _FORBIDDEN_MODULES or any(
        part in _FORBIDDEN_MODULES for part in parts[:-1]
    ):
        raise _HostileError(full)
    exception = name[:1].isupper() and name.isidentifier()
    if module == "builtins" and name not in _BUILTIN_TYPES and not exception:
        raise _HostileError(full)
    if module == "types" and name != "SimpleNamespace":  # e.g. FunctionType, CodeType
        raise _HostileError(full)
    return _Global(full)


def _is_skipped_call(name: str) -> bool:
    """Whether calling ``name`` is what honest checkpoints do: a class, or a known helper.

    Classes are told from functions by their capital, as the names of the file are never looked up.
    """
    module, _, last = name.rpartition(".")
    if name in _SKIPPED_CALLS:
        return True
    if module == "builtins":
        return last in _BUILTIN_TYPES
    if module.split(".")[0] == "numpy":
        return last in _NUMPY_HELPERS or last[:1].isupper()
    return last.lstrip("_")[:1].isupper()


def _tensor(function: str, arguments: tuple[Any, ...]) -> TensorRef | Opaque:
    storage, offset, shape, stride = arguments[:4]
    whole = all(
        isinstance(values, tuple)
        and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
        for values in (shape, stride)
    )
    if (
        not isinstance(storage, StorageRef)
        or not whole
        or len(shape) != len(stride)
        or len(shape) > 16
        or type(offset) is not int
        or not 0 <= offset < 1 << 48
    ):
        raise _DamagedError("it has a tensor of impossible shape")
    if function.endswith("_v3"):
        # the storage is untyped bytes and the element type is the seventh argument
        return Opaque("a tensor of an unsigned or 8-bit floating-point type")
    return TensorRef(storage, offset, shape, stride)
