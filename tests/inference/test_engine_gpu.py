"""What only a GPU can show of the engine: graphs that are kept and given up, bits, and no synchronisation."""

from __future__ import annotations

import copy

import pytest
import torch
from test_engine import normalized, pixels

import fastmetro
from fastmetro.inference.engine import Engine, products
from fastmetro.inference.pretrained import load_pretrained
from fastmetro.models import create_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return fastmetro.compile(load_pretrained("fastmetro-compact").cuda(), 2, max_graphs=3)


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


def test_memory_is_bounded(engine: Engine) -> None:
    """Sizes that come and go, captured again each time, take no more than they did in the first round."""

    def every_size() -> int:
        for count in range(1, 7):
            engine(pixels(count))
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()

    every_size()
    before = every_size()
    assert all(every_size() <= before for _ in range(3))


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


@pytest.mark.parametrize("backbone", ["resnet50", "hrnet-w64"])
@pytest.mark.parametrize("variant", ["fastmetro-s", "fastmetro-l"])
def test_variants(variant: str, backbone: str) -> None:
    """Large networks, both dtypes, against the network in float32."""
    from fastmetro.profiling.contenders import settle_batch_norms

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
