"""`train`: from a configuration to exported weights."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmetro.data.labels import MeshLabels
from fastmetro.data.synthetic.dataset import SyntheticPeople, normalize_images
from fastmetro.evaluation.synthetic import HELD_OUT_SEED, evaluate_synthetic, format_report
from fastmetro.files import replacing
from fastmetro.meshes.mesh import load_mesh
from fastmetro.models import create_model
from fastmetro.models.checkpoints import load_checkpoint
from fastmetro.training.config import TrainConfig
from fastmetro.training.export import export_weights
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.trainer import Source, Trainer


def train(config: TrainConfig) -> dict[str, object]:
    """Train on synthetic images until the run or this call's time is over.

    Writes to ``config.output``: checkpoint.pt (everything that ``resume`` needs), log.csv, and weights.safetensors
    (the averaged weights). When the run is finished they are read back and evaluated on held-out images, report.json
    keeps the result, and ``config.export`` receives a copy.

    Returns:
        ``finished``, ``step``, ``weights`` (path) and, if it was evaluated, ``report``.

    Raises:
        TrainingDiverged: if the loss is no longer finite.
        ValueError: if the seed is the one of the held-out images, or a checkpoint does not fit the configuration.
    """
    started = time.monotonic()
    if config.seed == HELD_OUT_SEED:
        raise ValueError(f"seed {config.seed} is the one of the held-out images; choose another")
    device = _device(config.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    mesh = load_mesh(config.mesh)
    model = create_model(config.model, mesh=mesh, dropout=config.dropout)
    if config.initialise is not None:
        load_checkpoint(model, config.initialise)
    model = model.to(device, memory_format=torch.channels_last)
    people = SyntheticPeople(
        mesh, config.seed, photographs=config.photographs, compile_images=config.compile_images
    ).to(device)

    def evaluate(network: nn.Module, count: int = max(config.eval_count // 4, 1)) -> dict[str, float]:
        result = evaluate_synthetic(
            network, count, device=device, mesh=mesh, baselines=False, training_seed=config.seed
        )
        return {name: float(str(result[name])) for name in ("mpjpe", "pa_mpjpe", "mpvpe")}

    loss = MeshRecoveryLoss(mesh, config.loss).to(device)
    trainer = Trainer(config, model, loss, image_source(people), evaluate if config.eval_count else None, started)
    finished = trainer.run()
    weights = Path(config.output) / "weights.safetensors"
    averaged = trainer.state.average.model
    record = {"model": config.model, "mesh": config.mesh, "step": trainer.state.step, "config": config.settings(),
              "samples": trainer.state.step * config.batch_size, "commit": _commit(),
              "command": shlex.join(["python", "-m", "fastmetro", *sys.argv[1:]]), "device": _device_name(device),
              "torch": torch.__version__}  # fmt: skip
    size = export_weights(averaged, weights, record)
    print(f"{'finished' if finished else 'stopped'} at step {trainer.state.step}; {weights} has {size} bytes")
    result: dict[str, object] = {"finished": finished, "step": trainer.state.step, "weights": weights}
    if finished:
        if config.eval_count:
            load_checkpoint(averaged, weights)  # measure what was written, rounding included
            report = evaluate_synthetic(
                averaged, config.eval_count, device=device, mesh=mesh, training_seed=config.seed, progress=True
            )
            print(format_report(report))
            with replacing(Path(config.output) / "report.json") as temporary:
                temporary.write_text(json.dumps({**record, "report": report}, indent=1, default=str) + "\n")
            result["report"] = report
        if config.export is not None:
            with replacing(Path(config.export)) as temporary:
                temporary.write_bytes(weights.read_bytes())
    return result


def image_source(people: SyntheticPeople) -> Source:
    """Batches of ``people`` as the trainer wants them: normalised, channels last."""

    def source(indices: Tensor) -> tuple[Tensor, MeshLabels]:
        batch = people(indices)
        images = normalize_images(batch.images)
        return images.contiguous(memory_format=torch.channels_last), batch.labels

    return source


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _commit() -> str:
    """The commit of the working tree that this file lies in, marked if it differs; "unknown" outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()
