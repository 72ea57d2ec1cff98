"""The table of tiles: every usable tile of every layer timed a little, the best three and the library more; then those
that are nearly as fast take turns in whole trunks (`place.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench import common
from bench.convolution import place
from bench.convolution.layers import Used, used_pairs
from bench.convolution.measure import GRAPH_CALLS, Case, Timer, take_in_turn
from fastmetro_kernels.convolution import ConvolutionConfig, pair_configs, table
from fastmetro_kernels.convolution.configs import usable
from fastmetro_kernels.convolution.table import Entry, Layer
from fastmetro_kernels.tuning import command
from fastmetro_kernels.tuning.choice import family_of

FEW_CALLS, FEW_ROUNDS = 8, 3
MANY_ROUNDS = 15
FINALISTS = 3
MARGIN = 1.02
"""The library is taken where the kernel's best tile takes more than so many times as long."""
NEAR, MOST_RIVALS = 1.15, 6
"""What takes at most so many times as long as the best gets its turn in the trunk, and how many tiles do."""
ERROR_FACTOR = 2
"""Results of the kernel may be off by so many times what the library's are."""

Say = Callable[[str], None]
Rivals = tuple[place.Tile, ...]


Uses = Mapping[str, Counter[Used]]
"""By trunk: its layers, and how often it runs each."""


def tune(uses: Uses, side: int, dtype: torch.dtype, device: torch.device, path: Path, say: Say = print) -> None:
    """Measures all layers and writes each to the file when it is done; what the file held of others stays.

    Raises:
        TuningFileError: the file is there and is no table of convolutions.
        RuntimeError: no tile of a layer gives the right result.
    """
    family = family_of(device)
    assert family is not None  # the command looked
    kept = table.read_file(path) if path.exists() else {}
    groups: dict[Layer, list[Used]] = {}
    for used in dict.fromkeys(used for counts in uses.values() for used in counts):
        groups.setdefault(used.layer, []).append(used)
    record = command.record(device) | {"command": common.command_line()[:1000]}
    found: dict[Layer, tuple[Entry, Rivals]] = {}
    for layer, group in groups.items():
        found[layer] = measure_layer(layer, [Case(used, dtype, device) for used in group])
        entry = found[layer][0]
        say(_line(entry))
        kept = table.merged(kept, family, record, [entry])
        table.write_file(path, kept)
    for trunk, counts in uses.items():
        for images in sorted({used.layer.images for used in counts}):
            entries = settle_trunk(trunk, images, counts, side, dtype, device, found, say)
            kept = table.merged(kept, family, record, entries)
            table.write_file(path, kept)


def settle_trunk(
    trunk: str,
    images: int,
    counts: Counter[Used],
    side: int,
    dtype: torch.dtype,
    device: torch.device,
    found: dict[Layer, tuple[Entry, Rivals]],
    say: Say,
) -> list[Entry]:
    """Entries of a trunk with the tiles that are best in it; `found` has them, too, for the trunks that follow."""
    times: Counter[Layer] = Counter()
    for used, count in counts.items():
        if used.layer.images == images:
            times[used.layer] += count * found[used.layer][0].native_us
    order = [layer for layer, _ in times.most_common()]
    pairs = [layer for layer in used_pairs(trunk, images, side) if layer not in found]
    chosen = {layer: found[layer][0].config for layer in order} | dict.fromkeys(pairs)
    rivals: dict[Layer, Rivals] = {one: tuple(pair_configs(one.shape.chunks, one.following)) for one in pairs}
    rivals |= {layer: found[layer][1] for layer in order if found[layer][1]}
    settled = place.settle(trunk, images, side, dtype, device, chosen, rivals, say)
    for layer in order:
        # What one trunk has settled stays for those that follow.
        tile = settled[layer].tile if layer in settled else found[layer][0].config
        found[layer] = replace(found[layer][0], config=tile), ()
    for layer in pairs:
        one = settled[layer]
        found[layer] = Entry(layer, one.tile, round(one.best_us, 3), round(one.before_us, 3)), ()
    return [found[layer][0] for layer in (*order, *pairs)]


def measure_layer(layer: Layer, cases: Sequence[Case]) -> tuple[Entry, Rivals]:
    """The best tile of a layer by the sum over the ways in which it is used, or the library; and what is near it."""
    limits = [ERROR_FACTOR * case.error(case.library(case.sets[0])) for case in cases]
    quick: list[tuple[float, ConvolutionConfig]] = []
    for config in usable(layer.shape, layer.scale):
        if all(_right(case, config, limit) for case, limit in zip(cases, limits, strict=True)):
            timers = [_ours(case, config, FEW_CALLS) for case in cases]
            take_in_turn(timers, FEW_ROUNDS)
            quick.append((sum(min(timer.samples) for timer in timers), config))
    if not quick:
        raise RuntimeError(f"{layer}: no tile gives the right result")
    quick.sort()
    finalists = [config for _, config in quick[:FINALISTS]]
    library = [Timer(case.calls(case.library), case.device) for case in cases]
    ours = [[_ours(case, config) for case in cases] for config in finalists]
    take_in_turn([*library, *(timer for timers in ours for timer in timers)], MANY_ROUNDS)
    library_us = _mean(library)
    native_us, best = min((_mean(timers), config) for timers, config in zip(ours, finalists, strict=True))
    chosen = best if native_us <= MARGIN * library_us else None
    rivals: list[place.Tile] = [config for taken, config in quick if taken <= NEAR * quick[0][0]]
    rivals = rivals[:MOST_RIVALS] if native_us <= NEAR * library_us else []
    if library_us <= NEAR * native_us:
        rivals.append(None)
    return Entry(layer, chosen, round(native_us, 3), round(library_us, 3)), tuple(rivals)


def _right(case: Case, config: ConvolutionConfig, limit: float) -> bool:
    return case.error(case.ours(case.sets[0], config)) <= limit


def _ours(case: Case, config: ConvolutionConfig, calls: int = GRAPH_CALLS) -> Timer:
    return Timer(case.calls(lambda inputs: case.ours(inputs, config), calls), case.device)


def _mean(timers: Sequence[Timer]) -> float:
    return sum(timer.median for timer in timers) / len(timers)


def _line(entry: Entry) -> str:
    chosen = "library" if entry.config is None else f"native {tuple(entry.config)}"
    return f"  {entry.layer!s:58} library {entry.library_us:8.2f}  native {entry.native_us:8.2f}  {chosen}"
