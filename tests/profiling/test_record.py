"""CSV files are whole or absent; what a device does not tell is not made up."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastmetro.profiling import record, resources

CPU = torch.device("cpu")


def test_rows_come_back(tmp_path: Path) -> None:
    rows = [{"a": "1", "b": 'x, "y"'}, {"a": "2", "b": ""}]
    record.write_rows(tmp_path / "new" / "rows.csv", rows)
    assert record.read_rows(tmp_path / "new" / "rows.csv", ["a", "b"]) == rows
    with pytest.raises(ValueError, match="lacks the columns c"):
        record.read_rows(tmp_path / "new" / "rows.csv", ["a", "c"])


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    record.write_rows(path, [{"a": "old"}])
    with pytest.raises(ValueError, match="must have the same columns"):
        record.write_rows(path, [{"a": "1"}, {"b": "2"}])
    with pytest.raises(ValueError, match="nothing to write"):
        record.write_rows(path, [])

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(record.csv.DictWriter, "writerows", full_disk)  # after the header
    with pytest.raises(OSError, match="no space"):
        record.write_rows(path, [{"a": "new"}])
    assert path.read_text() == "a\nold\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.csv"]


def test_environment_names_where_a_figure_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETRO_COMMIT", "abc")
    row = record.environment(CPU, "fastmetro bench fps")
    assert row["commit"] == "abc" and row["torch"] == torch.__version__ and row["command"] == "fastmetro bench fps"
    assert "threads" in row["device"]


def test_a_cpu_tells_neither_clocks_nor_energy_nor_memory() -> None:
    assert record.clocks(CPU) == "" and resources.power_and_clock(CPU) is None
    assert resources.load_of_calls(lambda: None, CPU, 0.01) is None
    assert resources.MemoryMeter(CPU).mebibytes(lambda: None) is None


def ask(monkeypatch: pytest.MonkeyPatch, answer: str, code: int = 0) -> list[float] | None:
    """What is made of an answer of nvidia-smi about a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2"))
    asked: list[list[str]] = []

    def run(query: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(query)
        return subprocess.CompletedProcess(query, code, answer, "")

    monkeypatch.setattr(record.subprocess, "run", run)
    values = record.ask_gpu(torch.device("cuda"), "clocks.sm", "clocks.mem")
    assert asked[0][:3] == ["nvidia-smi", "-i", "GPU-1-2"]
    return values


def test_answers_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, "1980, 3201\n") == [1980.0, 3201.0]
    assert ask(monkeypatch, "[N/A], 3201\n") is None
    assert ask(monkeypatch, "1980\n") is None
    assert ask(monkeypatch, "1980, 3201\n", code=6) is None


def test_energy_is_mean_power_times_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "power_and_clock", lambda _: (100.0, 1500.0))
    clock = iter(range(10_000))  # a second passes at each look
    monkeypatch.setattr(resources.time, "perf_counter", lambda: float(next(clock)))
    calls: list[int] = []
    load = resources.load_of_calls(lambda: calls.append(1), CPU, seconds=4.0)
    # Looks at the clock: start, then one before each of the calls, one that ends them, one for the duration.
    assert load is not None and load.joules == pytest.approx(100.0 * 5.0 / 3)
    assert load.watts == 100.0 and load.sm_mhz == 1500.0
