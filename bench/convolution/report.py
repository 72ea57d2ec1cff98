"""One layer measured; rows of the CSV, lines of the table, and sums over trunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.convolution.layers import Used
from bench.convolution.measure import Case, Timer, take_in_turn
from bench.convolution.trunks import Outcome
from bench.convolution.tune import ERROR_FACTOR
from fastmetro_kernels.convolution import ConvolutionConfig, choice
from fastmetro_kernels.convolution.configs import pinned

LIBRARY, PRODUCT, OURS = "library", "cublaslt", "ours"
Row = dict[str, str]
LAYOUT = "{:66} {:>7} {:>8} {:>8} {:>8} {:>6} {:>6}  {:7} {:20} {:>8} {:>8}"
HEADER = LAYOUT.format(
    "images of height x width, channels, kernel / stride", "floor", LIBRARY, PRODUCT, OURS, "ratio", "share", "auto",
    "tile", "error", LIBRARY,
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A layer: microseconds and errors by contender, the chosen tile, and what `auto` takes.

    Attributes:
        floor_us: None on a CPU.
        note: why there is no time of ours.
    """

    used: Used
    config: ConvolutionConfig
    native: bool
    times: Mapping[str, float]
    errors: Mapping[str, float]
    floor_us: float | None
    note: str = ""

    @property
    def auto_us(self) -> float | None:
        """Of what the engine takes."""
        return self.times.get(OURS if self.native else LIBRARY)


def measure(case: Case, rounds: int, bandwidth: float | None) -> Measured:
    """Check the contenders, then time those that are right in turn."""
    layer = case.used.layer
    chosen = choice.choose(case.device, layer) if case.device.type == "cuda" else None
    config = chosen or pinned(layer.shape, layer.scale)
    runs = {LIBRARY: case.library}
    if case.is_product:
        runs[PRODUCT] = case.product
    runs[OURS] = lambda inputs: case.ours(inputs, config)
    errors = {name: case.error(run(case.sets[0])) for name, run in runs.items()}
    note = ""
    if not errors[OURS] <= (limit := ERROR_FACTOR * errors[LIBRARY]):
        note = f"error {errors[OURS]:.2e}, {limit:.2e} allowed"
        del runs[OURS]
    timers = {name: Timer(case.calls(run), case.device) for name, run in runs.items()}
    take_in_turn(list(timers.values()), rounds)
    times = {name: timer.median for name, timer in timers.items()}
    floor = 1e6 * case.used.floor(case.dtype.itemsize, bandwidth) if bandwidth else None
    return Measured(case.used, config, chosen is not None, times, errors, floor, note)


def line(one: Measured) -> str:
    """One line of the table."""
    library, ours = one.times[LIBRARY], one.times.get(OURS)
    cells = [_number(value) for value in (one.floor_us, library, one.times.get(PRODUCT), ours)]
    ratio = f"{library / ours:.2f}" if ours else "-"
    share = f"{one.floor_us / ours:.0%}" if ours and one.floor_us else "-"
    errors = [f"{one.errors[name]:.1e}" for name in (OURS, LIBRARY)]
    tile = ",".join(str(int(value)) for value in one.config)
    text = LAYOUT.format(str(one.used), *cells, ratio, share, "native" if one.native else LIBRARY, tile, *errors)
    return f"{text}\n    {one.note}" if one.note else text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def sums(found: Sequence[Measured], uses: Mapping[str, Counter[Used]]) -> str:
    """Over the layers of each trunk and number of images, as often as they are used."""
    lines = ["sums over the layers of a trunk, each as often as it is used"]
    for trunk, counts in uses.items():
        for images in sorted({used.layer.images for used in counts}):
            mine = [one for one in found if counts[one.used] and one.used.layer.images == images]
            if any(one.note for one in mine):
                lines.append(f"  {trunk:10} {images:4} images  not all are right")
                continue
            totals = [
                sum(counts[one.used] * time for one, time in zip(mine, times, strict=True))
                for times in (
                    [one.times[LIBRARY] for one in mine],
                    [one.times[OURS] for one in mine],
                    [one.auto_us or 0.0 for one in mine],
                )
            ]
            cells = "  ".join(f"{n} {t:9.1f}" for n, t in zip((LIBRARY, OURS, "auto"), totals, strict=True))
            lines.append(f"  {trunk:10} {images:4} images  {cells}  ratio {totals[0] / totals[2]:.2f}")
    return "\n".join(lines)


COLUMNS = (
    "what", "trunk", "batch", "dtype", "uses", "contender", "tile", "auto", "us", "floor_us", "library_over_it",
    "error", "note",
)  # fmt: skip


def layer_rows(found: Iterable[Measured], uses: Mapping[str, Counter[Used]], dtype: torch.dtype) -> list[Row]:
    """One row per layer and contender; `uses` of each trunk."""
    rows = []
    for one in found:
        counts = "; ".join(f"{trunk} {counts[one.used]}" for trunk, counts in uses.items() if one.used in counts)
        for name, error in one.errors.items():
            time = one.times.get(name)
            row = dict.fromkeys(COLUMNS, "") | {"what": str(one.used), "uses": counts, "contender": name}
            row |= {"batch": str(one.used.layer.images), "dtype": str(dtype).removeprefix("torch.")}
            row |= {"us": f"{time:.4g}" if time else "", "error": f"{error:.3e}"}
            row["floor_us"] = "" if one.floor_us is None else f"{one.floor_us:.4g}"
            row["library_over_it"] = f"{one.times[LIBRARY] / time:.4g}" if time else ""
            if name == OURS:
                tile = " ".join(f"{key} {int(value)}" for key, value in one.config._asdict().items())
                row |= {"tile": tile, "auto": "native" if one.native else LIBRARY, "note": one.note}
            rows.append(row)
    return rows


def trunk_rows(outcomes: Iterable[Outcome], dtype: torch.dtype) -> list[Row]:
    """Two rows per trunk and number of images; `auto` decides layer by layer."""
    rows = []
    for one in outcomes:
        for name, time, error in (
            (LIBRARY, one.library_us, one.library_error),
            (OURS, one.ours_us, one.ours_error),
        ):
            row = dict.fromkeys(COLUMNS, "") | {"what": "whole trunk", "trunk": one.trunk, "batch": str(one.images)}
            row |= {"dtype": str(dtype).removeprefix("torch."), "contender": name, "us": f"{time:.5g}"}
            row |= {"library_over_it": f"{one.ratio if name == OURS else 1.0:.4g}", "error": f"{error:.3e}"}
            rows.append(row)
    return rows
