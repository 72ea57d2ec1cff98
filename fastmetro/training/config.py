"""Every setting of a training run; the command line is made from these fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastmetro.training.losses import LossWeights

_FREE_ON_RESUME = ("output", "max_seconds", "resume", "initialise", "device", "eval_every", "eval_count", "log_every",
                   "save_every", "compile_model", "compile_images",
                   "capture_images", "export", "commit")  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Training on synthetic images.

    Attributes:
        output: folder for the checkpoint, the log and the weights.
        model: name of the variant for ``create_model``.
        mesh: name of the mesh for ``load_mesh``.
        seed: seeds the weights, the dropout and the images; images of other seeds are different people.
        batch_size: images per step.
        steps: length of the run, and of the learning-rate schedule, in optimizer steps.
        total_seconds: length of the run in seconds of stepping instead (over all resumed parts); ``steps`` then
            is an upper limit only.
        max_seconds: stop this call after so many seconds of wall time, set-up included, with everything saved.
        resume: go on from the checkpoint in ``output``.
        initialise: start from the weights of this safetensors file (and a fresh optimizer).
        learning_rate: peak rate of AdamW.
        weight_decay: of AdamW.
        warmup: share of the run over which the rate rises.
        gradient_clip: largest global norm of the gradient.
        ema_decay: of the averaged weights, which are the ones evaluated and exported.
        dropout: probability in the transformer; images never repeat, so little is needed.
        precision: "bf16" autocasts the network's forward pass.
        compile_model: run the network through ``torch.compile``.
        compile_images: run the pixel part of the image generator through ``torch.compile``.
        capture_images: record the image generator as one CUDA graph and replay it (needs a GPU).
        image_size: side of the images in pixels; the published 224 gives the network its 7 x 7 image tokens.
        photographs: use scikit-image's photographs as backgrounds.
        overfit: repeat only the first so many images, to see whether the loss falls (0: never repeat one).
        log_every, eval_every, save_every: in steps; 0 for ``eval_every`` evaluates at the end only.
        eval_count: held-out images of the evaluations (0: none at all).
        export: where a finished run puts a second copy of its weights, to ship: at most 16 MiB.
        device: "cuda", "cpu" or "auto".
        commit: recorded in the weights; asked from git where it is not given.
        loss: weights of the terms.
    """

    output: Path = Path("out/train")
    model: str = "fastmetro-compact"
    mesh: str = "anny-body"
    seed: int = 0
    batch_size: int = 256
    steps: int = 20_000
    total_seconds: float | None = None
    max_seconds: float | None = None
    resume: bool = False
    initialise: Path | None = None
    learning_rate: float = 8e-4
    weight_decay: float = 0.02
    warmup: float = 0.04
    gradient_clip: float = 1.0
    ema_decay: float = 0.998
    dropout: float = 0.0
    precision: Literal["bf16", "fp32"] = "bf16"
    compile_model: bool = False
    compile_images: bool = False
    capture_images: bool = False
    image_size: int = 224
    photographs: bool = True
    overfit: int = 0
    log_every: int = 50
    eval_every: int = 0
    save_every: int = 500
    eval_count: int = 1000
    export: Path | None = None
    device: str = "auto"
    commit: str | None = None
    loss: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("total_seconds", "max_seconds"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if min(self.overfit, self.eval_every, self.eval_count, self.weight_decay) < 0:
            raise ValueError("overfit, eval_every, eval_count and weight_decay must not be negative")
        for name, low, high in (("warmup", 0.0, 0.99), ("ema_decay", 0.0, 1.0), ("dropout", 0.0, 0.99)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], got {getattr(self, name)}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be 'bf16' or 'fp32', got {self.precision!r}")
        if self.resume and self.initialise is not None:
            raise ValueError("resume and initialise exclude each other: a checkpoint brings its own weights")

    def settings(self) -> dict[str, Any]:
        """What decides the course of the run: a checkpoint may be resumed only under the same values."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE_ON_RESUME}
