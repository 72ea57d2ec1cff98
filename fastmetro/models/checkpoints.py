"""Reading checkpoints, released ones and ours, and refusing those of another architecture.

Files are data: tensors only (``weights_only=True`` or safetensors), within a size limit, compared with the model by
name and shape before a single value is copied.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmetro.models.backbones.resnet import ResNet50, ResNet50Trunk, accept_torchvision_names, skip_classifier

MAX_BYTES = 4 * 2**30
_SHOWN = 10
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_TWICE = ("model", "average")
_PREFIXES = ("module.", "_orig_mod.")


class CheckpointMismatch(ValueError):
    """A checkpoint belongs to another architecture.

    Attributes:
        missing: names that the model has and the file lacks.
        unexpected: names that the file has and the model lacks.
        shapes: name -> (shape in the model, shape in the file), where they differ.
    """

    def __init__(
        self,
        source: str,
        missing: list[str],
        unexpected: list[str],
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
        hint: str,
    ) -> None:
        self.missing, self.unexpected, self.shapes = missing, unexpected, shapes
        different = [f"{name}: model {list(ours)}, file {list(theirs)}" for name, (ours, theirs) in shapes.items()]
        lines = [f"{source} does not fit this model; nothing was loaded."]
        lines += _listing("missing from the file", missing)
        lines += _listing("not in the model", unexpected)
        lines += _listing("of another shape", different)
        super().__init__("\n".join([*lines, hint]))


def load_checkpoint(model: nn.Module, path: str | Path, max_bytes: int = MAX_BYTES) -> None:
    """Load a checkpoint into a model, strictly: all of it, or nothing and an error that says why.

    Values are cast to the dtype and device of the model. ``num_batches_tracked`` counters, which very old files
    lack, may be missing.

    Args:
        model: a network of :func:`fastmetro.create_model`, or a backbone.
        path: ``.safetensors``, or a file of ``torch.save``; its tensors may lie under "state_dict" or "model" and
            have the prefix "module.". Of a training's checkpoint.pt the averaged weights are taken.
        max_bytes: refuse larger files.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointMismatch: names or shapes differ; lists the differences and what the file looks like.
        ValueError: the file is too large, damaged, or not a state dict.
    """
    state = read_state_dict(path, max_bytes)
    _rename_as_modules_do(model, state)
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    shapes = {
        name: (tuple(expected[name].shape), tuple(value.shape))
        for name, value in state.items()
        if name in expected and value.shape != expected[name].shape
    }
    if missing or unexpected or shapes:
        hint = f"The file looks like {describe(state)}; the model is {describe(expected)}."
        raise CheckpointMismatch(str(path), missing, unexpected, shapes, hint)
    model.load_state_dict({**expected, **state}, strict=True)


def read_state_dict(path: str | Path, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file into host memory, without wrappers and prefixes.

    Args:
        path: ``.safetensors``, or a file of ``torch.save``.
        max_bytes: refuse files that hold more.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is too large, damaged, or holds anything but a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    size = _unpacked_size(path)
    if size > max_bytes:
        raise ValueError(f"{path} holds {size:,} bytes, more than max_bytes={max_bytes:,}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            loaded: Any = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    else:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or hostile file makes the reader raise
            raise ValueError(
                f"{path} could not be read as tensors only (torch.load with weights_only=True). Whole pickled modules "
                f"are code and are not accepted; save their state_dict(). {type(error).__name__}: {error}"
            ) from error
    return _unwrapped(loaded, path)


def weights_record(path: str | Path) -> dict[str, str]:
    """How the weights of one of our files were made, all strings; {} for other files.

    Args:
        path: ``.safetensors``, whose metadata it is, or a training's checkpoint.pt, which has the model, mesh, settings
            ("config"), commands and number of images ("samples").

    Raises:
        ValueError: the file is not readable as safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return _training_record(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _training_record(path: Path) -> dict[str, str]:
    try:
        if _unpacked_size(path) > MAX_BYTES:
            return {}
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # of an old format, damaged or hostile: whoever reads its weights is told
        return {}
    if not _is_training(loaded):
        return {}
    settings = loaded["settings"]
    made: dict[str, Any] = {name: settings[name] for name in ("model", "mesh") if name in settings}
    made |= {"config": settings, "commands": loaded.get("commands", [])}
    try:
        made["samples"] = loaded.get("samples_before", 0) + loaded.get("step", 0) * settings.get("batch_size", 0)
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in made.items()}
    except TypeError:  # no training wrote it
        return {}


