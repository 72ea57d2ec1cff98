"""YAML files of strangers, read as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20


def read_yaml(path: Path, what: str) -> dict[Any, Any]:
    """Names and values of a file, {} of an empty one.

    Args:
        path: the file.
        what: what it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, no YAML, or no names and values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, at most {MAX_BYTES} are read")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold names and values, got {type(content).__name__}")
    return content
