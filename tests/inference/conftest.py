"""What several tests of the engine need."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest
import torch

from fastmetro.inference.engine import graphs


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Hundreds of tiny convolutions wait for one another's threads for minutes where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Python's collector runs once, for what others have left, and then no more: what is in a cycle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class MadeUpEvent:
    """Of work that has ended."""

    def __init__(self) -> None:
        self.waits = 0

    def query(self) -> bool:
        return True

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None:
        self.waits += 1


class MadeUpGraph:
    """Of nothing: what was captured has run."""

    def __init__(self, keep_graph: bool) -> None: ...

    def instantiate(self) -> None: ...

    def replay(self) -> None: ...


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `Graphs` asks of a GPU, on a CPU, where a capture runs its work."""
    monkeypatch.setattr(graphs, "_raw_stream", lambda index: 0)
    for name, value in {
        "Event": MadeUpEvent,
        "CUDAGraph": MadeUpGraph,
        "Stream": lambda device: None,
        "graph": lambda *_arguments, **_options: contextlib.nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
        "current_device": lambda: None,
        "current_stream": lambda: None,
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
