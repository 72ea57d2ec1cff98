"""A run that is killed, or cannot write, or loses a worker, keeps its last good state and goes on from it."""

from __future__ import annotations

import csv
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from small_network import MESH, SmallNetwork, labelled
from test_sources import tables

from fastmetro.training.config import TrainConfig
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.objective import Objective
from fastmetro.training.sources import Batch, SourceFailed, SyntheticBatches
from fastmetro.training.trainer import Trainer, TrainingFailed

OPTIONS = ["--batch-size", "4", "--image-size", "32", "--eval-count", "0", "--steps", "8",
           "--precision", "fp32", "--dropout", "0.1", "--log-every", "1", "--save-every", "2", "--no-photographs",
           "--data.workers", "1", "--data.synthetic-share", "0.25"]  # fmt: skip


def command(data: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "fastmetro", "train", "--output", str(output), "--data.files", str(data), *OPTIONS,
            *more]  # fmt: skip


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def values(folder: Path) -> list[dict[str, str]]:
    """The log without what a clock says."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows(folder)]


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, device: torch.device) -> None:
    """SIGKILL twice, at some moment; rows of TSV files and synthetic images, workers, dropout, an average.

    With the same bits; on a GPU cuDNN must not choose its algorithms by their times for that.
    """
    data, where = tables(tmp_path / "data", 11), ["--device", device.type]
    where += ["--deterministic"] if device.type == "cuda" else []
    subprocess.run(command(data, tmp_path / "whole", *where), check=True, capture_output=True, timeout=300)
    parts, resume = tmp_path / "parts", [*where]
    for steps in (3, 6):
        process = subprocess.Popen(command(data, parts, *resume), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while not ((parts / "log.csv").is_file() and len(rows(parts)) >= steps):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        (parts / ".checkpoint.pt.x.part").write_bytes(b"as if killed while it saved")
        process.send_signal(signal.SIGKILL)
        process.wait()
        resume = ["--resume", *where]
    subprocess.run(command(data, parts, *resume), check=True, capture_output=True, timeout=300)
    assert not list(parts.glob(".*.part")) and len(rows(parts)) == 8
    assert values(parts) == values(tmp_path / "whole")
    whole, other = (torch.load(x / "checkpoint.pt", weights_only=True) for x in (tmp_path / "whole", parts))
    for part in ("model", "average"):
        assert all(torch.equal(value, other[part][name]) for name, value in whole[part].items())


def started(arguments: list[str], output: Path) -> subprocess.Popen[str]:
    """A training in a group of its own that has made its first steps."""
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 200
    while not ((output / "log.csv").is_file() and len(rows(output)) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_worker_that_is_killed_costs_no_step(tmp_path: Path) -> None:
    """The step goes on to its end, and the state behind it is saved, though no checkpoint was due."""
    output = tmp_path / "run"
    process = started([*command(tables(tmp_path / "data", 11), output, "--device", "cpu"), "--steps", "100000",
                       "--save-every", "100000"], output)  # fmt: skip
    os.kill(children(process)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "DataLoader worker" in said and "the last good state is in" in said
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == int(rows(output)[-1]["step"]) >= 2


def test_a_signal_to_the_workers_too_is_an_ordinary_stop(tmp_path: Path) -> None:
    """As `timeout` and service managers send it: to the whole group."""
    output = tmp_path / "run"
    process = started([*command(tables(tmp_path / "data", 11), output, "--device", "cpu"), "--steps", "100000",
                       "--save-every", "100000"], output)  # fmt: skip
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == int(rows(output)[-1]["step"]) >= 2


def test_a_run_that_is_killed_in_an_evaluation_repeats_it(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def killed(network: object) -> dict[str, float]:
        raise Killed

    trainer = small(tmp_path, eval_every=8)
    trainer.evaluate = killed
    with pytest.raises(Killed):
        trainer.run()
    again = small(tmp_path, eval_every=8, resume=True)
    assert again.state.step == 4  # not 8, behind which nobody would look back
    again.evaluate = lambda network: {"pa_mpjpe": 7.0}
    assert again.run() and [row["step"] for row in rows(tmp_path) if row["pa_mpjpe"]] == ["8"]


@pytest.mark.parametrize(
    "error",
    [OSError("gone.tsv: no such file"), RuntimeError("DataLoader worker (pid 7) is killed"), ValueError("no row")],
)
def test_an_evaluation_that_fails_keeps_every_step(tmp_path: Path, error: Exception) -> None:
    def failing(network: object) -> dict[str, float]:
        raise error

    trainer = small(tmp_path, eval_every=6)
    trainer.evaluate = failing
    with pytest.raises(TrainingFailed, match=f"the evaluation failed: {re.escape(str(error))}; the last good state"):
        trainer.run()
    again = small(tmp_path, eval_every=6, resume=True)
    assert again.state.step == 6 and again.run()


def test_a_signal_that_ends_an_evaluation_ends_the_run_with_everything_saved(tmp_path: Path) -> None:
    """It goes to the workers of the evaluation, too, where it goes to all processes of a job."""

    def stopped(network: object) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")

    trainer = small(tmp_path, eval_every=6)
    trainer.evaluate = stopped
    assert not trainer.run()
    assert small(tmp_path, eval_every=6, resume=True).state.step == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_an_evaluation_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """It may take longer than a cluster waits after its signal."""

    def endless(network: object) -> dict[str, float]:
        signal.raise_signal(number)
        raise AssertionError("the evaluation went on")

    trainer = small(tmp_path, eval_every=6)
    trainer.evaluate = endless
    before = signal.getsignal(number)
    assert not trainer.run() and signal.getsignal(number) is before
    assert trainer.log is not None
    with trainer.log.path.open(newline="") as file:
        assert {row["pa_mpjpe"] for row in csv.DictReader(file)} == {""}
    assert small(tmp_path, eval_every=6, resume=True).state.step == 6


def test_a_board_that_cannot_be_closed_hides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full:
        def scalars(self, *arguments: object) -> None: ...

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    trainer = small(tmp_path / "whole")
    trainer.board = Full()  # type: ignore[assignment]
    assert trainer.run() and "TensorBoard is not complete: [Errno 28]" in capsys.readouterr().err
    trainer = small(tmp_path / "failing", lambda step: (_ for _ in ()).throw(SourceFailed("no batch")))
    trainer.board = Full()  # type: ignore[assignment]
    with pytest.raises(TrainingFailed, match="no batch"):
        trainer.run()


def test_saving_is_no_time_of_stepping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes while it saves alone."""
    now = [0.0]
    monkeypatch.setattr("fastmetro.training.trainer.time", SimpleNamespace(monotonic=lambda: now[0]))
    trainer = small(tmp_path)
    save = trainer.state.save

    def slow(*arguments) -> None:
        now[0] += 100
        save(*arguments)

    trainer.state.save = slow
    assert trainer.run() and now[0] >= 300 and trainer.state.seconds == 0


