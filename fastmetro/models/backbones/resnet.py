"""ResNet-50 trunk (He et al., CVPR 2016) under torchvision's names and under those of released checkpoints."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, cast

from torch import Tensor, nn

from fastmetro.models.backbones.blocks import Bottleneck, init_convolutions, residual_stage
from fastmetro.models.backbones.norm import norm_relu, pool
from fastmetro.models.backbones.overlap import convolve

# Position of each child in the Sequential of released FastMETRO checkpoints.
_RELEASED_NAMES = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


class ResNet50(nn.Module):
    """ResNet-50 without pooling and classifier, with torchvision's parameter names: 23,508,032 parameters.

    ``[B, 3, H, W]`` float images, normalised with the ImageNet mean and deviation -> ``[B, 2048, H/32, W/32]``.
    The classifier of ImageNet weight files (``fc.weight``, ``fc.bias``) is skipped when they are loaded.
    """

    out_channels = 2048

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = residual_stage(Bottleneck, 64, 64, 3)
        self.layer2 = residual_stage(Bottleneck, 256, 128, 4, stride=2)
        self.layer3 = residual_stage(Bottleneck, 512, 256, 6, stride=2)
        self.layer4 = residual_stage(Bottleneck, 1024, 512, 3, stride=2)
        init_convolutions(self)
        self.register_load_state_dict_pre_hook(_skip_classifier_hook)

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature map of the last stage."""
        x = pool(self.bn1, self.maxpool, norm_relu(self.bn1, convolve(self.conv1, images)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class ResNet50Trunk(nn.Sequential):
    """The same trunk in the layout of released checkpoints: a Sequential, ``0`` = conv1, ..., ``7`` = layer4.

    ``state_dict`` has the released names; ``load_state_dict`` takes these or torchvision's, so that ImageNet
    weights load too. Input and output as :class:`ResNet50`.
    """

    out_channels = 2048

    def __init__(self) -> None:
        super().__init__(*ResNet50().children())
        self.register_load_state_dict_pre_hook(_torchvision_names_hook)

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature map of the last stage."""
        convolution, norm, _, maxpool, *stages = self
        norm = cast("nn.BatchNorm2d", norm)
        x = norm_relu(norm, convolve(cast("nn.Conv2d", convolution), images))
        x = pool(norm, cast("nn.MaxPool2d", maxpool), x)
        for layer in stages:
            x = layer(x)
        return x


def skip_classifier(state_dict: MutableMapping[str, Tensor], prefix: str) -> None:
    """Remove the classifier of ImageNet weights from a state dict that is about to be loaded."""
    for name in ("fc.weight", "fc.bias"):
        state_dict.pop(prefix + name, None)


def accept_torchvision_names(state_dict: MutableMapping[str, Tensor], prefix: str) -> None:
    """Give a torchvision ResNet's entries under `prefix` their released names; others stay."""
    if prefix + "conv1.weight" not in state_dict:
        return
    skip_classifier(state_dict, prefix)
    for key in [key for key in state_dict if key.startswith(prefix)]:
        child, _, rest = key[len(prefix) :].partition(".")
        state_dict[f"{prefix}{_RELEASED_NAMES.get(child, child)}.{rest}"] = state_dict.pop(key)


def _skip_classifier_hook(
    module: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str, *_unused: Any
) -> None:
    skip_classifier(state_dict, prefix)


def _torchvision_names_hook(
    module: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str, *_unused: Any
) -> None:
    accept_torchvision_names(state_dict, prefix)
