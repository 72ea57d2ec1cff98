"""What must be shown on an H200, and the table that compares it with the rows of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.attention.cases import Shape
from bench.attention.report import BASELINES, PASSES, Row


@dataclass(frozen=True)
class Target:
    """A ratio (or a share of the floor) that the contender "auto" must reach."""

    shape: Shape
    mode: str
    column: str
    least: float

    def __str__(self) -> str:
        return f"{self.shape} {self.mode}, vs {BASELINES[self.column].label}"


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured; None where it was not.

    Attributes:
        most: The ratio that a kernel would reach which takes no longer than the memory floor; None where that bounds
            nothing (tensors may stay in L2) or is not known.
    """

    target: Target
    measured: float | None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached."""
        return None if self.measured is None else self.measured >= self.target.least

    @property
    def below_floor(self) -> bool:
        """Whether no kernel can reach the target that reads and writes every tensor once."""
        return self.most is not None and self.most < self.target.least


_RATIOS = {  # vertices, dim, batch: forward vs SDPA + mask, vs Flex; forward + backward vs SDPA + mask, vs Flex
    Shape(431, 64, 1): (6, 15, 3.8, 8),
    Shape(431, 64, 32): (5, 22, 3.2, 10),
    Shape(431, 16, 32): (10, 12, 7, 10),
    Shape(1723, 64, 32): (14, 28, 10, 13),
    Shape(6890, 64, 32): (32, 11, 33, 6.5),
    Shape(6890, 16, 32): (75, 8, 82, 8),
}
# The figures against FlexAttention were set from its default block mask; the same is asked against the best one.
_COLUMNS = {"sdpa_ratio": 0, "flex_ratio": 1, "flex_default_ratio": 1}
_PLACES = tuple((mode, column) for mode in PASSES for column in _COLUMNS)
MUST_SHOW = tuple(_RATIOS)
TARGETS = (
    *(
        Target(shape, mode, column, figures[2 * PASSES.index(mode) + _COLUMNS[column]])
        for shape, figures in _RATIOS.items()
        for mode, column in _PLACES
    ),
    Target(Shape(431, 64, 32), PASSES[0], "dense_ratio", 1.0),
    Target(Shape(6890, 64, 32), PASSES[0], "floor_share", 0.55),
)
AIMS = (
    Target(Shape(431, 64, 32), PASSES[0], "sdpa_ratio", 6.0),
    Target(Shape(431, 64, 32), PASSES[1], "sdpa_ratio", 4.0),
)
"""Beyond the targets."""


def evaluate(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """The targets against the rows of "auto" in float16 with 14 hubs and 8 heads.

    A ratio counts only where it comes from CUDA graphs.
    """
    stages: dict[tuple[Shape, str], list[Row]] = {}
    for row in rows:
        if (row["dtype"], row["hubs"], row["heads"]) == ("float16", "14", "8") and _timed_in_graphs(row):
            stages.setdefault((_shape(row), row["mode"]), []).append(row)
    verdicts = []
    for target in targets:
        stage = stages.get((target.shape, target.mode), [])
        value = next((row[target.column] for row in stage if row["contender"] == "auto"), "")
        verdicts.append(Verdict(target, float(value) if value else None, _most(stage, target.column)))
    return verdicts


def _timed_in_graphs(row: Row) -> bool:
    return row["status"] == "ok" and row["counted"] != "wall"


def _shape(row: Row) -> Shape:
    return Shape(int(row["vertices"]), int(row["dim"]), int(row["batch"]))


def _counted_ms(row: Row) -> float | None:
    value = row[f"{row['counted']}_ms"]
    return float(value) if value else None


def _most(stage: Sequence[Row], column: str) -> float | None:
    """The fastest time of the baseline over the floor, where the counted times are those with cold L2."""
    if column not in BASELINES:
        return None
    ratios = [
        time / float(row["floor_ms"])
        for row in stage
        if BASELINES[column].includes(row["contender"], row["variant"])
        and row["counted"] == "cold"
        and row["floor_ms"]
        and (time := _counted_ms(row))
    ]
    return min(ratios, default=None)


def must_show_table(rows: Sequence[Row]) -> str:
    """Targets, what was measured, and whether that is enough, as text; empty where nothing of it was measured."""
    verdicts = evaluate(rows)
    if all(verdict.measured is None for verdict in verdicts):
        return ""
    layout = "  {:<22}" + " {:>23}" * len(_PLACES)
    passes = ("fwd", "fwd+bwd")
    heads = (f"{passes[PASSES.index(mode)]} vs {BASELINES[column].label}" for mode, column in _PLACES)
    lines = ["Must show on an H200: times faster (target), of CUDA-graph times", layout.format("case", *heads)]
    for shape in MUST_SHOW:
        cells = {(v.target.mode, v.target.column): _cell(v) for v in verdicts if v.target.shape == shape}
        name = f"{shape.vertices}, d {shape.dim}, batch {shape.batch}"
        lines.append(layout.format(name, *(cells[place] for place in _PLACES)))
    for verdict in verdicts:
        target = verdict.target
        if target.column == "floor_share":
            share = "-" if verdict.measured is None else f"{verdict.measured:.2f} ({target.least:g}) {_yes(verdict)}"
            lines.append(f"  {target.shape} {target.mode}, share of the copy bandwidth: {share}")
        elif (target.mode, target.column) not in _PLACES:
            lines.append(f"  {target}: {_cell(verdict)}")
    lines += [f"  aim, {verdict.target}: {_cell(verdict)}" for verdict in evaluate(rows, AIMS)]
    return "\n".join([*lines, *boolean_lines(rows), *floor_lines(verdicts), _counts(verdicts)])


def floor_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """The targets that lie below the memory floor, and what a kernel would reach there."""
    found = [
        f"    {verdict.target}: {verdict.target.least:g}x asked, {verdict.most:.1f}x at the floor"
        for verdict in verdicts
        if verdict.below_floor
    ]
    title = "  below the memory floor, so out of reach of kernels that read every input and write every output once:"
    return [title, *found] if found else []


def _counts(verdicts: Sequence[Verdict]) -> str:
    missed = [verdict for verdict in verdicts if verdict.met is False]
    unknown = sum(verdict.met is None for verdict in verdicts)
    met = len(verdicts) - len(missed) - unknown
    below = sum(verdict.below_floor for verdict in missed)
    why = f" ({below} below the memory floor)" if below else ""
    return f"  {met} of {len(verdicts)} met, {len(missed)} missed{why}, {unknown} not measured"


def boolean_lines(rows: Sequence[Row]) -> list[str]:
    """Times faster than SDPA with the boolean mask alone, case by case.

    "SDPA + mask" is the faster of the boolean and the additive mask. The figures from which the targets were set are
    those of the boolean one; the additive one, made in advance in the dtype of q, saves up to half.
    """
    times = {
        (_shape(row), row["mode"], row["contender"]): time
        for row in rows
        if row["contender"] in ("auto", "sdpa_bool") and _timed_in_graphs(row) and (time := _counted_ms(row))
    }
    lines = []
    for target in TARGETS:
        ours, theirs = (times.get((target.shape, target.mode, name)) for name in ("auto", "sdpa_bool"))
        if target.column == "sdpa_ratio" and ours and theirs:
            cell = _cell(Verdict(target, theirs / ours))
            lines.append(f"  {target.shape} {target.mode}, vs SDPA + boolean mask: {cell}")
    return lines


def _yes(verdict: Verdict) -> str:
    return "yes" if verdict.met else "NO"


def _cell(verdict: Verdict) -> str:
    target = f"({verdict.target.least:g}x)"
    return f"- {target}" if verdict.measured is None else f"{verdict.measured:.2f}x {target} {_yes(verdict)}"
