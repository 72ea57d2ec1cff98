"""The processes of one training or evaluation, as `torchrun` starts them: one per device, on one node or many."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmetro_kernels.adamw import same_layout

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all; alone by default.

    Attributes:
        rank: 0 to size - 1. Rank 0 writes files and prints.
        size: how many processes there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; every process must call it with as many values."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process; waits for all of them."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)) > 0)

    def average_gradients(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Replace gradients by their means over all processes, in one call for each dtype, which adds in that dtype.

        Args:
            gradients: parameters and their gradients, the same ones with the same dtypes in all processes, as these
                run the same network.
        """
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for parameter, gradient in gradients:
            laid_out = gradient
            if not same_layout(gradient, parameter):  # whose order is the same in all processes
                laid_out = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
            by_dtype.setdefault(gradient.dtype, []).append((gradient, laid_out))
        for pairs in by_dtype.values():
            parts = [_in_memory_order(laid_out) for _, laid_out in pairs]
            flat = torch.cat(parts)
            dist.all_reduce(flat)
            flat /= self.size
            torch._foreach_copy_(parts, list(flat.split([part.numel() for part in parts])))
            for gradient, laid_out in pairs:
                if laid_out is not gradient:
                    gradient.copy_(laid_out)

    def share_state(self, model: nn.Module) -> None:
        """Give all processes the parameters and buffers of rank 0."""
        if self.size > 1:
            for value in (*model.parameters(), *model.buffers()):
                dist.broadcast(value.detach(), 0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def by_first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in rank 0, which alone calls it, in all processes; it must be possible to pickle it.

        Raises:
            RuntimeError: in the other processes, where ``work`` raised in rank 0, which raises that itself.
        """
        if self.size == 1:
            return work()
        sent: list[Any] = [None, None]
        failed: Exception | None = None
        if self.first:
            try:
                sent[0] = work()
            except Exception as error:  # whatever it is, the others must not wait for a result
                failed, sent[1] = error, f"process 0 failed: {error}"
        dist.broadcast_object_list(sent, 0)
        if failed is not None:
            raise failed
        if sent[1] is not None:
            raise RuntimeError(sent[1])
        return sent[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that fills its memory, as they lie there: flattening others' strides copies each."""
    return tensor.as_strided((tensor.numel(),), (1,))


def find_device(name: str = "auto") -> torch.device:
    """The device of that name, which is there.

    Args:
        name: "cpu", "cuda", "cuda:1" and the like, or "auto": a GPU where there is one.

    Raises:
        ValueError: another name, or a GPU that PyTorch does not find.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    gpus = ["cuda", *(f"cuda:{number}" for number in range(count))] if count else []
    if name not in ("cpu", *gpus):
        why = "" if count else " (PyTorch finds no GPU here)"
        raise ValueError(f"device must be one of {', '.join(map(repr, ('auto', 'cpu', *gpus)))}{why}, got {name!r}")
    return torch.device(name)


@contextlib.contextmanager
def open_world(device: str = "auto") -> Iterator[tuple[World, torch.device]]:
    """This process's world, and its device, for the time of the block.

    Under `torchrun`, whose environment variables tell, the processes find each other over NCCL on GPUs (one each) and
    over Gloo on CPUs. A process that already belongs to a group stays in it.

    Args:
        device: "cpu", "cuda", or "auto": a GPU where there is one. "cuda:1" and the like only for one process alone.

    Raises:
        ValueError: a device that is not there, or a numbered one for one of several processes.
        RuntimeError: more processes on this node than GPUs, or the processes do not find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and ":" in device:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'auto' under torchrun, got {device!r}")
    chosen = find_device(device)
    if size == 1:
        # CUDA graphs are captured on a stream of the current device, whatever the tensors are on.
        with torch.cuda.device(chosen) if chosen.type == "cuda" else contextlib.nullcontext():
            yield World(), chosen
        return
    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise RuntimeError(f"process {local} of this node has no GPU: there are {torch.cuda.device_count()}")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    owner = not dist.is_initialized()
    if owner:
        # The first optimizer imports Dynamo, which keeps a group that it finds for ever: the group's threads would go
        # on after its end, and what they let go of while Python ends aborts the process.
        importlib.import_module("torch._dynamo")
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size()), chosen
    finally:
        if owner:
            dist.destroy_process_group()
