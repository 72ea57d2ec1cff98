"""`python -m bench image_weight_gradient`: held against float64, with the shape of the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import image_weight_gradient as bench
from fastmetro.models.backbones import ResNet50
from fastmetro.profiling.record import read_rows


def test_the_layer_is_that_of_the_network() -> None:
    layer = ResNet50().conv1
    assert (layer.out_channels, layer.in_channels) == (bench.OUTPUTS, 3) and layer.bias is None
    assert layer.kernel_size == (bench.KERNEL,) * 2 and layer.stride == (bench.STRIDE,) * 2
    assert layer.padding == (bench.PADDING,) * 2


def test_rows_and_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    options = {"batch": 2, "size": 14, "rounds": 1, "dtype": "float32", "device": "cpu", "csv": path}
    bench.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    rows = read_rows(path, bench.COLUMNS)
    assert [row["contender"] for row in rows] == ["pytorch", "ours"]
    assert rows[0]["shape"] == "2x3x14x14" and "ours" in capsys.readouterr().out
    assert float(rows[0]["floor_us"]) == pytest.approx(1e6 * 4 * 2 * (3 * 14**2 + 64 * 7**2) / 4.2e12, rel=1e-3)


@pytest.mark.parametrize("spoil", [lambda y: 1.01 * y, lambda y: y * float("nan")])
def test_what_is_wrong_is_seen(spoil: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.image_weight_gradient
    monkeypatch.setattr(bench, "image_weight_gradient", lambda *given, **named: spoil(right(*given, **named)))
    with pytest.raises(ValueError, match="ours: errors are"):
        bench.measure(1, 14, torch.float32, 1, torch.device("cpu"))
