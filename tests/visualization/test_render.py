"""Renderings: what is where, how outlines blend, what the light does, and the figures made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmetro.visualization.cameras import OrthographicCamera, PerspectiveCamera, turn
from fastmetro.visualization.lighting import light_visibility, linear_to_srgb, srgb_to_linear, vertex_normals
from fastmetro.visualization.overlay import contact_sheet, overlay, turntable, view
from fastmetro.visualization.render import composite, render_floor_shadow, render_mesh, to_image

trimesh = pytest.importorskip("trimesh")


def ball(level: int = 3) -> tuple[Tensor, Tensor]:
    """A unit sphere in the camera's frame."""
    mesh = trimesh.creation.icosphere(subdivisions=level)
    vertices = torch.tensor(mesh.vertices * [1.0, -1.0, -1.0], dtype=torch.float32)
    return vertices, torch.tensor(mesh.faces)


def quad(depth: float = 0.0, half: float = 1.0) -> tuple[Tensor, Tensor]:
    """A square that faces the viewer."""
    x = half
    vertices = torch.tensor([[-x, -x, depth], [x, -x, depth], [-x, x, depth], [x, x, depth]])
    return vertices, torch.tensor([[0, 2, 1], [1, 2, 3]])


CAMERA = OrthographicCamera(10.0, (16.0, 16.0))


def test_shape_coverage_and_range(device: torch.device) -> None:
    vertices, faces = ball()
    picture = render_mesh(vertices.to(device), faces.to(device), CAMERA, (32, 40))
    assert picture.shape == (1, 32, 40, 4) and picture.dtype == torch.float32 and picture.device.type == device.type
    assert picture.min() >= 0 and picture.max() <= 1
    alpha = picture[0, ..., 3].cpu()
    assert alpha.sum().item() == pytest.approx(math.pi * 100, rel=0.02)
    assert alpha[16, 16] == 1 and alpha[0, 0] == 0 and (picture[0, 0, 0] == 0).all()
    assert ((alpha > 0) & (alpha < 1)).any()  # a smooth outline


def test_outline_keeps_its_colour() -> None:
    """Coverage is in alpha alone: a half-covered pixel is not darker than its neighbour."""
    vertices, faces = quad(half=1.05)
    picture = render_mesh(vertices, faces, CAMERA, 32, supersampling=4, shadows=False)[0]
    assert picture[16, 5, 3].item() == pytest.approx(0.5)
    torch.testing.assert_close(picture[16, 5, :3], picture[16, 8, :3], atol=0.02, rtol=0)
    on_white = composite(picture, (1.0, 1.0, 1.0))
    expected = (on_white[16, 8] + 1) / 2
    torch.testing.assert_close(on_white[16, 5], expected, atol=0.02, rtol=0)


def test_weak_perspective_camera_is_the_published_one() -> None:
    """s * (xy + t) in [-1, 1] over the crop, wherever the crop lies in the picture."""
    points = torch.tensor([[[0.3, -0.2, 0.5], [-0.1, 0.4, 0.9]]])
    s, tx, ty = 0.9, 0.1, -0.05
    pixels = OrthographicCamera.from_weak_perspective((s, tx, ty), left=30, top=12, side=200).project(points)
    crop = s * (points[..., :2] + torch.tensor([tx, ty]))
    torch.testing.assert_close(pixels[..., :2], (crop + 1) * 100 + torch.tensor([30.0, 12.0]))
    assert pixels[..., 2].min() > 0 and pixels[0, 0, 2] < pixels[0, 1, 2]
    cameras = torch.tensor([[s, tx, ty], [0.5, 0.0, 0.0]])
    both = OrthographicCamera.from_weak_perspective(cameras, 30, 12, 200)
    torch.testing.assert_close(both.project(points.expand(2, -1, -1))[:1], pixels)
    torch.testing.assert_close(both.item(1).project(points), both.project(points.expand(2, -1, -1))[1:])


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (50, 50)])
def test_fitted_cameras_show_everything(size: tuple[int, int]) -> None:
    vertices = ball(2)[0] * torch.tensor([0.4, 1.1, 0.3]) + torch.tensor([5.0, -2.0, 1.0])
    for camera in (OrthographicCamera.fit(vertices, size), PerspectiveCamera.fit(vertices, size, 40.0)):
        pixels = camera.project(vertices[None])[0]
        assert (pixels[:, :2] > 0).all() and (pixels[:, 2] > 0).all()
        assert (pixels[:, 0] < size[1]).all() and (pixels[:, 1] < size[0]).all()
        extent = pixels[:, :2].amax(0) - pixels[:, :2].amin(0)
        assert (extent / torch.tensor([size[1], size[0]])).max() > 0.7


