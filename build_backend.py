"""The PEP 517 backend: setuptools, plus one rule about PyTorch.

Building needs PyTorch's headers. When the environment that runs pip already has PyTorch, its headers are used, also
inside pip's isolated build environment; only when there is none is PyTorch added to the build requirements. So
``pip install .`` never downloads a second PyTorch of several gigabytes just to compile.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

OLDEST_TORCH = (2, 10)


def find_torch() -> Path | None:
    """The folder of an importable or merely installed PyTorch that is new enough, or None. Never imports it."""
    spec = importlib.util.find_spec("torch")
    places = list(spec.submodule_search_locations or []) if spec else []
    # pip's isolation hides the environment's packages from sys.path, not from sysconfig.
    places += [str(Path(sysconfig.get_path(key)) / "torch") for key in ("platlib", "purelib")]
    for place in map(Path, places):
        version_file = place / "version.py"
        if not version_file.is_file() or not (place / "include" / "torch" / "csrc" / "stable").is_dir():
            continue
        match = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text())
        if match and (int(match[1]), int(match[2])) >= OLDEST_TORCH:
            return place
    return None


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Build requirements of a wheel: setuptools' own, and PyTorch where none is installed."""
    return build_meta.get_requires_for_build_wheel(config_settings) + ([] if find_torch() else ["torch>=2.10"])


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """Build requirements of an editable install, as for a wheel."""
    return build_meta.get_requires_for_build_editable(config_settings) + ([] if find_torch() else ["torch>=2.10"])
