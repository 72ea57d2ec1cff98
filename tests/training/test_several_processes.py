"""Several processes train as one does."""

from __future__ import annotations

import csv
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from small_network import MESH, ConvolutionalNetwork, SmallNetwork, labelled

from fastmetro.distributed import World, find_device, open_world
from fastmetro.models.backbones.half_weights import keep_half_weights
from fastmetro.models.backbones.overlap import overlap_weight_gradients
from fastmetro.training.config import TrainConfig
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.objective import Objective
from fastmetro.training.schedule import make_optimizer
from fastmetro.training.sources import Batch, SyntheticBatches
from fastmetro.training.step import CapturedStep, TrainingStep
from fastmetro.training.trainer import Trainer

SETTINGS: dict[str, Any] = {"batch_size": 12, "steps": 12, "log_every": 3, "save_every": 6, "precision": "fp32",
                            "learning_rate": 1e-2}  # fmt: skip
CLOCK = ("seconds", "images_per_second")
SECONDS = 300


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_processes(work, count: int, *arguments) -> None:
    """`work(rank, *arguments)` in as many processes, in the environment that torchrun gives them."""
    running = mp.spawn(_in_process, (work, count, free_port(), arguments), nprocs=count, join=False)
    end = time.monotonic() + SECONDS
    while not running.join(1.0):  # raises what a process raised, and ends the others
        if time.monotonic() > end:
            for process in running.processes:
                process.kill()
            pytest.fail(f"{count} processes wait for each other, or are not done after {SECONDS} s")


def _in_process(rank: int, work, count: int, port: int, arguments) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    work(rank, *arguments)
    threads = {name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")}
    assert not any("gloo" in name for name in threads), f"a group's threads outlive it: {threads}"


def train(
    output: Path, world: World, device: torch.device, dropout: float = 0.0, stop: int = 99, stall: int | None = None,
    **options: Any,
) -> Trainer:  # fmt: skip
    """A run; with `stall` a slow one, where process 0 gets no batch from that step on and the others wait for it."""
    torch.manual_seed(world.rank)  # rank 0's weights count
    config = TrainConfig(output=output, **(SETTINGS | options))
    indices = SyntheticBatches(None, config.batch_size, device, world).indices

    def source(step: int) -> Batch:
        if stall is not None:
            time.sleep(SECONDS if world.first and step >= stall else 0.02)
        if step == stop:
            trainer._stop = world.first  # as a signal does, in one process only
        return Batch(*labelled(indices(step)))

    trainer = Trainer(config, SmallNetwork(dropout), Objective(MeshRecoveryLoss(MESH)), source, world=world)
    trainer.run()
    return trainer


def _train_in(rank: int, output: Path, options: dict) -> None:
    with open_world("cpu") as (world, device):
        assert world.rank == rank
        trainer = train(output, world, device, **options)
        weights = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
        assert all(torch.equal(weights, other) for other in world.gather(weights))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("count", "accumulate"), [(2, 1), (3, 2)])
