"""`make sanitize` without a GPU: its cases are right, its reading of what the tools print, its exit status."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulation import build
from emulation.upsampling import POINTS, Choice, upsample

from fastmetro_kernels import backends
from fastmetro_kernels.attention import native
from fastmetro_kernels.points import Cut

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


sanitize, cases = load("sanitize"), load("sanitize_cases")
CLEAN = "cases: 4\n========= ERROR SUMMARY: 0 errors\n"
NOT_ALL_PRINTED = (
    "cases: 4\n========= ERROR SUMMARY: 64 errors\n"
    "========= ERROR SUMMARY: 44 errors were not printed. Use --print-limit option to adjust the number\n"
)


def test_every_group_of_cases_is_run() -> None:
    assert set(sanitize.GROUPS) == set(cases.GROUPS)


@pytest.mark.parametrize("group", [g for g in cases.GROUPS if g.endswith("native")])
def test_cases_are_right(group: str) -> None:
    if backends.native_cpu_reasons():
        pytest.skip("; ".join(backends.native_cpu_reasons()))
    count, left_out = cases.run_group(group, "cpu")
    assert count == len(list(cases.GROUPS[group]())) and not left_out


def test_attention_cases_take_the_kernels_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200, whose plans are made here without one."""
    monkeypatch.setattr(native, "_shared_memory", lambda device: 227 * 1024)
    monkeypatch.setattr(native, "_multiprocessors", lambda device: cases.MULTIPROCESSORS)
    found = set()
    for case in cases.attention_native():
        case.topology._set_plans()  # which otherwise only moving to a GPU does
        q = torch.empty(case.batch, case.topology.num_tokens, case.heads, case.dim, dtype=case.dtype)
        assert cases.forward_kernel(q, case.topology, case.segment) == case.kernel, case
        if case.kernel == "few":
            assert native.takes_few("backward", q, case.topology) == case.topology.symmetric, case
        found.add(case.kernel)
    assert found == {"few", "walk", "narrow"}


@pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))
def test_upsampling_cases_take_the_kernel_for_points() -> None:
    """On an H200, in both directions: by every cut, with words of 8 and 16 bytes, one pack per block and more."""
    cuts, blocks = set(), set()
    for case in cases.upsampling_points():
        m, (rows, columns) = case.matrix, case.matrix.shape
        m.make_point_tables()
        for transposed in (False, True):
            arrays = (
                *(m.row_offsets, m.columns, m.values, m.ell_columns, m.ell_values),
                *(rows, m.point_tables, m.point_cuts),
            )
            if transposed:
                arrays = (
                    *(m.t_row_offsets, m.t_columns, m.t_values, m.t_ell_columns, m.t_ell_values, columns),
                    *(m.t_point_tables, m.t_point_cuts),
                )
            x = torch.zeros(case.batch, rows if transposed else columns, case.channels, dtype=case.dtype)
            upsample(cases.laid_out(x, case.layout, "cpu"), *arrays, multiprocessors=132, choice=(choice := Choice()))
            assert choice.kernel == POINTS, (case, transposed)
            cut = Cut(*arrays[-1][choice.cut * len(Cut._fields) :][: len(Cut._fields)])
            word = choice.batch_tile * case.dtype.itemsize
            cuts.add((cut.slots, choice.cut, word))
            blocks.add((cut.slots, word, choice.packs == 1))
    # Where rows have three entries, the fewest blocks never take small words; others always have several large packs.
    assert cuts == set(itertools.product((3, 16), range(3), (8, 16))) - {(3, 0, 8)}
    assert blocks == set(itertools.product((3, 16), (8, 16), (False, True))) - {(16, 16, True)}