def _is_training(loaded: Any) -> bool:
    """Whether it is what a training keeps to go on: it has weights twice, as they are and averaged."""
    return isinstance(loaded, Mapping) and all(isinstance(loaded.get(name), Mapping) for name in ("settings", *_TWICE))


def describe(state: Mapping[str, Tensor]) -> str:
    """What architecture a state dict looks like, in the words of ``create_model``."""
    if "vertex_token_embed.weight" not in state:
        backbone = _backbone_name(state, "")
        return f"a bare backbone ({backbone})" if backbone else "no FastMETRO network"
    layers = 1 + max((int(m[1]) for m in _matches(r"transformer_1\.encoder\.layers\.(\d+)\.", state)), default=0)
    widths = [_size(state, f"transformer_{stage}.encoder.norm.weight", 0) for stage in (1, 2)]
    name = {1: "s", 2: "m", 3: "l"}.get(layers, f"with {layers} layers per stage")
    variant = "fastmetro-compact" if widths[0] == 256 and layers == 1 else f"fastmetro-{name}"
    parts = [variant]
    backbone = _backbone_name(state, "backbone.")
    parts.append(f"backbone {backbone}" if backbone else "no or an unknown backbone")
    parts.append(f"widths {widths[0]} and {widths[1]}")
    parts.append(f"{_size(state, 'joint_token_embed.weight', 0)} joints")
    parts.append(f"{_size(state, 'vertex_token_embed.weight', 0)} coarse vertices")
    parts.append(f"upsampling {_upsampling_name(state)}")
    if any(key.startswith("smpl_parameter_regressor.") for key in state):
        parts.append("smpl_head=True")
    return f"{parts[0]} ({', '.join(parts[1:])})"


def _rename_as_modules_do(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Apply the renaming that the backbones do while loading, so that names can be compared before."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, ResNet50Trunk):
            accept_torchvision_names(state, prefix)
        elif isinstance(module, ResNet50):
            skip_classifier(state, prefix)


def _upsampling_name(state: Mapping[str, Tensor]) -> str:
    if "intermediate2fine_upsample.weight" in state or "coarse2fine_upsample.weight" in state:
        return "'learned'"
    if "coarse2intermediate_upsample.weight" in state:
        return "'released'"
    return "'fixed' (or 'released' for a mesh of one upsampling step)"


def _backbone_name(state: Mapping[str, Tensor], prefix: str) -> str | None:
    if f"{prefix}stage4.0.branches.0.0.conv1.weight" in state:
        return "'hrnet-w64'" if _size(state, f"{prefix}transition1.0.0.weight", 0) == 64 else "an HRNet of other width"
    if f"{prefix}0.weight" in state and f"{prefix}4.0.conv1.weight" in state:
        return "'resnet50'" if _is_resnet50(state, prefix, "4", "6") else "a ResNet, not ResNet-50"
    if f"{prefix}layer1.0.conv1.weight" in state and f"{prefix}conv1.weight" in state:
        if _size(state, f"{prefix}conv1.weight", 0) == 48:
            return "'compact'"
        return "'resnet50'" if _is_resnet50(state, prefix, "layer1", "layer3") else "a ResNet, not ResNet-50"
    return None


def _is_resnet50(state: Mapping[str, Tensor], prefix: str, first: str, third: str) -> bool:
    blocks = {m[1] for m in _matches(re.escape(f"{prefix}{third}.") + r"(\d+)\.", state)}
    return f"{prefix}{first}.0.conv3.weight" in state and len(blocks) == 6


def _matches(pattern: str, names: Iterable[str]) -> list[re.Match[str]]:
    return [match for name in names if (match := re.match(pattern, name))]


def _size(state: Mapping[str, Tensor], name: str, dimension: int) -> int | str:
    return int(state[name].shape[dimension]) if name in state else "?"


def _listing(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    shown = [f"    {name}" for name in names[:_SHOWN]]
    more = [f"    ... and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [f"  {len(names)} {title}:", *shown, *more]


def _unpacked_size(path: Path) -> int:
    """Bytes that the file holds, also if it is a compressed archive."""
    if not zipfile.is_zipfile(path):
        return path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is a damaged archive: {error}") from error


def _unwrapped(loaded: Any, path: Path) -> dict[str, Tensor]:
    if _is_training(loaded):
        loaded = loaded["average"]  # what is evaluated and exported
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{path} holds {type(loaded).__name__}, expected a state dict: names and tensors")
    strange = [name for name, value in loaded.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strange:
        raise ValueError(f"{path}: expected names and tensors only, got {strange[:_SHOWN]}")
    state = dict(loaded)
    for prefix in _PREFIXES:
        while all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
