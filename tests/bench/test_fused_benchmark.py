"""The benchmark of the fused ops: its cases compute what they say, its check finds what is wrong, its table is one."""

from __future__ import annotations

import ast
import contextlib

import pytest
import torch
from torch import Tensor

from bench import common
from bench.fused import measure, report
from bench.fused.basis import COMPILED, LIBRARY, OURS, tile_name
from bench.fused.cases import Attention, Case, Linear, Norm, Tail, all_cases
from bench.fused.heads import Head
from bench.fused.measure import Entry
from bench.fused.pixels import Pixels
from fastmetro_kernels.fused import LinearConfig
from fastmetro_kernels.fused.linear.configs import TILES, problem

CPU = torch.device("cpu")
SMALL = [
    Linear("projection", 5, 16, 24, 2, torch.float32, norm=True, position=True),
    Linear("output", 5, 16, 8, 1, torch.float32, residual=True),
    Linear("FF1", 5, 16, 8, 3, torch.float32, norm=True, relu=True),
    Attention("attention", 5, 7, 16, 2, torch.float32),
    Tail(2, torch.float32, 5, 7, width=32, hidden=24),
    Norm(5, 24, 2, torch.float32),
    Pixels(2, torch.float32, 5),
    Head(5, 16, 2, torch.float32, "coordinates", 3),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_ours_is_the_library_and_both_are_near_float64(case: Case) -> None:
    (tensors, *_) = measure.input_sets(case, CPU)
    library = Entry(LIBRARY)
    limit = measure._check(case, library, case.plain, tensors, None)
    assert not library.wrong and library.error is not None and library.error < 1e-5
    for name, run in case.ours().items():
        entry = Entry(name)
        measure._check(case, entry, run, tensors, limit)
        assert not entry.wrong, entry.note


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_wrong_result_is_found(case: Case) -> None:
    (tensors, *_) = measure.input_sets(case, CPU)
    limit = measure._check(case, Entry(LIBRARY), case.plain, tensors, None)

    def unwritten(*tensors: Tensor) -> Tensor:
        return torch.empty_like(case.plain(*tensors))

    def off(*tensors: Tensor) -> Tensor:
        return case.plain(*tensors) + 1e-3

    for run in (unwritten, off):
        entry = Entry(OURS)
        measure._check(case, entry, run, tensors, limit)
        assert entry.wrong and "allowed" in entry.note


def test_cases_are_the_layers_of_fastmetro() -> None:
    """At batch 1 the layers of a decoder layer multiply what 445 tokens of width 512 need."""
    cases = all_cases(1, torch.float16)
    assert len({(case.name, case.shape) for case in cases}) == len(cases)
    decoder = [c for c in cases if isinstance(c, Linear) and c.title.startswith("decoder") and 512 in (c.width,)]
    assert {(c.tokens, c.width, c.features) for c in decoder} >= {(445, 512, 1536), (445, 512, 512), (445, 512, 2048)}
    for case in cases:
        assert 0 < case.floor() < 5e-6


def entries(**microseconds: float) -> list[Entry]:
    return [Entry(name, error=0.0, samples=[time / 1e3]) for name, time in microseconds.items()]


def test_a_row_and_a_line_per_case() -> None:
    case = SMALL[0]
    found = [*entries(**{LIBRARY: 8.0, OURS: 4.0, "16x16x16x1x4x3": 3.0}), Entry(COMPILED, note="does not run")]
    rows = report.rows(case, found, ("1", "2"), {"device": "made up"})
    assert [row["library_over_it"] for row in rows] == ["1", "2", "2.67", ""]
    assert len({tuple(row) for row in rows}) == 1
    text = report.line(case, found)
    assert "2.00" in text and "16x16x16x1x4x3 3.00" in text and "compiled: does not run" in text


def test_the_table_takes_the_tile_with_the_least_time_over_the_layers_of_a_size() -> None:
    """The tile that wins one layer may lose their sum; the printed lines are Python."""
    one, two, three = TILES[2][-3:]
    layers = [Linear(title, 445, 512, 512, 1, torch.float16, norm=title == "a") for title in "ab"]
    times = [{one: 1.0, two: 3.0, three: 9.0}, {one: 8.0, two: 3.0, three: 9.0}]
    found = [
        (layer, entries(**{tile_name(tile): time for tile, time in by_tile.items()}))
        for layer, by_tile in zip(layers, times, strict=True)
    ]
    few = Linear("a", 50, 512, 512, 1, torch.float16)
    found.append((few, entries(**{tile_name(three): 1.0, tile_name(two): 2.0})))
    lines = report.table_entries(found)
    assert lines.count("\n") == 0 and ast.parse(f"{{{lines}}}")
    (bands,) = eval(f"{{{lines}}}", {"LinearConfig": LinearConfig}).values()
    assert bands == ((50, three), (445, two))
    assert all(problem(tile) is None for _, tile in bands)


def test_native_tiles_go_into_a_table_of_their_own() -> None:
    """Where the sum over the layers of a size is less than that of the fastest others."""
    cases = [Linear(title, 50, 64, 32, 1, torch.float16, relu=relu) for title, relu in (("a", False), ("b", True))]
    found = [
        (case, entries(**{LIBRARY: 8.0, OURS: 4.0, "native 32x1x2": first}))
        for case, first in zip(cases, (3, 5.5), strict=True)
    ]
    assert report.native_entries(found).startswith(
        "    # (50, 32, 64): NativeLinearConfig(32, 1, 2, True),  # 8.50 us of 2"
    )
    found[1][1][2].samples = [4.5e-3]
    line = report.native_entries(found)
    assert "7.50 us of 2, others 8.00" in line and not line.lstrip().startswith("#")
    assert ast.literal_eval(line.strip().split(": ")[0]) == (50, 32, 64)
    assert not Linear("c", 50, 64, 32, 1, torch.float32).native_tiles()
    assert not Linear("c", 513, 64, 32, 1, torch.float16).native_tiles()
    assert not Linear("c", 50, 64, 32, 1, torch.float16, norm=True).native_tiles()  # it makes no moments
    assert Linear("c", 50, 512, 32, 1, torch.float16, norm=True).native_tiles()


def test_kernels_are_compiled_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    ran: list[bool] = []

    def fails() -> None:
        raise RuntimeError("no such tile")

    count, seconds = common.precompile([lambda: ran.append(torch.is_grad_enabled()), fails] * 2, CPU)
    assert count == 4 and seconds > 0 and ran == [False, False]
