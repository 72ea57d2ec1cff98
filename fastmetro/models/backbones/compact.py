"""The trunk of FastMETRO-Compact: basic blocks, most of them at 14 x 14, narrow enough for small devices."""

from __future__ import annotations

from torch import Tensor, nn

from fastmetro.models.backbones.blocks import BasicBlock, init_convolutions, residual_stage
from fastmetro.models.backbones.norm import norm_relu, pool
from fastmetro.models.backbones.overlap import convolve


class CompactTrunk(nn.Module):
    """Our own small ResNet: 2, 2, 3, 2 basic blocks of 48, 96, 192, 320 channels; see COMPACT in config.py.

    ``[B, 3, H, W]`` float images, normalised with the ImageNet mean and deviation -> ``[B, 320, H/32, W/32]``.
    Parameter names follow torchvision's ResNet.
    """

    out_channels = 320

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 48, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(48)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = residual_stage(BasicBlock, 48, 48, 2)
        self.layer2 = residual_stage(BasicBlock, 48, 96, 2, stride=2)
        self.layer3 = residual_stage(BasicBlock, 96, 192, 3, stride=2)
        self.layer4 = residual_stage(BasicBlock, 192, self.out_channels, 2, stride=2)
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature map of the last stage."""
        x = pool(self.bn1, self.maxpool, norm_relu(self.bn1, convolve(self.conv1, images)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))
