"""Settings from a YAML file, as arguments of the command line that stand in front of the user's own.

So names, types and choices are checked in one place, and every field can be overridden.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmetro.yaml_file import read_yaml


def file_arguments(path: Path, settings: type) -> list[str]:
    """The arguments that a file stands for, e.g. ``["--learning-rate", "0.0001", "--data.workers", "8"]``.

    Args:
        path: a YAML file of names and values; a section holds the fields of a dataclass.
        settings: the dataclass whose fields may be named.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file; the message names the key.
    """
    return list(_arguments(read_yaml(path, "configuration"), settings, "", path))


def _arguments(content: Mapping[Any, Any], settings: type, prefix: str, path: Path) -> Iterator[str]:
    types = typing.get_type_hints(settings)
    names = {field.name for field in dataclasses.fields(settings)}
    for key, value in content.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}: there is no setting {prefix + str(key)!r}{hint}")
        name = prefix + key
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}: {name} must be a section of settings, got {value!r}")
            yield from _arguments(value, typing.cast(type, types[key]), f"{name}.", path)
        else:
            _check(name, value, types[key], path)
            yield from _option(name, value, path)


def _check(name: str, value: Any, kind: Any, path: Path) -> None:
    """What the command line could not say of a file: a flag has no value there, and nothing is null.

    Raises:
        ValueError: null where there must be a value, a flag that is neither true nor false, or another setting that is.
    """
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{path}: {name} must be true or false, got {_yaml(value)}")
    elif isinstance(value, bool):
        raise ValueError(f"{path}: {name} must have a value other than true or false, got {_yaml(value)}")
    elif value is None and type(None) not in typing.get_args(kind):
        raise ValueError(f"{path}: {name} must have a value, got null; leave it out for the default")
    elif isinstance(value, list) and typing.get_origin(kind) is not tuple:
        raise ValueError(f"{path}: {name} must be one value, got the list {_yaml(value)}")
    elif isinstance(value, list) and any(entry is None or isinstance(entry, bool) for entry in value):
        raise ValueError(f"{path}: {name} must be a list of texts or numbers, got {_yaml(value)}")


def _yaml(value: Any) -> str:
    """As it stands in the file."""
    return json.dumps(value, default=str)


def _option(name: str, value: Any, path: Path) -> Iterator[str]:
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        parent, _, last = option[2:].rpartition(".")
        dot = "." if parent else ""
        yield option if value else f"--{parent}{dot}no-{last}"
    elif isinstance(value, list):
        yield option
        yield from (_text(name, entry, path) for entry in value)
    else:
        yield option
        yield _text(name, value, path)


def _text(name: str, value: Any, path: Path) -> str:
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{path}: {name} must be a text, a number, true or false, or a list of these, got {value!r}")
    return str(value)
