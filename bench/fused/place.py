"""Tiles of the fused linear layers chosen where they run: in everything behind the backbone, as one CUDA graph.

    python -m bench.fused.place [--model fastmetro-l] [--batch 1] [--least-width 512] [--seconds 60] [--json FILE]

A layer by itself is not what it is in the chain: there its blocks are launched while those of the layer in front still
run, and settle where these left room, several on a multiprocessor while others stand still. So layer by layer, the one
with the most work first, other tiles take the place of the chosen one, and what makes the whole faster stays. Prints a
line for every trial, and at the end the entries for `MEASURED` in fastmetro_kernels/fused/linear/configs.py and
native.py. What is computed is held against what it was with the tiles before; tests/kernels/test_fused_linear*.py hold
every tile that is in use against float64.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor

import fastmetro
from bench import common
from bench.convolution.measure import Timer
from fastmetro.profiling.contenders import build_model
from fastmetro.profiling.parts import WHOLE
from fastmetro.profiling.settings import FpsSettings
from fastmetro_kernels import fused
from fastmetro_kernels.fused.linear import configs, native
from fastmetro_kernels.fused.linear.configs import LinearConfig
from fastmetro_kernels.fused.linear.native import NativeLinearConfig

GRAPH_CALLS, ROUNDS = 4, 9
GAIN = 1e-3
"""A tile takes the place of another where the time of the whole is less by this part."""
LARGEST_DISTANCE = 1e-2
"""Relative L2 distance of outputs that roundings in half precision may make; a wrong tile makes one of about 1."""
BYTES = 2
"""Of an element: half precision."""
SHARED_BYTES = 220 * 1024
FEWEST, MOST = 28, 240
"""Programs of a tile that is worth a trial."""
HALF_BYTES = 114 * 1024
"""Rings beyond half of the shared memory keep other blocks of the same kernel off a multiprocessor."""
TILES = tuple(
    dict.fromkeys((tile.rows, tile.columns, tile.depth, tile.shares, tile.warps) for tile in configs.TILES[2])
)
MANY_ROWS, ROWS_OF_MANY = 256, 32
NATIVE_STAGES = (4, 8)

Work = Callable[[], Mapping[str, Tensor]]
Tile = LinearConfig | NativeLinearConfig
Trial = tuple[int, int, int, str, float, bool]
"""Rows, features and width of a layer, the tile, microseconds of the whole, and whether the tile stayed."""


class Size(NamedTuple):
    """Rows of all samples, output and input features of a layer."""

    rows: int
    features: int
    width: int


class Call(NamedTuple):
    """A call of the op, to be made again."""

    op: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def recorded(work: Callable[[], object]) -> dict[Size, list[Call]]:
    """The fused linear layers of half precision that `work` calls, by size, in their order."""
    found: dict[Size, list[Call]] = {}

    def recorder(op: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any, **options: Any) -> Any:
            x, weight = arguments[:2]
            if weight.element_size() == BYTES:
                leading = options.get("leading")
                more = 0 if leading is None else leading.shape[-2]
                size = Size(x.shape[0] * (x.shape[1] + more), *weight.shape)
                found.setdefault(size, []).append(Call(op, arguments, options))
            return op(*arguments, **options)

        return record

    names = ("fused_linear", "fused_linear_moments")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(fused, name, recorder(getattr(fused, name))))
        work()
    return found


@contextlib.contextmanager
def trial(tiles: Mapping[Size, Tile]) -> Iterator[None]:
    """Within, layers of these sizes get these tiles, whatever the tables say."""
    with mock.patch.dict(configs.MEASURED), mock.patch.dict(native.MEASURED):
        for size, tile in tiles.items():
            if isinstance(tile, NativeLinearConfig):
                native.MEASURED[size] = tile
                continue
            native.MEASURED.pop(size, None)
            key = (BYTES, size.features, size.width)
            others = [entry for entry in configs.MEASURED.get(key, ()) if entry[0] != size.rows]
            configs.MEASURED[key] = tuple(sorted([*others, (size.rows, tile)], key=lambda entry: entry[0]))
        yield


def chosen(size: Size) -> Tile:
    """By the tables."""
    return native.MEASURED.get(size) or configs.pinned(*size, BYTES)


def candidates(size: Size, calls: Sequence[Call]) -> list[Tile]:
    """Tiles worth a trial, each with a ring that leaves room for another block, and with one that does not."""
    found: list[Tile] = []
    for rows, columns, depth, shares, warps in TILES:
        programs = -(-size.rows // rows) * -(-size.features // columns)
        if depth * shares > size.width or columns > size.features or not FEWEST <= programs <= MOST:
            continue
        if size.rows >= MANY_ROWS and rows < ROWS_OF_MANY:
            continue
        stage = (rows + columns) * depth * shares * BYTES
        for stages in dict.fromkeys((min(6, HALF_BYTES // stage), HALF_BYTES // stage + 1)):
            tile = LinearConfig(rows, columns, depth, shares, warps, stages)
            if stages * stage <= SHARED_BYTES and configs.problem(tile) is None:
                found.append(tile)
    takes = [call for call in calls if call.options.get("normalize") is None or call.options.get("moments") is not None]
    return found + [tile for tile in native.usable(*size) if takes and tile.stages in NATIVE_STAGES]


def microseconds(work: Work, tiles: Mapping[Size, Tile], expected: Mapping[str, Tensor]) -> float:
    """The fastest of some replays with these tiles.

    Raises:
        ValueError: the outputs are not as expected.
    """
    with trial(tiles):
        check(work(), expected)
        timer = Timer([work] * GRAPH_CALLS, torch.device("cuda"))
    return min(timer.take() for _ in range(ROUNDS))


def check(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises a ValueError where an output is further from the expected one than another order of additions explains."""
    for name, value in expected.items():
        distance = float((outputs[name].double() - value.double()).norm() / value.double().norm())
        if not distance <= LARGEST_DISTANCE:
            raise ValueError(f"{name} is off by {distance:.2e} of its norm")