def test_nearer_surface_hides_the_farther(device: torch.device) -> None:
    near, faces = quad(depth=-0.5, half=0.5)
    far, _ = quad(depth=0.5)
    vertices, faces = torch.cat([near, far]).to(device), torch.cat([faces, faces + 4]).to(device)
    colors = torch.tensor([[0.9, 0.1, 0.1]] * 4 + [[0.1, 0.1, 0.9]] * 4, device=device)
    for camera in (CAMERA, PerspectiveCamera(100.0, (16.0, 16.0), (0.0, 0.0, 10.0))):
        picture = render_mesh(vertices, faces, camera, 32, color=colors)[0].cpu()
        assert picture[16, 16, 0] > picture[16, 16, 2] and picture[16, 8, 2] > picture[16, 8, 0]


def test_batch_equals_single_pictures(device: torch.device) -> None:
    vertices, faces = ball(2)
    batch = torch.stack([vertices, vertices * 0.5]).to(device)
    colors = torch.rand(batch.shape, generator=torch.Generator().manual_seed(0)).to(device)
    together = render_mesh(batch, faces.to(device), CAMERA, 32, color=colors)
    for item in range(2):
        alone = render_mesh(batch[item], faces.to(device), CAMERA, 32, color=colors[item])[0]
        torch.testing.assert_close(together[item], alone, atol=2e-5, rtol=0)


def test_every_backend_and_numpy_give_the_same_picture() -> None:
    vertices, faces = ball(2)
    expected = render_mesh(vertices, faces, CAMERA, 32, shadows=False)
    for other in (
        render_mesh(vertices, faces, CAMERA, 32, shadows=False, backend="reference"),
        render_mesh(vertices.numpy().astype(np.float64), faces.numpy(), CAMERA, 32, shadows=False),
    ):
        torch.testing.assert_close(other, expected)


def test_normals_point_out_of_the_mesh(device: torch.device) -> None:
    vertices, faces = ball(3)
    vertices = torch.cat([vertices, torch.zeros(1, 3)]).to(device)  # and a vertex without faces
    normals = vertex_normals(vertices[None], faces.to(device))[0]
    assert (normals[-1] == 0).all()
    assert ((normals * vertices)[:-1].sum(1) > 0.995).all()


def test_light_reaches_open_places_and_not_hidden_ones(device: torch.device) -> None:
    """A ball alone sees nearly the whole sky; inside a larger ball it sees none; a roof takes the key light."""
    vertices, faces = (t.to(device) for t in ball(3))
    normals = vertex_normals(vertices[None], faces)
    alone = light_visibility(vertices[None], normals, faces)[0]
    assert alone[:, 0].min() > 0.9
    towards_key = vertices @ torch.nn.functional.normalize(vertices.new_tensor([-0.70, -0.58, -0.45]), dim=0)
    assert alone[towards_key > 0.6, 1].min() > 0.9 and alone[towards_key < -0.4, 1].max() < 0.1
    nested = torch.cat([vertices, vertices * 3])
    both = torch.cat([faces, faces + len(vertices)])
    inner = light_visibility(nested[None], vertex_normals(nested[None], both), both)[0, : len(vertices)]
    assert inner.max() < 0.05


def test_upper_left_is_brighter_than_lower_right() -> None:
    vertices, faces = ball(3)
    picture = render_mesh(vertices, faces, CAMERA, 32)[0, ..., :3].mean(-1)
    assert picture[11, 11] > picture[21, 21] + 0.1


