"""Tables settled once more in whole trunks: what is tried, what stays, and what is left alone. Times are made up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.convolution import command, place, resettle
from bench.convolution.layers import Used, used_pairs
from fastmetro_kernels.convolution import ConvolutionConfig, PairConfig, choice, table
from fastmetro_kernels.convolution.configs import ALONE_BYTES, box_bytes, once_bytes, problem, shared_bytes
from fastmetro_kernels.convolution.table import Layer
from fastmetro_kernels.tuning import reader

CPU = torch.device("cpu")
PLAIN, OTHER, TALL = (Layer(2, height, 5, 16, 32, 3, 3, 1, 1) for height in (6, 7, 30))
ELSEWHERE = PLAIN._replace(images=9)
TILE = ConvolutionConfig(32, 1, 2)
Write = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A table with tiles for layers, as for a GPU of this machine."""
    monkeypatch.setattr(resettle, "family_of", lambda device: "9.0")
    monkeypatch.setattr(resettle.command, "record", lambda device: dict.fromkeys(reader.RECORD, "new"))

    def write(*layers: Layer, pair: Layer | None = None) -> Path:
        entries = [table.Entry(layer, TILE, 2.0 + number, 9.0) for number, layer in enumerate(layers)]
        if pair is not None:
            entries.append(table.Entry(pair, PairConfig(2), 5.0, 6.0))
        path = tmp_path / "table.json"
        table.write_file(path, {"9.0": table.Family(dict.fromkeys(reader.RECORD, "old"), tuple(entries))})
        return path

    return write


def used(*layers: Layer) -> Counter[Used]:
    return Counter({Used(layer, False, True): 1 for layer in layers})


def entries_of(path: Path) -> dict[Layer, table.Entry]:
    return {entry.layer: entry for entry in table.read_file(path)["9.0"].entries}


def test_which_blocks_are_alone(written: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers win alone together only, which one change at a time from none does not find, and the third loses."""

    def taken(folded: object, x: object, chosen: choice.Tiles) -> float:
        alone = {layer: isinstance(tile, ConvolutionConfig) and tile.alone for layer, tile in chosen.items()}
        return 100 - 10 * (alone[PLAIN] and alone[OTHER]) + alone[PLAIN] + alone[OTHER] + alone[TALL]

    monkeypatch.setattr(place, "microseconds", taken)
    path = written(PLAIN, OTHER, TALL, ELSEWHERE)
    before = entries_of(path)
    said: list[str] = []
    resettle.spread({"resnet50": used(PLAIN, OTHER, TALL)}, 32, torch.float32, CPU, path, said.append)
    found = entries_of(path)
    tiles = [found[layer].config for layer in (PLAIN, OTHER, TALL)]
    assert tiles == [TILE._replace(alone=True), TILE._replace(alone=True), TILE]
    assert found[ELSEWHERE] == before[ELSEWHERE] and len(said) == 2
    assert all(found[layer].native_us == before[layer].native_us for layer in found)
    assert table.read_file(path)["9.0"].record["commit"] == "new"


def test_the_next_trunk_changes_nothing_that_one_has_settled(written: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, set[Layer]]] = []

    def settle(trunk: str, images: int, side: int, dtype: object, device: object, chosen, rivals, say: object):
        tried.append((trunk, set(rivals)))
        return {layer: place.Settled(chosen[layer], 2.0, 1.0) for layer in rivals}

    monkeypatch.setattr(place, "settle", settle)
    path = written(PLAIN, OTHER, TALL)
    uses = {"resnet50": used(PLAIN, OTHER, ELSEWHERE), "hrnet-w64": used(PLAIN, TALL)}
    resettle.spread(uses, 32, torch.float32, CPU, path)
    assert tried == [("resnet50", {PLAIN, OTHER})] * 2 + [("hrnet-w64", {TALL})] * 2


def test_how_layers_are_cut_and_which_pairs_are_one(written: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(1, 14, 14, 256, 256, 3, 3, 1, 1)
    pair = next(iter(used_pairs("resnet50", 1, 32)))
    wanted: dict[Layer, place.Tile] = {layer: ConvolutionConfig(64, 4, 4, alone=True), pair: None}
    monkeypatch.setattr(
        place, "microseconds", lambda folded, x, chosen: 10.0 - sum(chosen[one] == tile for one, tile in wanted.items())
    )
    path = written(layer, pair=pair)
    resettle.place_tiles({"resnet50": used(layer)}, 32, torch.float32, CPU, path, lambda text: None)
    assert {one: entry.config for one, entry in entries_of(path).items()} == wanted


def test_a_trunk_that_is_off_with_its_tiles_is_refused(written: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written then."""
    monkeypatch.setattr(place, "microseconds", lambda folded, x, chosen: 1.0)
    errors = iter((1e-3, 3e-3))
    monkeypatch.setattr(place, "trunk_error", lambda features, truth: next(errors))
    path = written(PLAIN, OTHER)
    before = path.read_text()
    with pytest.raises(RuntimeError, match="resnet50, 2 images: off by 3"):
        resettle.spread({"resnet50": used(PLAIN, OTHER)}, 32, torch.float32, CPU, path, lambda text: None)
    assert path.read_text() == before


@pytest.mark.parametrize("layer", [Layer(1, 14, 14, 256, 256, 3, 3, 1, 1), Layer(1, 14, 14, 1024, 256, 1, 1, 1, 0)])
def test_what_is_worth_a_trial(layer: Layer) -> None:
    """Tiles that can run, of some blocks, together and alone where their own memory leaves room for two."""
    found = resettle.rivals_of(layer)
    assert len(set(found)) == len(found) > 8
    for tile in found:
        assert isinstance(tile, ConvolutionConfig)
        assert problem(tile, layer.shape.chunks, box=layer.shape.box) is None
        assert resettle.FEWEST <= resettle.blocks(layer, tile) <= resettle.MOST
        needed = once_bytes(tile, layer.shape.box) if tile.once else shared_bytes(tile)
        assert (tile._replace(alone=True) in found) == (needed < ALONE_BYTES or tile.alone)
    assert layer.shape.box in (0, box_bytes(14, 14)) and any(tile.once for tile in found) == (layer.down == 3)
    pair = Layer(1, 14, 14, 256, 1024, 1, 1, 1, 0, following=256)
    assert resettle.rivals_of(pair)[0] is None and len(resettle.rivals_of(pair)) > 1


@pytest.mark.parametrize("only", sorted(command.RESETTLING))
def test_a_table_has_to_be_named(only: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", only, "--device", "cpu"])
    assert "name it with --tune FILE" in capsys.readouterr().err
