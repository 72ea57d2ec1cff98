"""Targets, tables and pictures of the attention benchmark, on made-up rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.attention import report, targets
from bench.attention.cases import Shape
from bench.attention.contenders import DEFAULT_CUDA, FLEX
from bench.common import write_csv


def _rows(speed: float) -> list[report.Row]:
    """Rows as of a GPU on which everything of ours is `speed` times as fast as the targets ask."""
    rows = []
    for shape in targets.MUST_SHOW:
        for mode in report.PASSES:
            base = shape.vertices * shape.dim * shape.batch * 1e-6 * (3 if mode != "forward" else 1)
            for number, name in enumerate(DEFAULT_CUDA[1:]):
                row = dict.fromkeys(report.COLUMNS, "")
                row |= {"vertices": str(shape.vertices), "dim": str(shape.dim), "batch": str(shape.batch), "hubs": "14"}
                row |= {"heads": "8", "dtype": "float16", "mode": mode, "contender": name, "status": "ok"}
                row |= {"counted": "cold", "cold_ms": str(base * 1.6**number), "floor_ms": str(base / 100)}
                row |= {"floor_share": str(0.5 / 1.6**number), "device": "made up"}
                rows.append(row)
            ours = dict(rows[1 - len(DEFAULT_CUDA)], contender="auto")
            for target in targets.TARGETS:
                if target.shape == shape and target.mode == mode:
                    ours[target.column] = str(speed * target.least)
            rows.append(ours)
    return rows


def test_targets_are_met_or_missed() -> None:
    """Every target of the table is judged by the row of "auto" in float16."""
    assert all(verdict.met for verdict in targets.evaluate(_rows(1.01)))
    assert not any(verdict.met for verdict in targets.evaluate(_rows(0.99)))
    assert len(targets.evaluate(_rows(1.0))) == 6 * len(targets.MUST_SHOW) + 2
    text = targets.must_show_table(_rows(0.99))
    assert "NO" in text and "0 of 38 met, 38 missed, 0 not measured" in text and "floor, so out" not in text


def test_flex_attention_is_a_baseline_twice() -> None:
    """In any variant, and with PyTorch's defaults: its ratio has a column, a cell and a verdict of its own."""
    rows = _rows(1.01)
    for row in rows:
        if row["contender"] == "auto":
            row["flex_ratio"] = "1"
    verdicts = targets.evaluate(rows)
    assert {v.target.column for v in verdicts if not v.met} == {"flex_ratio"}
    assert sum(v.target.column == "flex_default_ratio" for v in verdicts) == 2 * len(targets.MUST_SHOW)
    assert "26 of 38 met, 12 missed, 0 not measured" in targets.must_show_table(rows)
    best, default = report.BASELINES["flex_ratio"], report.BASELINES["flex_default_ratio"]
    assert best.includes("flex_rcm", "block 64") and best.includes("flex_rcm", "block 128")
    assert default.includes("flex_natural", "block 128") and not default.includes("flex_natural", "block 64")
    assert not best.includes("sdpa_bool", "block 128")


def test_targets_below_the_memory_floor_are_named() -> None:
    """The fastest row of the baseline over the floor is the most that can be shown; with warm L2 there is no bound."""
    shape, rows = Shape(431, 64, 32), _rows(0.99)
    flex = [row for row in rows if (row["vertices"], row["dim"], row["batch"]) == ("431", "64", "32")]
    flex = [row for row in flex if row["contender"] in FLEX and row["mode"] == "forward"]
    for row, milliseconds in zip(flex, ("0.2", "0.1"), strict=True):
        row |= {"variant": "block 64", "cold_ms": milliseconds, "floor_ms": "0.01"}
    verdicts = {v.target.column: v for v in targets.evaluate(rows) if v.target.shape == shape}
    below = [v for v in targets.evaluate(rows) if v.below_floor]
    assert [(v.target.shape, v.target.column) for v in below] == [(shape, "flex_ratio")]
    assert below[0].most == pytest.approx(10) and verdicts["flex_default_ratio"].most is None
    text = targets.must_show_table(rows)
    assert "431x64x32 forward, vs best Flex: 22x asked, 10.0x at the floor" in text
    assert "38 missed (1 below the memory floor)" in text
    warm = [dict(row, counted="warm", warm_ms=row["cold_ms"]) for row in rows]
    assert not any(v.below_floor for v in targets.evaluate(warm))


def test_times_of_single_calls_prove_nothing() -> None:
    """Ratios count only inside CUDA graphs, and only in float16."""
    rows = [dict(row, counted="wall") for row in _rows(2.0)]
    assert all(verdict.met is None for verdict in targets.evaluate(rows))
    assert targets.must_show_table([dict(row, dtype="float32") for row in _rows(2.0)]) == ""


def test_pictures(tmp_path: Path) -> None:
    """Both are drawn from a CSV that was written and read again; without times there is an error, and no picture."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from bench import plots

    write_csv(tmp_path / "rows.csv", _rows(1.0))
    rows = plots.selected(report.read_rows(tmp_path / "rows.csv"), "float16", 32)
    plots.draw_times(rows, tmp_path / "time.png")
    plots.draw_shares(rows, tmp_path / "floor.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("time.png", "floor.png"))
    with pytest.raises(ValueError, match="no times inside CUDA graphs in float16 at batch 32"):
        plots.selected([dict(row, counted="wall") for row in rows], "float16", 32)
    with pytest.raises(ValueError, match="no shares of the memory floor"):
        plots.draw_shares([dict(row, floor_share="") for row in rows], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_masked_sdpa_is_drawn_at_its_fastest() -> None:
    """The boolean and the additive mask are one line, of whichever is faster at that size."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from bench import plots

    rows = [row for row in _rows(1.0) if row["mode"] == "forward" and row["dim"] == "64" and row["batch"] == "32"]
    series = next(series for series in plots.SERIES if series.label == "SDPA + mask")
    for row in rows:
        if row["contender"] == "sdpa_additive" and row["vertices"] == "1723":
            row["cold_ms"] = "1e-9"
    chosen = {vertices: row["contender"] for vertices, row in plots.fastest_rows(rows, series).items()}
    assert chosen == {431: "sdpa_bool", 1723: "sdpa_additive", 6890: "sdpa_bool"}


def test_a_csv_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks vertices"):
        report.read_rows(tmp_path / "other.csv")


@pytest.mark.parametrize("text", ["431", "0x64", "431x64x0", "431x64x1x1", "x"])
def test_bad_cases_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="no case; accepted"):
        Shape.parse(text)
