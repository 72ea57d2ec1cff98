"""The kernels of convolutions that need compute capability 9.0, run in the emulator."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from emulation import build
from torch import Tensor

from fastmetro_kernels.convolution import ConvolutionConfig, ConvolutionWeights

POINTERS = ("x", "weight", "residual", "second", "second_weight", "out", "bias", "next_weight", "next_out", "next_bias")
NUMBERS = (
    *("images", "height", "width", "channels", "outputs", "taps", "stride", "padding"),
    *("second_height", "second_width", "second_channels", "second_stride"),
    *("next_outputs", "relu", "late", "scale", "columns", "split", "stages", "groups", "bfloat"),
)


class Given(ctypes.Structure):
    """Arguments of a convolution, as in convolution_given.h."""

    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int64) for name in NUMBERS)]


def rows_of(images: Tensor | None) -> Tensor | None:
    """[N, H, W, C], contiguous."""
    return None if images is None else images.permute(0, 2, 3, 1).contiguous()


def run(
    harness: str, function: str, tensors: dict[str, Tensor | None], numbers: dict[str, int], **options: Any
) -> None:
    """Calls a harness; tensors whose names end with ``out`` are written to."""
    given = Given(**{name: one.data_ptr() for name, one in tensors.items() if one is not None}, **numbers)
    outputs = {name for name in tensors if name.endswith("out")}
    build.build_harness(Path(build.__file__).with_name(harness)).run(
        function,
        given,
        reads={name: one for name, one in tensors.items() if one is not None and name not in outputs},
        writes={name: one for name, one in tensors.items() if one is not None and name in outputs},
        **{"races": "by_barriers", **options},
    )


def convolution(
    x: Tensor,
    weights: ConvolutionWeights,
    config: ConvolutionConfig,
    residual: Tensor | None = None,
    second: Tensor | None = None,
    relu: bool = True,
    late: bool = False,
    scale: int = 1,
    following: ConvolutionWeights | None = None,
    **options: Any,
) -> list[Tensor]:
    """What the kernel makes, channels_last; with ``following`` both results of a pair. What it leaves out is NaN."""
    rows, branch = rows_of(x), rows_of(second)
    assert rows is not None
    outputs, taps = weights.weight.shape[:2]
    height, width = ((size + 2 * weights.padding - taps) // weights.stride + 1 for size in rows.shape[1:3])
    out = rows.new_full((len(rows), height * scale, width * scale, outputs), torch.nan)
    tensors = {"x": rows, "weight": weights.weight, "residual": rows_of(residual), "second": branch, "out": out}
    tensors |= {"second_weight": weights.second_weight, "bias": weights.bias}
    numbers = dict(zip(NUMBERS, (*rows.shape, outputs, taps, weights.stride, weights.padding), strict=False))
    if branch is not None:
        numbers |= {f"second_{name}": size for name, size in zip(NUMBERS[1:4], branch.shape[1:], strict=True)}
        numbers["second_stride"] = weights.second_stride
    numbers |= {"relu": relu, "late": late, "scale": scale, "bfloat": rows.dtype == torch.bfloat16}
    numbers |= {name: getattr(config, name) for name in ("columns", "split", "stages", "groups")}
    harness, function = (
        ("near_harness.cpp", "run_near") if config.once else ("convolution_harness.cpp", "run_convolution")
    )
    if following is not None:
        numbers["next_outputs"] = len(following.weight)
        tensors |= {"next_weight": following.weight, "next_bias": following.bias}
        tensors["next_out"] = rows.new_full((len(rows), height, width, len(following.weight)), torch.nan)
        harness, function = "pair_harness.cpp", "run_pair"
    run(harness, function, tensors, {name: int(number) for name, number in numbers.items()}, **options)
    made = [tensors[name] for name in ("out", "next_out") if name in tensors]
    return [one.permute(0, 3, 1, 2) for one in made if one is not None]
