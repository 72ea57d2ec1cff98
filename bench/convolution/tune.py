"""The table of tiles: every usable tile of every layer timed a little, the best three and the library more."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from bench.convolution.layers import Used
from bench.convolution.measure import GRAPH_CALLS, Case, Timer, take_in_turn
from fastmetro_kernels.convolution import ConvolutionConfig, table
from fastmetro_kernels.convolution.configs import usable
from fastmetro_kernels.convolution.table import Entry, Layer
from fastmetro_kernels.tuning import command
from fastmetro_kernels.tuning.choice import family_of

FEW_CALLS, FEW_ROUNDS = 8, 3
MANY_ROUNDS = 15
FINALISTS = 3
MARGIN = 1.02
"""The library is taken where the kernel's best tile takes more than so many times as long."""
ERROR_FACTOR = 2
"""Results of the kernel may be off by so many times what the library's are."""

Say = Callable[[str], None]


def tune(layers: Iterable[Used], dtype: torch.dtype, device: torch.device, path: Path, say: Say = print) -> None:
    """Measures all layers and writes each to the file when it is done; what the file held of others stays.

    Raises:
        TuningFileError: the file is there and is no table of convolutions.
        RuntimeError: no tile of a layer gives the right result.
    """
    family = family_of(device)
    assert family is not None  # the command looked
    kept = table.read_file(path) if path.exists() else {}
    groups: dict[Layer, list[Used]] = {}
    for used in dict.fromkeys(layers):
        groups.setdefault(used.layer, []).append(used)
    record = command.record(device) | {"command": " ".join(["python -m", *sys.argv])[:1000]}
    for layer, group in groups.items():
        entry = measure_layer(layer, [Case(used, dtype, device) for used in group])
        say(_line(entry))
        kept = table.merged(kept, family, record, [entry])
        table.write_file(path, kept)


def measure_layer(layer: Layer, cases: Sequence[Case]) -> Entry:
    """The best tile of a layer by the sum over the ways in which it is used, or the library."""
    limits = [ERROR_FACTOR * case.error(case.library(case.sets[0])) for case in cases]
    quick: list[tuple[float, ConvolutionConfig]] = []
    for config in usable(layer.shape):
        if all(_right(case, config, limit) for case, limit in zip(cases, limits, strict=True)):
            timers = [_ours(case, config, FEW_CALLS) for case in cases]
            take_in_turn(timers, FEW_ROUNDS)
            quick.append((sum(min(timer.samples) for timer in timers), config))
    if not quick:
        raise RuntimeError(f"{layer}: no tile gives the right result")
    finalists = [config for _, config in sorted(quick)[:FINALISTS]]
    library = [Timer(case.calls(case.library), case.device) for case in cases]
    ours = [[_ours(case, config) for case in cases] for config in finalists]
    take_in_turn([*library, *(timer for timers in ours for timer in timers)], MANY_ROUNDS)
    library_us = _mean(library)
    native_us, best = min((_mean(timers), config) for timers, config in zip(ours, finalists, strict=True))
    chosen = best if native_us <= MARGIN * library_us else None
    return Entry(layer, chosen, round(native_us, 3), round(library_us, 3))


def _right(case: Case, config: ConvolutionConfig, limit: float) -> bool:
    return case.error(case.ours(case.sets[0], config)) <= limit


def _ours(case: Case, config: ConvolutionConfig, calls: int = GRAPH_CALLS) -> Timer:
    return Timer(case.calls(lambda inputs: case.ours(inputs, config), calls), case.device)


def _mean(timers: Sequence[Timer]) -> float:
    return sum(timer.median for timer in timers) / len(timers)


def _line(entry: Entry) -> str:
    chosen = "library" if entry.config is None else f"native {tuple(entry.config)}"
    return f"  {entry.layer!s:58} library {entry.library_us:8.2f}  native {entry.native_us:8.2f}  {chosen}"
