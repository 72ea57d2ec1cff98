"""Images per second of the rasteriser on a closed surface of 20,480 triangles that fills most of a 224 x 224 picture.

    python bench/rasterization.py [--batch 64] [--size 224] [--level 5] [--device cpu] [--repeats 20]

Prints one JSON line per backend: median and fastest time of a call, and images per second at the median. The meshes of
a batch are turned differently. The reference backend is timed on a batch of 1 (it is the specification, not a choice).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import trimesh
from torch import Tensor

from fastmetro_kernels import rasterize


def scene(batch: int, size: int, level: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Turned icospheres in pixels, [batch, V, 3], with a bumpy surface so that parts hide others; and the faces."""
    sphere = trimesh.creation.icosphere(subdivisions=level)
    points = torch.tensor(sphere.vertices, dtype=torch.float32)
    points = points * (1 + 0.15 * torch.sin(9 * points[:, :1]) * torch.sin(7 * points[:, 1:2]))
    turns, _ = torch.linalg.qr(torch.randn(batch, 3, 3, generator=torch.Generator().manual_seed(0)))
    turned = points @ turns * (0.42 * size)
    vertices = turned + torch.tensor([size / 2, size / 2, size])
    return vertices.to(device), torch.tensor(sphere.faces).to(device)


def measure(vertices: Tensor, faces: Tensor, size: int, backend: str, repeats: int) -> dict[str, float]:
    """Times of a call in milliseconds, each call waited for."""
    times = []
    for index in range(repeats + 3):
        start = time.perf_counter()
        rasterize(vertices, faces, size, size, backend=backend)
        if vertices.device.type == "cuda":
            torch.cuda.synchronize(vertices.device)
        if index >= 3:
            times.append((time.perf_counter() - start) * 1e3)
    median = statistics.median(times)
    return {
        "median_ms": round(median, 3),
        "fastest_ms": round(min(times), 3),
        "images_per_second": round(len(vertices) / median * 1e3, 1),
    }


def main() -> None:
    """Measure every backend that runs on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--level", type=int, default=5, help="subdivisions of the icosahedron; 5 is 20,480 triangles")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    for backend, batch in (("native", options.batch), ("reference", 1)):
        vertices, faces = scene(batch, options.size, options.level, device)
        result = measure(vertices, faces, options.size, backend, options.repeats if backend == "native" else 3)
        covered = (rasterize(vertices, faces, options.size, options.size).face_index >= 0).float().mean().item()
        header = {"op": "rasterize", "backend": backend, "device": name, "batch": batch, "size": options.size}
        print(json.dumps(header | {"faces": len(faces), "covered": round(covered, 3)} | result))


if __name__ == "__main__":
    main()
