"""The command that measures: what it tries, how it checks candidates, and what it writes. Only times need a GPU."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import RUNNERS

from fastmetro_kernels import info, tuning
from fastmetro_kernels.attention import dispatch
from fastmetro_kernels.attention.configs import CONFIGS, KERNELS, PADDED_DIMS, PASSES, WHOLE, TritonConfig, problem
from fastmetro_kernels.tuning import (
    Candidate,
    Family,
    Point,
    candidates,
    cases,
    choice,
    command,
    measure,
    reader,
    table,
)

CPU = torch.device("cpu")
HERE = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dim", PADDED_DIMS)
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("pass_name", PASSES)
def test_candidates_are_possible_and_hold_what_is_pinned(pass_name: str, element_size: int, dim: int) -> None:
    tried = candidates.first_round(pass_name, element_size, dim)
    assert len(set(tried)) == len(tried)
    triton = [one for _, one in tried if isinstance(one, TritonConfig)]
    assert all(problem(one, pass_name) is None for one in triton)
    assert triton[0].tiles == tuple(CONFIGS[kernel, element_size][dim] for kernel in KERNELS[pass_name])
    assert {name for name, _ in tried} == ({"triton", "native"} if element_size == 2 else {"triton"})


def test_the_second_round_joins_the_best_tiles_of_the_kernels() -> None:
    tried = candidates.first_round("backward", 2, 64)
    triton = [one for _, one in tried if isinstance(one, TritonConfig)]
    pinned = triton[0].tiles
    best_row = next(one for one in triton if one.tiles[0] != pinned[0])
    best_column = next(one for one in triton if one.tiles[1] != pinned[1])
    fast = {best_row: 0.5, best_column: 0.6}
    measured = [Candidate("native", 0, 0.1), *(Candidate("triton", one, fast.get(one, 1.0)) for one in triton)]
    more = candidates.second_round(measured, "backward", 2, 64)
    assert all(one.tiles == (best_row.tiles[0], best_column.tiles[1]) for one in more)
    assert 0 in {one.share for one in more} and WHOLE in {one.share for one in more}
    assert all(problem(one, "backward") is None for one in more)
    assert candidates.second_round(measured[:1], "backward", 2, 64) == []


@pytest.mark.skipif(
    not any(r.backend == "triton" and r.device == "cpu" for r in RUNNERS), reason="needs the interpreter"
)
def test_wrong_candidates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small sphere: the kernels are right, in both passes; one that is not is refused and named."""
    case = cases.Case(cases.Shape(20, 16, 1), torch.float32, CPU)
    monkeypatch.setattr(measure, "HEADS", 8)
    said: list[str] = []
    pinned = candidates.first_round("forward", 4, 16)[:1]
    assert len(measure._checked(case, "forward", pinned, said.append)) == 1 and not said
    case.saved = measure._saved(case)
    assert len(measure._checked(case, "backward", candidates.first_round("backward", 4, 16)[:1], said.append)) == 1
    wrong = lambda *names: lambda index: (torch.zeros_like(case.sets[0][0]), torch.zeros(1, 8, 34))  # noqa: E731
    monkeypatch.setattr(measure, "runner", wrong)
    assert measure._checked(case, "forward", pinned, said.append) == []
    assert "refused: triton" in said[0] and "result 0 is off by" in said[0]


def test_not_a_number_is_wrong() -> None:
    case = cases.Case(cases.Shape(20, 16, 2), torch.float32, CPU)
    assert case.problem((case.exact[0].float(),), case.exact[:1]) is None
    assert "off by nan" in str(case.problem((torch.full_like(case.sets[0][0], torch.nan),), case.exact[:1]))


@pytest.mark.parametrize("text", ["431", "431x64", "431x4x1", "431x129x1", "0x64x1", "431x64x-1", "1x64x1x1", "axbxc"])
def test_cases_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no case; accepted: VERTICESxDIMxBATCH"):
        cases.Shape.parse(text)


def test_a_run_that_is_cut_off_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is whole after every pass, and what it held of other cases stays."""
    out = tmp_path / "tuned.json"
    monkeypatch.setattr(command, "family_of", lambda device: "9.0")
    monkeypatch.setattr(command, "record", lambda device: dict.fromkeys(reader.RECORD, "y"))
    monkeypatch.setattr(command.backends, "triton_reasons", lambda device: ["nothing to compile"])
    monkeypatch.setattr(command, "Case", lambda *arguments: arguments)

    def made_up(case: Any, pass_name: str, say: Any) -> Point:
        if case[0].vertices == 1723:
            raise KeyboardInterrupt
        return Point(pass_name, 2, 64, case[0].vertices, 8, "float16", (Candidate("native", 0, 1.0),))

    monkeypatch.setattr(command, "measure", made_up)
    other = Point("forward", 2, 16, 99, 8, "float16", (Candidate("native", 1, 2.0),))
    kept = {"9.0": Family(dict.fromkeys(reader.RECORD, "x"), (other,))}
    options = argparse.Namespace(dtype=["float16"], passes=list(PASSES), seconds=0, out=out)
    with pytest.raises(KeyboardInterrupt):
        command.run(options, [cases.Shape(431, 64, 1), cases.Shape(1723, 64, 1)], CPU, kept)
    found = table.read_file(out)["9.0"]
    assert {(point.pass_name, point.vertices) for point in found.points} == {
        ("forward", 431),
        ("backward", 431),
        ("forward", 99),
    }
    assert found.record["date"] == "y"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_needs_a_gpu(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "fastmetro_kernels.tune", "attention", "--out", str(tmp_path / "x.json")]
    done = subprocess.run(arguments, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and "tuning measures on a CUDA device, and none is visible" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "letter.json"
    path.write_text("dear")
    with pytest.raises(tuning.TuningFileError, match=r"letter\.json is not JSON"):
        command.existing(path)
    assert command.existing(tmp_path / "none.json") == {}


def test_info_tells_how_auto_chooses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choice, "families", lambda: {})
    text = info.report()
    order = ", ".join(dispatch.ORDER_CUDA)
    assert f"topology_attention without a measurement, in this order: GPU: {order}; CPU: native, reference" in text
    assert "csrc/upsampling/launch.h" in text
    measured = (Candidate("native", 2, 0.25), Candidate("native", 0, 0.3), Candidate("sdpa", None, 2.0))
    point = Point("backward", 2, 64, 431, 256, "float16", measured)
    monkeypatch.setattr(
        tuning, "families", lambda: {"9.0": Family(dict.fromkeys(reader.RECORD, "H-something"), (point,))}
    )
    text = info.report()
    assert re.search(r"compute capability 9\.0(?: \(this device\))?: measured on H-something", text)
    line = "backward float16  head dim  64,   431 vertices, batch * heads  256: native 0.2500, sdpa 2.0000"
    assert line in text


def test_info_reports_a_malformed_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}")
    monkeypatch.setenv(tuning.ENVIRONMENT, str(path))
    tuning.reset()
    try:
        assert f"{path}: the set of keys of the file is []" in info.report()
    finally:
        monkeypatch.undo()
        tuning.reset()
