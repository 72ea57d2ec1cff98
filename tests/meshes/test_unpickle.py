"""Restricted unpickling: arrays come out, everything else is refused before it can run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import scipy.sparse as sp

from fastmetro.meshes.unpickle import loads, read_object_npz, read_pickle


@pytest.fixture
def chumpy(monkeypatch):
    """Modules named as chumpy's, so that pickles come out as chumpy writes them."""
    root, ch, reordering = (types.ModuleType(name) for name in ("chumpy", "chumpy.ch", "chumpy.reordering"))

    class Ch:
        def __init__(self, **values) -> None:
            self.__dict__.update(values)

    class Select(Ch):
        pass

    for kind, module in ((Ch, ch), (Select, reordering)):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    for module in (root, ch, reordering):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return types.SimpleNamespace(Ch=Ch, Select=Select)


ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.array([[True], [False]]),
    np.zeros((0, 3)),
    np.arange(5, dtype=">i4"),
    np.array(["neutral", "male"]),
    np.array(2.5),
    np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_arrays_survive(protocol) -> None:
    for array in ARRAYS:
        result = loads(pickle.dumps({"a": array, "b": [array, (array, None, 3, "text")]}, protocol))
        assert isinstance(result["a"], np.ndarray) and result["a"].dtype == array.dtype
        assert np.array_equal(result["a"], array)
        assert result["b"][0] is result["a"] and result["b"][1][1:] == (None, 3, "text")
    assert loads(pickle.dumps(np.float64(1.5), protocol)) == 1.5


@pytest.mark.parametrize("kind", [sp.csc_matrix, sp.csr_matrix, sp.coo_matrix])
def test_sparse_matrices_survive(kind) -> None:
    matrix = sp.random(20, 30, 0.1, random_state=0)
    result = loads(pickle.dumps(kind(matrix)))
    assert sp.issparse(result) and result.shape == (20, 30)
    assert np.array_equal(result.toarray(), matrix.toarray())


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_chumpy_arrays_become_numpy(chumpy, protocol) -> None:
    values = np.arange(24.0).reshape(2, 3, 4)
    plain = chumpy.Ch(x=values, _dirty_vars=set() if protocol > 3 else None)
    chosen = chumpy.Select(a=plain, idxs=np.arange(4, 10), preferred_shape=(2, 3))
    content = pickle.dumps({"plain": plain, "chosen": chosen}, protocol)
    if protocol <= 3:  # sets are no arrays: refused below
        result = loads(content)
        assert np.array_equal(result["plain"], values)
        assert np.array_equal(result["chosen"], values.ravel()[4:10].reshape(2, 3))
    with pytest.raises(ValueError, match="Ch is computed, not stored"):
        loads(pickle.dumps(chumpy.Ch(a=1, b=2), 2))


