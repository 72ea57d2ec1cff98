"""`python -m bench adamw`: every contender is held against float64, and floors are what must be moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import adamw
from fastmetro.profiling.record import read_rows

CPU = torch.device("cpu")


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "adamw.csv"
    adamw.main(["--tensors", "6", "--rounds", "1", "--device", "cpu", "--csv", str(path)])
    rows = read_rows(path, adamw.COLUMNS)
    assert [row["contender"] for row in rows] == ["pytorch", "ours", "ours, no norm", "ours, half"]
    assert all(0 < float(row["error"]) < 1e-3 for row in rows) and "ours, half" in capsys.readouterr().out


def test_floors() -> None:
    parameters = [torch.zeros(4, 2, 3, 3), torch.zeros(10)]
    found = adamw.contenders(parameters, every=False)
    assert found["pytorch"].bytes == found["ours"].bytes == 32 * 82
    assert found["ours, no norm"].bytes == 28 * 82
    assert found["ours, half"].bytes == (24 + 2 + 2 * 2) * 72 + 32 * 10


def test_the_network() -> None:
    parameters = adamw.weights(1000, CPU)
    assert 150 < len(parameters) < 300 and 25e6 < sum(one.numel() for one in parameters) < 40e6


SPOILED: dict[str, dict[str, Any]] = {
    "rate": {"rate": torch.tensor(1.01e-3)},
    "decay": {"weight_decay": 0.0},
    "betas": {"betas": (0.9, 0.981)},
}


@pytest.mark.parametrize("change", SPOILED.values(), ids=SPOILED)
def test_what_is_wrong_is_seen(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Any] = adamw.adamw
    monkeypatch.setattr(adamw, "adamw", lambda groups, **given: right([groups[0]._replace(**change)], **given))
    with pytest.raises(ValueError, match="the change of the parameters is off by"):
        adamw.measure(4, 1, CPU)


def test_a_wrong_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Any] = adamw.adamw
    monkeypatch.setattr(adamw, "adamw", lambda groups, **given: right(groups, **given) * 1.001)
    with pytest.raises(ValueError, match="the norm is"):
        adamw.measure(4, 1, CPU)
