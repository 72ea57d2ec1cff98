"""Every setting of a training run; the command line is made from these fields."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fastmetro.compat import Compat
from fastmetro.data.limits import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE
from fastmetro.training.export import ExportDtype
from fastmetro.training.losses import LossWeights
from fastmetro.training.losses.smpl_stage import SMPLStageWeights
from fastmetro.training.schedule import Decay, Schedule
from fastmetro.training.step import Precision

_FREE_ON_RESUME = ("output", "max_seconds", "resume", "initialise", "device", "eval_every", "eval_every_epochs",
                   "eval_count", "log_every", "save_every", "fused", "deterministic", "compile_model",
                   "compile_images", "tensorboard", "capture_images", "export", "export_dtype",
                   "commit")  # fmt: skip
_FREE_DATA = ("workers", "eval_file", "protocol")


@dataclass(frozen=True)
class DataConfig:
    """TSV files to train on and to evaluate with; without files all images are synthetic.

    Attributes:
        files: YAML files of data sets in the METRO / FastMETRO format.
        shares: of each file in the samples that are read; by their lengths where empty.
        synthetic_share: of synthetic images in all samples, at least 0 and below 1. Of people of another mesh than the
            network's only the joints count.
        body_model: the SMPL or MANO model file that makes vertices from the labels' parameters.
        mesh_data: folder of the data files of the published repository, for the meshes "smpl" and "mano".
        workers: processes that read ahead, for each process of the training.
        pixels: where images are rotated, resized and coloured: in the "worker", or on the "device".
        eval_file: YAML file of the data set that evaluations run on; synthetic images where None.
        protocol: by which they do: "h36m-p2", "3dpw" or "hand".
    """

    files: tuple[Path, ...] = ()
    shares: tuple[float, ...] = ()
    synthetic_share: float = 0.0
    body_model: Path | None = None
    mesh_data: Path | None = None
    workers: int = 4
    pixels: Literal["worker", "device"] = "worker"
    eval_file: Path | None = None
    protocol: str = "h36m-p2"

    def __post_init__(self) -> None:
        if not 0 <= self.synthetic_share < 1:
            raise ValueError(f"data.synthetic_share must be at least 0 and below 1, got {self.synthetic_share}")
        if self.workers < 0:
            raise ValueError(f"data.workers must not be negative, got {self.workers}")
        if self.shares and len(self.shares) != len(self.files):
            raise ValueError(
                f"data.shares must be one share per file, got {len(self.shares)} for {len(self.files)} files"
            )
        if any(not 0 < share < math.inf for share in self.shares):
            raise ValueError(f"data.shares must be positive and finite, got {self.shares}")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        output: folder for the checkpoint, the log and the weights.
        model: name of the variant for ``create_model``.
        mesh: name of the mesh for ``load_mesh``.
        backbone: for ``create_model``; None for the model's usual one.
        backbone_weights: a checkpoint of the backbone alone (ImageNet), to start from.
        upsampling, masking, attention: for ``create_model``.
        stage: "meshes", or "smpl" to train the SMPL parameter regressor, too.
        compat: "published" trains as the released code does: its crops, its means in the losses, its means of errors
            over processes, its convention of the SMPL regressor, its labels of hands, its whole steps in an epoch. Its
            optimizer and schedule are settings.
        data: TSV files.
        seed: seeds the weights, the dropout and the images; images of other seeds are different people.
        batch_size: images per step, of all processes together.
        accumulate: into how many parts a process splits its share of a batch, to save memory.
        steps: length of the run, and of the learning-rate schedule, in optimizer steps.
        epochs: length of the run in passes over the rows of ``data.files`` instead.
        total_seconds: length of the run in seconds of stepping instead (over all resumed parts, each without its
            first step, which compiles and captures); ``steps`` then is an upper limit only.
        max_seconds: stop this call after so many seconds of wall time, set-up included, with everything saved.
        resume: go on from the checkpoint in ``output``; a run that was killed before its first one begins anew.
        initialise: start from the weights of this safetensors file (and a fresh optimizer).
        learning_rate: peak rate of AdamW.
        weight_decay: of AdamW.
        decay: what decays: "matrices" only, or "all" parameters, as published.
        betas: of AdamW.
        schedule: of the rate after the warm-up: half a "cosine" down to 0, "constant", or by "step", a tenth at each of
            the shares of the run in ``drop_at``.
        drop_at: see ``schedule``.
        warmup: share of the run over which the rate rises.
        gradient_clip: largest global norm of the gradient.
        ema_decay: of the averaged weights, which are the ones evaluated and exported.
        dropout: probability in the transformer; images never repeat, so little is needed.
        precision: "bf16" and "fp16" autocast the network's forward pass; "fp16" scales the loss.
        sync_batch_norm: take the moments of batch norms over the whole batch of all processes (GPUs only), so that a
            run with several is the run with one.
        fused: train the backbone and the transformer with this project's kernels, and with its AdamW, which clips: see
            :func:`~fastmetro.training.fused.fuse_backbone` and
            :func:`~fastmetro.training.fused.fuse_transformer`, whose dropout draws other numbers than PyTorch's.
            For GPUs; elsewhere the same by PyTorch's operations.
        deterministic: choose kernels that give equal bits in equal runs, also on a GPU; slower.
        compile_model: run the network and the losses through ``torch.compile``; with ``fused`` all but the backbone.
        capture_step: replay the whole step as one CUDA graph (needs a GPU; "bf16" or "fp32").
        compile_images: run the pixel part of the image generator through ``torch.compile``.
        capture_images: record the image generator as one CUDA graph and replay it (needs a GPU).
        image_size: side of the images in pixels; the published 224 gives the network its 7 x 7 image tokens.
        photographs: use scikit-image's photographs as backgrounds.
        overfit: repeat only the first so many images, to see whether the loss falls (0: never repeat one).
        log_every, eval_every, save_every: in steps; 0 for ``eval_every`` evaluates at the end only.
        eval_every_epochs: the same in passes over the rows of ``data.files``, rounded down to whole steps.
        eval_count: how much is measured; 0 for no evaluations at all. Of ``data.eval_file`` the first so many rows, all
            of them by default; of held-out synthetic images so many in the end, 1000 by default, and a quarter while it
            trains.
        tensorboard: write scalars and pictures for TensorBoard; pictures where it evaluates, else where it saves.
        export: where a finished run puts a second copy of its weights, to ship: at most 16 MiB.
        export_dtype: of the matrices in all weights that are written, "float32" or "bfloat16". By default "bfloat16"
            with ``export``, as what ships has it, else "float32", which loses nothing.
        device: "cuda", "cpu" or "auto".
        commit: recorded in the weights; asked from git where it is not given.
        loss: weights of the terms.
        smpl_loss: weights of the terms of the stage "smpl".
    """

    output: Path = Path("out/train")
    model: str = "fastmetro-compact"
    mesh: str = "anny-body"
    backbone: str | None = None
    backbone_weights: Path | None = None
    upsampling: Literal["fixed", "released", "learned"] = "fixed"
    masking: Literal["all", "half-heads", "none"] = "all"
    attention: Literal["auto", "dense", "reference", "native", "triton"] = "auto"
    stage: Literal["meshes", "smpl"] = "meshes"
    compat: Compat | None = None
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    batch_size: int = 256
    accumulate: int = 1
    steps: int = 20_000
    epochs: float | None = None
    total_seconds: float | None = None
    max_seconds: float | None = None
    resume: bool = False
    initialise: Path | None = None
    learning_rate: float = 8e-4
    weight_decay: float = 0.02
    decay: Decay = "matrices"
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: Schedule = "cosine"
    drop_at: tuple[float, ...] = ()
    warmup: float = 0.04
    gradient_clip: float = 1.0
    ema_decay: float = 0.998
    dropout: float = 0.0
    precision: Precision = "bf16"
    sync_batch_norm: bool = False
    fused: bool = False
    deterministic: bool = False
    compile_model: bool = False
    capture_step: bool = False
    compile_images: bool = False
    capture_images: bool = False
    image_size: int = 224
    photographs: bool = True
    overfit: int = 0
    log_every: int = 50
    eval_every: int = 0
    eval_every_epochs: int = 0
    save_every: int = 500
    eval_count: int | None = None
    tensorboard: bool = False
    export: Path | None = None
    export_dtype: ExportDtype | None = None
    device: str = "auto"
    commit: str | None = None
    loss: LossWeights = field(default_factory=LossWeights)
    smpl_loss: SMPLStageWeights = field(default_factory=SMPLStageWeights)

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "log_every", "save_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and not negative, got {self.weight_decay}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must satisfy 0 <= seed < 2**63, got {self.seed}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        for name in ("epochs", "total_seconds", "max_seconds"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.epochs == math.inf:
            raise ValueError("epochs must be finite, got inf")
        if not MIN_IMAGE_SIZE <= self.image_size <= MAX_IMAGE_SIZE:
            limits = f"between {MIN_IMAGE_SIZE} and {MAX_IMAGE_SIZE} pixels"
            raise ValueError(f"image_size must lie {limits}, got {self.image_size}")
        for name in ("overfit", "eval_every", "eval_every_epochs", "eval_count"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, low, high in (("warmup", 0.0, 0.99), ("ema_decay", 0.0, 1.0), ("dropout", 0.0, 0.99)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], got {getattr(self, name)}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {get_args(Precision)}, got {self.precision!r}")
        if (self.schedule == "step") != bool(self.drop_at) or any(not 0 < share < 1 for share in self.drop_at):
            raise ValueError(f"drop_at must be shares between 0 and 1 with schedule 'step' alone, got {self.drop_at}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.capture_step and self.precision == "fp16":
            raise ValueError("capture_step goes with precision bf16 or fp32, got 'fp16'")
        if self.batch_size % self.accumulate:
            sizes = f"{self.batch_size} and {self.accumulate}"
            raise ValueError(f"batch_size must be a multiple of accumulate, got {sizes}")
        for name in ("capture_images", "compile_images"):
            if self.data.files and getattr(self, name):
                option = f"--no-{name.replace('_', '-')}"
                raise ValueError(f"{name} is of synthetic images alone and does not go with data.files: give {option}")
        if self.data.files and self.overfit:
            raise ValueError("overfit repeats synthetic images and does not go with data.files")
        if self.epochs is not None and not self.data.files:
            raise ValueError("epochs are passes over data.files; without them give steps")
        if self.eval_every_epochs and not self.data.files:
            raise ValueError("eval_every_epochs counts passes over data.files; without them give eval_every")
        if self.eval_every_epochs and self.eval_every:
            given = f"{self.eval_every} and {self.eval_every_epochs}"
            raise ValueError(f"eval_every and eval_every_epochs say the same thing: one must be 0, got {given}")
        if self.data.synthetic_share and not self.data.files:
            raise ValueError("data.synthetic_share mixes synthetic images into data.files; without them all are")
        if self.stage == "smpl" and not (self.mesh == "smpl" and self.data.body_model):
            raise ValueError("stage 'smpl' needs mesh 'smpl' and data.body_model, the SMPL model file")

    @property
    def written_dtype(self) -> ExportDtype:
        """Of the matrices in all weights that are written."""
        return self.export_dtype or ("float32" if self.export is None else "bfloat16")

    def settings(self) -> dict[str, Any]:
        """What decides the course of the run: a checkpoint may be resumed only under the same values, files that have
        moved aside (:meth:`~fastmetro.training.state.TrainState.load`).

        Plain values only, nested ones under names such as "data.files".
        """
        kept = {name: value for name, value in asdict(self).items() if name not in _FREE_ON_RESUME}
        data = {name: value for name, value in kept.pop("data").items() if name not in _FREE_DATA}
        kept |= {f"data.{name}": value for name, value in data.items()}
        return {name: _plain(value) for name, value in kept.items()}


def _plain(value: Any) -> Any:
    """Without paths and tuples, which a checkpoint, read as data, would not give back."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value
