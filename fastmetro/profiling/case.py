"""One case: a network and a batch size; every contender built, checked, then timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmetro.models import FastMETRO
from fastmetro.profiling.checks import Truth, Verdict, WrongResult
from fastmetro.profiling.contenders import Contender, build_contender, plain_model
from fastmetro.profiling.end_to_end import Times, time_file_to_file
from fastmetro.profiling.latency import alternate, synchronize, tensor_float_32
from fastmetro.profiling.parts import part_times, plain_parts
from fastmetro.profiling.record import clocks
from fastmetro.profiling.resources import Load, MemoryMeter, load_of_calls
from fastmetro.profiling.settings import FpsSettings

Say = Callable[[str], None]


@dataclass(eq=False)
class Entry:
    """A contender in a case.

    Attributes:
        status: "ok", "wrong" (its result) or "failed" (an error); only the first is timed.
        samples: milliseconds by round.
        file_samples: stage times from file to file.
    """

    name: str
    status: str = "ok"
    reason: str = ""
    contender: Contender | None = None
    verdict: Verdict | None = None
    samples: list[list[float]] = field(default_factory=list)
    file_samples: list[Times] = field(default_factory=list)
    memory_mib: float | None = None
    load: Load | None = None
    parts: Times = field(default_factory=dict)


@dataclass(eq=False)
class Case:
    """What is measured for one batch size.

    Args:
        model: float32, evaluation mode, on the device.
        batch: images per call.
        dtype: of the engine and of the baselines that run in its precision.
        settings: how long, and what else.
        compile_tuned: whether the tuned baseline is compiled.
        say: told about progress.
    """

    model: FastMETRO
    batch: int
    dtype: torch.dtype
    settings: FpsSettings
    compile_tuned: bool
    say: Say
    entries: list[Entry] = field(default_factory=list)
    plain_parts: Times = field(default_factory=dict)
    clocks: str = ""

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.model.xyz_regressor.weight.device

    def images(self) -> Tensor:
        """Normalised noise, float32 [batch, 3, 224, 224], on the device."""
        generator = torch.Generator().manual_seed(2)
        return torch.randn(self.batch, 3, 224, 224, generator=generator).to(self.device)

    def contenders(self) -> list[Contender]:
        """Those that compute the right thing."""
        return [entry.contender for entry in self.entries if entry.status == "ok" and entry.contender]

    @torch.no_grad()
    def measure(self, names: Sequence[str]) -> list[Entry]:
        """Build, check and time the contenders; entries in the order of `names`."""
        images, start = self.images(), time.monotonic()
        truth = Truth(self.model, images)
        self.say(f"  plain network: {time.monotonic() - start:.1f} s")
        self.entries = [self._prepare(name, truth, images) for name in names]
        del truth  # its networks and outputs are of no use in what is timed
        right = [entry for entry in self.entries if entry.status == "ok"]
        before = clocks(self.device)
        self._time(right, images)
        self.clocks = " -> ".join(filter(None, (before, clocks(self.device))))
        for entry in right:
            self._resources(entry, images)
        if self.settings.image is not None and self.batch == 1:
            self._file_to_file(right)
        plain = plain_model(self.model, self.dtype)
        try:
            self.plain_parts = part_times(plain_parts(plain, images.to(self.dtype)), self.device)
        except RuntimeError as error:  # out of memory, say: the times that were taken are kept
            self.say(f"  no parts of the plain path: {_first_line(error)}")
        return self.entries

    def _prepare(self, name: str, truth: Truth, images: Tensor) -> Entry:
        """Build and check one contender; whatever goes wrong there is told and does not stop the others."""
        meter, start, built = MemoryMeter(self.device), time.monotonic(), None
        try:
            contender = build_contender(name, self.model, self.batch, self.dtype, self.compile_tuned)
            with tensor_float_32(contender.uses_tf32):
                contender.run(images)  # what compiles does so now
            synchronize(self.device)
            built = time.monotonic()
            verdict = truth.check(contender)
            with tensor_float_32(contender.uses_tf32):
                memory = meter.mebibytes(lambda: contender.run(images))
        except WrongResult as error:
            entry = Entry(name, "wrong", str(error))
        except Exception as error:
            entry = Entry(name, "failed", _first_line(error))
        else:
            entry = Entry(name, contender=contender, verdict=verdict, memory_mib=memory)
        end = time.monotonic()
        took = (
            f"after {end - start:.1f} s"
            if built is None
            else f"built in {built - start:.1f} s, checked in {end - built:.1f} s"
        )
        self.say(f"  {name}: {entry.status}, {took} {entry.reason}".rstrip())
        return entry

    def _time(self, entries: Sequence[Entry], images: Tensor) -> None:
        calls = [_with_precision(entry, images) for entry in entries]
        if not calls:
            return
        samples = alternate(calls, self.device, self.settings.seconds, self.settings.rounds)
        for entry, mine in zip(entries, samples, strict=True):
            entry.samples = mine

    def _resources(self, entry: Entry, images: Tensor) -> None:
        """Energy, and the parts of a contender that has some."""
        contender = entry.contender
        assert contender is not None
        with tensor_float_32(contender.uses_tf32):
            entry.load = load_of_calls(lambda: contender.run(images), self.device, self.settings.seconds)
            if contender.parts is None:
                return
            try:
                entry.parts = part_times(contender.parts(), self.device)
            except Exception as error:  # an engine's own code: its times stay, and the row says what is missing
                entry.reason = f"no parts: {_first_line(error)}"

    def _file_to_file(self, entries: Sequence[Entry]) -> None:
        image = self.settings.image
        contenders = [entry.contender for entry in entries if entry.contender]
        if image is None or not contenders:
            return
        settings = self.settings
        taken = time_file_to_file(contenders, image, self.model.mesh, self.device, settings.seconds, settings.rounds)
        for entry, mine in zip(entries, taken, strict=True):
            entry.file_samples = mine


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def _with_precision(entry: Entry, images: Tensor) -> Callable[[], object]:
    """The call with TF32 as the contender has it. Setting two flags takes under a microsecond."""
    contender = entry.contender
    assert contender is not None
    if not contender.uses_tf32:
        return lambda: contender.run(images)

    def call() -> object:
        with tensor_float_32(True):
            return contender.run(images)

    return call


def stage_medians(samples: Sequence[Times]) -> Times:
    """Median of each stage."""
    return {stage: statistics.median(times[stage] for times in samples) for stage in samples[0]}
