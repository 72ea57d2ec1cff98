"""Half-precision copies of a transformer's matrices: what is trained with them, and when they are used."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmetro.models.attention import TokenAttention
from fastmetro.models.backbones.half_weights import half_copy, kept_weights
from fastmetro.models.half_matrices import half_matrices_in_use, keep_half_matrices
from fastmetro.models.transformer import Transformer, fuse_transformer
from fastmetro.training.optimizer import ClippedAdamW

BFLOAT = torch.bfloat16
WIDTH, MATRICES = 16, 4 + 6  # of one encoder and one decoder layer


class Network(nn.Module):
    """One stage of all samples' mesh tokens, and a head."""

    def __init__(self, topology: Any, dropout: float = 0.1) -> None:
        super().__init__()
        self.stage = Transformer(WIDTH, 2, 40, dropout, 1)
        self.head = nn.Linear(WIDTH, 3)
        self.mesh = nn.Parameter(torch.randn(1, topology.num_tokens, WIDTH))
        self.attend = TokenAttention(topology, 2, "all", "dense")

    def forward(self, images: Tensor) -> Tensor:
        position = images.new_zeros(images.shape[1] - 1, WIDTH)
        found = self.stage(images[:, 1:], images[:, :1], self.mesh, position, self.attend)
        return self.head(found[2]).float().square().mean()


def network(topology: Any, half: bool, device: torch.device | str = "cpu") -> Network:
    torch.manual_seed(0)
    found = Network(topology).to(device).train()
    fuse_transformer(found)
    if half:
        assert keep_half_matrices(found) == MATRICES
    return found


def images(step: int) -> Tensor:
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(step))


def forward(module: Any, step: int, of: nn.Module | None = None) -> Tensor:
    torch.manual_seed(step)  # of the dropout
    device = next((of or module).parameters()).device
    with half_matrices_in_use(of or module, BFLOAT), torch.autocast(device.type, BFLOAT):
        out: Tensor = module(images(step).to(device))
    return out


def ours(module: nn.Module) -> ClippedAdamW:
    return ClippedAdamW(module.parameters(), lr=0.01)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Where they are."""
    found = {}
    for name, parameter in module.named_parameters():
        kept = half_copy(parameter)
        gradient = parameter.grad if kept is None or kept.tensor.grad is None else kept.tensor.grad
        assert gradient is not None, name
        found[name] = gradient
    return found


def assert_same(found: Tensor, expected: Tensor, name: str = "") -> None:
    """To the bit; on a GPU, where sums may be taken in another order, to bfloat16's rounding."""
    if found.is_cuda:
        limit = 2**-7 * float(expected.abs().max())
        torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=limit, msg=name)
    else:
        assert torch.equal(found.float(), expected.float()), name


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert_same(a, b, name)


def test_copies_train_as_casts_do(tiny: Any, device: torch.device) -> None:
    """To the bit, with the gradients of matrices in half precision."""
    one, other = network(tiny.topology, True, device), network(tiny.topology, False, device)
    first, second = ours(one), ours(other)
    for step in range(4):
        losses = []
        for module, optimizer in ((one, first), (other, second)):
            optimizer.zero_grad()
            losses.append(loss := forward(module, step))
            loss.backward()
        assert_same(*losses)
        expected = gradients(other)
        for name, gradient in gradients(one).items():
            matrix = name.startswith("stage") and expected[name].dim() == 2
            assert gradient.dtype == (BFLOAT if matrix else torch.float32), name
            assert_same(gradient, expected[name], name)
        assert_same(first.step_clipped(0.1), second.step_clipped(0.1))
        assert_equal(one, other)
        assert len(kept_weights(one.parameters())) == MATRICES
        for matrix, kept in kept_weights(one.parameters()):
            assert torch.equal(kept.tensor, matrix.to(BFLOAT)) and not kept.is_stale(matrix)


