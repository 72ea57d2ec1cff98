"""`fastmetro.compile`: the same outputs as the network, whatever comes in; reports, refreshing, streams, errors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmetro
from fastmetro.inference.engine import Engine
from fastmetro.inference.engine.products import Tokens
from fastmetro.inference.images import to_input
from fastmetro.models import FastMETRO, create_model

BATCH = 2


def pixels(count: int, size: int = 224, seed: int = 0) -> Tensor:
    """Random pictures of a few soft shades, uint8 [count, size, size, 3]."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 8, 8, generator=generator) * 255
    planes = torch.nn.functional.interpolate(small, (size, size), mode="bicubic").clamp(0, 255)
    return planes.permute(0, 2, 3, 1).byte().contiguous()


def normalized(images: Tensor) -> Tensor:
    return torch.stack([to_input(image.numpy()) for image in images])


@pytest.fixture(scope="module")
def model() -> FastMETRO:
    from fastmetro.inference.pretrained import load_pretrained

    return load_pretrained("fastmetro-compact")


@pytest.fixture(scope="module")
def here(model: FastMETRO) -> Iterator[Callable[[torch.device], FastMETRO]]:
    """The model on a device."""
    copies: dict[str, FastMETRO] = {}

    def on(device: torch.device) -> FastMETRO:
        if device.type not in copies:
            copies[device.type] = copy.deepcopy(model).to(device)
        return copies[device.type]

    yield on


@pytest.fixture
def float32_engine(here: Callable[[torch.device], FastMETRO], device: torch.device) -> Engine:
    return fastmetro.compile(here(device), BATCH, torch.float32)


