"""The folder of a run: one run at a time writes to it, nothing in it is lost, and what cannot be resumed is named."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_interrupted import rows, small

from fastmetro.cli import main
from fastmetro.files import locked, replace_all, replacing
from fastmetro.training.config import DataConfig
from fastmetro.training.sources import Batch, SourceFailed
from fastmetro.training.trainer import RESULTS, TrainingFailed

SMALL = ["--batch-size", "2", "--image-size", "32", "--no-photographs", "--eval-count", "0", "--device", "cpu",
         "--steps", "1"]  # fmt: skip
HOLDER = """
import os, sys, time
from pathlib import Path
from fastmetro.files import locked
with locked(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(100)
"""


def no_batch(step: int) -> Batch:
    raise SourceFailed(f"the samples of step {step} could not be read")


def test_a_folder_belongs_to_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As long as its process lives; children, as the workers of a training, do not hold on to it."""
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        assert main(["train", "--output", str(run), *SMALL]) == 1
        assert f"another run writes to {run}: wait for its end" in capsys.readouterr().err
        assert [path.name for path in run.iterdir()] == [".lock"]
        holder.kill()
        holder.wait()
        with locked(run):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_where_there_are_no_locks_this_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with locked(tmp_path / "run"):
        assert f"{tmp_path / 'run'} cannot be locked (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize("name", RESULTS)
def test_files_of_another_run_are_not_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("before")
    unfinished = name in ("checkpoint.pt", "log.csv", "best.safetensors")
    how = "resume it, remove it" if unfinished else "remove it"
    with pytest.raises(FileExistsError, match=rf"{name} would be overwritten: {how}, or choose another output"):
        small(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "before"


def test_the_log_of_float16_has_the_scale_of_the_loss(tmp_path: Path) -> None:
    for precision in ("fp16", "fp32"):
        trainer = small(tmp_path / precision, precision=precision, log_every=1)
        assert trainer.run()
        last = rows(tmp_path / precision)[-1]
        assert (
            float(last.get("loss_scale", 1)) == trainer.step.scaler.get_scale() == (65536 if "16" in precision else 1)
        )


def test_a_run_whose_first_batch_fails_leaves_the_folder_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="step 0 could not be read; no state was saved"):
        small(tmp_path / "run", no_batch).run()
    assert not list((tmp_path / "run").iterdir())
    assert small(tmp_path / "run").run()


def test_a_state_is_told_of_where_another_process_dies_once_it_is_written(tmp_path: Path) -> None:
    trainer = small(tmp_path)
    assert trainer.last_good() == "no state was saved"

    def dies() -> None:
        raise RuntimeError("Connection reset by peer")

    trainer._stop_if_failed = dies  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="reset by peer"):
        trainer._save()
    assert trainer.last_good() == f"the last good state is in {tmp_path / 'checkpoint.pt'}"


def test_a_resumed_run_without_a_step_keeps_its_state(tmp_path: Path) -> None:
    whole = small(tmp_path, save_every=4)
    whole.source = lambda step: no_batch(step) if step == 4 else small_batch(step)
    small_batch = small(tmp_path / "other").source
    with pytest.raises(TrainingFailed):
        whole.run()
    with pytest.raises(TrainingFailed, match="last good state is in"):
        small(tmp_path, no_batch, resume=True).run()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4"]


