"""Compiles the kernels of all Triton candidates beforehand, in parallel processes that leave them in Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from fastmetro_kernels.attention.configs import KERNELS, WHOLE, TritonConfig, padded_dim
from fastmetro_kernels.tuning import candidates
from fastmetro_kernels.tuning.cases import HEADS, HUBS, Case, Shape, topology_on
from fastmetro_kernels.tuning.measure import runner

MAX_PROCESSES = 16


class Task(NamedTuple):
    """A configuration of a pass, on a mesh for which its machine code is made."""

    pass_name: str
    vertices: int
    dim: int
    dtype: torch.dtype
    config: TritonConfig


def tasks(
    shapes: Iterable[Shape], dtypes: Iterable[torch.dtype], passes: Iterable[str], device: torch.device
) -> list[Task]:
    """One task for all cases that launch the same machine code, which differs by whether lists fit one tile."""
    found: dict[tuple[object, ...], Task] = {}
    for vertices, dim in sorted({(shape.vertices, shape.dim) for shape in shapes}):
        topology = topology_on(vertices, device)
        for dtype in dtypes:
            for pass_name in passes:
                for _, config in candidates.first_round(pass_name, dtype.itemsize, padded_dim(dim)):
                    if not isinstance(config, TritonConfig):
                        continue
                    whole = [HUBS + topology.schedule_of(tile.rows).longest <= tile.keys for tile in config.tiles]
                    key = (pass_name, dim, dtype, config, *whole)
                    found.setdefault(key, Task(pass_name, vertices, dim, dtype, config))
    return list(found.values())


def compile_task(task: Task) -> None:
    """Runs the configuration at batch 1, with hub rows split and whole; what fails is met again later."""
    device = torch.device("cuda")
    case = Case(Shape(task.vertices, task.dim, 1), task.dtype, device)
    if task.pass_name != "forward":
        q = case.sets[0][0]
        case.saved = [(torch.zeros_like(q), torch.zeros(1, HEADS, q.shape[1], device=device))]
    for share in (max(tile.keys for tile in task.config.tiles), WHOLE):
        try:
            runner(case, task.pass_name, "triton", task.config._replace(share=share))(0)
        except Exception:
            return


def compile_all(wanted: list[Task]) -> int:
    """Compiles all tasks and returns the number of processes that did."""
    assert all(len(task.config.tiles) == len(KERNELS[task.pass_name]) for task in wanted)
    count = min(MAX_PROCESSES, os.cpu_count() or 1, len(wanted))
    if count < 2:
        return 0
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_task, wanted))
    return count
