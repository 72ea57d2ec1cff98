"""Which convolutions `auto` gives to the kernel: the measured table, the rule beside it, and what `info` tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmetro_kernels import convolution as kernels
from fastmetro_kernels import info
from fastmetro_kernels.convolution import ConvolutionConfig, api, choice, lay_out, reference, table
from fastmetro_kernels.convolution.configs import pinned
from fastmetro_kernels.convolution.table import Entry, Family, Layer
from fastmetro_kernels.tuning import TuningFileError, reader

RECORD = dict.fromkeys(reader.RECORD, "x")
CPU = torch.device("cpu")
SMALL = Layer(1, 14, 14, 256, 256, 3, 3, 1, 1)
MERGED = Layer(1, 28, 28, 128, 512, 1, 1, 1, 0, 256)
TILE = ConvolutionConfig(64, 4, 4, early=False)


def entries() -> tuple[Entry, ...]:
    return Entry(SMALL, TILE, 3.5, 4.25), Entry(MERGED, None, 5.0, 4.5)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Makes entries the table of this device's family."""

    def use(*entries: Entry) -> None:
        path = tmp_path / "mine.json"
        table.write_file(path, {"9.0": Family(RECORD, entries)})
        monkeypatch.setenv(choice.ENVIRONMENT, str(path))
        monkeypatch.setattr(choice, "family_of", lambda device: "9.0")
        choice.reset()

    yield use
    monkeypatch.undo()
    choice.reset()


def test_layers_know_their_shape() -> None:
    assert SMALL.output == (14, 14) and SMALL.shape == (196, 256, 36, 15 << 10)
    assert MERGED.shape == (784, 512, 2 + 4, 0)
    assert Layer(2, 7, 9, 16, 32, 3, 3, 2, 1).output == (4, 5)
    assert str(MERGED) == "1 of 28x28, 128 -> 512, 1x1/1 and 1x1 of 256"


def test_the_shipped_table_is_as_it_is_written() -> None:
    text = choice.SHIPPED.read_text()
    assert table.dump(table.parse(text, "measured.json")) == text


def test_files_come_back_and_newer_entries_replace_older(tmp_path: Path) -> None:
    families = {"9.0": Family(RECORD, tuple(sorted(entries(), key=lambda entry: entry.layer))), "10.0": Family(RECORD)}
    path = tmp_path / "table.json"
    table.write_file(path, families)
    assert table.read_file(path) == families
    again = Entry(SMALL, None, 9.0, 4.0)
    found = table.merged(families, "9.0", RECORD | {"date": "today"}, [again])
    assert set(found["9.0"].entries) == {again, entries()[1]} and found["9.0"].record["date"] == "today"
    assert found["10.0"] == families["10.0"]
    assert table.merged({}, "9.0", RECORD, [again])["9.0"].entries == (again,)


def change(*path: str | int, to: Any) -> Callable[[Any], None]:
    def apply(content: Any) -> None:
        *front, last = path
        for step in front:
            content = content[step]
        content[last] = to

    return apply


ENTRY: tuple[str | int, ...] = ("families", "9.0", "entries", 0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("op", to="attention"), "op is 'attention'; accepted: 'convolution'"),
        (change("format", to=7), "format is 7; accepted: 1"),
        (change("families", to={"nine": {}}), "a name of families is 'nine'"),
        (change("families", "9.0", "record", "date", to=3), "record.date is 3; accepted: printable text"),
        (change(*ENTRY, "layer", "stride", to=0), "layer.stride is 0; accepted: an integer from 1"),
        (change(*ENTRY, "layer", "height", to=1 << 40), "layer.height is 1099511627776"),
        (change(*ENTRY, "layer", to={}), "the set of keys of families['9.0'].entries[0].layer is []"),
        (change(*ENTRY, "native_us", to=-1), "native_us is -1; accepted: microseconds"),
        (change(*ENTRY, "library_us", to=float("nan")), "library_us is nan"),
        (change(*ENTRY, "config", to="cudnn"), "config is 'cudnn'; accepted: an object"),
        (change(*ENTRY, "config", "early", to=1), "config.early is 1; accepted: true or false"),
        (change(*ENTRY, "config", "alone", to=0), "config.alone is 0; accepted: true or false"),
        (change(*ENTRY, "config", "columns", to=48), '"library" or a configuration of the kernel: columns must be'),
        (change(*ENTRY, "config", "stages", to=16), "fit 232448 bytes of shared memory"),
    ],
)
def test_malformed_files_are_refused(edit: Callable[[Any], None], message: str) -> None:
    content = json.loads(table.dump({"9.0": Family(RECORD, (Entry(SMALL, TILE._replace(columns=128), 3.5, 4.25),))}))
    edit(content)
    with pytest.raises(TuningFileError) as error:
        table.parse(json.dumps(content), "mine.json")
    assert str(error.value).startswith("mine.json: ") and message in str(error.value)


