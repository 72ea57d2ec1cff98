"""The settings of `fastmetro eval`; every field is one of its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastmetro.compat import Compat
from fastmetro.inference.pretrained import NetworkChoice

SYNTHETIC = "synthetic"
"""Data, and the protocol of their evaluation."""


@dataclass(frozen=True)
class EvalSettings:
    """What is evaluated on what.

    Attributes:
        checkpoint: a checkpoint of this project, or the name of shipped weights, or with `model` a released one.
        data: "synthetic" for people that were never used in training, beside the mean mesh as baseline; or the YAML
            file of a TSV data set.
        protocol: of a TSV data set: "h36m-p2" (the default), "3dpw", "freihand" or "hand". Synthetic people have
            their own.
        compat: "published" crops, and takes means, as the released code does.
        processes: with compat, of how many processes' results the plain mean is taken; of those that run by default.
        network: what the checkpoint does not say of its network. Its body model also makes the true vertices.
        male_model: SMPL model file for the true vertices of male samples (3DPW), together with `female_model`; the
            published protocol takes the neutral one for all.
        female_model: the same for female samples.
        count: images; of a TSV data set the first so many, all by default. 1000 synthetic ones by default.
        batch_size: images at once, in each process. 32 by default; with compat 16, as the released code has it.
        workers: processes that read ahead.
        csv: where a row is appended.
        predictions: with "freihand", where pred.json, or a .zip that holds it, is written; of all rows of the set.
        truth: with "freihand", the folder of evaluation_xyz.json and evaluation_verts.json, to score them.
        attention: backend of the decoder's attention; "dense" is plain PyTorch.
        device: cpu, cuda, cuda:1, ...; the first GPU by default.
    """

    checkpoint: str = "fastmetro-compact"
    data: str = SYNTHETIC
    protocol: str | None = None
    compat: Compat | None = None
    processes: int | None = None
    network: Annotated[NetworkChoice, tyro.conf.arg(name="")] = field(default_factory=NetworkChoice)
    male_model: Path | None = None
    female_model: Path | None = None
    count: int | None = None
    batch_size: int | None = None
    workers: int = 0
    csv: Path = Path("out/eval.csv")
    predictions: Path | None = None
    truth: Path | None = None
    attention: Literal["auto", "dense", "reference", "native", "triton"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("batch_size", "processes", "count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        if (self.processes or 1) > 1 and self.compat is None:
            raise ValueError("processes is of compat 'published'; exact means do not depend on it")
        if (self.male_model is None) != (self.female_model is None):
            raise ValueError("male_model and female_model go together, or half of the truth would be another")
        if self.male_model is not None and self.compat is not None:
            raise ValueError("male_model and female_model do not go with compat 'published', whose truth is neutral")
        if self.predictions or self.truth:
            self._check_freihand()
        if self.data == SYNTHETIC:
            self._check_synthetic()
        if self.male_model is not None and self.network.body_model is None:
            raise ValueError("male_model and female_model need body_model, the neutral model, too")

    def _check_synthetic(self) -> None:
        """What is of TSV data sets alone would be ignored."""
        if self.protocol not in (None, SYNTHETIC):
            raise ValueError(f"protocol must be {SYNTHETIC!r} for data {SYNTHETIC!r}, got {self.protocol!r}")
        for name in ("compat", "male_model"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is of TSV data sets and does not go with data {SYNTHETIC!r}")

    def _check_freihand(self) -> None:
        if self.protocol_name != "freihand":
            raise ValueError(f"predictions and truth go with protocol 'freihand', got {self.protocol_name!r}")
        if self.data == SYNTHETIC:
            raise ValueError("predictions and truth go with a TSV data set, got data 'synthetic'")
        if self.count is not None:
            raise ValueError(f"predictions and truth are of all rows and do not go with count, got {self.count}")

    @property
    def protocol_name(self) -> str:
        """The protocol that was given, or the default."""
        return self.protocol or (SYNTHETIC if self.data == SYNTHETIC else "h36m-p2")

    @property
    def images_at_once(self) -> int:
        """The batch size that was given, or the default."""
        return self.batch_size or (32 if self.compat is None else 16)
