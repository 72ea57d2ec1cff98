"""`python -m bench <name> [options]` runs `bench/<name>.py`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    """Hand the rest of the command line to the module that is named first."""
    folder = Path(__file__).parent
    names = sorted(p.stem for p in folder.glob("*.py") if p.stem not in {"__init__", "__main__", "common"})
    names = [name for name in names if not name.startswith("test_")]
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        raise SystemExit(f"usage: python -m bench {{{','.join(names)}}} [options]")
    name = sys.argv.pop(1)
    sys.argv[0] = f"bench {name}"
    importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
