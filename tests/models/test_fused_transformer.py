"""The transformer in training by this project's ops: equal to PyTorch's, and what of it changes nothing."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from test_transformer import batches
from torch import Tensor, nn

from fastmetro.models import fused_transformer
from fastmetro.models.attention import TokenAttention
from fastmetro.models.transformer import Transformer, fuse_transformer
from fastmetro_kernels.residual_norm import final_residual_norm, residual_norm

WIDTH, HEADS, FEEDFORWARD, LAYERS = 16, 2, 40, 2


def stage(
    dropout: float, dtype: torch.dtype, device: torch.device | str = "cpu", layers: int = LAYERS, seed: int = 0
) -> Transformer:
    """In training, with norms whose weights and biases count, and linear layers whose biases do."""
    torch.manual_seed(seed)
    found = Transformer(WIDTH, HEADS, FEEDFORWARD, dropout, layers).to(device, dtype).train()
    for layer in found.modules():
        if isinstance(layer, nn.LayerNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
        if isinstance(layer, (nn.LayerNorm, nn.Linear)):
            nn.init.normal_(layer.bias)
    return found


def inputs(topology: Any, dtype: torch.dtype, device: torch.device | str = "cpu", batch: int = 3) -> list[Tensor]:
    """Image tokens, camera token, mesh tokens of all samples, and the position, all of which ask for gradients."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, 6, WIDTH), (batch, 1, WIDTH), (1, topology.num_tokens, WIDTH), (6, WIDTH)]
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [one.to(device, dtype).requires_grad_() for one in drawn]


def attention(topology: Any, device: torch.device | str = "cpu") -> TokenAttention:
    return TokenAttention(topology, HEADS, "all", "dense").to(device)


def step(network: Any, given: list[Tensor], attend: TokenAttention) -> dict[str, Tensor]:
    """The three results, and all gradients."""
    outs = network(*given, attend)
    parameters = dict(network.named_parameters())
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape) for out in outs]
    leaves = [*given, *parameters.values()]
    grads = torch.autograd.grad(outs, leaves, weights)
    names = ["image_tokens", "camera", "mesh_tokens", "position", *parameters]
    return {f"out {place}": out.detach() for place, out in enumerate(outs)} | dict(zip(names, grads, strict=True))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype | None]]:
    """The ops that are called, and the dtypes of norms."""
    found: list[tuple[str, torch.dtype | None]] = []
    for name in ("residual_norm", "final_residual_norm", "relu_dropout"):
        op = getattr(fused_transformer, name)

        def counted(*given: Any, op: Any = op, name: str = name, **options: Any) -> Any:
            bias = options.get("branch_bias" if "norm" in name else "bias")
            assert (bias is None) == ("norm" in name and given[1] is None)  # the one of the layer in front
            found.append((name, options.get("dtype")))
            return op(*given, **options)

        monkeypatch.setattr(fused_transformer, name, counted)
    return found


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_equal_without_dropout(
    dtype: torch.dtype, rounding: float, layers: int, tiny: Any, device: torch.device, calls: list[Any]
) -> None:
    """Results and the gradients of everything."""
    if device.type != "cpu" and dtype == torch.float64:
        pytest.skip("on the CPU")
    plain = stage(0.0, dtype, device, layers)
    fused = copy.deepcopy(plain)
    assert fuse_transformer(fused) == 2 * layers
    fused = copy.deepcopy(fused)  # copies keep it
    given, attend = inputs(tiny.topology, dtype, device), attention(tiny.topology, device)
    expected = step(plain, given, attend)
    assert not calls
    found = step(fused, given, attend)
    counts = {name: sum(one == name for one, _ in calls) for name in ("residual_norm", "final_residual_norm")}
    assert counts == {"residual_norm": 5 * layers - 2, "final_residual_norm": 4}
    assert sum(one == "relu_dropout" for one, _ in calls) == 2 * layers
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        limit = rounding * (1 + float(value.abs().max()))
        torch.testing.assert_close(
            found[name], value, rtol=rounding, atol=limit, msg=lambda text, name=name: name + text
        )


def test_names_stay_and_nothing_else_changes(tiny: Any, calls: list[Any]) -> None:
    """Neither evaluation, nor training that was not asked for, nor where it was asked back."""
    plain = stage(0.1, torch.float32)
    fused = copy.deepcopy(plain)
    fuse_transformer(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    given, attend = inputs(tiny.topology, torch.float32), attention(tiny.topology)
    with torch.no_grad():
        for one, same in zip(fused.eval()(*given, attend), plain.eval()(*given, attend), strict=True):
            assert torch.equal(one, same)
    plain.train(), fused.train()
    assert fuse_transformer(fused, fused=False) == 2 * LAYERS
    torch.manual_seed(5)
    expected = step(plain, given, attend)
    torch.manual_seed(5)
    found = step(fused, given, attend)
    assert not calls and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("change", ["no weight", "half weights", "no layers", "no bias", "a half bias"])
def test_what_the_ops_do_not_take_stays_pytorchs(change: str, tiny: Any, calls: list[Any]) -> None:
    fused = stage(0.1, torch.float32, layers=0 if change == "no layers" else 1)
    dtype = torch.bfloat16 if change == "half weights" else torch.float32
    fused.to(dtype)
    if change == "no weight":
        for part in (fused.encoder, fused.decoder):
            part.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
    for part in (fused.encoder, fused.decoder):
        if change == "no bias":
            part.layers[0].linear2 = nn.Linear(FEEDFORWARD, WIDTH, bias=False)
        if change == "a half bias":  # what autocast rounds and PyTorch's layers take
            part.layers[0].self_attn.out_proj.bias.data = torch.zeros(WIDTH, dtype=torch.bfloat16)
    fuse_transformer(fused)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "a half bias"):
        fused(*inputs(tiny.topology, dtype), attention(tiny.topology))
    assert not calls


