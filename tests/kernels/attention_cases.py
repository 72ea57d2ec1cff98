"""Oracle, error budget and graphs for the tests of topology-masked attention.

The oracle is dense: mask, softmax and product in float64, with dropout numbers from its own NumPy version of the
generator. It shares no code with the package.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmetro_kernels.attention.api import DTYPES
from fastmetro_kernels.attention.dispatch import BACKENDS, backend_reasons
from fastmetro_kernels.topology import TokenTopology

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@dataclass(frozen=True)
class Runner:
    """A device, backend and dtype that can run here."""

    device: str
    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def interpreted(self) -> bool:
        """Triton in its interpreter: about a millisecond per program, so sizes must be small."""
        return self.backend == "triton" and self.device == "cpu"


def _can_run(device: str, backend: str, dtype: torch.dtype) -> bool:
    topology = TokenTopology.from_mask(torch.ones(2, 2, dtype=torch.bool)).to(device)
    q = torch.zeros(1, 2, 1, 16, dtype=dtype, device=device)
    return not backend_reasons(q, q, q, topology)[backend]


RUNNERS = [Runner(d, b, t) for d in DEVICES for b in BACKENDS for t in DTYPES if _can_run(d, b, t)]
FLOAT32_RUNNERS = [runner for runner in RUNNERS if runner.dtype == torch.float32]
KERNEL_RUNNERS = [runner for runner in FLOAT32_RUNNERS if runner.backend != "reference"]


class Graph(NamedTuple):
    """A mask to test on, and the head dim to test it with."""

    mask: Tensor
    num_hubs: int
    head_dim: int


def grid_faces(rows: int, columns: int) -> np.ndarray:
    """Triangles of a flat grid of rows x columns vertices."""
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    lower = np.stack([corner, corner + 1, corner + columns], 1)
    return np.concatenate([lower, lower + np.array([1, columns, 0])])


def random_mask(vertices: int, hubs: int, density: float, symmetric: bool, loops: bool, seed: int) -> Tensor:
    """A random pattern behind dense hub rows and columns."""
    generator = np.random.default_rng(seed)
    mask = generator.random((hubs + vertices, hubs + vertices)) < density
    if symmetric:
        mask |= mask.T
    np.fill_diagonal(mask, loops)
    mask[:hubs] = True
    mask[:, :hubs] = True
    return torch.from_numpy(mask)


def _isolated(hubs: int) -> Tensor:
    """Vertices 2, 3 and the last see no vertex, not even themselves."""
    mask = random_mask(21, hubs, 0.2, True, True, 3)
    for vertex in (2, 3, 20):
        mask[hubs + vertex, hubs:] = False
        mask[hubs:, hubs + vertex] = False
    return mask


@functools.cache
def graphs() -> dict[str, Graph]:
    """One graph per line of the contract about topologies, and head dims across the accepted range."""
    mesh = TokenTopology.from_faces(grid_faces(5, 7), num_hubs=3).mask()
    star = random_mask(40, 2, 0.05, True, True, 4)
    star[2 + 7, :] = star[:, 2 + 7] = True
    return {
        "mesh": Graph(mesh, 3, 16),
        "no_hubs": Graph(random_mask(33, 0, 0.15, True, True, 0), 0, 8),
        "64_hubs": Graph(random_mask(19, 64, 0.2, True, True, 1), 64, 40),
        "17_hubs": Graph(random_mask(31, 17, 0.2, True, True, 1), 17, 64),
        "asymmetric": Graph(random_mask(37, 5, 0.1, False, True, 2), 5, 24),
        "isolated_with_hubs": Graph(_isolated(4), 4, 32),
        "isolated_without_hubs": Graph(_isolated(0), 0, 16),
        "one_long_row": Graph(star, 2, 128),
        "hubs_only": Graph(torch.ones(6, 6, dtype=torch.bool), 6, 13),
        "one_vertex": Graph(torch.ones(1, 1, dtype=torch.bool), 0, 80),
        "nothing_allowed": Graph(torch.zeros(5, 5, dtype=torch.bool), 0, 16),
    }


def topology_of(graph: Graph, device: str = "cpu", order: str = "natural") -> TokenTopology:
    """The topology of a graph with the hub number that the graph is about."""
    return TokenTopology.from_mask(graph.mask, num_hubs=graph.num_hubs, order=order).to(device)


def random_inputs(runner: Runner, batch: int, tokens: int, heads: int, dim: int, count: int = 3) -> list[Tensor]:
    """Leaves with gradients: [batch, tokens, heads, dim], the same numbers for every backend and device."""
    generator = torch.Generator().manual_seed(1000 * tokens + dim)
    numbers = torch.randn(count, batch, tokens, heads, dim, generator=generator, dtype=torch.float64)
    return [x.to(runner.device, runner.dtype).requires_grad_() for x in numbers]


class Result(NamedTuple):
    """Outputs and gradients, None where there are none."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def keep_mask(seed: int, batch: int, heads: int, tokens: int, dropout_p: float) -> Tensor:
    """bool [B, H, L, L]: which weights dropout keeps, by the published rule in NumPy's uint64."""
    low = np.uint64(0xFFFFFFFF)

    def mix(x: np.ndarray) -> np.ndarray:
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & low
        x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & low
        return x ^ (x >> np.uint64(16))

    bits = seed % 2**64
    head = np.arange(batch * heads, dtype=np.uint64).reshape(batch, heads, 1, 1)
    key = mix((mix(head ^ np.uint64(bits & 0xFFFFFFFF)) + np.uint64(bits >> 32)) & low)
    query_tokens, key_tokens = np.meshgrid(*[np.arange(tokens, dtype=np.uint64)] * 2, indexing="ij")
    x0, x1 = key_tokens[None, None] + 0 * key, query_tokens[None, None] + 0 * key
    for _ in range(7):
        product = np.uint64(0xD256D193) * x0
        x0, x1 = (product >> np.uint64(32)) ^ key ^ x1, product & low
        key = (key + np.uint64(0x9E3779B9)) & low
    return torch.from_numpy(x0 >= np.uint64(int(dropout_p * 2**32)))


