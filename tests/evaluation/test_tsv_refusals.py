"""What an evaluation on a TSV data set refuses, by name, and what it takes of a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_tsv_evaluation import CPU, data_set, made_up_mesh, predict

from fastmetro.data.ground_truth import GroundTruth
from fastmetro.evaluation.protocols import PROTOCOLS
from fastmetro.evaluation.tsv import evaluate_tsv


@pytest.mark.parametrize(
    ("name", "value", "least"), [("count", 0, 1), ("count", -1, 1), ("batch_size", 0, 1), ("batch_size", -1, 1),
                                 ("workers", -1, 0)],
)  # fmt: skip
def test_numbers_that_are_too_small_are_named(tmp_path: Path, name: str, value: int, least: int) -> None:
    source, mesh = data_set(tmp_path / "data", count=2), made_up_mesh("smpl")
    truth = GroundTruth(mesh, joints_only=True)
    with pytest.raises(ValueError, match=f"^{name} must be at least {least}, got {value}$"):
        evaluate_tsv(predict, source, truth, mesh, PROTOCOLS["3dpw"], CPU, size=32, **{name: value})


def with_nan(images: torch.Tensor) -> torch.Tensor:
    """A network that fails for the last image of a batch."""
    vertices = predict(images)
    vertices[-1, 5, 1] = torch.nan
    return vertices


def test_predictions_that_cannot_be_measured_are_named(tmp_path: Path) -> None:
    source, mesh = data_set(tmp_path / "data", count=3), made_up_mesh("smpl")
    truth = GroundTruth(mesh, joints_only=True)

    def evaluate(network) -> None:
        evaluate_tsv(network, source, truth, mesh, PROTOCOLS["3dpw"], CPU, size=32)

    with pytest.raises(ValueError, match=r"train\.yaml must be finite, .* 1 of 3 images of a batch: row 2 \('im2'\)$"):
        evaluate(with_nan)
    with pytest.raises(ValueError, match=r"shape \[3, 6890, 3\] \(images, .*\), got \[3, 778, 3\]"):
        evaluate(lambda images: predict(images)[:, :778])
    with pytest.raises(TypeError, match=r"'pred_3d_vertices_fine', got a mapping of \['pred_cam'\]"):
        evaluate(lambda images: {"pred_cam": images})
    with pytest.raises(TypeError, match="'pred_3d_vertices_fine', got a tuple"):
        evaluate(lambda images: (predict(images),))


def test_outputs_of_a_network_are_taken_as_they_are(tmp_path: Path) -> None:
    """A network or an engine gives a mapping."""
    source, mesh = data_set(tmp_path / "data", count=3), made_up_mesh("smpl")
    truth = GroundTruth(mesh, joints_only=True)
    errors = [
        evaluate_tsv(network, source, truth, mesh, PROTOCOLS["3dpw"], CPU, size=32).errors.mpjpe
        for network in (predict, lambda images: {"pred_cam": images, "pred_3d_vertices_fine": predict(images)})
    ]
    assert torch.equal(*errors)
