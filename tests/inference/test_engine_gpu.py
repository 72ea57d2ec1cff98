"""What only a GPU can show of the engine: graphs that are kept and given up, bits, and no synchronisation."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from test_engine import normalized, pixels
from torch import Tensor

import fastmetro
from fastmetro.inference.engine import Engine, convolution, products
from fastmetro.inference.engine.graphs import Captured
from fastmetro.inference.pretrained import load_pretrained
from fastmetro.models import create_model
from fastmetro.profiling.contenders import settle_batch_norms
from fastmetro_kernels import fused
from fastmetro_kernels.convolution.stem import stem_reasons

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return fastmetro.compile(load_pretrained("fastmetro-compact").cuda(), 2, max_graphs=3)


KINDS = ("float32", "uint8", "float16")


def images_of(kind: str, seed: int = 0, count: int = 2) -> Tensor:
    """Images as they are captured, on the device."""
    images = pixels(count, seed=seed)
    if kind == "uint8":
        return images.cuda()
    images = normalized(images).cuda()
    return images if kind == "float32" else images.half().contiguous(memory_format=torch.channels_last)


def unaligned(images: Tensor) -> Tensor:
    """The same, where they have to be copied from."""
    room = torch.empty(images.numel() + 1, dtype=images.dtype, device=images.device)
    return room[1:].as_strided(images.shape, images.stride(), room.storage_offset() + 1).copy_(images)


def captured(engine: Engine, images: Tensor) -> Captured:
    """The graph for images like these."""
    assert engine._graphs is not None
    engine(images)
    return engine._graphs._captured(engine._graphs._known(images)[0])


def overwrite(graph: Captured) -> Tensor:
    """Puts NaN (or 1) where images are copied to, and returns the same."""
    with torch.inference_mode():
        return graph.images.fill_(1 if graph.images.dtype == torch.uint8 else torch.nan).clone()


def same(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(outputs[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_images_are_read_where_they_are(engine: Engine, kind: str) -> None:
    """Nothing is copied to where the others are copied to."""
    pytest.importorskip("cuda.bindings.driver")
    images = images_of(kind)
    graph = captured(engine, images)
    assert graph.direct
    before = overwrite(graph)
    engine(images)
    torch.testing.assert_close(graph.images, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_images_read_where_they_are_give_the_bits_of_copied_ones(engine: Engine, kind: str) -> None:
    images = images_of(kind)
    graph = captured(engine, images)
    expected = engine(unaligned(images))
    assert torch.equal(graph.images, images)
    overwrite(graph)
    assert same(engine(images), expected)
    assert same(engine(unaligned(images)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_images_are_copied(engine: Engine, kind: str) -> None:
    """To another graph, where their order is not the one that is captured in their dtype."""
    images = images_of(kind)
    expected = engine(images)["pred_3d_vertices_fine"]
    every_second = images.repeat_interleave(2, dim=0)[::2]
    for strided in (every_second, images.transpose(-1, -2).contiguous().transpose(-1, -2)):
        graph = captured(engine, strided)
        assert torch.equal(graph.images, strided.to(graph.images.dtype))
        overwrite(graph)
        torch.testing.assert_close(engine(strided)["pred_3d_vertices_fine"], expected, rtol=0, atol=2e-3)
        assert torch.equal(graph.images, strided.to(graph.images.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_two_buffers_in_turn(engine: Engine, kind: str) -> None:
    """Nothing waits in between, so that graphs are launched while those with the other address run."""
    buffers = [images_of(kind, seed) for seed in (1, 2)]
    expected = [engine(unaligned(images)) for images in buffers]
    torch.cuda.synchronize()
    turns = [(turn % 2, engine(buffers[turn % 2])) for turn in range(20)]
    assert not same(*expected) and all(same(outputs, expected[which]) for which, outputs in turns)


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_freed_right_after_the_call(engine: Engine, kind: str) -> None:
    """What others write to the same memory comes after the graph has read it."""
    sources = [images_of(kind, seed) for seed in range(4)]
    expected = [engine(unaligned(images)) for images in sources]
    outputs = []
    for turn in range(40):
        images = sources[turn % 4].clone(memory_format=torch.preserve_format)
        outputs.append(engine(images))
        del images
        others = [torch.full_like(sources[0], 3) for _ in range(4)]  # one of them takes its memory
        del others
    assert all(same(one, expected[turn % 4]) for turn, one in enumerate(outputs))


def test_images_of_nan_spoil_one_call(engine: Engine) -> None:
    images = images_of("float32")
    expected = engine(images)
    broken = engine(torch.full_like(images, torch.nan))
    assert not same(broken, expected) and same(engine(images), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_streams_with_buffers_of_their_own(engine: Engine, kind: str) -> None:
    buffers = [images_of(kind, seed) for seed in (1, 2)]
    expected = [engine(unaligned(images)) for images in buffers]
    start = threading.Barrier(2)
    wrong: list[int] = []

    def work(which: int) -> None:
        stream = torch.cuda.Stream()
        start.wait()
        with torch.cuda.stream(stream):
            outputs = [engine(buffers[which]) for _ in range(50)]
            wrong.extend(not same(one, expected[which]) for one in outputs)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 100


def test_a_thread_may_read_elsewhere_before_it_did_anything_else(engine: Engine) -> None:
    """The driver has no context in a new thread before its first call."""
    first, second = images_of("float32", 1), images_of("float32", 2)
    expected = engine(second)
    engine(first)
    found: list[dict[str, Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(engine(second)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert same(found[0], expected)


def test_graphs_are_bounded_and_the_oldest_goes(engine: Engine) -> None:
    assert engine._graphs is not None
    first = engine(pixels(2))
    for count in (1, 3, 4, 5, 2):
        again = engine(pixels(count))
        assert len(engine._graphs.kept) <= 3
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_images_in_any_order_and_from_anywhere(engine: Engine) -> None:
    """Also the second time, when they are not checked any more."""
    images = normalized(pixels(2))
    expected = engine(images)["pred_3d_vertices_fine"]
    for _ in range(2):
        for like in (images.cuda(), images.cuda().contiguous(memory_format=torch.channels_last), images.double()):
            torch.testing.assert_close(engine(like)["pred_3d_vertices_fine"], expected, rtol=0, atol=2e-3)
        with pytest.raises(ValueError, match="normalised images must be"):
            engine(images.permute(0, 2, 3, 1))


@pytest.mark.usefixtures("no_collector")
def test_memory_is_bounded(engine: Engine) -> None:
    """Sizes that come and go, captured again each time, take no more than they did in the first rounds.

    What lives is counted in the whole process and to the byte, and nothing that waits for Python's collector is freed
    meanwhile. Memory that is reserved is counted where graphs are captured: what else the process reserves depends on
    where earlier tests have left what they have not freed, and on when that is freed.
    """
    assert engine._graphs is not None
    pool = engine._graphs.pool
    torch.cuda.empty_cache()

    def every_size() -> tuple[int, int]:
        for count in range(1, 7):
            engine(pixels(count))
        torch.cuda.synchronize()
        of_graphs = [segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] == pool]
        live = torch.cuda.memory_stats()["requested_bytes.all.current"]
        return live, sum(segment["total_size"] for segment in of_graphs)

    live, reserved = zip(*(every_size() for _ in range(8)), strict=True)
    assert live[1:] == live[1:2] * 7, live
    assert 0 < reserved[3] == reserved[-1], reserved


@pytest.mark.usefixtures("no_collector")
def test_an_engine_given_up_is_freed_at_once() -> None:
    """Its graphs, too, whose memory Python's collector knows nothing of."""
    engine = fastmetro.compile(load_pretrained("fastmetro-compact").cuda(), 2)
    engine(pixels(1))
    assert engine._graphs is not None and engine._graphs.kept
    found = [weakref.ref(x) for x in (engine, engine._graphs, engine._backbone, *engine._graphs.kept.values())]
    gc.collect()  # once: what PyTorch imports while an engine is compiled leaves frames of that in a cycle
    del engine
    assert [ref() for ref in found] == [None] * len(found)


