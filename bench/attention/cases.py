"""What is measured: shapes, meshes, and inputs in the layout that each contender likes best."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import common
from fastmetro_kernels import TokenTopology
from fastmetro_kernels.tuning.cases import sphere_faces

HUBS, HEADS = 14, 8
PUBLISHED = common.SHARED / "data" / "fastmetro" / "mesh_downsampling.npz"
PUBLISHED_LEVELS = {6890: 0, 1723: 1, 431: 2}
LARGEST_MASK = 4 << 30  # bytes of the dense mask, beyond which nothing that needs one is run

Tensors = tuple[Tensor, ...]


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Shape:
    """Vertices of the mesh (beside `HUBS` hubs), head dim and batch."""

    vertices: int
    dim: int
    batch: int

    @classmethod
    def parse(cls, text: str, batch: int = 1) -> Shape:
        """From `VERTICESxDIM` (then of that batch) or `VERTICESxDIMxBATCH`.

        Raises:
            ValueError: the text is neither.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", text)
        if not found:
            raise ValueError(f"{text!r} is no case; accepted: VERTICESxDIM or VERTICESxDIMxBATCH, as 431x64x32")
        vertices, dim, own = found.groups()
        return cls(int(vertices), int(dim), int(own or batch))

    def __str__(self) -> str:
        return f"{self.vertices}x{self.dim}x{self.batch}"


@functools.lru_cache(maxsize=4)
def mesh_topology(vertices: int, order: str = "natural", data: Path = PUBLISHED) -> tuple[TokenTopology, str]:
    """A mesh of that many vertices with `HUBS` hubs, and its name.

    The published body mesh where its file `data` is at hand, else a sphere.
    """
    if vertices not in PUBLISHED_LEVELS or not data.is_file():
        return TokenTopology.from_faces(sphere_faces(vertices), vertices, HUBS, order), "sphere of scattered points"
    import scipy.sparse as sp

    from fastmetro.meshes.unpickle import read_object_npz

    adjacency = sp.csr_matrix(read_object_npz(data, ["A"])["A"][PUBLISHED_LEVELS[vertices]])
    pattern = adjacency.astype(bool) + sp.identity(vertices, dtype=bool, format="csr")
    return TokenTopology.from_adjacency(pattern, num_hubs=HUBS, order=order), "published body mesh"


@dataclass(frozen=True, eq=False)
class Layout:
    """How a contender wants its tensors: [B, H, L, D] if `heads_first`, else [B, L, H, D]; tokens in `order`."""

    heads_first: bool = False
    order: Tensor | None = None

    def arrange(self, tensor: Tensor) -> Tensor:
        """[B, L, H, D] in natural order to this layout, contiguous."""
        if self.order is not None:
            tensor = tensor[:, self.order]
        return (tensor.transpose(1, 2) if self.heads_first else tensor).contiguous()

    def restore(self, tensor: Tensor) -> Tensor:
        """Back to [B, L, H, D] in natural order."""
        if self.heads_first:
            tensor = tensor.transpose(1, 2)
        return tensor if self.order is None else tensor[:, torch.argsort(self.order)]


PLAIN = Layout()
HEADS_FIRST = Layout(heads_first=True)


class Case:
    """One shape on one device: the topology, the masks, and sets of random inputs from a fixed seed.

    Attributes:
        base: The sets (q, k, v, gradient of the output), each [B, L, H, D]. On a GPU there are so many that they
            exceed L2 `L2_FACTOR` times, on a CPU one.
        on_gpu: Whether times are taken inside CUDA graphs.
        l2: Bytes of the L2 cache; 0 on a CPU.
        set_bytes: Bytes of one set.
    """

    L2_FACTOR = 3

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, data: Path = PUBLISHED) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.on_gpu = device.type == "cuda"
        topology, self.mesh = mesh_topology(shape.vertices, "locality" if self.on_gpu else "natural", data)
        self.topology = topology.to(device)
        size = (shape.batch, topology.num_tokens, HEADS, shape.dim)
        self.tensor_bytes = math.prod(size) * dtype.itemsize
        self.set_bytes = 4 * self.tensor_bytes
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 0
        count = max(2, -(-self.L2_FACTOR * self.l2 // self.set_bytes)) if self.l2 else 1
        generator = torch.Generator(device).manual_seed(0)
        self.base: list[Tensors] = [
            tuple(torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(4))
            for _ in range(count)
        ]
        self._arranged: dict[Layout, list[Tensors]] = {}

    def inputs(self, layout: Layout, backward: bool) -> list[Tensors]:
        """All sets in that layout; q, k and v require gradients for the backward pass."""
        if layout not in self._arranged:
            self._arranged[layout] = [tuple(map(layout.arrange, one)) for one in self.base]
        sets = self._arranged[layout]
        if not backward:
            return sets
        return [(*(tensor.detach().requires_grad_() for tensor in one[:3]), one[3]) for one in sets]

    @functools.cached_property
    def mask(self) -> Tensor:
        """bool [L, L], True where a query may attend.

        Raises:
            Unavailable: it would take more than `LARGEST_MASK` bytes.
        """
        if (size := self.topology.num_tokens**2) > LARGEST_MASK:
            raise Unavailable(f"the mask of {self.topology.num_tokens}^2 would take {size / 2**30:.0f} GiB")
        return self.topology.mask()

    @functools.cached_property
    def rcm_layout(self) -> Layout:
        """Heads first, tokens in an order of small bandwidth: the hubs, then the vertices by reverse Cuthill-McKee."""
        import scipy.sparse as sp
        from scipy.sparse.csgraph import reverse_cuthill_mckee

        offsets, columns = self.topology.row_offsets.cpu().numpy(), self.topology.columns.cpu().numpy()
        count = self.topology.num_vertices
        graph = sp.csr_matrix((np.ones(len(columns), np.int8), columns, offsets), shape=(count, count))
        order = torch.from_numpy(reverse_cuthill_mckee(graph, symmetric_mode=True).astype(np.int64))
        hubs = self.topology.num_hubs
        return Layout(heads_first=True, order=torch.cat([torch.arange(hubs), hubs + order]).to(self.device))

    def floor_bytes(self, backward: bool) -> int:
        """Least traffic with DRAM of tensors that L2 does not hold.

        Forward 4 tensors: q, k, v and the output. With the backward pass 12: those, then q, k, v, the output and its
        gradient are read and three gradients written. Where one set fits into L2, less is possible.
        """
        return (12 if backward else 4) * self.tensor_bytes
