"""The default loss is the one that the weights in the package were trained with, in fewer operations.

Bit for bit, but for what comes from the joints of the fine mesh: their regression was a dense product then.
"""

from __future__ import annotations

import pytest
import torch
from loss_cases import random_labels, random_outputs, small_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from bench.losses import TermByTerm
from fastmetro import load_mesh
from fastmetro.training.losses import LossWeights, MeshRecoveryLoss
from fastmetro.training.objective import Objective


def results(compute, outputs):
    leaves = {name: value.detach().clone().requires_grad_() for name, value in outputs.items()}
    total, terms = compute(leaves)
    total.backward()
    return {"total": total.detach(), **terms, **{name: value.grad for name, value in leaves.items()}}


FROM_MESH_JOINTS = ("total", "mesh_joints_3d", "mesh_joints_2d", "pred_cam", "pred_3d_vertices_fine")
"""What another order of summation may round otherwise: terms, and gradients of outputs."""


@pytest.mark.parametrize("name", ["anny-body", "anny-hand", "small"])
@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(token_joints_2d=0.5, mesh_joints_2d=0.3, vertices=0.7)])
def test_the_same_bits_as_before(name, weights):
    mesh = small_mesh() if name == "small" else load_mesh(name)
    loss, as_trained = MeshRecoveryLoss(mesh, weights), TermByTerm(mesh, weights, torch.device("cpu"))
    for batch in (1, 5):
        labels = random_labels(mesh, batch, confidence=False, dtype=torch.float32)
        labels.joints_2d[..., 2].round_()  # 0 or 1, as in the synthetic images
        if batch == 1:
            for flags in (labels.has_vertices, labels.has_joints_3d, labels.has_joints_2d):
                flags.fill_(True)
        outputs = random_outputs(mesh, batch, dtype=torch.float32)
        expected = results(lambda leaves, labels=labels: as_trained(leaves, labels), outputs)
        actual = results(lambda leaves, labels=labels: loss(leaves, labels), outputs)
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert value.abs().max() > 0
            if key in FROM_MESH_JOINTS:
                torch.testing.assert_close(actual[key], value.detach(), rtol=2e-6, atol=1e-7, msg=key)
            else:
                assert torch.equal(actual[key], value.detach()), key


class _Operations(TorchDispatchMode):
    """Counts what does work: views and allocations are left out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name.startswith("empty") or name in ("_unsafe_view", "new_empty_strided"))
        return func(*args, **(kwargs or {}))


def test_fewer_operations_than_term_by_term():
    """Forward and backward, without views and allocations."""
    mesh = small_mesh()
    labels = random_labels(mesh, 3, confidence=False, dtype=torch.float32)
    outputs = random_outputs(mesh, 3, dtype=torch.float32)
    loss, counts = MeshRecoveryLoss(mesh), []
    as_trained = TermByTerm(mesh, loss.weights, torch.device("cpu"))
    for compute in (lambda leaves: as_trained(leaves, labels), lambda leaves: loss(leaves, labels)):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in outputs.items()}
        with _Operations() as operations:
            compute(leaves)[0].backward()
        counts.append(operations.count)
    assert counts[1] < 0.75 * counts[0], counts


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("part", ["body", "hand"])
def test_losses_compile_without_graph_breaks(part: str, centred: bool) -> None:
    """With edges and normals, with denominators of several processes and without: the same values and gradients."""
    mesh = small_mesh(part)
    loss = Objective(
        MeshRecoveryLoss(mesh, LossWeights(edge_lengths=1.0, normals=0.5, centred=centred, surface_level="fine"))
    )
    labels = random_labels(mesh, 3)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for counts in (None, 2 * loss.counts(labels)):
        outputs = {name: x.requires_grad_() for name, x in random_outputs(mesh, 3).items()}
        (total, terms), (expected, other) = compiled(outputs, labels, counts), loss(outputs, labels, counts)
        torch.testing.assert_close((total, terms), (expected, other))
        found, wanted = (
            torch.autograd.grad(one, list(outputs.values()), allow_unused=True) for one in (total, expected)
        )
        torch.testing.assert_close(found, wanted)
