"""The emulator of CUDA kernels: its instructions are right, its worked example too, and each usual mistake is caught.

On a machine with a GPU and nvcc the same kernels run on both, and the results are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from emulation import build, gpu

HERE = Path(build.__file__).parent
SCHEDULES = build.SCHEDULES
pytestmark = pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))


@pytest.fixture(scope="module")
def example() -> build.Harness:
    return build.build_harness(HERE / "example_harness.cpp")


@pytest.fixture(scope="module")
def checks() -> build.Harness:
    return build.build_harness(HERE / "checks_harness.cpp")


class Product(NamedTuple):
    """Arguments of the example: c[m, n] = a[rows] b, with the sums of c over tiles of 64 columns."""

    a: np.ndarray
    rows: np.ndarray
    b: np.ndarray
    c: np.ndarray
    sums: np.ndarray

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """c and sums in float64."""
        a, b = (_as_float64(x) for x in (self.a, self.b))
        c = np.where(self.rows[:, None] < 0, 0.0, a[self.rows]) @ b
        padded = np.pad(c, ((0, 0), (0, -c.shape[1] % 64)))
        return c, padded.reshape(len(c), -1, 64).sum(-1)

    def assert_right(self, tolerance: float = 1e-5) -> None:
        """Sums of k products of numbers around 1, in float32."""
        for got, want in zip((self.c, self.sums), self.expected(), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * self.b.shape[0])


def _as_float64(x: np.ndarray) -> np.ndarray:
    """Of float16, or of the bits of bfloat16 in uint16."""
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if x.dtype == np.uint16 else x.astype(float)


def product(m: int = 70, n: int = 136, k: int = 200, bfloat: bool = False) -> Product:
    """Random inputs with room around them; the outputs hold NaN."""
    random = np.random.default_rng(m + n + k)
    a, b = random.standard_normal((90, k)), random.standard_normal((k, n))
    if bfloat:
        a, b = ((x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))
    else:
        a, b = (x.astype(np.float16) for x in (a, b))
    rows = random.integers(-1, 90, m).astype(np.int32)
    empty = [np.full(shape, np.nan, np.float32) for shape in ((m, n), (m, -(-n // 64)))]
    return Product(*map(build.guarded, (a, rows, b, *empty)))


def run_example(harness: build.Harness, p: Product, mistake: int = 0, **options: object) -> build.Statistics:
    sizes = (len(p.rows), p.b.shape[1], p.b.shape[0], p.a.dtype == np.uint16, mistake)
    buffers = {"reads": {"a": p.a, "rows": p.rows, "b": p.b}, "writes": {"c": p.c, "sums": p.sums}}
    return harness.run("run_example", *p, *sizes, **buffers, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bfloat", [False, True], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", [(70, 136, 200), (1, 8, 8), (33, 64, 65 * 8)])
def test_example(example: build.Harness, sizes: tuple[int, int, int], bfloat: bool, schedule: str) -> None:
    p = product(*sizes, bfloat=bfloat)
    run_example(example, p, schedule=schedule, seed=3)
    p.assert_right()


def test_counts(example: build.Harness) -> None:
    counts = run_example(example, product(64, 128, 128))
    blocks, steps, warps = 4, 2, 2
    assert counts.blocks == blocks
    assert counts.barriers == blocks * 2 * steps
    assert counts.shuffles == blocks * warps * 4
    assert counts.multiply_adds == blocks * warps * steps * 4 * 8
    assert counts.matrix_loads == blocks * warps * steps * 4 * 5
    assert counts.copies + counts.zero_fills == blocks * steps * (32 + 64) * 8
    assert counts.global_write_bytes == 64 * 128 * 4 + 64 * 2 * 4
    assert counts.conflict_rate == 0


def test_bank_conflicts_are_counted(example: build.Harness) -> None:
    p = product()
    assert run_example(example, p, mistake=10).conflict_rate == 7  # all eight rows of a matrix in the same banks
    p.assert_right()


EXAMPLE_MISTAKES = {
    1: r"reads offset \d+ of shared memory, where a copy_async_16 of warp \d, lane \d+ is under way",
    2: r"race: reads offset \d+ of shared memory, which warp \d, lane \d+ has written since the last __syncthreads",
    3: r"race: writes offset \d+ of shared memory, which (warp|lane) \d+ has read since the last __syncthreads",
    4: r"writes 16 bytes at offset \d+ of shared memory; the block has 24576",
    5: r"lane 5: returns from the kernel while lanes [0-9, -]+ wait for it in a shuffle at example.cuh:\d+",
    6: r"load_matrices: lanes 5 have returned from the kernel|returns from the kernel while lanes .* wait for it",
    7: r"waits in __syncthreads at example.cuh:\d+ while block .*, warp 0, lane 0 waits in another one",
    8: r"reads 16 bytes outside of all buffers: \d+ bytes past the last of 'b' \(54400 bytes\)",
    9: r"race: writes byte \d+ of '(c|sums)', which was written by block number \d+ of this launch",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mistake", EXAMPLE_MISTAKES)
def test_mistakes_are_caught(example: build.Harness, mistake: int, schedule: str) -> None:
    with pytest.raises(build.EmulationError, match=EXAMPLE_MISTAKES[mistake]) as caught:
        run_example(example, product(), mistake, schedule=schedule)
    assert str(caught.value).startswith("block (") and "example.cuh:" in str(caught.value)
    p = product()
    run_example(example, p, schedule=schedule)  # a failed launch leaves nothing behind
    p.assert_right()


@pytest.mark.parametrize(("mistake", "schedule"), [(1, "forward"), (2, "forward"), (2, "reverse"), (3, "random")])
def test_missing_waits_and_barriers_show_as_wrong_results(example: build.Harness, mistake: int, schedule: str) -> None:
    """Also where races are not looked for."""
    p = product()
    run_example(example, p, mistake, schedule=schedule, races="ignored")
    with pytest.raises(AssertionError):
        p.assert_right()


class Instructions(NamedTuple):
    """Inputs of instructions_kernel, and its output [slots, 32]."""

    words: np.ndarray
    matrix: np.ndarray
    out: np.ndarray


def instructions() -> Instructions:
    random = np.random.default_rng(7)
    words = random.integers(0, 2**32, 32, dtype=np.uint32)
    words[:3] = 0, 1, 0x80000000
    matrix = random.integers(-8, 9, (32, 8)).astype(np.float16)
    return Instructions(*map(build.guarded, (words, matrix, np.zeros((48, 32), np.uint32))))


def as_halves(words: np.ndarray) -> np.ndarray:
    """float16 [..., 2], low half first."""
    return np.ascontiguousarray(words)[..., None].view(np.float16)


def test_shuffles_and_votes(checks: build.Harness) -> None:
    data = instructions()
    checks.run("run_instructions", *data, reads={"w": data.words, "m": data.matrix}, writes={"out": data.out})
    w, lane, out = data.words, np.arange(32), data.out
    expected = [
        w[lane ^ 5],
        w[np.where(lane < 16, lane, lane - 16)],  # lanes of a later segment are out of reach
        w[lane * 7 % 32],
        w[lane // 8 * 8 + 3],
        w[np.where(lane % 8 >= 3, lane - 3, lane)],
        w[np.where(lane % 16 + 5 < 16, lane + 5, lane)],
        w[lane ^ 1] ^ (lane ^ 1).astype(np.uint32),
        w[lane ^ 2] & 0xFFFF,
        np.uint32(int("".join(str(x & 1) for x in w[::-1]), 2)),
        0,
        1,
        np.uint32(int(w.astype(np.int64).sum()) % 2**32),
        w.view(np.int32).min().view(np.uint32),
        w.max(),
        np.bitwise_or.reduce(w),
    ]
    for slot, want in enumerate(expected):
        np.testing.assert_array_equal(out[slot], np.broadcast_to(want, 32), err_msg=f"slot {slot}")


def test_integers_and_conversions(checks: build.Harness) -> None:
    data = instructions()
    checks.run("run_instructions", *data)
    w, lane = [int(x) for x in data.words], np.arange(32)
    signed = data.words.view(np.int32)
    both = [x | 0x01234567 << 32 for x in w]
    expected = [
        [x.bit_count() for x in w],
        [32 - x.bit_length() for x in w],
        [(x & -x).bit_length() for x in w],
        [int(f"{x:032b}"[::-1], 2) for x in w],
        [x * 0x9E3779B9 >> 32 for x in w],
        [sum((x >> 8 * byte & 0xFF) << 8 * i for i, byte in enumerate((0, 4, 1, 5))) for x in both],
        [(0x89ABCDEF << 32 | x) << 7 >> 32 & 0xFFFFFFFF for x in w],
        np.maximum(signed, -5).view(np.uint32),
        np.fmax(data.words.view(np.float32), np.float32(1)).view(np.uint32),
    ]
    for slot, want in enumerate(expected, 15):
        np.testing.assert_array_equal(data.out[slot], np.array(want, np.uint32), err_msg=f"slot {slot}")
    halves, bfloats = (torch.from_numpy(x.copy().view(np.int16)).view(32, 2) for x in data.out[24:26])
    numbers = torch.from_numpy(signed.astype(np.float32))
    inverse = torch.from_numpy((1 / (1 + lane)).astype(np.float32))
    for got, scale, dtype in ((halves, np.float32(1e-5), torch.float16), (bfloats, 1.0, torch.bfloat16)):
        want = torch.stack([numbers * float(scale), inverse], 1).to(dtype)
        assert torch.equal(got.view(dtype), want)


def fragments(words: np.ndarray, rows: int, columns: int, transposed: bool = False) -> np.ndarray:
    """[rows, columns] from registers [count, 32], which hold 8 x 8 blocks, first downwards, then to the right."""
    full = np.empty((rows, columns))
    for register, numbers in enumerate(words):
        top, left = register * 8 % rows, register * 8 // rows * 8
        for lane in range(32):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                full[top + (column if transposed else row), left + (row if transposed else column)] = numbers[
                    lane, half
                ]
    return full


def test_matrix_instructions(checks: build.Harness) -> None:
    data = instructions()
    checks.run("run_instructions", *data)
    rows, columns, c, d = data.out[26:30], data.out[30:34], data.out[34:38], data.out[38:42]
    # Four matrices one under the other; transposed, a register holds two numbers of the same column.
    np.testing.assert_array_equal(fragments(as_halves(rows), 32, 8), data.matrix)
    np.testing.assert_array_equal(fragments(as_halves(columns), 32, 8, transposed=True), data.matrix)

    def accumulators(words: np.ndarray) -> np.ndarray:
        return fragments(np.stack([words[:2], words[2:]]).transpose(0, 2, 1), 16, 8)

    start = np.array([np.arange(32.0), np.full(32, 2.0), np.full(32, 3.0), -np.arange(32.0)])
    a = fragments(as_halves(rows), 16, 16)
    b = fragments(as_halves(columns[[0, 3]]), 16, 8, transposed=True)
    np.testing.assert_array_equal(accumulators(c.view(np.float32)), accumulators(start) + a @ b)

    small = torch.tensor([[lane - 16, lane % 5] for lane in range(32)], dtype=torch.bfloat16).view(torch.int16).numpy()
    small = np.ascontiguousarray(small).view(np.uint32)[:, 0]
    numbers = _as_float64(np.stack([small, small + 0x80, small ^ 0x80008000, small])[..., None].view(np.uint16))
    a, b = fragments(numbers, 16, 16), fragments(numbers[[0, 2]], 16, 8, transposed=True)
    np.testing.assert_allclose(accumulators(d.view(np.float32)), a @ b, rtol=1e-6)


def assert_fast_functions(data: Instructions) -> None:
    """exp2, log2 and the reciprocal, to the precision that a GPU's have."""
    x = (data.words >> 8).astype(np.float64) * 2.0**-20 + 2.0**-10
    got = data.out[42:46].view(np.float32).astype(np.float64)
    np.testing.assert_allclose(got[0], np.exp2(x - 8), rtol=1e-6)
    np.testing.assert_array_equal(got[1], 0)
    np.testing.assert_allclose(got[2], np.log2(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got[3], 1 / x, rtol=1e-6)


def test_fast_functions(checks: build.Harness) -> None:
    data = instructions()
    checks.run("run_instructions", *data)
    assert_fast_functions(data)


def run_neighbours(
    harness: build.Harness, mistake: int, threads: int = 64, shared: int | None = None, **options: object
) -> tuple[np.ndarray, np.ndarray]:
    """(got, expected) of neighbours_kernel with 3 blocks."""
    x = build.guarded(np.arange(1, threads + 1, dtype=np.float32))
    out = build.guarded(np.full((3, threads), np.nan, np.float32))
    size = 4 * threads if shared is None else shared
    buffers = {"reads": {"in": x}, "writes": {"out": out}}
    harness.run("run_neighbours", x, out, threads, 3, size, mistake, **buffers, **options)
    thread = np.arange(threads)
    others = [1 << i for i in range((threads - 1).bit_length())]
    return out, np.broadcast_to(x + sum(x[thread ^ other] for other in others), (3, threads))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threads", [1, 16, 32, 64, 1024])
def test_plain_shared_memory(checks: build.Harness, threads: int, schedule: str) -> None:
    got, want = run_neighbours(checks, 0, threads, schedule=schedule)
    np.testing.assert_array_equal(got, want)


def test_a_barrier_of_the_warp_orders_its_lanes(checks: build.Harness) -> None:
    got, want = run_neighbours(checks, 1, threads=32)  # no __syncthreads
    np.testing.assert_array_equal(got, want)
    with pytest.raises(build.EmulationError, match=r"race: .* which warp \d.* has (written|read) since"):
        run_neighbours(checks, 1, threads=64)


PLAIN_MISTAKES = {
    2: r"race: .*lane \d+ has (written|read) since the last __syncthreads and __syncwarp",
    3: r"race: .*lane \d+ has (written|read) since the last __syncthreads and __syncwarp",
    4: r"lane 31: writes 4 bytes at offset 128 of shared memory; the block has 128",
    5: r"writes 4 bytes at an address that is no multiple of 4",
    7: r"index past the end of an array",
    8: r"overflow in a sum",
    9: r"writes to 'in', which is read-only",
    10: r"lane \d+: a shuffle reads lane 20, which takes no part",
}


@pytest.mark.parametrize("mistake", PLAIN_MISTAKES)
def test_plain_mistakes_are_caught(checks: build.Harness, mistake: int) -> None:
    with pytest.raises(build.EmulationError, match=PLAIN_MISTAKES[mistake] + r".*\(checks.cuh:\d+\)"):
        run_neighbours(checks, mistake, threads=32)


def test_lanes_may_go_unchecked(checks: build.Harness) -> None:
    run_neighbours(checks, 3, threads=32, races="between_warps")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_nobody_wrote_is_nan(checks: build.Harness, schedule: str) -> None:
    got, want = run_neighbours(checks, 6, threads=32, schedule=schedule)
    readers = [3, 3 ^ 1, 3 ^ 2, 3 ^ 4, 3 ^ 8, 3 ^ 16]
    assert np.isnan(got[:, readers]).all()
    np.testing.assert_array_equal(np.delete(got, readers, 1), np.delete(want, readers, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 1025}, "a block has 1 to 1024 threads, not 1025"),
        ({"threads": 0}, "a block has 1 to 1024 threads, not 0"),
        ({"shared": 232449}, "a block asks for 232449 bytes of shared memory; there are 232448"),
        ({"shared": 166913, "shared_limit": 163 * 1024}, "there are 166912"),
    ],
)
def test_launches_that_a_gpu_refuses(checks: build.Harness, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(build.EmulationError, match=message):
        run_neighbours(checks, 0, **arguments)


def test_the_same_kernels_are_device_code(tmp_path: Path) -> None:
    if gpu.nvcc() is None:
        pytest.skip("needs nvcc")
    for target in ("sm_80", "sm_90a"):
        made = tmp_path / f"{target}.cubin"
        gpu.compile_kernels(f"-arch={target}", "-cubin", "-o", str(made))
        assert made.stat().st_size > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or gpu.nvcc() is None, reason="needs a CUDA device and nvcc")
def test_a_gpu_agrees(example: build.Harness, checks: build.Harness) -> None:
    data = instructions()
    checks.run("run_instructions", *data)
    there = Instructions(*gpu.run("instructions_on_gpu", data))
    np.testing.assert_array_equal(there.out[:38], data.out[:38])
    # Its sums of products keep no numbers that are tiny beside the others.
    got, want = (x.out[38:42].view(np.float32) for x in (there, data))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert_fast_functions(there)
    for bfloat in (False, True):
        p = product(bfloat=bfloat)
        Product(*gpu.run("example_on_gpu", p, len(p.rows), p.b.shape[1], p.b.shape[0], bfloat)).assert_right()
