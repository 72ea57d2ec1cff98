"""The table of what must be shown, on rows with known figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import fps
from fastmetro.profiling.case import Say
from fastmetro.profiling.record import Row, environment, write_rows


def row(case: str = "s-r50-1", contender: str = "tuned", times: str = "2", status: str = "ok", parts: str = "") -> Row:
    model, backbone, batch = case.split("-")
    return dict.fromkeys(fps.COLUMNS, "") | {
        "model": fps.MODELS[model], "backbone": fps.BACKBONES[backbone], "batch": batch, "scope": "network",
        "contender": contender, "times_engine": times, "status": status, "parts_ms": parts,
    }  # fmt: skip


def test_targets_are_those_that_were_asked() -> None:
    asked = {(target.case, target.contender): target.least or target.limit_ms for target in fps.GPU_TARGETS}
    assert len(asked) == 14 and asked["l-r50-1", "tuned"] == 2.1 and asked["s-r50-256", "published"] == 11


def test_reached_missed_and_not_measured() -> None:
    rows = [
        row(contender="tuned", times="1.85"),
        row(contender="published", times="14.9"),
        row(contender="engine", times="1", parts="backbone 0.36; encoder 0.06; decoder 0.06; after the backbone 0.11"),
        row("l-h64-1", "published", status="wrong", times=""),
    ]
    lines = fps.target_table(rows, fps.GPU_TARGETS).splitlines()
    verdicts = {tuple(line.split()[:2]): line for line in lines[1:-1]}
    assert verdicts["s-r50-1", "tuned"].endswith("1.85, reached")
    assert verdicts["s-r50-1", "published"].endswith("14.9, MISSED")
    assert verdicts["s-r50-1", "engine"].endswith("0.11, reached")
    assert verdicts["l-h64-1", "published"].endswith("not measured")
    assert lines[-1] == "  2 of 14 reached, 1 missed"


def test_parts_without_the_whole_tell_nothing() -> None:
    assert fps.after_backbone_ms(row(parts="encoder 0.05; decoder 0.06")) is None
    assert fps.after_backbone_ms(row()) is None
    whole = row(parts="backbone (loop) 0.3; after the backbone (loop) 0.06")
    assert fps.after_backbone_ms(whole) == pytest.approx(0.06)


def test_cases_that_are_not_measured_again_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = environment(torch.device("cpu"), "")
    path = tmp_path / "fps.csv"
    write_rows(path, [row("s-r50-32", times="7") | record, row("s-r50-1", times="8") | record])
    seen = []

    def run_fps(settings: fps.FpsSettings, say: Say, command: str, built: object) -> list[Row]:
        seen.append((settings.model, settings.backbone, settings.batch, settings.image is not None, command))
        return [row("s-r50-1", times="9") | record]

    monkeypatch.setattr(fps, "run_fps", run_fps)
    monkeypatch.setattr(fps, "build_network", lambda settings: settings.model)
    fps.main(["--device", "cpu", "--cases", "s-r50-1", "--csv", str(path)])
    assert seen == [("fastmetro-s", "resnet50", (1,), True, "python -m bench fps --cases s-r50-1")]
    assert [(fps.case_of(r), r["times_engine"]) for r in fps.read_rows(path, fps.COLUMNS)] == [
        ("s-r50-32", "7"),
        ("s-r50-1", "9"),
    ]
    assert "plain      at least 1.5x    not measured" in capsys.readouterr().out
    path.write_text("other\n1\n")
    with pytest.raises(ValueError, match="lacks the columns"):  # before anything is measured
        fps.main(["--device", "cpu", "--csv", str(path)])
    assert len(seen) == 1


def test_cases_of_one_network_share_it_and_each_leaves_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = environment(torch.device("cpu"), "")
    path, made, given = tmp_path / "fps.csv", [], []

    def build_network(settings: fps.FpsSettings) -> object:
        made.append(f"{settings.model} {settings.backbone}")
        return made[-1]

    def run_fps(settings: fps.FpsSettings, say: Say, command: str, built: object) -> list[Row]:
        given.append(built)
        if settings.model == "fastmetro-l":
            raise KeyboardInterrupt
        return [row(f"s-r50-{settings.batch[0]}", times="9") | record]

    monkeypatch.setattr(fps, "build_network", build_network)
    monkeypatch.setattr(fps, "run_fps", run_fps)
    with pytest.raises(KeyboardInterrupt):
        fps.main(["--device", "cpu", "--cases", "s-r50-1", "s-r50-32", "l-r50-1", "--csv", str(path)])
    assert made == ["fastmetro-s resnet50", "fastmetro-l resnet50"] and given == [made[0], made[0], made[1]]
    assert [fps.case_of(r) for r in fps.read_rows(path, fps.COLUMNS)] == ["s-r50-1", "s-r50-32"]
    printed = capsys.readouterr().out
    assert "s-r50: network made in" in printed and "s-r50-32: " in printed and "s in all" in printed
