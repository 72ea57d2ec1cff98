"""The ``fastmetro`` command. Every field of a command's dataclass is one of its options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastmetro.evaluation.settings import EvalSettings
from fastmetro.inference.pretrained import NetworkChoice
from fastmetro.profiling.settings import FpsSettings
from fastmetro.training.config import TrainConfig

Device = str | None
Attention = Literal["auto", "dense", "reference", "native", "triton"]


@dataclass
class Predict:
    """Recover a mesh from each image: overlay, side view, .glb and .npz.

    The weights that ship with the package were trained on synthetic images only; expect visible errors on
    photographs.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them."""
    out: Path
    """Folder for the results."""
    box: tuple[float, float, float, float] | None = None
    """The person in the image: left top right bottom in pixels (one image only). Default: the central square."""
    checkpoint: str = "fastmetro-compact"
    """A checkpoint of this project, or the name of shipped weights, or with --model a released one."""
    network: Annotated[NetworkChoice, tyro.conf.arg(name="")] = field(default_factory=NetworkChoice)
    attention: Attention = "auto"
    """Backend of the decoder's attention; dense is plain PyTorch."""
    device: Device = None
    """cpu, cuda, cuda:1, ...; the first GPU by default."""

    def run(self) -> int:
        """Predict; the exit status is 1 when any image failed."""
        from fastmetro.inference.batch import collect_images, predict_files
        from fastmetro.inference.predictor import Predictor

        images = collect_images(self.images)
        if self.box is not None and len(images) != 1:
            raise ValueError(f"--box goes with one image, got {len(images)}")
        network = self.network.build(self.checkpoint, self.attention)
        predictor = Predictor(self.checkpoint, model=network, attention=self.attention, device=self.device)
        failures = predict_files(predictor, images, self.out, box=self.box)
        for path, why in failures.items():
            print(f"fastmetro: {path}: {why}", file=sys.stderr)
        print(f"{len(images) - len(failures)} of {len(images)} images done, results in {self.out}")
        return 1 if failures else 0


@dataclass
class Demo:
    """Run on a photograph and two unseen synthetic images, and time the plain and the fused path on this device."""

    out: Path = Path("out/demo")
    """Folder for the results."""
    device: Device = None
    """cpu, cuda, cuda:1, ...; the first GPU by default."""

    def run(self) -> int:
        """Make the pictures and print the times."""
        from fastmetro.inference.demo import run_demo

        run_demo(self.out, device=self.device)
        return 0


@dataclass
class Eval:
    """Evaluate on images that were never used in training: synthetic ones, or a TSV data set by its protocol.

    Under `torchrun` several processes share a TSV data set.
    """

    settings: Annotated[EvalSettings, tyro.conf.arg(name="")]

    def run(self) -> int:
        """Evaluate and print the errors with the protocol's name."""
        from fastmetro.evaluation.command import run_evaluation

        run_evaluation(self.settings)
        return 0


