"""The benchmark of convolutions without a GPU: the layers that it finds, its checks, its tuning, and a tiny run."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.convolution import (
    command,
    ending_trunks,
    endings,
    join,
    measure,
    place,
    report,
    stems,
    trunks,
    tune,
)
from bench.convolution.layers import Used, used_layers, used_pairs
from bench.convolution.measure import Case
from fastmetro_kernels.convolution import ConvolutionConfig, PairConfig, choice, table
from fastmetro_kernels.convolution.configs import pinned, problem, usable
from fastmetro_kernels.convolution.ending_configs import ALONE, FOLLOWED, FOLLOWING, JOINED, MEASURED, MODES, WIDENED
from fastmetro_kernels.convolution.table import Layer
from fastmetro_kernels.tuning import reader

CPU = torch.device("cpu")
PLAIN = Used(Layer(2, 6, 5, 16, 32, 3, 3, 1, 1), False, True)
MERGED = Used(Layer(2, 3, 3, 16, 32, 1, 1, 1, 0, 16), False, True, (6, 5, 2))
REPEATED = Used(Layer(2, 3, 4, 16, 32, 1, 1, 1, 0, scale=4), True, True)
LATE = Used(Layer(2, 6, 6, 16, 32, 3, 3, 2, 1), True, True, late=True)
PRODUCT = Used(Layer(1, 4, 4, 16, 32, 1, 1, 1, 0), True, True)


def test_layers_are_those_of_the_folded_trunks() -> None:
    """53 convolutions of ResNet-50, of which the stem is not for the kernel and 4 are parts of others."""
    found = used_layers("resnet50", 2, 224)
    assert sum(found.values()) == 53 - 1 - 4
    merged = [used for used in found if used.layer.second]
    assert len(merged) == 4 and all(found[used] == 1 and not used.residual for used in merged)
    for used in merged:
        branch, last = used.separate()
        assert branch in found and last in found
        assert branch.flop() + last.flop() == used.flop()
        assert branch.layer.output == last.layer.output == used.layer.output
    first = Used(Layer(2, 56, 56, 64, 64, 3, 3, 1, 1), False, True)
    assert found[first] == 3
    assert first.flop() == 2 * 2 * 56 * 56 * 64 * 64 * 9
    assert first.elements() == 2 * 2 * 56 * 56 * 64 + 64 * 64 * 9
    strided = Used(Layer(1, 56, 56, 256, 512, 1, 1, 2, 0), False, False)
    assert strided.elements() == 28 * 28 * (256 + 512) + 256 * 512  # a quarter of the pixels
    assert strided.floor(2, 1e12) == pytest.approx(2e-12 * strided.elements())


def test_heads_of_hrnet_are_added_behind_the_relu() -> None:
    found = [used for used in used_layers("hrnet-w64", 1, 224) if used.late]
    assert [used.layer for used in found] == [
        Layer(1, side, side, channels, 2 * channels, 3, 3, 2, 1) for side, channels in ((56, 128), (28, 256), (14, 512))
    ]
    assert all(used.residual and used.relu and "residual behind" in str(used) for used in found)


def test_pairs_are_those_between_blocks() -> None:
    """15 of ResNet-50, of which 3 are too wide; and of HRNet's first stage 3."""
    assert sum(used_pairs("resnet50", 1, 224).values()) == 12
    found = used_pairs("hrnet-w64", 1, 224)
    assert sum(found.values()) == 3 and {layer.following for layer in found} == {64}
    merged = [layer for layer in used_pairs("resnet50", 1, 224) if layer.second]
    assert sorted(layer.second for layer in merged) == [64, 256, 512]


@pytest.mark.parametrize("trunk", ["resnet50", "hrnet-w64"])
def test_every_layer_has_a_tile_by_rule_and_others_to_try(trunk: str) -> None:
    for images in (1, 8):
        for used in used_layers(trunk, images, 224):
            shape = used.layer.shape
            tile = choice.by_rule(used.layer)
            assert usable(shape, used.layer.scale) and (tile is None) == (used.layer.scale > 1)
            tile = tile or pinned(shape, used.layer.scale)  # what the benchmark takes
            assert problem(tile, shape.chunks, used.layer.scale) is None
    assert all(choice.by_rule(used.layer) is None for used in used_layers(trunk, 32, 224))


