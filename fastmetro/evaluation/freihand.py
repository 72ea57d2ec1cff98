"""FreiHAND's protocol: the file of predictions that its server takes, and its scores.

Zimmermann et al., "FreiHAND: A Dataset for Markerless Capture of Hand Pose and Shape from Single RGB Images", ICCV
2019, section 5: mean error and area under the curve of correct points (0 to 5 cm) of joints and mesh, and F-scores of
the mesh at 5 and 15 mm (Knapitsch et al. 2017), each as predicted and after a similarity transform. Predictions of
FastMETRO are relative to the wrist, so that only the aligned scores mean something.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fastmetro.files import replacing

JOINTS, VERTICES = 21, 778
MAX_BYTES = 2 << 30
"""Of a file of predictions, unpacked."""
_CURVE = (0.05, 100)  # metres, steps
_F_THRESHOLDS = {"5": 0.005, "15": 0.015}  # metres
_BATCH = 64


def write_predictions(path: str | Path, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Write pred.json, or a .zip with it: [joints of all samples, vertices of all samples], metres.

    The file appears when all is written.

    Args:
        path: .json or .zip; missing folders are made.
        batches: joints [B, 21, 3] and vertices [B, 778, 3] of consecutive samples.

    Returns:
        The number of samples.

    Raises:
        ValueError: another ending of the name or another shape, or a number that is not finite.
    """
    path = Path(path)
    check_name(path)
    joints, vertices = [], []
    for number, (some_joints, some_vertices) in enumerate(batches):
        _check(some_joints, (JOINTS, 3), f"joints of batch {number}")
        _check(some_vertices, (VERTICES, 3), f"vertices of batch {number}")
        joints.append(some_joints.detach().cpu().double().numpy())
        vertices.append(some_vertices.detach().cpu().double().numpy())
    with replacing(path) as temporary:
        if path.suffix == ".zip":
            zipped = zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED)
            with zipped as archive, archive.open("pred.json", "w", force_zip64=True) as file:
                _write(file, joints, vertices)
        else:
            with temporary.open("wb") as file:
                _write(file, joints, vertices)
    return sum(map(len, joints))


def check_name(path: Path) -> None:
    """Raise where :func:`write_predictions` would for the ending of the name.

    Raises:
        ValueError: it is another than .json and .zip.
    """
    if path.suffix not in (".json", ".zip"):
        raise ValueError(f"predictions must end in .json or .zip, got {path.name!r}")


def _write(file: IO[bytes], *parts: list[np.ndarray]) -> None:
    """Sample by sample: a list of all in one text would take a gigabyte."""
    for number, part in enumerate(parts):
        file.write(b"[" if number == 0 else b", ")
        samples = (sample for batch in part for sample in batch)
        for index, sample in enumerate(samples):
            rounded = np.round(sample, 7).tolist()  # a tenth of a micrometre
            file.write((b"[" if index == 0 else b", ") + json.dumps(rounded).encode())
        file.write(b"]" if any(map(len, part)) else b"[]")
    file.write(b"]\n")


def read_predictions(path: str | Path) -> tuple[Tensor, Tensor]:
    """Joints [N, 21, 3] and vertices [N, 778, 3] of pred.json, or of a .zip that holds it, as float64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold what the server expects; the message tells what is wrong.
    """
    content = _load(Path(path))
    if not isinstance(content, list) or len(content) != 2:
        raise ValueError(f"{path} must hold a list of joints and vertices")
    return _points(content[0], JOINTS, f"{path}: joints"), _points(content[1], VERTICES, f"{path}: vertices")


def truth_files(folder: Path) -> tuple[Path, Path]:
    """Where the official truth of joints and that of vertices lie in its folder."""
    return folder / "evaluation_xyz.json", folder / "evaluation_verts.json"


def read_truth(joints: str | Path, vertices: str | Path) -> tuple[Tensor, Tensor]:
    """evaluation_xyz.json [N, 21, 3] and evaluation_verts.json [N, 778, 3], as float64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file does not hold these points, or they are of different numbers of samples.
    """
    points = (
        _points(_load(Path(joints)), JOINTS, str(joints)),
        _points(_load(Path(vertices)), VERTICES, str(vertices)),
    )
    if len(points[0]) != len(points[1]):
        counts = f"{len(points[0])} and {len(points[1])}"
        raise ValueError(f"{joints} and {vertices} must have as many samples each, got {counts}")
    return points