def test_both_sides_of_an_open_mesh_are_lit() -> None:
    vertices, faces = quad()
    front = render_mesh(vertices, faces, CAMERA, 32, shadows=False)
    back = render_mesh(vertices, faces.flip(1), CAMERA, 32, shadows=False)
    torch.testing.assert_close(front, back)


def test_wireframe_draws_edges_only() -> None:
    vertices, faces = quad()
    plain = render_mesh(vertices, faces, CAMERA, 32, shadows=False)[0]
    lines = render_mesh(vertices, faces, CAMERA, 32, shadows=False, wireframe=1.0)[0]
    assert lines[16, 6, :3].mean() < plain[16, 6, :3].mean() - 0.05  # the left edge
    assert lines[15, 16, :3].mean() < plain[15, 16, :3].mean() - 0.1  # the diagonal
    torch.testing.assert_close(lines[10, 13], plain[10, 13])


def test_turning_shows_the_other_sides() -> None:
    vertices = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 0, -1], [0, 0, 1], [0, 1, 0], [0, -1, 0]])
    turned = turn(vertices, 90.0)[0]
    torch.testing.assert_close(turned[0], torch.tensor([0.0, 0, -1]), atol=1e-6, rtol=0)  # right comes to the front
    torch.testing.assert_close(turned[2], torch.tensor([-1.0, 0, 0]), atol=1e-6, rtol=0)  # the front looks left
    from_above = turn(vertices, 0.0, tilt=90.0)[0]
    torch.testing.assert_close(from_above[5], torch.tensor([0.0, 0, -1]), atol=1e-6, rtol=0)  # the top comes to front


def test_srgb_round_trip() -> None:
    values = torch.linspace(0, 1, 101)
    torch.testing.assert_close(linear_to_srgb(srgb_to_linear(values)), values, atol=1e-5, rtol=0)
    assert srgb_to_linear(torch.tensor(0.5)).item() == pytest.approx(0.21404, abs=1e-4)


def test_overlay_keeps_the_photograph_outside_the_mesh() -> None:
    photograph = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    vertices, faces = quad(half=0.5)
    picture = np.asarray(overlay(photograph, vertices, faces, CAMERA, shadows=False, opacity=1.0))
    assert picture.shape == photograph.shape and picture.dtype == np.uint8
    covered = np.zeros((32, 48), dtype=bool)
    covered[11:21, 11:21] = True
    assert (picture[~covered] == photograph[~covered]).all()
    assert picture[covered].std(0).max() < 2
    from_image = overlay(Image.fromarray(photograph), vertices, faces, CAMERA, shadows=False, opacity=1.0)
    assert (np.asarray(from_image) == picture).all()


def test_overlay_of_two_people_draws_the_nearer_last() -> None:
    vertices, faces = quad(half=0.5)
    both = torch.stack([vertices - torch.tensor([0.0, 0, 1]), vertices + torch.tensor([0.2, 0, 1])])
    colors = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9]])[:, None].expand(2, 4, 3)
    black = torch.zeros(32, 32, 3)
    picture = np.asarray(overlay(black, both, faces, CAMERA, color=colors, shadows=False, opacity=1.0)).astype(int)
    assert picture[16, 16, 0] > picture[16, 16, 2] and picture[16, 22, 2] > picture[16, 22, 0]


def test_perspective_batch_has_an_eye_per_item() -> None:
    vertices, faces = ball(2)
    away = torch.tensor([[0.0, 0.0, 3.0], [0.5, -0.4, 4.0]])
    together = render_mesh(vertices.expand(2, -1, -1), faces, PerspectiveCamera(40.0, (16.0, 16.0), away), 32)
    for item in range(2):
        camera = PerspectiveCamera(40.0, (16.0, 16.0), away[item])
        alone = render_mesh(vertices, faces, camera, 32)[0]
        torch.testing.assert_close(together[item], alone, atol=2e-5, rtol=0)
    towards = PerspectiveCamera(40.0, (16.0, 16.0), away).directions(torch.zeros(1, 3), torch.tensor([1]))
    torch.testing.assert_close(towards[0], -away[1] / away[1].norm())


