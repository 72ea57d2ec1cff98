"""What an engine's parts have to do at least: multiply-adds, and bytes to and from memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmetro.models import FastMETRO
from fastmetro.models.upsampling import FixedUpsampling

GRID = 49
"""Image tokens of a 224 x 224 image."""
_IMAGE = (3, 224, 224)
_FEATURES = 2048


class Work(NamedTuple):
    """Of one call.

    Attributes:
        flop: multiplications and additions of products and attention, 2 per multiply-add.
        bytes: weights, inputs and outputs of the part, each moved once; what stays on the chip in between is free.
    """

    flop: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flop / self.bytes


def part_work(model: FastMETRO, batch: int, element_size: int) -> dict[str, Work]:
    """Work of the parts that ``Engine.parts`` names, after folding (``fastmetro.compile``).

    The image-independent prefix of the decoder is not counted, and attention only where the mask allows it. Keys and
    values of the decoder belong to the encoder, which makes them.

    Args:
        model: the network; its weights are not read.
        batch: images per call.
        element_size: bytes of weights and activations; heads and meshes are float32.
    """
    backbone_flop, backbone_weights = _convolutions(model.backbone)
    image, features = _IMAGE[0] * _IMAGE[1] * _IMAGE[2], GRID * _FEATURES
    width_1, width_2 = model.config.widths
    mesh, layers = model.num_joints + model.num_vertices, model.config.layers
    memory = GRID * 2 * layers * (width_1 + width_2)
    encoder_flop, encoder_weights = _encoders(model)
    decoder_flop, decoder_weights = _decoders(model)
    prefix = mesh * 2 * width_1  # learned tokens and their query, read by every call
    upsampling_flop, upsampling_bytes = _upsampling(model, batch)

    def moved(weights: float, per_image: float) -> float:
        return element_size * (weights + batch * per_image)

    parts = {
        "backbone": Work(batch * backbone_flop, moved(backbone_weights, image + features)),
        "encoder": Work(batch * encoder_flop, moved(encoder_weights, features + memory)),
        "decoder": Work(batch * decoder_flop, moved(decoder_weights + prefix, memory + mesh * width_2)),
        "upsampling": Work(upsampling_flop, moved(3 * width_2, mesh * width_2) + upsampling_bytes),
    }
    behind = [parts[name] for name in ("encoder", "decoder", "upsampling")]
    between = moved(0, 2 * (memory + mesh * width_2))  # handed from part to part, written and read
    whole = Work(sum(part.flop for part in behind), sum(part.bytes for part in behind) - between)
    return parts | {"after the backbone": whole}


def _convolutions(backbone: nn.Module) -> tuple[float, float]:
    """FLOP of one image and number of weights of all convolutions."""
    flop: list[float] = []
    weights: list[float] = []

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        size = module.weight.numel()
        flop.append(2 * size * output.shape[-2] * output.shape[-1])
        weights.append(size + output.shape[1])

    hooks = [m.register_forward_hook(count) for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    training = backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, *_IMAGE, device=next(backbone.parameters()).device))
    finally:
        backbone.train(training)
        for hook in hooks:
            hook.remove()
    return sum(flop), sum(weights)


def _encoders(model: FastMETRO) -> tuple[float, float]:
    """FLOP of one image and number of weights of both encoders, of the layers around them and of their readers."""
    tokens, config = GRID + 1, model.config
    flop: float = 2 * GRID * _FEATURES * config.widths[0]
    weights: float = _FEATURES * config.widths[0]
    for stage, (width, hidden) in enumerate(zip(config.widths, config.feedforward, strict=True)):
        layer = 4 * width**2 + 2 * width * hidden
        flop += config.layers * (2 * tokens * layer + 4 * tokens**2 * width)
        readers = 2 * config.layers * width**2
        reduction = config.widths[0] * config.widths[1] if stage == 0 else 0
        flop += 2 * GRID * (readers + reduction) + 2 * reduction  # the camera token's, too
        weights += config.layers * layer + readers + 2 * reduction
    return flop, weights


def _decoders(model: FastMETRO) -> tuple[float, float]:
    """FLOP of one image and number of weights of both decoders behind the constant prefix, with what is between."""
    config, mesh = model.config, model.num_joints + model.num_vertices
    heads, masked = config.heads, model.token_attention.masked_heads
    allowed = (int(model.token_attention.topology.mask().sum()) * masked + mesh**2 * (heads - masked)) / heads
    flop: float = 2 * mesh * config.widths[0] * config.widths[1]
    weights: float = config.widths[0] * config.widths[1]
    for stage, (width, hidden) in enumerate(zip(config.widths, config.feedforward, strict=True)):
        behind = width**2 + 2 * width * hidden  # output of the cross-attention, feed-forward block
        before = 5 * width**2  # query, key, value and output of the self-attention, query of the cross-attention
        whole = config.layers - (1 if stage == 0 else 0)
        cross = 4 * mesh * GRID * width
        flop += config.layers * (2 * mesh * behind + cross) + whole * (2 * mesh * before + 4 * allowed * width)
        weights += config.layers * behind + whole * before
    return flop, weights


def _upsampling(model: FastMETRO, batch: int) -> tuple[float, float]:
    """FLOP and float32 bytes of one call: coordinates of the mesh tokens, and the products that refine them."""
    mesh, width = model.num_joints + model.num_vertices, model.config.widths[1]
    multiplied, written, entries = mesh * width, mesh, 0
    for step in (model.coarse2intermediate_upsample, model.intermediate2fine_upsample, model.coarse2fine_upsample):
        if step is not None:
            vertices, count = _size(step)
            multiplied += count
            written += vertices
            entries += count
    return 2 * 3 * batch * multiplied, 4 * 3 * batch * written + 8 * entries  # an entry: its value and its column


def _size(step: nn.Module) -> tuple[int, int]:
    """Vertices that a step makes, and the entries of its matrix."""
    if isinstance(step, FixedUpsampling):
        return step.matrix.shape[0], step.matrix.nnz
    assert isinstance(step, nn.Linear)
    return step.out_features, step.weight.numel()
