"""A network with its trained weights, by name or from a checkpoint file."""

from __future__ import annotations

from pathlib import Path

from fastmetro.models import FastMETRO, create_model
from fastmetro.models.checkpoints import load_checkpoint, weights_record

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SHIPPED = {"fastmetro-compact": ASSETS / "fastmetro_compact.safetensors"}
"""Names of the weights inside the package."""


def load_pretrained(checkpoint: str | Path, *, model: FastMETRO | None = None, attention: str = "auto") -> FastMETRO:
    """Build the network that a checkpoint names and load its weights.

    Args:
        checkpoint: A name of :data:`SHIPPED`, or a file. Files of this project's training name their model and mesh;
            for others pass ``model``.
        model: The network to load into; None builds it.
        attention: Backend for a network that is built here, as in :func:`fastmetro.create_model`.

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
        model = create_model(record["model"], mesh=record["mesh"], attention=attention)
    load_checkpoint(model, path)
    return model.eval()
