"""Runs one of the scripts ``compile_*.py`` in a process where Triton compiles, and reads what it found."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block can have, by compute capability."""
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def compile_report(name: str, *arguments: object) -> dict[str, dict[str, Any]]:
    """What script `name` says of each kernel: by the kernel's name, its figures."""
    script = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found