def test_the_curve_is_that_of_one_process(count: int, accumulate: int, tmp_path: Path) -> None:
    """Losses, terms and gradient norms, although samples of different processes have different labels."""
    train(tmp_path / "one", World(), torch.device("cpu"))
    run_processes(_train_in, count, tmp_path / "many", {"accumulate": accumulate})
    one, many = rows(tmp_path / "one"), rows(tmp_path / "many")
    assert [row["step"] for row in many] == ["3", "6", "9", "12"]
    for a, b in zip(one, many, strict=True):
        for name in ("loss", "gradient_norm", "token_joints_3d", "mesh_joints_2d", "vertices_fine", "learning_rate"):
            assert float(b[name]) == pytest.approx(float(a[name]), rel=2e-5, abs=2e-6), name


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """With dropout, whose random numbers every process has for itself; a signal that reaches one stops all."""
    run_processes(_train_in, 2, tmp_path / "whole", {"dropout": 0.3})
    run_processes(_train_in, 2, tmp_path / "parts", {"dropout": 0.3, "stop": 4})
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 6  # at the next report
    run_processes(_train_in, 2, tmp_path / "parts", {"dropout": 0.3, "resume": True})
    whole, parts = (torch.load(tmp_path / x / "checkpoint.pt", weights_only=True) for x in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 12
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    assert [row["loss"] for row in rows(tmp_path / "whole")] == [row["loss"] for row in rows(tmp_path / "parts")]


def killed(output: Path, after: int, options: dict[str, Any]) -> None:
    """Start two processes, and kill both at some moment after a step was logged; they never end by themselves."""
    work = (_train_in, 2, free_port(), (output, options | {"stall": after + 3}))
    running = mp.spawn(_in_process, work, nprocs=2, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not ((output / "log.csv").is_file() and len(rows(output)) >= after):
            assert time.monotonic() < end and all(process.is_alive() for process in running.processes)
            time.sleep(0.005)
    finally:
        for process in running.processes:
            process.kill()
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        running.join()


def same(one: Any, other: Any) -> bool:
    """Bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def _resume_and_train_whole(rank: int, folder: Path, options: dict[str, Any]) -> None:
    with open_world("cpu") as (world, device):
        train(folder / "parts", world, device, resume=True, **options)
        train(folder / "whole", world, device, **options)


def test_killed_processes_go_on_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL, between saves or amid one: only what a clock says differs from the run that nobody killed."""
    options = {"dropout": 0.3, "log_every": 1, "save_every": 4}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    killed(parts, 6, options)
    (parts / ".checkpoint.pt.x.part").write_bytes(b"as if killed while it saved")
    run_processes(_resume_and_train_whole, 2, tmp_path, options)
    logs = [[{k: v for k, v in row.items() if k not in CLOCK} for row in rows(folder)] for folder in (whole, parts)]
    assert logs[0] == logs[1] and len(logs[0]) == 12
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, parts))
    assert first.keys() == second.keys() and len(first["random"]) == 2
    assert [name for name, value in first.items() if name not in CLOCK and not same(value, second[name])] == []
    assert {path.name for path in parts.iterdir()} == {"checkpoint.pt", "log.csv"}


def half_step(world: World, device: torch.device) -> TrainingStep:
    """Of a network with a half-precision copy of a weight, where its gradient is left."""
    torch.manual_seed(0)
    model = ConvolutionalNetwork().to(device, memory_format=torch.channels_last)
    overlap_weight_gradients(model)
    keep_half_weights(model)
    optimizer = make_optimizer(model, 1e-2, 0.01, fused="project", capturable=True)
    objective = Objective(MeshRecoveryLoss(MESH)).to(device)
    return TrainingStep(model, model, objective, optimizer, clip=1.0, precision="bf16", world=world)


def half_steps(step: TrainingStep, device: torch.device) -> torch.Tensor:
    """Steps with one part and with two, which leave gradients in the copy and in the weight; the weights and losses."""
    indices = SyntheticBatches(None, 24, device, step.world).indices
    seen, weight = [], step.model.convolution.weight
    for number in range(6):
        step.accumulate = 1 + number % 2
        seen.append(step.world.sum(step(*labelled(indices(number)))[:1]) / step.world.size)
        assert (weight.grad is None) == (number % 2 == 0) and (weight.half_copy.tensor.grad is None) == (number % 2)
    weights = [parameter.detach().reshape(-1) for parameter in step.model.parameters()]
    return torch.cat([*weights, weight.half_copy.tensor.reshape(-1).float(), *seen])


def _half_steps(rank: int, folder: Path) -> None:
    with open_world("cpu") as (world, device):
        torch.save(half_steps(half_step(world, device), device), folder / f"{rank}.pt")


def test_gradients_in_half_precision_copies_are_averaged(tmp_path: Path) -> None:
    run_processes(_half_steps, 2, tmp_path)
    found, same = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = half_steps(half_step(World(), torch.device("cpu")), torch.device("cpu"))
    assert torch.equal(found, same)
    torch.testing.assert_close(found[-6:], alone[-6:], rtol=0.003, atol=0)
    # A step moves a weight by 0.01, and where its gradient is nearly 0, rounding decides where to.
    assert ((found - alone).abs() > 0.004).float().mean() < 0.003


