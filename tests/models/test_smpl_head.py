"""The SMPL parameter regressor: names, rotations, gradients of the projection."""

from __future__ import annotations

import pytest
import torch

from fastmetro.models.smpl_head import SMPLParameterRegressor, nearest_rotation


def matrices(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_names_of_released_checkpoints() -> None:
    names = set(SMPLParameterRegressor(1723).state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {
        f"regressor.{block}.fc_block.{layer}.{p}"
        for block, layer in ((0, 0), (1, 0), (1, 3), (2, 0), (2, 3), (3, 0))
        if block < 3
        for p in norm[:2]
    }
    expected |= {
        f"regressor.{block}.fc_block.{layer}.{p}"
        for block, layer in ((0, 1), (1, 1), (1, 4), (2, 1), (2, 4))
        for p in norm
    }
    expected |= {"regressor.3.weight", "regressor.3.bias"}
    assert names == expected


def test_shapes_and_rotations(device: torch.device) -> None:
    head = SMPLParameterRegressor(20).eval().to(device)
    rotations, betas = head(torch.randn(5, 20, 3, device=device))
    assert rotations.shape == (5, 24, 3, 3)
    assert betas.shape == (5, 10)
    assert rotations.device.type == device.type
    rotations = rotations.cpu()
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(5, 24, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(5, 24), rtol=0, atol=1e-5)


def test_projection_is_the_nearest_rotation() -> None:
    m = matrices(200)
    r = nearest_rotation(m)
    u, _, vh = torch.linalg.svd(m)
    flipped = torch.linalg.det(u @ vh) < 0
    assert flipped.any()
    assert not flipped.all()
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(200, dtype=torch.float64))
    others = nearest_rotation(matrices(1000, seed=1))
    distance = (r - m).flatten(1).norm(dim=1)
    assert (distance[:, None] <= torch.cdist(m.flatten(1), others.flatten(1)) + 1e-9).all()

    published = torch.linalg.det(u @ vh)[:, None, None] * (u @ vh)
    torch.testing.assert_close(nearest_rotation(m, compat=True), published)
    torch.testing.assert_close(nearest_rotation(m)[~flipped], published[~flipped])


def test_devices_agree(device: torch.device) -> None:
    m = matrices(50, seed=4)
    torch.testing.assert_close(nearest_rotation(m.to(device)).cpu(), nearest_rotation(m), rtol=0, atol=1e-9)


@pytest.mark.parametrize("compat", [False, True])
def test_gradient_of_the_projection(compat: bool) -> None:
    m = matrices(6, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nearest_rotation(x, compat), (m,))


def test_gradient_is_finite_where_singular_values_coincide() -> None:
    m = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    m[1] *= 0
    m.requires_grad_()
    weights = matrices(2, seed=3)
    (gradient,) = torch.autograd.grad((nearest_rotation(m) * weights).sum(), m)
    torch.testing.assert_close(gradient[0], (weights[0] - weights[0].mT) / 2)  # d(exp W) at the identity
    assert not gradient[1].any()


def test_float16_is_computed_in_float32() -> None:
    assert nearest_rotation(matrices(2).half()).dtype == torch.float32
