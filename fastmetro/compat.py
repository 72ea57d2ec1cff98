"""What `compat` options accept."""

from __future__ import annotations

from typing import Literal

Compat = Literal["published"]
"""Do as the released code does, also where that is not right; docs/training.md has the list."""