@pytest.mark.parametrize("used", [PLAIN, MERGED, PRODUCT, REPEATED, LATE], ids=str)
def test_contenders_agree_and_a_wrong_one_gets_no_time(used: Used) -> None:
    case = Case(used, torch.float32, CPU)
    for run in (case.library, lambda inputs: case.ours(inputs, ConvolutionConfig(32, 1, 2))):
        assert case.error(run(case.sets[0])) < 1e-6
    if case.is_product:
        assert case.error(case.product(case.sets[0])) < 1e-6
    case.ours = lambda inputs, config: case.library(inputs) + 1e-3  # type: ignore[method-assign]
    found = report.measure(case, 1, None)
    assert "allowed" in found.note and report.OURS not in found.times and report.LIBRARY in found.times
    assert "allowed" in report.line(found)
    rows = report.layer_rows([found], {"resnet50": {used: 3}}, torch.float32)  # type: ignore[dict-item]
    assert [row["contender"] for row in rows] == list(found.errors) and rows[-1]["us"] == ""


def test_tuning_takes_the_best_tile_or_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = {"us": 1.97}  # less than the margin away

    class Fake(measure.Timer):
        """The time is what the call returns."""

        def __init__(self, calls: list[measure.Call], device: torch.device) -> None:
            self.value, self.samples = float(calls[0]()), []

        def take(self) -> float:
            self.samples.append(self.value)
            return self.value

    best = usable(PLAIN.layer.shape)[2]
    monkeypatch.setattr(tune, "Timer", Fake)
    monkeypatch.setattr(Case, "ours", lambda self, inputs, config: torch.tensor(2.0 if config == best else 4.0))
    monkeypatch.setattr(Case, "library", lambda self, inputs: torch.tensor(library["us"]))
    monkeypatch.setattr(Case, "error", lambda self, got: 0.0)
    monkeypatch.setattr(tune, "family_of", lambda device: "9.0")
    monkeypatch.setattr(tune.command, "record", lambda device: dict.fromkeys(reader.RECORD, "x"))
    path = tmp_path / "table.json"
    monkeypatch.setattr(tune.place, "settle", lambda *given: {})
    monkeypatch.setattr(tune, "used_pairs", lambda *given: ())
    tune.tune({"a": Counter((PLAIN, PLAIN._replace(residual=True)))}, 32, torch.float32, CPU, path, lambda text: None)
    library["us"] = 1.9
    tune.tune({"b": Counter((PRODUCT,))}, 32, torch.float32, CPU, path, lambda text: None)
    first, second = sorted(table.read_file(path)["9.0"].entries, key=lambda entry: entry.layer.images, reverse=True)
    assert first == table.Entry(PLAIN.layer, best, 2.0, 1.97)
    assert second.layer == PRODUCT.layer and second.config is None and second.library_us == 1.9


