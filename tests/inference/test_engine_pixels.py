"""Pixels that half precision holds exactly, and the first convolution that takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import TRUNKS, all_trunks, error, exact, images, randomize, rounding
from torch import Tensor, nn

from fastmetro.data.synthetic.dataset import IMAGE_DEVIATION, IMAGE_MEAN
from fastmetro.inference.engine import convolution
from fastmetro.inference.engine.backbones import fold_backbone
from fastmetro.inference.engine.exact_pixels import exact_pixel_constants, fold_pixels
from fastmetro.inference.engine.folded_resnet import FoldedResNet
from fastmetro.inference.engine.preprocessing import pixel_constants
from fastmetro.models.backbones import HRNetW64, ResNet50
from fastmetro_kernels import convolution as kernels
from fastmetro_kernels.fused import normalize_pixels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pixels_are_exact_in_half_precision(dtype: torch.dtype) -> None:
    pixels = torch.arange(256, dtype=torch.uint8)[None, None, :, None].expand(1, 1, 256, 3)
    centre, scale = exact_pixel_constants(dtype, torch.device("cpu"))
    mean, _ = pixel_constants(torch.device("cpu"))
    assert float((centre - mean).abs().max()) <= (0.0625 if dtype == torch.float16 else 0.5)
    stored = normalize_pixels(pixels, centre, scale, dtype)
    assert stored.dtype == dtype
    assert torch.equal(stored.double().permute(0, 2, 3, 1), (pixels.double() - centre.double()) * scale.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folded_pixels_are_exact_where_nothing_is_padded(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 3, 7, 7, generator=generator).double(), torch.randn(8, generator=generator).double()
    pixels = torch.randint(256, (2, 3, 16, 16), generator=generator).double()
    mean, deviation = (255 * torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (IMAGE_MEAN, IMAGE_DEVIATION))
    expected = F.conv2d((pixels - mean) / deviation, weight, bias)
    centre, scale = (x.double()[:, None, None] for x in exact_pixel_constants(dtype, torch.device("cpu")))
    torch.testing.assert_close(F.conv2d((pixels - centre) * scale, *fold_pixels(weight, bias, dtype)), expected)


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_features_of_pixels(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """Those of normalised images; in half precision at least about as exact."""
    trunk = all_trunks()[kind]
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (2, 64, 64, 3), generator=generator, dtype=torch.uint8)
    cpu = torch.device("cpu")
    truth = exact(trunk, normalize_pixels(pixels, *pixel_constants(cpu), torch.float64))
    folded = fold_backbone(trunk, dtype)
    found = folded.of_pixels(normalize_pixels(pixels, *folded.pixel_constants(cpu), dtype))
    assert found.dtype == dtype
    if dtype == torch.float64:  # the constants are float32
        assert error(found, truth) < 1e-5
    else:
        normal = folded(normalize_pixels(pixels, *pixel_constants(cpu), dtype))
        assert rounding(found, truth) < 1.3 * rounding(normal, truth)
    folded.refresh(randomize(copy.deepcopy(trunk), seed=5))
    assert rounding(folded.of_pixels(normalize_pixels(pixels, *folded.pixel_constants(cpu), dtype)), truth) > 0.01


@pytest.fixture
def stem_inputs(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Of the images that stems of the kernels' package were given."""
    given: list[torch.dtype] = []
    for name in ("convolution_stem", "convolution_double_stem"):
        real = getattr(kernels, name)

        def record(x: Tensor, *arguments: object, real: Callable[..., Tensor] = real, **options: object) -> Tensor:
            given.append(x.dtype)
            return real(x, *arguments, **options)

        monkeypatch.setattr(kernels, name, record)
    return given


@pytest.mark.parametrize("kind", [ResNet50, HRNetW64])
def test_few_images_reach_the_stem_as_they_come(kind: type[nn.Module], stem_inputs: list[torch.dtype]) -> None:
    """And give the bits of those that were brought to the engine's type before; more images are."""
    dtype, cpu = torch.bfloat16, torch.device("cpu")
    folded = fold_backbone(all_trunks()[kind], dtype, "reference")
    constants = folded.pixel_constants(cpu)
    most = convolution.MOST_RAW_IMAGES
    pixels = torch.randint(256, (most + 1, 64, 64, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    for count in (1, most, most + 1):
        x, few = images(count, 64), pixels[:count]
        found = [folded(x), folded.of_bytes(few, *constants)]
        as_they_come = [torch.float32, torch.uint8] if count <= most else [dtype, dtype]
        assert stem_inputs == as_they_come
        made = x.to(dtype, memory_format=torch.channels_last)
        expected = [folded(made), folded.of_pixels(normalize_pixels(few, *constants, dtype))]
        assert stem_inputs[2:] == [dtype, dtype]
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        stem_inputs.clear()


def test_what_stems_take_as_it_comes() -> None:
    x, pixels = torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    folded = {dtype: fold_backbone(all_trunks()[ResNet50], dtype, "reference") for dtype in (torch.half, torch.float)}
    half, single = (cast(FoldedResNet, folded[dtype]).stem for dtype in (torch.half, torch.float))
    assert (
        convolution.takes_raw(x, half) and convolution.takes_raw(pixels, half) and convolution.takes_raw(pixels, single)
    )
    assert not convolution.takes_raw(x, single)  # it is of the stem's own type
    for other in (
        x.half(),
        x.double(),
        x.to(memory_format=torch.channels_last),
        pixels.transpose(1, 2),
        x.repeat(convolution.MOST_RAW_IMAGES + 1, 1, 1, 1),
    ):
        assert not convolution.takes_raw(other, half)
    library = fold_backbone(all_trunks()[ResNet50], torch.half, "library")
    automatic = fold_backbone(all_trunks()[ResNet50], torch.half)  # the library's on a CPU
    assert not any(convolution.takes_raw(x, cast(FoldedResNet, one).stem) for one in (library, automatic))


def test_sizes_of_bytes_are_checked() -> None:
    folded = fold_backbone(all_trunks()[HRNetW64], torch.bfloat16, "reference")
    constants = folded.pixel_constants(torch.device("cpu"))
    with pytest.raises(ValueError, match="multiples of 32, got 32 x 40"):
        folded.of_bytes(torch.zeros(1, 32, 40, 3, dtype=torch.uint8), *constants)
