"""What results say of how they were made."""

from __future__ import annotations

import shlex
import sys

import pytest

from bench import common


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["bench fps", "--cases", "s-r50-1"], "python -m bench fps --cases s-r50-1"),
        ([str(common.ROOT / "bench/fused/place.py"), "--csv", "a b"], "python -m bench.fused.place --csv 'a b'"),
        ([str(common.ROOT / "bench/training/__main__.py")], "python -m bench.training"),
        (["bench training", "--contenders", "ours, all"], "python -m bench training --contenders 'ours, all'"),
    ],
)
def test_the_command_is_one_that_a_shell_takes(argv: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert common.command_line() == expected
    assert shlex.split(expected)[:2] == ["python", "-m"]
