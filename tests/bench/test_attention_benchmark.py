"""The attention benchmark without a GPU: a tiny run on the CPU, every contender, and what it refuses."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import common
from bench.attention import cases, checks, command, contenders, flex, measure, report
from bench.attention.cases import HEADS_FIRST, Case, Shape
from bench.attention.contenders import Variant
from fastmetro_kernels import TokenTopology, topology_attention

CPU = torch.device("cpu")


def _run(monkeypatch: pytest.MonkeyPatch, csv: Path, *more: str) -> None:
    arguments = ["--device", "cpu", "--threads", "1", "--cases", "40x16", "--repeats", "2", "--csv", str(csv)]
    monkeypatch.setattr("sys.argv", ["bench attention", *arguments, *more])
    command.main()


def test_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A small case from the command line: checked against float64, printed, written with all columns."""
    _run(monkeypatch, tmp_path / "cpu.csv")
    rows = report.read_rows(tmp_path / "cpu.csv")
    assert {row["contender"] for row in rows} == {"auto", "sdpa_bool"} and len(rows) == 4
    for row in rows:
        assert row["status"] == "ok" and float(row["wall_ms"]) > 0 and row["commit"] and row["counted"] == "wall"
        assert 0 < float(row["relative_error"]) < 1e-5
        assert (row["contender"] == "sdpa_bool") == (row["sdpa_ratio"] == "1")
    assert "14+40, d 16" in capsys.readouterr().out


def test_contenders_that_cannot_run_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are rows with a reason and without a time, and no failure."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    names = ["triton", "sdpa_cudnn", "sdpa_dense", "flex_rcm"]
    _run(monkeypatch, tmp_path / "cpu.csv", "--contenders", *names, "--modes", "forward+backward")
    rows = {row["contender"]: row for row in report.read_rows(tmp_path / "cpu.csv")}
    assert "interpreter" in rows["triton"]["reason"]
    assert "CUDA device" in rows["sdpa_cudnn"]["reason"]
    assert "no backward pass on a CPU" in rows["flex_rcm"]["reason"]
    for name in ("triton", "sdpa_cudnn", "flex_rcm"):
        assert rows[name]["status"] == "skipped" and rows[name]["wall_ms"] == ""
    assert rows["sdpa_dense"]["status"] == "ok" and float(rows["sdpa_dense"]["relative_error"]) < 1e-5


def test_a_wrong_result_gets_no_time_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong row of one head is enough."""

    def wrong(q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology, backend: str) -> Tensor:
        out = topology_attention(q, k, v, topology, backend=backend)
        if backend == "native":
            out = out.clone()
            out[0, 20, 3] *= 1.01
        return out

    monkeypatch.setattr(contenders, "topology_attention", wrong)
    with pytest.raises(SystemExit, match="40x16x1 forward, native : wrong: output off by"):
        _run(monkeypatch, tmp_path / "cpu.csv", "--contenders", "native", "reference", "--modes", "forward")
    rows = {row["contender"]: row for row in report.read_rows(tmp_path / "cpu.csv")}
    assert rows["native"]["status"] == "wrong" and rows["native"]["wall_ms"] == ""
    assert rows["reference"]["status"] == "ok"


def test_masked_sdpa_must_agree_with_the_reference() -> None:
    """A budget from a baseline that means another mask would allow anything."""
    case = Case(Shape(30, 8, 1), torch.float32, CPU)
    case.mask[20, 30] = ~case.mask[20, 30]
    entries = measure.Stage(case, backward=False).measure(["auto"])
    assert entries[0].status == "failed" and "masked SDPA disagrees" in entries[0].reason


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", contenders.FLEX)
def test_flex_attention_means_the_mask_of_the_mesh(name: str) -> None:
    """Uncompiled, both orders and all blocks give what SDPA gives."""
    case = Case(Shape(150, 8, 2), torch.float32, CPU)
    q, k, v, _ = (HEADS_FIRST.arrange(tensor) for tensor in case.base[0])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=case.mask).transpose(1, 2)
    found = list(contenders.variants(name, case, backward=False))
    assert len(found) == len(flex.blocks(8, backward=False, autotune=False))
    for variant in found:
        (out,) = variant.run(case.inputs(variant.layout, backward=False)[0])
        torch.testing.assert_close(variant.layout.restore(out), expected)


def test_reverse_cuthill_mckee_keeps_hubs_in_front_and_neighbours_near() -> None:
    case = Case(Shape(431, 8, 1), torch.float32, CPU, Path("none"))
    order = case.rcm_layout.order
    assert order is not None
    assert order[:14].tolist() == list(range(14)) and sorted(order.tolist()) == list(range(445))
    places = case.mask[order][:, order][14:, 14:].nonzero()
    natural = case.mask[14:, 14:].nonzero()
    assert (places[:, 0] - places[:, 1]).abs().max() < (natural[:, 0] - natural[:, 1]).abs().max()


def test_spheres_have_lists_as_body_meshes_have() -> None:
    degrees = cases.mesh_topology(500, data=Path("none"))[0].degrees()
    assert degrees.numel() == 500 and degrees.min() >= 4 and degrees.max() <= 12
    assert degrees.sum() == 500 + 2 * (3 * 500 - 6)  # each once itself, and both ends of every edge


class _Replayed:
    """Stands in for a captured graph: a replay calls again and writes to the same memory."""

    def __init__(self, calls: Sequence[Callable[[], Any]], keep: int = 1, idle: bool = False) -> None:
        self._calls, self.calls, self.keep, self._idle = calls, len(calls), keep, idle
        self.last = [call() for call in calls][-1]
        self.graph = self

    def replay(self) -> None:
        if not self._idle:
            for target, source in zip(self.last, self._calls[-1](), strict=True):
                target.copy_(source)

    def milliseconds(self, settle: bool = True) -> float:
        return common.milliseconds(self.replay, CPU)


@pytest.fixture
def graph_case() -> Case:
    """A case that believes to be on a GPU with an L2 cache that holds one set of its two, batch 2."""
    case = Case(Shape(40, 16, 2), torch.float32, CPU)
    case.on_gpu, case.l2 = True, case.set_bytes
    case.base.append(tuple(torch.randn_like(tensor) for tensor in case.base[0]))
    return case


@pytest.mark.parametrize("backward", [False, True])
def test_times_inside_graphs(graph_case: Case, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm and cold graphs of every contender, in rounds; the share of the floor is of the cold time."""
    kept = []

    def capture(calls: Sequence[Callable[[], Any]], keep: int = 1) -> _Replayed:
        kept.append(keep)
        return _Replayed(calls, keep)

    monkeypatch.setattr(common, "capture", capture)
    stage = measure.Stage(graph_case, backward, repeats=3)
    entries = stage.measure(["auto", "sdpa_bool", "sdpa_dense"])
    assert [entry.status for entry in entries] == ["ok"] * 3
    assert stage.counted == "cold" and kept == [1, 1, 2] * 3
    for entry in entries:
        assert {kind: len(times) for kind, times in entry.samples.items()} == {"warm": 3, "cold": 3, "wall": 3}
    conditions = report.Conditions(bandwidth=1e9, before=("1980", "3201"), after=("1900", "3201"))
    rows = report.stage_rows(stage, entries, conditions, {"device": "made up"})
    expected = (12 if backward else 4) * 2 * 54 * 8 * 16 * 4 / 1e9 * 1e3
    for row in rows:
        assert float(row["floor_ms"]) == pytest.approx(expected, rel=1e-3)
        assert float(row["floor_share"]) == pytest.approx(expected / float(row["cold_ms"]), rel=1e-2, abs=1e-3)
        assert row["sm_mhz_after"] == "1900" and all(row[name] for name in report.RATIOS if "flex" not in name)
    assert "cold" in report.stage_table(rows)


