"""The steps of a run: batches, updates, an average, a log; it can stop and go on at any step."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmetro.distributed import World
from fastmetro.files import remove_unfinished
from fastmetro.models.backbones.half_weights import refresh_half_weights
from fastmetro.training.board import Board
from fastmetro.training.config import TrainConfig
from fastmetro.training.fused import fuse_backbone, fuse_transformer
from fastmetro.training.log import CsvLog
from fastmetro.training.objective import Objective
from fastmetro.training.schedule import learning_rate_factor, make_optimizer, set_learning_rate
from fastmetro.training.signals import GracefulSignals, Interrupted
from fastmetro.training.sources import Batch, Batches, SourceFailed
from fastmetro.training.state import ExponentialAverage, TrainState
from fastmetro.training.step import CapturedStep, Network, TrainingStep

METRICS = ("mpjpe", "pa_mpjpe", "mpvpe")
BEFORE_A_CHECKPOINT = ("log.csv", "best.safetensors")
"""What a run that was killed before its first checkpoint may have left."""
RESULTS = ("checkpoint.pt", "log.csv", "weights.safetensors", "best.safetensors", "report.json")
"""Files of a run in its folder."""
_LOGGED = ("step", "samples", "seconds", "images_per_second", "learning_rate", "skipped")
_BAR = "{l_bar}{bar}| {elapsed} gone, {remaining} left{postfix}"


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint on disk is from before."""


class TrainingFailed(RuntimeError):
    """The run cannot go on, for a reason outside of it; the message says where its last good state is."""


