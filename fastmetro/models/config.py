"""Sizes and options of the FastMETRO networks.

Sources: Cho et al., ECCV 2022, Table 1 (variants), section 4 and Table 4 (ablations).
"""

from __future__ import annotations

from dataclasses import dataclass

ATTENTIONS = ("auto", "dense", "reference", "native", "triton")
MASKINGS = ("all", "half-heads", "none")
UPSAMPLINGS = ("fixed", "released", "learned")


def _check_choice(argument: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


@dataclass(frozen=True)
class FastMETROConfig:
    """Everything that decides the shape and the arithmetic of a network, except backbone and mesh.

    Attributes:
        name: the variant this configuration started from, for messages.
        layers: encoder layers, and decoder layers, in each of the two stages.
        widths: token width in stage 1 and stage 2. Equal widths leave out the linear layers between the stages
            (Table 4, "w/o progressive dimensionality reduction").
        feedforward: hidden width of the feed-forward blocks of stage 1 and 2.
        heads: attention heads; divides both widths.
        dropout: probability, in training, on attention weights, feed-forward units and residual branches.
        masking: "all": vertices attend only along mesh edges; "half-heads": in the first half of the heads only;
            "none": no masking (Table 4). Joint tokens always see all and are seen by all.
        upsampling: coarse to fine. "fixed": the constant sparse matrix of the mesh hierarchy (the paper).
            "released": a learned linear layer to the intermediate mesh, then the constant matrix (released
            checkpoints); the same as "fixed" for a mesh of one upsampling step, such as the hand. "learned": a
            linear layer for every step (Table 4, "w/ learnable upsampling layers").
        attention: decoder self-attention and mesh upsampling by "dense" PyTorch with the full mask, or by a backend
            of ``fastmetro_kernels``: "auto", "reference", "native", "triton".
        smpl_head: add the regressor of SMPL pose and shape parameters (body meshes with an intermediate mesh).
        smpl_compat: the published sign convention of that head; see :mod:`fastmetro.models.smpl_head`.

    Raises:
        ValueError: a value out of range; the message names it and what is accepted.
    """

    name: str = "fastmetro-s"
    layers: int = 1
    widths: tuple[int, int] = (512, 128)
    feedforward: tuple[int, int] = (2048, 512)
    heads: int = 8
    dropout: float = 0.1
    masking: str = "all"
    upsampling: str = "fixed"
    attention: str = "auto"
    smpl_head: bool = False
    smpl_compat: bool = False

    def __post_init__(self) -> None:
        _check_choice("masking", self.masking, MASKINGS)
        _check_choice("upsampling", self.upsampling, UPSAMPLINGS)
        _check_choice("attention", self.attention, ATTENTIONS)
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.heads < 1 or any(width < 1 or width % self.heads for width in self.widths):
            raise ValueError(f"widths must be positive multiples of heads={self.heads}, got {self.widths}")
        if any(width % 4 for width in self.widths):
            raise ValueError(f"widths must be multiples of 4 for the positional encoding, got {self.widths}")
        if min(self.feedforward) < 1:
            raise ValueError(f"feedforward must be positive, got {self.feedforward}")
        if self.masking == "half-heads" and self.heads % 2:
            raise ValueError(f"masking='half-heads' needs an even number of heads, got {self.heads}")


# Our own small network, not one of the paper. With its trunk and an Anny body it has 8,218,038 parameters, 15.7 MiB in
# bfloat16: 5.6 M in the trunk (3.4 M of them at 7 x 7, 1.8 M at 14 x 14), 1.8 M and 0.5 M in the two stages.
COMPACT = FastMETROConfig("fastmetro-compact", layers=1, widths=(256, 128), feedforward=(1024, 512))

CONFIGS: dict[str, FastMETROConfig] = {
    "fastmetro-s": FastMETROConfig("fastmetro-s", layers=1),
    "fastmetro-m": FastMETROConfig("fastmetro-m", layers=2),
    "fastmetro-l": FastMETROConfig("fastmetro-l", layers=3),
    "fastmetro-compact": COMPACT,
}

DEFAULT_BACKBONES: dict[str, str] = {
    "fastmetro-s": "resnet50",
    "fastmetro-m": "resnet50",
    "fastmetro-l": "resnet50",
    "fastmetro-compact": "compact",
}
