"""Of several processes one fails: all stop, soon, and say why; the run goes on from its last checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_network import MESH, SmallNetwork, labelled
from test_interrupted import command
from test_several_processes import free_port, rows, run_processes
from test_sources import tables

from fastmetro.distributed import World, open_world
from fastmetro.models.checkpoints import read_state_dict
from fastmetro.training.config import TrainConfig
from fastmetro.training.loop import train
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.objective import Objective
from fastmetro.training.sources import Batch, SourceFailed, SyntheticBatches
from fastmetro.training.trainer import Trainer, TrainingFailed

SETTINGS = {"batch_size": 12, "steps": 12, "log_every": 3, "save_every": 6, "precision": "fp32", "learning_rate": 1e-2}


def made(output: Path, world: World, fail_at: int | None, **options) -> Trainer:
    """A run whose process 1 gets no batch at a step."""
    torch.manual_seed(0)
    config = TrainConfig(output=output, **(SETTINGS | options))
    indices = SyntheticBatches(None, config.batch_size, torch.device("cpu"), world).indices

    def source(step: int) -> Batch:
        if world.rank == 1 and step == fail_at:
            raise SourceFailed(f"the samples of step {step} could not be read")
        return Batch(*labelled(indices(step)))

    return Trainer(config, SmallNetwork(0.3), Objective(MeshRecoveryLoss(MESH)), source, world=world)


def _train(rank: int, folder: Path, name: str, fail_at: int | None, full_at: tuple[str, int] | None, options) -> None:
    """Writes down what each process says and raises; files of the first cannot be written from some step on."""
    with open_world("cpu") as (world, _), (folder / f"{name}.said.{rank}").open("w") as said:
        sys.stderr = said
        trainer = made(folder / name, world, fail_at, **options)
        if full_at is not None and rank == 0:
            owner, method = (trainer.state, "save") if full_at[0] == "checkpoint.pt" else (trainer.log, "write")
            write = getattr(owner, method)

            def writing(*arguments) -> None:
                if trainer.state.step >= full_at[1]:
                    raise OSError(28, "No space left on device", full_at[0])
                write(*arguments)

            setattr(owner, method, writing)
        try:
            trainer.run()
        except TrainingFailed as error:
            (folder / f"{name}.raised.{rank}").write_text(str(error))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def test_all_stop_where_one_gets_no_batch(tmp_path: Path) -> None:
    """At the next report; what it trained on until then counts for nothing."""
    run_processes(_train, 2, tmp_path, "whole", None, None, {})
    run_processes(_train, 2, tmp_path, "parts", 7, None, {})
    here = re.escape(str(tmp_path / "parts" / "checkpoint.pt"))
    said = [(tmp_path / f"parts.said.{rank}").read_text() for rank in range(2)]
    raised = [(tmp_path / f"parts.raised.{rank}").read_text() for rank in range(2)]
    assert said[1] == "fastmetro: process 1 failed: the samples of step 7 could not be read\n"
    assert "failed" not in said[0]
    assert re.fullmatch(rf"another process failed, and said why; the last good state is in {here}", raised[0])
    assert re.fullmatch(rf"the samples of step 7 could not be read; the last good state is in {here}", raised[1])
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 6
    assert [row["step"] for row in rows(tmp_path / "parts")] == ["3", "6"]
    run_processes(_train, 2, tmp_path, "parts", None, None, {"resume": True})
    again = weights(tmp_path / "parts")
    assert all(torch.equal(value, again[name]) for name, value in weights(tmp_path / "whole").items())


def test_a_first_batch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Not even one batch to repeat; a corrected start finds the folder as it was."""
    run_processes(_train, 2, tmp_path, "run", 0, None, {})
    raised = [(tmp_path / f"run.raised.{rank}").read_text() for rank in range(2)]
    assert "no state was saved" in raised[0] and "step 0 could not be read; no state was saved" in raised[1]
    assert not list((tmp_path / "run").iterdir())
    run_processes(_train, 2, tmp_path, "run", None, None, {})
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 12


