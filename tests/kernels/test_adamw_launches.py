"""How AdamW's kernels are launched: chunks, tiles, CUDA graphs; how they compile; what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from adamw_cases import SHAPES, check, example, gradients, group_of, on_cuda, on_triton, put, randn
from compilation import compile_report, needs_triton
from fused_cases import BFLOAT, DOUBLE, HALF, Runner

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.adamw import AdamWConfig, Tables, adamw, gradient_norm, plan
from fastmetro_kernels.adamw.plan import CONFIGS, PINNED, SHIFT


@on_triton
def test_three_launches_for_any_number_of_tensors(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmetro_kernels.adamw import triton

    launched: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    names = ["adamw_norm_kernel", "adamw_factors_kernel", "adamw_update_kernel"]
    for name in names:
        monkeypatch.setattr(triton, name, Counted(name))
    groups = [example(runner, [(3,)] * 70), example(runner, [(5000,)] * 3)]
    adamw(groups, max_norm=1.0, backend="triton")
    assert launched == names
    launched.clear()
    adamw(groups, backend="triton")
    assert launched == names[1:]
    launched.clear()
    gradient_norm(groups[0].gradients, backend="triton")
    assert launched == names[:2]


@on_triton
def test_more_tensors_and_chunks_than_are_taken_at_a_time(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmetro_kernels.adamw import triton

    for name in ("PARTS", "TENSORS"):
        monkeypatch.setattr(triton, name, 16)
    shapes = [(1 + number % 5,) for number in range(37)]
    check(runner, [example(runner, shapes)], lambda step: gradients(runner, shapes, step), 0.5, steps=2)


@on_triton
@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: "x".join(map(str, one)))
def test_every_tile(runner: Runner, config: AdamWConfig) -> None:
    expected, got = (example(runner) for _ in range(2))
    norms = [adamw([expected], max_norm=0.2, backend="triton"),
             adamw([got], max_norm=0.2, config=config, backend="triton")]  # fmt: skip
    torch.testing.assert_close(norms[1], norms[0])
    for name in ("parameters", "exp_avgs", "exp_avg_sqs"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))
    torch.testing.assert_close(gradient_norm(got.gradients, config=config, backend="triton"), norms[0])


@on_triton
def test_beyond_2_to_the_31(runner: Runner) -> None:
    """A chunk that begins there: of a table that claims such a tensor, whose last numbers alone are in memory."""
    from fastmetro_kernels.adamw import triton

    behind = randn(5, seed=2, device=runner.device)
    size = 2**31 + 3 * PINNED.chunk + 5
    rows = [[behind.data_ptr() - 4 * (size - 5)], [0], [size]]
    table = torch.tensor(rows, dtype=torch.int64, device=runner.device)
    chunks = torch.from_numpy(plan.chunks([size], PINNED.chunk))[-1:].to(runner.device)
    partials = torch.zeros(1, device=runner.device)
    triton.adamw_norm_kernel[(1,)](
        chunks, table, partials, 1, SHIFT=SHIFT, CHUNK=PINNED.chunk, BLOCK=PINNED.block, EARLY=False,
        num_warps=PINNED.warps,
    )  # fmt: skip
    torch.testing.assert_close(partials, behind.square().sum()[None])


@on_cuda
def test_a_large_tensor(runner: Runner) -> None:
    """More than 2^31 numbers, of which the last few are not 0."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    gradient = torch.zeros(2**31 + 4099, dtype=BFLOAT, device="cuda")
    gradient[-3:] = torch.tensor([3.0, 4.0, 12.0])
    assert float(gradient_norm([gradient], backend=runner.backend)) == 13.0


