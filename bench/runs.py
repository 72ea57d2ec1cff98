"""Whole trainings for benchmarks that compare them: each is `fastmetro train` in processes of its own."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ERROR = re.compile(r"(\[rank\d+\]: *)?(error|(?!.*ChildFailed)[\w.]*(Error|Exception|Diverged|Failed)):")
"""How a line begins that says what went wrong: Python's, or the command line's."""
_STOPPING = 45.0
"""Seconds that a run is given to stop by itself; torchrun gives its processes 30."""


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        folder: its output; what an earlier run left there is removed.
        options: for `fastmetro train`, but for the output.
        processes: of torchrun; 1 runs without it.
        gpu: number of the only GPU that it sees; None: it sees all.
    """

    folder: Path
    options: Sequence[str]
    processes: int = 1
    gpu: int | None = None

    @property
    def command(self) -> list[str]:
        """What is executed."""
        train = ["-m", "fastmetro", "train", "--output", str(self.folder), *self.options]
        if self.processes == 1:
            return [sys.executable, *train]
        # By address: the name of a machine without a network may not resolve.
        where = ["--nnodes", "1", "--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.processes), *where]
        return [sys.executable, *torchrun, *train]


def execute(run: Run, seconds: float | None = None) -> str:
    """Train; what is printed goes to ``<folder>.txt``.

    Args:
        run: what to train.
        seconds: after so many it is stopped, as if by Ctrl-C.

    Returns:
        Why it failed, in one line; empty if it is finished.
    """
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    shown = {} if run.gpu is None else {"CUDA_VISIBLE_DEVICES": _visible(run.gpu)}
    printed = run.folder.with_name(run.folder.name + ".txt")
    with printed.open("w") as file:
        process = subprocess.Popen(run.command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **shown})
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun passes it on
            try:
                process.wait(_STOPPING)
            except subprocess.TimeoutExpired:
                process.kill()
            return f"not finished after {seconds:g} s"
    if process.returncode == 0:
        return ""
    return f"exit code {process.returncode}: {_reason(printed.read_text(errors='replace'))}"


def _reason(text: str) -> str:
    """The last line that names an error, before the report that torchrun writes; else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or ["nothing was printed"])[-1][:200]


def log_rows(folder: Path) -> list[dict[str, str]]:
    """The log of a run; none if there is no log yet."""
    path = folder / "log.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def report(folder: Path) -> dict[str, Any]:
    """What a finished run measured in the end."""
    content: Mapping[str, Any] = json.loads((folder / "report.json").read_text())
    return dict(content["report"])


def images_per_second(folder: Path) -> float:
    """Median over the rows of the log but the first third, in which graphs are captured and algorithms chosen."""
    speeds = [float(row["images_per_second"]) for row in log_rows(folder) if row["images_per_second"]]
    return statistics.median(speeds[len(speeds) // 3 :])


def arguments(settings: Mapping[str, object]) -> list[str]:
    """A command line of settings by name; those that are true need no value."""
    return [
        text for name, value in settings.items() for text in (f"--{name}", *([] if value is True else [str(value)]))
    ]


def _visible(gpu: int) -> str:
    """The name of a GPU of those that this process sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[gpu] if seen else str(gpu)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
