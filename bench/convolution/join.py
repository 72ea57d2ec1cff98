"""`python -m bench convolution --only join`: the ends of stages' first blocks, which are two added 1 x 1 convolutions.

For each such layer the library's two convolutions, the native kernel with the tile that is chosen for it, and the
kernel with large tiles (`convolution_join`) with every tile that is worth it, compiled first in parallel threads. The
last lines are entries of `MEASURED` in `fastmetro_kernels/convolution/join_configs.py`: the fastest tile, where it is
faster than both others.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import common
from bench.convolution import report
from bench.convolution.layers import Used
from bench.convolution.measure import Case, Inputs, Timer, make_inputs, take_in_turn
from bench.convolution.tune import ERROR_FACTOR
from fastmetro_kernels import convolution as kernels
from fastmetro_kernels.convolution import JoinConfig, choice
from fastmetro_kernels.convolution.configs import pinned
from fastmetro_kernels.convolution.join_configs import tiles

LIBRARY, NATIVE = "library", "native"
LAYOUT = "{:48} {:>7} {:>8} {:>8} {:>8} {:>6}  {:20} {:>8} {:>8}"
HEADER = LAYOUT.format(
    "images of height x width, channels", "floor", LIBRARY, NATIVE, "join", "ratio", "fastest tile", "error", LIBRARY
)

Contender = str | JoinConfig
"""The library, the native kernel, or a tile of the kernel with large ones."""


@dataclass(frozen=True)
class Joined:
    """A layer: microseconds and errors by contender, and why some tiles have no times.

    Attributes:
        floor_us: None on a CPU.
    """

    used: Used
    times: Mapping[Contender, float]
    errors: Mapping[Contender, float]
    notes: Mapping[JoinConfig, str]
    floor_us: float | None

    @property
    def best(self) -> JoinConfig | None:
        """The fastest tile; None where none ran."""
        found = [tile for tile in self.times if isinstance(tile, JoinConfig)]
        return min(found, key=self.times.__getitem__, default=None)


def join_layers(uses: Mapping[str, Counter[Used]]) -> list[Used]:
    """The distinct layers of the trunks that are two added 1 x 1 convolutions."""
    every = dict.fromkeys(used for counts in uses.values() for used in counts)
    return [one for one in every if one.layer.second and (one.layer.down, one.layer.across) == (1, 1)]


def run(
    uses: Mapping[str, Counter[Used]], dtype: torch.dtype, device: torch.device, rounds: int
) -> tuple[list[Joined], list[report.Row]]:
    """Measures and prints; what was found, and the rows of the CSV."""
    layers = join_layers(uses)
    bandwidth = common.copy_bandwidth(device) if device.type == "cuda" else None
    if device.type == "cuda":
        calls, seconds = precompile(layers, dtype, device)
        print(f"{calls} calls compiled in {seconds:.1f} s")
    print(HEADER)
    found = []
    for used in layers:
        found.append(measure(Case(used, dtype, device), rounds, bandwidth))
        print(line(found[-1]), flush=True)
    if device.type == "cuda":
        print(f"MEASURED in fastmetro_kernels/convolution/join_configs.py\n{table_entries(found)}")
    return found, rows(found, uses, dtype)


def _join(inputs: Inputs, tile: JoinConfig) -> Tensor:
    """The kernel with this tile; on a CPU the op's reference."""
    laid_out = inputs.weights.laid_out(inputs.projection)
    assert laid_out is not None and inputs.second is not None  # only such layers are recorded
    backend = "triton" if inputs.x.is_cuda else "reference"
    return kernels.convolution_join(inputs.x, laid_out, inputs.second, config=tile, backend=backend)


def _tiles(used: Used) -> tuple[JoinConfig, ...]:
    return tiles(used.layer.channels, used.layer.second, used.layer.outputs)


def precompile(layers: Sequence[Used], dtype: torch.dtype, device: torch.device) -> tuple[int, float]:
    """Runs every tile once on one image in parallel threads; calls and seconds. What fails here fails again later."""
    jobs: list[Callable[[], Tensor]] = []
    for used in dict.fromkeys(used._replace(layer=used.layer._replace(images=1)) for used in layers):
        inputs = make_inputs(used, dtype, device, 0)
        jobs += [functools.partial(_join, inputs, tile) for tile in _tiles(used)]
    return common.precompile(jobs, device)


