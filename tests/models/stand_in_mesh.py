"""A mesh that a network can be made for. In a module of its own: pickles name that, and there are several conftests."""

from __future__ import annotations

from dataclasses import dataclass

import scipy.sparse as sp

from fastmetro_kernels import TokenTopology


@dataclass(frozen=True)
class StandInMesh:
    """The part of the mesh contract that a network reads."""

    name: str
    topology: TokenTopology
    upsampling: tuple[sp.csr_matrix, ...]
