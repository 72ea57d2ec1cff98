"""Measuring a network on held-out synthetic images: which images, joints and alignment, beside the mean mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmetro.data.labels import MeshLabels
from fastmetro.data.synthetic.dataset import SyntheticPeople, normalize_images
from fastmetro.distributed import World
from fastmetro.evaluation.metrics import MeanMetrics, mpjpe, pa_mpjpe, point_error, root_position
from fastmetro.evaluation.outputs import check_vertices, fine_vertices
from fastmetro.meshes.mesh import Mesh, load_mesh

HELD_OUT_SEED = 900_001
"""Seed of the held-out synthetic images; training refuses it."""
MEAN_MESH_SAMPLES = 2000
"""Training labels that the mean meshes are averaged from."""
SYNTHETIC_PROTOCOL = (
    "joints: the mesh's regressor on the fine vertices of prediction and truth; MPJPE and MPVPE recentred at the root "
    "joints; PA-MPJPE after a similarity transform without reflection; mean over images, millimetres"
)

SYNTHETIC_COUNT = 1000
"""Held-out images of an evaluation, where no other number is given."""
Predict = Callable[[Tensor, MeshLabels], Tensor | Mapping[str, Tensor]]
"""Normalised images [B, 3, H, W] and their labels (for baselines alone) -> fine vertices [B, M, 3] in metres, or the
outputs of a network, which hold them as "pred_3d_vertices_fine"."""


@dataclass(frozen=True)
class MeanMeshes:
    """Two meshes that know nothing of an image, both [M, 3], root-relative, in the camera's frame.

    ``camera`` averages the labels as they are, where bodies of all directions blur into each other; ``facing`` averages
    bodies that all face the camera upright, which keeps its limbs apart and is the harder one to beat after alignment.
    """

    camera: Tensor
    facing: Tensor


def mean_meshes(people: SyntheticPeople, count: int = MEAN_MESH_SAMPLES, batch_size: int = 100) -> MeanMeshes:
    """Average the first ``count`` bodies of ``people``, in float64.

    Raises:
        ValueError: if ``count`` or ``batch_size`` is less than 1.
    """
    camera = facing = torch.zeros((), dtype=torch.float64, device=people.faces.device)
    for indices in _batches(count, batch_size, people.faces.device):
        camera = camera + people.labels(indices).vertices.double().sum(dim=0) / count
        facing = facing + people.facing(indices).double().sum(dim=0) / count
    return MeanMeshes(camera.float(), facing.float())


def _check_counts(count: int, batch_size: int) -> None:
    if count < 1 or batch_size < 1:
        raise ValueError(f"count and batch_size must be at least 1, got {count} and {batch_size}")


def _batches(count: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    _check_counts(count, batch_size)
    for first in range(0, count, batch_size):
        yield torch.arange(first, min(first + batch_size, count), device=device)


def evaluate_vertices(
    predict: Predict,
    people: SyntheticPeople,
    count: int,
    batch_size: int,
    progress: bool = False,
    world: World | None = None,
) -> dict[str, float]:
    """mpjpe, pa_mpjpe and mpvpe in mm of ``predict`` on the first ``count`` images of ``people``.

    Of several processes each measures every world.size-th batch, and all get the means over all images, which do not
    depend on how many processes there are.

    Raises:
        TypeError: ``predict`` gives neither vertices nor outputs that hold them.
        ValueError: if ``count`` or ``batch_size`` is less than 1, or predicted vertices have another shape than the
            mesh or are not finite.
    """
    from tqdm import tqdm

    world = world or World()
    device = people.faces.device
    mine = list(_batches(count, batch_size, device))[world.rank :: world.size]
    found: list[tuple[int, dict[str, Tensor]]] = []
    for indices in tqdm(mine, disable=not (progress and world.first), desc="evaluating"):
        batch = people(indices)
        predicted = fine_vertices(predict(normalize_images(batch.images), batch.labels))
        names = [f"image {number}" for number in indices.tolist()]
        check_vertices(predicted, batch.labels.vertices.shape[1], names, f"synthetic people of seed {people.seed}")
        errors = mesh_errors(predicted, batch.labels.vertices, people.joint_regressor, people.root_joints)
        found.append((int(indices[0]), {name: value.double().cpu() for name, value in errors.items()}))
    parts = sorted((part for process in world.gather(found) for part in process), key=lambda part: part[0])
    meter = MeanMetrics()
    for _, errors in parts:
        meter.update(**errors)
    return meter.compute()


def mesh_errors(predicted: Tensor, truth: Tensor, regressor: Tensor, roots: tuple[int, ...]) -> dict[str, Tensor]:
    """Per-sample mpjpe, pa_mpjpe and mpvpe in mm, [B] each, of meshes [B, M, 3] in metres."""
    joints, true_joints = regressor @ predicted, regressor @ truth
    return {
        "mpjpe": 1000 * mpjpe(joints, true_joints, roots),
        "pa_mpjpe": 1000 * pa_mpjpe(joints, true_joints),
        "mpvpe": 1000
        * point_error(predicted - root_position(joints, roots), truth - root_position(true_joints, roots)),
    }


@torch.no_grad()
def evaluate_synthetic(
    model: nn.Module | None,
    count: int = SYNTHETIC_COUNT,
    seed: int = HELD_OUT_SEED,
    device: torch.device | str | None = None,
    *,
    mesh: Mesh | str = "anny-body",
    batch_size: int = 50,
    baselines: bool = True,
    training_seed: int = 0,
    photographs: bool = True,
    size: int = 224,
    progress: bool = False,
    world: World | None = None,
) -> dict[str, object]:
    """Measure a network on synthetic images it has never seen, beside the mean meshes of the training people.

    Args:
        model: takes normalised images and returns the published output keys; it is put into evaluation mode for the
            time of the call and runs in its own precision. None measures the baselines only.
        count: how many images.
        seed: of the images.
        device: where the images are made; the model's own by default, the CPU without a model.
        mesh: the body the model predicts, or its name.
        batch_size: images at a time; it changes the numbers by rounding only.
        baselines: also measure the two mean meshes.
        training_seed: seed of the people whose labels are averaged. One seed for all, so that networks trained on
            others are held against the same mean mesh.
        photographs, size: as in :class:`SyntheticPeople`.
        progress: show a bar, in the first process.
        world: the processes, which share the images; all of them call this, and get the same.

    Returns:
        ``mpjpe``, ``pa_mpjpe``, ``mpvpe`` in mm of the model; the same three of each baseline under ``mean_mesh`` and
        ``mean_mesh_facing``; ``count``, ``seed`` and ``protocol``.

    Raises:
        TypeError: the outputs of ``model`` have no "pred_3d_vertices_fine".
        ValueError: if ``count`` or ``batch_size`` is less than 1, ``seed`` is ``training_seed``, or the vertices of
            ``model`` have another shape than the mesh or are not finite.
    """
    _check_counts(count, batch_size)
    if seed == training_seed:
        raise ValueError(f"seed {seed} is the training seed: its images are not held out")
    mesh = load_mesh(mesh) if isinstance(mesh, str) else mesh
    if device is None:
        device = next(model.parameters()).device if model is not None else "cpu"
    people = SyntheticPeople(mesh, seed, size, photographs).to(device)
    report: dict[str, object] = {"count": count, "seed": seed, "protocol": SYNTHETIC_PROTOCOL}
    if model is not None:
        network, was_training = model, model.training
        network.eval()
        try:
            errors = evaluate_vertices(lambda images, _: network(images), people, count, batch_size, progress, world)
            report.update(errors)
        finally:
            network.train(was_training)
    if baselines:
        means = mean_meshes(SyntheticPeople(mesh, training_seed, photographs=False).to(device))
        report["mean_mesh"] = _evaluate_constant(means.camera, people, count, batch_size)
        report["mean_mesh_facing"] = _evaluate_constant(means.facing, people, count, batch_size)
    return report


def _evaluate_constant(mesh: Tensor, people: SyntheticPeople, count: int, batch_size: int) -> dict[str, float]:
    meter = MeanMetrics()
    for indices in _batches(count, batch_size, mesh.device):
        truth = people.labels(indices).vertices  # a constant needs no images
        meter.update(**mesh_errors(mesh.expand_as(truth), truth, people.joint_regressor, people.root_joints))
    return meter.compute()


def format_report(report: dict[str, object]) -> str:
    """The report as a table for people, with the rule it follows."""
    rows = [f"{'synthetic:':<22}{'MPJPE':>10}{'PA-MPJPE':>10}{'MPVPE':>10}   (mm)"]
    entries = [("network", report), ("mean mesh", report.get("mean_mesh")),
               ("mean mesh, facing", report.get("mean_mesh_facing"))]  # fmt: skip
    for name, entry in entries:
        if isinstance(entry, dict) and "mpjpe" in entry:
            rows.append(f"{name:<22}" + "".join(f"{entry[key]:>10.2f}" for key in ("mpjpe", "pa_mpjpe", "mpvpe")))
    rows.append(f"{report['count']} synthetic images of seed {report['seed']}; {report['protocol']}")
    return "\n".join(rows)