class Evil:
    """Pickles to a call of any function."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, print, getattr, __import__, np.load, np.frombuffer, sp.eye, pickle.loads]
)
def test_calls_are_refused(function, protocol, tmp_path) -> None:
    marker = tmp_path / "ran"
    content = pickle.dumps({"v_template": Evil(function, f"touch {marker}")}, protocol)
    with pytest.raises(ValueError, match=r"refused.*which is no array"):
        loads(content)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # by name
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cchumpy\n__builtins__\n(S'1'\ntR.",  # a name of the permitted module is a record, not the thing itself
        b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        b"cnumpy\ndtype.__init__.__globals__\n.",
        b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR.",
        b"ccopy_reg\n_reconstructor\n(c__builtin__\nobject\nc__builtin__\nobject\nNtR.",
        b"c_codecs\nencode\n(dS'__defaults__'\nI1\nsb.",  # give a permitted function a state
        b"c__builtin__\nobject\n(N(dS'x'\nI1\nstb.",
        b"cnumpy\nndarray\n(dS'x'\nI1\nsb.",
        b"c__builtin__\nbytes\n(I100000000000\ntR.",
        b"\x82\x01.",  # extension registry
        b"P0\n.",  # persistent id
        b"not a pickle",
        b"",
        pickle.dumps({1, 2}),
        pickle.dumps(np.dtype([("a", "f4")])),
        pickle.dumps(np.zeros(2, "V8")),
        pickle.dumps(np.arange(6).reshape(2, 3))[:-30] + b".",
    ],
)
def test_tricks_are_refused(content) -> None:
    with pytest.raises(ValueError, match="refused"):
        loads(content)


class FromBuffer:
    """Pickles to an array as protocol 5 writes it, of any arguments."""

    def __init__(self, *arguments) -> None:
        self.arguments = arguments

    def __reduce__(self):
        return np.zeros(1).__reduce_ex__(5)[0], self.arguments


def test_arrays_of_protocol_5_are_checked() -> None:
    raw, kind = bytes(range(48)), np.dtype("f8")
    expected = np.frombuffer(raw).reshape(2, 3).T
    assert np.array_equal(loads(pickle.dumps(FromBuffer(raw, kind, (2, 3), "K", (1, 0)))), expected)
    for arguments in (
        (),
        (raw, kind, (2, 3)),
        (raw, kind, (7,), "C"),
        (raw, kind, (10**12,), "C"),
        (raw, kind, (-1,), "C"),
        (raw, kind, 6, "C"),
        (raw, kind, (6,), "A"),
        (raw, kind, (2, 3), "K"),
        (raw, kind, (2, 3), "K", (0, 0)),
        (raw, np.dtype(object), (6,), "C"),
        (raw, np.dtype([("a", "f8")]), (6,), "C"),
        (17, kind, (6,), "C"),
        ([1.0], kind, (1,), "C"),
    ):
        with pytest.raises(ValueError, match="refused"):
            loads(pickle.dumps(FromBuffer(*arguments)))


def test_sparse_indices_are_checked() -> None:
    matrix = sp.csc_matrix(np.eye(4))
    matrix.indices[0] = 10**6  # would read outside of an array
    with pytest.raises(ValueError, match="refused"):
        loads(pickle.dumps(matrix))


def test_shared_references_do_not_explode() -> None:
    value: list = []
    for _ in range(200):
        value = [value, value]
    result = loads(pickle.dumps(value))
    assert result[0] is result[1]


def test_object_npz(tmp_path) -> None:
    path = tmp_path / "file.npz"
    matrices = np.empty(2, object)
    matrices[:] = [sp.csc_matrix(np.eye(3)), sp.csc_matrix(np.ones((2, 3)))]
    evil = np.empty(1, object)
    evil[0] = Evil(os.system, f"touch {tmp_path}/ran")
    np.savez(path, U=matrices, M=evil, plain=np.arange(3))
    result = read_object_npz(path, ("U", "plain"))
    assert set(result) == {"U", "plain"} and result["U"][1].shape == (2, 3)
    with pytest.raises(ValueError, match=r"'M' was refused"):
        read_object_npz(path, ("M",))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="no array 'A'"):
        read_object_npz(path, ("A",))
    with pytest.raises(ValueError, match="at most 100 are read"):
        read_object_npz(path, ("U",), max_bytes=100)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"not a \.npz"):
        read_object_npz(path, ("U",))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("U.npy", b"nonsense")
    with pytest.raises(ValueError, match=r"not a \.npy"):
        read_object_npz(path, ("U",))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_is_named(tmp_path, save) -> None:
    path = tmp_path / "file.npz"
    save(path, U=np.random.default_rng(0).integers(0, 9, 5000))
    whole = path.read_bytes()
    for start in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[start : start + 8] = bytes(value ^ 0xFF for value in damaged[start : start + 8])
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):  # anything else fails
            read_object_npz(path, ("U",))
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(8) + whole[middle + 8 :])
    with pytest.raises(ValueError, match=r"file\.npz: 'U' cannot be read: (BadZipFile|error)"):
        read_object_npz(path, ("U",))


def test_a_header_that_claims_more_than_there_is(tmp_path) -> None:
    path, buffer = tmp_path / "file.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("U.npy", buffer.getvalue())
    with pytest.raises(ValueError, match=r"'U' is not a \.npy array: .* 8000000000000000 bytes, it has 0"):
        read_object_npz(path, ("U",))


def test_optional_arrays_are_read_where_they_are(tmp_path) -> None:
    path = tmp_path / "file.npz"
    np.savez(path, a=np.arange(3), b=np.arange(4), c=np.arange(5))
    assert set(read_object_npz(path, ("a",), optional=("b", "d"))) == {"a", "b"}


def test_size_limit_of_pickles(tmp_path) -> None:
    path = tmp_path / "model.pkl"
    buffer = io.BytesIO()
    pickle.dump(np.zeros(1000), buffer)
    path.write_bytes(buffer.getvalue())
    assert read_pickle(path).shape == (1000,)
    with pytest.raises(ValueError, match="at most 500 are read"):
        read_pickle(path, max_bytes=500)
