"""FastMETRO: 3D human and hand meshes from one image, on the kernels of ``fastmetro_kernels``.

Everything is imported when it is first used, so that the network alone needs only torch, numpy and scipy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmetro.inference.engine.engine import compile
    from fastmetro.inference.predictor import Predictor
    from fastmetro.meshes.mesh import load_mesh
    from fastmetro.models.network import create_model

__version__ = "0.1.0"

_HOMES = {
    "Predictor": "fastmetro.inference.predictor",
    "compile": "fastmetro.inference.engine.engine",
    "create_model": "fastmetro.models.network",
    "load_mesh": "fastmetro.meshes.mesh",
}

__all__ = ["Predictor", "compile", "create_model", "load_mesh"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmetro' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