def test_hundred_calls_give_the_same_bits(engine: Engine) -> None:
    images = pixels(2).cuda()
    first = engine(images)
    for _ in range(100):
        again = engine(images)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("name", ["fastmetro-s", "fastmetro-l"])
def test_products_of_many_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products onto the tokens where they lie are as near to float32 as those that add afterwards, at every replay."""
    torch.manual_seed(0)
    model = create_model(name, backbone="compact").cuda().eval()
    images = pixels(24).cuda()
    with torch.no_grad():
        expected = fastmetro.compile(model, 1, torch.float32)(images)["pred_3d_vertices_fine"]
    errors = []
    for rows in (products.MANY_ROWS, 1 << 40):
        monkeypatch.setattr(products, "MANY_ROWS", rows)
        made = fastmetro.compile(model, 24, torch.float16)
        first, again = made(images)["pred_3d_vertices_fine"], made(images)["pred_3d_vertices_fine"]
        assert torch.equal(first, again)
        errors.append(float((first - expected).norm(dim=-1).mean()))
    assert errors[0] <= 1.3 * errors[1], errors


def test_decoder_layers_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as near to float32 as separate kernels."""
    torch.manual_seed(0)
    model = create_model("fastmetro-l", backbone="compact").cuda().eval()
    images = pixels(4).cuda()
    with torch.no_grad():
        expected = fastmetro.compile(model, 1, torch.float32)(images)["pred_3d_vertices_fine"]
    errors: list[float] = []
    calls: list[int] = []
    decoder_tail = fused.decoder_tail

    def counted(*given: Any, **options: Any) -> Tensor:
        calls.append(1)
        return decoder_tail(*given, **options)

    monkeypatch.setattr(fused, "decoder_tail", counted)
    for rows in (1, 1 << 40):
        monkeypatch.setattr(products, "NATIVE_TAIL_ROWS", rows)
        monkeypatch.setattr(products, "TAIL_ROWS", rows)
        calls.clear()
        made = fastmetro.compile(model, 4, torch.float16)
        errors.append(float((made(images)["pred_3d_vertices_fine"] - expected).norm(dim=-1).mean()))
        assert bool(calls) == (rows == 1)
    assert errors[0] <= 1.3 * errors[1], errors


