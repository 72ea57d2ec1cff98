"""The seam between the backbones and what computes them: one function per fused block of work.

The functions take activations [B, C, H, W] in channels_last and folded weights of the same floating point type, and
never write to their inputs. They know nothing of gradients: call them under ``torch.no_grad`` or
``torch.inference_mode``. Behind them is what was measured to be fastest:

- CUDA, float16 and bfloat16, small batches: the convolution kernel of `fastmetro_kernels`, which also takes a block's
  downsample branch as part of the block's last convolution; its table says where (`ConvolutionWeights.backend`);
- there, at large batches, for a block's last convolution and its downsample branch: another kernel with large tiles,
  where it was measured (`kernels.choose_join`);
- there, too, for all that is behind a bottleneck's first convolution: a kernel that keeps what lies between to itself,
  where it was measured (`kernels.choose_ending`);
- CUDA, float16 and bfloat16, else: cuDNN's fused convolution + bias (+ residual) + ReLU;
- CPU: oneDNN's, see ``onednn.py``;
- else, float32 on CUDA among it, whose TF32 setting is thereby the plain network's: `F.conv2d`, then in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro.inference.engine import onednn
from fastmetro.inference.engine.weights import (
    AUTO,
    LIBRARY,
    BlockWeights,
    ConvolutionWeights,
    DoubleStemWeights,
    ExchangeWeights,
    StemWeights,
)
from fastmetro_kernels import convolution as kernels
from fastmetro_kernels.convolution.stem import stem_reasons

_NO_DILATION = (1, 1)
MOST_RAW_IMAGES = 8
"""Images that a stem's kernel takes as they come, as far as it was measured to win: docs/kernels.md. Of many, a block
has several tiles, and the pixels of its next tile come beside other work, which reads through registers would lose."""


def convolution(x: Tensor, weights: ConvolutionWeights, relu: bool = False, residual: Tensor | None = None) -> Tensor:
    """Convolution + bias, + ``residual`` [B, O, h, w] if given, then ReLU if asked: [B, I, H, W] -> [B, O, h, w]."""
    if (y := _by_kernel(x, weights, relu, residual)) is not None:
        return y
    weight, bias, stride, padding = weights.weight, weights.bias, weights.stride, weights.padding
    if relu and _cudnn_fuses(x):
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, _NO_DILATION, 1)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, _NO_DILATION, 1)
    if (relu or residual is None) and onednn.usable(x):
        packed = weights.packs.get(weight, x.shape, stride, padding)
        if residual is None:
            return onednn.convolution_relu(x, packed, bias, stride, padding, relu)
        return onednn.convolution_add_relu(x, packed, bias, stride, padding, residual)
    y = F.conv2d(x, weight, bias, stride, padding)
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


def convolution_relu_add(x: Tensor, weights: ConvolutionWeights, residual: Tensor) -> Tensor:
    """ReLU of convolution + bias, and behind it + ``residual`` [B, O, h, w]: [B, I, H, W] -> [B, O, h, w]."""
    if (y := _by_kernel(x, weights, True, residual, late=True)) is not None:
        return y
    return convolution(x, weights, relu=True).add_(residual)


def _by_kernel(
    x: Tensor,
    weights: ConvolutionWeights,
    relu: bool,
    residual: Tensor | None = None,
    second: Tensor | None = None,
    second_weights: ConvolutionWeights | None = None,
    scale: int = 1,
    late: bool = False,
) -> Tensor | None:
    """As `convolution`, + the 1 x 1 convolution of a second input, all repeated in front of the residual.

    `late`: the residual is added behind the ReLU.

    None where this is not for the kernel's op.
    """
    if weights.backend == LIBRARY or (weights.backend == AUTO and not x.is_cuda):
        return None
    laid_out = weights.laid_out(second_weights)
    if laid_out is None:
        return None
    if weights.backend == AUTO and kernels.choose(x, laid_out, residual, second, scale) is None:
        return None
    return kernels.convolution(
        x, laid_out, residual=residual, second=second, relu=relu, late=late, scale=scale, backend=weights.backend
    )


def _cudnn_fuses(x: Tensor) -> bool:
    # ROCm answers to "cuda" too, without these operators.
    if not x.is_cuda or torch.version.hip is not None or not torch.backends.cudnn.enabled:
        return False
    return x.dtype in (torch.float16, torch.bfloat16) and torch.backends.cudnn.is_available()


def stem(x: Tensor, weights: StemWeights, mean: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """ResNet's beginning: 7 x 7 convolution of stride 2, ReLU, 3 x 3 max pooling of stride 2.

    One kernel wherever it can run, at every batch size.

    Args:
        x: images in channels_last and of the folded type; or as they come, see :func:`takes_raw`.
        mean, scale: float32 [3], for uint8 images: of (x - mean) * scale.
    """
    laid_out, backend = weights.laid_out_stem(), _stem_backend(x.device, weights)
    if laid_out is not None and backend != LIBRARY:
        return kernels.convolution_stem(x, laid_out, mean=mean, scale=scale, backend=backend)
    return F.max_pool2d(convolution(x, weights, relu=True), 3, stride=2, padding=1)


def double_stem(
    x: Tensor, weights: DoubleStemWeights, mean: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """HRNet's beginning: two 3 x 3 convolutions of stride 2, each with its ReLU.

    One kernel wherever it can run, at every batch size. Arguments as of :func:`stem`.
    """
    laid_out, backend = weights.laid_out(), _stem_backend(x.device, weights)
    if laid_out is not None and backend != LIBRARY:
        return kernels.convolution_double_stem(x, laid_out, mean=mean, scale=scale, backend=backend)
    return convolution(convolution(x, weights.first, relu=True), weights.second, relu=True)


def takes_raw(images: Tensor, weights: StemWeights | DoubleStemWeights) -> bool:
    """Whether a stem takes these images as they come: float32 [B, 3, H, W] or uint8 [B, H, W, 3], both contiguous."""
    raw = images.dtype == torch.uint8 or images.dtype == torch.float32 != weights.dtype
    if not raw or not images.is_contiguous() or len(images) > MOST_RAW_IMAGES or not weights.fits:
        return False
    return _stem_backend(images.device, weights) != LIBRARY


def _stem_backend(device: torch.device, weights: StemWeights | DoubleStemWeights) -> str:
    if weights.backend != AUTO:
        return weights.backend
    return "native" if device.type == "cuda" and not stem_reasons(device, weights.dtype) else LIBRARY


def bottleneck(x: Tensor, weights: BlockWeights) -> Tensor:
    """1 x 1, 3 x 3 and 1 x 1 convolution around a shortcut (He et al., CVPR 2016, figure 5 right)."""
    return _residual(x, weights, 3)


def basic_block(x: Tensor, weights: BlockWeights) -> Tensor:
    """Two 3 x 3 convolutions around a shortcut (He et al., CVPR 2016, figure 5 left)."""
    return _residual(x, weights, 2)


def residual_chain(x: Tensor, blocks: Sequence[BlockWeights]) -> Tensor:
    """Residual blocks one behind the other; a block's end and the next one's first convolution may be one kernel."""
    first: Tensor | None = None
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        inner = _first(x, block) if first is None else first
        x, first = block_end(inner, x, block, None if following is None else _layers(following)[0])
    return x


def block_end(
    inner: Tensor, x: Tensor, weights: BlockWeights, following: ConvolutionWeights | None = None
) -> tuple[Tensor, Tensor | None]:
    """All of a residual block that is behind its first convolution, and what follows it where a kernel makes both.

    Args:
        inner: what the first convolution gives, [B, I, h, w].
        x: the block's input.
        weights: of the block.
        following: the first convolution of the next block, if there is one.

    Returns:
        What the block gives, and what ``following`` gives of it, or None: it is still to be computed.
    """
    if (ended := _ended(inner, x, weights, following)) is not None:
        return ended
    for layer in _layers(weights)[1:-1]:
        inner = convolution(inner, layer, relu=True)
    both = None if following is None else _pair(inner, x, weights, following)
    return both or (_last(inner, x, weights), None)


def _layers(weights: BlockWeights) -> list[ConvolutionWeights]:
    return [cast(ConvolutionWeights, layer) for layer in weights.convolutions]


def _residual(x: Tensor, weights: BlockWeights, count: int) -> Tensor:
    if len(weights.convolutions) != count:
        raise ValueError(f"weights must be those of a block of {count} convolutions, got {len(weights.convolutions)}")
    return block_end(_first(x, weights), x, weights)[0]


def _first(x: Tensor, weights: BlockWeights) -> Tensor:
    """A block's first convolution."""
    return convolution(x, _layers(weights)[0], relu=True)