def test_compiled_once(tiny: Any, device: torch.device) -> None:
    """The graph takes the copies, in every step, without a break; their gradients come out of it."""
    module, plain = network(tiny.topology, True, device), network(tiny.topology, False, device)
    optimizer, other = ours(module), ours(plain)
    graphs: list[Any] = []

    def backend(graph: Any, given: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, given)

    torch._dynamo.reset()
    compiled: Any = torch.compile(module, fullgraph=True, backend=backend)
    compiled_plain: Any = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for step in range(3):
        optimizer.zero_grad(), other.zero_grad()
        forward(compiled, step, module).backward()
        forward(compiled_plain, step, plain).backward()
        expected = gradients(plain)
        for name, gradient in gradients(module).items():
            assert_same(gradient, expected[name], name)
        assert all(kept.tensor.grad is not None and matrix.grad is None
                   for matrix, kept in kept_weights(module.parameters()))  # fmt: skip
        optimizer.step_clipped(0.1), other.step_clipped(0.1)
    assert len(graphs) == 1


def test_gradients_of_several_passes_add_up_in_float32(tiny: Any) -> None:
    one, other = network(tiny.topology, half=True), network(tiny.topology, half=False)
    first, second = ours(one), ours(other)
    for module in (one, other):
        for step in range(3):
            forward(module, step).backward()
    expected = [(parameter.grad, half_copy(one.get_parameter(name))) for name, parameter in other.named_parameters()]
    assert torch.equal(first.step_clipped(0.1), second.step_clipped(0.1))
    for (name, parameter), (gradient, _) in zip(one.named_parameters(), expected, strict=True):
        assert parameter.grad is not None and gradient is not None and torch.equal(parameter.grad, gradient), name
    assert_equal(one, other)


def test_a_stale_copy_is_made_anew(tiny: Any) -> None:
    module = network(tiny.topology, half=True)
    optimizer = ours(module)
    torch.manual_seed(9)
    module.load_state_dict(Network(tiny.topology).state_dict())
    plain = copy.deepcopy(module)
    assert not kept_weights(plain.parameters())
    assert torch.equal(forward(module, 1), forward(plain, 1))
    assert all(torch.equal(kept.tensor, matrix.to(BFLOAT)) for matrix, kept in kept_weights(module.parameters()))
    del optimizer


def test_when_they_are_used(tiny: Any) -> None:
    """Inside the context, by copies that an optimizer writes, of what is trained."""
    module = network(tiny.topology, half=True)
    linear = module.stage.encoder.layers[0].linear1

    def uses_copy(dtype: torch.dtype = BFLOAT) -> bool:
        module.zero_grad()
        for _, kept in kept_weights(module.parameters()):
            kept.tensor.grad = None
        with half_matrices_in_use(module, dtype), torch.autocast("cpu", dtype):
            module(images(0)).backward()
        found = half_copy(linear.weight)
        return found is not None and found.tensor.grad is not None

    assert not uses_copy()  # nobody writes them
    optimizer = ours(module)
    assert uses_copy() and not uses_copy(torch.float16)
    linear.weight.requires_grad_(False)
    assert not uses_copy() and linear.weight.grad is None
    linear.weight.requires_grad_(True)
    assert uses_copy()
    with pytest.raises(RuntimeError, match="stops"), half_matrices_in_use(module, BFLOAT):
        raise RuntimeError("stops")
    module.zero_grad()
    with torch.autocast("cpu", BFLOAT):
        module(images(0)).backward()
    assert linear.weight.grad is not None
    with half_matrices_in_use(module, BFLOAT):  # copies and pickles of that moment have none
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            with torch.autocast("cpu", BFLOAT):
                other(images(0)).backward()
            assert other.stage.encoder.layers[0].linear1.weight.grad is not None
    assert keep_half_matrices(module, None) == MATRICES and not kept_weights(module.parameters())
    assert list(module.state_dict()) == list(network(tiny.topology, half=False).state_dict())
    del optimizer


def test_refused(tiny: Any) -> None:
    with pytest.raises(TypeError, match=r"dtype must be torch.bfloat16, torch.float16 or None, got torch.float32"):
        keep_half_matrices(network(tiny.topology, half=False), torch.float32)
    with pytest.raises(TypeError, match=r"weights must be float32, got torch.float64"):
        keep_half_matrices(network(tiny.topology, half=False).double())
