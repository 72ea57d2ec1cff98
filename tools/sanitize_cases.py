"""The small cases that `tools/sanitize.py` runs under compute-sanitizer: every CUDA op, forward and backward.

`python tools/sanitize_cases.py GROUP [--device cpu] [--part 1 8]` runs one group, or the first of eight parts of it,
and prints how many cases it had. Inputs are made on the CPU and copied, so that nearly every kernel that runs is one of
ours; results are compared with plain PyTorch on the CPU, so that a case that computes nothing cannot pass. Sizes are
odd and small: the race check is a hundred times slower than the kernels.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastmetro_kernels import (  # noqa: E402
    BackendUnavailable,
    SparseMatrix,
    TokenTopology,
    rasterize,
    sparse_upsample,
    topology_attention,
)
from fastmetro_kernels.attention import dispatch, native  # noqa: E402
from tools.sanitize_common import BFLOAT, FLOAT, HALF, TOLERANCE, compare  # noqa: E402
from tools.sanitize_convolutions import (  # noqa: E402
    Convolution,
    DoubleStem,
    Ending,
    Pair,
    Stem,
    convolution_cluster_native,
    convolution_native,
)
from tools.sanitize_linear import Linear, linear_cluster_native, linear_native  # noqa: E402

MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132
"""Of an H200 where there is no GPU. Which kernel takes a case depends on it."""


class NotHere(Exception):
    """This device takes another kernel for a case than the one that the case is for."""


@dataclass(frozen=True)
class Attention:
    """One call of `topology_attention` with its gradients."""

    topology: TokenTopology
    dim: int
    dtype: torch.dtype
    batch: int = 1
    heads: int = 2
    dropout_p: float = 0.0
    layout: str = "contiguous"  # see laid_out
    kernel: str = "few"  # of the forward on CUDA by the native backend: "few", "narrow" or "walk"
    segment: int = 0  # steps that a block walks over, 0: by size

    def run(self, backend: str, device: str) -> None:
        if (backend, device) == ("native", "cuda"):
            shape = (self.batch, self.topology.num_tokens, self.heads, self.dim)
            q = torch.empty(shape, dtype=self.dtype, device=device)
            if (taken := forward_kernel(q, self.topology.to(device), self.segment)) != self.kernel:
                raise NotHere(f'takes the kernel "{taken}"')
        got = self._results(self._inputs(), backend, device)
        want = self._results([x.float() for x in self._inputs()], "reference", "cpu")
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
            compare(name, a, b, TOLERANCE[self.dtype])

    def _inputs(self) -> list[Tensor]:
        """q, k, v and the gradients of the output and of log-sum-exp."""
        generator = torch.Generator().manual_seed(self.dim)
        shape = (self.batch, self.topology.num_tokens, self.heads, self.dim)
        made = [torch.randn(shape, generator=generator).to(self.dtype) for _ in range(4)]
        return [*made, torch.randn(self.batch, self.heads, shape[1], generator=generator)]

    def _results(self, inputs: list[Tensor], backend: str, device: str) -> list[Tensor]:
        *qkv, grad_out, grad_lse = inputs
        leaves = [laid_out(x, self.layout, device).requires_grad_() for x in qkv]
        seed = torch.tensor([77]).to(device) if self.dropout_p else None
        options: dict[str, Any] = {"dropout_p": self.dropout_p, "seed": seed, "return_lse": True, "backend": backend}
        with mock.patch.object(dispatch, "choose", self._choose):
            out, lse = topology_attention(*leaves, self.topology.to(device), **options)
        # Where nobody is seen, the gradient of log-sum-exp is not defined.
        grad_lse = torch.where(torch.isfinite(lse.detach().cpu()), grad_lse, 0.0)
        gradients = torch.autograd.grad([out, lse], leaves, [grad_out.to(device), grad_lse.to(device)])
        return [x.detach().cpu() for x in (out, lse, *gradients)]

    def _choose(self, *arguments: Any) -> list[dispatch.Choice]:
        """Without the table of measurements, which may hold other segments."""
        chosen = CHOOSE(*arguments)
        return [one._replace(configuration=self.segment) if one.backend == "native" else one for one in chosen]


CHOOSE = dispatch.choose


def forward_kernel(q: Tensor, topology: TokenTopology, segment: int) -> str:
    """Which kernel the native forward takes on CUDA; "": none."""
    if native._cuda_reasons(q, topology):
        return ""
    if segment == 0 and native.takes_few("forward", q, topology):
        return "few"
    whole = native._plan(topology, "forward", q, segment).slots == topology.num_tokens
    alone = native.fills_device(q.shape[0], q.shape[2], q.shape[3], native._multiprocessors(q.device))
    return "narrow" if segment == 0 and whole and alone else "walk"


def laid_out(x: Tensor, layout: str, device: str) -> Tensor:
    """The same numbers on the device; "shared": the first batch element for all, "strided": two dimensions swapped."""
    if layout == "shared":
        return x[:1].to(device).expand_as(x)
    return x.transpose(1, 2).contiguous().to(device).transpose(1, 2) if layout == "strided" else x.to(device)


def mesh(rows: int, columns: int, hubs: int, order: str = "locality") -> TokenTopology:
    """A flat grid of triangles."""
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    lower = np.stack([corner, corner + 1, corner + columns], 1)
    faces = np.concatenate([lower, lower + np.array([1, columns, 0])])
    return TokenTopology.from_faces(faces, num_vertices=rows * columns, num_hubs=hubs, order=order)


def pattern(vertices: int, hubs: int, density: float) -> TokenTopology:
    """A random pattern that is not symmetric, with a row that sees nobody."""
    allowed = torch.rand(hubs + vertices, hubs + vertices, generator=torch.Generator().manual_seed(vertices)) < density
    allowed[hubs + 3, hubs:] = False
    allowed[:hubs], allowed[:, :hubs] = True, True
    return TokenTopology.from_mask(allowed, num_hubs=hubs)


def attention_native() -> Iterator[Attention]:
    yield from attention_few()
    yield from attention_walk()
    yield from attention_narrow()


def attention_few() -> Iterator[Attention]:
    """Small batches, which have kernels of their own, the backward where the pattern is symmetric."""
    grid, one = mesh(9, 13, 14), TokenTopology.from_mask(torch.ones(1, 1, dtype=torch.bool), num_hubs=0)
    for dim in (8, 16, 24, 32, 64):
        yield Attention(grid, dim, HALF, heads=3)
    yield Attention(grid, 64, BFLOAT, batch=2, dropout_p=0.3)
    yield Attention(grid, 16, HALF, batch=2, heads=5, dropout_p=0.3)
    yield Attention(grid, 64, HALF, batch=3, layout="shared")
    yield Attention(grid, 16, HALF, batch=2, layout="strided")
    yield Attention(mesh(7, 7, 0), 16, HALF)
    yield Attention(pattern(37, 0, 0.1), 16, HALF)
    yield Attention(one, 8, HALF)


def attention_walk() -> Iterator[Attention]:
    """The kernels that walk over the mesh, in segments: these steer what large batches take by their size."""
    grid, large = mesh(9, 13, 14), mesh(20, 21, 14)
    for dim in (8, 16, 24, 32, 64):
        yield Attention(grid, dim, HALF, heads=3, kernel="walk", segment=2)
    yield Attention(grid, 128, HALF, heads=3, kernel="walk")
    yield Attention(grid, 64, BFLOAT, batch=2, dropout_p=0.3, kernel="walk", segment=1)
    yield Attention(grid, 16, HALF, batch=2, heads=5, dropout_p=0.3, kernel="walk", segment=1)
    yield Attention(grid, 64, HALF, batch=3, layout="shared", kernel="walk", segment=100)
    yield Attention(grid, 16, HALF, batch=2, layout="strided", kernel="walk", segment=100)
    yield Attention(large, 64, HALF, kernel="walk", segment=1)  # more segments than a cluster has blocks
    yield Attention(large, 64, HALF, kernel="walk", segment=4)
    yield Attention(mesh(7, 7, 0), 16, HALF, kernel="walk", segment=1)
    yield Attention(pattern(37, 0, 0.1), 16, HALF, kernel="walk", segment=1)
    yield Attention(pattern(61, 17, 0.1), 64, HALF, dropout_p=0.2, kernel="walk", segment=1)
    yield Attention(pattern(90, 3, 0.5), 64, HALF, kernel="walk")  # lists of more than 64 keys


def attention_narrow() -> Iterator[Attention]:
    """Narrow heads in one wave of blocks, each of which walks over a small mesh alone."""
    small, asymmetric = mesh(9, 13, 14), pattern(61, 17, 0.1)
    yield Attention(small, 16, HALF, batch=MULTIPROCESSORS // 2, heads=3, kernel="narrow")
    yield Attention(small, 32, BFLOAT, batch=MULTIPROCESSORS // 2, heads=2, dropout_p=0.3, kernel="narrow")
    yield Attention(asymmetric, 24, HALF, batch=MULTIPROCESSORS // 3, heads=3, kernel="narrow")
    yield Attention(mesh(20, 21, 14), 16, HALF, batch=MULTIPROCESSORS, heads=1, layout="shared", kernel="narrow")


def attention_triton() -> Iterator[Attention]:
    # Every configuration is compiled first, so there are few.
    yield Attention(mesh(9, 13, 14), 64, HALF, batch=2)
    yield Attention(mesh(9, 13, 14), 64, HALF, dropout_p=0.3, layout="shared", batch=2)
    yield Attention(pattern(37, 5, 0.1), 24, FLOAT)
    yield Attention(pattern(37, 0, 0.1), 16, HALF)


@dataclass(frozen=True)
class Upsampling:
    """One call of `sparse_upsample` with its gradient."""

    matrix: SparseMatrix
    batch: int
    channels: int
    dtype: torch.dtype
    layout: str = "contiguous"  # see laid_out

    def run(self, backend: str, device: str) -> None:
        generator = torch.Generator().manual_seed(self.channels)
        rows, columns = self.matrix.shape
        x = torch.randn(self.batch, columns, self.channels, generator=generator).to(self.dtype)
        grad = torch.randn(self.batch, rows, self.channels, generator=generator).to(self.dtype)
        got = self._results(x, grad, backend, device)
        want = self._results(x.float(), grad.float(), "reference", "cpu")
        for name, a, b in zip(("out", "gradient"), got, want, strict=True):
            compare(name, a, b, TOLERANCE[self.dtype])

    def _results(self, x: Tensor, grad: Tensor, backend: str, device: str) -> list[Tensor]:
        x = laid_out(x, self.layout, device).requires_grad_()
        out = sparse_upsample(x, self.matrix.to(device), backend=backend)
        return [y.detach().cpu() for y in (out, *torch.autograd.grad(out, x, grad.to(device)))]


@functools.cache
def matrix(rows: int, columns: int, shortest: int, longest: int) -> SparseMatrix:
    """Rows of random lengths, random entries."""
    random = np.random.default_rng(rows)
    dense = np.zeros((rows, columns))
    for row in dense:
        count = min(int(random.integers(shortest, longest + 1)), columns)
        row[random.permutation(columns)[:count]] = random.standard_normal(count)
    return SparseMatrix.from_dense(dense)


def upsampling_native() -> Iterator[Upsampling]:
    three, uneven, long = matrix(301, 97, 3, 3), matrix(29, 31, 0, 9), matrix(5, 300, 40, 300)
    for sparse, sizes in (
        (three, [(1, 3), (11, 3), (2, 16), (3, 130)]),
        (uneven, [(1, 3), (16, 3), (2, 5)]),
        (long, [(1, 3), (5, 3)]),
    ):
        for batch, channels in sizes:
            yield Upsampling(sparse, batch, channels, FLOAT)
            yield Upsampling(sparse, batch, channels, HALF)
    yield Upsampling(three, 3, 3, BFLOAT)
    yield Upsampling(three, 3, 3, FLOAT, "shared")
    yield Upsampling(three, 3, 3, HALF, "strided")
    yield Upsampling(three, 70, 3, FLOAT)
    yield from upsampling_points()


def upsampling_points() -> Iterator[Upsampling]:
    """Batches that fill an H200 with the kernel for points, in both directions: `tests/test_sanitize.py` knows how."""
    three, uneven = matrix(900, 300, 3, 3), matrix(900, 300, 0, 9)  # in the backward their rows are long
    short = matrix(300, 280, 1, 5)
    for sparse, sizes in (
        (three, [(9, FLOAT), (19, FLOAT), (29, HALF), (31, FLOAT), (53, FLOAT), (71, HALF), (101, FLOAT), (199, HALF)]),
        (uneven, [(7, FLOAT), (17, FLOAT), (21, FLOAT), (31, FLOAT), (51, FLOAT), (70, FLOAT)]),
        (uneven, [(15, HALF), (45, HALF), (71, BFLOAT), (300, HALF)]),
        (short, [(21, FLOAT), (45, HALF), (70, FLOAT)]),
    ):
        for batch, dtype in sizes:
            yield Upsampling(sparse, batch, 3, dtype)
    yield Upsampling(uneven, 70, 3, FLOAT, "shared")


def upsampling_triton() -> Iterator[Upsampling]:
    yield Upsampling(matrix(301, 97, 3, 3), 11, 3, FLOAT)
    yield Upsampling(matrix(29, 31, 0, 9), 2, 16, HALF)
    yield Upsampling(matrix(5, 300, 40, 300), 5, 3, FLOAT)


@dataclass(frozen=True)
class Rasterization:
    """One call of `rasterize`."""

    batch: int
    triangles: int
    height: int
    width: int
    cull: bool = False
    perspective_correct: bool = False

    def run(self, backend: str, device: str) -> None:
        random = torch.Generator().manual_seed(self.triangles)
        size = torch.tensor([self.width, self.height])
        centre = torch.rand(self.batch, self.triangles, 1, 2, generator=random) * size
        corners = centre + (torch.rand(self.batch, self.triangles, 3, 2, generator=random) - 0.5) * 25
        depth = torch.rand(self.batch, self.triangles, 3, 1, generator=random) * 3 - 0.05  # a few behind the viewer
        vertices = torch.cat([corners, depth], 3).reshape(self.batch, self.triangles * 3, 3)
        faces = torch.arange(self.triangles * 3).view(self.triangles, 3)
        options: dict[str, Any] = {"cull": self.cull, "perspective_correct": self.perspective_correct}
        sizes = (self.height, self.width)
        got = rasterize(vertices.to(device), faces.to(device), *sizes, backend=backend, **options)
        want = rasterize(vertices, faces, *sizes, backend="reference", **options)
        for name, a, b in zip(want._fields, got, want, strict=True):
            compare(name, a.cpu(), b, 0.0 if name == "face_index" else 1e-4)


def rasterization_native() -> Iterator[Rasterization]:
    yield Rasterization(2, 60, 37, 53)
    yield Rasterization(1, 200, 64, 64, cull=True)
    yield Rasterization(3, 60, 21, 130, perspective_correct=True)
    yield Rasterization(1, 1, 1, 1)


Case = Attention | Upsampling | Rasterization | Convolution | Pair | Ending | Stem | DoubleStem | Linear
GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "attention-native": attention_native,
    "attention-triton": attention_triton,
    "upsampling-native": upsampling_native,
    "upsampling-triton": upsampling_triton,
    "rasterization-native": rasterization_native,
    "convolution-native": convolution_native,
    "convolution-cluster-native": convolution_cluster_native,
    "linear-native": linear_native,
    "linear-cluster-native": linear_cluster_native,
}


def part_of(name: str, part: int, parts: int) -> Iterator[Case]:
    """The `part`-th (from 1) of so many parts of a group: every `parts`-th case, as long ones follow one another."""
    return itertools.islice(GROUPS[name](), part - 1, None, parts)


def run_group(name: str, device: str, part: int = 1, parts: int = 1) -> tuple[int, list[str]]:
    """Run all cases of a group, or of a part of it; returns how many there were, and why others were left out on this
    device.

    Raises:
        RuntimeError: a case is wrong; the message names it.
    """
    count, left_out = 0, []
    for case in part_of(name, part, parts):
        print(f"case: {case}", flush=True)  # where it waits for ever, this tells where
        try:
            case.run(name.rpartition("-")[2], device)
            if device == "cuda":
                torch.cuda.synchronize()
            count += 1
        except (BackendUnavailable, NotHere) as error:
            left_out.append(f"{case}: {error}")
        except Exception as error:
            raise RuntimeError(f"{case}: {error}") from error
    return count, left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run of the cases")
    parser.add_argument("--part", nargs=2, type=int, default=(1, 1), metavar=("K", "N"), help="the K-th of N parts")
    arguments = parser.parse_args()
    part, parts = arguments.part
    if not 1 <= part <= parts:
        parser.error(f"--part: the first is 1 and the last {parts}, got {part}")
    count, left_out = run_group(arguments.group, arguments.device, part, parts)
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1" and torch.cuda.memory_reserved():
        raise RuntimeError("PyTorch keeps a cache of memory all the same, which hides accesses out of bounds")
    print(*(f"left out: {why}" for why in left_out), f"cases: {count}", sep="\n", flush=True)


if __name__ == "__main__":
    main()
