"""The parts of a run, made from its configuration: mesh, network, losses, batches, evaluation, pictures."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fastmetro.data.synthetic.capture import CapturedPeople
from fastmetro.data.synthetic.dataset import SyntheticPeople
from fastmetro.distributed import World
from fastmetro.evaluation.synthetic import SYNTHETIC_COUNT, evaluate_synthetic, format_report
from fastmetro.meshes.mesh import Mesh, load_mesh
from fastmetro.models import FastMETRO, create_model
from fastmetro.models.checkpoints import load_checkpoint, read_state_dict
from fastmetro.training.config import TrainConfig
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.objective import Objective
from fastmetro.training.pictures import batch_picture
from fastmetro.training.sources import Batch, Batches, SyntheticBatches
from fastmetro.training.trainer import METRICS

if TYPE_CHECKING:
    from fastmetro.compat import Compat
    from fastmetro.data.ground_truth import GroundTruth
    from fastmetro.evaluation.tsv import Evaluation, Predict

SYNTHETIC_MESH = "anny-body"
"""Whose people the synthetic images show."""


class Setup:
    """Everything that a run needs.

    Args:
        config: its settings.
        world: its processes.
        device: of this one.

    Attributes:
        config: the settings, with ``steps`` and ``eval_every`` made of what was given in epochs.
        mesh, model, objective, source: see :class:`~fastmetro.training.trainer.Trainer`.

    Raises:
        FileNotFoundError: a file that is named is not there.
        ValueError: the settings do not fit one another.
    """

    def __init__(self, config: TrainConfig, world: World, device: torch.device) -> None:
        self.config, self.world, self.device = config, world, device
        self.mesh = self._load_mesh()
        self.model = self._make_model()
        self.objective = self._make_objective()
        self._check_evaluation()
        self.source: Batches
        if config.data.files:
            self.source, rows = self._tsv_source()
            self.config = in_steps(config, rows)
        else:
            self.source = self._synthetic_source()

    def _check_evaluation(self) -> None:
        """Before hours of training, that what is measured at its end can be."""
        config, data = self.config, self.config.data
        if config.eval_count == 0:
            given = {"data.eval_file": data.eval_file, "eval_every": config.eval_every}
            given["eval_every_epochs"] = config.eval_every_epochs
            if unused := [name for name, value in given.items() if value]:
                self._say(f"eval_count is 0: nothing is measured, and {' and '.join(unused)} without effect")
            return
        if data.eval_file is not None:
            from fastmetro.data.tsv.check import check_kind
            from fastmetro.data.tsv.source import TsvSource
            from fastmetro.evaluation.protocols import find_protocol
            from fastmetro.evaluation.tsv import Measure

            if data.protocol == "freihand":
                raise ValueError(
                    "data.protocol must be another than 'freihand' while training: the labels of FreiHAND's evaluation "
                    "set are dummies; give eval_count 0, and score the weights with `fastmetro eval --truth`. Protocol "
                    "'hand' measures sets with true labels"
                )
            Measure(self.mesh, find_protocol(data.protocol), self.device)
            check_kind(TsvSource(data.eval_file), self._kind, "data.eval_file")
        elif self.mesh.name != SYNTHETIC_MESH:
            raise ValueError(f"mesh {self.mesh.name!r} is evaluated on data.eval_file; give one, or eval_count 0")

    def _say(self, text: str) -> None:
        if self.world.first:
            print(f"fastmetro: {text}", file=sys.stderr)

    def _load_mesh(self) -> Mesh:
        data = self.config.data
        if self.config.mesh not in ("smpl", "mano"):
            for name in ("body_model", "mesh_data"):
                if getattr(data, name) is not None:
                    raise ValueError(f"data.{name} goes with mesh 'smpl' or 'mano', got mesh {self.config.mesh!r}")
            if data.files:
                self._say(
                    f"mesh {self.config.mesh!r} has no parameters of SMPL or MANO: of rows of data.files only joints "
                    "count, not vertices"
                )
            return load_mesh(self.config.mesh)
        return load_mesh(self.config.mesh, data=data.mesh_data, model_file=data.body_model)

    def _make_model(self) -> nn.Module:
        config = self.config
        model: nn.Module = self._network(smpl_head=config.stage == "smpl")
        # A checkpoint that is resumed brings its own weights.
        if config.backbone_weights is not None and not config.resume:
            load_checkpoint(model.get_submodule("backbone"), config.backbone_weights)
        if config.initialise is not None and not config.resume:
            self._initialise(model, config.initialise)
        if config.sync_batch_norm and self.world.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.to(self.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def _network(self, smpl_head: bool) -> FastMETRO:
        config = self.config
        return create_model(
            config.model, config.backbone, self.mesh, config.upsampling, config.attention, smpl_head,
            masking=config.masking, dropout=config.dropout, smpl_compat=config.compat == "published",
        )  # fmt: skip

    def _initialise(self, model: nn.Module, path: Path) -> None:
        """Load weights; the regressor of SMPL parameters may be new, everything else must be there."""
        head = "smpl_parameter_regressor."
        if self.config.stage == "smpl" and not any(name.startswith(head) for name in read_state_dict(path)):
            body = self._network(smpl_head=False)
            load_checkpoint(body, path)
            model.load_state_dict({**model.state_dict(), **body.state_dict()})
        else:
            load_checkpoint(model, path)

    def _make_objective(self) -> Objective:
        config = self.config
        meshes = MeshRecoveryLoss(self.mesh, config.loss, config.compat)
        stage = None
        if config.stage == "smpl":
            from fastmetro.meshes.smpl import SMPL
            from fastmetro.training.losses.smpl_stage import SMPLStageLoss

            assert config.data.body_model is not None
            stage = SMPLStageLoss(SMPL(config.data.body_model), self.mesh, config.smpl_loss, config.compat)
        return Objective(meshes, stage).to(self.device)

    def _people(self) -> SyntheticPeople:
        config = self.config
        mesh = self.mesh if self.mesh.name == SYNTHETIC_MESH else load_mesh(SYNTHETIC_MESH)
        people = SyntheticPeople(mesh, config.seed, config.image_size, config.photographs, config.compile_images)
        return people.to(self.device)

    def _synthetic_source(self) -> Batches:
        config = self.config
        if config.mesh != SYNTHETIC_MESH:
            raise ValueError(f"mesh must be {SYNTHETIC_MESH} to train on synthetic images alone, got {config.mesh!r}")
        people: Any = self._people()
        if config.capture_images:
            people = CapturedPeople(people, config.batch_size // self.world.size)
        return SyntheticBatches(people, config.batch_size, self.device, self.world, config.overfit)

    def _tsv_source(self) -> tuple[Batches, int]:
        """The batches, and how many rows there are."""
        from fastmetro.data.tsv.check import check_kind
        from fastmetro.data.tsv.dataset import TsvDataset
        from fastmetro.data.tsv.source import TsvSource
        from fastmetro.training.sources import TsvBatches, make_sampler

        config, data = self.config, self.config.data
        sets = [
            TsvDataset(
                TsvSource(path), self._kind, seed=config.seed, size=config.image_size, pixels=data.pixels,
                compat=config.compat,
            )
            for path in data.files
        ]  # fmt: skip
        for part in sets:
            check_kind(part.source, self._kind, "data.files")
        if data.synthetic_share and self._kind != "body":
            raise ValueError("data.synthetic_share must be 0 for hands: synthetic images show bodies")
        sampler = make_sampler(
            sets, data.shares, data.synthetic_share, batch_size=config.batch_size, seed=config.seed, world=self.world
        )
        people = self._people() if data.synthetic_share else None
        source = TsvBatches(sets, self.truth, sampler, self.device, data.workers, people)
        return source, sum(len(part) for part in sets)

    @property
    def _kind(self) -> Literal["body", "hand"]:
        return "hand" if self.mesh.part == "hand" else "body"

    @functools.cached_property
    def truth(self) -> GroundTruth:
        """Makes labels of the network's mesh from those of TSV files."""
        return self._ground_truth(self.config.compat).to(self.device)

    @functools.cached_property
    def exact_truth(self) -> GroundTruth:
        """The same in float64, for evaluations, whose joints are as labelled with ``compat``, too."""
        return self._ground_truth(None).double().to(self.device)

    def _ground_truth(self, compat: Compat | None) -> GroundTruth:
        from fastmetro.data.ground_truth import ground_truth

        return ground_truth(self.mesh, self.config.data.body_model, compat=compat)

    def evaluation(self) -> Callable[[nn.Module], dict[str, float]] | None:
        """What measures a network while it is trained, in mm; None where nothing is to be measured."""
        config = self.config
        if config.eval_count == 0:
            return None
        if config.data.eval_file is not None:
            return lambda network: self._errors(self._on_rows(network))
        count = max((config.eval_count or SYNTHETIC_COUNT) // 4, 1)

        def errors(network: nn.Module) -> dict[str, float]:
            report = self._synthetic(network, count, baselines=False)
            return {name: float(str(report[name])) for name in METRICS}

        return errors

    def report(self, network: nn.Module) -> dict[str, object]:
        """All that is measured in the end, errors in mm; the first process prints it."""
        if self.config.data.eval_file is None:
            report = self._synthetic(network, self.config.eval_count or SYNTHETIC_COUNT, baselines=True)
            text = format_report(report)
        else:
            report, text = self._report_of_rows(network, self.config.data.protocol)
        if self.world.first:
            print(text)
        return report

    def _report_of_rows(self, network: nn.Module, protocol: str) -> tuple[dict[str, object], str]:
        """With None for errors that no row has the labels for; JSON has no NaN."""
        evaluation = self._on_rows(network, progress=True)
        errors, count = self._errors(evaluation), len(evaluation.errors.rows)
        report: dict[str, object] = {name: errors.get(name) for name in METRICS}
        report |= {"count": count, "skipped": evaluation.skipped, "protocol": protocol}
        report["data"] = str(self.config.data.eval_file)
        left = sum(evaluation.skipped.values())
        lines = [f"{protocol}: {_text(errors)}; {count} rows" + (f", {left} could not be used" if left else "")]
        stage = self.objective.stage
        if stage is not None:
            from fastmetro.evaluation.tsv import body_of

            body = self._errors(self._on_rows(body_of(network, stage.smpl), progress=True))
            report["smpl_parameters"] = {name: body.get(name) for name in METRICS}
            lines.append(f"{protocol}, SMPL parameters: {_text(body)}")
        return report, "\n".join(lines)

    def _on_rows(self, predict: Predict, progress: bool = False) -> Evaluation:
        """What is measured on the rows of the evaluation's data set."""
        from fastmetro.data.tsv.source import TsvSource
        from fastmetro.evaluation.protocols import find_protocol
        from fastmetro.evaluation.tsv import evaluate_tsv

        config, data = self.config, self.config.data
        assert data.eval_file is not None
        return evaluate_tsv(
            predict, TsvSource(data.eval_file), self.exact_truth, self.mesh, find_protocol(data.protocol), self.device,
            world=self.world, workers=data.workers, size=config.image_size, count=config.eval_count,
            compat=config.compat is not None, progress=progress,
        )  # fmt: skip

    def _errors(self, evaluation: Evaluation) -> dict[str, float]:
        """Means in mm, without those that no row has the labels for."""
        published = self.config.compat is not None
        errors = evaluation.errors.published_means(self.world.size) if published else evaluation.errors.means()
        return {name: errors[name] for name in METRICS if not math.isnan(errors[name])}

    def _synthetic(self, network: nn.Module, count: int, baselines: bool) -> dict[str, object]:
        config = self.config
        return evaluate_synthetic(
            network, count, mesh=self.mesh, photographs=config.photographs, size=config.image_size,
            baselines=baselines, progress=baselines, world=self.world,
        )  # fmt: skip

    def show(self, network: nn.Module, batch: Batch) -> Any:
        """A picture of what the network makes of a batch; see :func:`~fastmetro.training.pictures.batch_picture`."""
        return batch_picture(network, batch, self.mesh)


def in_steps(config: TrainConfig, rows: int) -> TrainConfig:
    """The settings with ``steps`` and ``eval_every`` made of what is given in epochs of so many rows.

    The released code makes only whole steps of an epoch, and as many in each (protocol 3.8); with its ``compat`` so do
    these. By default only the whole run is rounded, up.

    Raises:
        ValueError: the rows are fewer than a batch, with ``compat``.
    """
    if config.epochs is None and not config.eval_every_epochs:
        return config
    epoch = rows / (config.batch_size * (1 - config.data.synthetic_share))
    if config.compat == "published":
        epoch = math.floor(epoch)
        if epoch == 0:
            raise ValueError(
                f"batch_size must be at most the number of rows of data.files with compat 'published', which makes "
                f"whole steps of each epoch, got {config.batch_size} for {rows} rows"
            )
    steps = config.steps if config.epochs is None else math.ceil(config.epochs * epoch)
    every = max(math.floor(config.eval_every_epochs * epoch), 1) if config.eval_every_epochs else config.eval_every
    return replace(config, steps=steps, eval_every=every, eval_every_epochs=0)


def _text(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} mm" for name, value in errors.items())
