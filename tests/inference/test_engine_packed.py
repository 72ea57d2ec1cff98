"""Linear layers of the engine on a CPU, by oneDNN with packed weights: everything that is added, and new weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro.inference.engine import onednn, products
from fastmetro.inference.engine.folding import Affine
from fastmetro.inference.engine.layers import Folded
from fastmetro.inference.engine.products import Tokens

CPU = torch.device("cpu")
WIDTH, FEATURES, TOKENS = 128, 256, 9
pytestmark = pytest.mark.skipif(not onednn.usable(torch.zeros(1)), reason="no oneDNN here")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def folded(per_token: bool, seed: int = 1, dtype: torch.dtype = torch.float32) -> Folded:
    made = Folded(dtype, CPU)
    put(made, per_token, seed)
    return made


def put(made: Folded, per_token: bool, seed: int) -> None:
    bias = draw(TOKENS, FEATURES, seed=seed + 1) if per_token else draw(FEATURES, seed=seed + 1)
    made.put_affine("layer", Affine(draw(FEATURES, WIDTH, seed=seed).double(), bias.double()))


def exact(x: Tensor, made: Folded) -> Tensor:
    weight, bias = made.affine("layer")[:2]
    return x.double() @ weight.double().T + bias.double()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the packed products."""
    found: list[Tensor] = []
    real = onednn.linear

    def record(x: Tensor, *arguments: object, **options: object) -> Tensor:
        found.append(x)
        return real(x, *arguments, **options)

    monkeypatch.setattr(onednn, "linear", record)
    return found


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("images", [1, 3])
@torch.inference_mode()
def test_everything_that_is_added(images: int, per_token: bool, taken: list[Tensor]) -> None:
    made, x = folded(per_token), draw(images, TOKENS, WIDTH)
    layer, want = made.affine("layer"), exact(x, made)
    torch.testing.assert_close(products.update(x, layer).values.double(), want, rtol=1e-4, atol=1e-4)
    kept = draw(images, TOKENS, FEATURES, seed=7)
    for residual in (kept, kept[:1].expand(images, -1, -1), kept.transpose(1, 2).contiguous().transpose(1, 2)):
        before = residual.clone()
        got = products.update(x, layer, Tokens(residual, constant=True)).values
        torch.testing.assert_close(got.double(), want + before.double(), rtol=1e-4, atol=1e-4)
        assert torch.equal(residual, before)
    spread = draw(images, TOKENS, 2 * WIDTH)[..., ::2]
    torch.testing.assert_close(
        products.update(spread, layer).values.double(), exact(spread, made), rtol=1e-4, atol=1e-4
    )
    norm = F.layer_norm(x, [WIDTH], eps=1e-5)
    for relu in (False, True):
        read = products.read(Tokens(x), layer, 1e-5, relu=relu).double()
        wanted = exact(norm, made)
        torch.testing.assert_close(read, wanted.relu() if relu else wanted, rtol=1e-4, atol=1e-4)
    assert len(taken) == 7


@torch.inference_mode()
def test_small_weights_and_other_types_are_for_pytorch(taken: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = folded(False), draw(1, TOKENS, WIDTH)
    monkeypatch.setattr(products, "PACKED", FEATURES * WIDTH + 1)
    products.update(x, made.affine("layer"))
    monkeypatch.setattr(products, "PACKED", FEATURES * WIDTH)
    products.update(x.double(), folded(False, dtype=torch.float64).affine("layer"))
    assert not taken
    products.update(x, made.affine("layer"))
    assert len(taken) == 1


@pytest.mark.parametrize("inference", [False, True])
def test_new_weights_and_copies(inference: bool, taken: list[Tensor]) -> None:
    """Folded again in place, also in inference mode, where no version tells; copies pack for themselves."""
    with torch.inference_mode(inference):
        made, x = folded(True), draw(2, TOKENS, WIDTH)
        first = products.update(x, made.affine("layer")).values
        put(made, True, seed=5)
        second = products.update(x, made.affine("layer")).values
        torch.testing.assert_close(second.double(), exact(x, made), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(first, second)
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(products.update(x, other.affine("layer")).values, second)
    assert len(taken) == 4
