"""Body and hand models, their joints and their coarse-to-fine hierarchies."""

from fastmetro.meshes.mesh import Mesh, MeshLevel, load_mesh

__all__ = ["Mesh", "MeshLevel", "load_mesh"]
