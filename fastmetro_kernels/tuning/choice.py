"""Looks up the measured table for one call: cheap, without synchronising, the same for equal shapes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastmetro_kernels.attention.configs import PADDED_DIMS, Config, TritonConfig, padded_dim
from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.tuning.reader import shipped_and_own
from fastmetro_kernels.tuning.table import SELECTABLE, Configuration, Family, Point, read_file

ENVIRONMENT = "FASTMETRO_KERNELS_TUNING"
"""Names a file whose families take the place of those that are shipped. Read when a call first needs it."""

SHIPPED = Path(__file__).with_name("attention.json")

Ranking = tuple[tuple[str, Configuration], ...]
"""Backends with their configurations, fastest first."""

# As `torch.compile` keeps constants: (largest batch * heads, candidates as plain tuples) by batch * heads, ascending.
_Ladder = tuple[tuple[int, tuple[tuple[str, Any], ...]], ...]


@functools.cache
def families() -> Mapping[str, Family]:
    """The measured families by compute capability: those of the user's file, else the shipped ones.

    Raises:
        TuningFileError: the file is malformed or cannot be read.
    """
    return shipped_and_own(SHIPPED, ENVIRONMENT, read_file)


def reset() -> None:
    """Forgets what was read, so that the next call reads the files again."""
    families.cache_clear()
    _cached_ladder.cache_clear()


@functools.cache
def _capability(index: int) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


def family_of(device: torch.device) -> str | None:
    """The compute capability of a CUDA device, as `"9.0"`; None of others, which have no table."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def nearest(family: str, pass_name: str, element_size: int, dim: int, vertices: int) -> list[Point]:
    """The measured points that come into question: of the nearest number of vertices, by batch * heads.

    Nearest is meant in the logarithm. Empty where the family was not measured with this pass, size and head dim.
    """
    points = [
        point
        for point in families().get(family, Family()).points
        if (point.pass_name, point.element_size, point.dim) == (pass_name, element_size, padded_dim(dim))
    ]
    if not points:
        return []
    level = min((abs(math.log(point.vertices / max(vertices, 1))), point.vertices) for point in points)[1]
    return sorted((point for point in points if point.vertices == level), key=lambda point: point.batch_heads)


@functools.cache
def _cached_ladder(family: str | None, pass_name: str, element_size: int, dim: int, vertices: int) -> _Ladder:
    if family is None:
        return ()
    points = nearest(family, pass_name, element_size, dim, vertices)
    tops = [math.isqrt(low.batch_heads * high.batch_heads) for low, high in itertools.pairwise(points)]
    steps = []
    for point, top in zip(points, [*tops, 2**62][: len(points)], strict=True):
        taken = tuple((one.backend, _as_tuple(one.configuration)) for one in point.candidates)
        steps.append((top, tuple(one for one in taken if one[0] in SELECTABLE)))
    return tuple(steps)


def _as_tuple(configuration: Configuration) -> Any:
    if not isinstance(configuration, TritonConfig):
        return configuration
    return tuple(map(tuple, configuration.tiles)), configuration.precision, configuration.share


@assumed_constant
def _ladder(device: torch.device, pass_name: str, element_size: int, dim: int, vertices: int) -> _Ladder:
    return _cached_ladder(family_of(device), pass_name, element_size, dim, vertices)


def ranking(
    device: torch.device, pass_name: str, element_size: int, dim: int, vertices: int, batch_heads: int
) -> tuple[tuple[str, Any], ...]:
    """Backends that `auto` may take and their configurations as plain tuples (see `triton_config`), fastest first.

    The measured point is that of the nearest number of vertices and, among those, of the nearest batch * heads, both
    in the logarithm. `batch_heads` and `dim` are only compared, so that under `torch.compile` they may stay symbolic:
    a compiled function is then valid for all sizes that lie nearest to the same point.

    Returns:
        Empty where nothing was measured: not this family of devices, or not this pass, size and head dim.
    """
    if dim > PADDED_DIMS[-1]:
        return ()
    for top, candidates in _ladder(device, pass_name, element_size, padded_dim(dim), vertices):
        if batch_heads <= top:
            return candidates
    return ()


def triton_config(plain: Any) -> TritonConfig:
    """A configuration of `ranking` as the Triton backend takes it."""
    tiles, precision, share = plain
    return TritonConfig(tuple(Config(*tile) for tile in tiles), precision, share)
