"""Pixels of crops: published ones against OpenCV's steps in order, default ones against known pictures, and all again
by the device's way."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from fastmetro.data.augmentation import Cut, Draw, PackedCuts, cut_image, finish_image, render_cuts
from fastmetro.data.augmentation.published import MAX_FILLED, MAX_SIDE, _box, render_published

MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
LEVEL = 1 / 255 / 0.224  # one level of 255, normalised, to 2 %


def photograph(height: int, width: int, seed: int = 0, smooth: float = 0.0) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (height, width, 3))
    if smooth:
        noise = cv2.GaussianBlur(noise, (0, 0), smooth)
        noise = (noise - noise.min()) / np.ptp(noise) * 255
    return noise.astype(np.uint8)


def levels(image: np.ndarray) -> np.ndarray:
    """Normalised [3, S, S] -> float64 [S, S, 3], 0 to 255."""
    return (image.astype(np.float64).transpose(1, 2, 0) * DEVIATION + MEAN) * 255


def by_the_book(image: np.ndarray, center: list[float], scale: float, draw: Draw, size: int) -> np.ndarray:
    """Protocol 3.3, step by step, without shortcuts: float32 [3, S, S]."""
    side = 200 * (draw.scale * scale)
    forward = np.array([[size / side, 0, size * (-center[0] / side + 0.5)],
                        [0, size / side, size * (-center[1] / side + 0.5)], [0, 0, 1.0]])  # fmt: skip
    inverse = torch.inverse(torch.from_numpy(forward)).numpy()
    x0, y0 = (int(value) for value in (inverse @ [0, 0, 1.0])[:2])
    x1, y1 = (int(value) for value in (inverse @ [size, size, 1.0])[:2])
    pad = int(np.hypot(x1 - x0, y1 - y0) / 2 - (y1 - y0) / 2) if draw.rotation else 0
    box = np.zeros((y1 - y0 + 2 * pad, x1 - x0 + 2 * pad, 3))
    rows, columns = np.arange(y0 - pad, y1 + pad), np.arange(x0 - pad, x1 + pad)
    good_rows = np.flatnonzero((rows >= 0) & (rows < image.shape[0]))
    good_columns = np.flatnonzero((columns >= 0) & (columns < image.shape[1]))
    box[np.ix_(good_rows, good_columns)] = image[np.ix_(rows[good_rows], columns[good_columns])]
    if draw.rotation:
        height, width = box.shape[:2]
        turn = cv2.getRotationMatrix2D(((width - 1) * 0.5, (height - 1) * 0.5), draw.rotation, 1.0)
        box = cv2.warpAffine(box, turn, (width, height), borderValue=0)[pad : height - pad, pad : width - pad]
    crop = cv2.resize(box, (size, size), interpolation=cv2.INTER_LINEAR)
    if draw.flip:
        crop = np.fliplr(crop)
    unit = np.minimum(255.0, np.maximum(0.0, crop * np.array(draw.noise))).astype(np.float32).transpose(2, 0, 1) / 255
    mean, deviation = MEAN.astype(np.float32)[:, None, None], DEVIATION.astype(np.float32)[:, None, None]
    return (unit - mean) / deviation


CASES = [
    # height, width, center, scale, draw
    (90, 120, [60.0, 45.0], 0.3, Draw()),
    (90, 120, [61.3, 40.9], 0.4, Draw(True, (0.61, 1.39, 1.0), 0.0, 1.1)),
    (91, 121, [20.5, 80.5], 0.37, Draw(False, (1.2, 0.7, 0.9), 33.7, 0.81)),
    (91, 121, [110.0, 4.0], 0.61, Draw(True, (1.0, 1.0, 1.4), -60.0, 1.25)),
    (224, 224, [112.0, 112.0], 0.9, Draw()),
    (224, 224, [112.0, 112.0], 0.9, Draw(False, (1.0, 1.1, 0.6), 171.2, 1.0)),
    (30, 25, [12.0, 16.0], 0.02, Draw(True, (1.0, 1.0, 1.0), 10.0, 1.0)),
    (300, 20, [10.0, 150.0], 1.9, Draw(False, (1.0, 1.0, 1.0), -90.0, 1.0)),
]


def both(case: tuple, size: int, compat, device: torch.device, smooth: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The worker's crop and the device's."""
    height, width, center, scale, draw = case
    image = photograph(height, width, height + width, smooth)
    cut = cut_image(image, np.array(center), scale, draw, size, compat)
    other = cut_image(photograph(40, 30), np.array([15.0, 20.0]), 0.2, Draw(rotation=5.0), size, compat)
    packed = PackedCuts.pack([other, cut], [Draw(), draw]).to(device)
    return finish_image(cut, draw, size, compat), render_cuts(packed, size, compat)[1].cpu().numpy()


