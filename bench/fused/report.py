"""Rows of the CSV, lines of the table, and the entries that the table of tiles should have."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from bench.fused.basis import COMPILED, LATE, LIBRARY, NAMED, OURS, SEPARATE, native_name, tile_name
from bench.fused.cases import Case, Linear
from bench.fused.measure import Entry
from fastmetro_kernels.fused.linear.configs import TILES, LinearConfig, fitted

Row = dict[str, str]
Found = list[tuple[Case, list[Entry]]]
LAYOUT = "{:<44} {:>26} {:>8} {:>8} {:>8} {:>8} {:>7}  {}"
HEADER = LAYOUT.format("microseconds", "M x K x N", "floor", LIBRARY, COMPILED, OURS, "ratio", "fastest tile")


def rows(case: Case, entries: Sequence[Entry], clocks: tuple[str, str], record: Row) -> list[Row]:
    """One row per contender; `library_over_it` is the time of the library over that of the contender."""
    library = _time(entries, LIBRARY)
    found = []
    for entry in entries:
        time = entry.microseconds
        row = {"case": case.name, "shape": case.shape, "batch": str(case.batch)}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "contender": entry.name}
        row |= {"us": f"{time:.4g}" if time else "", "floor_us": f"{1e6 * case.floor():.4g}"}
        row["library_over_it"] = f"{library / time:.3g}" if library and time else ""
        row |= {"error": "" if entry.error is None else f"{entry.error:.2e}", "note": entry.note}
        row |= dict(zip(("sm_mhz", "memory_mhz"), clocks, strict=True))
        found.append(row | record)
    return found


def line(case: Case, entries: Sequence[Entry]) -> str:
    """One line of the table: the times, the library's over ours, and where all tiles ran the fastest of them."""
    library, ours = _time(entries, LIBRARY), _time(entries, OURS)
    cells = [f"{1e6 * case.floor():.2f}"]
    for name in (LIBRARY, COMPILED, OURS):
        time = _time(entries, name)
        cells.append(f"{time:.2f}" if time else "-")
    ratio = f"{library / ours:.2f}" if library and ours else "-"
    tiles = [entry for entry in entries if entry.name not in NAMED and entry.samples]
    best = min(tiles, key=lambda entry: entry.microseconds or 0.0, default=None)
    ends = [f"{best.name} {best.microseconds:.2f}"] if best else []
    ends += [f"{name} {time:.2f}" for name in (LATE, SEPARATE) if (time := _time(entries, name))]
    notes = "; ".join(f"{entry.name}: {entry.note}" for entry in entries if entry.note)
    text = LAYOUT.format(case.name, case.shape, *cells, ratio, "; ".join(ends)).rstrip()
    return f"{text}\n    {notes}" if notes else text


def table_entries(found: Found) -> str:
    """Lines of `MEASURED` in `fused/linear/configs.py`: for each size the tile with the least time over its layers."""
    sums: dict[tuple[int, int, int], dict[int, dict[LinearConfig, float]]] = defaultdict(lambda: defaultdict(dict))
    for (key, most), times in _by_size(found).items():
        whole = [tile for tile in times[0] if all(tile in one for one in times)]
        sums[key][most] = {tile: sum(one[tile] for one in times) for tile in whole}
    lines = []
    for key, by_rows in sorted(sums.items()):
        chosen = [(most, min(tiles, key=tiles.__getitem__)) for most, tiles in sorted(by_rows.items()) if tiles]
        entries = ", ".join(f"({most}, LinearConfig{tuple(tile)})" for most, tile in chosen)
        lines.append(f"    {key}: ({entries},),")
    return "\n".join(lines)


def native_entries(found: Found) -> str:
    """Lines of `MEASURED` in `fused/linear/native.py`: sizes whose layers are fastest with a native tile.

    As comments those that are not; the others' time is that of the fastest for each layer.
    """
    sizes: dict[tuple[int, int, int], list[tuple[Linear, dict[str, float]]]] = defaultdict(list)
    for case, entries in found:
        if isinstance(case, Linear) and case.native_tiles():
            times = {entry.name: time for entry in entries if (time := entry.microseconds) is not None}
            sizes[case.batch * case.tokens, case.features, case.width].append((case, times))
    lines = []
    for size, layers in sorted(sizes.items()):
        names = {native_name(tile): tile for tile in layers[0][0].native_tiles()}
        sums = {tile: sum(times.get(name, math.inf) for _, times in layers) for name, tile in names.items()}
        rivals = [[time for name, time in times.items() if name not in names] for _, times in layers]
        others = sum(min(times, default=math.inf) for times in rivals)
        best = min(sums, key=sums.__getitem__)
        text = f"{size}: NativeLinearConfig{tuple(best)},  # {sums[best]:.2f} us of {len(layers)}, others {others:.2f}"
        lines.append(f"    {'' if sums[best] < others else '# '}{text}")
    return "\n".join(lines)


def _by_size(found: Found) -> dict[tuple[tuple[int, int, int], int], list[dict[LinearConfig, float]]]:
    """((bytes, N, K), rows) -> for each layer of this size the microseconds of its tiles."""
    sizes: dict[tuple[tuple[int, int, int], int], list[dict[LinearConfig, float]]] = defaultdict(list)
    for case, entries in found:
        if not isinstance(case, Linear):
            continue
        by_name = {entry.name: entry.microseconds for entry in entries}
        tiles = dict.fromkeys(fitted(tile, case.width) for tile in TILES[case.dtype.itemsize])
        times = {tile: time for tile in tiles if (time := by_name.get(tile_name(tile))) is not None}
        sizes[(case.dtype.itemsize, case.features, case.width), case.batch * case.tokens].append(times)
    return sizes


def _time(entries: Sequence[Entry], name: str) -> float | None:
    return next((entry.microseconds for entry in entries if entry.name == name), None)
