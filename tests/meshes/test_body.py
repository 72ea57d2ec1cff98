"""Blend skinning against a plain float64 loop over bones and vertices."""

from __future__ import annotations

import math

import pytest
import torch

from fastmetro.meshes.body import (
    BlendSkinning,
    ancestor_table,
    axis_angle_to_matrix,
    cross_matrix,
    nearest_rotation,
)

PARENTS = (-1, 0, 1, 2, 0, 4, 4, 3)


def make(pose_basis: bool = False, dtype: torch.dtype = torch.float64, vertices: int = 23) -> BlendSkinning:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    bones = len(PARENTS)
    weights = torch.softmax(3 * random(vertices, bones), 1)
    basis = 0.01 * random(9 * (bones - 1), vertices, 3) if pose_basis else None
    parts = (random(vertices, 3), 0.1 * random(5, vertices, 3), random(bones, 3), 0.1 * random(5, bones, 3), weights)
    return BlendSkinning(*parts, PARENTS, basis).to(dtype)


def inputs(batch: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pose = torch.randn(batch, len(PARENTS), 3, generator=generator, dtype=torch.float64)
    shape = torch.randn(batch, 5, generator=generator, dtype=torch.float64)
    translation = torch.randn(batch, 3, generator=generator, dtype=torch.float64)
    turn = torch.randn(batch, len(PARENTS), 3, generator=generator, dtype=torch.float64)
    return pose, shape, translation, axis_angle_to_matrix(0.3 * turn)


def by_loops(model: BlendSkinning, pose, shape, translation, alignment) -> tuple[torch.Tensor, torch.Tensor]:
    rotations = torch.linalg.matrix_exp(cross_matrix(pose))
    vertices, bones = [], []
    for item in range(len(pose)):
        rest, heads = (part[0] for part in model.rest(shape[item : item + 1]))
        if model.pose_basis is not None:
            change = (rotations[item, 1:] - torch.eye(3)).reshape(-1)
            rest = rest + torch.einsum("k,kmd->md", change, model.pose_basis.reshape(len(change), -1, 3))
        world: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        for bone, parent in enumerate(PARENTS):
            if parent < 0:
                world.append(rotations[item, bone])
                places.append(translation[item])
                continue
            offset = heads[bone] - heads[parent]
            if parent > 0:
                offset = alignment[item, parent] @ offset
            places.append(places[parent] + world[parent] @ offset)
            world.append(world[parent] @ rotations[item, bone])
        skinned = torch.zeros_like(rest)
        for bone in range(len(PARENTS)):
            moved = (rest - heads[bone]) @ (world[bone] @ alignment[item, bone]).T + places[bone]
            skinned += model.weights[:, bone, None] * moved
        vertices.append(skinned)
        bones.append(torch.stack(places))
    return torch.stack(vertices), torch.stack(bones)


@pytest.mark.parametrize("pose_basis", [False, True])
def test_against_loops(device, pose_basis) -> None:
    model = make(pose_basis)
    arguments = inputs(3)
    expected = by_loops(model, *arguments)
    result = model.to(device)(*(argument.to(device) for argument in arguments))
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-12)
    single = make(pose_basis, torch.float32).to(device)
    result = single(*(argument.to(device, torch.float32) for argument in arguments))
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)


def test_gradients() -> None:
    model = make(True, vertices=4)
    arguments = tuple(argument.requires_grad_() for argument in inputs(2))
    assert torch.autograd.gradcheck(lambda *a: model(*a), arguments, fast_mode=True)


def test_batches_of_one_are_broadcast() -> None:
    model = make()
    pose, shape, _, _ = inputs(4)
    whole, _ = model(pose, shape[:1])
    assert whole.shape == (4, 23, 3)
    torch.testing.assert_close(whole[2], model(pose[2:3], shape[:1])[0][0])
    assert model(pose[:1], shape)[0].shape == (4, 23, 3)
    assert model(pose[:1], shape[:1], torch.zeros(4, 3))[1].shape == (4, 8, 3)
    assert model(pose[:0], shape[:0])[0].shape == (0, 23, 3)


def test_matrices_and_vectors_agree_under_autocast(device) -> None:
    model = make(dtype=torch.float32).to(device)
    pose, shape, _, _ = (argument.float().to(device) for argument in inputs(3))
    plain, _ = model(pose, shape)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast, _ = model(axis_angle_to_matrix(pose), shape)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain)


def test_errors() -> None:
    model = make()
    pose, shape, _, _ = inputs(2)
    with pytest.raises(ValueError, match=r"pose must be \[B, 8, 3, 3\]"):
        model(pose[:, :5], shape)
    with pytest.raises(ValueError, match=r"shape must be \[B, 5\]"):
        model(pose, shape[:, :4])
    with pytest.raises(ValueError, match="one batch size"):
        model(pose, inputs(3)[1])
    for parents in ((0, 0), (-1, 2, 1), ()):
        with pytest.raises(ValueError, match="parents must"):
            ancestor_table(parents)


def test_long_chain() -> None:
    """Sixty bones in a row, each turned by 6 degrees, close a circle."""
    count = 60
    bones = torch.zeros(count, 3, dtype=torch.float64)
    bones[:, 0] = torch.arange(count)
    zeros = torch.zeros(1, count, 3, dtype=torch.float64)
    model = BlendSkinning(bones, zeros, bones, zeros, torch.eye(count, dtype=torch.float64), (-1, *range(count - 1)))
    pose = zeros.clone()
    pose[..., 2] = math.radians(6)
    _, posed = model(pose, torch.zeros(1, 1))
    assert posed[0, 59].norm() == pytest.approx(1.0, abs=1e-6)  # one bone short of the start


def test_axis_angle_near_zero_is_smooth() -> None:
    vectors = torch.zeros(2, 3, dtype=torch.float64)
    vectors[1] = 1e-4
    vectors.requires_grad_()
    assert torch.autograd.gradcheck(axis_angle_to_matrix, vectors)
    torch.testing.assert_close(axis_angle_to_matrix(vectors), torch.linalg.matrix_exp(cross_matrix(vectors)))


def test_nearest_rotation_against_svd() -> None:
    matrices = torch.randn(500, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    matrices[:50] *= torch.tensor([1.0, 0.02, 0.02])  # badly conditioned, as long bones are
    u, s, v = torch.linalg.svd(matrices)
    sign = torch.det(u @ v)
    clear = (s[:, 1] + s[:, 2] * sign) / s[:, 0] > 4e-3  # else the answer is not determined
    fix = torch.diag_embed(torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], -1))
    assert (sign < 0).any() and clear.sum() > 400
    got = nearest_rotation(matrices)
    torch.testing.assert_close(got[clear], (u @ fix @ v)[clear], rtol=0, atol=1e-8)
    torch.testing.assert_close(torch.det(got[clear]), torch.ones(int(clear.sum()), dtype=torch.float64))
    chosen = matrices[clear][100:104].clone().requires_grad_()
    assert torch.autograd.gradcheck(nearest_rotation, chosen)
