"""Arrays out of pickles that strangers made, without running anything of theirs.

Model files and mesh hierarchies of the field are pickles. Here a pickle may name only what numpy, scipy.sparse and
chumpy write for arrays, and even those names stand for small records of this module: no foreign class or function is
looked up, imported or called. The records are turned into arrays afterwards, with their sizes checked.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

MAX_BYTES = 1 << 30  # of a file, and of each member of a .npz
PLAIN_KINDS = "biufSU"  # dtypes whose bytes are plain values


def read_pickle(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The object in a pickle file: dicts, lists, tuples, strings, numbers, numpy arrays, scipy sparse matrices.

    Arrays of chumpy become the numpy arrays that they hold. Sparse matrices become `scipy.sparse.csc_matrix` and the
    like with their indices checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file larger than `max_bytes`, a broken pickle, or one that names anything else; it tells what.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes; at most {max_bytes} are read")
    return loads(path.read_bytes(), str(path))


def read_object_npz(
    path: Path, keys: Iterable[str], max_bytes: int = MAX_BYTES, optional: Iterable[str] = ()
) -> dict[str, Any]:
    """Chosen arrays of a `.npz` file; arrays of objects are read as `read_pickle` does. Other keys are not touched.

    Args:
        path: the file.
        keys: of arrays that must be there.
        max_bytes: of each array.
        optional: keys of arrays that are read where they are there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file or a damaged one, a key that is missing, a member larger than `max_bytes`, or a
            refused pickle.
    """
    result: dict[str, Any] = {}
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a .npz file: {error}") from None
    with archive:
        members = {member.filename: member for member in archive.infolist()}
        required = list(keys)
        for key in required:
            if f"{key}.npy" not in members:
                raise ValueError(f"{path} has no array {key!r}; it has {reprlib.repr(list(members))}")
        for key in [*required, *(key for key in optional if f"{key}.npy" in members)]:
            member = members[f"{key}.npy"]
            if member.file_size > max_bytes:
                raise ValueError(f"{path}: {key!r} has {member.file_size} bytes; at most {max_bytes} are read")
            try:
                content = archive.read(member)
            except Exception as error:  # each compression has errors of its own for damaged data
                raise ValueError(f"{path}: {key!r} cannot be read: {type(error).__name__}: {error}") from None
            result[key] = _read_npy(content, f"{path}: {key!r}")
    return result


def _read_npy(content: bytes, source: str) -> Any:
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"format {version}")
        shape, _, dtype = header
        if not dtype.hasobject:
            expected, found = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
            if expected != found:  # before memory is taken for what the header claims
                raise ValueError(f"{list(shape)} of {dtype} are {expected} bytes, it has {found}")
            return np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # a broken header can raise nearly anything
        raise ValueError(f"{source} is not a .npy array: {error}") from None
    return loads(stream.read(), source)


def loads(content: bytes, source: str = "pickle") -> Any:
    """`read_pickle` of bytes; `source` is named in errors."""
    try:
        value = _Restricted(io.BytesIO(content), encoding="latin1").load()
        return _Converter().convert(value)
    except Exception as error:  # a broken pickle can raise nearly anything
        raise ValueError(f"{source} was refused: {type(error).__name__}: {error}") from None


class _Function:
    """A function that a pickle may call but not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function cannot be given a state")


class _Record:
    """What a pickle says about an object: arguments and state, both plain data."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> _Record:  # not __init__, which some pickles do not call
        record = super().__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Record):
    pass


class _Buffer(_Record):
    """An array as protocol 5 writes it: bytes, dtype, shape, order, and with order K that of the axes."""


class _Scalar(_Record):
    pass


class _Dtype(_Record):
    pass


class _Sparse(_Record):
    kind = ""


class _Csc(_Sparse):
    kind = "csc"


class _Csr(_Sparse):
    kind = "csr"


class _Coo(_Sparse):
    kind = "coo"


class _Chumpy(_Record):
    """A chumpy array: `Ch` keeps its values as `x`, `Select` a choice of the values of another one."""


class _Object:
    """Stands for `object` in the constructor calls of old pickles."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a bare object cannot be given a state")


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError("only plain arrays are reconstructed")
    return _Array()


def _reconstructor(kind: Any, *_: Any) -> _Record:
    if not (isinstance(kind, type) and issubclass(kind, _Record)):
        raise pickle.UnpicklingError("only arrays are constructed")
    return kind()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("only latin1 text is encoded")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    if arguments:
        raise pickle.UnpicklingError("bytes are not constructed")
    return b""


_NUMPY = {
    "_reconstruct": _Function(_reconstruct),
    "scalar": _Scalar,
    "ndarray": _Array,
    "dtype": _Dtype,
}
_SPARSE = {"csc_matrix": _Csc, "csr_matrix": _Csr, "coo_matrix": _Coo}
_PLAIN = {
    ("copy_reg", "_reconstructor"): _Function(_reconstructor),
    ("copyreg", "_reconstructor"): _Function(_reconstructor),
    ("_codecs", "encode"): _Function(_encode),
    ("__builtin__", "bytes"): _Function(_no_bytes),  # how old protocols write b""
    ("__builtin__", "object"): _Object,
    ("builtins", "object"): _Object,
}
_NUMPY_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC_MODULES = ("numpy.core.numeric", "numpy._core.numeric")


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY_MODULES and name in _NUMPY:
            return _NUMPY[name]
        if module in _NUMERIC_MODULES and name == "_frombuffer":
            return _Buffer
        if module.startswith("scipy.sparse") and name in _SPARSE:
            return _SPARSE[name]
        if module.split(".")[0] == "chumpy":
            return type(name, (_Chumpy,), {})
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")


