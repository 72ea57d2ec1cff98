"""HRNet-W64 classification trunk (Wang et al., TPAMI 2019) with the published parameter names."""

from __future__ import annotations

import itertools
from typing import cast

from torch import Tensor, nn

from fastmetro.models.backbones.blocks import (
    BasicBlock,
    Bottleneck,
    conv1x1,
    conv3x3,
    init_convolutions,
    residual_stage,
)
from fastmetro.models.backbones.norm import norm_relu
from fastmetro.models.backbones.overlap import convolve

_BRANCH_WIDTHS = (64, 128, 256, 512)
_HEAD_WIDTHS = (32, 64, 128, 256)
_BLOCKS_PER_BRANCH = 4
_MODULES_PER_STAGE = {2: 1, 3: 4, 4: 3}


def _downscale(in_channels: int, out_channels: int, relu: bool) -> nn.Sequential:
    """Stride-2 3 x 3 convolution and batch norm, with or without a ReLU."""
    layers: list[nn.Module] = [conv3x3(in_channels, out_channels, stride=2), nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


def _exchange_path(source: int, target: int) -> nn.Module | None:
    """What brings branch ``source`` to the resolution and width of branch ``target``; None for the branch itself."""
    width_in, width_out = _BRANCH_WIDTHS[source], _BRANCH_WIDTHS[target]
    if source == target:
        return None
    if source > target:
        return nn.Sequential(
            conv1x1(width_in, width_out),
            nn.BatchNorm2d(width_out),
            nn.Upsample(scale_factor=2 ** (source - target), mode="nearest"),
        )
    steps = [_downscale(width_in, width_in, relu=True) for _ in range(target - source - 1)]
    return nn.Sequential(*steps, _downscale(width_in, width_out, relu=False))


class ExchangeModule(nn.Module):
    """Parallel branches of basic blocks, each then the sum of all branches at its own resolution.

    Args:
        num_branches: number of resolutions; branch ``i`` has ``64 * 2**i`` channels at ``1 / 2**(i + 2)`` scale.
    """

    def __init__(self, num_branches: int) -> None:
        super().__init__()
        branches = range(num_branches)
        widths = _BRANCH_WIDTHS[:num_branches]
        self.branches = nn.ModuleList(residual_stage(BasicBlock, width, width, _BLOCKS_PER_BRANCH) for width in widths)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_exchange_path(source, target) for source in branches)  # type: ignore[misc]
            for target in branches
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Map one feature map per branch to one feature map per branch, shapes unchanged."""
        features = [branch(x) for branch, x in zip(self.branches, inputs, strict=True)]
        outputs = []
        for paths in cast("list[nn.ModuleList]", list(self.fuse_layers)):
            terms = [x if path is None else path(x) for path, x in zip(paths, features, strict=True)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            outputs.append(self.relu(total))
        return outputs


class HRNetW64(nn.Module):
    """HRNet-W64 feature network: 128,059,944 parameters, the classifier included.

    ``[B, 3, H, W]`` float images, normalised with the ImageNet mean and deviation -> ``[B, 2048, H/32, W/32]``;
    H and W must be multiples of 32. ``classifier`` is never used and frozen: it is here because released
    checkpoints contain it and load strictly.
    """

    out_channels = 2048

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 64, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = conv3x3(64, 64, stride=2)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = residual_stage(Bottleneck, 64, 64, 4)

        # A transition keeps the branches it has (None) and makes the next one from the lowest resolution.
        first = nn.Sequential(conv3x3(256, 64), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
        self.transition1 = nn.ModuleList([first, nn.Sequential(_downscale(256, 128, relu=True))])
        self.stage2 = self._stage(2)
        self.transition2 = self._new_branch(2)
        self.stage3 = self._stage(3)
        self.transition3 = self._new_branch(3)
        self.stage4 = self._stage(4)

        self.incre_modules = nn.ModuleList(
            residual_stage(Bottleneck, width, head, 1) for width, head in zip(_BRANCH_WIDTHS, _HEAD_WIDTHS, strict=True)
        )
        head_outputs = [width * Bottleneck.expansion for width in _HEAD_WIDTHS]
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(fine, coarse, 3, stride=2, padding=1),
                nn.BatchNorm2d(coarse),
                nn.ReLU(inplace=True),
            )
            for fine, coarse in itertools.pairwise(head_outputs)
        )
        self.final_layer = nn.Sequential(
            nn.Conv2d(head_outputs[-1], self.out_channels, 1),
            nn.BatchNorm2d(self.out_channels),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(self.out_channels, 1000).requires_grad_(False)
        init_convolutions(self)

    @staticmethod
    def _stage(num_branches: int) -> nn.Sequential:
        return nn.Sequential(*(ExchangeModule(num_branches) for _ in range(_MODULES_PER_STAGE[num_branches])))

    @staticmethod
    def _new_branch(num_branches: int) -> nn.ModuleList:
        width_in, width_out = _BRANCH_WIDTHS[num_branches - 1 : num_branches + 1]
        new = nn.Sequential(_downscale(width_in, width_out, relu=True))
        return nn.ModuleList([*[None] * num_branches, new])  # type: ignore[list-item]

    def forward(self, images: Tensor) -> Tensor:
        """Return the merged feature map.

        Raises:
            ValueError: the image height or width is not a multiple of 32.
        """
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"images must have a height and width that are multiples of 32, got {height} x {width}")
        x = norm_relu(self.bn1, convolve(self.conv1, images))
        x = self.layer1(norm_relu(self.bn2, convolve(self.conv2, x)))
        features = self.stage2([transition(x) for transition in self.transition1])
        features = self.stage3([*features, self.transition2[-1](features[-1])])
        features = self.stage4([*features, self.transition3[-1](features[-1])])

        y = self.incre_modules[0](features[0])
        for merge, raise_width, feature in zip(
            self.downsamp_modules, self.incre_modules[1:], features[1:], strict=True
        ):
            y = raise_width(feature) + merge(y)
        return self.final_layer(y)