def _captured_steps(rank: int, folder: Path) -> None:
    with open_world("cuda") as (world, device):
        indices = SyntheticBatches(None, 24, device, world).indices
        eager, other = half_step(world, device), half_step(world, device)
        captured = CapturedStep(other, *labelled(indices(0)))
        for number in range(5):
            values = [step(*labelled(indices(number))) for step in (eager, captured)]
            torch.testing.assert_close(values[0], values[1], rtol=2e-3, atol=1e-4)
        weights = [torch.cat([p.detach().reshape(-1) for p in step.model.parameters()]) for step in (eager, other)]
        torch.save([one.cpu() for one in weights], folder / f"{rank}.pt")
        del captured  # before the process group, for which NCCL would wait


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_steps_of_two_gpus_are_captured(tmp_path: Path) -> None:
    """Collectives are part of the graph."""
    run_processes(_captured_steps, 2, tmp_path)
    (eager, captured), same = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(eager, same[0]) and torch.equal(captured, same[1])
    assert ((eager - captured).abs() > 0.004).float().mean() < 0.003


def _average(rank: int, folder: Path) -> None:
    with open_world("cpu") as (world, device):
        parameters = [
            torch.zeros(2, 3), torch.zeros(2, 3).T, torch.zeros(2, 3, dtype=torch.float64),
            torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        ]  # fmt: skip
        gradients = [
            torch.full((3, 2), float(rank)).T,  # of another layout than the parameter
            torch.full((2, 3), 5.0 * rank).T,
            torch.full((2, 3), 10.0 * rank, dtype=torch.float64),
            rank * torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        ]  # fmt: skip
        if rank == 1:  # the same numbers in another order in memory
            gradients[3] = gradients[3].contiguous()
        whole = torch.zeros(40)
        gradients.append(whole[10:16].fill_(rank).view(2, 3))  # amid a storage
        parameters.append(torch.zeros(2, 3))
        world.average_gradients(zip(parameters, gradients, strict=True))
        assert not whole[:10].any() and not whole[16:].any()
        flags = [world.any(rank == 2, device), world.any(False, device)]
        torch.save([*gradients, flags, world.gather(rank)], folder / f"{rank}.pt")


def test_gradients_are_averaged(tmp_path: Path) -> None:
    """Of any dtype and strides."""
    run_processes(_average, 3, tmp_path)
    for rank in range(3):
        first, second, third, fourth, fifth, flags, ranks = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(first, torch.full((2, 3), 1.0)) and torch.equal(second, torch.full((3, 2), 5.0))
        assert torch.equal(third, torch.full((2, 3), 10.0, dtype=torch.float64))
        assert torch.equal(fourth, torch.arange(120.0).view(2, 3, 4, 5)) and torch.equal(fifth, torch.ones(2, 3))
        assert flags == [True, False] and ranks == [0, 1, 2]


def test_alone_there_is_nothing_to_do() -> None:
    with open_world("cpu") as (world, device):
        assert world == World() and device == torch.device("cpu")
        assert world.any(True, device) and world.gather(3) == [3]


def test_numbered_devices_are_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="under torchrun, got 'cuda:1'"), open_world("cuda:1"):
        pass


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("name", ["cuda", "cuda:99", "gpu", "meta", ""])
def test_devices_that_are_not_there_are_named(name: str, processes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything runs; the message says what there is."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=rf"^device must be .*'auto'.*, got '{name}'$"), open_world(name):
        pass


def test_devices_that_are_there_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_device() == find_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"one of 'auto', 'cpu' \(PyTorch finds no GPU here\), got 'cuda'"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device() == find_device("cuda") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"'cpu', 'cuda', 'cuda:0', 'cuda:1', got 'cuda:2'"):
        find_device("cuda:2")