def settle(
    work: Work,
    expected: Mapping[str, Tensor],
    calls: Mapping[Size, Sequence[Call]],
    tiles: dict[Size, Tile],
    best: float,
    say: Callable[[str], None],
    until: float = math.inf,
) -> list[Trial]:
    """Goes once through the layers until then; `tiles` gets what is faster than `best` microseconds."""
    trials: list[Trial] = []
    work_of = Counter({size: size.rows * size.features * size.width * len(made) for size, made in calls.items()})
    for size, _ in work_of.most_common():
        for tile in candidates(size, calls[size]):
            if tile == chosen(size) or time.monotonic() > until:
                continue
            try:
                taken = microseconds(work, {**tiles, size: tile}, expected)
            except Exception as problem:  # out of shared memory, say, or wrong: the others go on
                say(f"  {tuple(size)} {name(tile)}: {type(problem).__name__} {str(problem).splitlines()[:1]}")
                continue
            better = taken < best * (1 - GAIN)
            say(f"  {tuple(size)} {name(tile):34} {taken:8.2f} us{'  <' if better else ''}")
            trials.append((*size, name(tile), round(taken, 2), better))
            if better:
                tiles[size], best = tile, taken
    return trials


def name(tile: Tile) -> str:
    """Of a tile, short."""
    kind = "native " if isinstance(tile, NativeLinearConfig) else ""
    return kind + "x".join(str(int(value)) for value in tile)


def entries(tiles: Mapping[Size, Tile]) -> str:
    """What belongs into the two tables."""
    return "\n".join(f"    {tuple(size)}: {tile!r}," for size, tile in sorted(tiles.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trials, then the entries."""
    made = argparse.ArgumentParser(
        "python -m bench.fused.place", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="fastmetro-l")
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--least-width", type=int, default=512, help="layers of fewer input features are left alone")
    made.add_argument(
        "--seconds", type=float, default=math.inf, help="for trials; layers with the most work come first"
    )
    made.add_argument("--json", type=Path, help="what was found, with device, versions, command and commit")
    options = made.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench.fused.place measures GPU kernels, and no CUDA device is visible")
    device = torch.device("cuda")
    model, _ = build_model(FpsSettings(model=options.model, backbone="resnet50"))
    work = cast("Work", fastmetro.compile(model.to(device), options.batch, torch.float16).parts()[WHOLE])
    calls = {size: of_size for size, of_size in recorded(work).items() if size.width >= options.least_width}
    for size, of_size in calls.items():
        print(f"{tuple(size)}: {len(of_size)} calls, {name(chosen(size))}, {len(candidates(size, of_size))} tiles")
    jobs = [
        lambda call=call, tile=tile: call.op(*call.arguments, **call.options, config=tile)
        for size, of_size in calls.items()
        for call in of_size[:1]
        for tile in candidates(size, of_size)
        if isinstance(tile, LinearConfig)
    ]
    number, seconds = common.precompile(jobs, device)
    print(f"{number} tiles compiled in {seconds:.1f} s", flush=True)
    tiles: dict[Size, Tile] = {}
    expected = {name: value.clone() for name, value in work().items()}
    first = microseconds(work, tiles, expected)
    until = time.monotonic() + options.seconds
    trials = settle(work, expected, calls, tiles, first, lambda text: print(text, flush=True), until)
    best = min([first, *(taken for *_, taken, better in trials if better)])
    print(f"{options.model}, {options.batch} images: {first:.2f} us before, {best:.2f} after\n{entries(tiles)}")
    if options.json is not None:
        record = common.environment(device) | common.versions() | {"command": common.command_line()}
        lines = ",\n".join(json.dumps(trial) for trial in trials)
        head = json.dumps(
            record | {"model": options.model, "batch": options.batch, "before_us": round(first, 2)}, indent=1
        )
        options.json.write_text(f'{head[:-2]},\n "trials": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
