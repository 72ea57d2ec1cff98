"""Any triangle mesh file, through trimesh, with a hierarchy of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from fastmetro.meshes.hierarchy import build_hierarchy
from fastmetro.meshes.mesh import Mesh

EXTREMES = ("min_x", "max_x", "min_y", "max_y", "min_z", "max_z")


def load_file(
    path: Path,
    sizes: Sequence[int] | None = None,
    joints: Any = None,
    joint_names: Sequence[str] | None = None,
    part: str = "body",
    importance: NDArray[np.floating] | None = None,
) -> Mesh:
    """`load_mesh("path.obj", ...)`: read a surface and simplify it.

    Units, axes and the order of the vertices are kept as they are (the triangles of an .stl are joined where corners
    coincide); networks and pictures expect metres, y up, facing +z.

    Args:
        path: any mesh file that trimesh reads; it should be one surface in a pose in which parts do not touch.
        sizes: vertices of the coarser levels, descending; by default (1723, 431), or (195,) for meshes of up to 1723
            vertices.
        joints: regressor [J, M] from the vertices, dense or scipy sparse. By default the six outermost vertices along
            the axes, named "min_x" to "max_z": enough to orient the mesh, no anatomy.
        joint_names: J names; by default "joint_0", ....
        part: "body" or "hand". Joints are compared relative to their mean.
        importance: see `build_hierarchy`.

    Raises:
        FileNotFoundError: no such file.
        TypeError, ValueError: no triangles in the file, a regressor that does not fit, or see `build_hierarchy`.
    """
    import trimesh

    if part not in ("body", "hand"):
        raise ValueError(f"part must be 'body' or 'hand', got {part!r}")
    loaded = trimesh.load_mesh(path, process=False, maintain_order=True, skip_materials=True)
    if not isinstance(loaded, trimesh.Trimesh) or len(loaded.faces) == 0:
        raise ValueError(f"{path} holds no single triangle mesh")
    if path.suffix.lower() == ".stl":  # it has no vertices of its own: every triangle brings three
        loaded.merge_vertices()
    vertices, faces = np.asarray(loaded.vertices, np.float64), np.asarray(loaded.faces, np.int64)
    if sizes is None:
        sizes = (1723, 431) if len(vertices) > 1723 else (195,)
    levels, upsampling = build_hierarchy(vertices, faces, sizes, importance)
    if joints is None:
        regressor, names = _extremes(vertices)
    else:
        regressor = sp.csr_matrix(joints, dtype=np.float32)
        names = (
            tuple(joint_names) if joint_names is not None else tuple(f"joint_{i}" for i in range(regressor.shape[0]))
        )
    if regressor.shape != (len(names), len(vertices)):
        raise ValueError(f"joints must be [{len(names)}, {len(vertices)}] as names and vertices, got {regressor.shape}")
    sums = np.asarray(regressor.sum(1)).ravel()
    if not np.allclose(sums, 1, atol=1e-3):
        raise ValueError(f"the rows of joints must sum to 1, got sums from {sums.min():.4g} to {sums.max():.4g}")
    return Mesh(path.stem, part, levels, upsampling, names, regressor, tuple(range(len(names))))


def _extremes(vertices: NDArray[np.float64]) -> tuple[sp.csr_matrix, tuple[str, ...]]:
    chosen = np.stack([vertices.argmin(0), vertices.argmax(0)], 1).ravel()
    ones = np.ones(len(chosen), np.float32)
    return sp.csr_matrix((ones, (np.arange(len(chosen)), chosen)), shape=(len(chosen), len(vertices))), EXTREMES