def oracle_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, keep: Tensor | None = None, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, weights [B, H, L, L]) of dense masked attention in the dtype of the inputs."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    shift = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)
    weights = torch.exp(scores - shift[..., None])
    if keep is not None:
        weights = weights * keep / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse, weights


def oracle(
    inputs: list[Tensor], mask: Tensor, grad_out: Tensor, grad_lse: Tensor, keep: Tensor | None = None, p: float = 0.0,
    scale: float | None = None,
) -> Result:  # fmt: skip
    """Outputs and gradients in float64 on the CPU."""
    q, k, v = (x.detach().cpu().double().requires_grad_() for x in inputs)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse, _ = oracle_forward(q, k, v, mask.cpu(), factor, keep, p)
    return _with_gradients(out, lse, [q, k, v], grad_out.cpu().double(), grad_lse.cpu().double())


def plain(inputs: list[Tensor], mask: Tensor, grad_out: Tensor, grad_lse: Tensor, scale: float | None = None) -> Result:
    """Masked `scaled_dot_product_attention` in the dtype of the inputs, log-sum-exp in float32 from its scores."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    mask = mask.to(q.device)
    empty = ~mask.any(1)  # SDPA leaves rows without keys undefined: compute something else there and drop it
    seen = mask | empty[:, None]
    # SDPA on a GPU multiplies the -inf of masked keys by the scale: wrong where it is 0 or negative.
    scaled = q if scale is None else q * scale
    heads_first = (x.transpose(1, 2) for x in (scaled, k, v))
    unit = None if scale is None else 1.0
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=unit).transpose(1, 2)
    out = torch.where(empty[None, :, None, None], torch.zeros_like(out), out)
    wide = torch.promote_types(q.dtype, torch.float32)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    lse = oracle_forward(q.to(wide), k.to(wide), v.to(wide), mask, factor)[1]
    return _with_gradients(out, lse, [q, k, v], grad_out, grad_lse)


def _with_gradients(out: Tensor, lse: Tensor, leaves: list[Tensor], grad_out: Tensor, grad_lse: Tensor) -> Result:
    """Gradients of sum(out * grad_out) + sum(lse * grad_lse); rows without keys have no lse gradient."""
    finite = torch.isfinite(lse)
    loss = (out * grad_out).sum() + (torch.where(finite, lse, torch.zeros_like(lse)) * grad_lse).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]
    assert all(torch.isfinite(g).all() for g in gradients)
    return Result(out.detach(), lse.detach(), *gradients)


def measured(out: Tensor, lse: Tensor, leaves: list[Tensor], grad_out: Tensor, grad_lse: Tensor) -> Result:
    """Outputs of the op under test with its gradients; a NaN stays a NaN."""
    gradients = torch.autograd.grad([out, lse], leaves, [grad_out, grad_lse])
    return Result(out.detach(), lse.detach(), *gradients)


def assert_within_budget(result: Result, exact: Result, baseline: Result, slack: float = 0.0) -> None:
    """No field may be further from float64 than twice plain PyTorch, plus two roundings.

    Both the root mean square and the largest error are held to this; log-sum-exp is -inf in the same places. The
    roundings are half a unit of the stored dtype and one of float32 arithmetic: of the largest gradient for the
    gradients (a single key has a true gradient of 0 in q, computed as a difference of larger numbers), of at least
    1 for log-sum-exp (the logarithm of a sum may cancel). The gradients of q and k go through a difference of two sums
    of D products and get twice as much. The float64 oracle rounds too, so there it is more. `slack` is added to the
    roundings.
    """
    for name in Result._fields:
        got, want, base = (getattr(r, name).detach().cpu().double() for r in (result, exact, baseline))
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        finite = torch.isfinite(want)
        assert torch.equal(got[~finite], want[~finite]), f"{name}: -inf is not where it belongs"
        got, want, base = got[finite], want[finite], base[finite]
        if want.numel() == 0:
            continue
        assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
        stored = getattr(result, name).dtype
        rounding = 0.5 * torch.finfo(stored).eps + torch.finfo(torch.float32).eps
        if stored == torch.float64:
            rounding = 8 * torch.finfo(torch.float64).eps
        rounding += slack
        for measure in (_rms, _largest):
            size = measure(want)
            if name == "lse":
                size = max(size, 1.0)
            elif name != "out":
                size = max(measure(gradient) for gradient in exact[2:]) * (1 if name == "dv" else 2)
            error, allowed = measure(got - want), 2 * measure(base - want) + rounding * size
            assert error <= allowed, f"{name}: {measure.__name__} error {error:.3g} exceeds {allowed:.3g}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