@dataclass
class Trainer:
    """One run, in this process.

    Attributes:
        config: its settings.
        model: what is trained, on its device.
        objective: the losses.
        source: the batches.
        evaluate: takes the averaged model and returns metrics named as in ``METRICS``; called in all processes.
        export: writes the averaged weights to a file, with the metrics they were measured at.
        show: takes the averaged model and a batch and returns a picture uint8 [H, W, 3], for TensorBoard.
        started: time.monotonic() at which the time of this call began.
        world: the processes of the run; rank 0 writes.
    """

    config: TrainConfig
    model: nn.Module
    objective: Objective
    source: Batches
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    export: Callable[[Trainer, Path, dict[str, float]], object] | None = None
    show: Callable[[nn.Module, Batch], Any] | None = None
    started: float | None = None
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        config = self.config
        if self.started is None:
            self.started = time.monotonic()
        self.device = next(self.model.parameters()).device
        if config.fused:
            fuse_backbone(self.model, config.precision)
            fuse_transformer(self.model, config.precision)
        optimizer = make_optimizer(
            self.model, config.learning_rate, config.weight_decay, decay=config.decay, betas=config.betas,
            capturable=config.capture_step, fused="project" if config.fused else "torch",
        )  # fmt: skip
        network: Network = self.model
        objective = self.objective
        if config.compile_model:
            network, objective = torch.compile(network), cast(Objective, torch.compile(objective))
        self.step = TrainingStep(
            self.model, network, objective, optimizer, clip=config.gradient_clip, precision=config.precision,
            accumulate=config.accumulate, world=self.world,
        )  # fmt: skip
        average = ExponentialAverage(self.model, config.ema_decay)
        self.state = TrainState(self.model, average, optimizer, self.step.scaler)
        self.settings = config.settings()
        self.checkpoint = Path(config.output) / "checkpoint.pt"
        if not self.world.first:  # processes drop different units
            torch.manual_seed(config.seed + 1_000_003 * self.world.rank)
        if config.resume:
            self.state.load(self.checkpoint, self.settings, self.world)
        self._saved = config.resume
        self.world.share_state(self.model)
        refresh_half_weights(self.model)  # nothing else tells of what came from another process
        self.log: CsvLog | None = None
        self.board: Board | None = None
        self.world.by_first(self._open_logs)
        self._run_step: TrainingStep | CapturedStep = self.step
        self._sum: Tensor | None = None
        self._skipped = 0
        self._since = self.state.step
        self._untimed = 0
        self._stop = False
        self._signals = GracefulSignals(self._stop_soon)
        self._last: Batch | None = None
        self._failed: str | None = None

    def _open_logs(self) -> None:
        output = Path(self.config.output)
        if not self.config.resume:
            _refuse_to_overwrite(output)
        for name in RESULTS:
            remove_unfinished(output / name)
        scale = ("loss_scale",) if self.step.scaler.is_enabled() else ()
        self.log = CsvLog(output / "log.csv", (*_LOGGED, *scale, *self.step.names, *METRICS), self.state.step)
        if self.config.tensorboard:
            self.board = Board(output / "tensorboard", self.state.step)

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

        SIGINT and SIGTERM stop it after the current step (of several processes: at the next report) with everything
        saved.

        Raises:
            TrainingDiverged: the loss is no longer finite.
            TrainingFailed: batches ended (a dead worker, unusable data), or files cannot be written (a full disk). Of
                several processes all raise it, at the next report; the one that failed says so at once, on stderr.
        """
        self.model.train()
        done = round(100 * self.progress, 1)  # time left is reckoned from what this call does
        bar = tqdm(total=100, initial=done, unit="%", bar_format=_BAR, disable=not self.world.first)
        try:
            with self._signals, bar:
                self._loop(bar)
        except OSError as error:
            raise TrainingFailed(f"a file of the run could not be written: {error}; {self.last_good()}") from error
        except RuntimeError as error:
            if isinstance(error, TrainingFailed) or (why := self._what_ended(error)) is None:
                raise
            raise TrainingFailed(f"{why}: {error}; {self.last_good()}") from error
        finally:
            # A graph with collectives in it must go before the process group: NCCL waits for it forever.
            self._run_step = self.step
            self._close_board()
        return self.progress >= 1.0

    def _what_ended(self, error: RuntimeError) -> str | None:
        """What an error amid a step tells of that is no mistake of the step."""
        # PyTorch's signal handler tells of a dead worker wherever the process is.
        if "DataLoader worker" in str(error):
            return "the data ended"
        if self.world.size > 1 and (isinstance(error, torch.distributed.DistError) or "onnection" in str(error)):
            return "another process ended"
        return None

    def _close_board(self) -> None:
        """What TensorBoard lacks in the end is not worth a training, or the message of what ended it."""
        if self.board is not None:
            try:
                self.board.close()
            except OSError as error:
                print(f"fastmetro: the file for TensorBoard is not complete: {error}", file=sys.stderr)

    def _loop(self, bar: Any) -> None:
        config, state, first = self.config, self.state, True
        mark = time.monotonic()
        while self.progress < 1.0 and not self._is_over():
            try:
                batch = self._next_batch()
            except SourceFailed as error:
                if self._stop:
                    break  # the signal went to the workers, too
                self._report(mark, bar)
                if state.step or self._saved:  # else it would only keep the folder from a start with better data
                    self._save()
                raise TrainingFailed(f"{error}; {self.last_good()}") from error
            self._train_on(batch)
            if first:
                first, mark = False, self._begin_timing()
            if state.step % config.log_every == 0:
                mark = self._report(mark, bar)
            if config.eval_every and state.step % config.eval_every == 0:
                mark = self._report(mark, bar)
                self._write_evaluation(bar)
                mark = time.monotonic()
            if state.step % config.save_every == 0:  # after the evaluation, which else would be lost if it is killed
                self._report(mark, bar)
                self._save()
                if not config.eval_every or self.evaluate is None:
                    self._write_picture()
                mark = time.monotonic()
        self._report(mark, bar)
        self._save()

    def _next_batch(self) -> Batch:
        """The batch of the step.

        The others wait for each process in every step. So one of several that has no batch any more goes on with its
        last one until all stop together at the next report; nothing of those steps is kept.

        Raises:
            SourceFailed: there is none, and this process is alone.
            TrainingFailed: some process has not even had a first one.
        """
        batch = self._last
        if self._failed is None:
            try:
                batch = self.source(self.state.step)
            except SourceFailed as error:
                if self.world.size == 1:
                    raise
                self._fail(str(error))
        if self._last is None:
            self._stop_if_failed()
        assert batch is not None
        return batch

    def _fail(self, why: str) -> None:
        """This one of several processes cannot go on: it says so, and all stop where they next agree."""
        self._failed = why
        print(f"fastmetro: process {self.world.rank} failed: {why}", file=sys.stderr, flush=True)

    def _stop_if_failed(self) -> None:
        """Stop all processes if one has failed; all of them must be here.

        Raises:
            TrainingFailed: one has.
        """
        if self.world.any(self._failed is not None, self.device):
            raise TrainingFailed(f"{self._failed or 'another process failed, and said why'}; {self.last_good()}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Of several processes the one that cannot write tells the others before it ends."""
        try:
            yield
        except OSError as error:
            if self.world.size == 1:
                raise
            self._fail(f"a file of the run could not be written: {error}")

    def _train_on(self, batch: Batch) -> None:
        config, state = self.config, self.state
        factor = learning_rate_factor(self.progress, config.warmup, config.schedule, config.drop_at)
        set_learning_rate(state.optimizer, config.learning_rate * factor)
        if config.capture_step and isinstance(self._run_step, TrainingStep):
            self._run_step = CapturedStep(self.step, batch.images, batch.labels)
        values = self._run_step(batch.images, batch.labels)
        state.average.update(self.model, state.step)
        state.step += 1
        self._sum = values.clone() if self._sum is None else self._sum.add_(values)
        self._skipped += sum(batch.skipped.values())
        self._last = batch

    def _begin_timing(self) -> float:
        """The first step of a call compiles and captures, which may take longer than the warm-up of the rate: it does
        not count as time of stepping."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._untimed = 1
        return time.monotonic()

    def _report(self, mark: float, bar: Any) -> float:
        """Wait for the device, check the losses since the last report and log their means; returns the time."""
        state, steps = self.state, self.state.step - self._since
        if steps == 0 or self._sum is None:
            return mark
        self._stop_if_failed()
        mean = self.world.sum(self._sum) / (steps * self.world.size)
        skipped = torch.tensor(self._skipped, device=self.device)
        state.skipped += int(self.world.sum(skipped))
        self._skipped = 0
        means = dict(zip(self.step.names, mean.tolist(), strict=True))
        now = time.monotonic()
        state.seconds += now - mark
        self._sum, self._since = None, state.step
        broken = ", ".join(name for name, value in means.items() if not math.isfinite(value))
        if broken:
            raise TrainingDiverged(
                f"not finite between steps {state.step - steps} and {state.step}: {broken}; {self.last_good()}"
            )
        timed, self._untimed = steps - self._untimed, 0
        speed = timed * self.config.batch_size / max(now - mark, 1e-9)
        with self._writing():
            self._write(means, speed if timed else None)
        bar.n = round(100 * self.progress, 1)
        replaced = f", {state.skipped} bad rows replaced" if state.skipped else ""
        fast = f", {speed:.0f} images/s" if timed else ""
        bar.set_postfix_str(f"step {state.step}, loss {means['loss']:.4f}{fast}{replaced}")
        return now

    def _write(self, means: dict[str, float], speed: float | None) -> None:
        row: dict[str, float | int] = {
            "step": self.state.step,
            "samples": self.state.step * self.config.batch_size,
            "seconds": round(self.state.seconds, 3),
            **({} if speed is None else {"images_per_second": round(speed, 1)}),
            "learning_rate": float(self.state.optimizer.param_groups[0]["lr"]),
            "skipped": self.state.skipped,
            **({"loss_scale": self.step.scaler.get_scale()} if self.step.scaler.is_enabled() else {}),
            **{name: round(value, 6) for name, value in means.items()},
        }
        if self.log is not None:
            self.log.write(row)
        if self.board is not None:
            self.board.scalars(self.state.step, row)

    def _write_evaluation(self, bar: Any) -> None:
        if self.evaluate is None:
            return
        self.world.share_state(self.state.average.model)  # statistics of batch norms are each process's own
        try:
            with self._signals.interrupting(self.world.size == 1):  # others would wait for this process
                metrics = self.evaluate(self.state.average.model)
        except Interrupted:
            return  # the loop ends, and saves
        except (OSError, RuntimeError, ValueError) as error:  # the training's own state is whole
            if self.world.size > 1:
                raise
            if self._stop:
                return  # the signal went to the evaluation's workers, too; the loop ends, and saves
            self._save()
            raise TrainingFailed(f"the evaluation failed: {error}; {self.last_good()}") from error
        with self._writing():
            self._write_metrics(metrics, bar)
        self._write_picture()

    def _write_metrics(self, metrics: dict[str, float], bar: Any) -> None:
        row = {name: round(metrics[name], 3) for name in METRICS if name in metrics}
        if metrics.get("pa_mpjpe", math.inf) < self.state.best:
            self.state.best = metrics["pa_mpjpe"]
            if self.export is not None and self.world.first:
                self.export(self, Path(self.config.output) / "best.safetensors", row)
        if self.log is not None:
            self.log.write({"step": self.state.step, "samples": self.state.step * self.config.batch_size, **row})
            bar.write(f"step {self.state.step}: " + ", ".join(f"{name} {value} mm" for name, value in row.items()))
        if self.board is not None:
            self.board.scalars(self.state.step, row)

    def _write_picture(self) -> None:
        if self.board is not None and self.show is not None and self._last is not None:
            with self._writing():
                self.board.picture(self.state.step, self.show(self.state.average.model, self._last))

    def _save(self) -> None:
        random = self.world.gather(self.state.random_state())
        if self.world.first:
            with self._writing():
                self.state.save(self.checkpoint, self.settings, random)
        self._stop_if_failed()
        self._saved = True

    def last_good(self) -> str:
        """Where a run goes on from, in words."""
        # Another process may have died between the writing and telling each other of it.
        saved = self._saved or self.checkpoint.is_file()
        return f"the last good state is in {self.checkpoint}" if saved else "no state was saved"

    def _is_over(self) -> bool:
        """Whether a signal came or the time of this call is over; several processes agree at each report."""
        over = self._stop or self._out_of_time()
        if self.world.size == 1:
            return over
        if self._since != self.state.step:
            return False
        self._stop_if_failed()
        return self.world.any(over, self.device)

    def _out_of_time(self) -> bool:
        limit = self.config.max_seconds
        return limit is not None and self.started is not None and time.monotonic() - self.started >= limit

    def _stop_soon(self) -> None:
        self._stop = True


def _refuse_to_overwrite(output: Path) -> None:
    for path in (output / name for name in RESULTS):
        if path.exists():
            resumable = path.name in BEFORE_A_CHECKPOINT or (output / "checkpoint.pt").is_file()
            resume = "resume it, " if resumable else ""
            raise FileExistsError(f"{path} would be overwritten: {resume}remove it, or choose another output")
