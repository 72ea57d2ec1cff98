"""CUDA graphs that may run beside other work and other graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_WARM_UPS = 3
_T = TypeVar("_T")


def warm_up(work: Callable[[], object], device: torch.device) -> None:
    """Run ``work`` a few times on a stream of its own, as a capture needs: libraries load, memory is found."""
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            work()
    current.wait_stream(side)


def capture(work: Callable[[], _T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, _T]:
    """Record ``work`` on a stream of its own.

    ``torch.cuda.graph`` records on one stream for the whole process unless it is given another, and cuBLAS has one
    workspace for each thread and stream. Graphs recorded on one stream therefore share a workspace, whatever memory
    pools they have, and where two of them run at once their products overwrite each other's partial sums and wait for
    each other's signals: wrong numbers now and then, or for ever (pytorch/pytorch#193402). That stream is also of the
    device that was captured on first, and cannot record work on another.

    Args:
        work: what :func:`warm_up` ran, which waits for nothing and reads its inputs where they are.
        device: the current one.

    Returns:
        The graph, and what ``work`` returned, which every replay overwrites.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, NCCL's and the one that pins batches, go on with calls that no capture may hold.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        result = work()
    return graph, result
