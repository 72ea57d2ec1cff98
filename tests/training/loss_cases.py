"""Small meshes, random batches, and the losses once more: float64, one number after the other."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict

import numpy as np
import scipy.sparse as sp
import torch
from scipy.spatial import ConvexHull

from fastmetro.data.labels import MeshLabels
from fastmetro.meshes.hierarchy import face_edges
from fastmetro.meshes.mesh import Mesh, MeshLevel
from fastmetro.training.losses import LossWeights

SIZES = {"body": (23, 13, 7), "hand": (17, 9)}
JOINTS = {"body": 5, "hand": 4}
ROOTS = {"body": (2, 3), "hand": (0,)}
NAMES = {2: ("fine", "coarse"), 3: ("fine", "intermediate", "coarse")}


def small_mesh(part: str = "body") -> Mesh:
    """Levels are hulls of random points with one face cut out, so that there are edges of one face and of two."""
    rng = np.random.default_rng(7)
    sizes, levels = SIZES[part], []
    for number, size in enumerate(sizes):
        points = rng.normal(size=(size, 3))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        faces = ConvexHull(points).simplices[1:].astype(np.int64)
        kept = np.sort(rng.permutation(sizes[number - 1])[:size]) if number else np.arange(size)
        levels.append(MeshLevel(points.astype(np.float32), faces, face_edges(faces), kept))
    count = JOINTS[part]

    def regressor(rows: int) -> sp.csr_matrix:
        # Multiples of 1/16: exact in float32, also after the root is subtracted.
        return sp.csr_matrix(rng.integers(-2, 5, size=(rows, sizes[0])).astype(np.float32) / 16)

    return Mesh(
        name="small",
        part=part,
        levels=tuple(levels),
        upsampling=(),
        joint_names=tuple(str(joint) for joint in range(count)),
        joint_regressor=regressor(count),
        root_joints=ROOTS[part],
        regressors={"h36m": regressor(6)} if part == "body" else {},
    )


def random_outputs(
    mesh: Mesh, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)

    outputs = {"pred_cam": random(3), "pred_3d_joints": random(len(mesh.joint_names), 3)}
    for name, level in zip(NAMES[len(mesh.levels)], mesh.levels, strict=True):
        outputs[f"pred_3d_vertices_{name}"] = random(level.num_vertices, 3)
    return outputs


def random_labels(
    mesh: Mesh, batch: int, seed: int = 0, confidence: bool = True, dtype: torch.dtype = torch.float64
) -> MeshLabels:
    """Labels of which some are absent: those of a sample by its flag, single joints by a confidence of 0."""
    rng = np.random.default_rng(seed)
    joints = len(mesh.joint_names)

    def confidences() -> np.ndarray:
        return rng.choice([0.0, 0.25, 0.5, 1.0, 1.0], size=(batch, joints, 1))

    def flags() -> torch.Tensor:
        return torch.from_numpy(rng.permutation(np.arange(batch) % 3 > 0))

    joints_3d = rng.normal(size=(batch, joints, 3))
    if confidence:
        joints_3d = np.concatenate([joints_3d, confidences()], axis=-1)
        joints_3d[::2, list(mesh.root_joints), 3] = 1.0
    joints_2d = np.concatenate([rng.normal(size=(batch, joints, 2)), confidences()], axis=-1)
    return MeshLabels(
        vertices=torch.from_numpy(rng.normal(size=(batch, mesh.num_vertices, 3))).to(dtype),
        joints_3d=torch.from_numpy(joints_3d).to(dtype),
        joints_2d=torch.from_numpy(joints_2d).to(dtype),
        camera=torch.ones(batch, 3, dtype=dtype),
        has_vertices=flags(),
        has_joints_3d=flags(),
        has_joints_2d=flags(),
    )


def without(labels: MeshLabels, value: float, published: bool = False) -> MeshLabels:
    """The same labels; whatever is absent holds ``value``.

    ``published`` leaves alone what the released code reads although it is marked as absent: all coordinates of 3D
    joints in samples that have some, and the 2D joints of samples without ``has_joints_2d``.
    """
    vertices, joints_3d, joints_2d = labels.vertices.clone(), labels.joints_3d.clone(), labels.joints_2d.clone()
    vertices[~labels.has_vertices] = value
    joints_3d[~labels.has_joints_3d] = value
    if published:
        joints_2d[..., :2][joints_2d[..., 2] == 0] = value
    else:
        joints_2d[..., :2][joints_2d[..., 2] == 0] = value
        joints_2d[~labels.has_joints_2d] = value
        if joints_3d.shape[-1] == 4:
            joints_3d[..., :3][joints_3d[..., 3] == 0] = value
    return dataclasses.replace(labels, vertices=vertices, joints_3d=joints_3d, joints_2d=joints_2d)


def loops(
    mesh: Mesh,
    weights: LossWeights,
    published: bool,
    outputs: dict[str, torch.Tensor],
    labels: MeshLabels,
) -> dict[str, float]:
    """All terms, whatever their weights."""
    out = {name: value.detach().double().numpy() for name, value in outputs.items()}
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for item in range(len(labels.vertices)):
        sample = {name: value[item] for name, value in out.items()}
        _joint_terms(mesh, weights, published, sample, labels, item, sums, counts)
        if labels.has_vertices[item]:
            truth = labels.vertices[item].double().numpy()
            _vertex_terms(mesh, weights, published, sample, truth, sums, counts)
    return {name: sums[name] / counts[name] if counts[name] else 0.0 for name in counts}


def _origin(mesh, fine):
    if "h36m" in mesh.regressors:
        return mesh.regressors["h36m"].toarray().astype(np.float64)[0] @ fine
    joints = mesh.joint_regressor.toarray().astype(np.float64) @ fine
    return np.mean([joints[root] for root in mesh.root_joints], axis=0)


def _joint_terms(mesh, weights, published, sample, labels, item, sums, counts):
    fine, (scale, *shift) = sample["pred_3d_vertices_fine"], sample["pred_cam"]
    regressed = mesh.joint_regressor.toarray().astype(np.float64) @ fine
    goal = labels.joints_3d[item, :, :3].double().numpy()
    count = len(goal)
    confidence = np.ones(count)
    if labels.joints_3d.shape[-1] == 4:
        confidence = labels.joints_3d[item, :, 3].double().numpy()
    has_3d = bool(labels.has_joints_3d[item])
    if weights.centred and has_3d and not published:
        has_3d = all(confidence[root] > 0 for root in mesh.root_joints)
    if weights.centred:
        goal = goal - np.mean([goal[root] for root in mesh.root_joints], axis=0)
    for source, joints in (("token", sample["pred_3d_joints"]), ("mesh", regressed)):
        centred = joints - np.mean([joints[root] for root in mesh.root_joints], axis=0)
        compared = centred if weights.centred else joints
        projected = compared
        if weights.centred and published and source == "mesh":
            projected = joints - _origin(mesh, fine)
        name = f"{source}_joints_3d"
        counts[name] += 0
        if has_3d:
            counts[name] += 3 * count if published else 0
            for joint in range(count):
                if confidence[joint] > 0:
                    counts[name] += 0 if published else 3 * confidence[joint]
                    for axis in range(3):
                        sums[name] += confidence[joint] * abs(compared[joint, axis] - goal[joint, axis])
        name = f"{source}_joints_2d"
        counts[name] += 2 * count if published else 0
        for joint in range(count):
            x, y, visible = labels.joints_2d[item, joint].double().tolist()
            if visible > 0 and (published or labels.has_joints_2d[item]):
                counts[name] += 0 if published else 2 * visible
                for axis, target in enumerate((x, y)):
                    sums[name] += visible * abs(scale * (projected[joint, axis] + shift[axis]) - target)


def _vertex_terms(mesh, weights, published, sample, truth, sums, counts):
    origin, true_origin = _origin(mesh, sample["pred_3d_vertices_fine"]), _origin(mesh, truth)
    if not weights.centred:
        origin = true_origin = np.zeros(3)
    elif published and mesh.part == "hand":
        true_origin = np.zeros(3)
    goal = truth
    for name, level in zip(NAMES[len(mesh.levels)], mesh.levels, strict=True):
        goal = goal[level.kept]
        prediction = sample[f"pred_3d_vertices_{name}"]
        for vertex in range(len(goal)):
            for axis in range(3):
                error = (prediction[vertex, axis] - origin[axis]) - (goal[vertex, axis] - true_origin[axis])
                sums[f"vertices_{name}"] += abs(error)
                counts[f"vertices_{name}"] += 1
        if name == weights.surface_level:
            _surface_terms(level, published, mesh.part, prediction, goal, sums, counts)


def _surface_terms(level, published, part, prediction, truth, sums, counts):
    def length(points, pair):
        squares = sum((points[pair[0], axis] - points[pair[1], axis]) ** 2 for axis in range(3))
        return math.sqrt(squares + 1e-8) if published else math.sqrt(squares)

    def unit(vector):
        return vector / max(np.linalg.norm(vector), 1e-12)

    sides = [pair for a, b, c in level.faces for pair in ((a, b), (a, c), (b, c))]
    for pair in sides if published and part == "hand" else level.edges:
        sums["edge_lengths"] += abs(length(prediction, pair) - length(truth, pair))
        counts["edge_lengths"] += 1
    lengths = [length(prediction, pair) for pair in level.edges]
    mean = sum(lengths) / len(lengths)
    for value in lengths:
        sums["edge_self"] += value if published else abs(value - mean)
        counts["edge_self"] += 1
    for a, b, c in level.faces:
        normal = unit(np.cross(truth[b] - truth[a], truth[c] - truth[a]))
        for start, end in ((a, b), (a, c), (b, c)):
            sums["normals"] += abs(float(unit(prediction[end] - prediction[start]) @ normal))
            counts["normals"] += 1
