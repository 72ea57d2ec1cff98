"""What is measured: matrices and batches, plain PyTorch's ways to the product, this project's, and the yardsticks."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from bench import common
from fastmetro.meshes.unpickle import read_object_npz
from fastmetro_kernels import SparseMatrix, sparse_upsample
from fastmetro_kernels.points import build_points
from fastmetro_kernels.upsampling import ops

PUBLISHED = common.SHARED / "data" / "fastmetro" / "mesh_downsampling.npz"
STEPS = ("1723->6890", "431->1723", "431->6890")
PASSES = ("forward", "forward+backward", "backward")
"""The last one is the product with the transposed matrix alone."""

ZERO, FILL = "write: zero_", "write: fill_"
WRITES = (ZERO, FILL)
"""Yardsticks: they write tensors of the shapes of the results, and nothing else."""

DENSE, LOOP = "dense", "loop over samples"
CSR, CSR_BATCHED, CSR_GIVEN = "torch CSR", "torch CSR, batched", "torch CSR, x and out as [N, B, C]"
CSR_NAMES = (CSR, CSR_BATCHED)
"""What ours is held against: the faster one. CSR_GIVEN is spared the transpositions, which cost it most of its time."""

OURS = ("auto", "native", "triton", "reference")
MAX_SETS = 64
L2_FACTOR = 2.0  # sets of tensors that are so many times as large as L2 push each other out of it

Run = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""From x and the gradient of the output to the results of the pass."""


def matrices(data: Path, names: list[str]) -> Iterator[tuple[str, SparseMatrix]]:
    """The published steps of the body hierarchy and their product, or random ones of the same sizes, by name."""
    if data.is_file():
        fine, coarse = (sp.csr_array(step) for step in read_object_npz(data, ["U"])["U"])
        kind = "published"
    else:
        fine, coarse = random_step(6890, 1723), random_step(1723, 431)
        kind = "random"
    for name, matrix in zip(STEPS, (fine, coarse, fine @ coarse), strict=True):
        if name in names:
            yield f"{kind} {name}", SparseMatrix.from_scipy(matrix)