@pytest.mark.parametrize("size", [224, 57])
@pytest.mark.parametrize("case", CASES)
def test_published_crops_are_those_of_the_protocol(case: tuple, size: int) -> None:
    height, width, center, scale, draw = case
    image = photograph(height, width, height + width)
    made = finish_image(cut_image(image, np.array(center), scale, draw, size, "published"), draw, size, "published")
    expected = by_the_book(image, center, scale, draw, size)
    assert made.dtype == np.float32 and expected.std() > 0.1
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [224, 57])
@pytest.mark.parametrize("case", CASES)
def test_the_device_makes_published_crops(case: tuple, size: int, device: torch.device) -> None:
    worker, there = both(case, size, "published", device)
    np.testing.assert_allclose(there, worker, rtol=0, atol=0.01 * LEVEL)


def test_random_published_crops(device: torch.device) -> None:
    random = np.random.default_rng(4)
    image = photograph(97, 131, 5)
    cuts, draws, expected = [], [], []
    while len(cuts) < 70:  # more than one chunk of the device's
        center, scale = random.uniform(-10, 140, 2), float(random.uniform(0.05, 0.7))
        draw = Draw(bool(random.integers(2)), tuple(random.uniform(0.6, 1.4, 3)), float(random.uniform(-180, 180)))
        cut = cut_image(image, center, scale, draw, 32, "published")
        if cut.pixels.size:
            cuts, draws = [*cuts, cut], [*draws, draw]
            expected.append(by_the_book(image, center.tolist(), scale, draw, 32))
            np.testing.assert_allclose(finish_image(cut, draw, 32, "published"), expected[-1], rtol=0, atol=1e-6)
    there = render_cuts(PackedCuts.pack(cuts, draws).to(device), 32, "published").cpu().numpy()
    np.testing.assert_allclose(there, np.stack(expected), rtol=0, atol=0.01 * LEVEL)


def test_corners_of_published_boxes_are_those_of_torch_inverse() -> None:
    """They lie at whole pixels, where one rounding more, or less, decides: so do the libraries behind torch.inverse."""
    random, size = np.random.default_rng(9), 224
    centers, scales = random.integers(-100, 1500, (4000, 2)) / 2, random.integers(5, 900, 4000) / 100
    sides = 200 * (1.0 * scales)
    matrices = np.tile(np.eye(3), (len(scales), 1, 1))
    matrices[:, 0, 0] = matrices[:, 1, 1] = size / sides
    matrices[:, :2, 2] = size * (-centers / sides[:, None] + 0.5)
    inverse = torch.inverse(torch.from_numpy(matrices)).numpy()
    corners = np.stack([(inverse @ [corner, corner, 1.0])[:, :2] for corner in (0.0, float(size))], axis=1)
    others = 0
    for center, scale, places in zip(centers, scales, corners, strict=True):
        box = _box(center, float(scale), Draw(), size)
        first = np.array(box[:2] if box else (0, 0))
        found = np.stack([first, first + (box[2:] if box else (0, 0))])
        differs = found != np.trunc(places)
        assert (np.abs(places - np.rint(places))[differs] < 1e-9).all(), (center, scale, found, places)
        others += bool(differs.any())
    assert others < 1000  # none with most builds


