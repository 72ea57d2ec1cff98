"""All that `compat` of a training is of gets it: network, losses, data sets and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_setup import data_set, model_file

from fastmetro.compat import Compat
from fastmetro.distributed import World
from fastmetro.evaluation.samples import SampleErrors
from fastmetro.evaluation.tsv import Evaluation
from fastmetro.models import FastMETRO
from fastmetro.training.config import DataConfig, TrainConfig
from fastmetro.training.setup import Setup
from fastmetro.training.sources import TsvBatches

FIRST = torch.tensor([True, False])


@pytest.fixture(params=[None, "published"])
def setup(request: pytest.FixtureRequest, shared: Path, tmp_path: Path) -> Setup:
    """A run with a network, a loss and a data set of every kind."""
    compat: Compat | None = request.param
    files = tuple(data_set(tmp_path / name, "body") for name in ("one", "two"))
    data = DataConfig(
        files, body_model=Path(model_file("smpl", tmp_path)), mesh_data=shared / "data" / "fastmetro", workers=0,
        eval_file=files[0], protocol="3dpw",
    )  # fmt: skip
    config = TrainConfig(
        mesh="smpl", stage="smpl", batch_size=2, image_size=32, eval_count=4, device="cpu", compat=compat, data=data
    )
    return Setup(config, World(), torch.device("cpu"))


def test_the_setting_reaches_what_is_trained(setup: Setup) -> None:
    compat = setup.config.compat
    assert setup.objective.stage is not None and isinstance(setup.source, TsvBatches)
    assert (setup.objective.meshes.compat, setup.objective.stage.compat) == (compat, compat)
    assert [part.compat for part in setup.source._sets] == [compat, compat]
    assert isinstance(setup.model, FastMETRO)
    assert setup.model.config.smpl_compat == setup.model.smpl_parameter_regressor.compat == (compat == "published")


def test_the_setting_reaches_what_is_measured(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """PA-MPJPE over all of a batch, as published, or over the sample with joints."""
    seen: list[dict[str, Any]] = []

    def evaluated(*arguments: Any, **options: Any) -> Evaluation:
        assert arguments[2] is setup.exact_truth
        seen.append(options)
        errors = torch.tensor([10.0, 30.0], dtype=torch.float64)
        return Evaluation(SampleErrors(torch.arange(2), errors, errors, errors, errors, FIRST, FIRST))

    monkeypatch.setattr("fastmetro.evaluation.tsv.evaluate_tsv", evaluated)
    published, measure = setup.config.compat == "published", setup.evaluation()
    assert measure is not None
    found, report = measure(setup.model), setup.report(setup.model)
    assert [options["compat"] for options in seen] == [published] * 3
    assert [(options["size"], options["count"]) for options in seen] == [(32, 4)] * 3
    assert found["pa_mpjpe"] == report["pa_mpjpe"] == (20.0 if published else 10.0)
