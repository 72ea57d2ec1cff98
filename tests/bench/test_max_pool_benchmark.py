"""`python -m bench max_pool`: every contender is held against float64, and the floor is that of the stem."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spoiling import Scaled
from torch import nn

from bench import max_pool
from fastmetro.models.backbones import ResNet50
from fastmetro.profiling.record import read_rows


def test_the_shape_is_that_of_the_network() -> None:
    network, found = ResNet50().eval(), []
    network.maxpool.register_forward_hook(lambda _layer, given, _out: found.append(given[0].shape[1:]))
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    assert found == [(max_pool.CHANNELS, max_pool.SIZE, max_pool.SIZE)] and isinstance(network.maxpool, nn.MaxPool2d)


def test_rows_and_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pools.csv"
    options = {"batch": 2, "size": 14, "rounds": 1, "dtype": "float32", "device": "cpu", "csv": path}
    max_pool.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    rows = read_rows(path, max_pool.COLUMNS)
    assert [row["contender"] for row in rows] == ["pytorch", "ours"]
    assert rows[0]["shape"] == "2x64x14x14" and "ours" in capsys.readouterr().out
    x = torch.empty(32, 64, 112, 112, dtype=torch.bfloat16, device="meta")
    forward, both = max_pool.floors(x)
    assert both == 2 * forward == pytest.approx(2 * 1e6 * (51.380224e6 + 12.845056e6 + 6.422528e6) / 4.2e12)


SPOILED = {"shift": lambda y: y + 1e-6, "gradient": Scaled.apply, "nan": lambda y: y * float("nan")}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_is_wrong_is_seen(spoil: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = max_pool._ours
    monkeypatch.setattr(max_pool, "_ours", lambda x, config=None: spoil(right(x)))
    with pytest.raises(ValueError, match="ours: not PyTorch's maxima, or errors of the gradients are"):
        max_pool.measure(1, 14, torch.float32, 1, torch.device("cpu"))
