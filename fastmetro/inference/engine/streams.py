"""Parallel CUDA streams for independent pieces of work, as parallel nodes of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class ParallelStreams:
    """Runs pieces of work on streams of its own while a CUDA graph is captured, else one after the other.

    Outside a capture the launches of small kernels, not the kernels, take the time, so that streams would gain
    nothing; they would only add the hazards of memory shared by streams across calls.

    Memory is safe without ``Tensor.record_stream``, which would keep blocks from being reused within the capture. The
    allocator gives a block that was freed only to the stream that it was allocated on. All side streams start after
    everything that the current stream did before :meth:`run`, and the current stream waits for all of them at its end.
    So a block may be reused on its own stream as soon as every other stream that reads it has been joined:

    - what a piece allocates and frees stays on its stream, in order;
    - what crosses streams is an argument or a result of a piece. The pieces hold their arguments and :meth:`run` holds
      the results until all are joined; a block freed later is reused, on whichever stream, only by work that was
      forked after that join.

    Copies and pickles start without streams.
    """

    def __init__(self) -> None:
        self._side: list[torch.cuda.Stream] = []

    def __reduce__(self) -> tuple[type[ParallelStreams], tuple[()]]:
        return ParallelStreams, ()

    def run(self, device: torch.device, pieces: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of all pieces, which must not depend on one another; the first runs on the current stream."""
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return [piece() for piece in pieces]
        current = torch.cuda.current_stream(device)
        if self._side and self._side[0].device != current.device:
            self._side.clear()
        while len(self._side) < len(pieces) - 1:
            self._side.append(torch.cuda.Stream(current.device))
        side = self._side[: len(pieces) - 1]
        for stream in side:
            stream.wait_stream(current)
        results = [pieces[0]()]
        for stream, piece in zip(side, pieces[1:], strict=True):
            with torch.cuda.stream(stream):
                results.append(piece())
        for stream in side:
            current.wait_stream(stream)
        return results