@pytest.mark.parametrize(("dropout", "attended"), [(0.1, 3), (0.0, 1)])
def test_shared_tokens_are_projected_once(
    dropout: float, attended: int, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each of the three samples: the first norm and projections, and without dropout the whole attention."""
    fused = stage(dropout, torch.float32)
    assert fuse_transformer(fused) == 2 * LAYERS
    attend, normed = attention(tiny.topology), []
    seen = batches(fused, attend, monkeypatch)

    def recorded(tokens: Tensor, *given: Any, **options: Any) -> Tensor:
        normed.append(len(tokens))
        return final_residual_norm(tokens, *given, **options)

    monkeypatch.setattr(fused_transformer, "final_residual_norm", recorded)
    fused(*inputs(tiny.topology, torch.float32), attend)
    assert normed == [3, 3, 1, 3]  # in front of and behind the encoder, and the decoder
    assert seen == {"project": [1, 3], "attend": [attended, 3]}


@pytest.mark.parametrize("token_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_under_autocast(token_dtype: torch.dtype, tiny: Any, calls: list[Any]) -> None:
    """Results have those of PyTorch's layers; norms that linear layers alone take are in half precision.

    Errors are medians over networks: which numbers in front of a ReLU rounding moves over 0 is chance in each.
    """
    attend = attention(tiny.topology)
    given = [one.detach().to(token_dtype).requires_grad_() for one in inputs(tiny.topology, torch.float32)]
    errors: dict[str, tuple[list[float], list[float]]] = {}
    for seed in range(8):
        plain = stage(0.0, torch.float32, seed=seed)
        fused = copy.deepcopy(plain)
        fuse_transformer(fused)
        exact = step(copy.deepcopy(plain).double(), [one.detach().double().requires_grad_() for one in given], attend)
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = step(plain, given, attend), step(fused, given, attend)
        dtypes = [dtype for name, dtype in calls if name != "relu_dropout"]
        wide, narrow = token_dtype, torch.bfloat16  # on a GPU wide is float32 of half precision, too
        assert dtypes == [wide, narrow] * LAYERS + [wide] + [narrow] * 3 * LAYERS + [wide]
        for name, value in expected.items():
            assert found[name].dtype == value.dtype, name
            size = float(exact[name].norm())
            for one, kept in zip((found[name], value), errors.setdefault(name, ([], [])), strict=True):
                kept.append(float((one.double() - exact[name]).norm()) / size)
    for name, (ours, theirs) in errors.items():
        assert statistics.median(ours) < 1.5 * statistics.median(theirs) + 1e-6, (name, ours, theirs)


@pytest.mark.parametrize(("dynamic", "dropout", "autocast"), [(False, 0.1, True), (True, 0.1, False)])
def test_compiled(dynamic: bool, dropout: float, autocast: bool, tiny: Any) -> None:
    """Without a break of the graph; with the numbers that the generator gives without it."""
    fused = stage(dropout, torch.float32, layers=1)
    fuse_transformer(fused)
    attend = attention(tiny.topology)
    torch._dynamo.reset()
    compiled: Any = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (3, 2):
        given = inputs(tiny.topology, torch.float32, batch=batch)
        found = []
        for network in (fused, compiled):
            torch.manual_seed(7)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outs = network(*given, attend)
            found.append([*outs, *torch.autograd.grad(outs, given, [torch.ones_like(out) for out in outs])])
        for one, same in zip(*found, strict=True):
            rounding = 2e-2 if autocast else 1e-5
            torch.testing.assert_close(one, same, rtol=rounding, atol=rounding * float(one.detach().abs().max()))


def test_dropout_drops_and_scales(tiny: Any) -> None:
    """Other numbers in every pass, the same of the same state of the generator, and the mean of many that of none."""
    fused = stage(0.3, torch.float64)
    fuse_transformer(fused)
    given, attend = inputs(tiny.topology, torch.float64), attention(tiny.topology)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return fused.encoder(torch.cat([given[1], given[0]], 1), torch.zeros(7, WIDTH, dtype=torch.float64)).detach()

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    torch.manual_seed(3)
    first, second = (fused(*given, attend)[2] for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_no_two_dropouts_share_their_numbers(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    seeds: list[int] = []

    def record(op: Any) -> Any:
        def recorded(*given: Any, **options: Any) -> Any:
            seeds.extend([int(options["seed"])] if options.get("seed") is not None else [])
            return op(*given, **options)

        return recorded

    for name in ("residual_norm", "final_residual_norm", "relu_dropout"):
        monkeypatch.setattr(fused_transformer, name, record(getattr(fused_transformer, name)))
    fused = stage(0.1, torch.float32)
    fuse_transformer(fused)
    fused.decoder.layers[0].dropout = 0.0
    fused(*inputs(tiny.topology, torch.float32), attention(tiny.topology))
    assert len(seeds) == len(set(seeds)) == 3 * LAYERS + 4 * (LAYERS - 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_a_graph(tiny: Any) -> None:
    """Each replay drops other numbers."""
    fused = stage(0.1, torch.float32, "cuda")
    fuse_transformer(fused)
    given, attend = inputs(tiny.topology, torch.float32, "cuda"), attention(tiny.topology, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(fused, given, attend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(fused, given, attend)
    graph.replay()
    first = {name: value.clone() for name, value in captured.items()}
    graph.replay()
    assert all(bool(value.isfinite().all()) for value in captured.values())
    assert not torch.equal(captured["out 2"], first["out 2"])


def test_the_ops_are_those_of_the_package() -> None:
    assert fused_transformer.residual_norm is residual_norm
    assert fused_transformer.final_residual_norm is final_residual_norm
