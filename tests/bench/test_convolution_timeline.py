"""What blocks note of themselves, summed up and drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.convolution import timeline


def test_timeline(tmp_path: Path) -> None:
    """Two kernels of two blocks; the second runs on one multiprocessor of the first."""
    first = np.array([[0, 100, 1000, 1100, 2000, 2500, 3000, 7], [0, 100, 1000, 1300, 2200, 2700, 3500, 8]])
    second = np.array([[500, 600, 4000, 4100, 5000, 5000, 5100, 8], [0, 0, 9000, 9100, 9500, 9500, 9600, 3]])
    one, two = timeline.summarize([timeline.Noted("a", first, 2), timeline.Noted("b", second)], 1000.0)
    assert one.blocks == 2 and one.early == 1.0 and one.longest == 2.5 and one.next == 0.5
    assert one.steps == pytest.approx({"asks": 0.2, "fetches and multiplies": 0.9, "exchanges": 0.5, "stores": 0.65})
    assert two.next is None and (one.multiprocessors, one.most) == (2, 1)
    assert (one.between, two.between) == (2, 0)
    (crowded,) = timeline.summarize([timeline.Noted("c", np.array([*first, first[0]]))], 1000.0)
    assert (crowded.blocks, crowded.multiprocessors, crowded.most) == (3, 2, 2)
    timeline.draw([one, two], tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 1000