def test_a_layer_twice_is_refused() -> None:
    text = table.dump({"9.0": Family(RECORD, (entries()[0], entries()[0]))})
    with pytest.raises(TuningFileError, match="accepted: every case once"):
        table.parse(text, "mine.json")


def test_the_table_goes_before_the_rule(measured: Callable[..., None]) -> None:
    measured(*entries())
    assert choice.choose(CPU, SMALL) == TILE
    assert choice.choose(CPU, MERGED) is None and choice.by_rule(MERGED) is not None
    other = SMALL._replace(images=2)
    assert choice.choose(CPU, other) == pinned(other.shape)


def test_limits_of_the_rule() -> None:
    first = Layer(8, 56, 56, 64, 256, 1, 1, 1, 0)
    assert first.shape.rows == choice.MOST_ROWS and choice.by_rule(first) == pinned(first.shape)
    assert choice.by_rule(first._replace(images=9)) is None
    assert choice.by_rule(first._replace(height=57)) is None
    assert choice.by_rule(first._replace(height=112, width=112, stride=2)) is not None
    assert choice.by_rule(SMALL._replace(images=9)) is None and choice.by_rule(SMALL._replace(images=0)) is None


def test_auto_goes_by_the_choice(measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel that only pretends to be here."""
    ran: list[tuple[int, ...] | str] = []
    library = reference.convolution

    def kernel(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        ran.append(tuple(rest[-1]))
        return x.new_zeros(*x.shape[:3], len(weight))

    def fallback(*arguments: Any) -> torch.Tensor:
        ran.append("reference")
        return library(*arguments)

    x, weights = torch.randn(1, 256, 14, 14), lay_out(torch.randn(256, 256, 3, 3), torch.randn(256))
    kernels.convolution(x, weights)  # the CPU has no kernel
    assert kernels.choose(x, weights) is None
    measured(entries()[0])
    monkeypatch.setattr(api.native, "reasons", lambda device, dtype: [])
    monkeypatch.setattr(api.ops, "convolution_native", kernel)
    monkeypatch.setattr(api.reference, "convolution", fallback)
    assert kernels.choose(x, weights) == TILE
    kernels.convolution(x, weights)
    kernels.convolution(x, weights, config=TILE._replace(split=2))
    kernels.convolution(x, weights, backend="reference")
    measured(Entry(SMALL, None, 5.0, 4.0))
    kernels.convolution(x, weights)
    kernels.convolution(x, weights, backend="native")
    tiles = [tuple(map(int, tile)) for tile in (TILE, TILE._replace(split=2), pinned(SMALL.shape))]
    assert ran == [*tiles[:2], "reference", "reference", tiles[2]]


def test_info_tells_how_auto_chooses(measured: Callable[..., None]) -> None:
    assert "convolution (inference only) without a measurement: native up to 8 images" in info.report()
    measured(*entries())
    text = info.report()
    assert "convolution, compute capability 9.0: measured on x, torch x" in text
    assert "1 images: native for 1 of 2 measured layers, else the library" in text
    assert f"library: {MERGED}: 4.50 microseconds, native 5.00" in text
    assert f"{choice.ENVIRONMENT}=" in text


def test_info_reports_a_malformed_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}")
    monkeypatch.setenv(choice.ENVIRONMENT, str(path))
    choice.reset()
    try:
        assert f"{path}: the set of keys of the file is []" in info.report()
    finally:
        monkeypatch.undo()
        choice.reset()


def test_weights_share_memory_where_they_can() -> None:
    weight = torch.randn(32, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    bias, more = torch.randn(32), torch.randn(32, 16, 1, 1)
    weights = lay_out(weight, bias, 2, second=(more, None, 1))
    weight.mul_(2)
    bias.add_(1)
    more.sub_(1)
    assert weights.second_weight is not None
    assert torch.equal(weights.weight.permute(0, 3, 1, 2), weight) and torch.equal(weights.bias, bias)
    assert torch.equal(weights.second_weight.permute(0, 3, 1, 2), more)
