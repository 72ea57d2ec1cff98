"""Tiles of linear layers chosen in the whole: what is recorded and tried, and what stays. Times are made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bench.fused import place
from bench.fused.place import Call, Size, Tile
from fastmetro_kernels import fused
from fastmetro_kernels.fused.linear import configs, native
from fastmetro_kernels.fused.linear.configs import LinearConfig
from fastmetro_kernels.fused.linear.native import NativeLinearConfig

PLAIN = Call(fused.fused_linear, (), {})


def test_layers_of_half_precision_are_recorded() -> None:
    """With leading tokens among their rows; float32 heads are not."""
    x, weight = torch.zeros(1, 5, 32, dtype=torch.bfloat16), torch.zeros(64, 32, dtype=torch.bfloat16)

    def work() -> None:
        fused.fused_linear(x, weight, backend="reference")
        fused.fused_linear_moments(x, weight, leading=x.new_zeros(1, 1, 64), backend="reference")
        fused.fused_linear(x.float(), weight.float(), backend="reference")
        fused.fused_linear(x, weight, relu=True, backend="reference")

    ops = fused.fused_linear, fused.fused_linear_moments
    found = place.recorded(work)
    assert {size: len(calls) for size, calls in found.items()} == {(5, 64, 32): 2, (6, 64, 32): 1}
    again = found[Size(5, 64, 32)][1]
    assert again.op(*again.arguments, **again.options).shape == (1, 5, 64)
    assert (fused.fused_linear, fused.fused_linear_moments) == ops


def test_a_trial_goes_before_both_tables_and_leaves_them_alone() -> None:
    before = dict(configs.MEASURED), dict(native.MEASURED)
    size, other = Size(50, 512, 2048), Size(445, 512, 512)
    assert isinstance(place.chosen(size), NativeLinearConfig)
    tile, small = LinearConfig(64, 64, 64, 1, 4, 8), NativeLinearConfig(32, 2, 4)
    with place.trial({size: tile, other: small}):
        assert place.chosen(size) == tile and place.chosen(other) == small
        assert configs.pinned(445, 512, 2048, 2) == dict(before[0][2, 512, 2048])[445]
        assert configs.pinned(446, 512, 512, 2) == dict(before[0][2, 512, 512])[12800]
    assert before == (configs.MEASURED, native.MEASURED)


@pytest.mark.parametrize("size", [Size(445, 512, 2048), Size(50, 1536, 512), Size(445, 128, 128)])
def test_tiles_that_are_tried_can_run_and_some_keep_others_away(size: Size) -> None:
    tiles = place.candidates(size, [PLAIN])
    assert len(set(tiles)) == len(tiles)
    fused_tiles = [tile for tile in tiles if isinstance(tile, LinearConfig)]
    assert all(configs.problem(tile) is None for tile in fused_tiles)
    assert all(native.problem(tile) is None for tile in tiles if isinstance(tile, NativeLinearConfig))
    rings = [tile.stages * (tile.rows + tile.columns) * tile.depth * tile.shares * 2 for tile in fused_tiles]
    assert min(rings) < place.HALF_BYTES < max(rings) <= place.SHARED_BYTES
    without = place.candidates(size, [Call(fused.fused_linear, (), {"normalize": 1e-5})])
    assert without == fused_tiles  # the native kernel takes moments, and makes none of a norm


def test_what_makes_the_whole_faster_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer with the most work first; what cannot run is passed over, and the end of the time ends the trials."""
    large, small = Size(445, 512, 2048), Size(50, 512, 512)
    tried: list[tuple[Size, Tile]] = []
    gains = {large: LinearConfig(64, 128, 64, 1, 4, 5), small: NativeLinearConfig(32, 2, 4)}

    def timed(work: place.Work, tiles: Mapping[Size, Tile], expected: Mapping[str, torch.Tensor]) -> float:
        size, tile = list(tiles.items())[-1] if len(tiles) < 2 else (small, tiles[small])
        tried.append((size, tile))
        if isinstance(tile, LinearConfig) and tile.rows == 128:
            raise RuntimeError("out of resources")
        return 100.0 - sum(10.0 for one, best in gains.items() if tiles.get(one) == best)

    monkeypatch.setattr(place, "microseconds", timed)
    calls: dict[Size, list[Call]] = {small: [PLAIN], large: [PLAIN]}
    tiles: dict[Size, Any] = {}
    said: list[str] = []
    trials = place.settle(dict, {}, calls, tiles, 100.0, said.append)
    assert [taken for *_, taken, better in trials if better] == [90.0, 80.0] and len(trials) < len(tried)
    assert tiles == gains
    assert [size for size, _ in tried] == sorted((size for size, _ in tried), key=[large, small].index)
    assert place.chosen(large) not in [tile for size, tile in tried if size == large]
    assert any("RuntimeError" in line for line in said) and sum(line.endswith("<") for line in said) == 2
    lines = f"{{{place.entries(tiles)}}}"
    named = {"LinearConfig": LinearConfig, "NativeLinearConfig": NativeLinearConfig}
    assert eval(lines, named) == {tuple(size): tile for size, tile in gains.items()}
    tried.clear()
    assert not place.settle(dict, {}, calls, {}, 100.0, said.append, until=0.0) and not tried


def test_outputs_are_held_against_those_before() -> None:
    """To within other roundings; NaN is wrong, too."""
    expected = {"vertices": torch.linspace(-1, 1, 30), "camera": torch.ones(3)}
    place.check({name: value * (1 + 1e-3) for name, value in expected.items()}, expected)
    for wrong in (expected["camera"] * 1.1, torch.full((3,), torch.nan)):
        with pytest.raises(ValueError, match="camera is off by"):
            place.check(expected | {"camera": wrong}, expected)