@dataclass
class Train:
    """Train on synthetic images or TSV files: `fastmetro train [CONFIG.yaml] [options]`.

    Options in front of which a file of settings may stand (see configs/) override it. Under `torchrun` several
    processes train together.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    def run(self) -> int:
        """Train; a run that was stopped goes on with --resume."""
        from fastmetro.training.loop import train

        train(self.config)
        return 0


@dataclass
class Bench:
    """Measure on this machine. "fps": the inference engine beside baselines, with the same weights, in one process.

    Every contender is checked against the plain float32 network before it is timed.
    """

    what: Annotated[Literal["fps"], tyro.conf.Positional]
    """fps: latency, throughput, memory, energy, and the parts of a network."""
    settings: Annotated[FpsSettings, tyro.conf.arg(name="")]

    def run(self) -> int:
        """Measure and print; the exit status is 1 when a contender is wrong or fails."""
        from fastmetro.profiling.fps import all_right, run_fps

        return 0 if all_right(run_fps(self.settings)) else 1


Kind = Literal["body", "hand"]


@dataclass
class DataCheck:
    """Decode every row of a METRO / FastMETRO data set and name those that cannot be used or are damaged."""

    file: Annotated[Path, tyro.conf.Positional]
    """The YAML file of the data set."""
    kind: Kind = "body"
    """What the labels are of: 24 joints of a body, or 21 of a hand."""
    workers: int | None = None
    """Processes that decode; one per core by default, none beside this one for a small set."""
    examples: int = 5
    """Rows of each kind of problem that are named."""

    def run(self) -> int:
        """Check and print; the exit status is 1 when a row cannot be used."""
        from fastmetro.data.tsv import check_data

        report = check_data(self.file, self.kind, self.workers, self.examples, progress=True)
        print(report.text())
        return 1 if report.bad else 0


@dataclass
class DataBuild:
    """Make a data set from a folder of images and a .npz of annotations, as GraphCMR and SPIN have them."""

    annotations: Annotated[Path, tyro.conf.Positional]
    """Arrays imgname, center, scale, and of part, S, pose, shape, has_smpl, gender those that there are."""
    images: Path
    """The folder that image names start from."""
    out: Path
    """Path and first part of the names of the files: OUT.yaml, OUT.img.tsv, ..."""
    kind: Kind = "body"
    """What the annotations are of: 24 joints of a body, or 21 of a hand."""

    def run(self) -> int:
        """Build; rows that cannot be used are named and left out."""
        from fastmetro.data.tsv import build_data

        report = build_data(self.annotations, self.images, self.out, self.kind, progress=True)
        for name, why in report.skipped:
            print(f"fastmetro: left out {name}: {why}", file=sys.stderr)
        print(f"{report.rows} rows in {report.path}, {len(report.skipped)} left out")
        return 0


@dataclass
class Data:
    """Check training data in the published format, or make some."""

    command: Annotated[
        Annotated[DataCheck, tyro.conf.subcommand("check", prefix_name=False)]
        | Annotated[DataBuild, tyro.conf.subcommand("build", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        """Run the chosen one."""
        return self.command.run()


@dataclass
class Score:
    """Score a file of predictions by FreiHAND's protocol: errors in cm, areas under the curve, F-scores."""

    predictions: Annotated[Path, tyro.conf.Positional]
    """pred.json, or a .zip that holds it, as FreiHAND's server takes it."""
    truth: Path
    """Folder with evaluation_xyz.json and evaluation_verts.json."""
    out: Path | None = None
    """Where the scores are written as well, as scores.txt of the official script."""
    device: Device = None
    """cpu, cuda, cuda:1, ...; the first GPU by default."""

    def run(self) -> int:
        """Score and print."""
        from fastmetro.distributed import find_device
        from fastmetro.evaluation import freihand
        from fastmetro.files import check_output, replacing

        if self.out is not None:
            check_output(self.out, "out", (self.predictions, *freihand.truth_files(self.truth)))
        device = find_device(self.device or "auto")
        joints, vertices = freihand.read_predictions(self.predictions)
        truth = freihand.read_truth(*freihand.truth_files(self.truth))
        scores = freihand.score(joints.to(device), vertices.to(device), *truth)
        lines = [f"{name}: {value:.6f}" for name, value in scores.items()]
        if self.out is not None:  # before printing, which fails where nobody reads on
            with replacing(self.out) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"FreiHAND, {len(joints)} samples, errors in cm", *lines, sep="\n")
        return 0


COMMANDS: dict[str, Callable[..., Any]] = {
    "predict": Predict,
    "demo": Demo,
    "eval": Eval,
    "train": Train,
    "bench": Bench,
    "data": Data,
    "score": Score,
}


def _with_settings(arguments: Sequence[str]) -> list[str]:
    """`train FILE.yaml ...` as if the settings of the file stood there."""
    from fastmetro.training.config_file import file_arguments

    first, *rest = arguments or [""]
    if first == "train" and rest and rest[0].endswith((".yaml", ".yml")):
        return [first, *file_arguments(Path(rest[0]), TrainConfig), *rest[1:]]
    if first == "train":
        _refuse_late_settings(rest)
    return list(arguments)


def _refuse_late_settings(arguments: Sequence[str]) -> None:
    """Raise where a file of settings stands behind options: what it says would then override them, or be overridden."""
    option = ""
    for before, argument in zip(("train", *arguments), arguments, strict=False):
        if argument.startswith("--"):
            option = argument
        elif argument.endswith((".yaml", ".yml")) and not (before.startswith("--") or option.startswith("--data.")):
            raise ValueError(f"the file of settings must stand right behind `train`, got {argument} behind {option}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 2 for unusable arguments, 1 for an error, 130 for Ctrl-C."""
    try:
        arguments = _with_settings(sys.argv[1:] if arguments is None else arguments)
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=arguments, prog="fastmetro", description="3D human and hand meshes from one image."
        )
        return command.run()
    except (OSError, ValueError, RuntimeError) as error:
        print(f"fastmetro: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # a training stops by itself, but for its last evaluation
        print("fastmetro: interrupted", file=sys.stderr)
        return 130
