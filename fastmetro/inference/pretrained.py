"""A network with its trained weights, by name or from a checkpoint file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmetro.meshes.mesh import Mesh
from fastmetro.models import FastMETRO, create_model
from fastmetro.models.checkpoints import load_checkpoint, weights_record

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SHIPPED = {"fastmetro-compact": ASSETS / "fastmetro_compact.safetensors"}
"""Names of the weights inside the package."""


def load_pretrained(
    checkpoint: str | Path, *, model: FastMETRO | None = None, attention: str = "auto", mesh: Mesh | None = None
) -> FastMETRO:
    """Build the network that a checkpoint names and load its weights.

    Args:
        checkpoint: A name of :data:`SHIPPED`, or a file. Files of this project's training name their model and mesh;
            for others pass ``model``.
        model: The network to load into; None builds it.
        attention: Backend for a network that is built here, as in :func:`fastmetro.create_model`.
        mesh: The mesh of a network that is built here, where it needs files ("smpl", "mano"); by its name otherwise.

    Returns:
        The network on the CPU, in float32, in evaluation mode.

    Raises:
        FileNotFoundError: the checkpoint is neither a file nor a known name.
        ValueError: the file does not say what it is and no ``model`` was given, or it does not fit the network
            (:class:`fastmetro.models.checkpoints.CheckpointMismatch`, with the differences).
    """
    path = SHIPPED.get(str(checkpoint), Path(checkpoint))
    if not path.is_file():
        known = ", ".join(map(repr, SHIPPED))
        raise FileNotFoundError(
            f"checkpoint {str(checkpoint)!r} is neither a file nor one of the shipped names: {known}"
        )
    if model is None:
        record = weights_record(path)
        if "model" not in record or "mesh" not in record:
            raise ValueError(
                f"{path} does not name its network, as released checkpoints do not; build it with "
                "fastmetro.create_model(...) and pass it as model="
            )
        if mesh is not None and mesh.name != record["mesh"]:
            raise ValueError(f"mesh must be {record['mesh']!r}, which {path} was trained for, got {mesh.name!r}")
        options = _options(record)
        model = create_model(record["model"], mesh=mesh or record["mesh"], attention=attention, **options)
    load_checkpoint(model, path)
    return model.eval()


def _options(record: dict[str, str]) -> dict[str, Any]:
    """For ``create_model``, from the settings of the training, which older files lack some of."""
    try:
        settings = json.loads(record.get("config", "{}"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError("the record of the weights has settings that are not JSON")
    options = {name: settings[name] for name in ("backbone", "upsampling", "masking") if settings.get(name) is not None}
    return {**options, "smpl_head": settings.get("stage") == "smpl"}
