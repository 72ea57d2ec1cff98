"""`python -m bench <name> [options]` runs `bench/<name>.py` or the package `bench/<name>/`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    """Hand the rest of the command line to the module that is named first."""
    folder = Path(__file__).parent
    found = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    names = sorted(name for name in found - {"common", "runs"} if not name.startswith(("_", "test_")))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        raise SystemExit(f"usage: python -m bench {{{','.join(names)}}} [options]")
    name = sys.argv.pop(1)
    sys.argv[0] = f"bench {name}"
    importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
