"""Behaviour of topology-masked attention around its numbers: autograd, tracing, autocast, backends, errors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import (
    DEVICES,
    FLOAT32_RUNNERS,
    KERNEL_RUNNERS,
    RUNNERS,
    Runner,
    graphs,
    random_inputs,
    topology_of,
)
from torch import Tensor
from torch.nn import functional as F

import fastmetro_kernels
from fastmetro_kernels import backends
from fastmetro_kernels.attention import topology_attention
from fastmetro_kernels.attention.dispatch import backend_reasons
from fastmetro_kernels.backends import BackendUnavailable
from fastmetro_kernels.topology import TokenTopology

every_runner = pytest.mark.parametrize("runner", RUNNERS, ids=str)
float32_runner = pytest.mark.parametrize("runner", FLOAT32_RUNNERS, ids=str)
kernel_runner = pytest.mark.parametrize("runner", KERNEL_RUNNERS, ids=str)
gradcheck_runner = pytest.mark.parametrize("runner", [r for r in RUNNERS if r.dtype == torch.float64], ids=str)


def small(runner: Runner, name: str = "asymmetric", batch: int = 1) -> tuple[list[Tensor], TokenTopology]:
    """Leaves with 2 heads of 16 and the topology of a graph."""
    graph = graphs()[name]
    return random_inputs(runner, batch, len(graph.mask), 2, 16), topology_of(graph, runner.device)


# ---- autograd -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hubs_only", "isolated_without_hubs", "asymmetric"])
@gradcheck_runner
def test_gradcheck(runner: Runner, name: str) -> None:
    graph = graphs()[name]
    inputs = random_inputs(runner, 1, len(graph.mask), 1, 8)
    topology = topology_of(graph, runner.device)

    def attend(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = topology_attention(*leaves, topology, dropout_p=0.2, seed=3, return_lse=True, backend=runner.backend)
        return out, torch.where(torch.isfinite(lse), lse, torch.zeros_like(lse))

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_reference_is_differentiable_twice() -> None:
    runner = Runner("cpu", "reference", torch.float64)
    inputs = random_inputs(runner, 1, 38, 1, 8)
    topology = topology_of(graphs()["mesh"])

    def attend(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return topology_attention(*leaves, topology, dropout_p=0.2, seed=3, return_lse=True, backend="reference")

    assert torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)


@kernel_runner
def test_second_derivatives_name_the_reference(runner: Runner) -> None:
    inputs, topology = small(runner)
    out = topology_attention(*inputs, topology, backend=runner.backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=rf'backend="{runner.backend}" is differentiable once.*backend="reference"'):
        gradient.sum().backward()


@kernel_runner
def test_partial_gradients(runner: Runner) -> None:
    """Gradients with respect to some inputs, and through one output only, are those of the whole."""
    inputs, topology = small(runner)
    out, lse = topology_attention(*inputs, topology, return_lse=True, backend=runner.backend)
    of_out = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    of_lse = torch.autograd.grad(lse.sum(), inputs, retain_graph=True)
    of_both = torch.autograd.grad(out.sum() + lse.sum(), inputs)
    for one, other, both in zip(of_out, of_lse, of_both, strict=True):
        torch.testing.assert_close(one + other, both, rtol=1e-4, atol=1e-5)
    frozen = [inputs[0].detach(), inputs[1], inputs[2].detach()]
    topology_attention(*frozen, topology, backend=runner.backend).sum().backward()
    assert frozen[0].grad is None and torch.equal(inputs[1].grad, of_out[1])
    with torch.no_grad():
        assert not topology_attention(*inputs, topology, backend=runner.backend).requires_grad


# ---- tracing --------------------------------------------------------------------------------------------------

COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lse": {"return_lse": True},
    "weights": {"return_weights": True},
    "seeded dropout": {"dropout_p": 0.25, "seed": 3},
}


@pytest.mark.parametrize("options", COMPILE_OPTIONS.values(), ids=list(COMPILE_OPTIONS))
@float32_runner
def test_compile_without_graph_breaks(runner: Runner, options: dict[str, Any]) -> None:
    if options and (runner.backend == "reference" or (runner.interpreted and "dropout_p" not in options)):
        pytest.skip("slow to trace or to interpret; covered by the other backends")
    inputs, topology = small(runner)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        result = topology_attention(q, k, v, topology, backend=runner.backend, **options)
        outputs = result if isinstance(result, tuple) else (result,)
        return [x if isinstance(x, Tensor) else x.vertex_neighbors for x in outputs]

    torch._dynamo.reset()
    compiler = "inductor" if runner.device == "cuda" and runner.backend != "reference" else "aot_eager"
    compiled = torch.compile(attend, fullgraph=True, backend=compiler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning of the tracer would reach every user
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # Inductor's advice on GPUs to give up precision, once per process: about any float32 product, not about ours.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        outputs = compiled(*inputs)
    expected = attend(*inputs)
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want)
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), inputs)
    for got, want in zip(gradients, torch.autograd.grad(sum(x.sum() for x in expected), inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("runner", [r for r in KERNEL_RUNNERS if not r.interpreted], ids=str)
def test_compile_with_drawn_seeds_and_batches(runner: Runner) -> None:
    """Inductor itself: the seed is drawn anew in every call of the compiled code; the batch may vary."""
    inputs, topology = small(runner, batch=2)

    @torch.compile(fullgraph=True, dynamic=True)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return topology_attention(q, k, v, topology, dropout_p=0.5, backend=runner.backend)

    first, second = attend(*inputs), attend(*inputs)
    assert not torch.equal(first, second)
    more = [x.detach().repeat(2, 1, 1, 1).requires_grad_() for x in inputs]
    out = attend(*more)
    assert out.shape == more[0].shape
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), more))


def _op_arguments(runner: Runner, dropout_p: float) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Both ops of a backend with arguments as its module passes them."""
    inputs, topology = small(runner)
    q, k, v = (x.detach() for x in inputs)
    seed = torch.tensor([5], device=runner.device) if dropout_p else None
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastmetro_kernels":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = topology_attention(
            *leaves, topology, dropout_p=dropout_p, seed=seed, return_lse=True, backend=runner.backend
        )
        (out.sum() + lse.sum()).backward()
    return {func.name(): (func, tuple(_detached(x) for x in args)) for func, args in calls}


