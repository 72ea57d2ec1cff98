"""Measuring a network on a TSV data set, in one process or several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastmetro.data.ground_truth import GroundTruth
from fastmetro.data.labels import MeshLabels
from fastmetro.data.tsv import TsvSource
from fastmetro.data.tsv.batch import TsvBatch
from fastmetro.data.tsv.dataset import SkippedRow, TsvDataset, TsvSample
from fastmetro.data.tsv.loader import prepare_worker
from fastmetro.distributed import World
from fastmetro.evaluation.metrics import pa_mpjpe, point_error, root_position
from fastmetro.evaluation.outputs import check_vertices, fine_vertices
from fastmetro.evaluation.protocols import Protocol, check_part
from fastmetro.evaluation.samples import SampleErrors
from fastmetro.meshes.mesh import Mesh
from fastmetro.meshes.smpl import SMPL

MILLIMETRES = 1000.0

Predict = Callable[[Tensor], Tensor | Mapping[str, Tensor]]
"""Normalised images -> fine vertices, or outputs that hold them; see :func:`evaluate_tsv`."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a data set.

    Attributes:
        errors: of all samples.
        skipped: rows that could not be used, by problem.
        models: samples with true vertices, by the gender of the model that made them.
        joints, vertices: float32 [N, 21, 3] and [N, 778, 3] on the CPU, relative to the wrist, metres: what FreiHAND's
            server takes; None for bodies.
    """

    errors: SampleErrors
    skipped: dict[str, int] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)
    joints: Tensor | None = None
    vertices: Tensor | None = None


class _Numbered(Dataset):
    """The samples of a data set with the numbers of their rows."""

    def __init__(self, samples: TsvDataset) -> None:
        self.samples = samples

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[int, TsvSample | SkippedRow]]:
        return list(zip(rows, self.samples.__getitems__(rows), strict=True))

    def collate(self, items: Sequence[tuple[int, TsvSample | SkippedRow]]) -> tuple[Tensor, TsvBatch]:
        """The rows that can be used, and the batch of them."""
        rows = torch.tensor([row for row, item in items if isinstance(item, TsvSample)], dtype=torch.int64)
        batch = self.samples.collate([item for _, item in items])
        assert isinstance(batch, TsvBatch)
        return rows, batch


class Measure:
    """Errors of meshes by a protocol.

    Args:
        mesh: of the network.
        protocol: see :mod:`fastmetro.evaluation.protocols`.
        device: where it is computed.
        compat: joints of no confidence count, as in the released code. Else a sample counts only where all its joints
            have some: what stands in place of the others may be anything.

    Raises:
        ValueError: a mesh of the other kind, or without joint regressor.
    """

    def __init__(self, mesh: Mesh, protocol: Protocol, device: torch.device, compat: bool = False) -> None:
        check_part(protocol, mesh)
        if mesh.joint_regressor is None:
            raise ValueError(f"mesh {mesh.name!r} has no joint regressor")
        self.protocol, self.roots, self.compat = protocol, mesh.root_joints, compat
        self.regressor = torch.from_numpy(mesh.joint_regressor.toarray()).to(device, torch.float64)
        pelvis = mesh.regressors["h36m"][:1] if "h36m" in mesh.regressors else None
        self.pelvis = None if pelvis is None else torch.from_numpy(pelvis.toarray()).to(device, torch.float64)

    def origin(self, vertices: Tensor) -> Tensor:
        """[B, 1, 3], what vertices are taken relative to: the regressed pelvis of a body, else the root."""
        if self.pelvis is not None:
            return self.pelvis @ vertices
        return root_position(self.regressor @ vertices, self.roots)

    def __call__(self, rows: Tensor, vertices: Tensor, labels: MeshLabels) -> SampleErrors:
        """Errors of predicted vertices [B, M, 3] in metres, in float64, whether labels count or not."""
        predicted = vertices.double()
        joints = self.regressor @ predicted
        true_joints, truth = labels.joints_3d[..., :3].double(), labels.vertices.double()
        centred, true_centred = (x - root_position(x, self.roots) for x in (joints, true_joints))
        values = {
            "mpjpe": point_error(centred, true_centred),
            "pa_mpjpe": pa_mpjpe(joints, true_joints),
            "mpvpe": point_error(predicted - self.origin(predicted), truth - self.origin(truth)),
            "pa_mpvpe": pa_mpjpe(predicted, truth),
        }
        known = labels.has_joints_3d
        if not self.compat and labels.joints_3d.shape[-1] == 4:
            known = known & (labels.joints_3d[..., 3] > 0).all(dim=1)
        flags = {"has_joints": known.cpu(), "has_vertices": labels.has_vertices.cpu()}
        return SampleErrors(rows=rows, **{n: (MILLIMETRES * v).cpu() for n, v in values.items()}, **flags)

    def hand(self, vertices: Tensor) -> tuple[Tensor, Tensor]:
        """Joints and vertices relative to the wrist, float32 on the CPU."""
        joints = self.regressor @ vertices.double()
        root = root_position(joints, self.roots)
        return (joints - root).float().cpu(), (vertices.double() - root).float().cpu()


@torch.no_grad()
def evaluate_tsv(
    predict: Predict,
    source: TsvSource,
    truth: GroundTruth,
    mesh: Mesh,
    protocol: Protocol,
    device: torch.device,
    *,
    world: World | None = None,
    batch_size: int = 32,
    workers: int = 0,
    size: int = 224,
    count: int | None = None,
    compat: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Measure a network on the rows of a data set; every process calls this, and all get the whole result.

    Args:
        predict: normalised images [B, 3, size, size] -> fine vertices [B, M, 3] in metres, or the outputs of a network
            or an engine, which hold them as "pred_3d_vertices_fine".
        source: the rows.
        truth: makes the labels; on the device, and in float64 if the means are not to depend on the batches.
        mesh: of the network.
        protocol: how errors are taken.
        device: of the images.
        world: the processes; each measures every world.size-th batch, so that a sample has the same others beside it,
            and so the same bits, whatever their number.
        batch_size: images at a time, of each process.
        workers: processes that read ahead.
        size: side of the images.
        count: only the first so many rows; None: all of them.
        compat: crop as the released code does, and count joints of no confidence.
        progress: show a bar in the first process.

    Raises:
        ValueError: the mesh does not fit the protocol, a number is too small, there is no row that can be used, or
            predicted vertices have another shape than the mesh or are not finite.
        TypeError: ``predict`` gives something else.
    """
    _check_numbers(batch_size, workers, count)
    world = world or World()
    measure = Measure(mesh, protocol, device, compat)
    dataset = TsvDataset(source, protocol.kind, size=size, compat="published" if compat else None)
    rows = range(len(source) if count is None else min(len(source), count))
    batches = [list(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
    errors: list[SampleErrors] = []
    hands: list[tuple[Tensor, Tensor]] = []
    skipped: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for numbers, batch in _read(dataset, batches[world.rank :: world.size], workers, progress and world.first):
        skipped.update(batch.skipped)
        if not len(numbers):
            continue
        moved = batch.to(device)
        vertices = _checked(predict(moved.images), numbers, batch, mesh, source.path)
        labels = truth(moved)
        errors.append(measure(numbers, vertices, labels))
        made = labels.has_vertices.nonzero().flatten().tolist()
        models.update(truth.model_of(batch.genders[place]) for place in made)
        if protocol.kind == "hand":
            hands.append(measure.hand(vertices))
    return _gathered(world, errors, hands, skipped, models, protocol, source.path)


def _check_numbers(batch_size: int, workers: int, count: int | None) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("count", count, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _checked(output: Tensor | Mapping[str, Tensor], rows: Tensor, batch: TsvBatch, mesh: Mesh, path: Path) -> Tensor:
    """The vertices [B, M, 3] that a network gave for a batch; those that cannot be measured are refused by row."""
    vertices = fine_vertices(output)
    names = [f"row {row} ({key!r})" for row, key in zip(rows.tolist(), batch.keys, strict=True)]
    check_vertices(vertices, mesh.num_vertices, names, str(path))
    return vertices


def _read(
    dataset: TsvDataset, batches: list[list[int]], workers: int, progress: bool
) -> Iterator[tuple[Tensor, TsvBatch]]:
    from tqdm import tqdm

    numbered = _Numbered(dataset)
    # With a generator of its own: else it would draw from the one that a training's dropout goes on with.
    loader = DataLoader(
        numbered, batch_sampler=batches, num_workers=workers, collate_fn=numbered.collate,
        worker_init_fn=prepare_worker, generator=torch.Generator(),
    )  # fmt: skip
    return iter(tqdm(loader, disable=not progress, desc="evaluating"))


def _gathered(
    world: World,
    errors: Sequence[SampleErrors],
    hands: Sequence[tuple[Tensor, Tensor]],
    skipped: Counter[str],
    models: Counter[str],
    protocol: Protocol,
    path: Path,
) -> Evaluation:
    mine = (list(errors), list(hands), [int(row) for part in errors for row in part.rows], skipped, models)
    everyone = world.gather(mine)
    parts = [part for process in everyone for part in process[0]]
    if not parts:
        raise ValueError(f"{path} has no row that can be used")
    problems, used = (dict(sum((process[place] for process in everyone), Counter())) for place in (3, 4))
    result = SampleErrors.join(parts)
    if protocol.kind == "body":
        return Evaluation(result, problems, used)
    order = torch.tensor([row for process in everyone for row in process[2]]).argsort()
    joints, vertices = (
        torch.cat([hand[place] for process in everyone for hand in process[1]])[order] for place in (0, 1)
    )
    return Evaluation(result, problems, used, joints, vertices)


def body_of(network: nn.Module, smpl: SMPL) -> Callable[[Tensor], Tensor]:
    """The vertices of SMPL with the parameters that a network with such a head gives."""

    def vertices(images: Tensor) -> Tensor:
        found = network(images)
        body: Tensor = smpl(found["pred_rotmat"].float(), found["pred_betas"].float())[0]
        return body

    return vertices
