"""`fastmetro bench fps` with an engine that stands in for the real one, on the compact network."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastmetro
from fastmetro.cli import main
from fastmetro.inference.images import to_input
from fastmetro.models import FastMETRO
from fastmetro.profiling import checks, fps
from fastmetro.profiling.case import Case, Entry
from fastmetro.profiling.checks import Truth, WrongResult
from fastmetro.profiling.contenders import Contender, build_contender, build_model, settle_batch_norms
from fastmetro.profiling.parts import part_times, plain_parts
from fastmetro.profiling.record import read_rows
from fastmetro.profiling.settings import FpsSettings

COMPACT = FpsSettings(model="fastmetro-compact", batch=(1,), device="cpu", seconds=0.01, rounds=2)


class StandIn:
    """An engine that is the plain model; `shift` metres away from it, to be caught."""

    def __init__(
        self, model: FastMETRO, batch_size: int, dtype: torch.dtype, convolutions: str = "auto", shift: float = 0.0
    ) -> None:
        self.model, self.batch_size, self.shift = copy.deepcopy(model), batch_size, shift
        assert dtype == torch.float32 and convolutions in ("auto", "library")

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype == torch.uint8:
            images = torch.stack([to_input(image.numpy()) for image in images])
        assert len(images) == self.batch_size
        with torch.no_grad():
            out = self.model(images)
        out["pred_3d_vertices_fine"] = out["pred_3d_vertices_fine"] + self.shift
        return out

    def parts(self) -> dict[str, Callable[[], object]]:
        return {"backbone": lambda: None, "all else": lambda: None}


@pytest.fixture(scope="module")
def model() -> FastMETRO:
    return build_model(COMPACT)[0]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def stand_in(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(fastmetro, "compile", lambda *args, **named: StandIn(*args, **named, **options), raising=False)


def test_command_from_start_to_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch)
    image, out, trace = tmp_path / "noise.jpg", tmp_path / "rows.csv", tmp_path / "trace.json"
    pixels = np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    arguments = "bench fps --model fastmetro-compact --batch 1 2 --baseline published tuned plain --device cpu"
    arguments += f" --seconds 0.01 --rounds 2 --image {image} --out {out} --trace {trace}"
    assert main(arguments.split()) == 0

    rows = read_rows(out, fps.COLUMNS)
    places = [(row["batch"], row["scope"], row["contender"]) for row in rows]
    names = ["engine", "published", "tuned", "plain"]
    assert places == [(*place, name) for place in (("1", "network"), ("1", "file to file"), ("2", "network"))
                      for name in names]  # fmt: skip
    for row in rows:
        assert row["status"] == "ok" and row["weights"] == "random" and row["dtype"] == "float32"
        assert 0 < float(row["fastest_ms"]) <= float(row["p50_ms"]) <= float(row["p90_ms"]) <= float(row["p99_ms"])
        assert float(row["images_per_second"]) == pytest.approx(1e3 * int(row["batch"]) / float(row["mean_ms"]), 1e-2)
        assert float(row["max_vertex_error_mm"]) <= float(row["allowed_error_mm"]) < 0.1
        assert int(row["calls"]) >= 2
        assert (row["times_engine"] == "1") == (row["contender"] == "engine")
    assert rows[0]["memory_mib"] == rows[0]["joules_per_image"] == "not told"
    assert [part.rpartition(" ")[0] for part in rows[0]["parts_ms"].split("; ")] == ["backbone", "all else"]
    plain = [part.rpartition(" ")[0] for part in rows[0]["plain_parts_ms"].split("; ")]
    assert plain == ["backbone", "encoder", "decoder", "upsampling"]
    stages = dict(part.rsplit(" ", 1) for part in rows[5]["parts_ms"].split("; "))
    assert list(stages) == ["decode", "crop", "copy in", "network", "copy out", "save"]
    assert sum(map(float, stages.values())) == pytest.approx(float(rows[5]["p50_ms"]), rel=0.5)

    events = json.loads(trace.read_text())["traceEvents"]
    assert {f"{name}, batch 1" for name in names} <= {event.get("name") for event in events}
    printed = capsys.readouterr().out
    assert "published: eager, float32" in printed and "plain path, parts: backbone" in printed


def test_the_engine_with_the_librarys_convolutions_is_a_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile(*arguments: Any, **named: Any) -> Any:
        asked.append(named["convolutions"])
        return StandIn(*arguments, **named)

    monkeypatch.setattr(fastmetro, "compile", compile, raising=False)
    engine, library = fps.run_fps(FpsSettings(**vars(COMPACT) | {"baseline": ("library",)}), lambda text: None)
    assert asked == ["auto", "library"] and engine["variant"] == "float32"
    assert library["contender"] == "library" and library["variant"] == "float32, the library's convolutions"
    assert library["status"] == "ok" and float(library["times_engine"]) > 0 and library["parts_ms"]


def test_a_network_that_is_there_is_not_built_again_and_building_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    built = fps.build_network(COMPACT)
    assert built[1] == "random" and not any(parameter.requires_grad for parameter in built[0].parameters())
    monkeypatch.setattr(fps, "build_model", lambda settings: pytest.fail("built again"))
    said: list[str] = []
    rows = fps.run_fps(FpsSettings(**vars(COMPACT) | {"baseline": ("published",)}), said.append, built=built)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    told = r"  (engine|published): ok, built in \d+\.\d s, checked in \d+\.\d s"
    assert re.fullmatch(r"  plain network: \d+\.\d s", said[2])
    assert [bool(re.fullmatch(told, text)) for text in said[3:5]] == [True, True]


def test_a_wrong_engine_is_not_timed_and_the_status_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, shift=1e-3)  # 1 mm along each axis
    said: list[str] = []
    rows = fps.run_fps(FpsSettings(**vars(COMPACT) | {"baseline": ("plain",)}), said.append)
    engine, plain = rows
    assert engine["status"] == "wrong" and engine["p50_ms"] == engine["times_engine"] == ""
    assert "pred_3d_vertices_fine is off by 1.73" in engine["reason"]
    assert plain["status"] == "ok" and plain["p50_ms"] and plain["times_engine"] == ""  # nothing to compare with
    assert not fps.all_right(rows)
    assert any("engine     wrong: pred_3d_vertices_fine" in text for text in said)


def test_a_failing_engine_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setattr(fastmetro, "compile", broken, raising=False)
    rows = fps.run_fps(FpsSettings(**vars(COMPACT) | {"baseline": ("plain",)}), lambda _: None)
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("failed", "RuntimeError: no kernel for this"),
        ("ok", ""),
    ]


def contender(run: Callable[[Tensor], dict[str, Tensor]], precision: str = "float32") -> Contender:
    return Contender("test", "", run, precision)


def test_check_finds_every_kind_of_mistake(model: FastMETRO, images: Tensor) -> None:
    truth = Truth(model, images)
    right = truth.outputs
    assert truth.check(contender(lambda _: right)).error_mm == 0.0
    nan = right["pred_cam"].clone()
    nan[1, 2] = float("nan")
    one = right["pred_3d_joints"].clone()
    one[1, 3, 0] += 1e-3
    for change, message in (
        ({"pred_3d_joints": one}, "pred_3d_joints is off by 1 mm"),
        ({"pred_cam": right["pred_cam"] + 0.01}, "pred_cam is off by 0.01"),
        ({"pred_cam": nan}, "pred_cam is off by nan"),
        ({"pred_3d_vertices_fine": right["pred_3d_vertices_fine"][:1]}, r"must have shape \[2, .*got \[1, "),
    ):
        with pytest.raises(WrongResult, match=message):
            truth.check(contender(lambda _, change=change: right | change))
    with pytest.raises(WrongResult, match=r"pred_cam must have shape .*got nothing"):
        truth.check(contender(lambda _: {key: value for key, value in right.items() if key != "pred_cam"}))


def test_what_is_allowed_follows_the_plain_network_in_that_precision(model: FastMETRO, images: Tensor) -> None:
    truth = Truth(model, images)
    half = truth.check(build_contender("plain", model, 2, torch.bfloat16, False))
    assert 0.1 < half.error_mm < half.limit_mm
    exact = truth.check(contender(model))
    assert exact.limit_mm < 0.05 * half.limit_mm
    with pytest.raises(WrongResult, match="off by"):  # bfloat16 does not pass as float32
        truth.check(contender(build_contender("plain", model, 2, torch.bfloat16, False).run))


def test_one_image_is_more_than_one_draw(model: FastMETRO, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    several = Truth(model, images[:1]).plain_errors("bfloat16")
    monkeypatch.setattr(checks, "DRAWS", 1)
    single = Truth(model, images[:1]).plain_errors("bfloat16")
    assert all(several[key] >= single[key] for key in single)
    assert any(several[key] > single[key] for key in single)


def test_parts_of_the_plain_path_are_the_network(model: FastMETRO, images: Tensor) -> None:
    with torch.no_grad():
        parts = plain_parts(model, images)
        expected, found = model(images), parts["upsampling"]()
        assert isinstance(found, dict) and set(found) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
        times = part_times(parts, torch.device("cpu"))
    assert list(times) == ["backbone", "encoder", "decoder", "upsampling"] and min(times.values()) > 0


def test_parts_that_fail_leave_the_times(model: FastMETRO, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_parts(_: StandIn) -> None:
        raise NotImplementedError("not yet")

    monkeypatch.setattr(StandIn, "parts", no_parts)
    stand_in(monkeypatch)
    case = Case(model, 1, torch.float32, COMPACT, False, lambda _: None)
    entries: list[Entry] = case.measure(["engine"])
    assert entries[0].status == "ok" and entries[0].samples
    assert entries[0].reason == "no parts: NotImplementedError: not yet"


def test_random_batch_norms_hide_nothing() -> None:
    torch.manual_seed(0)
    model = fastmetro.create_model("fastmetro-compact")
    settle_batch_norms(model.backbone)
    norms = [module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all((norm.weight != 0).all() and norm.running_var.std() > 0 and norm.momentum == 0.1 for norm in norms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": ()}, r"batch must be one or more positive numbers, got \(\)"),
        ({"batch": (1, 0)}, "batch must be one or more positive numbers"),
        ({"baseline": ("fast",)}, "baseline must be of 'published', 'tuned', 'plain', 'library', got 'fast'"),
        ({"baseline": ("tuned", "tuned")}, "baseline must name each one once"),
        ({"dtype": "int8"}, "dtype must be one of 'float16', 'bfloat16', 'float32', got 'int8'"),
        ({"seconds": 0.0}, r"seconds must be positive, got 0\.0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"out": Path(".")}, "out must be a file"),
    ],
    ids=str,
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FpsSettings(**options)


def test_wrong_arguments_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch)
    for arguments, message in (
        ("--batch 0", "batch must be one or more positive numbers, got (0,)"),
        ("--image absent.jpg", "image 'absent.jpg' does not exist"),
        ("--model fastmetro-xl", "name must be one of 'fastmetro-s'"),
        ("--checkpoint absent.bin --device cpu", "neither a file nor one of the shipped names"),
        *([] if torch.cuda.is_available() else [("--device cuda", "PyTorch sees no GPU")]),
    ):
        assert main(["bench", "fps", *arguments.split()]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["bench", "fps", "--baseline", "fast"])
    assert stop.value.code == 2


def test_the_shipped_checkpoint_names_its_network() -> None:
    model, weights = build_model(FpsSettings(checkpoint="fastmetro-compact"))
    assert model.config.name == weights == "fastmetro-compact" and model.mesh.name == "anny-body"
