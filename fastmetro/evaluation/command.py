"""`fastmetro eval`: a checkpoint on synthetic people or on a TSV data set, in one process or under `torchrun`."""

from __future__ import annotations

import shlex
import sys
import time

import torch
from torch import nn

from fastmetro.data.ground_truth import GroundTruth, ground_truth
from fastmetro.data.tsv import TsvSource
from fastmetro.distributed import World, open_world
from fastmetro.evaluation import freihand
from fastmetro.evaluation.protocols import Protocol, find_protocol
from fastmetro.evaluation.results import append_result, check_table
from fastmetro.evaluation.settings import EvalSettings
from fastmetro.evaluation.synthetic import evaluate_synthetic, format_report
from fastmetro.evaluation.tsv import Evaluation, evaluate_tsv, mesh_of
from fastmetro.inference.pretrained import load_pretrained
from fastmetro.meshes.mesh import Mesh
from fastmetro.models import FastMETRO
from fastmetro.profiling.record import commit, device_name

SYNTHETIC_COUNT = 1000
_TRUTH = ("evaluation_xyz.json", "evaluation_verts.json")


def run_evaluation(settings: EvalSettings) -> dict[str, float]:
    """Measure, print and record; returns the errors in mm.

    Raises:
        FileNotFoundError: a file that is named is not there.
        ValueError: settings, checkpoint and data do not fit one another.
    """
    if settings.data == "synthetic":
        return _synthetic(settings)
    protocol = find_protocol(settings.protocol)
    check_table(settings.csv)
    with open_world(settings.device) as (world, device):
        model = load_network(settings).to(device).eval()
        source = TsvSource(settings.data)
        truth = _truth(settings, protocol, model.mesh).double().to(device)
        evaluation = evaluate_tsv(
            mesh_of(model), source, truth, model.mesh, protocol, device, world=world, batch_size=settings.batch_size,
            workers=settings.workers, count=settings.count, compat=settings.compat is not None, progress=True,
        )  # fmt: skip
        errors = _means(settings, evaluation)
        if world.first:
            print(_report(settings, protocol, evaluation, errors))
            append_result(settings.csv, _row(settings, protocol, evaluation, errors, world, device))
            if protocol.name == "freihand":
                _freihand(settings, evaluation, device)
        world.wait()
    return errors


def _truth(settings: EvalSettings, protocol: Protocol, mesh: Mesh) -> GroundTruth:
    """What makes the labels. Human3.6M has joints only, for which no model file is needed."""
    if protocol.name == "h36m-p2" and settings.network.body_model is None:
        return GroundTruth(mesh, joints_only=True)
    return ground_truth(mesh, settings.network.body_model, settings.male_model, settings.female_model)


def load_network(settings: EvalSettings) -> FastMETRO:
    """The network that a checkpoint names, or that the settings do, with its weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the checkpoint does not say what it is, or does not fit; its mesh needs files of the user.
    """
    network = settings.network.build(settings.checkpoint, settings.attention)
    return load_pretrained(settings.checkpoint, model=network, attention=settings.attention)


def _synthetic(settings: EvalSettings) -> dict[str, float]:
    with open_world(settings.device) as (world, device):
        if world.size > 1:
            raise ValueError("synthetic images are evaluated by one process")
        model: nn.Module = load_network(settings).to(device).eval()
        report = evaluate_synthetic(
            model, settings.count or SYNTHETIC_COUNT, device=device, mesh=model.mesh,  # type: ignore[arg-type]
            batch_size=settings.batch_size, progress=True,
        )  # fmt: skip
    print(format_report(report))
    return {name: float(str(report[name])) for name in ("mpjpe", "pa_mpjpe", "mpvpe")}


def _means(settings: EvalSettings, evaluation: Evaluation) -> dict[str, float]:
    if settings.compat is None:
        return evaluation.errors.means()
    return evaluation.errors.published_means(settings.processes, settings.batch_size)


def _report(settings: EvalSettings, protocol: Protocol, evaluation: Evaluation, errors: dict[str, float]) -> str:
    names = {"mpjpe": "MPJPE", "pa_mpjpe": "PA-MPJPE", "mpvpe": "MPVPE", "pa_mpvpe": "PA-MPVPE"}
    numbers = "   ".join(f"{names[name]} {value:.2f}" for name, value in errors.items())
    lines = [f"{protocol.name}: {numbers}   mm"]
    lines.append(f"{len(evaluation.errors.rows)} samples of {settings.data}; {protocol.description}")
    if settings.male_model is not None:
        lines.append("true vertices by the model of each sample's gender")
    if settings.compat is not None:
        lines.append(
            f"as published: its crops; PA-MPJPE over all samples; plain mean over {settings.processes} process(es)"
        )
    if evaluation.skipped:
        found = ", ".join(f"{problem}: {count}" for problem, count in sorted(evaluation.skipped.items()))
        lines.append(f"rows that could not be used: {found}")
    return "\n".join(lines)


def _row(
    settings: EvalSettings,
    protocol: Protocol,
    evaluation: Evaluation,
    errors: dict[str, float],
    world: World,
    device: torch.device,
) -> dict[str, object]:
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "protocol": protocol.name + (", gendered truth" if settings.male_model is not None else ""),
        "compat": settings.compat or "",
        "checkpoint": settings.checkpoint,
        "data": settings.data,
        "count": len(evaluation.errors.rows),
        "skipped": sum(evaluation.skipped.values()),
        **{name: f"{value:.4f}" for name, value in errors.items()},
        "processes": world.size,
        "commit": commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "command": shlex.join(["fastmetro", *sys.argv[1:]]),
    }


def _freihand(settings: EvalSettings, evaluation: Evaluation, device: torch.device) -> None:
    """Write pred.json and score it, where that is asked for."""
    assert evaluation.joints is not None and evaluation.vertices is not None
    joints, vertices = evaluation.joints, evaluation.vertices
    if settings.predictions is not None:
        settings.predictions.parent.mkdir(parents=True, exist_ok=True)
        count = freihand.write_predictions(settings.predictions, [(joints, vertices)])
        print(f"{count} predictions in {settings.predictions}")
    if settings.truth is not None:
        truth = freihand.read_truth(*(settings.truth / name for name in _TRUTH))
        scores = freihand.score(joints.to(device), vertices.to(device), *truth)
        print("\n".join(f"{name}: {value:.6f}" for name, value in scores.items()))
