"""The TF32 setting of an engine is that of the moment in which it was compiled. The flags are the same on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastmetro.inference.engine import graphs
from fastmetro.inference.engine.graphs import Graphs
from fastmetro.inference.engine.precision import TensorFloat32

ALL = [TensorFloat32(products, convolutions) for products in (False, True) for convolutions in (False, True)]


def legacy() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Other tests keep what conftest.py sets."""
    before = legacy()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("outside", ALL, ids=str)
@pytest.mark.parametrize("inside", ALL, ids=str)
def test_applied_and_restored(inside: TensorFloat32, outside: TensorFloat32) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = outside.products, outside.convolutions
    assert TensorFloat32.current() == outside
    with pytest.raises(RuntimeError, match="inside"), inside.applied():
        assert TensorFloat32.current() == inside and legacy() == (inside.products, inside.convolutions)
        raise RuntimeError("inside")
    assert TensorFloat32.current() == outside and legacy() == (outside.products, outside.convolutions)


def test_settings_of_the_newer_interface_come_back() -> None:
    """Products and convolutions, but not recurrent layers: the older interface cannot say that, nor read it."""
    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "tf32", "tf32", "ieee"
        assert TensorFloat32.current() == TensorFloat32(True, True)
        with TensorFloat32(False, False).applied():
            assert TensorFloat32.current() == TensorFloat32(False, False) and legacy() == (False, False)
        assert (cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("tf32", "tf32", "ieee")
    finally:
        cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


@pytest.mark.usefixtures("made_up_gpu")
def test_later_captures_see_the_setting_of_compile_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def captured(work: object, images: torch.Tensor, pool: object, side: object) -> object:
        seen.append((len(images), TensorFloat32.current()))
        return object()

    monkeypatch.setattr(graphs, "Captured", captured)
    at_compile_time = TensorFloat32(False, False)
    made = Graphs(nothing, torch.device("cpu"), torch.float32, 8, at_compile_time)
    for count, later in ((1, at_compile_time), (2, TensorFloat32(True, True)), (3, TensorFloat32(False, True))):
        with later.applied():
            capture(made, torch.zeros(count, 3, 32, 32))
            assert TensorFloat32.current() == later
    assert seen == [(count, at_compile_time) for count in (1, 2, 3)]


@pytest.mark.usefixtures("made_up_gpu")
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_algorithms_are_searched_for_in_half_precision(
    dtype: torch.dtype, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While something is captured; in float32 only where the process does so anyway."""
    seen = []
    monkeypatch.setattr(graphs, "Captured", lambda *_arguments: seen.append(torch.backends.cudnn.benchmark) or object())
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    capture(Graphs(nothing, torch.device("cpu"), dtype, 8, TensorFloat32.current()), torch.zeros(1, 3, 32, 32))
    assert seen == [before or dtype.itemsize == 2] and torch.backends.cudnn.benchmark == before


@pytest.mark.usefixtures("made_up_gpu")
def test_what_came_before_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """By dtype, sizes and order, so that nothing goes unchecked that was not checked before."""
    monkeypatch.setattr(graphs, "Captured", lambda *_arguments: object())
    monkeypatch.setattr(graphs, "_MOST_SIGNATURES", 3)
    made = Graphs(nothing, torch.device("cpu"), torch.float16, 8, TensorFloat32.current())
    images = torch.zeros(2, 3, 32, 32)

    def known(like: torch.Tensor) -> bool:
        return graphs._signature(like) in made.keys

    found = capture(made, images)
    assert known(images + 1) and capture(made, images + 1) is found
    others = [images[:1], images.half(), images.transpose(2, 3), torch.nn.Parameter(images), torch._neg_view(images)]
    assert not any(map(known, [*others, images[0]])) and made.again(others[0]) is None
    # Half precision is captured as the engine orders it, whatever its strides.
    assert capture(made, others[1]) is capture(made, others[2]) is not found
    assert len(made.kept) == 2
    for count in (3, 4, 5):
        capture(made, torch.zeros(count, 3, 32, 32))
        assert len(made.keys) <= 3 and capture(made, images) is found


@pytest.mark.usefixtures("made_up_gpu")
def test_images_that_are_as_captured() -> None:
    """They alone may be read where they are."""
    made = Graphs(nothing, torch.device("cpu"), torch.float16, 8, TensorFloat32.current())
    floats, pixels = torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    ordered = floats.half().contiguous(memory_format=torch.channels_last)
    strided = torch.zeros(4, 3, 32, 32)[::2]
    for images in (floats, pixels, ordered, strided[:1]):  # strides of one image do not matter
        assert made._known(images)[1]
    unlike = [
        strided,
        floats.half(),
        floats.double(),
        floats.contiguous(memory_format=torch.channels_last),
        pixels.transpose(1, 2),
        torch.nn.Parameter(floats),
        torch._neg_view(floats),
        floats.to("meta"),
    ]
    for images in unlike:
        assert not made._known(images)[1]


def nothing(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {}


def capture(made: Graphs, images: torch.Tensor) -> object:
    return made._captured(made._known(images)[0])
