"""Which kernel reads a graph's input, and that it is given another address: on graphs of a driver that is made up."""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmetro.inference.engine.direct_input import DirectInput, Parameters, find_in
from fastmetro.inference.engine.graphs import Captured

IMAGES = torch.zeros(2, 3, 8, 8)
AT, BYTES = IMAGES.data_ptr(), IMAGES.nbytes
NAMES = ["KERNEL", "MEMCPY", "MEMSET", "GRAPH", "EMPTY", "WAIT_EVENT", "EVENT_RECORD", "MEM_ALLOC", "MEM_FREE"]
Kinds = enum.IntEnum("Kinds", {f"CU_GRAPH_NODE_TYPE_{name}": number for number, name in enumerate(NAMES)})


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


@dataclass(eq=False)
class Node:
    """Of a kernel with some parameters, or of another kind."""

    parameters: list[bytes] = field(default_factory=list)
    kind: str = "KERNEL"
    source: int = 0
    by_kernel: bool = False

    def __post_init__(self) -> None:
        self.values = [ctypes.create_string_buffer(value, len(value)) for value in self.parameters]
        self.pointers = (ctypes.c_void_p * len(self.values))(*map(ctypes.addressof, self.values))


class Driver:
    """What ``cuda.bindings.driver`` offers, as far as it is asked; `seen` is what kernels were given."""

    CUgraphNodeType = Kinds

    def __init__(self, nodes: list[Node], error: int = 0) -> None:
        self.nodes, self.error = nodes, error
        self.seen: list[tuple[Node, list[bytes]]] = []

    def CUgraph(self, init_value: int) -> int:
        return init_value

    CUgraphExec = CUgraph

    def cuGraphGetNodes(self, graph: int, most: int) -> tuple[int, list[Node], int]:
        return 0, self.nodes[:most], len(self.nodes)

    def cuGraphNodeGetType(self, node: Node) -> tuple[int, Kinds]:
        return 0, Kinds[f"CU_GRAPH_NODE_TYPE_{node.kind}"]

    def cuGraphKernelNodeGetParams(self, node: Node) -> tuple[int, Any]:
        number = self.nodes.index(node) + 1
        func, kern = (0, number) if node.by_kernel else (number, 0)
        pointers = ctypes.addressof(node.pointers) if node.parameters else 0
        return 0, SimpleNamespace(func=func, kern=kern, kernelParams=pointers)

    def cuGraphMemcpyNodeGetParams(self, node: Node) -> tuple[int, Any]:
        return 0, SimpleNamespace(srcDevice=node.source, srcXInBytes=16)

    def cuFuncGetParamInfo(self, kernel: int, number: int) -> tuple[int, int | None, int | None]:
        parameters = self.nodes[kernel - 1].parameters
        return (0, 8 * number, len(parameters[number])) if number < len(parameters) else (1, None, None)

    cuKernelGetParamInfo = cuFuncGetParamInfo

    def cuGraphExecKernelNodeSetParams(self, executable: int, node: Node, launch: Any) -> tuple[int]:
        assert executable == 2
        pointers = (ctypes.c_void_p * len(node.parameters)).from_address(launch.kernelParams)
        sizes = map(len, node.parameters)
        self.seen.append((node, [ctypes.string_at(at, size) for at, size in zip(pointers, sizes, strict=True)]))
        return (self.error,)


def find(driver: Driver) -> DirectInput | None:
    return find_in(driver, 1, 2, IMAGES)


OTHERS = [Node([word(AT - 8), word(AT + BYTES), b"\0" * 4]), Node(), Node(kind="MEMSET"), Node(kind="EMPTY")]


@pytest.mark.parametrize("by_kernel", [False, True])
def test_the_kernel_that_reads_it_reads_elsewhere(by_kernel: bool) -> None:
    """All else that it is given stays, in memory of our own; the driver is only asked for other addresses."""
    reader = Node([b"\1\2\3\4", word(AT), word(7), b"\5"], by_kernel=by_kernel)
    driver = Driver([*OTHERS, reader, Node(kind="MEMCPY", source=AT - 17)])
    found = find(driver)
    assert found is not None and driver.seen.pop() == (reader, reader.parameters)
    for value in reader.values:
        ctypes.memset(value, 0xFF, len(value))
    for address in (AT, 4096, 4096, AT + 32, AT):
        found.read(address)
    assert [(node, parameters[1]) for node, parameters in driver.seen] == [
        (reader, word(address)) for address in (4096, AT + 32, AT)
    ]
    assert all(parameters[::2] == [b"\1\2\3\4", word(7)] and parameters[3] == b"\5" for _, parameters in driver.seen)


