import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from fastmetro.evaluation import metrics


def _points(batch=8, count=14, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(batch, count, 3)))


def _similar(points, seed=1):
    rng = np.random.default_rng(seed)
    rotations = torch.from_numpy(Rotation.random(len(points), random_state=seed).as_matrix())
    scales = torch.from_numpy(rng.uniform(0.2, 5.0, size=(len(points), 1, 1)))
    shifts = torch.from_numpy(rng.normal(size=(len(points), 1, 3)) * 3)
    return scales * points @ rotations + shifts


def test_point_error_of_a_known_case():
    a = torch.zeros(1, 2, 3)
    b = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]]])
    assert metrics.point_error(a, b).tolist() == [3.0]


def test_mpjpe_recentres_both_sides_at_the_roots():
    joints = _points()
    moved = joints + torch.tensor([1.0, -2.0, 3.0])
    assert metrics.mpjpe(moved, joints, roots=(2, 3)).max() < 1e-12
    bent = joints.clone()
    bent[:, 5, 0] += 1.4
    np.testing.assert_allclose(metrics.mpjpe(bent, joints, roots=(2, 3)), np.full(8, 0.1), atol=1e-12)


def test_rotated_scaled_shifted_copies_have_no_pa_error():
    joints = _points(batch=64)
    assert metrics.pa_mpjpe(_similar(joints), joints).max() < 1e-12


def test_pa_agrees_with_scipy_where_no_reflection_is_wanted():
    target = _points(batch=32)
    source = _similar(target) + 0.05 * _points(batch=32, seed=5)
    aligned = metrics.procrustes_align(source, target).numpy()
    for i in range(32):
        a = (source[i] - source[i].mean(0)).numpy()
        b = (target[i] - target[i].mean(0)).numpy()
        rotation, singular_sum = orthogonal_procrustes(a, b)
        assert np.linalg.det(rotation) > 0
        expected = singular_sum / (a**2).sum() * a @ rotation + target[i].mean(0).numpy()
        np.testing.assert_allclose(aligned[i], expected, atol=1e-10)


def test_rotation_agrees_with_scipy_kabsch_and_is_never_a_reflection():
    target = _points(batch=32)
    source = target.clone()
    source[..., 0] *= -1
    source = source + 0.1 * _points(batch=32, seed=3)
    aligned = metrics.procrustes_align(source, target)
    for i in range(32):
        a = (source[i] - source[i].mean(0)).numpy()
        b = (target[i] - target[i].mean(0)).numpy()
        rotation = Rotation.align_vectors(b, a)[0].as_matrix()  # proper rotations only
        turned = a @ rotation.T
        expected = (turned * b).sum() / (a**2).sum() * turned + target[i].mean(0).numpy()
        np.testing.assert_allclose(aligned[i].numpy(), expected, atol=1e-8)
    mirrored = target * torch.tensor([-1.0, 1.0, 1.0])
    assert metrics.pa_mpjpe(mirrored, target).min() > 0.1


def test_alignment_is_the_least_squares_optimum():
    target, source = _points(batch=1, seed=7), _points(batch=1, seed=8)
    best = float((metrics.procrustes_align(source, target) - target).square().sum())
    a, b = source[0].numpy(), target[0].numpy()

    def cost(x):
        return ((np.exp(x[6]) * Rotation.from_rotvec(x[:3]).apply(a) + x[3:6] - b) ** 2).sum()

    found = min(minimize(cost, np.r_[start, np.zeros(4)]).fun for start in np.eye(3) * 2 - 0.5)
    assert best <= found + 1e-6


def test_flat_and_degenerate_point_sets():
    flat = _points(batch=4)
    flat[..., 2] = 0
    assert metrics.pa_mpjpe(_similar(flat), flat).max() < 1e-12
    same = torch.ones(1, 14, 3, dtype=torch.float64)
    target = _points(batch=1)
    aligned = metrics.procrustes_align(same, target)
    np.testing.assert_allclose(aligned, target.mean(dim=1, keepdim=True).expand_as(target), atol=1e-12)


def test_float32_and_device(device):
    joints = _points().float().to(device)
    aligned = metrics.procrustes_align(_similar(_points()).float().to(device), joints)
    assert aligned.dtype == torch.float32 and aligned.device == joints.device
    assert metrics.point_error(aligned, joints).max() < 1e-5


def test_empty_batch():
    assert metrics.pa_mpjpe(torch.zeros(0, 14, 3), torch.zeros(0, 14, 3)).shape == (0,)


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match="one shape"):
        metrics.point_error(torch.zeros(2, 14, 3), torch.zeros(2, 13, 3))
    with pytest.raises(ValueError, match=r"\[B, N >= 1, 3\]"):
        metrics.point_error(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="prediction must be a floating point"):
        metrics.point_error(torch.zeros(2, 14, 3, dtype=torch.int64), torch.zeros(2, 14, 3))
    with pytest.raises(ValueError, match="NaN"):
        metrics.procrustes_align(torch.full((1, 14, 3), float("nan")), torch.zeros(1, 14, 3))
    with pytest.raises(ValueError, match="roots"):
        metrics.mpjpe(torch.zeros(1, 14, 3), torch.zeros(1, 14, 3), roots=())


def test_mean_metrics_weighs_samples_not_batches():
    meter = metrics.MeanMetrics()
    meter.update(error=torch.tensor([1.0, 2.0, 3.0]))
    meter.update(error=torch.tensor([10.0]))
    meter.update(valid=torch.tensor([True, False]), other=torch.tensor([4.0, 100.0]))
    meter.update(valid=torch.tensor([False]), missing=torch.tensor([1.0]))
    result = meter.compute()
    assert result["error"] == 4.0 and result["other"] == 4.0 and np.isnan(result["missing"])


def test_mean_metrics_take_masks_only():
    """Numbers of samples would read as a mask; after a refusal nothing was added."""
    meter = metrics.MeanMetrics()
    with pytest.raises(TypeError, match=r"valid must be a bool mask \[B\], got torch\.int64"):
        meter.update(valid=torch.tensor([0, 2]), error=torch.ones(2))
    with pytest.raises(ValueError, match=r"valid must have the shape of other, \(3,\), got \(2,\)"):
        meter.update(valid=torch.tensor([True, False]), error=torch.ones(2), other=torch.ones(3))
    assert meter.compute() == {}