@pytest.mark.parametrize("sizes", [[], [0], [1], [4096, 0, 4097, 1], [3 * 4096], [2**31 + 5, 7]])
def test_chunks_cover_every_number_once(sizes: list[int]) -> None:
    found = plan.chunks(sizes, 4096)
    tensors, numbers = found >> SHIFT, found & ((1 << SHIFT) - 1)
    for tensor, size in enumerate(sizes):
        own = numbers[tensors == tensor]
        assert np.array_equal(own, np.arange(-(-size // 4096)))
    assert found.dtype == np.int64 and np.array_equal(tensors, np.sort(tensors))


@on_cuda
def test_in_a_graph(runner: Runner) -> None:
    """Replays with other gradients and another rate are eager steps; eager steps between them do no harm."""
    if runner.backend != "triton":
        pytest.skip("Triton alone")
    captured, eager = (example(runner) for _ in range(2))
    tables, others = Tables(), Tables()
    for group, own in ((captured, tables), (eager, others)):
        adamw([group], max_norm=0.3, tables=own, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        norm = adamw([captured], max_norm=0.3, tables=tables, backend="triton")
    bystander = example(runner)
    for step in range(12):
        for group in (captured, eager):
            put(group, gradients(runner, SHAPES, step))
            group.rate.fill_(0.01 / (1 + step))  # type: ignore[union-attr]
        adamw([bystander], max_norm=0.3, tables=tables, backend="triton")
        graph.replay()
        expected = adamw([eager], max_norm=0.3, tables=others, backend="triton")
        assert torch.equal(norm, expected)  # type: ignore[arg-type]
        for name in ("parameters", "exp_avgs", "exp_avg_sqs", "steps"):
            assert all(map(torch.equal, getattr(captured, name), getattr(eager, name))), (step, name)


@on_cuda
def test_a_graph_needs_a_step_before(runner: Runner) -> None:
    if runner.backend != "triton":
        pytest.skip("Triton alone")
    group = example(runner)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="no step was made with these tensors before"), torch.cuda.graph(graph):
        adamw([group], backend="triton")


@on_cuda
def test_steps_that_nobody_waits_for(runner: Runner) -> None:
    """Gradients at new addresses in each step, while the device is behind: tables are not overwritten too early."""
    if runner.backend != "triton":
        pytest.skip("Triton alone")
    slow, patient = (example(runner) for _ in range(2))
    tables, others = Tables(), Tables()
    drawn = [gradients(runner, SHAPES, step) for step in range(20)]
    for found in drawn:
        adamw([patient._replace(gradients=found)], max_norm=0.3, tables=others, backend="triton")
        torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    for found in drawn:
        adamw([slow._replace(gradients=found)], max_norm=0.3, tables=tables, backend="triton")
    assert all(map(torch.equal, slow.parameters, patient.parameters))


@needs_triton
@pytest.mark.parametrize("capability", [90, 80])
def test_kernels_compile_without_spilling(capability: int) -> None:
    found, pinned = compile_report("compile_adamw.py", capability), "x".join(map(str, PINNED))
    assert {f"norm {pinned}", f"update {pinned}", "factors norm update", "factors update", "factors norm"} <= {*found}
    for name, used in found.items():
        # For compute capability 8.0 a tile of eight warps that is not pinned keeps two words in memory.
        assert used["stack"] <= (0 if capability >= 90 or name.endswith(pinned) else 8), (name, used)
        assert used["waits"] == (capability >= 90), (name, used)
        if name.startswith("norm"):
            assert used["wide_loads"] >= 2, (name, used)
        elif name.startswith("update"):
            assert used["wide_loads"] >= 4 and used["wide_stores"] >= 3, (name, used)


P = [torch.zeros(3, 4)]
GROUP = group_of(P, [torch.zeros(3, 4)])
STRIDED = torch.zeros(3, 8)[:, ::2]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"gradients": []}, {}, ValueError, r"groups\[0\].gradients must be 1 like the parameters, got 0"),
        ({"gradients": [torch.zeros(4, 3)]}, {}, ValueError, r"gradients\[0\] must be \[3, 4\] like the parameter"),
        ({"gradients": [torch.zeros(3, 4).int()]}, {}, TypeError, r"gradients\[0\] must be one of float32, bfloat16"),
        ({"gradients": [torch.zeros(3, 4).double()]}, {}, TypeError, r"gradients\[0\]"),
        ({"gradients": [None]}, {}, TypeError, r"gradients\[0\] must be a tensor, got NoneType"),
        ({"parameters": [P[0].half()]}, {}, TypeError, r"parameters\[0\] must be one of float32, float64"),
        ({"parameters": [STRIDED]}, {}, ValueError, r"must fill its memory, without holes or overlaps"),
        ({"parameters": [torch.zeros(1, 4).expand(3, 4)]}, {}, ValueError, r"must fill its memory"),
        ({"exp_avgs": [torch.zeros(4, 3).T]}, {}, ValueError, r"exp_avgs\[0\] must have strides \[4, 1\]"),
        ({"exp_avg_sqs": [P[0].double()]}, {}, TypeError, r"exp_avg_sqs\[0\]"),
        ({"halves": [P[0]]}, {}, TypeError, r"halves\[0\] must be one of bfloat16, float16"),
        ({"halves": [torch.zeros(4, 3, dtype=HALF).T]}, {}, ValueError, r"halves\[0\] must have strides"),
        ({"steps": [torch.zeros(2)]}, {}, ValueError, r"steps\[0\] must be one number, got \[2\]"),
        ({"steps": [torch.zeros((), dtype=torch.int64)]}, {}, TypeError, r"steps\[0\]"),
        ({"rate": -1.0}, {}, ValueError, "rate must be finite and at least 0"),
        ({"rate": torch.zeros(2)}, {}, ValueError, r"rate must be one number, got \[2\]"),
        ({"rate": torch.zeros((), dtype=DOUBLE)}, {}, TypeError, "rate must be one of float32"),
        ({"betas": (0.9, 1.0)}, {}, ValueError, r"betas must be two numbers, at least 0 and below 1"),
        ({"epsilon": math.nan}, {}, ValueError, "epsilon must be finite"),
        ({"weight_decay": math.inf}, {}, ValueError, "weight_decay must be finite"),
        ({}, {"max_norm": -1.0}, ValueError, "max_norm must be at least 0, got -1"),
        ({}, {"max_norm": math.nan}, ValueError, "max_norm must be at least 0, got nan"),
        ({}, {"max_norm": torch.ones(())}, TypeError, "max_norm must be a number or None"),
        ({}, {"config": (4096, 512, 4)}, TypeError, "config must be a AdamWConfig, got tuple"),
        ({}, {"config": AdamWConfig(4096, 500, 4)}, ValueError, "block must be a power of two from 64 to 65536"),
        ({}, {"config": AdamWConfig(1024, 2048, 4)}, ValueError, "block must be at most chunk"),
        ({}, {"config": AdamWConfig(1024, 512, 3)}, ValueError, "warps must be one of"),
        ({}, {"backend": "cuda"}, ValueError, "backend='cuda' is not known"),
    ],
)
def test_refused(change: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adamw([GROUP._replace(**change)], **options)


def test_refused_altogether() -> None:
    with pytest.raises(TypeError, match=r"groups\[1\] must be an AdamWGroup, got list"):
        adamw([GROUP, []])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"gradients\[1\] must be one of float32"):
        gradient_norm([P[0], P[0].int()])
    double = group_of([P[0].double()], [P[0].double()])
    with pytest.raises(BackendUnavailable, match="float64 is not supported"):
        adamw([double], backend="triton")
    adamw([double], max_norm=1.0)