def test_what_a_killed_run_left_behind_goes(tmp_path: Path) -> None:
    """Of its own files alone."""
    left = [tmp_path / f".{name}.x1y2.part" for name in RESULTS]
    other = tmp_path / ".other.pt.x1y2.part"
    for path in (*left, other):
        path.write_bytes(b"half")
    small(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [other.name]


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then its name."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def replaced(source: Path, place: Path) -> None:
        done.append("replace")
        replace(source, place)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    with replacing(tmp_path / "x.txt") as temporary:
        temporary.write_text("new")
    assert done == [temporary.name, "replace", tmp_path.name]
    done.clear()
    for name in ("a.part", "b.part"):
        (tmp_path / name).write_text("new")
    replace_all([(tmp_path / "a.part", tmp_path / "a"), (tmp_path / "b.part", tmp_path / "b")])
    assert done == ["a.part", "b.part", "replace", "replace"]


@pytest.mark.parametrize("content", ["text", "cut", "other", "parts", "optimizer"])
def test_what_is_no_checkpoint_is_refused(content: str, tmp_path: Path) -> None:
    small(tmp_path).run()
    path = tmp_path / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    if content == "text":
        path.write_text("hello world\n")
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        kept = {"format": 3} if content == "parts" else {**saved, "optimizer": {}} if content == "optimizer" else [1]
        torch.save(kept, path)
    message = {
        "text": "could not be read as a training checkpoint",
        "cut": "could not be read as a training checkpoint",
        "other": "is no training checkpoint of format 3",
        "parts": "is no training checkpoint: settings, step, .* missing, or of another kind",
        "optimizer": "does not fit the model and optimizer",
    }
    with pytest.raises(ValueError, match=rf"checkpoint\.pt {message[content]}"):
        small(tmp_path, resume=True)


@pytest.mark.parametrize("record", [{"commands": "{}"}, {"commands": "[1]"}, {"commands": "x"}, {"samples": "many"}])
def test_weights_with_another_record_are_refused(
    record: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    from fastmetro.inference.pretrained import SHIPPED

    save_file(load_file(SHIPPED["fastmetro-compact"]), tmp_path / "w.safetensors", metadata=record)
    arguments = ["train", "--output", str(tmp_path / "run"), *SMALL, "--initialise", str(tmp_path / "w.safetensors")]
    assert main(arguments) == 1
    assert "w.safetensors must have a list of commands and a number of samples" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_where_the_weights_go_in_the_end_is_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["train", "--output", str(tmp_path / "run"), *SMALL]
    assert main([*arguments, "--export", str(tmp_path / "file" / "w.safetensors")]) == 1
    assert "export must lie in a folder" in capsys.readouterr().err
    assert main([*arguments, "--export", str(tmp_path)]) == 1
    assert "export must be a file, got the folder" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 1
    assert "no checkpoint to resume from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its log's rows are dropped; a folder whose checkpoint was taken away is left as it is."""
    run = tmp_path / "run"
    arguments = ["train", "--output", str(run), *SMALL, "--log-every", "1"]
    with locked(run):
        pass
    header = "step,samples,seconds\n"
    (run / "log.csv").write_text(f"{header}1,2,0.5\n2,4,0.9\n3,6")
    (run / "best.safetensors").write_bytes(b"of a step that is lost")
    assert main(arguments) == 1
    assert "log.csv would be overwritten: resume it, remove it" in capsys.readouterr().err
    for left in ("report.json", "log.csv"):
        (run / left).write_text(f"{header}7,14,1.5\n")
        before = sorted((path.name, path.read_bytes()) for path in run.iterdir())
        assert main([*arguments, "--resume", "--save-every", "6"]) == 1
        assert "no checkpoint to resume from at" in capsys.readouterr().err
        assert sorted((path.name, path.read_bytes()) for path in run.iterdir()) == before
        (run / left).unlink()
    (run / "log.csv").write_text(f"{header}1,2,0.5\n2,4,0.9\n9,6")
    assert main([*arguments, "--resume", "--save-every", "6"]) == 0
    assert f"{run} holds no checkpoint: the run ended before its first one and begins anew" in capsys.readouterr().err
    assert [row["step"] for row in rows(run)] == ["1"] and (run / "checkpoint.pt").is_file()
    assert not (run / "best.safetensors").exists()


def test_files_may_lie_elsewhere_when_a_run_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under their names, in their order; weights that a run has started from are not asked for."""
    first = DataConfig(files=(Path("a/x.yaml"), Path("a/y.yaml")), body_model=Path("m/SMPL.pkl"))
    small(tmp_path, data=first, backbone_weights=Path("absent.pth")).run()
    moved = DataConfig(files=(Path("b/x.yaml"), Path("/c/y.yaml")), body_model=Path("m/SMPL.pkl"))
    small(tmp_path, data=moved, resume=True)
    said = capsys.readouterr().err
    assert "data.files is ['b/x.yaml', '/c/y.yaml'], and was ['a/x.yaml', 'a/y.yaml']: the content must be" in said
    assert "body_model" not in said and "backbone" not in said
    for files in (("b/y.yaml", "b/x.yaml"), ("b/x.yaml",), ("b/x.yaml", "b/z.yaml")):
        other = DataConfig(files=tuple(map(Path, files)), body_model=Path("m/SMPL.pkl"))
        with pytest.raises(ValueError, match=r"other settings; data\.files: checkpoint"):
            small(tmp_path, data=other, resume=True)
    with pytest.raises(ValueError, match=r"other settings; data\.body_model: checkpoint 'm/SMPL\.pkl', now None"):
        small(tmp_path, data=DataConfig(files=first.files), resume=True)
