"""What a run is asked for reaches what does it: the step, the optimizer, the network, the progress bar."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_network import SmallNetwork
from test_interrupted import rows, small
from torch import nn

from fastmetro.distributed import World
from fastmetro.training.config import Decay, TrainConfig
from fastmetro.training.loop import train
from fastmetro.training.optimizer import ClippedAdamW
from fastmetro.training.setup import Setup
from fastmetro.training.sources import Batch

CPU = torch.device("cpu")
TWO = World(0, 2)
NAMES = {name for name, _ in SmallNetwork().named_parameters()}
MATRICES = {"hidden.weight", "head.weight"}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("decay", "decayed", "plain"), [("all", NAMES, set()), ("matrices", MATRICES, NAMES - MATRICES)]
)
def test_settings_reach_the_step_and_the_optimizer(
    decay: Decay, decayed: set[str], plain: set[str], fused: bool, tmp_path: Path
) -> None:
    """None of them is the default."""
    trainer = small(
        tmp_path, decay=decay, weight_decay=0.07, betas=(0.8, 0.95), learning_rate=3e-3, gradient_clip=0.3,
        accumulate=4, precision="bf16", ema_decay=0.9, fused=fused,
    )  # fmt: skip
    step, optimizer = trainer.step, trainer.state.optimizer
    assert (step.clip, step.accumulate, step.precision) == (0.3, 4, "bf16")
    assert trainer.state.average.decay == 0.9 and trainer.state.scaler is step.scaler
    assert step.optimizer is optimizer and isinstance(optimizer, ClippedAdamW if fused else torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = optimizer.param_groups
    assert [{names[id(one)] for one in group["params"]} for group in groups] == [decayed, plain]
    assert [group["weight_decay"] for group in groups] == [0.07, 0.0]
    assert [(group["lr"], tuple(group["betas"])) for group in groups] == [(3e-3, (0.8, 0.95))] * 2


def test_a_compiled_run_is_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network and losses are compiled, and what is saved has the names of the network that is not."""
    made: list[tuple[object, object]] = []
    compile_ = torch.compile

    def recorded(given: Callable[..., Any], **options: Any) -> Any:
        made.append((given, compile_(given, **(options | {"backend": "eager"}))))
        return made[-1][1]

    monkeypatch.setattr(torch, "compile", recorded)
    plain = small(tmp_path / "plain", steps=4)
    assert plain.run() and not made
    torch._dynamo.reset()
    trainer = small(tmp_path / "compiled", steps=4, compile_model=True)
    assert [given for given, _ in made] == [trainer.model, trainer.objective]
    assert [result for _, result in made] == [trainer.step.network, trainer.step.objective]
    assert trainer.step.model is trainer.model and trainer.run()
    for row, expected in zip(rows(tmp_path / "compiled"), rows(tmp_path / "plain"), strict=True):
        for name in trainer.step.names:
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-5, abs=2e-6), name
    saved = torch.load(trainer.checkpoint, weights_only=True)
    assert set(saved["model"]) == set(saved["average"]) == set(plain.model.state_dict())


def made_model(world: World, **options: Any) -> nn.Module:
    config = TrainConfig(image_size=32, photographs=False, eval_count=0, batch_size=2, **options)
    return Setup(config, world, CPU).model


def norms(model: nn.Module) -> list[type[nn.Module]]:
    return [type(layer) for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def test_convolutions_are_channels_last() -> None:
    """Those of the network of a real run; of 1 x 1 pixels strides tell nothing."""
    model = made_model(TWO)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    weights = [weight for weight in weights if weight.shape[1] > 1 and weight[0, 0].numel() > 1]
    assert len(weights) > 3
    for weight in weights:
        _, channels, _, width = weight.shape
        assert weight.stride() == (weight[0].numel(), 1, width * channels, channels)
    assert set(norms(model)) == {nn.BatchNorm2d}  # not synchronised where nobody asked for it


def test_batch_norms_of_several_processes_are_synchronised() -> None:
    """All of them, with their names and statistics, where there are several processes."""
    alone, several = (made_model(world, sync_batch_norm=True) for world in (World(), TWO))
    assert set(norms(alone)) == {nn.BatchNorm2d} and set(norms(several)) == {nn.SyncBatchNorm}
    assert len(norms(alone)) == len(norms(several)) and list(alone.state_dict()) == list(several.state_dict())


def test_synchronised_batch_norms_need_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is made."""

    @contextlib.contextmanager
    def two(device: str) -> Iterator[tuple[World, torch.device]]:
        yield TWO, CPU

    monkeypatch.setattr("fastmetro.training.loop.open_world", two)
    with pytest.raises(ValueError, match=r"^sync_batch_norm needs GPUs$"):
        train(TrainConfig(output=tmp_path / "run", batch_size=2, sync_batch_norm=True, device="cpu"))
    assert not (tmp_path / "run").exists()


BAR = re.compile(r"(\d+)%\|[^\r]*\| (\d\d:\d\d) gone, (\d\d:\d\d) left, step (\d+), loss \d+\.\d{4}, (\d+) images/s")


def test_the_bar_tells_the_speed_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock by which a batch takes two seconds; a run that goes on reckons from what it does itself."""
    now = [1000.0]
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("fastmetro.training.trainer.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def bars(stop: int, **options: Any) -> list[tuple[str, ...]]:
        trainer = small(tmp_path, **options)
        source = trainer.source

        def slow(step: int) -> Batch:
            now[0] += 2.0
            return source(step)

        trainer.source, trainer._out_of_time = slow, lambda: trainer.state.step >= stop  # type: ignore[method-assign]
        capsys.readouterr()
        trainer.run()
        return BAR.findall(capsys.readouterr().err)

    first = bars(6)
    assert first[0] == ("17", "00:04", "00:19", "2", "4")
    assert first[-1] == ("50", "00:12", "00:12", "6", "4")
    rest = bars(12, resume=True)
    assert rest[0] == ("67", "00:04", "00:07", "8", "4")
    assert rest[-1] == ("100", "00:12", "00:00", "12", "4")
