"""What an evaluation on a TSV data set refuses, by name, and what it takes of a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_tsv_evaluation import CPU, data_set, made_up_mesh, predict

from fastmetro.cli import main
from fastmetro.data.ground_truth import GroundTruth
from fastmetro.evaluation import command
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


@pytest.mark.parametrize(
    ("mesh", "protocol", "kinds"),
    [
        ("smpl", "freihand", ("hand", "body")),
        ("smpl", "hand", ("hand", "body")),
        ("mano", "3dpw", ("body", "hand")),
        ("mano", None, ("body", "hand")),
    ],
)
def test_a_protocol_of_the_other_part_is_named(
    mesh: str, protocol: str | None, kinds: tuple[str, str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Not that a body model is missing."""
    network = torch.nn.Identity()
    network.mesh = made_up_mesh(mesh)
    monkeypatch.setattr(command, "load_network", lambda settings: network)
    source = data_set(tmp_path / "data", kinds[1], count=1)
    arguments = ["eval", "--device", "cpu", "--data", str(source.path), "--csv", str(tmp_path / "eval.csv")]
    assert main([*arguments, *([] if protocol is None else ["--protocol", protocol])]) == 1
    accepted = {"body": "'h36m-p2', '3dpw'", "hand": "'freihand', 'hand'"}[kinds[1]]
    message = f"protocol {protocol or 'h36m-p2'!r} is for a {kinds[0]}, mesh {mesh!r} is a {kinds[1]}"
    said = " ".join(capsys.readouterr().err.split())
    assert f"{message}: protocol must be one of {accepted}" in said and "model" not in said
