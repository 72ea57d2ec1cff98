"""`create_model`: a network by name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from fastmetro.models.backbones import create_backbone
from fastmetro.models.config import CONFIGS, DEFAULT_BACKBONES
from fastmetro.models.network import FastMETRO

if TYPE_CHECKING:
    from fastmetro.meshes.mesh import Mesh


def create_model(
    name: str,
    backbone: str | nn.Module | None = None,
    mesh: Mesh | str = "anny-body",
    upsampling: str = "fixed",
    attention: str = "auto",
    smpl_head: bool = False,
    *,
    masking: str = "all",
    dim_reduction: bool = True,
    dropout: float = 0.1,
    smpl_compat: bool = False,
) -> FastMETRO:
    """Build a FastMETRO network with random weights.

    Args:
        name: "fastmetro-s", "fastmetro-m", "fastmetro-l" (the paper) or "fastmetro-compact" (our own, for 16 MiB of
            bfloat16 weights); case does not matter.
        backbone: "resnet50", "hrnet-w64", "compact", or any module that maps images [B, 3, H, W] to features
            [B, C, h, w] with C = 2048 or its attribute ``out_channels``. Default: the compact trunk for the compact
            network, else ResNet-50.
        mesh: a mesh, or a name for ``fastmetro.load_mesh``.
        upsampling: "fixed", "released" or "learned"; see :class:`~fastmetro.models.config.FastMETROConfig`, also for
            the following.
        attention: "auto", "dense", "reference", "native" or "triton".
        smpl_head: add the SMPL parameter regressor.
        masking: "all", "half-heads" or "none".
        dim_reduction: False keeps the width of stage 1 in stage 2 (Table 4).
        dropout: in training.
        smpl_compat: the published determinant convention of the SMPL head.

    Raises:
        TypeError: ``backbone`` is neither a name nor a module.
        ValueError: an unknown name or option; the message lists what is accepted.
    """
    config = CONFIGS.get(name.lower())
    if config is None:
        raise ValueError(f"name must be one of {', '.join(map(repr, CONFIGS))}, got {name!r}")
    config = replace(
        config,
        masking=masking,
        upsampling=upsampling,
        attention=attention,
        dropout=dropout,
        smpl_head=smpl_head,
        smpl_compat=smpl_compat,
    )
    if not dim_reduction:
        (width, _), (feedforward, _) = config.widths, config.feedforward
        config = replace(config, widths=(width, width), feedforward=(feedforward, feedforward))
    if backbone is None:
        backbone = DEFAULT_BACKBONES[config.name]
    if isinstance(backbone, str):
        backbone = create_backbone(backbone)
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a name or an nn.Module, got {type(backbone).__name__}")
    if isinstance(mesh, str):
        from fastmetro.meshes import load_mesh

        mesh = load_mesh(mesh)
    return FastMETRO(config, backbone, mesh)