def test_turned_boxes_have_the_bits_of_a_warp_of_the_whole_in_float64() -> None:
    """The worker computes its middle only, and in float32."""
    random = np.random.default_rng(8)
    image = photograph(211, 307, 6)
    for _ in range(60):
        center, scale = random.uniform(-20, 320, 2), float(np.exp(random.uniform(-3, 1.5)))
        draw = Draw(rotation=float(random.uniform(-180, 180)))
        cut = cut_image(image, center, scale, draw, 32, "published")
        if not cut.pixels.size:
            continue
        width, height, pad, x, y = (int(value) for value in cut.geometry[:5])
        whole = np.zeros((height + 2 * pad, width + 2 * pad, 3))
        whole[y : y + cut.pixels.shape[0], x : x + cut.pixels.shape[1]] = cut.pixels
        turned = cv2.warpAffine(
            whole, cut.geometry[5:].reshape(2, 3), whole.shape[1::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        )
        box = turned[pad : pad + height, pad : pad + width]
        assert np.array_equal(render_published(cut, 32), cv2.resize(box, (32, 32))), (center, scale, draw)


def test_large_published_boxes_are_not_filled() -> None:
    image, center, draw = photograph(500, 300, smooth=2), [140.0, 260.0], Draw(True, (1.0, 0.9, 1.3), 20.0, 1.0)
    scale = (MAX_FILLED + 5) / 200
    cut = cut_image(image, np.array(center), scale, draw, 112, "published")
    assert cut.pixels.size == image.size
    expected = by_the_book(image, center, scale, draw, 112)
    np.testing.assert_allclose(finish_image(cut, draw, 112, "published"), expected, rtol=0, atol=0.01 * LEVEL)


@pytest.mark.parametrize("size", [224, 57])
@pytest.mark.parametrize("case", CASES)
def test_the_device_makes_default_crops(case: tuple, size: int, device: torch.device) -> None:
    worker, there = both(case, size, None, device, smooth=1.5)
    # Two roundings to whole levels in the worker, none on the device; the noise may enlarge them by 1.4.
    np.testing.assert_allclose(there, worker, rtol=0, atol=1.45 * LEVEL)
    assert np.abs(there - worker).mean() < 0.5 * LEVEL


def test_default_crops_show_each_point_where_it_belongs(device: torch.device) -> None:
    """A picture whose colours tell the position: the crop must hold the position of each of its pixels."""
    height, width, size = 241, 199, 64
    y, x = np.mgrid[:height, :width] + 0.5
    image = np.stack([x, y, (x + y) / 2], -1).round().astype(np.uint8)
    random = np.random.default_rng(0)
    for _ in range(20):
        center, side = random.uniform(95, 105, 2), random.uniform(20, 85)
        draw = Draw(
            bool(random.integers(2)), rotation=float(random.uniform(-180, 180)), scale=float(random.uniform(0.75, 1.25))
        )
        u, v = np.meshgrid(*[(np.arange(size) + 0.5) / size - 0.5] * 2)
        # A complex number turned clockwise on its way from the crop back to the photograph (y points down).
        point = complex(*center) + ((-u if draw.flip else u) + 1j * v) * side * draw.scale * np.exp(
            1j * np.radians(draw.rotation)
        )
        cut = cut_image(image, center, side / 200, draw, size)
        there = render_cuts(PackedCuts.pack([cut], [draw]).to(device), size)[0].cpu().numpy()
        for made in (finish_image(cut, draw, size), there):
            np.testing.assert_allclose(levels(made)[..., 0], point.real, atol=1.6)
            np.testing.assert_allclose(levels(made)[..., 1], point.imag, atol=1.6)
            assert abs((levels(made)[..., 0] - point.real).mean()) < 0.3


@pytest.mark.parametrize("shrink", [1.2, 2.0, 2.9, 3.3, 7.9])
def test_default_crops_are_the_mean_of_what_their_pixels_cover(shrink: float) -> None:
    """Against a mean over 16 x 16 points of each pixel of the crop."""
    size, image = 24, photograph(240, 240, 1, smooth=1.0)
    center, side = np.array([118.3, 121.9]), shrink * size
    points = (np.arange(size * 16) + 0.5) / (size * 16) * side - side / 2
    x, y = np.meshgrid(center[0] + points - 0.5, center[1] + points - 0.5)
    fine = cv2.remap(image.astype(np.float32), x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)
    expected = fine.reshape(size, 16, size, 16, 3).mean((1, 3))
    made = levels(finish_image(cut_image(image, center, side / 200, Draw(), size), Draw(), size))
    published = levels(
        finish_image(cut_image(image, center, side / 200, Draw(), size, "published"), Draw(), size, "published")
    )
    error, theirs = np.abs(made - expected).mean(), np.abs(published - expected).mean()
    assert error < 3 and error < 0.25 * theirs


def test_shrinking_does_not_alias() -> None:
    image = np.zeros((700, 700, 3), np.uint8)
    image[::2, ::2] = image[1::2, 1::2] = 255
    for turn in (0.0, 31.0):
        cut = cut_image(image, np.array([350.0, 350.0]), 400 / 200, Draw(rotation=turn), 60)
        assert np.abs(levels(finish_image(cut, Draw(), 60)) - 127.5).max() < 25


@pytest.mark.parametrize("compat", [None, "published"])
def test_flips_mirror_the_crop(compat) -> None:
    image, center = photograph(90, 120, 3, smooth=1.5), np.array([50.0, 47.0])
    plain, flipped = (
        finish_image(cut_image(image, center, 0.35, draw, 64, compat), draw, 64, compat)
        for draw in (Draw(False, (0.8, 1.0, 1.3), 25.0), Draw(True, (0.8, 1.0, 1.3), 25.0))
    )
    np.testing.assert_allclose(flipped, plain[:, :, ::-1], rtol=0, atol=0 if compat else 1.45 * LEVEL)


@pytest.mark.parametrize("compat", [None, "published"])
def test_noise_multiplies_and_is_clipped(compat) -> None:
    image = np.full((50, 50, 3), 200, np.uint8)
    draw = Draw(noise=(0.6, 1.0, 1.4))
    made = levels(finish_image(cut_image(image, np.array([25.0, 25.0]), 0.2, draw, 16, compat), draw, 16, compat))
    np.testing.assert_allclose(made, np.broadcast_to([120.0, 200.0, 255.0], (16, 16, 3)), atol=1e-3)


ODD = [
    ("outside", [500.0, 500.0], 0.2),
    ("far outside", [-3e38, 1e30], 0.2),
    ("without extent", [20.5, 15.5], 1e-9),
    ("enormous", [20.0, 15.0], 1e36),
]


@pytest.mark.parametrize("compat", [None, "published"])
@pytest.mark.parametrize("rotation", [0.0, 44.0])
@pytest.mark.parametrize(("name", "center", "scale"), ODD)
def test_odd_boxes(name: str, center: list[float], scale: float, rotation: float, compat, device: torch.device) -> None:
    image, draw = np.full((30, 40, 3), 255, np.uint8), Draw(rotation=rotation)
    cut = cut_image(image, np.array(center), scale, draw, 32, compat)
    worker = finish_image(cut, draw, 32, compat)
    there = render_cuts(PackedCuts.pack([cut], [draw]).to(device), 32, compat)[0].cpu().numpy()
    expected = 255.0 if name == "without extent" and compat is None else 0.0
    np.testing.assert_allclose(levels(worker), expected, atol=1e-3)
    np.testing.assert_allclose(levels(there), expected, atol=1e-3)


@pytest.mark.parametrize("compat", [None, "published"])
@pytest.mark.parametrize("side", [1.5, 3.0, 3000.0, 20000.0, MAX_SIDE - 1.0, 3e6])
def test_tiny_and_huge_boxes_are_bounded_and_agree(side: float, compat, device: torch.device) -> None:
    image, center = photograph(60, 50, 2, smooth=2.0), np.array([24.2, 33.1])
    for draw in (Draw(), Draw(True, rotation=-71.0)):
        cut = cut_image(image, center, side / 200, draw, 48, compat)
        assert cut.pixels.size <= image.size
        there = render_cuts(PackedCuts.pack([cut], [draw]).to(device), 48, compat)[0].cpu().numpy()
        worker = finish_image(cut, draw, 48, compat)
        np.testing.assert_allclose(there, worker, rtol=0, atol=(0.01 if compat else 1.05) * LEVEL)
        if side > 10000:
            assert levels(worker).sum() < 48 * 48 * 3  # black, but for a dot where the photograph is


def test_a_default_cut_is_small_whatever_the_box() -> None:
    image = photograph(3000, 2000)
    for side in (100, 671, 1000, 1119, 1999, 2900, 1e4):
        cut = cut_image(image, np.array([1000.0, 1500.0]), side / 200, Draw(rotation=45.0), 224)
        assert cut.pixels.size <= 3 * (4.3 * 224) ** 2
    thin = cut_image(photograph(3, 60000), np.array([30000.0, 1.0]), 200.0, Draw(rotation=3.0), 224)
    assert max(thin.pixels.shape) < 4.3 * 224 and finish_image(thin, Draw()).shape == (3, 224, 224)


def test_an_empty_batch_of_pixels_is_addressable() -> None:
    cut = Cut(np.zeros((0, 0, 3), np.uint8), np.zeros(6))
    packed = PackedCuts.pack([cut, cut], [Draw(), Draw()])
    assert packed.pixels.shape == (1,) and packed.sizes.tolist() == [[0, 0], [0, 0]]
    assert render_cuts(packed, 8).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("compat", [None, "published"])
def test_nothing_waits_for_the_device(compat) -> None:
    """Tensors without values cannot be read: a `.item()` or a branch on one would raise."""
    draw = Draw(True, rotation=20.0)
    cut = cut_image(photograph(50, 40), np.array([20.0, 20.0]), 0.2, draw, 16, compat)
    packed = PackedCuts.pack([cut] * 65, [draw] * 65).to("meta")
    assert render_cuts(packed, 16, compat).shape == (65, 3, 16, 16)
