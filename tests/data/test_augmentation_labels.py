"""Labels of crops against matrices written out here, the published formulas, and projections into the picture."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import expm

from fastmetro.data.augmentation import Draw, augment_label
from fastmetro.data.augmentation.labels import J24, SMPL_BONES, mirrored
from fastmetro.data.tsv.rows import SHAPES, BadRow, Kind, Label

# Protocol 3.3 (flip_kp) and the published permutation of the 72 pose parameters.
FLIP_KP = [5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6, 12, 13, 14, 15, 16, 17, 18, 19, 21, 20, 23, 22]
FLIP_POSE = [
    0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11, 15, 16, 17, 12, 13, 14, 18, 19, 20, 24, 25, 26, 21, 22, 23, 27, 28,
    29, 33, 34, 35, 30, 31, 32, 36, 37, 38, 42, 43, 44, 39, 40, 41, 45, 46, 47, 51, 52, 53, 48, 49, 50, 57,
    58, 59, 54, 55, 56, 63, 64, 65, 60, 61, 62, 69, 70, 71, 66, 67, 68,
]  # fmt: skip
DRAWS = [
    Draw(),
    Draw(flip=True),
    Draw(rotation=33.0, scale=0.8),
    Draw(True, (0.7, 1.0, 1.3), -60.0, 1.25),
    Draw(True, rotation=180.0),
]


def label(
    kind: Kind = "body", seed: int = 0, center: tuple[float, float] = (161.3, 90.25), scale: float = 0.77
) -> Label:
    random, shapes = np.random.default_rng(seed), SHAPES[kind]
    return Label(
        center=np.array(center),
        scale=scale,
        joints_2d=np.column_stack(
            [random.uniform(-100, 500, (shapes.joints, 2)), random.integers(0, 2, shapes.joints)]
        ),
        joints_3d=random.normal(size=(shapes.joints, 4)).astype(np.float32),
        pose=random.normal(size=shapes.pose).astype(np.float32),
        betas=np.zeros(10, np.float32),
        has_joints_2d=True,
        has_joints_3d=True,
        has_smpl=True,
        gender="none",
    )


def draws_of(kind: Kind) -> list[Draw]:
    return [draw for draw in DRAWS if kind == "body" or not draw.flip]


def rotation_matrix(rotation_vector: np.ndarray) -> np.ndarray:
    x, y, z = rotation_vector.astype(np.float64)
    return expm(np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]))


def image_rotation(draw: Draw) -> np.ndarray:
    """Counter-clockwise as seen, with y down, in three dimensions."""
    c, s = np.cos(np.radians(draw.rotation)), np.sin(np.radians(draw.rotation))
    return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])


def test_permutations_are_the_published_ones() -> None:
    assert mirrored(J24) == FLIP_KP
    assert (np.arange(72).reshape(24, 3)[mirrored(SMPL_BONES)]).ravel().tolist() == FLIP_POSE
    assert J24[14] == "Pelvis"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("draw", DRAWS)
def test_2d_joints_move_with_the_picture(draw: Draw, seed: int) -> None:
    given = label(seed=seed)
    made = augment_label(given, draw, "body").joints_2d
    order = FLIP_KP if draw.flip else range(24)
    for joint, source in enumerate(order):
        moved = image_rotation(draw)[:2, :2] @ (given.joints_2d[source, :2] - given.center)
        moved = moved / (100 * given.scale * draw.scale) * ([-1, 1] if draw.flip else [1, 1])
        np.testing.assert_allclose(made[joint, :2], moved, rtol=1e-5, atol=1e-5)
        assert made[joint, 2] == given.joints_2d[source, 2]
    assert made.dtype == np.float32 and np.abs(made[:, :2]).max() > 1  # some lie outside, and keep their place


@pytest.mark.parametrize("kind", ["body", "hand"])
@pytest.mark.parametrize("size", [224, 111])
def test_published_2d_joints_are_whole_pixels(kind: Kind, size: int) -> None:
    for draw in draws_of(kind):
        given = label(kind)
        made = augment_label(given, draw, kind, size, "published").joints_2d
        side = 200 * draw.scale * given.scale
        angle = np.radians(-draw.rotation)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        exact = (size * (given.joints_2d[:, :2] - given.center) / side) @ turn.T + size / 2
        assert np.abs(exact - exact.round()).min() > 1e-6  # no joint lies on a border of truncation
        expected = np.column_stack([2 * (np.trunc(exact) + 1) / size - 1, given.joints_2d[:, 2]])
        if draw.flip:
            expected = expected[FLIP_KP] * [-1, 1, 1]
        np.testing.assert_array_equal(made, expected.astype(np.float32))
        assert (exact < 0).any()  # where truncation is upwards


@pytest.mark.parametrize("compat", [None, "published"])
@pytest.mark.parametrize("kind", ["body", "hand"])
def test_3d_joints_turn_and_flip_about_the_root(kind: Kind, compat) -> None:
    for draw in draws_of(kind):
        given = label(kind, 5)
        made = augment_label(given, draw, kind, 224, compat).joints_3d
        points = given.joints_3d.astype(np.float64)
        points[:, :3] = (points[:, :3] - points[14 if kind == "body" else 0, :3]) @ image_rotation(draw).T
        expected = points[FLIP_KP] * [-1, 1, 1, 1] if draw.flip else points
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)
        assert made.dtype == np.float32 and not made[14 if kind == "body" else 0, :3].any()


@pytest.mark.parametrize("kind", ["body", "hand"])
def test_poses_turn_at_the_root_and_flip_bone_by_bone(kind: Kind) -> None:
    mirror = np.diag([-1.0, 1.0, 1.0])
    for draw in draws_of(kind):
        given = label(kind, 6)
        made = augment_label(given, draw, kind).pose.reshape(-1, 3)
        before = given.pose.reshape(-1, 3)
        for bone in range(len(made)):
            source = FLIP_POSE[3 * bone] // 3 if draw.flip else bone
            expected = rotation_matrix(before[source])
            if bone == 0:
                expected = image_rotation(draw) @ expected
            if draw.flip:
                expected = mirror @ expected @ mirror
            np.testing.assert_allclose(rotation_matrix(made[bone]), expected, atol=1e-5)


def test_without_a_draw_small_poses_stay() -> None:
    given = label()
    np.testing.assert_allclose(augment_label(given, Draw(), "body").pose, given.pose, atol=1e-6)


@pytest.mark.parametrize("draw", DRAWS)
def test_projections_commute_with_the_draw(draw: Draw) -> None:
    """A weak-perspective camera, in the photograph or in the crop, sees the same joints."""
    given = label(seed=9)
    pelvis = given.center + np.array([13.0, -7.0])
    relative = given.joints_3d[:, :3].astype(np.float64) - given.joints_3d[14, :3]
    given.joints_2d[:, :2] = pelvis + 60 * relative[:, :2]
    made = augment_label(given, draw, "body")
    shift = made.joints_2d[14, :2]
    projected = 60 / (100 * given.scale * draw.scale) * made.joints_3d[:, :2] + shift
    np.testing.assert_allclose(made.joints_2d[:, :2], projected, atol=2e-5)


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="flip must be False for hands"):
        augment_label(label("hand"), Draw(flip=True), "hand")
    for compat in (None, "published"):
        with pytest.raises(BadRow, match="2D joints too far"):
            augment_label(label(scale=1e-40), Draw(), "body", 224, compat)