def random_step(rows: int, columns: int) -> sp.csr_array:
    """Three neighbouring columns in each row, as the barycentric coordinates of a mesh step."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), rows).ravel()
    start = np.arange(rows)[:, None] * columns // rows
    column = (start + np.array([0, 1, columns // 9])) % columns
    return sp.csr_array((weights, (np.repeat(np.arange(rows), 3), column.ravel())), shape=(rows, columns))


@dataclass(frozen=True)
class Case:
    """One matrix, batch and dtype on one device."""

    name: str
    matrix: SparseMatrix
    batch: int
    channels: int
    dtype: torch.dtype
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        """Whether CUDA graphs and yardsticks are measured."""
        return self.device.type == "cuda"

    @property
    def l2(self) -> int:
        """Bytes of the GPU's L2."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """Of the input, and of its gradient."""
        return self.batch, self.matrix.shape[1], self.channels

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """Of the output, and of its gradient."""
        return self.batch, self.matrix.shape[0], self.channels

    def result_shapes(self, which: str) -> list[tuple[int, int, int]]:
        """What a pass writes."""
        return {"forward": [self.out_shape], "backward": [self.x_shape]}.get(which, [self.out_shape, self.x_shape])

    def set_bytes(self, which: str) -> int:
        """Bytes that a pass reads and writes at least, the matrix apart."""
        both = math.prod(self.x_shape) + math.prod(self.out_shape)
        return both * self.dtype.itemsize * (2 if which == PASSES[1] else 1)

    def given(self, name: str, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What a contender gets: the tensors themselves, or with the batch inside of the tokens where it asks so."""
        if name != CSR_GIVEN:
            return tensors
        x, grad = (tensor.permute(1, 0, 2).contiguous().permute(1, 0, 2) for tensor in tensors)
        return x, grad

    def sets(self, which: str) -> list[tuple[Tensor, Tensor]]:
        """Inputs and gradients; on a GPU so many that together they exceed L2, if `MAX_SETS` are enough for that."""
        count = 1
        if self.on_gpu:
            count = min(MAX_SETS, max(2, math.ceil(L2_FACTOR * self.l2 / self.set_bytes(which))))
        generator = torch.Generator(self.device).manual_seed(0)

        def randn(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        return [(randn(self.x_shape), randn(self.out_shape)) for _ in range(count)]

    def oracle(self, which: str, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """The results of a pass in float64."""
        exact = self.matrix.to_dense(torch.float64)
        out, grad_x = exact @ x.double(), exact.T @ grad.double()
        return {"forward": (out,), "backward": (grad_x,)}.get(which, (out, grad_x))


def contenders(case: Case, which: str, variants: bool) -> dict[str, Run]:
    """By name: the yardsticks, plain PyTorch (not for the transposed product alone), ours, and our variants."""
    writes: dict[str, Run] = {
        ZERO: lambda x, grad: tuple(x.new_empty(shape).zero_() for shape in case.result_shapes(which)),
        FILL: lambda x, grad: tuple(x.new_empty(shape).fill_(1.0) for shape in case.result_shapes(which)),
    }
    products = {f"ours, {name}": functools.partial(_ours, case.matrix, name) for name in OURS}
    if which == "backward":
        transpose = case.matrix.transpose()
        found = {f"ours, {name}": _on_grad(functools.partial(_ours, transpose, name)) for name in OURS}
    else:
        made = _both_passes if which == PASSES[1] else _forward
        found = {name: made(product) for name, product in {**_plain(case), **products}.items()}
    if variants and case.on_gpu and which != PASSES[1]:
        found |= _variants(case, transposed=which == "backward")
    return (writes if case.on_gpu else {}) | found


def _ours(matrix: SparseMatrix, backend: str, x: Tensor) -> Tensor:
    return sparse_upsample(x, matrix, backend=backend)


class _Linear(torch.autograd.Function):
    """A product and, as its backward, that with the transpose."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.transposed = transposed
        return product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.transposed(grad), None, None


def _flat(product: Tensor, contiguous: bool, x: Tensor) -> Tensor:
    """``product @ x`` with the batch in the columns, which is faster than broadcasting the matrix."""
    columns = x.permute(1, 0, 2).reshape(x.shape[1], -1)
    out = (product @ columns).view(-1, x.shape[0], x.shape[2]).permute(1, 0, 2)
    return out.contiguous() if contiguous else out


def _csr(matrix: Tensor, batch: int = 0) -> Tensor:
    """The COO matrix as CSR, as often as the batch needs it."""
    csr = matrix.to_sparse_csr()
    if not batch:
        return csr
    offsets, columns, values = (
        part.expand(batch, -1).contiguous() for part in (csr.crow_indices(), csr.col_indices(), csr.values())
    )
    return torch.sparse_csr_tensor(offsets, columns, values, size=(batch, *csr.shape))


def _plain(case: Case) -> dict[str, Callable[[Tensor], Tensor]]:
    """Plain PyTorch's ways to the product. CSR gets its transpose ready-made, as its own backward would build it anew
    in every call, outside of CUDA graphs."""
    matrix, dtype, device = case.matrix, case.dtype, case.device
    dense = matrix.to_dense(dtype)
    scipy_coo = matrix.to_scipy().tocoo()
    indices = torch.from_numpy(np.stack([scipy_coo.row, scipy_coo.col])).to(device)
    values = torch.from_numpy(scipy_coo.data).to(device, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR support is called beta, and invariants are not checked by default
        coo = torch.sparse_coo_tensor(indices, values, matrix.shape).coalesce()
        transposed = coo.t().coalesce()
        both = [_csr(coo), _csr(transposed)]
        batched = [_csr(coo, case.batch), _csr(transposed, case.batch)]

    def linear(*products: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: _Linear.apply(x, *products)

    return {
        DENSE: lambda x: dense @ x,
        "dense, batch in columns": functools.partial(_flat, dense, True),
        CSR: linear(*(functools.partial(_flat, csr, True) for csr in both)),
        CSR_BATCHED: linear(*(functools.partial(torch.bmm, csr) for csr in batched)),
        CSR_GIVEN: linear(*(functools.partial(_flat, csr, False) for csr in both)),
        LOOP: lambda x: torch.stack([torch.sparse.mm(coo, sample) for sample in x]),
    }


def _forward(product: Callable[[Tensor], Tensor]) -> Run:
    return lambda x, grad: (product(x),)


def _on_grad(product: Callable[[Tensor], Tensor]) -> Run:
    return lambda x, grad: (product(grad),)


def _both_passes(product: Callable[[Tensor], Tensor]) -> Run:
    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = product(x)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    return run


GATHER, STAGED, POINTS = range(3)
_PointTables = tuple[Tensor | None, list[int]]
POINT_CUTS = (
    ((8, 27), (8, 28), (16, 14), (16, 20), (32, 9), (32, 14)),
    ((12, 20), (16, 16), (16, 20), (32, 11), (32, 16)),
)
"""Of the matrix and of its transpose."""


@functools.cache
def _point_tables(matrix: SparseMatrix, transposed: bool, cut: tuple[int, int]) -> _PointTables:
    """The tables of one cut, which take a second to make."""
    csr = matrix.to_scipy()
    words, sizes = build_points(csr.T.tocsr() if transposed else csr, (cut,))
    return torch.from_numpy(words).to(matrix.columns.device), sizes


def _variants(case: Case, transposed: bool) -> dict[str, Run]:
    """Every configuration of the CUDA kernels (`csrc/upsampling/launch.h`; cuts of `points.py`)."""
    m, word = case.matrix, 4 // case.dtype.itemsize
    arrays = (m.row_offsets, m.columns, m.values, m.ell_columns, m.ell_values, m.shape[0])
    if transposed:
        arrays = (m.t_row_offsets, m.t_columns, m.t_values, m.t_ell_columns, m.t_ell_values, m.shape[1])
    plans: list[tuple[str, _PointTables, tuple[int, int, int]]]
    plans = [("gather", (None, []), (GATHER, tile, threads)) for tile in (1, 4, 8) for threads in (0, 256)]
    plans += [("staged", (None, []), (STAGED, word * tile, 1024)) for tile in (1, 2, 4)]
    for blocks, warps in POINT_CUTS[transposed] if case.channels == 3 else ():
        built = _point_tables(m, transposed, (blocks, warps))
        if built[1]:
            plans += [(f"points {blocks} x {warps},", built, (POINTS, tile, 0)) for tile in (2 * word, 4 * word)]
    found: dict[str, Run] = {}
    for name, point_tables, plan in plans:
        for early in (False, True):
            run = functools.partial(_variant, (*arrays, *point_tables, *plan, early), transposed)
            found[f"variant, {name} {plan[1]} x {plan[2] or 'even'}{' early' if early else ''}"] = run
    return found


def _variant(arguments: tuple[Any, ...], transposed: bool, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return (ops.upsample_native_as(grad if transposed else x, *arguments),)
