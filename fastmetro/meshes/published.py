"""The SMPL and MANO meshes with the hierarchies of the published FastMETRO code, from its data files.

The files are read from where the user keeps them; none comes with this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from fastmetro.meshes.hierarchy import face_edges
from fastmetro.meshes.mesh import HAND_21, J14, ROOTS, Mesh, MeshLevel
from fastmetro.meshes.unpickle import read_object_npz

H36M_TO_J14 = (3, 2, 1, 4, 5, 6, 16, 15, 14, 11, 12, 13, 8, 10)  # of the 17 joints of Human3.6M
# J24 among the 24 joints of SMPL followed by the 14 of J_regressor_extra.npy (the published JOINTS_IDX)
SMPL_TO_J24 = (8, 5, 29, 30, 4, 7, 21, 19, 17, 16, 18, 20, 31, 32, 33, 34, 35, 36, 37, 24, 26, 25, 28, 27)
MANO_TIPS = (745, 317, 445, 556, 673)  # thumb to little finger; 445 is what the published code uses
MANO_TO_HAND = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)  # 16 joints, then the tips
SIZES = {"smpl": (6890, 1723, 431), "mano": (778, 195)}
ARCHIVES = {"smpl": "mesh_downsampling.npz", "mano": "mano_downsampling.npz"}
NEIGHBOURS = {"smpl": 3005, "mano": 1331}


def load_published(name: str, data: Path, model_file: str | Path | None = None) -> Mesh:
    """`load_mesh("smpl" | "mano", data=...)`.

    The coarsest topology is exactly that of the published adjacency files, and the upsampling matrices are the
    published ones: the rows of the body's finest step sum to 0.918 to 1.022, not to 1.

    Args:
        name: "smpl" or "mano".
        data: folder with mesh_downsampling.npz, smpl_431_adjmat_*.pt, J_regressor_h36m_correct.npy and
            J_regressor_extra.npy, or mano_downsampling.npz and mano_195_adjmat_*.pt.
        model_file: the licensed SMPL or MANO_RIGHT model (.pkl or .npz) if at hand. It adds the template vertices of
            SMPL, the regressors "smpl" and "j24" of SMPL, and the joint regressor of MANO. Without it the mesh of
            SMPL has no vertices and that of MANO no joint regressor.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a file does not fit, or holds anything but arrays.
    """
    sizes = SIZES[name]
    if not (data / ARCHIVES[name]).is_file():
        raise FileNotFoundError(
            f"no file {data / ARCHIVES[name]}: data= (on the command line the option that ends in mesh-data) must be "
            "the folder of data files of the published FastMETRO repository, src/modeling/data"
        )
    archive = read_object_npz(data / ARCHIVES[name], _keys(name))
    template, model = _template(name, archive, model_file)
    levels: list[MeshLevel] = []
    upsampling = []
    adjacency = _coarse_adjacency(data, name)
    for number, size in enumerate(sizes):
        kept = np.arange(size)
        if number:
            kept = _gather(archive["D"][number - 1], sizes[number - 1], size, name)
            upsampling.append(_matrix(archive["U"][number - 1], (sizes[number - 1], size), f"{name}: U[{number - 1}]"))
        faces = np.asarray(archive["F"][number]).astype(np.int64)
        if faces.ndim != 2 or faces.shape[1] != 3 or faces.min() < 0 or faces.max() >= size:
            raise ValueError(f"{name}: faces of level {number} do not fit {size} vertices")
        edges = _adjacency_edges(adjacency) if number == len(sizes) - 1 else face_edges(faces)
        if template is not None and number:
            template = template[kept]
        levels.append(MeshLevel(template, faces, edges, kept))
    part = "body" if name == "smpl" else "hand"
    regressors = _body_regressors(data, model) if part == "body" else _hand_regressors(model)
    return Mesh(
        name=name,
        part=part,
        levels=tuple(levels),
        upsampling=tuple(reversed(upsampling)),
        joint_names=J14 if part == "body" else HAND_21,
        joint_regressor=regressors.pop("tokens", None),
        root_joints=ROOTS[part],
        regressors=regressors,
    )


def _keys(name: str) -> tuple[str, ...]:
    return ("U", "D", "F") if name == "smpl" else ("U", "D", "F", "V")


def _template(
    name: str, archive: dict[str, Any], model_file: str | Path | None
) -> tuple[NDArray[np.float32] | None, dict[str, Any] | None]:
    model = None
    if model_file is not None:
        from fastmetro.meshes.smpl import read_model

        model = read_model(Path(model_file), name)
        return model["v_template"].astype(np.float32), model
    if name == "mano":
        vertices = np.asarray(archive["V"][0], np.float32)
        if vertices.shape != (778, 3):
            raise ValueError(f"mano: V[0] must be [778, 3], got {list(vertices.shape)}")
        return vertices, None
    return None, None


def _coarse_adjacency(data: Path, name: str) -> sp.csr_matrix:
    """The adjacency whose non-zeros are the decoder's allowed pairs of vertices, [N, N] with self loops."""
    size = SIZES[name][-1]
    stem = f"{name}_{size}_adjmat"
    parts = {}
    for key in ("indices", "values", "size"):
        path = data / f"{stem}_{key}.pt"
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            parts[key] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            raise ValueError(f"{path} was refused: {error}") from None
    if tuple(parts["size"]) != (size, size):
        raise ValueError(f"{stem}_size.pt must say {size} x {size}, says {tuple(parts['size'])}")
    indices, values = parts["indices"].numpy(), parts["values"].numpy()
    matrix = sp.csr_matrix((values, (indices[0], indices[1])), shape=(size, size))
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    pattern = matrix != 0
    if (pattern != pattern.T).nnz or not matrix.diagonal().all():
        raise ValueError(f"{stem}: the adjacency must be symmetric with self loops")
    if matrix.nnz != NEIGHBOURS[name]:
        raise ValueError(f"{stem}: {NEIGHBOURS[name]} neighbours expected, got {matrix.nnz}")
    return matrix