class _Converter:
    """Records to arrays, each object once however often it is referred to."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[Any, Any]] = {}  # the first keeps the object, and so its id, alive

    def convert(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = (value, None)  # a cycle ends here
            self.done[id(value)] = (value, self.build(value))
        return self.done[id(value)][1]

    def build(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self.convert(key): self.convert(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.convert(item) for item in value)
        if isinstance(value, _Array):
            return self.array(value)
        if isinstance(value, _Buffer):
            return self.buffer(value)
        if isinstance(value, _Scalar):
            dtype = self.dtype(value.arguments[0])
            return np.frombuffer(_as_bytes(value.arguments[1]), dtype, 1)[0]
        if isinstance(value, _Sparse):
            return self.sparse(value)
        if isinstance(value, _Chumpy):
            return self.chumpy(value)
        if isinstance(value, _Dtype):
            return self.dtype(value)
        raise ValueError(f"{type(value).__name__} is no array")

    def dtype(self, record: Any) -> np.dtype:
        if not isinstance(record, _Dtype) or not record.arguments or not isinstance(record.arguments[0], str):
            raise ValueError("an array without a dtype")
        dtype = np.dtype(record.arguments[0])
        order = record.state[1] if isinstance(record.state, tuple) and len(record.state) > 1 else "="
        if order == ">":
            dtype = dtype.newbyteorder(">")
        if dtype.kind not in PLAIN_KINDS + "O" or dtype.names is not None:
            raise ValueError(f"dtype {dtype} is not read")
        return dtype

    def array(self, record: _Array) -> Any:
        if not isinstance(record.state, tuple) or len(record.state) != 5:
            raise ValueError("an array without values")
        _, shape, dtype_record, fortran, content = record.state
        dtype = self.dtype(dtype_record)
        _check_shape(shape)
        if dtype.kind == "O":
            if not isinstance(content, list) or len(content) != int(np.prod(shape, dtype=object)):
                raise ValueError("an array of objects without its objects")
            result = np.empty(len(content), object)
            for index, item in enumerate(content):
                result[index] = self.convert(item)
        else:
            result = _values(content, dtype)
        return result.reshape(shape, order="F" if fortran else "C")

    def buffer(self, record: _Buffer) -> np.ndarray:
        if len(record.arguments) not in (4, 5):
            raise ValueError("an array without values")
        content, dtype_record, shape, order, *axes = record.arguments
        dtype = self.dtype(dtype_record)
        _check_shape(shape)
        if dtype.kind == "O":
            raise ValueError("objects are not bytes")
        values = _values(content, dtype)
        if order in ("C", "F"):
            return values.reshape(shape, order=order)
        if order != "K" or not axes or not isinstance(axes[0], tuple):
            raise ValueError(f"an array in order {order!r}")
        return values.reshape(shape).transpose(axes[0])

    def sparse(self, record: _Sparse) -> Any:
        state = {key: self.convert(item) for key, item in dict(record.state).items()}
        if not isinstance(state.get("_shape", state.get("shape")), tuple):
            raise ValueError("a sparse matrix without a shape")
        shape = tuple(int(n) for n in state.get("_shape", state.get("shape")) or ())
        if record.kind == "coo":
            row, column = state["coords"] if "coords" in state else (state["row"], state["col"])
            matrix = sp.coo_matrix((state["data"], (row, column)), shape=shape)
            return matrix.tocsc()
        kind = sp.csc_matrix if record.kind == "csc" else sp.csr_matrix
        matrix = kind((state["data"], state["indices"], state["indptr"]), shape=shape)
        matrix.check_format(full_check=True)
        return matrix

    def chumpy(self, record: _Chumpy) -> Any:
        state = dict(record.state or {})
        if "x" in state:
            return np.asarray(self.convert(state["x"]))
        if "a" in state and "idxs" in state:
            chosen = np.asarray(self.convert(state["a"])).ravel()[np.asarray(self.convert(state["idxs"])).ravel()]
            shape = self.convert(state.get("preferred_shape"))
            return chosen if shape is None else chosen.reshape(tuple(int(n) for n in shape))
        raise ValueError(f"chumpy's {type(record).__name__} is computed, not stored: save the file with plain arrays")


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"an array of shape {shape}")


def _values(content: Any, dtype: np.dtype) -> np.ndarray:
    raw = _as_bytes(content)
    return np.frombuffer(raw, dtype).copy() if raw else np.empty(0, dtype)


def _as_bytes(content: Any) -> bytes:
    if isinstance(content, str):
        return content.encode("latin1")
    if isinstance(content, (bytes, bytearray)):
        return bytes(content)
    raise ValueError("an array without bytes")
