"""The losses of a training step, forward and backward: term by term, and as the package computes them.

    python -m bench losses [--mesh anny-body] [--batch 32 256] [--rounds 9] [--device cuda] [--csv FILE]

Each as it is and compiled, on random outputs and labels of which some are absent. Totals and gradients are held against
float64 first. On a GPU each is a CUDA graph; microseconds, timed in turn. "floor" is reading outputs and labels and
writing the gradients once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.convolution.measure import Timer, take_in_turn
from bench.fused.basis import BYTES_PER_SECOND
from fastmetro.data.labels import MeshLabels
from fastmetro.meshes.mesh import Mesh, load_mesh
from fastmetro.training.losses import LossWeights, MeshRecoveryLoss

COLUMNS = ("mesh", "batch", "contender", "us", "floor_us", "times_ours", "largest_error")
LEVELS = {2: ("fine", "coarse"), 3: ("fine", "intermediate", "coarse")}
"""Names by their number."""
Loss = Callable[[Mapping[str, Tensor], MeshLabels], tuple[Tensor, dict[str, Tensor]]]


class TermByTerm:
    """The default losses one after the other: mask, replace what is absent, mean, and add to the total."""

    def __init__(self, mesh: Mesh, weights: LossWeights, device: torch.device) -> None:
        assert mesh.joint_regressor is not None
        self.weights = weights
        self.regressor = torch.from_numpy(mesh.joint_regressor.toarray()).float().to(device)
        self.levels: list[tuple[str, Tensor]] = []
        kept = torch.arange(mesh.num_vertices)
        for name, level in zip(LEVELS[len(mesh.levels)], mesh.levels, strict=True):
            kept = kept[torch.as_tensor(level.kept)]
            self.levels.append((name, kept.to(device)))

    def __call__(self, outputs: Mapping[str, Tensor], labels: MeshLabels) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and its unweighted terms."""
        weights, camera = self.weights, outputs["pred_cam"]
        total, terms = torch.zeros((), device=camera.device, dtype=camera.dtype), {}

        def add(
            name: str, factor: float, found: Tensor, true: Tensor, valid: Tensor, confidence: Tensor | None = None
        ) -> None:
            nonlocal total
            weight = valid.to(found.dtype).view(-1, 1, 1)
            if confidence is not None:
                weight = weight * confidence.unsqueeze(-1)
            error = (found - torch.where(weight > 0, true, found.detach())).abs() * weight
            terms[name] = error.sum() / weight.expand_as(found).sum().clamp_min(1.0)
            total = total + factor * terms[name]

        regressed = self.regressor.to(camera.dtype) @ outputs["pred_3d_vertices_fine"]
        image, visible = labels.joints_2d[..., :2], labels.joints_2d[..., 2]
        for source, joints in {"token": outputs["pred_3d_joints"], "mesh": regressed}.items():
            factor_3d, factor_2d = getattr(weights, f"{source}_joints_3d"), getattr(weights, f"{source}_joints_2d")
            projected = camera[:, None, :1] * (joints[..., :2] + camera[:, None, 1:])
            add(f"{source}_joints_3d", factor_3d, joints, labels.joints_3d, labels.has_joints_3d)
            add(f"{source}_joints_2d", factor_2d, projected, image, labels.has_joints_2d, visible)
        for name, kept in self.levels:
            factor = weights.vertices * getattr(weights, f"{name}_share")
            found, true = outputs[f"pred_3d_vertices_{name}"], labels.vertices[:, kept]
            add(f"vertices_{name}", factor, found, true, labels.has_vertices)
        return total, terms


def make_batch(
    mesh: Mesh, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Tensor], MeshLabels]:
    """Random outputs, which want gradients, and labels; a third of the samples lacks each kind of them."""
    generator, joints = torch.Generator().manual_seed(batch), len(mesh.joint_names)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(device, dtype)

    def flags() -> Tensor:
        return (torch.randperm(batch, generator=generator) % 3 > 0).to(device)

    outputs = {"pred_cam": random(3), "pred_3d_joints": random(joints, 3)}
    for name, level in zip(LEVELS[len(mesh.levels)], mesh.levels, strict=True):
        outputs[f"pred_3d_vertices_{name}"] = random(level.num_vertices, 3)
    labels = MeshLabels(
        vertices=random(mesh.num_vertices, 3), joints_3d=random(joints, 3),
        joints_2d=torch.cat([random(joints, 2), (random(joints, 1) > -1).to(dtype)], dim=-1),
        camera=random(3), has_vertices=flags(), has_joints_3d=flags(), has_joints_2d=flags(),
    )  # fmt: skip
    return {name: value.requires_grad_() for name, value in outputs.items()}, labels


def step(loss: Loss, outputs: dict[str, Tensor], labels: MeshLabels) -> list[Tensor]:
    """Total and gradients, without the graph behind them: a capture may find nothing of another stream."""
    total, _ = loss(outputs, labels)
    return [total.detach(), *torch.autograd.grad(total, list(outputs.values()))]


def _float64(given: dict[str, Tensor], labels: MeshLabels) -> tuple[dict[str, Tensor], MeshLabels]:
    outputs = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    return outputs, labels.map(lambda value: value.double() if value.is_floating_point() else value)


def measure(mesh: Mesh, batch: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row per contender."""
    outputs, labels = make_batch(mesh, batch, device, torch.float32)
    plain, ours = TermByTerm(mesh, LossWeights(), device), MeshRecoveryLoss(mesh).to(device)
    torch._dynamo.reset()
    losses: dict[str, Loss] = {
        "term by term": plain, "term by term, compiled": torch.compile(plain, dynamic=False),
        "ours": ours, "ours, compiled": torch.compile(ours, dynamic=False),
    }  # fmt: skip
    truth = step(TermByTerm(mesh, LossWeights(), device), *_float64(outputs, labels))
    errors, timers = {}, {}
    for name, loss in losses.items():
        found = step(loss, outputs, labels)
        differences = ((one - true).abs().max() / true.abs().max() for one, true in zip(found, truth, strict=True))
        errors[name] = float(max(differences))
        if not errors[name] <= 1e-5:
            raise ValueError(f"{name} differs from float64 by {errors[name]:.1e} of the largest")
        timers[name] = Timer([lambda loss=loss: step(loss, outputs, labels)], device)
    take_in_turn(list(timers.values()), rounds)
    written = sum(value.numel() for value in outputs.values())
    read = written + sum(one.numel() for one in (labels.vertices, labels.joints_3d, labels.joints_2d))
    floor = f"{1e6 * 4 * (read + written) / BYTES_PER_SECOND:.4g}" if device.type == "cuda" else ""
    rows = []
    for name, timer in timers.items():
        ratio = timer.median / timers["ours, compiled"].median
        row = dict(zip(COLUMNS, (mesh.name, batch, name, f"{timer.median:.4g}", floor, f"{ratio:.4g}",
                                 f"{errors[name]:.1e}"), strict=True))  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append({**row, **common.environment(device), **common.versions()})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(
        "python -m bench losses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh", default="anny-body")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(arguments)
    device, mesh = torch.device(options.device), load_mesh(options.mesh)
    rows = [row for batch in options.batch for row in measure(mesh, batch, options.rounds, device)]
    common.write_csv(options.csv or common.results_csv("losses", device), rows)
