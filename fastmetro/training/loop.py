"""`train`: from a configuration to exported weights."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmetro.data.labels import MeshLabels
from fastmetro.data.synthetic.capture import CapturedPeople
from fastmetro.data.synthetic.dataset import SyntheticBatch, SyntheticPeople, normalize_images
from fastmetro.evaluation.synthetic import HELD_OUT_SEED, evaluate_synthetic, format_report
from fastmetro.files import replacing
from fastmetro.meshes.mesh import Mesh, load_mesh
from fastmetro.models import create_model
from fastmetro.models.checkpoints import load_checkpoint, weights_record
from fastmetro.training.config import TrainConfig
from fastmetro.training.export import SHIPPED_BYTES, export_weights
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.state import TrainState
from fastmetro.training.trainer import Source, Trainer


def train(config: TrainConfig) -> dict[str, object]:
    """Train on synthetic images until the run or this call's time is over.

    Writes to ``config.output``: checkpoint.pt (everything that ``resume`` needs), log.csv, and weights.safetensors
    (the averaged weights). When the run is finished they are read back and evaluated on held-out images, report.json
    keeps the result, and ``config.export`` receives a copy.

    Returns:
        ``finished``, ``step``, ``weights`` (path) and, if it was evaluated, ``report``.

    Raises:
        FileExistsError: if ``config.output`` holds a checkpoint and the run does not resume from it.
        TrainingDiverged: if the loss is no longer finite.
        ValueError: if the seed is the one of the held-out images, or a checkpoint does not fit the configuration.
    """
    started = time.monotonic()
    if config.seed == HELD_OUT_SEED:
        raise ValueError(f"seed {config.seed} is the one of the held-out images; choose another")
    device = _device(config.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    torch.manual_seed(config.seed)
    mesh = load_mesh(config.mesh)
    model = create_model(config.model, mesh=mesh, dropout=config.dropout)
    if config.initialise is not None:
        load_checkpoint(model, config.initialise)
    model.to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    people = SyntheticPeople(mesh, config.seed, config.image_size, config.photographs, config.compile_images).to(device)
    source = image_source(CapturedPeople(people, config.batch_size) if config.capture_images else people)

    def evaluate(network: nn.Module) -> dict[str, float]:
        report = _measure(network, config, mesh, max(config.eval_count // 4, 1), baselines=False)
        return {name: float(str(report[name])) for name in ("mpjpe", "pa_mpjpe", "mpvpe")}

    loss = MeshRecoveryLoss(mesh, config.loss).to(device)
    trainer = Trainer(config, model, loss, source, evaluate if config.eval_count else None, started)
    if config.initialise is not None:
        _take_over_history(trainer.state, config.initialise)
    trainer.state.commands.append(shlex.join(["python", *sys.orig_argv[1:]]))
    finished = trainer.run()
    return _finish(trainer, mesh, finished)


def _take_over_history(state: TrainState, initial: Path) -> None:
    """Weights that a run starts from bring the commands and the number of images that made them."""
    record = weights_record(initial)
    state.commands = json.loads(record["commands"]) if "commands" in record else [record.get("command", str(initial))]
    state.samples_before = int(record.get("samples", 0))


def _finish(trainer: Trainer, mesh: Mesh, finished: bool) -> dict[str, object]:
    """Export the averaged weights and, at the end of the run, measure what was written, its rounding included."""
    config, averaged = trainer.config, trainer.state.average.model
    weights = Path(config.output) / "weights.safetensors"
    record = {
        "model": config.model,
        "mesh": config.mesh,
        "step": trainer.state.step,
        "samples": trainer.state.samples_before + trainer.state.step * config.batch_size,
        "seconds": round(trainer.state.seconds, 1),
        "commands": trainer.state.commands,
        "commit": config.commit or _commit(),
        "config": config.settings(),
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    size = export_weights(averaged, weights, record)
    print(f"{'finished' if finished else 'stopped'} at step {trainer.state.step}; {weights} has {size} bytes")
    result: dict[str, object] = {"finished": finished, "step": trainer.state.step, "weights": weights}
    if not finished:
        return result
    if config.eval_count:
        load_checkpoint(averaged, weights)
        report = _measure(averaged, config, mesh, config.eval_count, progress=True)
        print(format_report(report))
        with replacing(Path(config.output) / "report.json") as temporary:
            temporary.write_text(json.dumps({**record, "report": report}, indent=1, default=str) + "\n")
        result["report"] = report
    if config.export is not None:
        export_weights(averaged, Path(config.export), record, SHIPPED_BYTES)
    return result


def _measure(
    network: nn.Module, config: TrainConfig, mesh: Mesh, count: int, baselines: bool = True, progress: bool = False
) -> dict[str, object]:
    return evaluate_synthetic(
        network, count, mesh=mesh, photographs=config.photographs, size=config.image_size, baselines=baselines,
        progress=progress,
    )  # fmt: skip


def image_source(people: Callable[[Tensor], SyntheticBatch]) -> Source:
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