def largest(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Metres."""
    assert outputs.keys() == expected.keys()
    return max((outputs[name].cpu() - expected[name].cpu()).abs().max().item() for name in expected)


@torch.no_grad()
def test_float32_is_the_network(model: FastMETRO, float32_engine: Engine) -> None:
    """To 1e-5 of a metre, for pixels, normalised images, arrays, and other numbers of images than prepared for."""
    for count in (1, 2, 3):
        images = pixels(count, seed=count)
        expected = model(normalized(images))
        for given in (images, normalized(images), images.to(float32_engine.device)):
            outputs = float32_engine(given)
            assert largest(outputs, expected) < 1e-5
            assert all(value.device.type == float32_engine.device.type for value in outputs.values())
        assert largest(float32_engine(images.numpy()), expected) < 1e-5
    assert float32_engine.report.largest_difference < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision_is_near(
    model: FastMETRO, here: Callable[[torch.device], FastMETRO], device: torch.device, dtype: torch.dtype
) -> None:
    """No farther from float32 than twice as far as the network itself in that precision."""
    images = pixels(4)
    exact = model(normalized(images))["pred_3d_vertices_fine"]
    plain = copy.deepcopy(here(device)).to(dtype)(normalized(images).to(device, dtype))["pred_3d_vertices_fine"]
    engine = fastmetro.compile(here(device), 4, dtype)
    got = engine(images)["pred_3d_vertices_fine"]
    assert got.dtype == torch.float32
    ours, theirs = ((x.cpu() - exact).norm(dim=-1).mean().item() for x in (got, plain))
    assert ours < 2 * theirs, f"{1e3 * ours:.3f} mm, plain {1e3 * theirs:.3f} mm"


@pytest.mark.parametrize("upsampling", ["fixed", "learned"])
def test_one_image_gets_both_fine_meshes_of_one_product(upsampling: str, device: torch.device) -> None:
    """Where they are fixed; the same meshes as among several images, in one piece each."""
    network = create_model("fastmetro-s", mesh="anny-body", upsampling=upsampling).to(device).eval()
    folded = fastmetro.compile(network, 1, torch.float32)._transformers
    assert (folded.to_both is None) == (upsampling == "learned")
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, folded.num_joints + folded.num_vertices, network.config.widths[1], generator=generator)
    few, several = (folded.place(Tokens(part)) for part in (values[:1].to(device), values.to(device)))
    assert list(few) == list(several)
    for name, mesh in few.items():
        torch.testing.assert_close(mesh, several[name][:1])
        assert mesh.is_contiguous()


def test_other_sizes_are_resized(float32_engine: Engine) -> None:
    """With antialiasing, before they are normalised, and not rounded in between."""
    large = pixels(2, 448)
    planes = large.permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(planes, (224, 224), mode="bilinear", antialias=True)
    mean, deviation = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = float32_engine((small / 255 - mean) / deviation)
    assert largest(float32_engine(large), expected) < 1e-5
    assert largest(float32_engine(pixels(2)), expected) > 1e-3


def test_results_stay_when_the_engine_is_called_again(float32_engine: Engine) -> None:
    first = float32_engine(pixels(2, seed=1))
    kept = {name: value.clone() for name, value in first.items()}
    float32_engine(pixels(2, seed=2))
    assert largest(first, kept) == 0


def test_no_image(float32_engine: Engine) -> None:
    outputs = float32_engine(pixels(1)[:0])
    assert outputs["pred_cam"].shape == (0, 3) and outputs["pred_3d_vertices_fine"].shape[0] == 0


@torch.no_grad()
def test_weights_are_replaced_in_place(model: FastMETRO, float32_engine: Engine, device: torch.device) -> None:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in changed.parameters():
        parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    images = pixels(2)
    before = float32_engine(images)
    float32_engine.refresh(changed.to(device))
    expected = changed(normalized(images).to(device))
    assert largest(before, expected) > 1e-3
    assert largest(float32_engine(images), expected) < 1e-5


def test_refresh_refuses_another_network(float32_engine: Engine) -> None:
    with pytest.raises(ValueError, match="compiled for"):
        float32_engine.refresh(fastmetro.create_model("fastmetro-s", backbone="compact"))


@torch.no_grad()
def test_stream(model: FastMETRO, float32_engine: Engine) -> None:
    """In order, the last batch shorter, results on the device or the host."""
    batches = [pixels(2, seed=seed) for seed in range(5)] + [pixels(1, seed=9)]
    expected = [model(normalized(batch)) for batch in batches]
    for to_host in (False, True):
        outputs = list(float32_engine.stream(iter(batches), to_host=to_host))
        assert len(outputs) == len(batches)
        for got, want in zip(outputs, expected, strict=True):
            assert largest(got, want) < 1e-5
            assert not to_host or got["pred_cam"].device.type == "cpu"
    assert list(float32_engine.stream([])) == []


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([pixels(3)], "number 0 has 3 images; the engine takes 1 to 2"),
        ([pixels(2), pixels(1)[:0]], "number 1 has 0 images"),
        ([pixels(2), pixels(2, 64)], r"number 1 is torch.uint8 \[2, 64, 64, 3\], the first was"),
    ],
)
def test_stream_refuses(float32_engine: Engine, batches: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(float32_engine.stream(batches))


@torch.no_grad()
def test_threads(model: FastMETRO, float32_engine: Engine) -> None:
    """Each thread gets the results of its own images, on a stream of its own where there are streams."""
    images = [pixels(1 + seed % 2, seed=seed) for seed in range(4)]
    expected = [model(normalized(one)) for one in images]
    worst: list[float] = []

    def work(number: int) -> None:
        if float32_engine.device.type == "cuda":
            with torch.cuda.stream(torch.cuda.Stream()):
                results = [float32_engine(images[number]) for _ in range(10)]
                torch.cuda.current_stream().synchronize()
        else:
            results = [float32_engine(images[number]) for _ in range(2)]
        worst.append(max(largest(one, expected[number]) for one in results))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 4 and max(worst) < 1e-5


def test_report(float32_engine: Engine) -> None:
    names = [fold.name for fold in float32_engine.report.folds]
    assert len(set(names)) == len(names)
    assert {"batch-norm", "decoder-prefix", "positions", "norm-affine", "memory-projection"} <= set(names)
    text = str(float32_engine.report)
    assert all(name in text for name in names) and "MFLOP" in text
    assert float32_engine.report.flops_saved > 3e8


def test_parts_run(float32_engine: Engine) -> None:
    parts = float32_engine.parts()
    assert list(parts) == ["backbone", "encoder", "decoder", "upsampling", "after the backbone"]
    for part in parts.values():
        part()


def test_the_network_stays_as_it_is(here: Callable[[torch.device], FastMETRO], device: torch.device) -> None:
    model = here(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    fastmetro.compile(model, dtype=torch.bfloat16)
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_smpl_head() -> None:
    """It runs behind the rest, with its own outputs."""
    torch.manual_seed(0)
    model = fastmetro.create_model("fastmetro-compact", smpl_head=True).eval()
    engine = fastmetro.compile(model, 1, torch.float32)
    images = normalized(pixels(1))
    with torch.no_grad():
        expected = model(images)
    assert "pred_rotmat" in expected and largest(engine(images), expected) < 1e-4


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 224, 224, dtype=torch.uint8), ValueError, r"square crops \[B, S, S, 3\], got \[1, 3, 224"),
        (torch.zeros(1, 100, 90, 3, dtype=torch.uint8), ValueError, "square crops"),
        (torch.zeros(1, 224, 224, 3), ValueError, r"normalised images must be \[B, 3, H, W\]"),
        (torch.zeros(3, 224, 224), ValueError, r"normalised images must be"),
        (torch.zeros(1, 3, 224, 224, dtype=torch.int64), TypeError, "uint8 pixels or floating point"),
        (np.zeros((1, 0, 0, 3), np.uint8), ValueError, "square crops"),
    ],
)
def test_bad_images(float32_engine: Engine, images: Tensor | np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        float32_engine(images)


def test_bad_arguments(model: FastMETRO) -> None:
    with pytest.raises(TypeError, match="model must be a FastMETRO, got Linear"):
        fastmetro.compile(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 0"):
        fastmetro.compile(model, 0)
    with pytest.raises(ValueError, match="dtype must be one of"):
        fastmetro.compile(model, dtype=torch.int8)
    with pytest.raises(ValueError, match="max_graphs must be"):
        fastmetro.compile(model, max_graphs=-1)