def _adjacency_edges(adjacency: sp.csr_matrix) -> NDArray[np.int64]:
    upper = sp.triu(adjacency, k=1).tocoo()
    return np.unique(np.stack([upper.row, upper.col], 1).astype(np.int64), axis=0)


def _gather(matrix: Any, fine: int, coarse: int, name: str) -> NDArray[np.int64]:
    """The indices that a published downsampling matrix, one 1 per row, gathers."""
    csr = _matrix(matrix, (coarse, fine), f"{name}: D")
    csr.eliminate_zeros()
    if not np.array_equal(np.diff(csr.indptr), np.ones(coarse)):
        raise ValueError(f"{name}: D must have one entry per row")
    return csr.indices.astype(np.int64)


def _matrix(matrix: Any, shape: tuple[int, int], what: str) -> sp.csr_matrix:
    if not sp.issparse(matrix) or matrix.shape != shape:
        raise ValueError(
            f"{what} must be a sparse matrix of shape {shape}, got {getattr(matrix, 'shape', type(matrix))}"
        )
    csr = sp.csr_matrix(matrix, dtype=np.float32)
    csr.sum_duplicates()
    csr.sort_indices()
    if not np.isfinite(csr.data).all():
        raise ValueError(f"{what} must be finite")
    return csr


def _body_regressors(data: Path, model: dict[str, Any] | None) -> dict[str, sp.csr_matrix]:
    h36m = _dense_regressor(data / "J_regressor_h36m_correct.npy", (17, 6890))
    result = {"tokens": h36m[list(H36M_TO_J14)], "h36m": h36m}
    if model is not None:
        extra = _dense_regressor(data / "J_regressor_extra.npy", (14, 6890))
        result["smpl"] = sp.csr_matrix(model["J_regressor"], dtype=np.float32)
        result["j24"] = sp.vstack([result["smpl"], extra]).tocsr()[list(SMPL_TO_J24)]
    return result


def _hand_regressors(model: dict[str, Any] | None) -> dict[str, sp.csr_matrix]:
    if model is None:
        return {}
    joints = sp.csr_matrix(model["J_regressor"], dtype=np.float32)
    tips = sp.csr_matrix((np.ones(5, np.float32), (np.arange(5), MANO_TIPS)), shape=(5, 778))
    return {"tokens": sp.vstack([joints, tips]).tocsr()[list(MANO_TO_HAND)], "mano": joints}


def _dense_regressor(path: Path, shape: tuple[int, int]) -> sp.csr_matrix:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    array = np.load(path, allow_pickle=False)
    if array.shape != shape:
        raise ValueError(f"{path} must be {list(shape)}, got {list(array.shape)}")
    return sp.csr_matrix(array, dtype=np.float32)
