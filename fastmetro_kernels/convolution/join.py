"""The end of a stage's first residual block at large batches: two 1 x 1 convolutions, added, in one product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.convolution import reference
from fastmetro_kernels.convolution.api import channels_last_rows, layer_of
from fastmetro_kernels.convolution.join_configs import MEASURED, JoinConfig, problem
from fastmetro_kernels.convolution.layout import ConvolutionWeights
from fastmetro_kernels.convolution.ops import NAMESPACE
from fastmetro_kernels.fused.inference import check_config, refuse_gradients
from fastmetro_kernels.tuning.choice import family_of

FAMILY = "9.0"
"""The compute capability on which `MEASURED` was measured."""


def convolution_join(
    x: Tensor,
    weights: ConvolutionWeights,
    second: Tensor,
    *,
    relu: bool = True,
    config: JoinConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """``act(conv_1x1(x) + conv_1x1(second) + bias)`` of channels_last images, for inference.

    What :func:`fastmetro_kernels.convolution.convolution` gives for such weights, by a kernel with large tiles. Sums
    are in float32 and rounded once. The order of additions is fixed: the same bits in every run.

    Args:
        x: ``[N, C, P, Q]`` float16 or bfloat16 (reference: any floating point type); other orders than channels_last
            are copied.
        weights: of :func:`lay_out` with a second convolution, of the dtype and device of x; the first is 1 x 1 of
            stride 1, without padding.
        second: ``[N, C2, H2, W2]``, input of the second convolution, whose stride makes P x Q of it.
        relu: whether act is ReLU.
        config: the tile instead of the measured one, for measurements (Triton).
        backend: ``"auto"`` (Triton with a given or a measured tile, see :func:`choose_join`, else the reference),
            ``"triton"`` or ``"reference"``.

    Returns:
        ``[N, O, P, Q]`` in the dtype of x, channels_last.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or weights that do not fit; a config that is none; an unknown backend.
        RuntimeError: an argument requires grad while gradients are enabled.
        BackendUnavailable: the named backend cannot take this input; the message lists the reasons.
    """
    chosen = choose_join(x, weights, second)
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be True or False, got {relu!r}")
    check_config(config, JoinConfig, partial(problem, channels=x.shape[1], second=second.shape[1]))
    named = {"weight": weights.weight, "bias": weights.bias, "second_weight": weights.second_weight}
    refuse_gradients("convolution_join", {"x": x, "second": second} | named)
    choices = {"reference": [], "triton": join_reasons(x.device, x.dtype)}
    order = ("triton", "reference") if config or chosen else ("reference",)
    if backends.select("convolution_join", backend, choices, order) == "reference":
        out = reference.convolution(x, weights, None, second, relu)
        return out.contiguous(memory_format=torch.channels_last)
    tile = config or chosen or ()
    out = torch.ops.fastmetro_kernels.convolution_join_triton(
        channels_last_rows(x), weights.weight, weights.bias, channels_last_rows(second), weights.second_weight,
        weights.second_stride, relu, list(tile),
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def choose_join(x: Tensor, weights: ConvolutionWeights, second: Tensor) -> JoinConfig | None:
    """The tile with which the kernel was measured to be faster than :func:`convolution`, or None: it is to take it.

    Args, Raises: as of :func:`convolution_join`.
    """
    layer = layer_of(x, weights, None, second)
    if wrong := join_problem(weights):
        raise ValueError(wrong)
    found = MEASURED.get((layer.shape.rows, layer.channels, layer.second, layer.outputs, weights.second_stride))
    if found is None or family_of(x.device) != FAMILY or join_reasons(x.device, x.dtype):
        return None
    return found


def join_problem(weights: ConvolutionWeights) -> str | None:
    """What keeps convolutions from being for this kernel, or None."""
    outputs, down, across, channels = weights.weight.shape
    if (down, across, weights.stride, weights.padding) != (1, 1, 1, 0):
        given = f"[{outputs}, {channels}, {down}, {across}] of stride {weights.stride} and padding {weights.padding}"
        return f"weights must be 1 x 1 of stride 1 without padding, got {given}"
    return None if weights.second_weight is not None else "weights must have a second convolution, got none"


@assumed_constant
def join_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the kernel cannot take inputs of this device and dtype; empty when it can."""
    found = list(backends.triton_reasons(device))
    if dtype not in (torch.float16, torch.bfloat16):
        found.append(f"takes float16 and bfloat16, got {dtype}")
    if dtype == torch.bfloat16 and device.type == "cpu":
        found.append("Triton's interpreter computes bfloat16 wrongly")
    return found


# `config` is a JoinConfig, or empty for the plain one.
torch.library.define(
    f"{NAMESPACE}::convolution_join_triton",
    "(Tensor x, Tensor weight, Tensor bias, Tensor second, Tensor second_weight, int second_stride, bool relu, "
    "int[] config) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    second: Tensor,
    second_weight: Tensor,
    second_stride: int,
    config: Sequence[int],
) -> None:
    """Shape, dtype and device rules of the op, in a form that tracing understands."""
    torch._check(x.dim() == 4 and second.dim() == 4, lambda: "x and second must be [N, H, W, C]")
    outputs = weight.size(0)
    for name, tensor, channels in (("weight", weight, x.size(3)), ("second_weight", second_weight, second.size(3))):
        expected = (outputs, 1, 1, channels)
        torch._check(
            tuple(tensor.shape) == expected,
            lambda name=name, tensor=tensor, expected=expected: f"{name} must be {expected}, got {tuple(tensor.shape)}",
        )
    torch._check(
        tuple(bias.shape) == (outputs,) and bias.dtype == torch.float32,
        lambda: f"bias must be float32 [{outputs}], got {bias.dtype} {tuple(bias.shape)}",
    )
    sizes = tuple((second.size(axis) - 1) // second_stride + 1 for axis in (1, 2))
    torch._check(
        second.size(0) == x.size(0) and sizes == (x.size(1), x.size(2)),
        lambda: f"second must give {tuple(x.shape[:3])} with a stride of {second_stride}, got {tuple(second.shape)}",
    )
    halves = x.dtype in (torch.float16, torch.bfloat16)
    torch._check(halves, lambda: f"x must be float16 or bfloat16, got {x.dtype}")
    named = {"x": x, "weight": weight, "bias": bias, "second": second, "second_weight": second_weight}
    for name, tensor in named.items():
        torch._check(tensor.is_contiguous(), lambda name=name: f"{name} must be contiguous")
        torch._check(tensor.device == x.device, lambda name=name: f"{name} must be on {x.device} like x")
        same = name == "bias" or tensor.dtype == x.dtype
        torch._check(same, lambda name=name: f"{name} must be {x.dtype} like x")
    if config:
        whole = len(config) == len(JoinConfig._fields)
        sizes = x.size(3), second.size(3)
        found = problem(JoinConfig(*config), *sizes) if whole else f"must be a JoinConfig, got {list(config)}"
        torch._check(found is None, lambda: f"config: {found}")


@torch.library.register_fake(f"{NAMESPACE}::convolution_join_triton")
def _fake(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    _check_arguments(x, weight, *(*others[:4], others[5]))  # all but relu
    return x.new_empty((*x.shape[:3], weight.size(0)))


def _convolution_join_triton(*arguments: Any) -> Tensor:
    from fastmetro_kernels.convolution import join_triton

    _check_arguments(*(*arguments[:6], arguments[7]))  # all but relu
    return join_triton.join(*arguments)


for _device in ("CPU", "CUDA"):
    torch.library.impl(f"{NAMESPACE}::convolution_join_triton", _device, _convolution_join_triton)