def _last(inner: Tensor, x: Tensor, weights: BlockWeights) -> Tensor:
    """A block's last convolution and its shortcut from the block's input."""
    last = _layers(weights)[-1]
    if weights.downsample is None:
        return convolution(inner, last, relu=True, residual=x)
    if (y := _joined(inner, x, last, weights.downsample)) is not None:
        return y
    if (y := _by_kernel(inner, last, relu=True, second=x, second_weights=weights.downsample)) is not None:
        return y
    return convolution(inner, last, relu=True, residual=convolution(x, weights.downsample))


def _joined(inner: Tensor, x: Tensor, last: ConvolutionWeights, branch: ConvolutionWeights) -> Tensor | None:
    """A block's last convolution and its downsample branch by the kernel for large batches, or None: it is not for it.

    Only where it was measured: a backend that is named is one of `kernels.convolution`.
    """
    if last.backend != AUTO or not inner.is_cuda:
        return None
    laid_out = last.laid_out(branch)
    if laid_out is None or kernels.join_problem(laid_out) is not None:
        return None
    tile = kernels.choose_join(inner, laid_out, x)
    return None if tile is None else kernels.convolution_join(inner, laid_out, x, config=tile)


def _pair(
    inner: Tensor, x: Tensor, weights: BlockWeights, following: ConvolutionWeights
) -> tuple[Tensor, Tensor] | None:
    """A block's end and the next block's first convolution in one kernel, or None: they are two."""
    last, branch = _layers(weights)[-1], weights.downsample
    if last.backend == LIBRARY or (last.backend == AUTO and not inner.is_cuda):
        return None
    laid_out, more = last.laid_out(branch), following.laid_out()
    if laid_out is None or more is None or kernels.pair_problem(laid_out, more) is not None:
        return None
    residual, second = (x, None) if branch is None else (None, x)
    if last.backend == AUTO and kernels.choose_pair(inner, laid_out, more, residual, second) is None:
        return None
    return kernels.convolution_pair(inner, laid_out, more, residual=residual, second=second, backend=last.backend)


