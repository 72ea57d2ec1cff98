"""What a training run keeps: averaged weights, and everything needed to go on exactly where it stopped."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmetro.distributed import World
from fastmetro.files import replacing
from fastmetro.models.backbones.half_weights import refresh_half_weights

FORMAT = 3
"""Version of the checkpoint's layout."""
DATA = {"data.files", "data.body_model", "data.mesh_data"}
"""Settings that name files: they may lie in another folder when a run is resumed."""
NOT_READ = {"backbone_weights"}
"""Settings that are recorded, but do not matter to a run that is resumed."""
_CONTENT: dict[str, type | tuple[type, ...]] = {
    "settings": dict, "step": int, "seconds": (int, float), "commands": list, "samples_before": int,
    "best": (int, float), "model": dict, "average": dict, "optimizer": dict, "scaler": dict, "random": list,
}  # fmt: skip


class ExponentialAverage:
    """A copy of a model whose weights and batch-norm statistics follow the trained ones smoothly.

    The decay grows from 0.1 towards ``decay`` as (1 + n) / (10 + n), so that early weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model`` after its update number ``step`` (counted from 0)."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        averaged, current = [], []
        for mine, theirs in zip(_state_tensors(self.model), _state_tensors(model), strict=True):
            if mine.is_floating_point():
                averaged.append(mine)
                current.append(theirs.detach())
            else:
                mine.copy_(theirs)
        torch._foreach_lerp_(averaged, current, weight)


def _state_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    # Fixed tables (topology, matrices, positions) are the same in both; lerping equal values changes nothing, but
    # only batch-norm statistics need the work.
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            yield from module.buffers(recurse=False)


@dataclass
class TrainState:
    """Model, average, optimizer, loss scale and position of a run. The next batch is that of ``step``.

    ``commands`` are all that led here, in order, and ``samples_before`` counts the images of earlier runs whose weights
    this one started from; ``best`` is the smallest PA-MPJPE that an evaluation has found, and ``skipped`` counts the
    bad rows that all processes have replaced.
    """

    model: nn.Module
    average: ExponentialAverage
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    seconds: float = 0.0
    commands: list[str] = field(default_factory=list)
    samples_before: int = 0
    best: float = math.inf
    skipped: int = 0

    def random_state(self) -> tuple[Tensor, Tensor | None]:
        """The random number generators of this process: the CPU's and the device's."""
        device = next(self.model.parameters()).device
        return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def save(
        self, path: Path, settings: dict[str, Any], random: Sequence[tuple[Tensor, Tensor | None]] | None = None
    ) -> None:
        """Write everything atomically.

        Args:
            path: the file.
            settings: the plain values that another start must share.
            random: :meth:`random_state` of each process; of this one alone by default.

        Raises:
            OSError: the file cannot be written; what was there is still there.
        """
        content = {
            "format": FORMAT,
            "settings": settings,
            "step": self.step,
            "seconds": self.seconds,
            "commands": self.commands,
            "samples_before": self.samples_before,
            "best": self.best,
            "skipped": self.skipped,
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "random": list(random or [self.random_state()]),
        }
        with replacing(path) as temporary:
            try:
                torch.save(content, temporary)
            except RuntimeError as error:  # what PyTorch's own writer makes of a full disk
                free = shutil.disk_usage(path.parent).free
                raise OSError(f"{path} could not be written, {free} bytes are free there: {error}") from error

    def load(self, path: Path, settings: dict[str, Any], world: World = World()) -> None:  # noqa: B008 - frozen
        """Go back to what :meth:`save` wrote.

        Args:
            path: the file; of several processes rank 0 reads it, for those on other nodes too.
            settings: as when it was saved, but where files have moved, which is said on stderr.
            world: the processes. Each takes its own random state; with more processes than then, the others keep
                theirs.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no such checkpoint, or was made with other ``settings`` (they are listed).
            RuntimeError: in other processes than rank 0, if that raised one of these.
        """
        content = world.by_first(lambda: _read(path, settings))
        try:
            self._take(content, world.rank)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path} does not fit the model and optimizer: {type(error).__name__}: {error}") from error

    def _take(self, content: dict[str, Any], rank: int) -> None:
        self.model.load_state_dict(content["model"])
        self.average.model.load_state_dict(content["average"])
        refresh_half_weights(self.model)
        _load_optimizer(self.optimizer, content["optimizer"])
        if self.scaler is not None and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        self.step, self.seconds = content["step"], content["seconds"]
        self.commands, self.samples_before = content["commands"], content["samples_before"]
        self.best, self.skipped = content["best"], content.get("skipped", 0)  # which older checkpoints lack
        if rank < len(content["random"]):
            on_cpu, on_device = content["random"][rank]
            torch.set_rng_state(on_cpu)
            device = next(self.model.parameters()).device
            if device.type == "cuda" and on_device is not None:
                torch.cuda.set_rng_state(on_device, device)


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds; raises as :meth:`TrainState.load`."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint to resume from at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or strange file makes the reader raise
        why = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{path} could not be read as a training checkpoint: {why}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no training checkpoint of format {FORMAT}")
    wrong = [name for name, kind in _CONTENT.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} is no training checkpoint: {', '.join(wrong)} missing, or of another kind")
    _compare(path, content["settings"], settings)
    return content


def _compare(path: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse settings that would change the course of the run, and name files that have moved."""
    differing = []
    for name in sorted({*saved, *settings} - NOT_READ):
        before, now = saved.get(name), settings.get(name)
        if before == now:
            continue
        if name in DATA and _file_names(before) == _file_names(now):
            print(f"fastmetro: {name} is {now}, and was {before}: the content must be the same", file=sys.stderr)
        else:
            differing.append(f"{name}: checkpoint {before!r}, now {now!r}")
    if differing:
        raise ValueError(f"{path} was trained with other settings; " + "; ".join(differing))


def _file_names(value: Any) -> Any:
    """Of paths, without their folders."""
    if isinstance(value, list):
        return [_file_names(entry) for entry in value]
    return Path(value).name if isinstance(value, str) else value


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Rates that are tensors stay where they are: PyTorch's own optimizers would take those of the file, on the CPU.

    A CUDA graph would then be captured with a number, which nothing changes afterwards.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):
            rate.fill_(float(group["lr"]))
            group["lr"] = rate
