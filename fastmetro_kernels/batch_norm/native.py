"""The native backend of the batch norm: half precision, compute capability 9.0 (``csrc/batch_norm/``).

One launch to a pass: the blocks of a cluster share the rows of some channels, keep them in shared memory, and join
their sums by way of each other's shared memory. Nothing is counted, and nothing but results goes to memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.batch_norm.ops import NAMESPACE, check_backward, check_forward
from fastmetro_kernels.fused.inference import aligned

OPERATOR, BACKWARD = "batch_norm_native", "batch_norm_backward_native"
WIDE = 8
"""Channels of a lane: 16 bytes in half precision."""
THREADS = 256
MULTIPROCESSORS = 132
"""Of an H100 or H200. The same number everywhere, so that sums are taken in the same order on every device."""
MOST_ROWS = 2**30
_ACCEPTED = {"lanes": (2, 4, 8), "cluster": (1, 2, 4, 8, 16)}


class NativeConfig(NamedTuple):
    """Lanes, of 8 channels each, that a cluster has of every row, and the blocks of a cluster, which share the rows."""

    lanes: int
    cluster: int


CONFIGS = tuple(NativeConfig(lanes, cluster) for lanes in (8, 4, 2) for cluster in _ACCEPTED["cluster"])
"""All that there are; those come first that are preferred where two read as much."""


torch.library.define(
    f"{NAMESPACE}::{OPERATOR}",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? batches, float momentum, float epsilon, bool relu, int[] config) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# As of ops.py, without counters; `config` is a NativeConfig.
torch.library.define(
    f"{NAMESPACE}::{BACKWARD}",
    "(Tensor grad, Tensor? more, Tensor x, Tensor? out, Tensor weight, Tensor bias, Tensor mean, Tensor variance, "
    "float epsilon, bool relu, bool behind, int[] config) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def problem(config: NativeConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, accepted in _ACCEPTED.items():
        if (value := getattr(config, name)) not in accepted:
            return f"{name} must be one of {', '.join(map(str, accepted))}, got {value}"
    return None


def blocks(channels: int, config: NativeConfig) -> int:
    """Of a launch."""
    return config.cluster * -(-channels // (WIDE * config.lanes))


def sweeps(rows: int, config: NativeConfig) -> int:
    """Reads of 16 bytes that a thread makes of one tensor."""
    return -(-(-(-rows // config.cluster) * config.lanes) // THREADS)


def worth_timing(rows: int, channels: int) -> tuple[NativeConfig, ...]:
    """What `python -m bench batch_norm --all-configs` times: configurations that keep half of an H200 busy, or as much
    as any, all blocks at a time, with rows for each."""
    enough = min(MULTIPROCESSORS // 2, max(blocks(channels, one) for one in CONFIGS))
    wanted = range(enough, 2 * MULTIPROCESSORS + 1)
    return tuple(one for one in CONFIGS if blocks(channels, one) in wanted and one.cluster <= rows)


def pinned_native(rows: int, channels: int) -> NativeConfig:
    """The configuration for so many rows and channels. By reckoning: it has not been measured on a GPU.

    Two blocks fit a multiprocessor. Of the configurations with at most as many blocks as then run at a time, the one
    whose busiest multiprocessor reads the least; then whole cache lines, then small clusters.
    """

    return _reckoned(rows, channels) if torch.compiler.is_compiling() else _remembered(rows, channels)


def _reckoned(rows: int, channels: int) -> NativeConfig:
    best, least = NativeConfig(8, 1), None  # of very many channels
    for config in CONFIGS:
        count = blocks(channels, config)
        reads = -(-count // MULTIPROCESSORS) * sweeps(rows, config)
        if count <= 2 * MULTIPROCESSORS and (least is None or reads < least):
            best, least = config, reads
    return best


_remembered = functools.cache(_reckoned)  # which tracing would go through, and warn


def reasons(x: Tensor, residual: Tensor | None) -> list[str]:
    """Why the kernels cannot take a call whose shapes fit; empty when they can."""
    found = list(_device_reasons(x.device, x.dtype))
    channels = x.shape[1]
    if channels % WIDE:
        found.append(f"takes channels in multiples of {WIDE}, got {channels}")
    if x.numel() > MOST_ROWS * channels:
        found.append(f"takes up to {MOST_ROWS} values per channel, got {x.numel() // channels}")
    for name, image in (("x", x), ("residual", residual)):
        if image is not None and not aligned(image, 16):
            found.append(f"{name} must be aligned to 16 bytes")
    return found


@assumed_constant
def _device_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    return backends.hopper_reasons(OPERATOR, device, dtype)


def _check(x: Tensor, config: Sequence[int]) -> None:
    """What the kernels want beside the rules of all backends."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    torch._check(half, lambda: f"x must be float16 or bfloat16, got {x.dtype}")
    torch._check(x.size(1) % WIDE == 0, lambda: f"channels must be a multiple of {WIDE}, got {x.size(1)}")
    found = problem(NativeConfig(*config)) if len(config) == 2 else f"two numbers, got {list(config)}"
    torch._check(found is None, lambda: f"config: {found}")


@torch.library.register_fake(f"{NAMESPACE}::{OPERATOR}")
def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, momentum: float, epsilon: float, relu: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_forward(x, residual, weight, bias, running_mean, running_var, batches, None)
    _check(x, config)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake(f"{NAMESPACE}::{BACKWARD}")
def _fake_backward(
    grad: Tensor, more: Tensor | None, x: Tensor, out: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor,
    variance: Tensor, epsilon: float, relu: bool, behind: bool, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_backward(grad, more, x, out, weight, bias, mean, variance, None, behind)
    _check(x, config)
    before = torch.empty_like(x) if behind else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), before


batch_norm_native = torch.ops.fastmetro_kernels.batch_norm_native.default
batch_norm_backward_native = torch.ops.fastmetro_kernels.batch_norm_backward_native.default
