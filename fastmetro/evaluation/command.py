"""`fastmetro eval`: a checkpoint on synthetic people or on a TSV data set, in one process or under `torchrun`."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmetro.data.ground_truth import GroundTruth, ground_truth
from fastmetro.data.tsv import TsvSource
from fastmetro.distributed import World, open_world
from fastmetro.evaluation import freihand
from fastmetro.evaluation.protocols import Protocol, check_part, find_protocol
from fastmetro.evaluation.results import append_result, check_table
from fastmetro.evaluation.settings import SYNTHETIC, EvalSettings
from fastmetro.evaluation.synthetic import SYNTHETIC_COUNT, evaluate_synthetic, format_report
from fastmetro.evaluation.tsv import MILLIMETRES, Evaluation, Predict, body_of, evaluate_tsv
from fastmetro.files import check_output
from fastmetro.inference.pretrained import load_pretrained, trained_size
from fastmetro.meshes.mesh import Mesh
from fastmetro.meshes.smpl import SMPL
from fastmetro.models import FastMETRO
from fastmetro.profiling.record import commit, device_name

_NAMED_ROWS = 5
"""Of those that are missing, in a message."""
_SCORES = {"auc": "xyz_al_auc3d", "auc_mesh": "mesh_al_auc3d", "f5": "f_al_score_5", "f15": "f_al_score_15"}
"""Columns of the table and FreiHAND's scores there: aligned ones, as the others say nothing of wrist-relative hands."""
_CENTIMETRE = MILLIMETRES / 100

_Points = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Result:
    """What is printed and recorded.

    Attributes:
        evaluation: on the labels of the set.
        errors: in mm; of FreiHAND those by the official truth, and none without: the labels of its set are dummies.
        scores: by the official truth, under the names of its script; empty without.
        processes: that ran, or with compat those whose means were taken.
    """

    evaluation: Evaluation
    errors: dict[str, float]
    scores: dict[str, float]
    processes: int


def run_evaluation(settings: EvalSettings) -> dict[str, float]:
    """Measure, record and print; returns the errors in mm (none of FreiHAND without its truth).

    Raises:
        FileNotFoundError: a file that is named is not there.
        ValueError: settings, checkpoint and data do not fit one another, or a file could not be written.
    """
    check_table(settings.csv)
    if settings.data == SYNTHETIC:
        return _synthetic(settings)
    protocol = find_protocol(settings.protocol_name)
    source = TsvSource(settings.data)
    _check_predictions(settings)
    with open_world(settings.device) as (world, device):
        # A gigabyte and a half for a moment, in the one process that scores, and before the long work.
        official = _official_truth(settings.truth, settings.data, len(source)) if world.first else None
        model = load_network(settings).to(device).eval()
        check_part(protocol, model.mesh)  # else a body model would be asked for, which would not help
        truth, size = _truth(settings, protocol, model.mesh).double().to(device), trained_size(settings.checkpoint)
        results = []
        for what, predict in _outputs(settings, model, device).items():
            evaluation = evaluate_tsv(
                predict, source, truth, model.mesh, protocol, device, world=world, workers=settings.workers, size=size,
                batch_size=settings.images_at_once, count=settings.count, compat=settings.compat is not None,
                progress=True,
            )  # fmt: skip
            if settings.predictions is not None or settings.truth is not None:
                _check_complete(settings, evaluation, len(source))
            result = _result(settings, evaluation, official, world, device)
            if world.first:
                named = replace(protocol, name=protocol.name + what)
                _record(settings, named, result, device)
                print(_report(settings, named, result))
            results.append(result)
        world.wait()
    return results[0].errors


def _outputs(settings: EvalSettings, model: FastMETRO, device: torch.device) -> dict[str, Predict]:
    """What of a network is evaluated, by what is added to the protocol's name: its mesh, and SMPL's, if it has one."""
    outputs: dict[str, Predict] = {"": model}
    if model.config.smpl_head and settings.network.body_model is not None:
        outputs[", SMPL parameters"] = body_of(model, SMPL(settings.network.body_model).to(device))
    return outputs


def _check_predictions(settings: EvalSettings) -> None:
    """Raise ValueError where predictions could not be written."""
    if settings.predictions is not None:
        files = () if settings.truth is None else freihand.truth_files(settings.truth)
        freihand.check_name(settings.predictions)
        check_output(settings.predictions, "predictions", files)


def _official_truth(folder: Path | None, data: str, rows: int) -> _Points | None:
    """FreiHAND's, where it is asked for.

    Raises:
        FileNotFoundError: a file of the truth is not there.
        ValueError: it is not as it should be, or of another number of samples.
    """
    if folder is None:
        return None
    truth = freihand.read_truth(*freihand.truth_files(folder))
    if len(truth[0]) != rows:
        raise ValueError(f"truth {folder} has {len(truth[0])} samples, {data} has {rows} rows")
    return truth


def _check_complete(settings: EvalSettings, evaluation: Evaluation, rows: int) -> None:
    """FreiHAND's predictions are told apart by their places alone: after one that lacks, all are another sample's.

    Raises:
        ValueError: rows could not be used; the message names them.
    """
    missing = sorted(set(range(rows)) - set(evaluation.errors.rows.tolist()))
    if missing:
        named = ", ".join(map(str, missing[:_NAMED_ROWS])) + (", ..." if len(missing) > _NAMED_ROWS else "")
        raise ValueError(
            f"predictions and truth need every row of {settings.data}, {len(missing)} of {rows} could not be used: "
            f"{named} ({_problems(evaluation)})"
        )


