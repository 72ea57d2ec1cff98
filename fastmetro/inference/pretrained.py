"""A network with its trained weights, by name or from a checkpoint file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastmetro.data.limits import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE
from fastmetro.meshes.mesh import Mesh, load_mesh
from fastmetro.models import FastMETRO, create_model
from fastmetro.models.checkpoints import load_checkpoint, weights_record

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SHIPPED = {"fastmetro-compact": ASSETS / "fastmetro_compact.safetensors"}
"""Names of the weights inside the package."""


@dataclass(frozen=True)
class NetworkChoice:
    """What a checkpoint does not say of its network, as options of the command line.

    Attributes:
        model: the network of a released checkpoint, e.g. "fastmetro-l"; ours name theirs.
        backbone: of that network.
        upsampling: coarse to fine in that network.
        mesh: that it makes.
        mesh_data: folder of the data files of the published repository, for the meshes "smpl" and "mano".
        body_model: the SMPL or MANO model file of those meshes.
        smpl_head: whether that network has the regressor of SMPL parameters.
    """

    model: str | None = None
    backbone: str = "hrnet-w64"
    upsampling: Literal["fixed", "released", "learned"] = "released"
    mesh: Literal["smpl", "mano"] = "smpl"
    mesh_data: Path | None = None
    body_model: Path | None = None
    smpl_head: bool = False

    def build(self, checkpoint: str | Path, attention: str = "auto", smpl_compat: bool = False) -> FastMETRO | None:
        """The network to load a checkpoint into; None where :func:`load_pretrained` builds it from what the file says.

        Args:
            checkpoint: a file, or the name of shipped weights.
            attention: backend, as in :func:`fastmetro.create_model`.
            smpl_compat: for a released checkpoint, the published sign of its rotations.

        Raises:
            FileNotFoundError: a file of the mesh is absent.
            ValueError: a name that is not known, or the mesh needs files that are not given.
        """
        if self.model is not None:
            mesh = self._mesh(self.mesh)
            return create_model(
                self.model, self.backbone, mesh, self.upsampling, attention, self.smpl_head, smpl_compat=smpl_compat
            )
        path = SHIPPED.get(str(checkpoint), Path(checkpoint))
        record = weights_record(path) if path.is_file() else {}
        if record.get("mesh") not in ("smpl", "mano") or "model" not in record:
            return None
        return create_model(record["model"], mesh=self._mesh(record["mesh"]), attention=attention, **_options(record))

    def _mesh(self, name: str) -> Mesh:
        return load_mesh(name, data=self.mesh_data, model_file=self.body_model)


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
                f"{path} does not name its network, as released checkpoints do not: give its name as model, on the "
                "command line by --model, in Python what fastmetro.create_model(...) makes"
            )
        model = create_model(record["model"], mesh=record["mesh"], attention=attention, **_options(record))
    load_checkpoint(model, path)
    return model.eval()


def trained_size(checkpoint: str | Path) -> int:
    """Side in pixels of the images that a checkpoint's network was trained on; 224 where the file does not say.

    Raises:
        ValueError: the file says something else than a size of images.
    """
    path = SHIPPED.get(str(checkpoint), Path(checkpoint))
    size = _settings(weights_record(path) if path.is_file() else {}).get("image_size", 224)
    if not isinstance(size, int) or not MIN_IMAGE_SIZE <= size <= MAX_IMAGE_SIZE:
        limits = f"{MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}"
        raise ValueError(f"the record of the weights must have an image_size of {limits}, got {size!r}")
    return size


def _settings(record: dict[str, str]) -> dict[str, Any]:
    """Of the training, which older files lack some of."""
    try:
        settings = json.loads(record.get("config", "{}"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError("the record of the weights has settings that are not JSON")
    return settings


def _options(record: dict[str, str]) -> dict[str, Any]:
    """For ``create_model``."""
    settings = _settings(record)
    options = {name: settings[name] for name in ("backbone", "upsampling", "masking") if settings.get(name) is not None}
    published = settings.get("compat") == "published"
    return {**options, "smpl_head": settings.get("stage") == "smpl", "smpl_compat": published}
