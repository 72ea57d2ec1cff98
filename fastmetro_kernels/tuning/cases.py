"""The cases that `tune` measures: a mesh, inputs, and float64 results to hold candidates against."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmetro_kernels.attention import reference
from fastmetro_kernels.topology import TokenTopology

HUBS, HEADS = 14, 8
L2_FACTOR = 3
"""Inputs rotate through so many times the L2 cache, so that none of them is still there; not at batch 1."""

LIMITS = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 1e-5}
"""Largest error of a result relative to its norm: about ten times what masked SDPA shows."""

Tensors = tuple[Tensor, ...]


class Shape(NamedTuple):
    """Vertices of the mesh beside `HUBS` hubs, head dim, batch."""

    vertices: int
    dim: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From VERTICESxDIMxBATCH.

        Raises:
            ValueError: the text is something else, or the head dim is not one that kernels take.
        """
        found = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,2})x([1-9]\d{0,4})", text)
        if not found or not 8 <= int(found[2]) <= 128 or int(found[1]) < 16:
            raise ValueError(f"{text!r} is no case; accepted: VERTICESxDIMxBATCH with head dim 8 to 128, as 431x64x32")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return "x".join(map(str, self))


@functools.lru_cache(maxsize=8)
def sphere_faces(vertices: int) -> np.ndarray:
    """Triangles [2 N - 4, 3] of a closed mesh with exactly N vertices: the hull of scattered points on a sphere.

    The points are a Fibonacci lattice moved at random by about their spacing. Lists then have 4 to 11 entries and 7 in
    the mean, as those of the published body meshes.
    """
    from scipy.spatial import ConvexHull

    steps = np.arange(vertices) + 0.5
    z, angle = 1 - 2 * steps / vertices, steps * math.pi * (3 - math.sqrt(5))
    radius = np.sqrt(1 - z * z)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], 1)
    points += np.random.default_rng(0).normal(size=points.shape) / math.sqrt(vertices)
    return ConvexHull(points / np.linalg.norm(points, axis=1, keepdims=True)).simplices


@functools.lru_cache(maxsize=8)
def topology_on(vertices: int, device: torch.device) -> TokenTopology:
    """The sphere with hubs, in locality order."""
    return TokenTopology.from_faces(sphere_faces(vertices), vertices, HUBS, order="locality").to(device)


class Case:
    """Inputs of one shape from a fixed seed.

    Attributes:
        sets: (q, k, v, gradient of the output), each [B, L, H, D]; as many as it takes to exceed L2.
        saved: (out, lse) of each set, as the forward pass would save them.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype = shape, dtype
        self.topology = topology_on(shape.vertices, device)
        self.scale = shape.dim**-0.5
        size = (shape.batch, self.topology.num_tokens, HEADS, shape.dim)
        count = 1
        if device.type == "cuda" and shape.batch > 1:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            count = max(1, -(-L2_FACTOR * cache // (4 * math.prod(size) * dtype.itemsize)))
        generator = torch.Generator(device).manual_seed(0)
        self.sets: list[Tensors] = [
            tuple(torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(4))
            for _ in range(count)
        ]
        self.saved: list[Tensors] = []

    def checked(self) -> list[int]:
        """The batch elements that are held against float64."""
        return sorted({0, self.shape.batch - 1})

    @functools.cached_property
    def exact(self) -> tuple[Tensor, Tensor, Tensors]:
        """(out, lse, (dq, dk, dv)) in float64 of the first set, of the checked batch elements."""
        parts = []
        for element in self.checked():
            q, k, v, grad = (tensor[element : element + 1].double() for tensor in self.sets[0])
            for tensor in (q, k, v):
                tensor.requires_grad_()
            with torch.enable_grad():
                out, lse = reference.forward(q, k, v, self.topology, self.scale, 0.0, None)
                grads = torch.autograd.grad(out, (q, k, v), grad)
            parts.append((out.detach(), lse.detach(), *grads))
        out, lse, *gradients = (torch.cat(same) for same in zip(*parts, strict=True))
        return out, lse, tuple(gradients)

    def problem(self, results: Tensors, exact: Tensors) -> str | None:
        """What is wrong with these results of the first set, or None."""
        for index, (result, expected) in enumerate(zip(results, exact, strict=True)):
            picked = result[self.checked()].double()
            error = ((picked - expected).norm() / expected.norm()).item()
            if not error <= LIMITS[self.dtype]:  # written so that NaN does not pass
                return f"result {index} is off by {error:.1e} of its norm, allowed are {LIMITS[self.dtype]:.0e}"
            if not torch.isfinite(result).all():
                return f"result {index} is not finite"
        return None