def test_no_faces_make_an_empty_picture() -> None:
    vertices, faces = quad()
    assert (render_mesh(vertices, faces[:0], CAMERA, 8) == 0).all()


@pytest.mark.parametrize("tilt", [10.0, 30.0])
def test_floor_shadow_lies_below_the_mesh(tilt: float, device: torch.device) -> None:
    vertices, faces = ball(2)
    vertices = vertices.to(device)
    radians = math.radians(tilt)
    up = vertices.new_tensor([0.0, -math.cos(radians), -math.sin(radians)])
    camera = OrthographicCamera(16.0, (40.0, 32.0))
    shadow = render_floor_shadow(vertices, faces.to(device), up, camera, (80, 80)).cpu()
    assert shadow.shape == (80, 80, 4) and shadow.min() >= 0
    contact = 32 + int(16 * math.cos(radians))  # the row where the ball touches the floor
    assert shadow[contact, 40, 3] > 0.3
    assert shadow[:30, :, 3].max() == 0 and shadow[contact, 40, 3] > 5 * shadow[contact, 26, 3]
    grounded = view(vertices.cpu(), faces, 40, tilt=tilt, floor=True, shadows=False)
    plain = view(vertices.cpu(), faces, 40, tilt=tilt, shadows=False)
    assert (np.asarray(grounded) <= np.asarray(plain)).all() and (np.asarray(grounded) < np.asarray(plain)).any()


def test_views_and_sheets() -> None:
    vertices, faces = ball(1)
    views = turntable(vertices, faces, (30, 20), 3, shadows=False)
    assert [v.size for v in views] == [(20, 30)] * 3 and views[0].mode == "RGB"
    assert view(vertices, faces, 16, 90.0, background=None, shadows=False).mode == "RGBA"
    plain = contact_sheet(views, columns=3, gap=4)
    assert plain.size == (4 + 3 * 24, 4 + 34)
    captioned = contact_sheet([*views, np.zeros((30, 20, 3), dtype=np.uint8)], ["a", "b", "c", "d"])
    assert captioned.width == 10 + 2 * 30 and captioned.height > 10 + 2 * 40
    below = np.asarray(captioned)[41 : captioned.height - (captioned.height - 10) // 2, 10:30]
    assert below.min() < 150  # the caption of the first picture


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda v, f: render_mesh(v[:, :2], f, CAMERA, 8), "vertices"),
        (lambda v, f: render_mesh(v[:0], f[:0], CAMERA, 8), "at least one vertex"),
        (lambda v, f: render_mesh(v, f, CAMERA, 0), "height"),
        (lambda v, f: render_mesh(v, f, CAMERA, 8, supersampling=0), "supersampling"),
        (lambda v, f: render_mesh(v, f, CAMERA, 8, color=torch.zeros(5, 3)), "color"),
        (lambda v, f: render_mesh(v, f + 1, CAMERA, 8), "faces"),
        (lambda v, f: OrthographicCamera.from_weak_perspective(torch.zeros(2)), "camera"),
        (lambda v, f: overlay(np.zeros((8, 8)), v, f, CAMERA), "image"),
        (lambda v, f: contact_sheet([]), "at least one"),
        (lambda v, f: contact_sheet([np.zeros((4, 4, 3))], ["a", "b"]), "captions"),
        (lambda v, f: to_image(np.zeros((4, 4))), "picture"),
    ],
)
def test_bad_arguments(call: object, words: str) -> None:
    vertices, faces = quad()
    with pytest.raises(ValueError, match=words):
        call(vertices, faces)  # type: ignore[operator]


def test_a_mesh_behind_the_camera_leaves_the_picture_empty() -> None:
    vertices, faces = ball(1)
    picture = render_mesh(vertices, faces, PerspectiveCamera(20.0, (8.0, 8.0), (0.0, 0.0, -5.0)), 16)
    assert (picture == 0).all()