def _result(
    settings: EvalSettings, evaluation: Evaluation, official: _Points | None, world: World, device: torch.device
) -> _Result:
    processes = world.size if settings.compat is None else settings.processes or world.size
    if settings.truth is not None:
        scores = world.gather(_scores(evaluation, official, device))[0]
        aligned = {"pa_mpjpe": scores["xyz_al_mean3d"], "pa_mpvpe": scores["mesh_al_mean3d"]}
        errors = {name: _CENTIMETRE * value for name, value in aligned.items()}
        return _Result(evaluation, errors, scores, processes)
    if settings.protocol_name == "freihand":
        return _Result(evaluation, {}, {}, processes)
    if settings.compat is None:
        return _Result(evaluation, evaluation.errors.means(), {}, processes)
    errors = evaluation.errors.published_means(processes, settings.images_at_once)
    return _Result(evaluation, errors, {}, processes)


def _scores(evaluation: Evaluation, official: _Points | None, device: torch.device) -> dict[str, float]:
    """By the official truth, in the process that has it; else empty."""
    if official is None:
        return {}
    joints, vertices = _hands(evaluation)
    return freihand.score(joints.to(device), vertices.to(device), *official)


def _hands(evaluation: Evaluation) -> _Points:
    assert evaluation.joints is not None and evaluation.vertices is not None
    return evaluation.joints, evaluation.vertices


def _record(settings: EvalSettings, protocol: Protocol, result: _Result, device: torch.device) -> None:
    """Write the files. All of them before anything is printed, which fails where nobody reads on."""
    append_result(settings.csv, _row(settings, protocol, result, device))
    if settings.predictions is not None:
        freihand.write_predictions(settings.predictions, [_hands(result.evaluation)])


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
    published = settings.compat is not None
    network = settings.network.build(settings.checkpoint, settings.attention, smpl_compat=published)
    return load_pretrained(settings.checkpoint, model=network, attention=settings.attention)


def _synthetic(settings: EvalSettings) -> dict[str, float]:
    count = settings.count or SYNTHETIC_COUNT
    with open_world(settings.device) as (world, device):
        model: nn.Module = load_network(settings).to(device).eval()
        report = evaluate_synthetic(
            model, count, device=device, mesh=model.mesh,  # type: ignore[arg-type]
            batch_size=settings.images_at_once, size=trained_size(settings.checkpoint), progress=True, world=world,
        )  # fmt: skip
        errors = {name: float(str(report[name])) for name in ("mpjpe", "pa_mpjpe", "mpvpe")}
        if world.first:
            row = {"protocol": SYNTHETIC, "count": count, "skipped": 0, "processes": world.size}
            append_result(settings.csv, {**row, **_formatted(errors), **_circumstances(settings, device)})
            print(format_report(report))
        world.wait()
    return errors


def _report(settings: EvalSettings, protocol: Protocol, result: _Result) -> str:
    names = {"mpjpe": "MPJPE", "pa_mpjpe": "PA-MPJPE", "mpvpe": "MPVPE", "pa_mpvpe": "PA-MPVPE"}
    texts = {name: "-" if math.isnan(value) else f"{value:.2f}" for name, value in result.errors.items()}
    numbers = "   ".join(f"{names[name]} {text}" for name, text in texts.items())
    count = len(result.evaluation.errors.rows)
    numbers = f"{numbers}   mm" if numbers else "no errors without the official truth (--truth)"
    lines = [f"{protocol.name}: {numbers}", f"{count} samples of {settings.data}; {protocol.description}"]
    if settings.male_model is not None:
        models = ", ".join(f"{name} {samples}" for name, samples in sorted(result.evaluation.models.items()))
        lines.append(f"true vertices by the model of each sample's gender (neutral without): {models or 'no sample'}")
    if settings.compat is not None:
        means = f"; PA-MPJPE over all samples; plain mean over {result.processes} process(es)"
        lines.append("as published: its crops" + ("" if protocol.kind == "hand" else means))
    if result.evaluation.skipped:
        lines.append(f"rows that could not be used: {_problems(result.evaluation)}")
    if settings.predictions is not None:
        lines.append(f"{count} predictions in {settings.predictions}")
    lines += [f"{name}: {value:.6f}" for name, value in result.scores.items()]
    return "\n".join(lines)


def _problems(evaluation: Evaluation) -> str:
    return ", ".join(f"{problem}: {count}" for problem, count in sorted(evaluation.skipped.items()))


def _row(settings: EvalSettings, protocol: Protocol, result: _Result, device: torch.device) -> dict[str, object]:
    return {
        "protocol": protocol.name + (", gendered truth" if settings.male_model is not None else ""),
        "compat": settings.compat or "",
        "count": len(result.evaluation.errors.rows),
        "skipped": sum(result.evaluation.skipped.values()),
        **_formatted(result.errors | {name: result.scores[key] for name, key in _SCORES.items() if result.scores}),
        "processes": result.processes,
        **_circumstances(settings, device),
    }


def _circumstances(settings: EvalSettings, device: torch.device) -> dict[str, object]:
    """What was measured on what, when, where and how."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "checkpoint": settings.checkpoint,
        "data": settings.data,
        "commit": commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "command": shlex.join(["fastmetro", *sys.argv[1:]]),
    }


def _formatted(values: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.4f}" for name, value in values.items()}
