"""Residual blocks shared by the convolutional backbones.

Parameter names are those of torchvision's ResNet (``conv1``, ``bn1``, ..., ``downsample.0``), which the published
HRNet uses too.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fastmetro.models.backbones.norm import norm_relu, twin_of
from fastmetro.models.backbones.overlap import convolve


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3 x 3 convolution with padding 1 and no bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """1 x 1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


def end_block(norm: nn.BatchNorm2d, y: Tensor, x: Tensor, projection: nn.Sequential | None) -> Tensor:
    """The last batch norm of a block, its sum with the shortcut from the block's input x, and the ReLU."""
    x = twin_of(x)
    if projection is None:
        return norm_relu(norm, y, residual=x, twin=True)
    convolution, of_shortcut = projection
    x = convolve(cast("nn.Conv2d", convolution), x)
    return norm_relu(norm, y, residual=x, residual_norm=cast("nn.BatchNorm2d", of_shortcut), twin=True)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a residual connection (He et al., CVPR 2016, figure 5 left).

    Args:
        in_channels: channels of the input.
        width: channels of both convolutions, and of the output.
        stride: stride of the first convolution.
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, h, w]`` to ``[B, width, h / stride, w / stride]``."""
        y = norm_relu(self.bn1, convolve(self.conv1, x))
        return end_block(self.bn2, convolve(self.conv2, y), x, self.downsample)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions with a residual connection (He et al., CVPR 2016, figure 5 right).

    The stride sits on the 3 x 3 convolution, as in torchvision.

    Args:
        in_channels: channels of the input.
        width: channels of the inner convolutions; the output has ``4 * width``.
        stride: stride of the 3 x 3 convolution.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, h, w]`` to ``[B, 4 * width, h / stride, w / stride]``."""
        y = norm_relu(self.bn1, convolve(self.conv1, x))
        y = norm_relu(self.bn2, convolve(self.conv2, y))
        return end_block(self.bn3, convolve(self.conv3, y), x, self.downsample)


def residual_stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, blocks: int, stride: int = 1
) -> nn.Sequential:
    """A run of ``blocks`` residual blocks; the first one has the stride and the change of width."""
    layers = [block(in_channels, width, stride)]
    layers += [block(width * block.expansion, width) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)


def init_convolutions(module: nn.Module) -> None:
    """Kaiming-normal convolutions (fan out); the last batch norm of every residual branch starts at zero.

    With a zero gain every block begins as its shortcut, which makes the first steps at a high learning rate
    stable (Goyal et al., 2017, section 5.1).
    """
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
    for child in module.modules():
        if isinstance(child, BasicBlock):
            nn.init.zeros_(child.bn2.weight)
        elif isinstance(child, Bottleneck):
            nn.init.zeros_(child.bn3.weight)
