"""Pixels that half precision holds exactly, and the first convolution that takes them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import TRUNKS, all_trunks, error, exact, randomize, rounding
from torch import nn

from fastmetro.data.synthetic.dataset import IMAGE_DEVIATION, IMAGE_MEAN
from fastmetro.inference.engine.backbones import fold_backbone
from fastmetro.inference.engine.exact_pixels import exact_pixel_constants, fold_pixels
from fastmetro.inference.engine.preprocessing import pixel_constants
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
