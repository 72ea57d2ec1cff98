"""Which of this project's kernels a network trains with beside attention and upsampling."""

from __future__ import annotations

import torch
from torch import nn

from fastmetro.models.backbones.half_weights import keep_half_weights
from fastmetro.models.backbones.norm import fuse_batch_norms
from fastmetro.models.backbones.overlap import overlap_weight_gradients, take_own_stem
from fastmetro.models.half_matrices import keep_half_matrices
from fastmetro.models.transformer import fuse_transformer as fuse_layers
from fastmetro.training.step import Precision


def fuse_backbone(model: nn.Module, precision: Precision) -> None:
    """Let the backbone of a network train with fused kernels; nothing changes in its parameters and their names.

    - Batch norms take the residual and the ReLU with them, and the stem's max pool keeps one byte a window
      (:func:`~fastmetro.models.backbones.norm.fuse_batch_norms`).
    - Gradients of the convolutions' weights are computed on a second stream
      (:func:`~fastmetro.models.backbones.overlap.overlap_weight_gradients`).
    - ResNet's first convolution and the gradient of its weight are kernels of this project in half precision
      (:func:`~fastmetro.models.backbones.overlap.take_own_stem`).
    - In "bf16" the optimizer keeps these weights in bfloat16, too, for which it must be
      :class:`~fastmetro.training.optimizer.ClippedAdamW`
      (:func:`~fastmetro.models.backbones.half_weights.keep_half_weights`).

    Args:
        model: a network with a ``backbone``, or a backbone; its weights in float32.
        precision: of its forward pass.
    """
    backbone = getattr(model, "backbone", model)
    fuse_batch_norms(backbone)
    overlap_weight_gradients(backbone)
    take_own_stem(backbone)
    if precision == "bf16":
        keep_half_weights(backbone, torch.bfloat16)


def fuse_transformer(model: nn.Module, precision: Precision) -> None:
    """Let the transformers of a network train with fused kernels; nothing changes in its parameters and their names.

    - Residual sums, their dropout and the next layer norm are one op, as are ReLUs and their dropout
      (:func:`~fastmetro.models.transformer.fuse_transformer`).
    - In "bf16" the optimizer keeps the matrices in bfloat16, too, for which it must be
      :class:`~fastmetro.training.optimizer.ClippedAdamW` (:func:`~fastmetro.models.half_matrices.keep_half_matrices`).

    Args:
        model: a network with encoders and decoders; its weights in float32.
        precision: of its forward pass.
    """
    fuse_layers(model)
    if precision == "bf16":
        keep_half_matrices(model, torch.bfloat16)