def _detached(x: Any) -> Any:
    return x.detach().contiguous() if isinstance(x, Tensor) else x


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@kernel_runner
def test_opcheck(runner: Runner, dropout_p: float) -> None:
    ops = _op_arguments(runner, dropout_p)
    assert sorted(ops) == [f"fastmetro_kernels::attention_{d}_{runner.backend}" for d in ("backward", "forward")]
    for func, arguments in ops.values():
        torch.library.opcheck(func, arguments)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@kernel_runner
def test_shapes_are_checked_while_tracing(runner: Runner, direction: str) -> None:
    """Fake tensors with wrong shapes or dtypes are refused: kernels never see them in a compiled graph."""
    func, arguments = _op_arguments(runner, 0.2)[f"fastmetro_kernels::attention_{direction}_{runner.backend}"]
    names = [argument.name for argument in func._schema.arguments]
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)

    def call(**changed: Any) -> Any:
        with fake:
            return func(*[changed.get(name, value) for name, value in zip(names, arguments, strict=True)])

    call()
    by_name = dict(zip(names, arguments, strict=True))
    wrong = {"k": by_name["k"][:, 1:], "v": by_name["v"].double(), "num_hubs": 65, "seed": None, "dropout_p": 1.0}
    for name, value in wrong.items():
        with pytest.raises(RuntimeError):
            call(**{name: value})
    if direction == "backward":
        with pytest.raises(RuntimeError, match="lse must"):
            call(lse=by_name["lse"][:, :, 1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.device == "cuda" and r.dtype == torch.float16], ids=str)