def _ended(
    inner: Tensor, x: Tensor, weights: BlockWeights, following: ConvolutionWeights | None
) -> tuple[Tensor, Tensor | None] | None:
    """`block_end` of a bottleneck by one kernel, or None: it is not for it.

    Only where it was measured: a backend that is named is one of `kernels.convolution`. A following convolution that
    the kernel cannot take is left to others; one that it can is part of what must have been measured.
    """
    layers, branch = _layers(weights), weights.downsample
    if len(layers) != 3 or layers[-1].backend != AUTO or not inner.is_cuda:
        return None
    middle, last = layers[1].laid_out(), layers[2].laid_out(branch)
    if middle is None or last is None:
        return None
    more = None if following is None else following.laid_out()
    if more is not None and kernels.ending_problem(middle, last, more) is not None:
        more = None
    if kernels.ending_problem(middle, last, more) is not None:
        return None
    residual, second = (x, None) if branch is None else (None, x)
    if not kernels.choose_ending(inner, middle, last, more, residual, second):
        return None
    return kernels.convolution_ending(inner, middle, last, more, residual, second)


def exchange_output(features: Sequence[Tensor], weights: ExchangeWeights) -> Tensor:
    """One output of HRNet's exchange: ReLU of the sum of all branches, brought to the target's resolution.

    Coarser branches pass a 1 x 1 convolution and nearest upsampling, finer ones 3 x 3 convolutions of stride 2.

    Args:
        features: one map [B, 64 * 2**i, H / 2**i, W / 2**i] per branch i, finest first.
        weights: those of the target branch.

    Returns:
        A map shaped like that of the target branch.
    """
    target = weights.target
    paths = [[cast(ConvolutionWeights, layer) for layer in cast(Sequence, path)] for path in weights.paths]
    total = features[target]
    for source in range(target + 1, len(features)):
        finished = target == 0 and source == len(features) - 1
        total = repeated_convolution(features[source], paths[source][0], total, relu=finished)
    for source in range(target):
        term = features[source]
        for layer in paths[source][:-1]:
            term = convolution(term, layer, relu=True)
        total = convolution(term, paths[source][-1], relu=source == target - 1, residual=total)
    return total


def repeated_convolution(x: Tensor, weights: ConvolutionWeights, fine: Tensor, relu: bool) -> Tensor:
    """``fine`` [B, O, h s, w s] + convolution + bias [B, O, h, w], repeated to its size, then ReLU if asked."""
    if (y := _by_kernel(x, weights, relu, fine, scale=fine.shape[2] // x.shape[2])) is not None:
        return y
    y = _add_upsampled(fine, convolution(x, weights))
    return y.relu_() if relu else y


def _add_upsampled(fine: Tensor, coarse: Tensor) -> Tensor:
    """``fine`` + ``coarse`` repeated to its size, without the repeated map in memory."""
    height, width = coarse.shape[2:]
    out = torch.empty_like(fine)

    def cells(x: Tensor) -> Tensor:  # [B, C, h, rows of a cell, w, columns of a cell], a view
        return x.unflatten(3, (width, -1)).unflatten(2, (height, -1))

    torch.add(cells(fine), coarse[:, :, :, None, :, None], out=cells(out))
    return out
