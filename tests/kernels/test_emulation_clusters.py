"""Clusters of blocks in the emulator: the worked example is right, and each usual mistake is caught."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from emulation import build, gpu

SCHEDULES = build.SCHEDULES
THREADS = 64
pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))


@pytest.fixture(scope="module")
def clusters() -> build.Harness:
    return build.build_harness(Path(build.__file__).with_name("clusters_harness.cpp"))


class Exchange(NamedTuple):
    """Arguments of exchange_kernel: for each row of blocks, block and thread, four numbers or two."""

    x: np.ndarray
    sums: np.ndarray
    next: np.ndarray
    echo: np.ndarray

    def assert_right(self, cluster_size: int) -> None:
        """The numbers are small integers, so that every order gives the same sums."""
        rows, blocks, threads, _ = self.x.shape
        grouped = self.x.reshape(rows, blocks // cluster_size, cluster_size, threads, 4)
        sums = np.broadcast_to(grouped.sum(2, keepdims=True), grouped.shape).reshape(self.x.shape)
        np.testing.assert_array_equal(self.sums, sums)
        np.testing.assert_array_equal(self.next, sums[..., 2:])
        np.testing.assert_array_equal(self.echo, sums)


def exchange(blocks: int = 8, rows: int = 2, threads: int = THREADS) -> Exchange:
    """Random numbers with room around them; the outputs hold NaN."""
    x = np.random.default_rng(blocks).integers(-99, 99, (rows, blocks, threads, 4)).astype(np.float32)
    empty = [np.full((*x.shape[:3], width), np.nan, np.float32) for width in (4, 2, 4)]
    return Exchange(*map(build.guarded, (x, *empty)))


def run(
    harness: build.Harness, e: Exchange, mistake: int = 0, shared: int | None = None, **options: object
) -> build.Statistics:
    rows, blocks, threads, _ = e.x.shape
    size = 16 * threads if shared is None else shared
    buffers = {"reads": {"in": e.x}, "writes": {"sums": e.sums, "next": e.next, "echo": e.echo}}
    return harness.run("run_exchange", *e, blocks, rows, threads, size, mistake, **buffers, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threads", [1, 40, THREADS])
@pytest.mark.parametrize("cluster_size", [1, 2, 4, 8])
def test_blocks_read_each_other(clusters: build.Harness, cluster_size: int, threads: int, schedule: str) -> None:
    e = exchange(threads=threads)
    run(clusters, e, schedule=schedule, seed=5, cluster_size=cluster_size)
    e.assert_right(cluster_size)


def test_as_many_threads_as_there_can_be(clusters: build.Harness) -> None:
    e = exchange(rows=1, threads=1024)
    run(clusters, e, cluster_size=8)
    e.assert_right(8)


def test_counts(clusters: build.Harness) -> None:
    counts = run(clusters, exchange(), cluster_size=4)
    assert counts.blocks == 16
    assert counts.barriers == 0
    assert counts.cluster_barriers == 4 * 4  # per cluster
    assert counts.cluster_reads == 16 * THREADS * (4 + 1)
    alone = run(clusters, exchange())
    assert (alone.cluster_barriers, alone.cluster_reads) == (16 * 4, 16 * THREADS * (1 + 1))


def test_a_harness_can_ask_for_clusters(clusters: build.Harness) -> None:
    e = exchange(rows=1)
    counts = clusters.run("run_pairs", *e, 8, THREADS)
    e.assert_right(2)
    assert counts.cluster_barriers == 4 * 4


OTHER = r"block \d of the cluster"
LANE = r"warp \d, lane \d+"
BARRIER = "(__syncthreads|cluster_sync)"
MISTAKES = {
    1: rf"race: (reads offset \d+ of shared memory of {OTHER}, (where a copy|which its warp)"
    rf"|writes offset \d+ of shared memory, which {OTHER} has read since the last cluster_sync)",
    2: rf"race: (reads offset \d+ of shared memory of {OTHER}, (where a copy|which its warp)"
    rf"|writes offset \d+ of shared memory, which {OTHER} has read since the last cluster_sync)",
    3: rf"reads offset \d+ of shared memory( of {OTHER})?, where a copy_async_16 of (its )?{LANE} is under way",
    4: rf"race: (writes offset \d+ of shared memory, which {OTHER} has read since the last cluster_sync"
    rf"|reads offset \d+ of shared memory of {OTHER}, which its {LANE} has written since)",
    5: rf"returns from the kernel, the last thread of its block, whose shared memory {OTHER} has read"
    rf"|reads shared memory of {OTHER}, which has returned from the kernel",
    6: rf"reads shared memory of {OTHER}, which has returned from the kernel"
    rf"|returns from the kernel, the last thread of its block, whose shared memory {OTHER} has read",
    7: r"reads 16 bytes at offset 1024 of shared memory; the block has 1024",
    8: r"reads 16 bytes at an address that is no multiple of 16",
    9: r"reads shared memory of block 4 of a cluster of 4",
    10: rf"waits in {BARRIER} at clusters.cuh:\d+ while block .* waits in {BARRIER} at clusters.cuh:\d+",
    11: r"waits in cluster_sync at clusters.cuh:\d+ while block .* waits in another one at clusters.cuh:\d+",
    12: r"race: (reads|writes) byte \d+ of 'sums', which was written by block number \d+ of this launch",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(clusters: build.Harness, mistake: int, schedule: str) -> None:
    with pytest.raises(build.EmulationError, match=MISTAKES[mistake]) as caught:
        run(clusters, exchange(), mistake, schedule=schedule, cluster_size=4)
    assert str(caught.value).startswith("block (")
    e = exchange()
    run(clusters, e, schedule=schedule, cluster_size=4)  # a failed launch leaves nothing behind
    e.assert_right(4)


@pytest.mark.parametrize("mistake", [1, 2])
def test_missing_barriers_show_as_wrong_results(clusters: build.Harness, mistake: int) -> None:
    """Also where races are not looked for."""
    e = exchange()
    run(clusters, e, mistake, races="ignored", cluster_size=4)
    with pytest.raises(AssertionError):
        e.assert_right(4)


def test_memory_of_a_block_that_has_returned_is_never_read(clusters: build.Harness) -> None:
    with pytest.raises(build.EmulationError, match="which has returned from the kernel"):
        run(clusters, exchange(), 6, races="ignored", cluster_size=4)


def test_alone_a_block_needs_no_other(clusters: build.Harness) -> None:
    """Without a cluster, cluster_sync is a barrier of the block, and a block may return at any time."""
    for mistake in (2, 4, 5):
        e = exchange()
        run(clusters, e, mistake)
        e.assert_right(1)


@pytest.mark.parametrize(
    ("blocks", "cluster_size", "message"),
    [
        (8, 0, "a cluster has 1 to 8 blocks, not 0"),
        (16, 16, "a cluster has 1 to 8 blocks, not 16"),
        (6, 4, "the grid has 6 blocks along x, no multiple of the 4 of a cluster"),
    ],
)
def test_launches_that_a_gpu_refuses(clusters: build.Harness, blocks: int, cluster_size: int, message: str) -> None:
    with pytest.raises(build.EmulationError, match=message):
        run(clusters, exchange(blocks), cluster_size=cluster_size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or gpu.nvcc() is None, reason="needs a CUDA device and nvcc")
@pytest.mark.parametrize("cluster_size", [1, 2, 4, 8])
def test_a_gpu_agrees(cluster_size: int) -> None:
    if cluster_size > 1 and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("clusters need compute capability 9.0")
    e = exchange()
    there = Exchange(*gpu.run("exchange_on_gpu", e, e.x.shape[1], e.x.shape[0], THREADS, cluster_size))
    there.assert_right(cluster_size)