def test_cuda_graph_replay(runner: Runner) -> None:
    """Forward and backward replay with new inputs and new seeds."""
    inputs, topology = small(runner, "mesh", batch=2)
    seed = torch.tensor([1], device="cuda")

    def run() -> list[Tensor]:
        options = {"dropout_p": 0.2, "seed": seed, "return_weights": True, "return_lse": True}
        out, weights, lse = topology_attention(*inputs, topology, backend=runner.backend, **options)
        returned = [out, lse, weights.hub_rows, weights.vertex_hubs, weights.vertex_neighbors]
        return [*returned, *torch.autograd.grad(out.sum() + lse.sum(), inputs)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for step in range(3):
        with torch.no_grad():
            for x in inputs:
                x.normal_()
            seed.fill_(step + 10)
        graph.replay()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.device == "cuda" and r.dtype == torch.float16], ids=str)
def test_no_synchronisation(runner: Runner) -> None:
    inputs, topology = small(runner, "mesh")
    for seed in (None, 5):
        torch.cuda.set_sync_debug_mode("error")
        try:
            out, weights = topology_attention(
                *inputs, topology, dropout_p=0.2, seed=seed, return_weights=True, backend=runner.backend
            )
            (out.sum() + weights.hub_rows.sum()).backward()  # a wait for the device raises here
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(out).all() and all(x.grad is not None for x in inputs)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("runner", [r for r in FLOAT32_RUNNERS if r.device == "cuda"], ids=str)
def test_device_that_is_not_the_current_one(runner: Runner) -> None:
    inputs, topology = small(runner)
    found = []
    for device in ("cuda:0", "cuda:1"):
        leaves = [x.detach().to(device).requires_grad_() for x in inputs]
        out = topology_attention(*leaves, topology.to(device), dropout_p=0.2, seed=5, backend=runner.backend)
        found.append([x.cpu() for x in (out, *torch.autograd.grad(out.square().sum(), leaves))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- autocast -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("runner", FLOAT32_RUNNERS, ids=str)
def test_autocast_casts_as_sdpa(runner: Runner, dtype: torch.dtype) -> None:
    target = torch.float16 if runner.backend == "triton" else torch.bfloat16
    if dtype == torch.float64 and runner.backend == "triton":
        pytest.skip("no float64 in Triton, which autocast would leave as it is")
    inputs, topology = small(runner)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    heads_first = [x.detach().transpose(1, 2) for x in inputs]
    with torch.autocast(runner.device, dtype=target):
        out, weights = topology_attention(*inputs, topology, return_weights=True, backend=runner.backend)
        expected = F.scaled_dot_product_attention(*heads_first).dtype
    assert out.dtype == weights.hub_rows.dtype == expected
    cast = [x.detach().to(expected) for x in inputs]
    assert torch.equal(out, topology_attention(*cast, topology, backend=runner.backend)), "nothing else is cast"
    gradients = torch.autograd.grad(out.float().sum(), inputs)
    assert all(g.dtype == dtype and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("runner", FLOAT32_RUNNERS, ids=str)
def test_autocast_makes_mixed_inputs_one_dtype(runner: Runner) -> None:
    inputs, topology = small(runner)
    mixed = [x.detach().to(t) for x, t in zip(inputs, (torch.float32, torch.float16, torch.float32), strict=True)]
    with pytest.raises(TypeError, match="k must have the dtype of q"):
        topology_attention(*mixed, topology, backend=runner.backend)
    with torch.autocast(runner.device, dtype=torch.float16):
        out = topology_attention(*mixed, topology, backend=runner.backend)
    assert out.dtype == torch.float16
    assert torch.equal(out, topology_attention(*(x.half() for x in mixed), topology, backend=runner.backend))


# ---- backends -------------------------------------------------------------------------------------------------


def test_native_is_there_when_it_is_built() -> None:
    """A built extension without attention kernels must not silently reduce the tests to the other backends."""
    if not (Path(fastmetro_kernels.__file__).parent / "_native_cpu.abi3.so").is_file():
        pytest.skip("the extension is not built")
    native = {runner.dtype for runner in RUNNERS if runner.backend == "native" and runner.device == "cpu"}
    assert native == {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def test_triton_runs_in_the_interpreter_or_on_the_device() -> None:
    pytest.importorskip("triton")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert any(runner.backend == "triton" and runner.device == expected for runner in RUNNERS)


@float32_runner
def test_auto_takes_the_fastest(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, topology = small(runner)
    reasons = backend_reasons(*inputs, topology)
    order = ["native", "triton", "reference"] if runner.device == "cuda" else ["native", "reference"]
    expected = next(name for name in order if not reasons[name])
    same = torch.equal(topology_attention(*inputs, topology), topology_attention(*inputs, topology, backend=expected))
    assert same
    assert reasons["reference"] == []


@pytest.mark.parametrize("device", DEVICES)
def test_a_named_backend_never_falls_back(device: str) -> None:
    """Triton takes no float64; where it does not run on the device at all, that is the reason given."""
    topology = topology_of(graphs()["mesh"], device)
    q = torch.zeros(1, 38, 1, 16, dtype=torch.float64, device=device)
    reason = re.escape("; ".join(backends.triton_reasons(q.device))) or "takes float32.*not torch.float64"
    with pytest.raises(
        BackendUnavailable, match=rf"(?s)backend='triton' cannot take.*native: .*triton: {reason}\n.*reference: "
    ):
        topology_attention(q, q, q, topology, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' is not known; accepted: 'auto'"):
        topology_attention(q, q, q, topology, backend="cuda")


def test_head_dims_beyond_the_kernels() -> None:
    """Outside 8 to 128 the reference still runs, and a backend that does not says so."""
    topology = topology_of(graphs()["mesh"])
    for dim in (1, 3, 136, 256):
        q = torch.randn(1, 38, 1, dim)
        torch.testing.assert_close(
            topology_attention(q, q, q, topology),
            topology_attention(q, q, q, topology, backend="reference"),
        )


# ---- errors ---------------------------------------------------------------------------------------------------

Q = torch.zeros(2, 38, 2, 16)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
        ({"v": Q.long()}, TypeError, "v must be one of float32, float16, bfloat16, float64, got torch.int64"),
        ({"k": Q.half()}, TypeError, r"k must have the dtype of q \(torch.float32\), got torch.float16"),
        ({"topology": Q}, TypeError, "topology must be a TokenTopology, got Tensor"),
        ({"q": Q[0]}, ValueError, r"q must be \[B, L, H, D\], got \[38, 2, 16\]"),
        ({"k": Q[:1]}, ValueError, r"k must have the shape of q \[2, 38, 2, 16\], got \[1, 38, 2, 16\]"),
        ({"v": Q[..., :8]}, ValueError, "v must have the shape of q"),
        ({"k": Q.to("meta")}, ValueError, r"k must be on the device of q \(cpu\), got meta"),
        (dict.fromkeys("qkv", Q[:, :37]), ValueError, r"q has 37 tokens, the topology has 38 \(3 hubs \+ 35 vert"),
        (dict.fromkeys("qkv", Q[..., :0]), ValueError, "head dim of at least 1"),
        (dict.fromkeys("qkv", Q.to("meta")), ValueError, "topology must be on the device of q"),
        ({"scale": "1"}, TypeError, "scale must be a float or None, got str"),
        ({"scale": True}, TypeError, "scale must be a float or None, got bool"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"scale": -float("inf")}, ValueError, "scale must be finite, got -inf"),
        ({"scale": 1e39}, ValueError, r"scale must be at most 1.7e\+38 in size for torch.float32, got 1e\+39"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in"),
        ({"dropout_p": None}, TypeError, "dropout_p must be a float, got NoneType"),
        ({"seed": 1.0}, TypeError, "seed must be an int, an int64 tensor or None, got float"),
        ({"seed": True}, TypeError, "seed must be an int"),
        ({"seed": 2**63}, ValueError, "seed must fit 64 bits"),
        ({"seed": torch.zeros(1)}, TypeError, "seed must be int64, got torch.float32"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"one element, got shape \[2\]"),
        ({"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "seed must be on cpu, got meta"),
        ({"backend": "fast"}, ValueError, "backend='fast' is not known"),
    ],
)
def test_bad_input_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"q": Q, "k": Q, "v": Q, "topology": topology_of(graphs()["mesh"])}
    with pytest.raises(error, match=message):
        topology_attention(**(arguments | changed))