def test_what_is_faster_in_the_trunk_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up: best are 4 stages for the first layer, the library for the second, one pair of 3 stages."""
    a, b = PLAIN.layer, PRODUCT.layer
    tiles = [ConvolutionConfig(32, 1, stages) for stages in (2, 3, 4)]
    counts = Counter({PLAIN: 3, PRODUCT: 1, PLAIN._replace(layer=a._replace(images=9)): 5})
    found = {a: (table.Entry(a, tiles[0], 2.0, 9.0), tuple(tiles)), b: (table.Entry(b, tiles[0], 2.0, 1.9), (None,))}

    def taken(folded: object, x: object, chosen: choice.Tiles) -> float:
        pairs = any(isinstance(tile, PairConfig) and tile.stages == 3 for tile in chosen.values())
        return 100 - 5 * pairs - (chosen.get(a) or tiles[0]).stages + (chosen.get(b) is not None)

    monkeypatch.setattr(place, "microseconds", taken)
    said: list[str] = []
    for used in counts:
        found.setdefault(used.layer, (table.Entry(used.layer, tiles[0], 1.0, 1.0), ()))
    entries = tune.settle_trunk("resnet50", 2, counts, 32, torch.float32, CPU, dict(found), said.append)
    singles = [(entry.layer, entry.config) for entry in entries if not entry.layer.following]
    pairs = [entry for entry in entries if entry.layer.following]
    assert singles == [(a, tiles[2])] and {entry.layer for entry in pairs} == set(used_pairs("resnet50", 2, 32))
    assert [entry.config for entry in pairs if entry.config] == [PairConfig(3)]
    assert pairs[0].library_us == 98 and min(entry.native_us for entry in pairs) == 93
    written = table.parse(table.dump({"9.0": table.Family(dict.fromkeys(reader.RECORD, "x"), tuple(entries))}), "x")
    assert set(written["9.0"].entries) == set(entries)
    entries = tune.settle_trunk("resnet50", 1, counts, 32, torch.float32, CPU, dict(found) | {a: found[a]}, said.append)
    assert [(entry.layer, entry.config) for entry in entries if not entry.layer.following] == [(b, None)]
    with choice.trial({a: tiles[1], b: None}):
        assert choice.choose(CPU, a) == tiles[1] and choice.choose(CPU, b) is None
    assert choice.choose(CPU, b) is not None
    assert "with 2 others" in said[0]


def test_targets() -> None:
    outcomes = [
        trunks.Outcome("resnet50", 1, 400.0, 150.0, 2.31, 5e-4, 4e-4),
        trunks.Outcome("hrnet-w64", 1, 400.0, 300.0, 1.9, 5e-4, 4e-4),
        trunks.Outcome("resnet50", 8, 400.0, 100.0, 4.0, 5e-4, 2e-3),
    ]
    lines = trunks.target_table(outcomes).splitlines()[1:]
    assert len(lines) == len(trunks.TARGETS) == 6
    assert lines[0].endswith("at most 0.16 ms  0.15, reached") and lines[1].endswith("2.31, reached")
    assert lines[2].endswith("1.9, MISSED") and lines[3].endswith("MISSED: error 2.00e-03")
    assert lines[-1].endswith("not measured")


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    arguments = "--trunk resnet50 --batch 1 --side 32 --rounds 1 --device cpu --dtype float32 --csv"
    command.main([*arguments.split(), str(path)])
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["contender"] for row in rows} == {"library", "cublaslt", "ours"}
    assert all(float(row["us"]) > 0 and float(row["error"]) < 1e-4 and row["commit"] for row in rows)
    assert [row["what"] for row in rows[-2:]] == ["whole trunk"] * 2
    printed = capsys.readouterr().out
    assert "sums over the layers" in printed and "whole trunks" in printed


def test_stems(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    arguments = "--only stems --batch 2 --side 32 --rounds 1 --device cpu --dtype float32 --csv"
    command.main([*arguments.split(), str(path)])
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["trunk"], row["contender"]) for row in rows] == [
        (trunk, contender)
        for trunk in ("resnet50", "hrnet-w64")
        for contender in (
            "library",
            "ours",
            "to_channels_last, ours",
            "ours, of float32",
            "normalize_pixels, ours",
            "ours, of pixels",
        )
    ]
    assert all(row["what"] == "stem" and float(row["us"]) > 0 and float(row["error"]) < 1e-5 for row in rows)
    printed = capsys.readouterr().out
    assert printed.count("ratio") == 6 and printed.count("same bits") == 4
    off = stems.Stem("resnet50", 1, 2.0, 1.0, 1e-4, 3e-4, None)
    assert off.is_wrong and stems.lines(off).endswith("WRONG")
    right, inexact = stems.Raw("float32", 2.0, 1.0, 1e-4, True), stems.Raw("pixels", 2.0, 1.0, 3e-4, True)
    wrong = [(stems.Raw("float32", 2.0, 1.0, 1e-4, False),), (right, inexact)]
    assert all(replace(off, ours_error=1e-4, raw=raw).is_wrong for raw in wrong)
    assert not replace(off, ours_error=1e-4, raw=(right,)).is_wrong
    monkeypatch.setattr(stems, "compare", lambda *_arguments: off)
    with pytest.raises(SystemExit, match="wrong for 2 stems"):
        command.main([*arguments.split(), str(path)])


@pytest.mark.parametrize(("arguments", "message"), [("--side 40", "multiple of 32"), ("--tune x", "on a GPU")])
def test_bad_options_are_named(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([*arguments.split(), "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_ends_of_first_blocks_by_every_contender() -> None:
    """A wrong tile gets no time, and only a tile that is faster than both others gets an entry in the table."""
    uses = {trunk: used_layers(trunk, 2, 224) for trunk in ("resnet50", "hrnet-w64")}
    layers = join.join_layers(uses)
    assert [one.layer.outputs for one in layers] == [256, 512, 1024, 2048, 128, 256, 512, 1024]
    found = join.measure(Case(MERGED, torch.float32, CPU), 1, None)
    assert found.best is not None and not join.is_wrong(found) and set(found.times) == {"library", "native", found.best}
    tile = found.best
    times = {"library": 3.0, "native": 2.0, tile: 1.5}
    assert join.table_entries([replace(found, times=times)]) == (
        f"    (18, 16, 16, 32, 2): JoinConfig{tuple(tile)},  # 1.5 us, library 3.0, native 2.0"
    )
    assert join.table_entries([replace(found, times=times | {tile: 2.5})]).startswith("    # (18, 16, 16, 32, 2): 2.5")
    assert "1.33" in join.line(replace(found, times=times))


def test_a_wrong_or_impossible_tile_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(MERGED, torch.float32, CPU)
    monkeypatch.setattr(join, "_join", lambda inputs, tile: case.library(inputs) + 1e-3)
    found = join.measure(case, 1, None)
    assert join.is_wrong(found) and found.best is None and "allowed" in join.line(found)
    assert join.table_entries([found]).startswith("    # (18, 16, 16, 32, 2): - us")
    assert [row["contender"] for row in join.rows([found], {"resnet50": Counter()}, torch.float32)][2:] == ["join"]

    def impossible(inputs: measure.Inputs, tile: object) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(join, "_join", impossible)
    found = join.measure(case, 1, None)
    assert not join.is_wrong(found) and "shared memory" in join.line(found)


def test_the_command_for_ends_of_first_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "join.csv"
    options = ["--device", "cpu", "--dtype", "float32", "--batch", "1", "--trunk", "resnet50", "--side", "32"]
    command.main([*options, "--rounds", "1", "--only", "join", "--csv", str(target)])
    rows = list(csv.DictReader(target.open()))
    assert len(rows) == 4 * 3 and {row["contender"] for row in rows} == {"library", "native", "join"}
    assert "fastest tile" in capsys.readouterr().out


def test_what_ends_of_bottlenecks_have_to_do() -> None:
    """At 56 x 56, by hand: 64 channels inside, 256 outside."""
    found = {one.mode: one for one in endings.endings([256], 224)}
    assert set(found) == set(MODES) and {one[1:3] for one in found.values()} == {(56, 56)}
    rows, inner, product = 256 * 56 * 56, 64 * 64 * 9, 64 * 256
    products = {FOLLOWED: 2, WIDENED: 3, ALONE: 1, JOINED: 3}
    weights = {mode: inner + count * product for mode, count in products.items()}
    channels = {
        FOLLOWED: 64 + 256 + 256 + 64,
        WIDENED: 64 + 256 + 256 + 128,
        ALONE: 64 + 256 + 256,
        JOINED: 64 + 64 + 256 + 64,
    }
    for mode, one in found.items():
        assert one.flop() == 2 * rows * weights[mode]
        assert one.elements() == rows * channels[mode] + weights[mode]
        by_bytes, by_flop = one.floors(2, 4e12)
        assert by_bytes == pytest.approx(one.elements() / 2e6) and by_flop == pytest.approx(one.flop() / 989e6)


@pytest.mark.parametrize("mode", MODES)
def test_ends_of_bottlenecks_by_every_contender(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is wrong, or leaves out a number of an image that is not compared, gets no time."""
    one = endings.Ending(11, 4, 3, mode)
    inputs = endings.make_inputs(one, torch.float32, CPU, 0)
    plain, right = endings.others(inputs, "library"), endings.ours(inputs)
    assert [part.shape[1] for part in right] == [256, FOLLOWING[mode]][: 2 if FOLLOWING[mode] else 1]
    for a, b, c in zip(plain, right, endings.others(inputs, "auto"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
    found = endings.measure(one, torch.float32, CPU, 1, None)
    assert not found.note and set(found.times) == set(found.errors) == {"library", "engine", "ending"}

    def off(inputs: endings.Inputs) -> list[torch.Tensor]:
        return [*right[:-1], right[-1] + 1e-3]

    def incomplete(inputs: endings.Inputs) -> list[torch.Tensor]:
        left_out = right[-1].clone()
        left_out[1, 2, 3, 1] = torch.nan
        return [*right[:-1], left_out]

    for wrong in (off, incomplete):
        monkeypatch.setattr(endings, "ours", wrong)
        bad = endings.measure(one, torch.float32, CPU, 1, None)
        assert "allowed" in bad.note and set(bad.times) == {"library", "engine"} and not bad.is_faster
        assert bad.note in endings.line(bad)
        assert [row["us"] == "" for row in endings.rows([bad], torch.float32)] == [False, False, True]


def test_the_engine_that_ends_are_held_against_is_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[object, int]] = []
    end = endings.block_end

    def watched(*arguments: object) -> object:
        asked.append(dict(endings.MEASURED))
        return end(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(endings, "block_end", watched)
    monkeypatch.setitem(endings.MEASURED, (4, 3, ALONE), 1)
    endings.others(endings.make_inputs(endings.Ending(1, 4, 3, ALONE), torch.float32, CPU, 0), "auto")
    assert asked == [{}] and (4, 3, ALONE) in endings.MEASURED


def test_entries_for_ends_of_bottlenecks_count_from_the_fewest_images() -> None:
    """That are faster, and all that are more, too: than the better of both others."""

    def measured(images: int, mode: str, ending: float | None) -> endings.Measured:
        times = {"library": 5.0, "engine": 4.0} | ({} if ending is None else {"ending": ending})
        errors = dict.fromkeys(("library", "engine", "ending"), 1e-4)
        return endings.Measured(endings.Ending(images, 56, 56, mode), times, errors, (1.5, 0.5))

    found = [
        *(measured(images, FOLLOWED, us) for images, us in ((256, 2.0), (8, 3.0), (16, 4.5), (32, 3.0))),
        *(measured(images, ALONE, us) for images, us in ((32, 3.0), (256, 4.5))),
        *(measured(images, JOINED, us) for images, us in ((32, 3.0), (256, None))),
    ]
    entries = endings.table_entries(found).splitlines()
    assert [one for one in entries if "#" not in one] == ["    (56, 56, FOLLOWED): 32,"]
    assert entries[0] == "    # 8 of 56x56, followed, us: library 5.0, engine 4.0, ending 3.0"
    assert entries[-1].endswith("ending -") and len(entries) == 9
    assert "2.00" in endings.line(found[0]) and "75%" in endings.line(found[0])


def test_the_command_for_ends_of_bottlenecks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "endings.csv"
    arguments = "--only endings --batch 1 3 --side 32 --rounds 1 --device cpu --dtype float32 --csv"
    command.main([*arguments.split(), str(path)])
    rows = list(csv.DictReader(path.open()))
    names = ("library", "engine", "ending")
    every = [(images, name) for images in "13" for name in names]
    assert [(row["batch"], row["contender"]) for row in rows] == every * len(MODES)
    assert all(float(row["us"]) > 0 and float(row["error"]) < 1e-5 and row["commit"] for row in rows)
    assert "share" in capsys.readouterr().out
    monkeypatch.setattr(endings, "ours", lambda inputs: [one + 1 for one in endings.others(inputs, "library")])
    with pytest.raises(SystemExit, match=f"wrong for {2 * len(MODES)} ends of blocks"):
        command.main([*arguments.split(), str(path)])


def test_what_ends_of_bottlenecks_bring_to_a_trunk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the kernel its table is empty, and is as it was behind it; a wrong trunk fails."""
    seen: list[bool] = []
    monkeypatch.setattr(ending_trunks, "without_endings", _watched(ending_trunks.without_endings, seen))
    table = dict(MEASURED)
    arguments = ["--trunk", "resnet50", "--batch", "2", "--side", "32", "--rounds", "1", "--device", "cpu"]
    ending_trunks.main(arguments)
    assert "resnet50 2: with " in capsys.readouterr().out and seen and not any(seen) and table == MEASURED
    monkeypatch.setattr(ending_trunks, "without_endings", lambda folded, x: 1.1 * folded(x))
    with pytest.raises(SystemExit, match="1 trunks are off by more than"):
        ending_trunks.main(arguments)


def _watched(run: Callable[..., torch.Tensor], seen: list[bool]) -> Callable[..., torch.Tensor]:
    """Notes for each call whether the table held anything when the trunk ran."""

    def watched(folded: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        def noted(images: torch.Tensor) -> torch.Tensor:
            seen.append(bool(MEASURED))
            return folded(images)

        return run(noted, x)

    return watched
