"""Convolutions whose weights' gradients are computed on a second stream, beside the rest of the backward pass.

Nothing in a backward pass waits for them, and many kernels of a backbone's last stages do not fill a GPU. So they may
run at the same time as the gradients of inputs and of batch norms. Under a CUDA graph they become a branch of it.
"""

from __future__ import annotations

import collections
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastmetro.models.backbones.half_weights import half_copy, usable_copy
from fastmetro_kernels.adamw import same_layout
from fastmetro_kernels.convolution import convolution_stem, lay_out_stem
from fastmetro_kernels.convolution.stem import choose_stem, has_warpgroups, stem_reasons
from fastmetro_kernels.image_weight_gradient import image_weight_gradient

_OVERLAPPED = "gradient_overlaps"
_OWN_STEM = "own_stem"
STEM = (64, 3, 7, 7)
"""Shape of the weight of ResNet's first convolution, for which this project has a kernel."""
WINDOW = 8
"""Convolutions whose inputs and gradients the second stream may still read when more come: then the first one waits for
the oldest group of them."""
GROUP = 8
"""Convolutions whose weights' gradients go to the second stream together: a fork of the graph for each costs more."""


def overlap_weight_gradients(module: nn.Module, overlapped: bool = True) -> int:
    """Let the convolutions of residual blocks and stems compute their weights' gradients on a second stream.

    The gradients are the same. They are put into ``weight.grad`` by the convolution: hooks of the parameters are not
    called, and ``torch.autograd.grad`` does not return them. When ``backward`` returns, the stream that called it waits
    for them. On a CPU they are computed in turn. Copies of the module keep the choice.

    Where a weight has a half-precision copy in autocast's dtype (:func:`~.half_weights.keep_half_weights`), that is
    used instead of a cast, and the first gradient is left in the copy's ``grad`` as it is. A second one adds both up in
    ``weight.grad``.

    ``torch.compile`` cannot trace this: :func:`call_backbone` leaves such a backbone out, so that the rest of a network
    is compiled all the same.

    Returns:
        How many convolutions the module has.
    """
    for layer in module.modules():
        setattr(layer, _OVERLAPPED, overlapped)
    return sum(isinstance(layer, nn.Conv2d) for layer in module.modules())


def take_own_stem(module: nn.Module, taken: bool = True) -> None:
    """Let ResNet's first convolution, where it overlaps, be this project's kernels on a GPU, forward and backward.

    In half precision; sums are in float32 and rounded once, as cuDNN's, but not bit for bit the same.
    """
    for layer in module.modules():
        setattr(layer, _OWN_STEM, taken)


def call_backbone(backbone: nn.Module, images: Tensor) -> Tensor:
    """``backbone(images)``, never traced where its weights' gradients are computed on a second stream."""
    if torch.compiler.is_compiling() and backbone.training and getattr(backbone, _OVERLAPPED, False):
        from fastmetro.models.backbones.eager import call_eagerly  # which imports the compiler

        return call_eagerly(backbone, images)
    return cast(Tensor, backbone(images))


def convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """``convolution(x)``, with the weight's gradient as :func:`overlap_weight_gradients` says."""
    weight = convolution.weight
    wanted = getattr(convolution, _OVERLAPPED, False) and convolution.training and convolution.bias is None
    wanted = wanted and convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    if wanted and torch.is_grad_enabled() and weight.requires_grad:
        return cast(Tensor, _Convolution.apply(x, weight, convolution))
    return cast(Tensor, convolution(x))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, convolution: nn.Conv2d) -> Tensor:
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        x, used = x.to(dtype), _in_dtype(weight, dtype)
        padding = cast("tuple[int, ...]", convolution.padding)
        options = (convolution.stride, padding, convolution.dilation, convolution.groups)
        ctx.save_for_backward(x, used)
        own = getattr(convolution, _OWN_STEM, False) and x.is_cuda and x.numel() and _is_stem(used, options)
        ctx.own = own and not stem_reasons(x.device, dtype)
        ctx.parameter, ctx.options = weight, options
        if ctx.own:
            return _stem(x, used)
        return torch.nn.functional.conv2d(x, used, None, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        found = None
        if ctx.needs_input_grad[0]:  # first: others wait for it
            found = _gradient(grad, x, weight, ctx.options, 0)
        compute = functools.partial(_own_gradient if ctx.own else _weight_gradient, grad, x, weight, ctx.options)
        if _has_streams(grad):
            _of(grad.device).add(_Work(ctx.parameter, compute, (grad, x, weight)))
        else:
            _accumulate(ctx.parameter, compute())
        return found, None, None


def _has_streams(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _is_stem(weight: Tensor, options: tuple[Any, ...]) -> bool:
    """Whether it is ResNet's first convolution, which cuDNN takes 195 microseconds for with 32 images of 224 x 224."""
    return weight.shape == STEM and tuple(map(tuple, options[:3])) == ((2, 2), (3, 3), (1, 1)) and options[3] == 1


@torch.no_grad()
def _stem(x: Tensor, weight: Tensor) -> Tensor:
    weights = lay_out_stem(weight, torch.zeros(weight.shape[0], device=weight.device))
    height, width = (-(-size // 4) for size in x.shape[2:])
    config = choose_stem(x.shape[0], height, width, warpgroups=has_warpgroups(x.device))
    # Not before the kernel in front has ended: that is the one that laid out the weights.
    return convolution_stem(x.detach(), weights, pooled=False, config=config._replace(early=False), backend="native")


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's copy, made anew if it is of an earlier weight; else a cast."""
    kept = usable_copy(weight, dtype)
    if kept is None:
        return weight.detach().to(dtype)
    if kept.is_stale(weight):
        kept.refresh(weight)
    return kept.tensor


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...], which: int) -> Tensor:
    """Of the input (0) or of the weight (1)."""
    stride, padding, dilation, groups = options
    mask = [number == which for number in range(3)]
    given = (grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask)
    return torch.ops.aten.convolution_backward(*given)[which]


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Tensor:
    return _gradient(grad, x, weight, options, 1)


@torch.no_grad()
def _own_gradient(grad: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Tensor:
    """Of the stem's weight, for which cuDNN takes 143 microseconds with 32 images of 224 x 224."""
    (stride, _), (padding, _), _, _ = options
    return image_weight_gradient(x, grad.to(x.dtype), kernel=weight.shape[2], stride=stride, padding=padding)


@torch.no_grad()
def _accumulate(parameter: Tensor, found: Tensor) -> None:
    """Adds to the parameter's gradient, which has its layout: optimizers expect that.

    The first gradient goes to the parameter's copy in this dtype, if an optimizer looks for it there.
    """
    kept = usable_copy(parameter, found.dtype)
    if kept is not None and kept.tensor.grad is None and parameter.grad is None and kept.fits(parameter):
        kept.tensor.grad = found if same_layout(found, parameter) else torch.empty_like(kept.tensor).copy_(found)
        return
    if (kept := half_copy(parameter)) is not None:
        kept.settle(parameter)
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter).copy_(found)
    else:
        parameter.grad.add_(found)


class _Work(NamedTuple):
    """A weight, what computes its gradient, and what that reads."""

    parameter: Tensor
    compute: Callable[[], Tensor]
    read: tuple[Tensor, ...]


class _Pass:
    """A backward pass, with what waits for the second stream and what that still reads.

    The engine keeps it as long as the pass goes on: what waits is gone with a pass that fails.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device, self._stream = device, stream
        self._waiting: list[_Work] = []
        self._kept: collections.deque[tuple[torch.cuda.Event, list[_Work]]] = collections.deque()

    def add(self, work: _Work) -> None:
        """Compute it, or let it wait for more."""
        self._waiting.append(work)
        if len(self._waiting) >= GROUP:
            self._compute()

    def join(self) -> None:
        """Compute what still waits, and let the current stream wait for all."""
        if self._waiting:
            self._compute()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._kept.clear()

    @torch.no_grad()
    def _compute(self) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for work in self._waiting:
                _accumulate(work.parameter, work.compute())
        # Their memory may be used for something else once the current stream has waited for the second one.
        self._kept.append((self._stream.record_event(), self._waiting))
        self._waiting = []
        if len(self._kept) * GROUP > WINDOW:
            event, _ = self._kept.popleft()
            current.wait_event(event)


class _SecondStream:
    """Of a device, and the backward passes that use it: one inside another, as checkpoints make, or of threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._passes: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()

    def add(self, work: _Work) -> None:
        """Called in a backward pass, by the one thread that works for the device."""
        number = torch._C._current_graph_task_id()
        found = self._passes.get(number)
        if found is None:
            found = self._passes[number] = _Pass(self._device, self._stream)
            torch.autograd.Variable._execution_engine.queue_callback(found.join)
        found.add(work)


_streams: dict[torch.device, _SecondStream] = {}
_lock = threading.Lock()


def _of(device: torch.device) -> _SecondStream:
    with _lock:
        if device not in _streams:
            _streams[device] = _SecondStream(device)
        return _streams[device]
