"""What a network gives: the mesh that is measured, and whether it can be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FINE = "pred_3d_vertices_fine"
"""The key of the fine vertices among a network's outputs."""
NAMED = 5
"""Samples that a message names at most."""


def fine_vertices(output: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The fine vertices [B, M, 3] in metres, float32: of a network's outputs by name, or given alone.

    Raises:
        TypeError: neither a tensor nor a mapping that has them.
    """
    found = output.get(FINE) if isinstance(output, Mapping) else output
    if not isinstance(found, Tensor):
        given = f"a mapping of {sorted(output)}" if isinstance(output, Mapping) else f"a {type(output).__name__}"
        raise TypeError(f"predict must give a tensor of vertices, or a mapping with {FINE!r}, got {given}")
    return found.float()


def check_vertices(vertices: Tensor, count: int, names: Sequence[str], source: str) -> None:
    """Refuse vertices that no error can be taken of, and name the samples they belong to.

    Args:
        vertices: predicted ones, to be [B, M, 3].
        count: M, of the mesh.
        names: of the B samples, as the message is to call them.
        source: where the samples come from.

    Raises:
        ValueError: another shape, or a number that is not finite.
    """
    expected = (len(names), count, 3)
    if tuple(vertices.shape) != expected:
        raise ValueError(
            f"predicted vertices of {source} must have shape {list(expected)} (images, vertices of the mesh, 3), "
            f"got {list(vertices.shape)}"
        )
    finite = torch.isfinite(vertices).flatten(1).all(dim=1).tolist()
    bad = [name for name, good in zip(names, finite, strict=True) if not good]
    if bad:
        more = ", ..." if len(bad) > NAMED else ""
        raise ValueError(
            f"predicted vertices of {source} must be finite, but the network's output has NaN or infinity for "
            f"{len(bad)} of {len(names)} images of a batch: {', '.join(bad[:NAMED])}{more}"
        )
