"""`python -m bench residual_norm`: every contender is held against float64, and floors and sizes are the networks'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spoiling import Scaled

from bench import residual_norm
from bench.residual_norm import CASES, Case
from fastmetro.models.config import CONFIGS
from fastmetro.profiling.record import read_rows


def test_the_widths_are_those_of_the_networks() -> None:
    config = CONFIGS["fastmetro-s"]
    widths = {case.width for case in CASES if not case.relu}
    assert widths == {*config.widths, 64} and CASES[-1].width == config.feedforward[0]
    assert {case.rows for case in CASES} == {32 * (14 + 431), 32 * (1 + 49)}


def test_rows_and_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "norms.csv"
    options = {"rows": 24, "rounds": 1, "dtype": "float32", "device": "cpu", "csv": path}
    residual_norm.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    rows = read_rows(path, residual_norm.COLUMNS)
    assert [row["contender"] for row in rows] == ["pytorch", "ours"] * len(CASES)
    assert rows[0]["case"] == "24 x 512 residual_norm, float32 stream" and "ours" in capsys.readouterr().out
    numbers = 14240 * 512 / 4.2e12 * 1e6
    assert residual_norm.floors(Case(14240, 512, True), torch.bfloat16) == pytest.approx((12 * numbers, 28 * numbers))
    assert residual_norm.floors(Case(14240, 512, False), torch.bfloat16) == pytest.approx((8 * numbers, 18 * numbers))
    assert residual_norm.floors(Case(14240, 512, relu=True), torch.bfloat16) == pytest.approx(
        (4 * numbers, 10 * numbers)
    )


SPOILED = {"shift": lambda y: y + 1e-3, "gradient": Scaled.apply, "nan": lambda y: y * float("nan")}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_is_wrong_is_seen(
    spoil: Callable[[Any], Any], relu: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_ours_relu" if relu else "_ours"
    right = getattr(residual_norm, name)
    monkeypatch.setattr(residual_norm, name, lambda *given, p: tuple(spoil(one) for one in right(*given, p=p)))
    with pytest.raises(ValueError, match="ours: errors of the results and their gradients are"):
        residual_norm.measure(Case(8, 16, relu=relu, biased=biased), torch.float32, 1, torch.device("cpu"))
