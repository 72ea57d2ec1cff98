"""The rate over a run: each schedule, its warm-up and its drops, alone and as a run takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_interrupted import rows, small

from fastmetro.training.config import TrainConfig
from fastmetro.training.schedule import Schedule, learning_rate_factor

DROPS = (0.5, 0.75)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step"])
def test_all_schedules_rise_linearly(schedule: Schedule) -> None:
    """From nearly nothing, as the first step would else do nothing, to the whole rate."""
    found = [learning_rate_factor(progress, 0.2, schedule, DROPS) for progress in (0.0, 0.05, 0.1, 0.15, 0.2)]
    assert found == pytest.approx([1e-3, 0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_constant_stays(warmup: float) -> None:
    assert [learning_rate_factor(progress, warmup, "constant") for progress in (warmup, 0.3, 0.9, 1.0)] == [1.0] * 4


@pytest.mark.parametrize("drops", [DROPS, DROPS[::-1]])
def test_step_is_a_tenth_from_each_drop_on(drops: tuple[float, ...]) -> None:
    """Also at the very share of the run."""
    shares = (0.0, 0.3, 0.49, 0.5, 0.74, 0.75, 1.0)
    found = [learning_rate_factor(progress, 0.0, "step", drops) for progress in shares]
    assert found == pytest.approx([1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


def test_drops_in_the_warm_up_count_from_its_end() -> None:
    found = [learning_rate_factor(progress, 0.4, "step", (0.2, 0.6)) for progress in (0.2, 0.3, 0.4, 0.6)]
    assert found == pytest.approx([0.5, 0.75, 0.1, 0.01])


@pytest.mark.parametrize(
    ("schedule", "drop_at", "expected"),
    [
        ("constant", (), [0.001, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("step", DROPS, [0.001, 0.5, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", (), [0.001, 0.5, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.03806]),
    ],
)
def test_a_run_follows_its_schedule(
    schedule: Schedule, drop_at: tuple[float, ...], expected: list[float], tmp_path: Path
) -> None:
    """The rates of ten steps, as the log has them."""
    trainer = small(
        tmp_path, steps=10, log_every=1, learning_rate=0.002, schedule=schedule, drop_at=drop_at, warmup=0.2
    )
    assert trainer.run()
    rates = [float(row["learning_rate"]) for row in rows(tmp_path)]
    assert rates == pytest.approx([0.002 * factor for factor in expected], rel=1e-3)


@pytest.mark.parametrize(("schedule", "drop_at"), [("step", ()), ("constant", (0.5,)), ("step", (1.0,))])
def test_drops_go_with_step_alone(schedule: Schedule, drop_at: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="drop_at must be shares between 0 and 1 with schedule 'step' alone"):
        TrainConfig(schedule=schedule, drop_at=drop_at)
