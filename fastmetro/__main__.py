"""``python -m fastmetro``: the command line."""

from fastmetro.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
