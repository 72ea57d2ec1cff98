"""The input of a captured CUDA graph, read where a caller has it instead of being copied to where it was captured."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_Place = tuple[int, int]
"""Of a parameter, and of the bytes in it."""
_WORD = struct.Struct("=Q")
_NEEDED = ("cuFuncGetParamInfo", "cuKernelGetParamInfo", "cuGraphExecKernelNodeSetParams")
_READ_NOTHING = ("MEMSET", "EMPTY", "WAIT_EVENT", "EVENT_RECORD", "MEM_ALLOC", "MEM_FREE")


class DirectInput:
    """The one kernel of a captured graph that is given the address of the input, to be given another one.

    Addresses are taken when a graph is launched, so launches before a change keep theirs. Whether another kernel knows
    the input by other means cannot be seen here: compare what the graph computes.

    Args:
        driver: ``cuda.bindings.driver``.
        executable: the instantiated graph.
        node: of the kernel, in the graph as captured.
        launch: the node's ``CUDA_KERNEL_NODE_PARAMS``, which are made to point to `parameters`.
        parameters: of the kernel.
        places: of the address among them.
    """

    def __init__(
        self, driver: Any, executable: Any, node: Any, launch: Any, parameters: Parameters, places: list[_Place]
    ) -> None:
        self._driver, self._executable, self._node, self._launch = driver, executable, node, launch
        self._parameters, self._places = parameters, places
        self._address = 0
        launch.kernelParams = parameters.address

    @classmethod
    def find(cls, graph: torch.cuda.CUDAGraph, images: Tensor) -> DirectInput | None:
        """Of a graph that was captured on `images`, kept (``keep_graph=True``) and instantiated.

        Returns:
            None where something other than one kernel may read them, or where cuda-bindings, PyTorch or the driver
            cannot tell or change what a graph reads.
        """
        driver = _driver()
        if driver is None:
            return None
        try:
            return find_in(driver, graph.raw_cuda_graph(), graph.raw_cuda_graph_exec(), images)
        except RuntimeError:  # of the driver's, or a function that it lacks
            return None

    def read(self, address: int) -> None:
        """Lets later launches read what is at `address`: as large, ordered and aligned as what was captured.

        Raises:
            RuntimeError: the driver refuses.
        """
        if address == self._address:
            return
        self._address = 0  # should the driver refuse, it is not known
        self._parameters.put(self._places, address)
        _done(self._driver.cuGraphExecKernelNodeSetParams(self._executable, self._node, self._launch))
        self._address = address


class Parameters:
    """Own copies of a kernel node's parameters, whose memory is the node's.

    Args:
        pointers: address of an array with the address of each.
        sizes: of each in bytes.

    Attributes:
        address: of an array like `pointers`, with the addresses of the copies.
    """

    def __init__(self, pointers: int, sizes: list[int]) -> None:
        theirs = (ctypes.c_void_p * len(sizes)).from_address(pointers)
        self._values = [
            ctypes.create_string_buffer(ctypes.string_at(pointer, size), size)
            for pointer, size in zip(theirs, sizes, strict=True)
        ]
        self._pointers = (ctypes.c_void_p * len(sizes))(*map(ctypes.addressof, self._values))
        self.address = ctypes.addressof(self._pointers)

    def words(self) -> Iterator[tuple[_Place, int]]:
        """All that may be addresses, alone or in a structure, and their places."""
        for number, value in enumerate(self._values):
            for offset in range(0, len(value) - _WORD.size + 1, _WORD.size):
                yield (number, offset), _WORD.unpack_from(value, offset)[0]

    def put(self, places: list[_Place], address: int) -> None:
        """Write an address to places of :meth:`words`."""
        for number, offset in places:
            _WORD.pack_into(self._values[number], offset, address)


def find_in(driver: Any, graph: int, executable: int, images: Tensor) -> DirectInput | None:
    """See :meth:`DirectInput.find`; a RuntimeError of the driver comes through."""
    first, end = images.data_ptr(), images.data_ptr() + images.nbytes
    kinds = driver.CUgraphNodeType
    harmless = [getattr(kinds, f"CU_GRAPH_NODE_TYPE_{name}") for name in _READ_NOTHING]
    raw = driver.CUgraph(init_value=graph)
    _, count = _done(driver.cuGraphGetNodes(raw, 0))
    nodes, count = _done(driver.cuGraphGetNodes(raw, count))
    readers = []
    for node in nodes[:count]:
        (kind,) = _done(driver.cuGraphNodeGetType(node))
        if kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL:
            (launch,) = _done(driver.cuGraphKernelNodeGetParams(node))
            parameters = Parameters(launch.kernelParams, _sizes(driver, launch))
            inside = [(place, word) for place, word in parameters.words() if first <= word < end]
            if inside:
                readers.append((node, launch, parameters, inside))
        elif kind == kinds.CU_GRAPH_NODE_TYPE_MEMCPY:
            (copied,) = _done(driver.cuGraphMemcpyNodeGetParams(node))
            if first <= int(copied.srcDevice) + copied.srcXInBytes < end:
                return None
        elif kind not in harmless:
            return None
    if len(readers) != 1 or any(word != first for _, word in readers[0][3]):
        return None
    node, launch, parameters, inside = readers[0]
    places = [place for place, _ in inside]
    found = DirectInput(driver, driver.CUgraphExec(init_value=executable), node, launch, parameters, places)
    found.read(first)  # the address that it has: would the driver refuse another one?
    return found


def _driver() -> Any:
    """``cuda.bindings.driver``, if it and PyTorch have what is needed here."""
    try:
        import cuda.bindings.driver as driver
    except ImportError:  # it comes with PyTorch for CUDA from 2.10 on
        return None
    able = hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec") and all(hasattr(driver, name) for name in _NEEDED)
    return driver if able else None


def _sizes(driver: Any, launch: Any) -> list[int]:
    """Bytes of each of a kernel's parameters."""
    if not launch.kernelParams:
        return []  # given in another form
    if int(launch.func):
        ask, kernel = driver.cuFuncGetParamInfo, launch.func
    else:
        ask, kernel = driver.cuKernelGetParamInfo, launch.kern
    sizes: list[int] = []
    while True:
        error, _, size = ask(kernel, len(sizes))
        if int(error):  # there are no more
            return sizes
        sizes.append(size)


def _done(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function of the driver returned beside its error, if that is none."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"the CUDA driver cannot change what a graph reads: {error}")
    return tuple(values)
