"""The measured table of convolutions as a JSON file: what it holds, how it is checked when read, how it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastmetro_kernels.convolution.configs import (
    DEPTH,
    MAX_STAGES,
    NARROW,
    SHARED_BYTES,
    WIDE,
    ConvolutionConfig,
    PairConfig,
    Shape,
    box_bytes,
    pair_bytes,
    problem,
)
from fastmetro_kernels.tuning.reader import Reader, dump_families, parse_families, read_text, write_text

FORMAT = 1


class Layer(NamedTuple):
    """What a convolution is chosen by; both types of half precision and layers with and without a residual are alike.

    Attributes:
        images: N.
        height, width: of the input.
        channels, outputs: of the input and the output.
        down, across: of the kernel.
        stride, padding: in both directions.
        second: channels of the second input, 0 without one.
        following: outputs of the 1 x 1 convolution that is part of the same kernel (a pair), 0 for one by itself.
        scale: how often results are repeated down and across.
    """

    images: int
    height: int
    width: int
    channels: int
    outputs: int
    down: int
    across: int
    stride: int
    padding: int
    second: int = 0
    following: int = 0
    scale: int = 1

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the output before it is repeated."""
        return (
            (self.height + 2 * self.padding - self.down) // self.stride + 1,
            (self.width + 2 * self.padding - self.across) // self.stride + 1,
        )

    @property
    def shape(self) -> Shape:
        """What a tile is chosen by."""
        height, width = self.output
        chunks = self.down * self.across * -(-self.channels // DEPTH) + -(-self.second // DEPTH)
        near = (self.down, self.across, self.stride, self.padding, self.second) == (3, 3, 1, 1, 0) and width < 256
        return Shape(self.images * height * width, self.outputs, chunks, box_bytes(height, width) if near else 0)

    def __str__(self) -> str:
        second = f" and 1x1 of {self.second}" if self.second else ""
        kernel = f"{self.down}x{self.across}/{self.stride}"
        more = f", then -> {self.following}" if self.following else f", repeated x{self.scale}" * (self.scale > 1)
        return f"{self.images} of {self.height}x{self.width}, {self.channels} -> {self.outputs}, {kernel}{second}{more}"


@dataclass(frozen=True)
class Entry:
    """One measured layer.

    Attributes:
        layer: which.
        config: the kernel's fastest tile, or None where the library is faster; of a pair its cut, or None where two
            convolutions are faster.
        native_us, library_us: microseconds of one call of the kernel with its fastest tile, and of the library; of a
            pair those of the trunk with it and with two.
    """

    layer: Layer
    config: ConvolutionConfig | PairConfig | None
    native_us: float
    library_us: float


@dataclass(frozen=True)
class Family:
    """What was measured on devices of one compute capability: how (`tuning.reader.RECORD`), and the layers."""

    record: Mapping[str, str] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()


def parse(text: str, source: str) -> dict[str, Family]:
    """The families of a file by compute capability, as `"9.0"`.

    Args:
        text: The contents of the file.
        source: Its name, for the messages.

    Raises:
        TuningFileError: anything that is not as `dump` writes it.
    """
    found = parse_families(text, source, "convolution", FORMAT, "entries", _entry, lambda entry: entry.layer)
    return {name: Family(*parts) for name, parts in found.items()}


def _entry(read: Reader, where: str, value: Any) -> Entry:
    entry = read.table(where, value, ("layer", "config", "native_us", "library_us"))
    listed = read.table(f"{where}.layer", entry["layer"], Layer._fields)
    low = {"padding": 0, "second": 0, "following": 0}
    layer = Layer(**{name: read.number(f"{where}.layer.{name}", listed[name], low.get(name, 1)) for name in listed})
    if min(layer.output) < 1:
        raise read.fail(f"{where}.layer", listed, "an input at least as large as the kernel")
    times = [_microseconds(read, f"{where}.{name}", entry[name]) for name in ("native_us", "library_us")]
    return Entry(layer, _config(read, f"{where}.config", entry["config"], layer), *times)


def _microseconds(read: Reader, where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise read.fail(where, value, "microseconds, a finite number above 0")
    return float(value)


def _config(read: Reader, where: str, value: Any, layer: Layer) -> ConvolutionConfig | PairConfig | None:
    if value == "library":
        return None
    kind = PairConfig if layer.following else ConvolutionConfig
    listed = dict(read.table(where, value, kind._fields))
    flags = {name: listed.pop(name) for name in ("early", "once", "alone") if name in listed}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise read.fail(f"{where}.{name}", flag, "true or false")
    numbers = {name: read.number(f"{where}.{name}", number) for name, number in listed.items()}
    if layer.following:
        return _pair(read, where, value, layer, PairConfig(numbers["stages"], flags["early"]))
    config = ConvolutionConfig(**numbers, early=flags["early"], once=flags["once"], alone=flags["alone"])
    if wrong := problem(config, layer.shape.chunks, layer.scale, layer.shape.box):
        raise read.fail(where, value, f'"library" or a configuration of the kernel: {wrong}')
    return config


def _pair(read: Reader, where: str, value: Any, layer: Layer, config: PairConfig) -> PairConfig:
    fits = layer.outputs in WIDE and layer.following in NARROW and (layer.down, layer.across, layer.stride) == (1, 1, 1)
    if not fits or not 2 <= config.stages <= MAX_STAGES or pair_bytes(layer.following, config.stages) > SHARED_BYTES:
        raise read.fail(where, value, '"library" or a pair of the kernel')
    return config


def read_file(path: Path) -> dict[str, Family]:
    """The families of a file; see `parse`.

    Raises:
        TuningFileError: it cannot be read, or is not as it should be.
    """
    return parse(read_text(path), str(path))


def dump(families: Mapping[str, Family]) -> str:
    """The text of a file, one line per layer, that `parse` reads back."""
    blocks = {}
    for name, family in families.items():
        entries = sorted(family.entries, key=lambda entry: entry.layer)
        blocks[name] = dict(family.record), "entries", [_dump_entry(entry) for entry in entries]
    return dump_families("convolution", FORMAT, blocks)


def _dump_entry(entry: Entry) -> str:
    config = "library" if entry.config is None else entry.config._asdict()
    times = {"native_us": entry.native_us, "library_us": entry.library_us}
    return json.dumps({"layer": entry.layer._asdict(), "config": config, **times})


def write_file(path: Path, families: Mapping[str, Family]) -> None:
    """Writes the file as a whole or not at all."""
    write_text(path, dump(families))


def merged(
    families: Mapping[str, Family], name: str, record: Mapping[str, str], entries: Sequence[Entry]
) -> dict[str, Family]:
    """`families` with these entries in place of those of the same layers, and the record of the newest measurement."""
    new = {entry.layer for entry in entries}
    kept = [entry for entry in families.get(name, Family()).entries if entry.layer not in new]
    return {**families, name: Family(dict(record), (*kept, *entries))}
