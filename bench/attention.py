"""Topology-masked attention against `scaled_dot_product_attention` with the same mask.

    python -m bench attention [--device cpu] [--dtype float32] [--threads 2] [--cases 431x64 6890x64]

SDPA gets its best layout: contiguous [B, H, L, D] and a boolean mask. The two are timed in turn in one process; the
ratio is the median of the ratios of the pairs. Before a time is printed, the results (and gradients) of both are held
against the float64 reference, and the run fails where ours are more than twice as far off as SDPA's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import common
from fastmetro_kernels import TokenTopology, topology_attention

HUBS, HEADS = 14, 8
PUBLISHED_LEVELS = {6890: 0, 1723: 1, 431: 2}
CASES = ("431x64", "431x16", "1723x64", "6890x16", "6890x64")


def mesh_topology(vertices: int) -> tuple[TokenTopology, str]:
    """A body mesh of that many vertices with 14 hubs: the published one where its file is at hand, else an icosphere
    cut down to the size by quadric simplification. Also says which."""
    published = common.SHARED / "data" / "fastmetro" / "mesh_downsampling.npz"
    if published.is_file() and vertices in PUBLISHED_LEVELS:
        import scipy.sparse as sp

        from fastmetro.meshes.unpickle import read_object_npz

        adjacency = sp.csr_matrix(read_object_npz(published, ["A"])["A"][PUBLISHED_LEVELS[vertices]])
        pattern = adjacency.astype(bool) + sp.identity(vertices, dtype=bool, format="csr")
        return TokenTopology.from_adjacency(pattern, num_hubs=HUBS), "published body mesh"
    import trimesh

    level = next(n for n in range(9) if 10 * 4**n + 2 >= vertices)
    sphere = trimesh.creation.icosphere(subdivisions=level)
    if len(sphere.vertices) > vertices:
        sphere = sphere.simplify_quadric_decimation(face_count=2 * vertices - 4)
    topology = TokenTopology.from_faces(sphere.faces, num_vertices=len(sphere.vertices), num_hubs=HUBS)
    return topology, f"icosphere of {len(sphere.vertices)} vertices"


@dataclass(frozen=True)
class Case:
    """One shape: our inputs [B, L, H, D], the same for SDPA [B, H, L, D] contiguous, and the mask."""

    topology: TokenTopology
    mesh: str
    inputs: tuple[Tensor, ...]
    dense_inputs: tuple[Tensor, ...]
    mask: Tensor
    grad: Tensor

    def ours(self) -> Tensor:
        """[B, L, H, D]."""
        q, k, v = self.inputs
        return topology_attention(q, k, v, self.topology)

    def sdpa(self) -> Tensor:
        """[B, H, L, D]."""
        q, k, v = self.dense_inputs
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    def ours_with_gradients(self) -> tuple[Tensor, ...]:
        """Output and the gradients of q, k, v, all [B, L, H, D]."""
        out = self.ours()
        return (out, *torch.autograd.grad(out, self.inputs, self.grad))

    def sdpa_with_gradients(self) -> tuple[Tensor, ...]:
        """Output and the gradients of q, k, v, all [B, H, L, D]."""
        out = self.sdpa()
        return (out, *torch.autograd.grad(out, self.dense_inputs, self.grad.transpose(1, 2)))

    def exact(self) -> tuple[Tensor, ...]:
        """What `ours_with_gradients` should be, by the float64 reference."""
        inputs = [tensor.detach().double().requires_grad_() for tensor in self.inputs]
        q, k, v = inputs
        out = topology_attention(q, k, v, self.topology, backend="reference")
        return (out.detach(), *torch.autograd.grad(out, inputs, self.grad.double()))


def make_case(vertices: int, dim: int, dtype: torch.dtype, device: torch.device, batch: int = 1) -> Case:
    """Normal random inputs from a fixed seed on the mesh of that size."""
    topology, mesh = mesh_topology(vertices)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, topology.num_tokens, HEADS, dim)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    topology = topology.to(device)
    dense = tuple(t.transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v))
    return Case(topology, mesh, tuple(t.requires_grad_() for t in (q, k, v)), dense, topology.mask(), grad)


def largest_error(results: tuple[Tensor, ...], exact: tuple[Tensor, ...], transpose: bool) -> float:
    """Largest absolute difference over all results."""
    pairs = ((r.transpose(1, 2) if transpose else r, e) for r, e in zip(results, exact, strict=True))
    return max((r.detach().double() - e).abs().max().item() for r, e in pairs)


def measure(case: Case, backward: bool, device: torch.device, repeats: int, inner: int) -> dict[str, Any]:
    """Checks both against float64, then times them in turn."""
    ours: Callable[[], Any]
    sdpa: Callable[[], Any]
    exact = case.exact() if backward else case.exact()[:1]
    if backward:
        ours, sdpa = case.ours_with_gradients, case.sdpa_with_gradients
        error = largest_error(case.ours_with_gradients(), exact, transpose=False)
        sdpa_error = largest_error(case.sdpa_with_gradients(), exact, transpose=True)
    else:
        ours, sdpa = case.ours, case.sdpa
        error = largest_error((case.ours(),), exact, transpose=False)
        sdpa_error = largest_error((case.sdpa(),), exact, transpose=True)
    if not error <= 2 * sdpa_error + 1e-6:
        raise SystemExit(f"wrong result: largest error {error:.2e}, of SDPA {sdpa_error:.2e}")
    if backward:
        times = common.alternate(ours, sdpa, device, repeats, inner)
    else:
        with torch.no_grad():
            times = common.alternate(ours, sdpa, device, repeats, inner)
    return {
        "ms": f"{times.first_ms:.3f}",
        "sdpa_ms": f"{times.second_ms:.3f}",
        "ratio": f"{times.ratio:.2f}",
        "fastest_ms": f"{times.first_fastest_ms:.3f}",
        "sdpa_fastest_ms": f"{times.second_fastest_ms:.3f}",
        "fastest_ratio": f"{times.fastest_ratio:.2f}",
        "max_error": f"{error:.2e}",
        "sdpa_max_error": f"{sdpa_error:.2e}",
    }


def main() -> None:
    """Print the table and write bench/results/attention_<device>.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=CASES, help="vertices x head dim")
    parser.add_argument("--repeats", type=int, default=0, help="pairs per case; 0: as many as fit the size")
    parser.add_argument("--csv", type=Path, help="default: bench/results/attention_<device>.csv")
    options = parser.parse_args()
    record = common.environment(device := torch.device(options.device))
    torch.set_num_threads(options.threads)
    if device.type == "cpu":
        record["threads"] = str(options.threads)
    rows = []
    print(f"{record['device']}, torch {record['torch']}, threads {record['threads']}, commit {record['commit']}")
    heads = ("tokens", "dim", "mode", "ours ms", "SDPA ms", "ratio", "fastest", "fastest", "ratio", "error", "SDPA err")
    layout = "{:>8} {:>4} {:>17}" + " {:>9}" * 8
    print(layout.format(*heads))
    for name in options.cases:
        vertices, dim = (int(part) for part in name.split("x"))
        case = make_case(vertices, dim, getattr(torch, options.dtype), device)
        for backward in (False, True):
            large = case.topology.num_tokens > 4000 and device.type == "cpu"
            repeats = options.repeats or ((3 if backward else 5) if large else 25)
            result = measure(case, backward, device, repeats, inner=5)
            shape = {
                "vertices": case.topology.num_vertices, "hubs": HUBS, "heads": HEADS, "dim": dim, "batch": 1,
                "dtype": options.dtype, "mode": "forward+backward" if backward else "forward",
            }  # fmt: skip
            rows.append(shape | result | {"mesh": case.mesh} | record)
            values = [f"{HUBS}+{shape['vertices']}", dim, shape["mode"], *result.values()]
            print(layout.format(*values), flush=True)
    common.write_csv(options.csv or common.RESULTS / f"attention_{device.type}.csv", rows)


if __name__ == "__main__":
    main()
