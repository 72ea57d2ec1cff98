"""`train`: from a configuration to exported weights."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastmetro.distributed import World, open_world
from fastmetro.evaluation.synthetic import HELD_OUT_SEED
from fastmetro.files import check_output, locked, replacing, was_locked
from fastmetro.models.checkpoints import load_checkpoint, weights_record
from fastmetro.training.config import TrainConfig
from fastmetro.training.export import SHIPPED_BYTES, export_weights, weights_bytes
from fastmetro.training.kernel_choice import kernel_choice
from fastmetro.training.log import last_step
from fastmetro.training.setup import Setup
from fastmetro.training.state import TrainState
from fastmetro.training.trainer import BEFORE_A_CHECKPOINT, Trainer, TrainingFailed

_WRITTEN_LAST = ("weights.safetensors", "report.json")
"""Only after the last checkpoint."""


def train(config: TrainConfig) -> dict[str, object]:
    """Train until the run or this call's time is over, in this process or in all those of a `torchrun`.

    Writes to ``config.output``: checkpoint.pt (everything that ``resume`` needs), log.csv, weights.safetensors (the
    averaged weights), and best.safetensors (those of the evaluation with the smallest PA-MPJPE). When the run is
    finished the weights are read back and evaluated, report.json keeps the result, and ``config.export`` gets a copy.
    Of several processes only the first needs that folder.

    Returns:
        ``finished``, ``step`` and, in the first process, ``weights`` (path) and, if it was evaluated, ``report``.

    Raises:
        FileExistsError: if ``config.output`` holds files of a run and this one does not resume it.
        FileNotFoundError: if there is no checkpoint to resume from, and no run that was ended before its first one.
        RuntimeError: if another run writes to ``config.output``; in the other processes what the first one raises.
        TrainingDiverged: if the loss is no longer finite.
        TrainingFailed: if batches ended or files cannot be written.
        ValueError: if the seed is the one of the held-out images, a checkpoint or the data do not fit the
            configuration, or ``config.export`` cannot be written.
    """
    started = time.monotonic()
    if config.seed == HELD_OUT_SEED:
        raise ValueError(f"seed {config.seed} is the one of the held-out images; choose another")
    with open_world(config.device) as (world, device), kernel_choice(device, config.deterministic):
        _check_world(config, world, device)
        anew = world.by_first(lambda: _check_files(config))
        if anew:
            config = replace(config, resume=False)
        torch.manual_seed(config.seed)
        setup = Setup(config, world, device)
        _check_export(config, setup.model)
        with contextlib.ExitStack() as stack:
            world.by_first(lambda: stack.enter_context(locked(config.output)))
            if anew:
                world.by_first(lambda: _begin_anew(config.output))
            trainer = Trainer(
                setup.config, setup.model, setup.objective, setup.source, setup.evaluation(), export_average,
                setup.show, started, world,
            )  # fmt: skip
            if config.initialise is not None and not config.resume:
                _take_over_history(trainer.state, config.initialise)
            trainer.state.commands.append(shlex.join(["python", *sys.orig_argv[1:]]))
            finished = trainer.run()
            try:
                return _finish(trainer, setup, finished)
            except OSError as error:
                raise TrainingFailed(f"{error}; {trainer.last_good()}, and resuming it writes the rest") from error


def _check_files(config: TrainConfig) -> bool:
    """Before the first folder is made and hours are spent; whether a run that is resumed has to begin anew."""
    if config.export is not None:
        check_output(Path(config.export), "export")
    if config.output.exists() and not config.output.is_dir():
        raise ValueError(f"output must be a folder, got the file {config.output}")
    checkpoint = config.output / "checkpoint.pt"
    check_output(checkpoint, "output")
    if not config.resume or checkpoint.is_file():
        return False
    # Where one must have been it was taken away; where no run has been another folder was meant.
    had_one = any((config.output / name).exists() for name in _WRITTEN_LAST)
    if had_one or last_step(config.output / "log.csv") > config.save_every or not was_locked(config.output):
        raise FileNotFoundError(f"no checkpoint to resume from at {checkpoint}")
    return True


def _begin_anew(output: Path) -> None:
    """A run that was killed before its first checkpoint may have left rows and weights of steps that are lost."""
    print(
        f"fastmetro: {output} holds no checkpoint: the run ended before its first one and begins anew", file=sys.stderr
    )
    for name in BEFORE_A_CHECKPOINT:
        (output / name).unlink(missing_ok=True)


def _check_export(config: TrainConfig, model: nn.Module) -> None:
    """Before the training, that its weights are not too large for a file inside the package."""
    if config.export is not None and (size := weights_bytes(model, config.written_dtype)) > SHIPPED_BYTES:
        raise ValueError(
            f"export is for weights of up to {SHIPPED_BYTES} bytes, these take {size} in {config.written_dtype}; "
            "weights.safetensors in output has no such limit"
        )


def _check_world(config: TrainConfig, world: World, device: torch.device) -> None:
    if config.batch_size % (world.size * config.accumulate):
        raise ValueError(
            f"batch_size must be a multiple of the number of processes times accumulate, got {config.batch_size} for "
            f"{world.size} times {config.accumulate}"
        )
    if world.size > 1 and config.total_seconds is not None:
        raise ValueError("total_seconds is for one process, whose clock decides; give several processes steps")
    if config.sync_batch_norm and (world.size > 1) and device.type != "cuda":
        raise ValueError("sync_batch_norm needs GPUs")
    for name in ("capture_step", "capture_images"):
        if getattr(config, name) and device.type != "cuda":
            raise ValueError(f"{name} needs a CUDA device, got {device}: give --no-{name.replace('_', '-')}")


def _take_over_history(state: TrainState, initial: Path) -> None:
    """Weights that a run starts from bring the commands and the number of images that made them."""
    record = weights_record(initial)
    try:
        commands = json.loads(record.get("commands", "[]"))
        state.samples_before = int(record.get("samples", 0))
    except ValueError:
        commands = None
    if not isinstance(commands, list) or not all(isinstance(command, str) for command in commands):
        raise ValueError(f"initialise: the record in {initial} must have a list of commands and a number of samples")
    state.commands = commands or [record.get("command", str(initial))]


def export_average(trainer: Trainer, path: Path, metrics: Mapping[str, object] | None = None) -> int:
    """Write the averaged weights with the record of how they were made; returns the size of the file in bytes."""
    record = {**_record(trainer), **(metrics or {})}
    return export_weights(trainer.state.average.model, path, record, dtype=trainer.config.written_dtype)


def _record(trainer: Trainer) -> dict[str, object]:
    config, state = trainer.config, trainer.state
    return {
        "model": config.model,
        "mesh": config.mesh,
        "step": state.step,
        "samples": state.samples_before + state.step * config.batch_size,
        "seconds": round(state.seconds, 1),
        "commands": state.commands,
        "commit": config.commit or _commit(),
        "config": config.settings(),
        "processes": trainer.world.size,
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def _finish(trainer: Trainer, setup: Setup, finished: bool) -> dict[str, object]:
    """Export the averaged weights and, at the end of the run, measure what was written, its rounding included."""
    config, averaged = trainer.config, trainer.state.average.model
    weights = Path(config.output) / "weights.safetensors"
    record = _record(trainer)
    result: dict[str, object] = {"finished": finished, "step": trainer.state.step}
    size = trainer.world.by_first(lambda: export_average(trainer, weights))
    if trainer.world.first:
        print(f"{'finished' if finished else 'stopped'} at step {trainer.state.step}; {weights} has {size} bytes")
        result["weights"] = weights
    if not finished:
        return result
    if config.eval_count != 0:
        trainer.world.by_first(lambda: load_checkpoint(averaged, weights))
        trainer.world.share_state(averaged)
        try:
            report = setup.report(averaged)
        except KeyboardInterrupt:
            print(f"fastmetro: not measured; {trainer.last_good()}, and resuming it measures", file=sys.stderr)
            raise
        if trainer.world.first:
            with replacing(Path(config.output) / "report.json") as temporary:
                temporary.write_text(json.dumps({**record, "report": report}, indent=1, default=str) + "\n")
            result["report"] = report
    if config.export is not None and trainer.world.first:
        export_weights(averaged, Path(config.export), record, SHIPPED_BYTES, config.written_dtype)
    return result


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
