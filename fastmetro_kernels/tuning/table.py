"""The measured table of attention as a JSON file: what it holds, how it is checked when read, how it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmetro_kernels.attention.configs import PADDED_DIMS, PASSES, Config, TritonConfig, problem
from fastmetro_kernels.tuning.reader import (
    LARGEST_FILE,
    Reader,
    dump_families,
    parse_families,
    read_text,
    write_text,
)

FORMAT = 1
SELECTABLE = ("native", "triton")
"""Backends that `auto` takes by measurement. Their log-sum-exp and dropout agree, so each pass may have its own."""

YARDSTICKS = ("sdpa", "reference")
"""Plain PyTorch, measured beside them for comparison: masked `scaled_dot_product_attention`, and `reference`."""

Configuration = TritonConfig | int | None
"""Of Triton, of the CUDA kernels (`steps_per_segment`), and of a yardstick."""


@dataclass(frozen=True)
class Candidate:
    """A backend with a configuration, and the milliseconds that a pass took with it."""

    backend: str
    configuration: Configuration
    milliseconds: float

    def __str__(self) -> str:
        return f"{self.backend} {describe(self.configuration)}".strip()


@dataclass(frozen=True)
class Point:
    """One measured case: a pass, the bytes of a number, the padded head dim, vertices, and batch times heads.

    `dtype` is what was measured; numbers of as many bytes are treated alike. `candidates` are sorted, fastest first.
    """

    pass_name: str
    element_size: int
    dim: int
    vertices: int
    batch_heads: int
    dtype: str
    candidates: tuple[Candidate, ...]

    @property
    def key(self) -> tuple[str, int, int, int, int]:
        """What a table holds once."""
        return self.pass_name, self.element_size, self.dim, self.vertices, self.batch_heads


@dataclass(frozen=True)
class Family:
    """What was measured on devices of one compute capability: how (`reader.RECORD`), and the points."""

    record: Mapping[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()


def describe(configuration: Configuration) -> str:
    """A configuration in a few words."""
    if configuration is None:
        return ""
    if isinstance(configuration, int):
        return f"{configuration} steps per segment" if configuration else "automatic segments"
    tiles = " + ".join("{}x{} {} warps {} stages".format(*tile) for tile in configuration.tiles)
    share = f", hub shares of {configuration.share}" if configuration.share else ""
    return tiles + share + (f", {configuration.precision}" if configuration.precision != "ieee" else "")


def parse(text: str, source: str) -> dict[str, Family]:
    """The families of a file by compute capability, as `"9.0"`.

    Args:
        text: The contents of the file.
        source: Its name, for the messages.

    Raises:
        TuningFileError: anything that is not as `dump` writes it.
    """
    found = parse_families(text, source, "attention", FORMAT, "points", _point, lambda point: point.key)
    return {name: Family(*parts) for name, parts in found.items()}


def _point(read: Reader, where: str, value: Any) -> Point:
    keys = ("pass", "bytes", "dim", "vertices", "batch_heads", "dtype", "candidates")
    point = read.table(where, value, keys)
    pass_name = read.one_of(f"{where}.pass", point["pass"], PASSES)
    listed = read.sequence(f"{where}.candidates", point["candidates"])
    candidates = [_candidate(read, f"{where}.candidates[{i}]", one, pass_name) for i, one in enumerate(listed)]
    return Point(
        pass_name=pass_name,
        element_size=read.one_of(f"{where}.bytes", point["bytes"], (2, 4)),
        dim=read.one_of(f"{where}.dim", point["dim"], PADDED_DIMS),
        vertices=read.number(f"{where}.vertices", point["vertices"]),
        batch_heads=read.number(f"{where}.batch_heads", point["batch_heads"]),
        dtype=read.one_of(f"{where}.dtype", point["dtype"], ("float16", "bfloat16", "float32")),
        candidates=tuple(sorted(candidates, key=lambda candidate: candidate.milliseconds)),
    )


def _candidate(read: Reader, where: str, value: Any, pass_name: str) -> Candidate:
    candidate = read.table(where, value, ("backend", "configuration", "ms"))
    backend = read.one_of(f"{where}.backend", candidate["backend"], (*SELECTABLE, *YARDSTICKS))
    taken = candidate["ms"]
    if isinstance(taken, bool) or not isinstance(taken, (int, float)) or not 0 < taken < math.inf:
        raise read.fail(f"{where}.ms", taken, "milliseconds, a finite number above 0")
    configuration = _configuration(read, f"{where}.configuration", candidate["configuration"], backend, pass_name)
    return Candidate(backend, configuration, float(taken))


def _configuration(read: Reader, where: str, value: Any, backend: str, pass_name: str) -> Configuration:
    if backend == "native":
        steps = read.table(where, value, ("steps_per_segment",))["steps_per_segment"]
        return read.number(f"{where}.steps_per_segment", steps, 0)
    if backend in YARDSTICKS:
        read.table(where, value, ())
        return None
    triton = read.table(where, value, ("tiles", "precision", "share"))
    tiles = []
    for index, tile in enumerate(read.sequence(f"{where}.tiles", triton["tiles"])):
        numbers = read.sequence(f"{where}.tiles[{index}]", tile)
        if len(numbers) != len(Config._fields):
            raise read.fail(f"{where}.tiles[{index}]", tile, f"[{', '.join(Config._fields)}]")
        tiles.append(Config(*(read.number(f"{where}.tiles[{index}]", number) for number in numbers)))
    precision = read.text(f"{where}.precision", triton["precision"])
    config = TritonConfig(tuple(tiles), precision, read.number(f"{where}.share", triton["share"], 0))
    if wrong := problem(config, pass_name):
        raise read.fail(where, value, f"a configuration of the kernels: {wrong}")
    return config


def read_file(path: Path) -> dict[str, Family]:
    """The families of a file; see `parse`.

    Raises:
        TuningFileError: it cannot be read, is larger than 16 MiB, or is not as it should be.
    """
    return parse(read_text(path, LARGEST_FILE), str(path))


def dump(families: Mapping[str, Family]) -> str:
    """The text of a file, one line per candidate, that `parse` reads back."""
    blocks = {}
    for name, family in families.items():
        points = sorted(family.points, key=lambda point: point.key)
        blocks[name] = dict(family.record), "points", [_dump_point(point) for point in points]
    return dump_families("attention", FORMAT, blocks)


def _dump_point(point: Point) -> str:
    head = json.dumps(
        {
            "pass": point.pass_name,
            "bytes": point.element_size,
            "dim": point.dim,
            "vertices": point.vertices,
            "batch_heads": point.batch_heads,
            "dtype": point.dtype,
        }
    )
    lines = [
        json.dumps({"backend": one.backend, "configuration": _plain(one.configuration), "ms": one.milliseconds})
        for one in sorted(point.candidates, key=lambda candidate: candidate.milliseconds)
    ]
    return head[:-1] + ', "candidates": [\n  ' + ",\n  ".join(lines) + "\n]}"


def _plain(configuration: Configuration) -> dict[str, Any]:
    """A configuration as JSON holds it."""
    if configuration is None:
        return {}
    if isinstance(configuration, int):
        return {"steps_per_segment": configuration}
    return configuration._asdict()


def write_file(path: Path, families: Mapping[str, Family]) -> None:
    """Writes the file as a whole or not at all."""
    write_text(path, dump(families))


def merged(
    families: Mapping[str, Family], name: str, record: Mapping[str, str], points: list[Point]
) -> dict[str, Family]:
    """`families` with these points in place of those of the same cases, and the record of the newest measurement."""
    kept = [one for one in families.get(name, Family()).points if one.key not in {point.key for point in points}]
    return {**families, name: Family(dict(record), (*kept, *points))}