def test_the_default_variant_is_timed_beside_a_faster_one(graph_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower variants get no times but for those that are kept; each counts for the baselines that include it."""

    def slowed(milliseconds: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        time.sleep(milliseconds / 1e3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=graph_case.mask)

    def variants(name: str, *_: Any) -> Iterator[Variant]:
        for block, milliseconds in ((128, 36.0), (64, 6.0), (32, 18.0)):
            attend = functools.partial(slowed, milliseconds)
            yield Variant(f"block {block}", HEADS_FIRST, attend, kept=block == 128)

    monkeypatch.setattr(common, "capture", _Replayed)
    monkeypatch.setattr(measure, "variants", variants)
    stage = measure.Stage(graph_case, backward=False, repeats=2)
    rows = report.stage_rows(stage, stage.measure(["flex_rcm"]), report.Conditions(), {})
    assert [(row["variant"], row["status"]) for row in rows] == [
        ("block 64", "ok"), ("block 32", "slower"), ("block 128", "ok"),
    ]  # fmt: skip
    assert rows[0]["flex_ratio"] == "1" and float(rows[0]["flex_default_ratio"]) > 2
    assert rows[2]["flex_default_ratio"] == "1" and float(rows[2]["flex_ratio"]) < 0.5 and rows[2]["cold_ms"]


def test_a_graph_that_misses_its_work_is_wrong(graph_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that was launched outside the captured stream leaves a fast and empty graph."""
    monkeypatch.setattr(common, "capture", functools.partial(_Replayed, idle=True))
    entries = measure.Stage(graph_case, backward=False).measure(["auto"])
    assert entries[0].status == "wrong" and "in a CUDA graph" in entries[0].reason


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_budget_leaves_out_costly_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first variant always runs."""
    case = Case(Shape(40, 8, 1), torch.float32, CPU)
    budget = measure.Budget(1.0, stages=2)
    for elapsed, statuses in ((0.4, ["ok", "slower"]), (0.6, ["ok", "skipped"])):
        monkeypatch.setattr(budget, "elapsed", lambda elapsed=elapsed: elapsed)
        entries = measure.Stage(case, backward=False, repeats=1, budget=budget).measure(["flex_rcm"])
        assert [entry.status for entry in entries] == statuses
    assert entries[1].reason == "not tried: time budget"


def test_errors_are_judged_tensor_by_tensor() -> None:
    """NaN never passes, and neither does an error in one place that the norm hides."""
    case = Case(Shape(40, 8, 1), torch.float32, CPU)
    truth = checks.oracle(case, backward=False, masked=True)
    variant = next(contenders.variants("auto", case, backward=False))
    good = variant.run(case.inputs(variant.layout, backward=False)[0])[0]
    assert checks.judge((good,), variant, case, truth)[1] is None
    for value in (torch.nan, good.flatten()[0].item() + 1e-4):
        bad = good.clone()
        bad.view(-1)[0] = value
        assert "output off by" in str(checks.judge((bad,), variant, case, truth)[1])
    assert "shapes" in str(checks.judge((good[:, 1:],), variant, case, truth)[1])