@pytest.mark.parametrize(("name", "kept"), [("checkpoint.pt", 6), ("log.csv", 6)])
def test_all_stop_where_the_first_cannot_write(name: str, kept: int, tmp_path: Path) -> None:
    run_processes(_train, 2, tmp_path, "run", None, (name, 9), {})
    raised = [(tmp_path / f"run.raised.{rank}").read_text() for rank in range(2)]
    assert re.search(rf"could not be written: .*No space left on device: '{name}'; the last good state", raised[0])
    assert raised[1].startswith("another process failed, and said why; the last good state is in")
    assert "process 0 failed" in (tmp_path / "run.said.0").read_text()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == kept


def _on_two_nodes(rank: int, folder: Path) -> None:
    """The second process sees another, empty folder."""
    config = TrainConfig(output=folder / f"node{rank}", batch_size=4, image_size=32, photographs=False, device="cpu",
                         precision="fp32", eval_count=2, steps=1)  # fmt: skip
    with open_world("cpu"):  # one group for all: a second one could meet the first's store, which has the same address
        assert train(config)["finished"]
        try:
            train(config)
        except (FileExistsError, RuntimeError) as error:
            (folder / f"raised.{rank}").write_text(f"{type(error).__name__}: {error}")
        assert train(replace(config, resume=True, eval_count=0))["step"] == 1


def test_only_the_first_process_needs_the_folder(tmp_path: Path) -> None:
    run_processes(_on_two_nodes, 2, tmp_path)
    assert not (tmp_path / "node1").exists() and read_state_dict(tmp_path / "node0" / "weights.safetensors")
    raised = [(tmp_path / f"raised.{rank}").read_text() for rank in range(2)]
    assert raised[0].startswith("FileExistsError: ") and "would be overwritten" in raised[0]
    assert raised[1].startswith("RuntimeError: process 0 failed: ") and "would be overwritten" in raised[1]


def _sends(rank: int, folder: Path) -> None:
    with open_world("cpu") as (world, _):
        assert world.by_first(lambda: {"rank": rank}) == {"rank": 0}
        try:
            world.by_first(lambda: [][1])
        except (IndexError, RuntimeError) as error:
            (folder / f"{rank}").write_text(f"{type(error).__name__}: {error}")


def test_what_the_first_raises_reaches_all(tmp_path: Path) -> None:
    run_processes(_sends, 2, tmp_path)
    said = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    assert said == ["IndexError: list index out of range", "RuntimeError: process 0 failed: list index out of range"]


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
places = pytest.mark.parametrize(
    "place", [("cpu",), pytest.param(("cuda", "--fused", "--capture-step"), marks=TWO_GPUS)], ids=["cpu", "cuda"]
)
"""A device, and options for it: on GPUs collectives are in the graphs."""


def torchrun(data: Path, output: Path, place: tuple[str, ...], *more: str) -> subprocess.Popen[str]:
    """Two processes with a worker each that have made their first steps."""
    where = ["--nnodes", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--nproc-per-node", "2"]
    train = command(data, output, "--device", *place, "--steps", "100000", *more)[1:]
    arguments = [sys.executable, "-m", "torch.distributed.run", *where, *train]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not ((output / "checkpoint.pt").is_file() and rows(output)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@places
def test_torchrun_ends_all_where_a_worker_of_one_dies(place: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = torchrun(tables(tmp_path / "data", 11), output, place)
    began = time.monotonic()
    os.kill(children(children(process.pid)[1])[0], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert re.search(r"process \d failed: .*DataLoader worker", said) and "the last good state is in" in said
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] >= 2


def test_the_others_say_that_one_was_killed(tmp_path: Path) -> None:
    """On CPUs, whose connections break; on GPUs they wait for it until torchrun kills them."""
    output = tmp_path / "run"
    process = torchrun(tables(tmp_path / "data", 11), output, ("cpu",))
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"fastmetro: error: another process ended: .*; the last good state is in", said, re.DOTALL)


@places
def test_torchrun_stops_with_everything_saved(place: tuple[str, ...], tmp_path: Path) -> None:
    """It sends the signal to each process's whole group; the workers must not end of it, many steps before they may."""
    output = tmp_path / "run"
    process = torchrun(tables(tmp_path / "data", 11), output, place, "--log-every", "10", "--save-every", "10")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert "failed:" not in said
    saved = torch.load(output / "checkpoint.pt", weights_only=True)["step"]
    assert saved == int(rows(output)[-1]["step"]) and (output / "weights.safetensors").is_file()