def test_addresses_in_a_structure() -> None:
    reader = Node([word(3) + word(AT) + b"\6\7", word(AT)])
    driver = Driver([reader])
    found = find(driver)
    assert found is not None
    found.read(64)
    assert driver.seen[-1] == (reader, [word(3) + word(64) + b"\6\7", word(64)])


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        OTHERS,
        [Node([word(AT)]), Node([word(1), word(AT)])],
        [Node([word(AT)]), Node([word(AT + BYTES - 1)])],
        [Node([word(AT), word(AT + 16)])],
        [Node([word(AT)]), Node([word(0) + word(AT + 4)])],
        [Node([word(AT)]), Node(kind="MEMCPY", source=AT)],
        [Node([word(AT)]), Node(kind="MEMCPY", source=AT - 16)],
        [Node([word(AT)]), Node(kind="GRAPH")],
    ],
)
def test_where_others_may_read_it_nothing_is_changed(nodes: list[Node]) -> None:
    driver = Driver(nodes)
    assert find(driver) is None and not driver.seen


def test_a_driver_that_refuses() -> None:
    """At first, and later; then the address counts as unknown, and is set again."""
    with pytest.raises(RuntimeError, match="cannot change what a graph reads"):
        find(Driver([Node([word(AT)])], error=1))
    driver = Driver([Node([word(AT)])])
    found = find(driver)
    assert found is not None
    driver.error = 1
    with pytest.raises(RuntimeError, match="cannot change what a graph reads"):
        found.read(64)
    driver.error = 0
    found.read(AT)
    assert driver.seen[-1][1] == [word(AT)]


def test_no_parameters() -> None:
    assert not list(Parameters(0, []).words())


class Launches:
    """A captured graph: the address that it reads at each launch, and the input that is told to it."""

    def __init__(self, steps: Any) -> None:
        self.read_at: list[int] = []
        self.steps = steps
        self.at = 0

    def read(self, address: int) -> None:
        self.at = address

    def replay(self) -> None:
        self.read_at.append(self.at)
        self.steps(self)


def captured(steps: Any = lambda launches: None, like: torch.Tensor = IMAGES) -> tuple[Captured, Launches]:
    """Without a GPU to capture on."""
    made = object.__new__(Captured)
    launches: Any = Launches(steps)
    made.images, made.graph, made._input = torch.zeros_like(like), launches, launches
    made.outputs = {"sum": torch.zeros(1)}
    return made, launches


def test_what_is_read_where_it_is_and_what_is_copied() -> None:
    made, launches = captured()
    aligned = torch.ones(IMAGES.numel() + 16)
    aligned = aligned[(-aligned.data_ptr() % 32) // 4 :]
    images, shifted = (aligned[shift:][: IMAGES.numel()].view(IMAGES.shape) for shift in (0, 4))
    mine = made.images.data_ptr()
    made.launch(images, True)
    assert launches.read_at == [images.data_ptr()] and not made.images.any()
    made.launch(shifted, True)  # by 16 bytes
    assert launches.read_at[1:] == [mine] and torch.equal(made.images, shifted)
    made.launch(images.double() * 2, False)
    assert launches.read_at[2:] == [mine] and torch.equal(made.images, images * 2)
    made._input = None
    made.launch(images, True)
    assert torch.equal(made.images, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_graph_that_reads_the_images_by_other_means_is_found_out(dtype: torch.dtype) -> None:
    def at(address: int) -> torch.Tensor:
        size = made.images.nbytes
        return torch.frombuffer(bytearray(ctypes.string_at(address, size)), dtype=made.images.dtype)

    def honest(launches: Launches) -> None:
        made.outputs["sum"].copy_(at(launches.at).double().sum())

    def both(launches: Launches) -> None:
        made.outputs["sum"].copy_(at(launches.at).double().sum() + made.images.double().mean())

    def neither(launches: Launches) -> None:
        made.outputs["sum"].fill_(1)

    def broken(launches: Launches) -> None:
        made.outputs["sum"].fill_(torch.nan)

    for steps, expected in ((honest, True), (both, False), (neither, False), (broken, False)):
        made, _ = captured(steps, IMAGES.to(dtype))
        assert made._reads_nothing_else() == expected, steps.__name__


def test_without_a_gpu_nothing_is_found() -> None:
    """Whether or not cuda-bindings is there: a graph that was not captured has no nodes to look at."""

    class Graph:
        def raw_cuda_graph(self) -> int:
            raise RuntimeError("not captured")

    graph: Any = Graph()
    assert DirectInput.find(graph, IMAGES) is None
