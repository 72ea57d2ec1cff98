"""The protocols of body and hand data sets: which joints, which roots, which alignment (protocol 3.9, 3.10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmetro.meshes.mesh import Mesh

_BODY = (
    "14 joints, of the prediction by the Human3.6M regressor on the fine mesh, of the truth as labelled; MPJPE after "
    "both are recentred at the middle of the hips, PA-MPJPE after a similarity transform, both over samples with 3D "
    "joints; MPVPE of the vertices relative to the regressed pelvis, over samples with body parameters"
)


@dataclass(frozen=True)
class Protocol:
    """How a data set is evaluated.

    Attributes:
        name: on the command line and in tables.
        kind: what its labels are of.
        description: what is printed beside the numbers.
    """

    name: str
    kind: Literal["body", "hand"]
    description: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("h36m-p2", "body", f"Human3.6M, protocol 2: {_BODY} (Human3.6M has none)"),
        Protocol("3dpw", "body", f"3DPW: {_BODY}, by the neutral model unless others are named"),
        Protocol(
            "freihand", "hand",
            "FreiHAND: 21 joints regressed from the mesh, and the mesh, relative to the wrist; PA-MPJPE and PA-MPVPE "
            "after a similarity transform; the labels of its evaluation set are dummies, scores come from the official "
            "truth",
        ),
        Protocol(
            "hand", "hand",
            "hands with true labels: 21 joints, of the prediction regressed from the mesh, of the truth as labelled, "
            "and the mesh; MPJPE and MPVPE relative to the wrist, PA-MPJPE and PA-MPVPE after a similarity transform; "
            "joints over samples with 3D joints, the mesh over samples with hand parameters",
        ),
    )
}  # fmt: skip


def find_protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(map(repr, PROTOCOLS))}, got {name!r}")
    return PROTOCOLS[name]


def check_part(protocol: Protocol, mesh: Mesh) -> None:
    """Raise ValueError where a protocol is not for the part of a mesh; the message lists those that are."""
    if mesh.part != protocol.kind:
        accepted = ", ".join(repr(name) for name, other in PROTOCOLS.items() if other.kind == mesh.part)
        raise ValueError(
            f"protocol {protocol.name!r} is for a {protocol.kind}, mesh {mesh.name!r} is a {mesh.part}: protocol must "
            f"be one of {accepted}"
        )