def _load(path: Path) -> object:
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} must be a file, got {'a folder' if path.is_dir() else 'no plain file'}")
    try:
        return json.loads(_unpacked(path))
    # RuntimeError: an encrypted archive, nesting that is too deep. ValueError: also integers of too many digits.
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _unpacked(path: Path) -> bytes:
    if path.suffix != ".zip":
        _check_size(path.stat().st_size)
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        if "pred.json" not in archive.namelist():
            raise ValueError(f"it must hold pred.json, got {archive.namelist()[:5]}")
        entry = archive.getinfo("pred.json")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"pred.json must be stored or deflated, got compression method {entry.compress_type}")
        _check_size(entry.file_size)
        return archive.read(entry)


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"it holds {size} bytes, at most {MAX_BYTES} are read")


def _points(content: object, count: int, name: str) -> Tensor:
    try:
        array = np.array(content, dtype=np.float64)
    except (OverflowError, TypeError, ValueError):
        raise ValueError(f"{name} must be [N, {count}, 3] numbers") from None
    points = torch.from_numpy(array)
    _check(points, (count, 3), name)
    return points


def _check(points: Tensor, shape: tuple[int, ...], name: str) -> None:
    if points.ndim != 3 or tuple(points.shape[1:]) != shape:
        raise ValueError(f"{name} must be [N, {shape[0]}, {shape[1]}], got {list(points.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError(f"{name} must be finite")


def score(joints: Tensor, vertices: Tensor, true_joints: Tensor, true_vertices: Tensor) -> dict[str, float]:
    """The scores under the names and in the order of the official script: errors in cm, the others from 0 to 1.

    Computed in float64 on the device of `joints`.

    Args:
        joints, true_joints: [N, 21, 3], metres.
        vertices, true_vertices: [N, 778, 3], metres.

    Raises:
        ValueError: other shapes, no sample, or numbers that are not finite.
    """
    for name, points, count in (
        ("joints", joints, JOINTS), ("vertices", vertices, VERTICES), ("true_joints", true_joints, JOINTS),
        ("true_vertices", true_vertices, VERTICES),
    ):  # fmt: skip
        _check(points, (count, 3), name)
        if len(points) != len(joints) or not len(points):
            raise ValueError(f"{name} must have as many samples as joints, one at least, got {len(points)}")
    errors: dict[str, list[Tensor]] = {}
    for start in range(0, len(joints), _BATCH):
        part = slice(start, start + _BATCH)
        pairs = (
            ("xyz", joints[part].double(), true_joints[part].to(joints).double()),
            ("mesh", vertices[part].double(), true_vertices[part].to(joints).double()),
        )
        for name, predicted, truth in pairs:
            for infix, moved in (("", predicted), ("_al", align(predicted, truth))):
                errors.setdefault(f"{name}{infix}", []).append((moved - truth).norm(dim=-1))
                if name == "mesh":
                    distances = torch.cdist(truth, moved, compute_mode="donot_use_mm_for_euclid_dist")
                    for label, threshold in _F_THRESHOLDS.items():
                        errors.setdefault(f"f{infix}_score_{label}", []).append(_f_score(distances, threshold))
    scores = {}
    for name in ("xyz", "xyz_al", "mesh", "mesh_al"):
        whole = torch.cat(errors[name])
        scores[f"{name}_mean3d"] = 100 * whole.mean().item()
        scores[f"{name}_auc3d"] = _area(whole)
    for label in _F_THRESHOLDS:
        for name in (f"f_score_{label}", f"f_al_score_{label}"):
            scores[name] = torch.cat(errors[name]).mean().item()
    return scores


def align(points: Tensor, truth: Tensor) -> Tensor:
    """The similarity transform of points [B, N, 3] nearest to truth, as the official script takes it.

    With scale, and unlike :func:`~fastmetro.evaluation.metrics.procrustes_align` also with reflections.
    """
    mean, true_mean = points.mean(1, keepdim=True), truth.mean(1, keepdim=True)
    points, truth = points - mean, truth - true_mean
    left, singular, right = torch.linalg.svd(points.transpose(1, 2) @ truth)
    spread = points.square().sum((1, 2)).clamp_min(torch.finfo(points.dtype).tiny)
    scale = singular.sum(1) / spread
    return scale.view(-1, 1, 1) * (points @ (left @ right)) + true_mean


def _f_score(distances: Tensor, threshold: float) -> Tensor:
    """Harmonic mean of precision and recall, [B], of distances [B, truth, prediction]."""
    near = [(distances.amin(dim) < threshold).double().mean(1) for dim in (1, 2)]
    return 2 * near[0] * near[1] / (near[0] + near[1]).clamp_min(torch.finfo(torch.float64).tiny)


def _area(errors: Tensor) -> float:
    """Area under the curve of correct points over thresholds from 0 to 5 cm, as a share of the whole."""
    most, steps = _CURVE
    thresholds = torch.linspace(0, most, steps, dtype=torch.float64, device=errors.device)
    ordered = errors.flatten().sort().values
    correct = torch.searchsorted(ordered, thresholds, right=True).double() / len(ordered)
    return (torch.trapezoid(correct, thresholds) / most).item()
