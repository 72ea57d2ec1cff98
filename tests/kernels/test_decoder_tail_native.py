"""The native decoder tail on a GPU of compute capability 9.0; its kernel is also in test_decoder_tail_emulated.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_tail_cases import Inputs, exact_and_plain, inputs
from fused_cases import BFLOAT, FLOAT, HALF, Runner, assert_within_budget, poisoned_memory, surrounded
from torch import Tensor

from fastmetro_kernels import BackendUnavailable
from fastmetro_kernels.backends import hopper_reasons
from fastmetro_kernels.fused import TailConfig, TailWeights, decoder_tail
from fastmetro_kernels.fused.decoder_tail import native

WHY_NOT = hopper_reasons(native.OPERATOR, torch.device("cuda"), HALF) if torch.cuda.is_available() else ["needs a GPU"]
on_hopper = pytest.mark.skipif(bool(WHY_NOT), reason="; ".join(WHY_NOT))
runners = pytest.mark.parametrize("runner", [Runner("cuda", "native", dtype) for dtype in (HALF, BFLOAT)], ids=str)
CUDA = Runner("cuda", "native", HALF)
# Samples, queries, keys, hidden features: fewer tiles than groups, a little more than one each, many.
SIZES = [
    (1, 1, 1, 64),
    (1, 445, 49, 512),
    (3, 65, 64, 128),
    (40, 445, 49, 512),
    (256, 445, 49, 512),
    (19, 1000, 20, 64),
]


def run(x: Inputs, **options: Any) -> Tensor:
    return decoder_tail(*x, feed_forward_epsilon=1e-3, backend="native", **options)


def check(x: Inputs, **options: Any) -> Tensor:
    """The result, held against float64."""
    with poisoned_memory():
        got = run(x, **options)
    assert got.is_contiguous() and got.dtype == x[0].dtype
    exact, plain = exact_and_plain(x, options.get("scale"))
    rounding = torch.finfo(got.dtype).eps / 2 * exact.abs() + 64 * torch.finfo(FLOAT).eps * (1 + exact.abs())
    assert_within_budget(got, exact, plain, rounding)
    return got


@on_hopper
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@runners
def test_against_float64(runner: Runner, sizes: tuple[int, int, int, int]) -> None:
    """Three times: a race would show."""
    samples, queries, keys, hidden = sizes
    x = inputs(runner, samples, queries, keys, 8, 16, hidden)
    got = check(x)
    for constant in (False, True):
        assert torch.equal(run(x, constant_weights=constant), got)


@on_hopper
@pytest.mark.parametrize(("samples", "queries"), [(0, 50), (2, 0)])
def test_nothing_to_do(samples: int, queries: int) -> None:
    assert run(inputs(CUDA, samples, queries, 49, 8, 16, 64)).shape == (samples, queries, 128)


@on_hopper
def test_any_strides_and_scales() -> None:
    tokens, attended, k, v, weights = inputs(CUDA, 3, 90, 11, 8, 16, 128)
    wide = torch.full((3, 90, 400), torch.nan, dtype=HALF, device="cuda")
    wide[..., 20:148] = attended
    check((tokens[:1].expand(3, -1, -1), wide[..., 20:148], k, v, weights), scale=-0.5)
    with pytest.raises(BackendUnavailable, match="rows of v must lie whole in memory and begin at a multiple of 16"):
        run((tokens, attended, k, surrounded(v), weights))


@on_hopper
def test_many_launches_on_two_streams() -> None:
    """Each reads what the one before wrote, and starts before that one has ended."""
    tokens, attended, k, v, weights = inputs(CUDA, 32, 445, 49, 8, 16, 512)
    expected = [tokens]
    for _ in range(3):
        expected.append(run((expected[-1], attended, k, v, weights)))
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(100):
        for stream in streams:
            with torch.cuda.stream(stream):
                x = tokens
                for _ in range(3):
                    x = run((x, attended, k, v, weights), constant_weights=True)
                found.append(x)
    torch.cuda.synchronize()
    assert all(torch.equal(one, expected[-1]) for one in found)


@on_hopper
def test_opcheck_compile_and_graphs() -> None:
    x = inputs(CUDA, 2, 70, 49, 8, 16, 128)
    operator = torch.ops.fastmetro_kernels.decoder_tail_native.default
    torch.library.opcheck(operator, (*x[:4], *x[4], 0.25, 1e-5, 1e-3, False, True))
    torch._dynamo.reset()
    compiled = torch.compile(lambda tokens: 2 * run((tokens, *x[1:])), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x[0]), 2 * run(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    x[0].copy_(x[0].flip(0).clone())
    graph.replay()
    assert torch.equal(captured, run(x))


@on_hopper
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
def test_auto_takes_it_where_it_can(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    operator = native.decoder_tail_native

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return operator(*given)

    monkeypatch.setattr(native, "decoder_tail_native", counted)
    runner = Runner("cuda", "native", dtype)
    tile = TailConfig(16, 16, 4, 1)
    for heads, config, expected in ((8, None, dtype != FLOAT), (4, None, False), (8, tile, False)):
        calls.clear()
        x = inputs(runner, 2, 70, 49, heads, 16, 128)
        decoder_tail(*x, config=config)
        assert bool(calls) == expected, (heads, config)


def test_what_it_cannot_take_is_named() -> None:
    cpu = Runner("cpu", "native", FLOAT)
    tokens, attended, k, v, weights = inputs(cpu, 1, 5, 70, 4, 16, 40)
    with pytest.raises(BackendUnavailable, match="native: runs on CUDA devices only") as found:
        run((tokens, attended, k, v, weights))
    for reason in (
        "takes 8 heads of 16 features, got 4 of 16",
        "takes up to 64 keys, got 70",
        "takes hidden features in multiples of 64, got 40",
    ):
        assert reason in str(found.value)
    odd = TailWeights(*(one.flatten().repeat(2)[1 : one.numel() + 1].view(one.shape) for one in weights))
    assert "out_weight must be aligned to 16 bytes" in native.reasons(tokens, attended, k, v, odd)
    with pytest.raises(ValueError, match="config is of the Triton kernel, and backend is 'native'"):
        run((tokens, attended, k, v, weights), config=TailConfig(64, 64, 4, 2))
    with pytest.raises(ValueError, match="backend='apex' is not known"):
        decoder_tail(tokens, attended, k, v, weights, backend="apex")


def test_the_choice_is_traced_without_graph_breaks() -> None:
    """A traced tensor has no address: the op looks at it when it runs."""
    tokens, attended, k, v, weights = inputs(Runner("cpu", "native", FLOAT), 2, 5, 9, 8, 16, 64)
    torch._dynamo.reset()

    def count(tokens: Tensor) -> Tensor:
        return tokens * len(native.reasons(tokens, attended, k, v, weights))

    compiled = torch.compile(count, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens), count(tokens))
