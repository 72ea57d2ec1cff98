"""The end of a bottleneck block in one kernel against float64; without a GPU something pretends to be the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ending_cases import Call, check, exact, make, op_arguments, pretend, results
from fused_cases import poisoned_memory
from torch import Tensor

from fastmetro_kernels.backends import BackendUnavailable
from fastmetro_kernels.convolution import choose_ending, convolution, convolution_ending, ending, ending_problem
from fastmetro_kernels.convolution.ending_configs import ALONE, FOLLOWED, FOLLOWING, JOINED, MEASURED, MODES, WIDENED

HALVES = (torch.float16, torch.bfloat16)
WHY_NOT = ending.ending_reasons(torch.device("cuda"), torch.float16)
GPU = pytest.mark.skipif(bool(WHY_NOT), reason="; ".join(WHY_NOT))
SMALL = (3, 7, 9)
SIZES = [(1, 1, 1), (2, 8, 8), SMALL]
LARGE = [(5, 56, 56), (2, 57, 13), (40, 56, 56)]
modes = pytest.mark.parametrize("mode", MODES)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """CPUs have the native op, too; the configurations of its calls."""
    calls: list[int] = []

    def op(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.extend(arguments[-1])
        return pretend(*arguments)

    here = ending.ending_reasons
    monkeypatch.setattr(ending, "ending_reasons", lambda *of: [] if of[0].type == "cpu" else here(*of))
    with torch.library._scoped_library("fastmetro_kernels", "IMPL") as library:
        library.impl(ending.OPERATOR, op, "CPU")
        yield calls


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def kernel(request: pytest.FixtureRequest, pretended: list[int]) -> str:
    """Devices that have the native op."""
    return request.param


@pytest.mark.parametrize("size", [*SIZES, (2, 57, 13)], ids=str)
@modes
def test_reference(mode: str, size: tuple[int, int, int]) -> None:
    call = make(size, mode, "cpu", torch.float32)
    found = convolution_ending(*call)
    for got, want in zip(results(found), exact(call), strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@halves
@modes
def test_the_reference_is_one_convolution_after_the_other(mode: str, dtype: torch.dtype) -> None:
    call = make(SMALL, mode, "cpu", dtype)
    middle = convolution(call.x, call.weights)
    want = [convolution(middle, call.last, residual=call.residual, second=call.second)]
    if call.following is not None:
        want.append(convolution(want[0], call.following))
    found = results(convolution_ending(*call, backend="reference"))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    for got, true in zip(found, exact(call), strict=True):
        assert float((got.double() - true).norm()) <= torch.finfo(dtype).eps * float(true.norm())


@pytest.mark.parametrize("size", SIZES, ids=str)
@halves
@modes
def test_kernel(mode: str, dtype: torch.dtype, size: tuple[int, int, int], kernel: str) -> None:
    _compare(make(size, mode, kernel, dtype))


@GPU
@pytest.mark.parametrize("size", LARGE, ids=str)
@halves
@modes
def test_kernel_with_many_tiles(mode: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    _compare(make(size, mode, "cuda", dtype))


def _compare(call: Call) -> None:
    """With memory that was NaN, by both starts; inputs stay as they are."""
    before = [one.clone() for one in call if isinstance(one, Tensor)]
    found = []
    for early in (True, False):
        with poisoned_memory():
            blocks = [call.x.new_full((len(call.x), *call.x.shape[2:], depth), torch.nan) for depth in (256, 64)]
            del blocks  # what the allocator gives out next
            found.append(convolution_ending(*call, early=early, backend="native"))
    check(found[0], call)
    assert all(torch.equal(a, b) for a, b in zip(*map(results, found), strict=True))
    after = [one for one in call if isinstance(one, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written to"


@modes
def test_no_images(mode: str, kernel: str) -> None:
    call = make(SMALL, mode, kernel, torch.float16).of(slice(0))
    for backend in ("native", "reference"):
        wide, narrow = convolution_ending(*call, backend=backend)
        assert wide.shape == (0, 256, 7, 9) and wide.dtype == torch.float16
        assert narrow is None if call.following is None else narrow.shape == (0, FOLLOWING[mode], 7, 9)


@halves
@modes
def test_any_order(mode: str, dtype: torch.dtype, kernel: str) -> None:
    """Planes one behind the other, every second image, and every second pixel."""
    call = make(SMALL, mode, kernel, dtype)
    want = results(convolution_ending(*call, backend="native"))
    for change in (
        lambda one: one.contiguous(),
        lambda one: one.repeat_interleave(2, 0)[::2],
        lambda one: one.repeat_interleave(2, 3)[..., ::2],
        lambda one: F.pad(one, (1, 1, 1, 1), value=torch.nan)[:, :, 1:-1, 1:-1],
    ):
        kept = [None if one is None else change(one) for one in (call.residual, call.second)]
        found = convolution_ending(change(call.x), *call[1:4], *kept, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(results(found), want, strict=True))


@pytest.mark.parametrize("place", [(1, 0, 0), (1, 6, 8), (0, 6, 4), (2, 3, 0)], ids=str)
@modes
def test_not_a_number_stays_with_its_neighbours(mode: str, place: tuple[int, int, int], kernel: str) -> None:
    """Corners and edges of images lie beside pixels of others in memory, which must not see them."""
    call = make(SMALL, mode, kernel, torch.float16)
    want = results(convolution_ending(*call, backend="native"))
    image, down, across = place
    call.x[image, 5, down, across] = torch.nan
    far = torch.ones(SMALL, dtype=torch.bool, device=kernel)
    far[image, max(down - 1, 0) : down + 2, max(across - 1, 0) : across + 2] = False
    for got, clean in zip(results(convolution_ending(*call, backend="native")), want, strict=True):
        assert torch.equal(got.permute(0, 2, 3, 1)[far], clean.permute(0, 2, 3, 1)[far])


@modes
def test_the_schema_and_shapes(mode: str, kernel: str) -> None:
    call = make(SMALL, mode, kernel, torch.float16)
    op = torch.ops.fastmetro_kernels.convolution_ending_native
    given = op_arguments(call)
    torch.library.opcheck(op, given)
    made = op(*(one.to("meta") if isinstance(one, Tensor) else one for one in given))
    assert [tuple(one.shape) for one in made] == [(*SMALL, 256), (*SMALL, FOLLOWING[mode])]


@pytest.mark.parametrize(
    ("mode", "place", "wrong", "message"),
    [
        (FOLLOWED, 0, torch.empty(3, 7, 9, 48), r"x must be \(3, 7, 9, 64\), got \(3, 7, 9, 48\)"),
        (FOLLOWED, 1, torch.empty(64, 1, 1, 64), r"weight must be \(64, 3, 3, 64\)"),
        (FOLLOWED, 5, torch.empty(3, 7, 8, 256), r"residual must be \(3, 7, 9, 256\)"),
        (FOLLOWED, 5, None, "either residual or second"),
        (FOLLOWED, 9, None, "next_weight and next_bias go together"),
        (JOINED, 7, None, "either residual or second"),
        (JOINED, 5, torch.empty(3, 7, 9, 256), "either residual or second"),
        (JOINED, 8, None, "next_weight and next_bias go together, and second needs them"),
        (ALONE, 10, [1, 2], r"config must hold early, got \[1, 2\]"),
    ],
)
def test_the_op_names_what_is_wrong_while_tracing(mode: str, place: int, wrong: Any, message: str) -> None:
    given = list(op_arguments(make(SMALL, mode, "cpu", torch.float16)))
    given[place] = wrong
    meta = [one.to("meta") if isinstance(one, Tensor) else one for one in given]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastmetro_kernels.convolution_ending_native(*meta)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@modes
def test_compiles_as_one_graph(
    mode: str, backend: str, dynamic: bool, pretended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setitem(MEASURED, (7, 9, mode), 3)
    dtype = torch.float32 if backend == "reference" else torch.float16

    def block(call: Call) -> Tensor:
        wide, narrow = convolution_ending(call.x + 1, *call[1:], backend=backend)
        return wide * 2 if narrow is None else wide.mean(1, keepdim=True) + narrow

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for images in (2, 3):
        call = make((images, 7, 9), mode, "cpu", dtype)
        torch.testing.assert_close(compiled(call), block(call), rtol=0, atol=0)


@modes
def test_the_table_counts_from_the_fewest_images(
    mode: str, monkeypatch: pytest.MonkeyPatch, pretended: list[int]
) -> None:
    call = make((4, 7, 9), mode, "cpu", torch.float16)
    assert not choose_ending(*call)
    monkeypatch.setitem(MEASURED, (7, 9, mode), 3)
    assert choose_ending(*call) and choose_ending(*call.of(slice(3))) and not choose_ending(*call.of(slice(2)))
    convolution_ending(*call, early=False)
    convolution_ending(*call.of(slice(2)))
    convolution_ending(*call, backend="reference")
    assert pretended == [0]  # auto by the table, and no other
    for other in MODES:
        if other != mode:
            assert not choose_ending(*make((4, 7, 9), other, "cpu", torch.float16))
    assert not choose_ending(*make((4, 9, 7), mode, "cpu", torch.float16))
    monkeypatch.setattr(ending, "ending_reasons", lambda device, dtype: ["no"])
    assert not choose_ending(*call)


def test_the_table_is_possible() -> None:
    for (height, width, mode), images in MEASURED.items():
        assert min(height, width, images) >= 1 and mode in MODES


def test_problems_of_weights() -> None:
    call, joined = (make(SMALL, mode, "cpu", torch.float32) for mode in (FOLLOWED, JOINED))
    assert ending_problem(call.weights, call.last, call.following) is None
    assert ending_problem(joined.weights, joined.last, joined.following) is None
    for wrong, message in (
        ((call.last, call.last), "weights must be [64, 3, 3, 64] of stride 1 and padding 1, got [256, 1, 1, 64]"),
        ((call.weights._replace(stride=2), call.last), "got [64, 3, 3, 64] of stride 2 and padding 1"),
        ((call.weights, call.weights), "last must be [256, 1, 1, 64] of stride 1 and padding 0"),
        ((call.weights, call.last, call.last), "following must be [64, 1, 1, 256] of stride 1 and padding 0"),
        ((call.weights, joined.last), "following must be given where last has a second convolution"),
        ((call.weights, joined.last._replace(second_stride=2)), "and stride 1, got [256, 1, 1, 64] of stride 2"),
        (
            (call.weights, call.last, call.following._replace(second_weight=call.following.weight)),
            "following must have no second convolution",
        ),
    ):
        assert message in str(ending_problem(*wrong))
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            convolution_ending(call.x, *wrong, residual=call.residual)


def test_errors_name_the_argument() -> None:
    call, joined = (make(SMALL, mode, "cpu", torch.float32) for mode in (FOLLOWED, JOINED))
    weights = call[1:4]
    for arguments, kind, message in (
        (([], *weights, call.residual), TypeError, "x must be a tensor, got list"),
        ((call.x, weights[0], tuple(weights[1])), TypeError, "last must come from lay_out, got tuple"),
        ((call.x[:, :48], *weights, call.residual), ValueError, r"x must be \[N, 64, H, W\], got \[3, 48, 7, 9\]"),
        ((call.x, *weights, call.residual[:2]), ValueError, r"residual must be \[3, 256, 7, 9\], got \[2, 256"),
        ((call.x, *weights, call.residual.half()), TypeError, r"residual must be one of float32, got torch\.float16"),
        ((call.x, *weights), ValueError, "residual must be given if, and only if, last has no second convolution"),
        ((*joined[:4], call.residual, joined.second), ValueError, "residual must be given if, and only if"),
        ((*call[:5], joined.second), ValueError, "second must be given if, and only if, the weights have a second"),
        (joined[:4], ValueError, "second must be given if, and only if, the weights have a second"),
        ((*joined[:5], joined.second[:, :, 1:]), ValueError, r"second must be \[3, 64, H2, W2\] that gives \[7, 9\]"),
    ):
        with pytest.raises(kind, match=message):
            convolution_ending(*arguments)
    half = weights[2]._replace(weight=weights[2].weight.half())
    with pytest.raises(TypeError, match=r"following\.weight must be one of float32, got torch\.float16"):
        convolution_ending(call.x, *weights[:2], half, call.residual)
    with pytest.raises(TypeError, match="early must be True or False, got 1"):
        convolution_ending(*call, early=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend='triton' is not known"):
        convolution_ending(*call, backend="triton")
    with pytest.raises(BackendUnavailable, match="runs on CUDA devices only"):
        convolution_ending(*call, backend="native")


@pytest.mark.parametrize("name", ["x", "residual", "following.weight", "last.bias"])
def test_gradients_are_refused(name: str) -> None:
    call: Any = make(SMALL, FOLLOWED, "cpu", torch.float32)
    argument, _, part = name.partition(".")
    tensor = getattr(getattr(call, argument), part) if part else getattr(call, argument)
    tensor.requires_grad_()
    with pytest.raises(RuntimeError, match=rf"convolution_ending is for inference.*but {name} requires grad"):
        convolution_ending(*call)
    with torch.no_grad():
        convolution_ending(*call)


@GPU
@halves
@modes
def test_the_same_bits_twenty_times(mode: str, dtype: torch.dtype) -> None:
    call = make((40, 56, 56), mode, "cuda", dtype)
    want = results(convolution_ending(*call, backend="native"))
    for _ in range(20):
        found = results(convolution_ending(*call, backend="native"))
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        for one in found:
            one.fill_(torch.nan)  # what the next call gets


@GPU
@pytest.mark.parametrize("images", [1, 32])
def test_early_starts_in_a_chain(images: int) -> None:
    """Blocks one behind the other, as in a trunk: what each reads, the kernel in front of it has just written."""
    call = make((images, 56, 56), FOLLOWED, "cuda", torch.float16)
    first = make((images, 56, 56), JOINED, "cuda", torch.float16, seed=1)
    widened = make((images, 56, 56), WIDENED, "cuda", torch.float16, seed=2)

    def chain(early: bool) -> list[Tensor]:
        wide, inner = convolution_ending(*first, early=early, backend="native")
        for _ in range(4):
            wide, inner = convolution_ending(inner, *call[1:4], wide, early=early, backend="native")
        wide, _ = convolution_ending(inner, *call[1:3], None, wide, early=early, backend="native")
        return [*results(convolution_ending(inner, *widened[1:4], wide, early=early, backend="native")), wide, inner]

    want = chain(False)
    assert all(bool(one.isfinite().all()) for one in want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(True)
    for _ in range(100):
        for one in found:
            one.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@GPU
@modes
def test_in_a_graph_behind_another_kernel_with_new_weights(mode: str) -> None:
    call = make((8, 28, 30), mode, "cuda", torch.float16)
    convolution_ending(*call, backend="native")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = convolution_ending(call.x * 0.5, *call[1:], backend="native")
    for _ in range(3):
        call.weights.weight.mul_(0.5), call.last.weight.mul_(1.5), call.last.bias.add_(1), call.x.mul_(-1)
        torch.cuda.synchronize()
        for _ in range(10):
            for one in results(found):
                one.fill_(torch.nan)
            graph.replay()
            check(found, call._replace(x=call.x * 0.5))


@GPU
@modes
def test_more_numbers_than_32_bits_count(mode: str) -> None:
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    call = make((2800, 56, 56), mode, "cuda", torch.float16)
    found = convolution_ending(*call, backend="native")
    assert found[0].numel() > 2**31
    for images in (slice(0, 2), slice(2674, 2677), slice(2798, 2800)):  # 2**31 is in image 2674.9
        check(tuple(None if one is None else one[images] for one in found), call.of(images))
