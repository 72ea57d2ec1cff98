"""The steps of a run: images made on the device, a step, an average, a log; it can stop and go on at any step."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmetro.data.labels import MeshLabels
from fastmetro.training.config import TrainConfig
from fastmetro.training.log import CsvLog
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.schedule import learning_rate_factor, make_optimizer
from fastmetro.training.state import ExponentialAverage, TrainState

Source = Callable[[Tensor], tuple[Tensor, MeshLabels]]
"""int64 sample indices [B] -> normalised images [B, 3, H, W] and their labels, on the device of the indices."""

LOG_COLUMNS = (
    "step", "samples", "seconds", "images_per_second", "learning_rate", "gradient_norm", "loss",
    "token_joints_3d", "mesh_joints_3d", "token_joints_2d", "mesh_joints_2d",
    "vertices_fine", "vertices_intermediate", "vertices_coarse", "mpjpe", "pa_mpjpe", "mpvpe",
)  # fmt: skip


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint on disk is from before."""


@dataclass
class Trainer:
    """One run. ``evaluate`` takes the averaged model and returns metrics named as in ``LOG_COLUMNS``."""

    config: TrainConfig
    model: nn.Module
    loss: MeshRecoveryLoss
    source: Source
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    started: float | None = None

    def __post_init__(self) -> None:
        config = self.config
        if self.started is None:
            self.started = time.monotonic()
        self.device = next(self.model.parameters()).device
        optimizer = make_optimizer(self.model, config.learning_rate, config.weight_decay)
        self.state = TrainState(self.model, ExponentialAverage(self.model, config.ema_decay), optimizer)
        self.settings = config.settings()
        self.checkpoint = Path(config.output) / "checkpoint.pt"
        if config.resume:
            self.state.load(self.checkpoint, self.settings)
        elif self.checkpoint.exists():
            raise FileExistsError(
                f"{self.checkpoint} would be overwritten: resume it, remove it, or choose another output"
            )
        self.log = CsvLog(Path(config.output) / "log.csv", LOG_COLUMNS, self.state.step)
        self._network = torch.compile(self.model) if config.compile_model else self.model
        self._sums: dict[str, Tensor] = {}
        self._since = self.state.step
        self._stop = False

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        config, state = self.config, self.state
        done = state.step / config.steps
        if config.total_seconds is not None:
            done = max(done, state.seconds / config.total_seconds)
        return min(done, 1.0)

    def run(self) -> bool:
        """Train until the run, or the time of this call, is over; True if the run is finished.

        SIGINT and SIGTERM stop it after the current step with everything saved.

        Raises:
            TrainingDiverged: if the loss is no longer finite.
        """
        config, state = self.config, self.state
        self.model.train()
        with self._graceful_signals(), tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed} {postfix}") as bar:
            mark = time.monotonic()
            while self.progress < 1.0 and not self._stop and not self._out_of_time():
                self._step()
                if state.step % config.log_every == 0:
                    mark = self._report(mark, bar)
                if state.step % config.save_every == 0:
                    mark = self._report(mark, bar)
                    state.save(self.checkpoint, self.settings)
                if config.eval_every and state.step % config.eval_every == 0:
                    mark = self._report(mark, bar)
                    self._write_evaluation(bar)
                    mark = time.monotonic()
            self._report(mark, bar)
        state.save(self.checkpoint, self.settings)
        return self.progress >= 1.0

    def _step(self) -> None:
        config, state = self.config, self.state
        images, labels = self.source(self._indices())
        rate = config.learning_rate * learning_rate_factor(self.progress, config.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            outputs = self._network(images)
        loss, terms = self.loss(outputs, labels)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        state.optimizer.step()
        state.average.update(self.model, state.step)
        state.step += 1
        for name, value in (("loss", loss.detach()), ("gradient_norm", norm.detach()), *terms.items()):
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def _indices(self) -> Tensor:
        first = self.state.step * self.config.batch_size
        indices = torch.arange(first, first + self.config.batch_size, device=self.device)
        return indices % self.config.overfit if self.config.overfit else indices

    def _report(self, mark: float, bar: Any) -> float:
        """Wait for the device, check the losses since the last report and log their means; returns the time."""
        state, steps = self.state, self.state.step - self._since
        if steps == 0:
            return mark
        means = dict(zip(self._sums, (torch.stack(list(self._sums.values())) / steps).tolist(), strict=True))
        now = time.monotonic()
        state.seconds += now - mark
        self._sums, self._since = {}, state.step
        if not all(math.isfinite(value) for value in means.values()):
            where = (
                f"the last good state is in {self.checkpoint}" if self.checkpoint.is_file() else "no state was saved"
            )
            broken = ", ".join(name for name, value in means.items() if not math.isfinite(value))
            raise TrainingDiverged(f"not finite between steps {state.step - steps} and {state.step}: {broken}; {where}")
        speed = steps * self.config.batch_size / max(now - mark, 1e-9)
        self.log.write(
            {
                "step": state.step,
                "samples": state.step * self.config.batch_size,
                "seconds": round(state.seconds, 3),
                "images_per_second": round(speed, 1),
                "learning_rate": state.optimizer.param_groups[0]["lr"],
                **{name: round(value, 6) for name, value in means.items()},
            }
        )
        bar.n = round(100 * self.progress, 1)
        bar.set_postfix_str(f"step {state.step}, loss {means['loss']:.4f}, {speed:.0f} images/s")
        return now

    def _write_evaluation(self, bar: Any) -> None:
        if self.evaluate is None:
            return
        metrics = self.evaluate(self.state.average.model)
        row = {name: round(metrics[name], 3) for name in ("mpjpe", "pa_mpjpe", "mpvpe")}
        self.log.write({"step": self.state.step, "samples": self.state.step * self.config.batch_size, **row})
        bar.write(f"step {self.state.step}: " + ", ".join(f"{name} {value} mm" for name, value in row.items()))

    def _out_of_time(self) -> bool:
        limit = self.config.max_seconds
        return limit is not None and self.started is not None and time.monotonic() - self.started >= limit

    def _graceful_signals(self) -> _Signals:
        def stop() -> None:
            self._stop = True

        return _Signals(stop)


class _Signals:
    """Calls ``stop`` at the first SIGINT or SIGTERM; a second one acts as usual."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        self._stop()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *error: object) -> None:
        self._restore()
