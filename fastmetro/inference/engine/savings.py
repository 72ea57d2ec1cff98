"""The folds of the transformers by name, with the work that each saves for one image."""

from __future__ import annotations

from fastmetro.inference.engine.report import Fold
from fastmetro.models.network import FastMETRO

_GRID = 49  # image tokens of a 224 x 224 image


def transformer_folds(model: FastMETRO) -> tuple[Fold, ...]:
    """What :class:`~fastmetro.inference.engine.transformers.FoldedTransformers` folds of `model`."""
    return (
        Fold(
            "decoder-prefix",
            "norm 1, self-attention, residual, norm 2 and cross-attention query of the first decoder layer: constants, "
            "because its tokens are learned parameters",
            _prefix_flops(model),
        ),
        Fold(
            "positions",
            "positional encodings times query and key weights: a bias per image token",
            _position_flops(model),
        ),
        Fold(
            "norm-affine",
            "gains and shifts of layer norms: part of the linear layers that read them",
            _norm_flops(model),
        ),
        Fold(
            "memory-projection",
            "keys and values of the cross-attention of all decoder layers of a stage, and the reduction of the image "
            "tokens: one product",
            0,
        ),
        Fold("inference-only", "dropout, masks and shared tokens for a batch: gone", 0),
    )


def _prefix_flops(model: FastMETRO) -> int:
    tokens, width = model.num_joints + model.num_vertices, model.config.widths[0]
    heads, masked = model.config.heads, model.token_attention.masked_heads
    topology = model.token_attention.topology
    allowed = int(topology.mask().sum()) * masked + tokens**2 * (heads - masked)
    projections = 2 * tokens * width * width * (3 + 1 + 1)  # query, key, value; output; cross-attention query
    scores = 2 * 2 * allowed * (width // heads)
    return projections + scores + tokens * width * (2 * _NORM_FLOPS + 1)


_NORM_FLOPS = 7
"""Of a layer norm with gain and shift, per number: sums of it and of its square (3), less the mean, over the deviation,
times the gain, plus the shift."""


def _position_flops(model: FastMETRO) -> int:
    """Additions: to queries and keys of every encoder layer at once, and to the keys of every decoder layer."""
    return sum(2 * model.config.layers * _GRID * width for width in model.config.widths)


def _norm_flops(model: FastMETRO) -> int:
    """Two of each number that a norm reads, without the two norms of the prefix."""
    config, mesh_tokens, image_tokens = model.config, model.num_joints + model.num_vertices, _GRID + 1
    total = 0
    for stage, width in enumerate(config.widths):
        decoder_norms = 3 * config.layers + 1 - (2 if stage == 0 else 0)
        encoder_norms = 2 * config.layers + 1
        total += 2 * width * (mesh_tokens * decoder_norms + image_tokens * encoder_norms)
    return total
