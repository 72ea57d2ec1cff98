"""Every term of the mesh recovery loss against loops, with labels that are absent."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from loss_cases import loops, random_labels, random_outputs, small_mesh, without
from torch.utils._python_dispatch import TorchDispatchMode

from fastmetro import load_mesh
from fastmetro.training.losses import LossWeights, MeshRecoveryLoss

EVERYTHING = LossWeights(
    0.9, 1.1, 1.3, 0.7, 0.8, 0.5, 0.3, 0.2, edge_lengths=1.7, edge_self=0.6, normals=0.4, surface_level="fine"
)
CASES = [(part, compat, centred) for part in ("body", "hand") for compat in (None, "published") for centred in (0, 1)]


def make(part, compat, centred, level="fine"):
    mesh = small_mesh(part)
    weights = dataclasses.replace(EVERYTHING, centred=bool(centred), surface_level=level)
    return mesh, MeshRecoveryLoss(mesh, weights, compat)


def gradients(loss, outputs, labels, counts=None):
    leaves = {name: value.detach().clone().requires_grad_() for name, value in outputs.items()}
    total, terms = loss(leaves, labels, counts)
    total.backward()
    return total.detach(), terms, {name: value.grad for name, value in leaves.items()}


@pytest.mark.parametrize("confidence", [False, True], ids=["plain", "confidence"])
@pytest.mark.parametrize(("part", "compat", "centred"), CASES)
def test_terms_against_loops(part, compat, centred, confidence, device):
    for seed, level in enumerate(("fine", "coarse", "fine", "coarse")):
        mesh, loss = make(part, compat, centred, level)
        outputs, labels = random_outputs(mesh, 5, seed), random_labels(mesh, 5, seed, confidence)
        expected = loops(mesh, loss.weights, compat == "published", outputs, labels)
        moved = {name: value.to(device) for name, value in outputs.items()}
        total, terms = loss.to(device).double()(moved, labels.to(device))
        assert set(terms) == set(expected) == set(loss.term_names)
        assert all(value > 0 for value in expected.values())
        for name, value in terms.items():
            assert value.dtype == torch.float64
            np.testing.assert_allclose(float(value), expected[name], rtol=1e-12, err_msg=name)
        weights = dataclasses.asdict(loss.weights)
        by_hand = 0.0
        for name, value in expected.items():
            level_name = name.removeprefix("vertices_")
            by_hand += value * (
                weights[name] if name in weights else weights["vertices"] * weights[f"{level_name}_share"]
            )
        np.testing.assert_allclose(float(total), by_hand, rtol=1e-6)  # the factors are float32


@pytest.mark.parametrize(("part", "compat", "centred"), CASES)
def test_gradcheck(part, compat, centred):
    mesh, loss = make(part, compat, centred)
    outputs = random_outputs(mesh, 3, seed=5)
    labels = without(random_labels(mesh, 3, seed=2), float("nan"), compat == "published")
    names = list(outputs)

    def total(*values):
        return loss.double()(dict(zip(names, values, strict=True)), labels)[0]

    assert torch.autograd.gradcheck(total, tuple(value.requires_grad_() for value in outputs.values()), fast_mode=True)


@pytest.mark.parametrize(("part", "compat", "centred"), CASES)
def test_absent_labels_may_hold_anything(part, compat, centred, device):
    mesh, loss = make(part, compat, centred)
    published = compat == "published"
    outputs = {name: value.to(device) for name, value in random_outputs(mesh, 6, dtype=torch.float32).items()}
    labels = random_labels(mesh, 6, seed=3, dtype=torch.float32)
    expected = gradients(loss.to(device), outputs, labels.to(device))
    for value in (float("nan"), float("inf"), -1e30):
        total, terms, grads = gradients(loss, outputs, without(labels, value, published).to(device))
        assert torch.isfinite(total) and torch.equal(total, expected[0])
        assert all(torch.equal(terms[name], expected[1][name]) for name in terms)
        assert all(torch.equal(grads[name], expected[2][name]) for name in grads)
    unlabelled = ~labels.has_vertices.to(device)
    coarse = grads["pred_3d_vertices_coarse"]
    assert unlabelled.any() and coarse[unlabelled].abs().max() == 0 and coarse[~unlabelled].abs().min() > 0


@pytest.mark.parametrize(("part", "compat", "centred"), CASES)
@pytest.mark.parametrize("batch", [4, 0])
def test_a_batch_without_labels_costs_nothing(part, compat, centred, batch):
    mesh, loss = make(part, compat, centred)
    none = torch.zeros(batch, dtype=torch.bool)
    labels = random_labels(mesh, batch, dtype=torch.float32)
    labels = dataclasses.replace(labels, has_vertices=none, has_joints_3d=none, has_joints_2d=none)
    labels.vertices.fill_(float("nan"))
    labels.joints_3d.fill_(float("nan"))
    labels.joints_2d.fill_(float("nan"))
    total, terms, grads = gradients(loss, random_outputs(mesh, batch, dtype=torch.float32), labels)
    assert total == 0 and all(value == 0 for value in terms.values())
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, device):
    mesh, loss = make("body", None, 1)
    labels = random_labels(mesh, 4, dtype=torch.float32).to(device)
    outputs = {name: value.to(device, dtype) for name, value in random_outputs(mesh, 4).items()}
    loss.to(device)
    expected, _ = loss({name: value.float() for name, value in outputs.items()}, labels)
    with torch.autocast(device.type, torch.bfloat16):
        total, terms = loss(outputs, labels)
    assert total.dtype == torch.float32 and torch.equal(total, expected)
    assert all(value.dtype == torch.float32 for value in terms.values())


@pytest.mark.parametrize(("part", "compat", "centred"), CASES)
def test_shares_of_a_batch_add_up(part, compat, centred):
    """Three processes with 1, 4 and 2 samples, the first without any label: as DDP, averages of their gradients."""
    mesh, loss = make(part, compat, centred)
    loss.double()
    outputs, labels = random_outputs(mesh, 7, seed=4), random_labels(mesh, 7, seed=4)
    for flags in (labels.has_vertices, labels.has_joints_3d, labels.has_joints_2d):
        flags[0] = False
    whole = gradients(loss, outputs, labels)
    shares = (slice(0, 1), slice(1, 5), slice(5, 7))

    def share(part):
        fields = {name: value if value is None else value[part] for name, value in vars(labels).items()}
        return type(labels)(**fields)

    counts = sum(loss.counts(share(part)).double() for part in shares)
    torch.testing.assert_close(counts, loss.counts(labels).double())
    results = [
        gradients(loss, {name: value[part] for name, value in outputs.items()}, share(part), counts / 3)
        for part in shares
    ]
    torch.testing.assert_close(sum(total for total, _, _ in results) / 3, whole[0], rtol=1e-6, atol=0)
    for name in whole[1]:
        torch.testing.assert_close(sum(terms[name] for _, terms, _ in results) / 3, whole[1][name], rtol=1e-6, atol=0)
    for name, expected in whole[2].items():
        together = torch.cat([grads[name] for _, _, grads in results]) / 3
        torch.testing.assert_close(together, expected, rtol=1e-6, atol=1e-12)


def test_the_published_terms_on_the_published_mesh(shared):
    mesh = load_mesh("smpl", data=shared / "data" / "fastmetro")
    weights = LossWeights.published_body()
    outputs = {name: 0.5 * value for name, value in random_outputs(mesh, 2, dtype=torch.float32).items()}
    labels = random_labels(mesh, 2, seed=1, dtype=torch.float32)
    total, terms = MeshRecoveryLoss(mesh, weights, "published")(outputs, labels)
    expected = loops(mesh, weights, True, outputs, labels)
    for name, value in terms.items():
        np.testing.assert_allclose(float(value), expected[name], rtol=2e-5, err_msg=name)
    e = expected
    groups = [
        1000 * (e["token_joints_3d"] + e["mesh_joints_3d"]),
        100 * (0.25 * e["vertices_coarse"] + 0.5 * e["vertices_intermediate"] + 0.25 * e["vertices_fine"]),
        100 * (5.0 * e["edge_lengths"] + 1e-4 * e["edge_self"] + 0.1 * e["normals"]),
        100 * (e["token_joints_2d"] + e["mesh_joints_2d"]),
    ]
    np.testing.assert_allclose(float(total), sum(groups), rtol=2e-5)


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("part", "compat", "centred"), CASES)
def test_nothing_waits_for_the_device(part, compat, centred, device):
    mesh, loss = make(part, compat, centred)
    outputs = {name: value.to(device) for name, value in random_outputs(mesh, 3, dtype=torch.float32).items()}
    labels = random_labels(mesh, 3, dtype=torch.float32).to(device)
    loss.to(device)
    gradients(loss, outputs, labels)  # what is loaded at the first call may wait
    with _Names() as ran, _no_synchronization(device):
        gradients(loss, outputs, labels)
    assert "sgn" in ran.names  # what runs backward is seen, too
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh"} & set(ran.names)


@contextlib.contextmanager
def _no_synchronization(device):
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