def measure(case: Case, rounds: int, bandwidth: float | None) -> Joined:
    """Check the contenders, then time those that are right in turn; on a CPU one tile."""
    layer, cuda = case.used.layer, case.device.type == "cuda"
    native = (choice.choose(case.device, layer) if cuda else None) or pinned(layer.shape, layer.scale)
    runs: dict[Contender, Callable[[Inputs], Tensor]] = {
        LIBRARY: case.library, NATIVE: lambda inputs: case.ours(inputs, native)
    }  # fmt: skip
    errors: dict[Contender, float] = {name: case.error(one(case.sets[0])) for name, one in runs.items()}
    notes = {}
    for tile in _tiles(case.used)[: None if cuda else 1]:
        try:
            errors[tile] = _error(case, tile)
        except Exception as problem:  # out of shared memory, say: a note, and the others go on
            notes[tile] = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
            continue
        if errors[tile] <= (limit := ERROR_FACTOR * errors[LIBRARY]):
            runs[tile] = lambda inputs, tile=tile: _join(inputs, tile)
        else:
            notes[tile] = f"error {errors[tile]:.2e}, {limit:.2e} allowed"
    timers = {name: Timer(case.calls(one), case.device) for name, one in runs.items()}
    take_in_turn(list(timers.values()), rounds)
    times = {name: timer.median for name, timer in timers.items()}
    floor = 1e6 * case.used.floor(case.dtype.itemsize, bandwidth) if bandwidth else None
    return Joined(case.used, times, errors, notes, floor)


def _error(case: Case, tile: JoinConfig) -> float:
    """As of the case, and NaN where any number is: fresh memory is NaN, which else may hold another's result."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        got = _join(case.sets[0], tile)
    finally:
        torch.use_deterministic_algorithms(previous)
    return case.error(got) if bool(got.isfinite().all()) else float("nan")


def is_wrong(one: Joined) -> bool:
    """Whether a tile or the native kernel gave a wrong result; one that cannot run gave none."""
    return not all(error <= ERROR_FACTOR * one.errors[LIBRARY] for error in one.errors.values())


def line(one: Joined) -> str:
    """One line of the table, and below it why tiles have no times."""
    best, others = one.best, min(one.times[LIBRARY], one.times[NATIVE])
    numbers = (one.floor_us, one.times[LIBRARY], one.times[NATIVE], one.times[best] if best else None)
    cells = ["-" if value is None else f"{value:.1f}" for value in numbers]
    ends = [f"{others / one.times[best]:.2f}", _name(best), f"{one.errors[best]:.1e}"] if best else ["-"] * 3
    text = LAYOUT.format(str(one.used), *cells, *ends, f"{one.errors[LIBRARY]:.1e}")
    return "\n".join([text, *(f"    {_name(tile)}: {note}" for tile, note in one.notes.items())])


def _name(tile: JoinConfig) -> str:
    return ",".join(map(str, tile))


def table_entries(found: Sequence[Joined]) -> str:
    """Lines of `MEASURED`, and a comment for each layer that the others keep."""
    lines = []
    for one in found:
        layer, best = one.used.layer, one.best
        key = (layer.shape.rows, layer.channels, layer.second, layer.outputs, one.used.place[2])
        others = ", ".join(f"{name} {one.times[name]:.1f}" for name in (LIBRARY, NATIVE))
        if best is not None and one.times[best] < min(one.times[LIBRARY], one.times[NATIVE]):
            lines.append(f"    {key}: JoinConfig{tuple(best)},  # {one.times[best]:.1f} us, {others}")
        else:
            lines.append(f"    # {key}: {'-' if best is None else f'{one.times[best]:.1f}'} us, {others}")
    return "\n".join(lines)


def rows(found: Sequence[Joined], uses: Mapping[str, Counter[Used]], dtype: torch.dtype) -> list[report.Row]:
    """One row per layer and contender; `uses` of each trunk."""
    made = []
    for one in found:
        counts = "; ".join(f"{trunk} {counts[one.used]}" for trunk, counts in uses.items() if one.used in counts)
        for name in (LIBRARY, NATIVE, *_tiles(one.used)):
            if name not in one.errors and name not in one.notes:
                continue
            time_us, error = one.times.get(name), one.errors.get(name)
            row = dict.fromkeys(report.COLUMNS, "") | {"what": str(one.used), "uses": counts}
            row |= {"batch": str(one.used.layer.images), "dtype": str(dtype).removeprefix("torch.")}
            row |= {"us": f"{time_us:.4g}" if time_us else "", "error": "" if error is None else f"{error:.3e}"}
            row["floor_us"] = "" if one.floor_us is None else f"{one.floor_us:.4g}"
            row["library_over_it"] = f"{one.times[LIBRARY] / time_us:.4g}" if time_us else ""
            if isinstance(name, JoinConfig):
                tile = " ".join(f"{key} {value}" for key, value in name._asdict().items())
                row |= {"contender": "join", "tile": tile, "note": one.notes.get(name, "")}
            else:
                row["contender"] = name
            made.append(row)
    return made
