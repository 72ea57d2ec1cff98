"""`python -m bench batch_norm`: every contender is held against float64, and layers are those of ResNet-50."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spoiling import Scaled
from torch import nn

from bench import batch_norm
from fastmetro.models.backbones import ResNet50
from fastmetro.profiling.record import read_rows


def test_the_layers_are_those_of_the_network() -> None:
    found: Counter[tuple[int, int]] = Counter()

    def note(layer: nn.Module, given: tuple[torch.Tensor, ...], _: object) -> None:
        found[given[0].shape[1], given[0].shape[2]] += 1

    network = ResNet50().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(note)
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    told: Counter[tuple[int, int]] = Counter()
    for one in batch_norm.LAYERS:
        told[one.channels, one.size] += one.times * (1 + one.joint)
    assert told == found and sum(found.values()) == 53


def test_rows_and_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "norms.csv"
    options = {"batch": 2, "layers": 2, "rounds": 1, "dtype": "float32", "device": "cpu", "csv": path}
    batch_norm.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    rows = read_rows(path, batch_norm.COLUMNS)
    assert [row["contender"] for row in rows] == ["pytorch", "ours"] * 2
    assert "forward" in capsys.readouterr().out
    one = batch_norm.Layer(8, 4, False, False, 1)
    residual = one._replace(residual=True, relu=True)
    layers = residual, one, residual._replace(joint=True)
    with_residual, without, joint = (batch_norm.floors(layer, 2, torch.bfloat16) for layer in layers)
    assert with_residual[0] == pytest.approx(1.5 * without[0])  # x, residual, result
    assert with_residual[1] == pytest.approx(without[1] * (7 + 2 / 16) / 5)  # a bit is written and read
    assert joint[0] == with_residual[0] and joint[1] == pytest.approx(without[1] * (8 + 2 / 16) / 5)  # residual, again


SPOILED = {"scale": lambda y: 1.01 * y, "shift": lambda y: y + 0.01, "gradient": Scaled.apply}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_is_wrong_is_seen(spoil: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = batch_norm._ours
    monkeypatch.setattr(batch_norm, "_ours", lambda *given, config=None, **options: spoil(right(*given, **options)))
    with pytest.raises(ValueError, match="errors of the result and its gradients are"):
        batch_norm.measure(batch_norm.LAYERS[-1], 2, torch.float32, 1, torch.device("cpu"))
