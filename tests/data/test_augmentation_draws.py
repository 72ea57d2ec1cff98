"""What is drawn for a sample: pure functions of its number, with the published distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fastmetro.data.augmentation import Draw, draw_samples

COUNT = 20000


def test_a_draw_depends_on_seed_and_number_alone() -> None:
    whole = draw_samples(7, range(50), "body")
    assert draw_samples(7, [49, 3, 3], "body") == [whole[49], whole[3], whole[3]]
    assert draw_samples(7, [], "body") == []
    assert len({draw.noise for draw in whole}) == 50
    assert draw_samples(8, range(50), "body") != whole
    assert draw_samples(7, [2**40], "body") != draw_samples(7, [0], "body")


@pytest.mark.parametrize(("kind", "deviation"), [("body", 30.0), ("hand", 90.0)])
def test_distributions(kind, deviation: float) -> None:
    draws = draw_samples(1, range(COUNT), kind)
    flips = sum(draw.flip for draw in draws)
    assert flips == 0 if kind == "hand" else abs(flips / COUNT - 0.5) < 4 * math.sqrt(0.25 / COUNT)
    noise = np.array([draw.noise for draw in draws])
    assert noise.min() >= 0.6 and noise.max() <= 1.4
    for channel in range(3):
        assert stats.kstest(noise[:, channel], stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.03
    scale = np.array([draw.scale for draw in draws])
    assert scale.min() == 0.75 and scale.max() == 1.25
    inner = scale[(scale > 0.75) & (scale < 1.25)]
    assert abs(len(inner) / COUNT - 0.6827) < 0.014
    assert stats.kstest(inner, stats.truncnorm(-1, 1, 1, 0.25).cdf).pvalue > 1e-3
    rotation = np.array([draw.rotation for draw in draws])
    assert abs((rotation == 0).mean() - 0.6) < 0.014
    turned = rotation[rotation != 0]
    assert np.abs(turned).max() == 2 * deviation
    inner = turned[np.abs(turned) < 2 * deviation]
    assert stats.kstest(inner, stats.truncnorm(-2, 2, 0, deviation).cdf).pvalue > 1e-3


def test_a_draw_without_arguments_changes_nothing() -> None:
    assert Draw() == Draw(False, (1.0, 1.0, 1.0), 0.0, 1.0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("rotation", math.nan),
        ("scale", 0.0),
        ("scale", math.inf),
        ("noise", (1.0, -0.1, 1.0)),
        ("noise", (1.0, 1.0)),
    ],
)
def test_impossible_draws_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be"):
        Draw(**{argument: value})


def test_impossible_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="numbers must not be negative, got -1"):
        draw_samples(0, [3, -1], "body")
    with pytest.raises(ValueError, match="seed must satisfy"):
        draw_samples(-1, [0], "body")