def small(output: Path, source=None, **options) -> Trainer:
    torch.manual_seed(0)
    settings = {"batch_size": 8, "steps": 12, "log_every": 2, "save_every": 4, "precision": "fp32", **options}
    config = TrainConfig(output=output, **settings)
    indices = SyntheticBatches(None, 8, torch.device("cpu")).indices
    usual = lambda step: Batch(*labelled(indices(step)))  # noqa: E731
    return Trainer(config, SmallNetwork(), Objective(MeshRecoveryLoss(MESH)), source or usual)


def _on_a_full_disk(rank: int, output: Path, result: Path) -> None:
    trainer = small(output)
    save = trainer.state.save

    def limited(*arguments) -> None:
        if trainer.state.step == 8:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        save(*arguments)

    trainer.state.save = limited
    try:
        trainer.run()
    except TrainingFailed as error:
        result.write_text(str(error))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    """A file cannot grow beyond 3,000 bytes, as on a disk that is full."""
    output, result = tmp_path / "run", tmp_path / "result"
    mp.spawn(_on_a_full_disk, (output, result))
    assert "could not be written" in result.read_text()
    assert f"the last good state is in {output / 'checkpoint.pt'}" in result.read_text()
    assert {path.name for path in output.iterdir()} == {"checkpoint.pt", "log.csv"}
    trainer = small(output, resume=True)
    assert trainer.state.step == 4 and trainer.run()


def test_a_worker_that_dies_amid_a_step_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch) -> None:
    """PyTorch's signal handler raises wherever the process is."""
    trainer = small(tmp_path / "run")
    step = trainer._train_on

    def dying(batch: Batch) -> None:
        if trainer.state.step == 6:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        step(batch)

    monkeypatch.setattr(trainer, "_train_on", dying)
    with pytest.raises(TrainingFailed, match=r"the data ended: DataLoader worker .*; the last good state is in"):
        trainer.run()

    def other(batch: Batch) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(trainer, "_train_on", other)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        trainer.run()
    again = small(tmp_path / "run", resume=True)
    assert again.state.step == 4 and again.run()


def test_a_source_that_fails_keeps_every_step(tmp_path: Path) -> None:
    usual = small(tmp_path / "whole").source

    def failing(step: int) -> Batch:
        if step == 7:
            raise SourceFailed("the samples of step 7 could not be read: a worker died")
        return usual(step)

    trainer = small(tmp_path / "run", failing)
    with pytest.raises(TrainingFailed, match=r"step 7 could not be read.*last good state is in .*checkpoint\.pt"):
        trainer.run()
    assert torch.load(trainer.checkpoint, weights_only=True)["step"] == 7
    assert small(tmp_path / "run", resume=True).run()
    whole = small(tmp_path / "whole2")
    whole.run()
    again = torch.load(trainer.checkpoint, weights_only=True)["model"]
    assert all(torch.equal(value, again[name]) for name, value in whole.model.state_dict().items())


def test_bad_rows_are_counted_in_the_log(tmp_path: Path) -> None:
    usual = small(tmp_path / "x").source
    bad = lambda step: {"broken image": 1} if step > 2 else {}  # noqa: E731
    trainer = small(tmp_path / "run", lambda step: usual(step)._replace(skipped=bad(step)))
    trainer.run()
    assert [row["skipped"] for row in rows(tmp_path / "run")] == ["0", "1", "3", "5", "7", "9"]
    assert torch.load(trainer.checkpoint, weights_only=True)["skipped"] == 9


def test_the_count_of_bad_rows_goes_on(tmp_path: Path) -> None:
    usual = small(tmp_path / "x").source
    bad = lambda step: usual(step)._replace(skipped={"broken image": 2, "wrong shape": 1})  # noqa: E731
    stopped = small(tmp_path / "run", bad)
    stopped.state.skipped = 5
    stopped.state.save(stopped.checkpoint, stopped.settings)
    again = small(tmp_path / "run", bad, resume=True)
    assert again.state.skipped == 5
    again.run()
    count = [int(row["skipped"]) for row in rows(tmp_path / "run")]
    assert count[-1] == 5 + 3 * again.state.step and count == sorted(count)


def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    trainer = small(tmp_path)
    trainer.run()
    log = tmp_path / "log.csv"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:9])
    small(tmp_path, resume=True)
    assert log.read_text().splitlines(keepends=True) == lines[:4]