@pytest.mark.parametrize(
    ("output", "status", "line"),
    [
        (CLEAN, 0, "clean        4 cases, 1.0 s"),
        ("left out: a\n" + CLEAN, 0, "clean        4 cases (1 left out), 1.0 s"),
        ("cases: 4\n========= ERROR SUMMARY: 2 errors\n", 66, "2 FINDINGS   4 cases, 1.0 s"),
        ("cases: 4\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, "clean        4"),
        ("cases: 4\n========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", 0, "1 FINDINGS   4"),
        ("cases: 4\n========= RACECHECK SUMMARY: 9 hazards displayed (8 errors, 1 warning)\n", 66, "9 FINDINGS   4"),
        (NOT_ALL_PRINTED, 66, "64 FINDINGS  4 cases"),
        ("========= ERROR SUMMARY: 1 error\n", 66, "1 FINDINGS   did not run to its end"),
        ("========= ERROR SUMMARY: 0 errors\n", 0, "FAILED       did not run to its end"),  # nothing was run
        (CLEAN, 1, "FAILED       did not run to its end"),
        (CLEAN, 66, "FAILED       4 cases"),
        ("cases: 4\n", 0, "FAILED       4 cases"),  # the tool was not there
        ("cases: 0\n========= ERROR SUMMARY: 0 errors\n", 0, "FAILED       0 cases"),
        ("========= Error: Target application terminated before first instrumented API call\n", 255, "FAILED   "),
    ],
)  # fmt: skip
def test_output_is_understood(output: str, status: int, line: str) -> None:
    result = sanitize.outcome(output, status, True, 1.0)
    assert str(result).startswith(line)
    assert result.clean == line.startswith("clean")


def fake_tool(folder: Path, output: str, status: int) -> str:
    """A compute-sanitizer that prints its arguments and what it is told to."""
    script = folder / "compute-sanitizer"
    (folder / "text").write_text(output)
    script.write_text(f'#!/bin/sh\necho "$@"\ncat {folder / "text"}\nexit {status}\n')
    script.chmod(0o755)
    return str(script)


def test_a_clean_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tool = fake_tool(tmp_path, CLEAN, 0)
    monkeypatch.setattr(sanitize, "find_tool", lambda: tool)
    assert sanitize.check_sanitized(list(sanitize.TOOLS), dict.fromkeys(sanitize.GROUPS, 1), 2, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(sanitize.TOOLS) * len(sanitize.GROUPS)
    assert sum("clean" in line for line in lines) == len(lines) - len(sanitize.LEFT_OUT)
    log = (tmp_path / sanitize.LOG).read_text()
    for tool in sanitize.TOOLS:
        assert re.search(rf"^--tool {tool} .*{re.escape(str(sanitize.CASES))} upsampling-native$", log, re.MULTILINE)


@pytest.mark.parametrize("group", ["convolution-native", "linear-native"])
def test_parts_of_a_group_have_all_its_cases(group: str) -> None:
    every = [str(case) for case in cases.GROUPS[group]()]
    parts = [[str(case) for case in cases.part_of(group, part, 3)] for part in (1, 2, 3)]
    assert sorted(itertools.chain(*parts)) == sorted(every) and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert cases.run_group(group, "cpu", 2, 3)[0] == len(parts[1])


def test_groups_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each a job of its own, and none without cases."""
    plain = {name: sanitize.Outcome(count, 0, "", 1.0) for name, count in (("linear-native", 2), ("other", 9))}
    plain["stopped"] = sanitize.Outcome(None, None, "", 1.0)
    groups = sanitize.parts_of(plain, 3)
    assert groups == {"linear-native": 2, "other": 3, "stopped": 1}
    tool = fake_tool(tmp_path, CLEAN, 0)
    monkeypatch.setattr(sanitize, "find_tool", lambda: tool)
    assert sanitize.check_sanitized(["initcheck"], groups, 2, tmp_path)
    names = [line[11:33].rstrip() for line in capsys.readouterr().out.splitlines()]
    assert names == ["linear-native 1/2", "linear-native 2/2", "other 1/3", "other 2/3", "other 3/3", "stopped"]
    log = (tmp_path / sanitize.LOG).read_text()
    assert re.findall(r"sanitize_cases.py (.*)$", log, re.MULTILINE) == [
        *(f"linear-native --part {part} 2" for part in (1, 2)),
        *(f"other --part {part} 3" for part in (1, 2, 3)),
        "stopped",
    ]


def test_findings_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "cases: 4\n========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 1 error\n"
    tool = fake_tool(tmp_path, text, sanitize.FOUND_STATUS)
    monkeypatch.setattr(sanitize, "find_tool", lambda: tool)
    assert not sanitize.check_sanitized(["memcheck"], {"upsampling-native": 1}, 1, tmp_path)
    shown = capsys.readouterr().out
    assert "1 FINDINGS" in shown and "Invalid __global__ read" in shown


def test_a_machine_that_cannot_run_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == sanitize.CANNOT_RUN
    assert "no compute-sanitizer: install the CUDA toolkit" in capsys.readouterr().out


def test_a_process_that_fails_is_a_finding(tmp_path: Path) -> None:
    result = sanitize.run([sys.executable, "-c", "print('cases: 1'); raise SystemExit(5)"], False, tmp_path)
    assert result.cases is None and not result.clean