def test_calls_do_not_wait_for_the_device(engine: Engine) -> None:
    images = pixels(2).pin_memory()
    engine(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = engine(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert outputs["pred_3d_vertices_fine"].isfinite().all()


def test_part_of_a_larger_graph(engine: Engine) -> None:
    images = normalized(pixels(2)).cuda()
    expected = engine(images)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        engine(images)
    side.synchronize()
    with torch.cuda.graph(graph, stream=side):
        outputs = engine(images)
    graph.replay()
    torch.cuda.synchronize()
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, rtol=0, atol=2e-3)


def test_graphs_own_what_products_work_in() -> None:
    """torch.compile with CUDA graphs takes cuBLAS's workspaces away from all streams; others use their memory then."""
    model = load_pretrained("fastmetro-compact").cuda()
    engine = fastmetro.compile(model, 64)  # so many rows that the library makes the wide products
    images = pixels(64).cuda()
    expected = engine(images)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    sizes = [2**exponent for exponent in range(12, 28)] * 2
    taken = [torch.full((size // 4,), torch.nan, device="cuda") for size in sizes]
    for _ in range(3):
        again = engine(images)
        assert all(torch.equal(expected[name], again[name]) for name in expected)
    assert all(bool(tensor.isnan().all()) for tensor in taken)


@pytest.mark.parametrize("count", [1, convolution.MOST_RAW_IMAGES])
@pytest.mark.parametrize("backbone", ["resnet50", "hrnet-w64"])
def test_stems_of_images_as_they_come(backbone: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of an engine with a kernel in front of the stem, copied in or read where they are; new weights, too."""
    torch.manual_seed(0)
    models = [create_model("fastmetro-s", backbone=backbone, upsampling="released").cuda().eval() for _ in range(2)]
    for model in models:
        settle_batch_norms(model.backbone)
    raw = fastmetro.compile(models[0], count)
    for kind in ("float32", "uint8"):
        captured(raw, images_of(kind, count=count))
    monkeypatch.setattr(convolution, "MOST_RAW_IMAGES", 0)
    prepared = fastmetro.compile(models[0], count)
    for model in models:
        raw.refresh(model), prepared.refresh(model)
        for kind in ("float32", "uint8"):
            for seed in range(3):
                images = images_of(kind, seed, count).clone()
                expected = prepared(images)
                assert same(raw(images), expected) and same(raw(unaligned(images)), expected)


@pytest.mark.parametrize("kind", ["float32", "uint8"])
@pytest.mark.parametrize("backbone", ["resnet50", "hrnet-w64"])
def test_one_image_is_read_where_it_is_by_the_stem(backbone: str, kind: str) -> None:
    """Nothing is copied to where others are copied to, and no kernel of the graph is in front of the stem's."""
    pytest.importorskip("cuda.bindings.driver")
    torch.manual_seed(0)
    engine = fastmetro.compile(create_model("fastmetro-s", backbone=backbone, upsampling="released").cuda().eval(), 1)
    images = images_of(kind)[:1].clone()
    graph = captured(engine, images)
    assert graph.direct
    before = overwrite(graph)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine(images)
        torch.cuda.synchronize()
    torch.testing.assert_close(graph.images, before, rtol=0, atol=0, equal_nan=True)
    names = " ".join(event.key for event in profile.key_averages())
    if not stem_reasons(torch.device("cuda"), torch.float16):
        assert "stem_kernel" in names
        assert "normalize_pixels_kernel" not in names and "to_channels_last_kernel" not in names


@pytest.mark.parametrize("backbone", ["resnet50", "hrnet-w64"])
@pytest.mark.parametrize("variant", ["fastmetro-s", "fastmetro-l"])
def test_variants(variant: str, backbone: str) -> None:
    """Large networks, both dtypes, against the network in float32."""
    torch.manual_seed(0)
    model = create_model(variant, backbone=backbone, upsampling="released").cuda().eval()
    settle_batch_norms(model.backbone)
    images = normalized(pixels(2)).cuda()
    with torch.no_grad():
        exact = model(images)["pred_3d_vertices_fine"]
        for dtype in (torch.float16, torch.bfloat16):
            plain = copy.deepcopy(model).to(dtype)(images.to(dtype))["pred_3d_vertices_fine"]
            got = fastmetro.compile(model, 2, dtype)(images)["pred_3d_vertices_fine"]
            assert (got - exact).norm() < 2 * (plain - exact).norm()
