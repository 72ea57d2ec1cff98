"""Draw the levels of the meshes that come with the package: docs/images/mesh_levels.png."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastmetro import load_mesh  # noqa: E402
from fastmetro.visualization.overlay import contact_sheet, view  # noqa: E402

SIZE = (600, 440)


def main() -> None:
    pictures, captions = [], []
    for name in ("anny-body", "anny-hand"):
        mesh = load_mesh(name)
        for level in mesh.levels:
            assert level.vertices is not None and level.faces is not None
            upright = level.vertices * [1.0, -1.0, -1.0]  # y down, z away from the viewer
            lines = 0.35 if level.num_vertices > 5000 else 0.8
            pictures.append(view(upright, level.faces, SIZE, smooth=False, wireframe=lines))
            captions.append(f"{name}: {level.num_vertices:,} vertices")
    path = ROOT / "docs/images/mesh_levels.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, captions, columns=len(pictures)).quantize(96).save(path, optimize=True)
    print(path.relative_to(ROOT), f"{path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
