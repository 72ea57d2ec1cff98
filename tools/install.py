"""Installs what is missing from the running environment, at the versions pinned in constraints.txt.

A package that is there already, and not too old, stays at its version: an environment that brings its own PyTorch (a
CUDA build, say) keeps it. Nothing is asked of a package index when nothing is missing.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


OLDEST = {"numpy": (1, 26), "scipy": (1, 11), "setuptools": (77,), "torch": (2, 10), "triton": (3, 6)}
"""Installed versions older than these are replaced; they are the bounds of pyproject.toml."""


def pinned() -> dict[str, str]:
    """Name -> ``name==version`` for every line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {line.split("==")[0].strip(): line.strip() for line in lines if line.strip() and not line.startswith("#")}


def is_installed(name: str) -> bool:
    """Whether a distribution of this name, not older than ``OLDEST`` allows, is in the running environment."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= OLDEST.get(name, (0,))


def main() -> int:
    """Install the missing packages; the exit status is pip's."""
    pins = pinned()
    own = {name for name in pins if is_installed(name)}
    missing = [pin for name, pin in pins.items() if name not in own]
    if not missing:
        return 0
    print("installing:", " ".join(missing), flush=True)
    # What is there must stay: pin it to the version it has, so that no dependency replaces it.
    keep = [f"{name}=={re.sub(r'[+].*', '', importlib.metadata.version(name))}" for name in sorted(own)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(keep))
        file.flush()
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "-c",
            file.name,
            *missing,
        ]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    raise SystemExit(main())
