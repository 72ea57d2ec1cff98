"""Meshes for the network tests: the published ones where their data lies beside the repository, and a tiny one."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from stand_in_mesh import StandInMesh

from fastmetro_kernels import TokenTopology


def _published(folder: Path, adjacency: str, sampling: str, steps: list[int], joints: int) -> StandInMesh:
    indices, values, size = (
        torch.load(folder / f"{adjacency}_adjmat_{part}.pt", weights_only=True)
        for part in ("indices", "values", "size")
    )
    matrix = sp.coo_array((values.numpy(), indices.numpy()), shape=tuple(size))
    with np.load(folder / sampling, allow_pickle=True, encoding="latin1") as archive:
        matrices = archive["U"]
    upsampling = tuple(sp.csr_matrix(matrices[step]) for step in steps)
    return StandInMesh(adjacency, TokenTopology.from_adjacency(matrix, num_hubs=joints), upsampling)


@pytest.fixture(scope="session")
def body(shared: Path) -> StandInMesh:
    """14 joints, 431 -> 1723 -> 6890 vertices."""
    return _published(shared / "data/fastmetro", "smpl_431", "mesh_downsampling.npz", [1, 0], 14)


@pytest.fixture(scope="session")
def hand(shared: Path) -> StandInMesh:
    """21 joints, 195 -> 778 vertices."""
    return _published(shared / "data/fastmetro", "mano_195", "mano_downsampling.npz", [0], 21)


def strip_mesh(joints: int, *sizes: int) -> StandInMesh:
    """A triangle strip with random upsampling matrices, `sizes` coarse to fine. Needs no data."""
    faces = [[i, i + 1, i + 2] for i in range(sizes[0] - 2)]
    rng = np.random.default_rng(0)

    def step(rows: int, columns: int) -> sp.csr_matrix:
        picks = np.stack([rng.choice(columns, 3, replace=False) for _ in range(rows)])
        weights = rng.dirichlet(np.ones(3), rows)
        return sp.csr_matrix((weights.ravel(), (np.repeat(np.arange(rows), 3), picks.ravel())), shape=(rows, columns))

    steps = tuple(step(fine, coarse) for coarse, fine in pairwise(sizes))
    return StandInMesh("strip", TokenTopology.from_faces(faces, sizes[0], num_hubs=joints), steps)


@pytest.fixture(scope="session")
def tiny() -> StandInMesh:
    """3 joints, 12 -> 20 -> 30 vertices."""
    return strip_mesh(3, 12, 20, 30)


@pytest.fixture(scope="session")
def body_sized() -> StandInMesh:
    """The sizes of the published body without its data: 14 joints, 431 -> 1723 -> 6890 vertices."""
    return strip_mesh(14, 431, 1723, 6890)


@pytest.fixture(scope="session")
def hand_sized() -> StandInMesh:
    """The sizes of the published hand without its data: 21 joints, 195 -> 778 vertices."""
    return strip_mesh(21, 195, 778)


@pytest.fixture(scope="session")
def recipe(shared: Path) -> ModuleType:
    """The module that fills state dicts with values that depend on names only."""
    spec = importlib.util.spec_from_file_location("golden_recipe", shared / "golden/recipe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
