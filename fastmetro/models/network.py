"""The FastMETRO network: image -> camera, joints, coarse mesh, fine mesh.

Cho et al., "Cross-Attention of Disentangled Modalities for 3D Human Mesh Recovery with Transformers", ECCV 2022.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmetro.models.attention import TokenAttention
from fastmetro.models.backbones import create_backbone
from fastmetro.models.backbones.overlap import call_backbone
from fastmetro.models.config import CONFIGS, DEFAULT_BACKBONES, FastMETROConfig
from fastmetro.models.position_encoding import sine_position_encoding
from fastmetro.models.smpl_head import SMPLParameterRegressor
from fastmetro.models.transformer import Transformer
from fastmetro.models.upsampling import FixedUpsampling, LearnedUpsampling, check_steps

if TYPE_CHECKING:
    from fastmetro.meshes.mesh import Mesh

_GRID = (7, 7)  # feature map of a 224 x 224 image


class FastMETRO(nn.Module):
    """FastMETRO for one mesh.

    Parameter names are those of released checkpoints, which load strictly by ``load_state_dict``. Masks, matrices
    and positional encodings are constants of the mesh and not part of the state dict.

    Args:
        config: sizes and options.
        backbone: module from images [B, 3, H, W] to features [B, C, h, w]; C is its ``out_channels``, or 2048.
        mesh: joints, topology and upsampling matrices; see ``fastmetro.load_mesh``.

    Attributes:
        config, mesh: as given.
        num_joints: joint tokens K.
        num_vertices: vertex tokens N: the vertices of the coarse mesh.

    Raises:
        ValueError: the upsampling matrices do not fit one another, or ``smpl_head`` is asked for a mesh without an
            intermediate level.
    """

    def __init__(self, config: FastMETROConfig, backbone: nn.Module, mesh: Mesh) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh
        topology = copy.deepcopy(mesh.topology)  # moves with this network, not with others of the same mesh
        self.num_joints: int = topology.num_hubs
        self.num_vertices: int = topology.num_vertices
        self.backbone = backbone

        width_1, width_2 = config.widths
        self.conv_1x1 = nn.Conv2d(getattr(backbone, "out_channels", 2048), width_1, 1)
        self.cam_token_embed = nn.Embedding(1, width_1)
        self.joint_token_embed = nn.Embedding(self.num_joints, width_1)
        self.vertex_token_embed = nn.Embedding(self.num_vertices, width_1)
        self.transformer_1 = self._stage(1)
        self.transformer_2 = self._stage(2)
        self.dim_reduce_enc_cam = _reduction(width_1, width_2)
        self.dim_reduce_enc_img = _reduction(width_1, width_2)
        self.dim_reduce_dec = _reduction(width_1, width_2)
        self.xyz_regressor = nn.Linear(width_2, 3)
        self.cam_predictor = nn.Linear(width_2, 3)
        self.token_attention = TokenAttention(topology, config.heads, config.masking, config.attention)
        self._add_upsampling(mesh)

    def _stage(self, stage: int) -> Transformer:
        config, width = self.config, self.config.widths[stage - 1]
        self.register_buffer(f"position_{stage}", sine_position_encoding(*_GRID, width), persistent=False)
        return Transformer(width, config.heads, config.feedforward[stage - 1], config.dropout, config.layers)

    def _add_upsampling(self, mesh: Mesh) -> None:
        """The steps from coarse to fine; a step that does not exist is None."""
        config = self.config
        steps = check_steps(mesh.upsampling, self.num_vertices)
        fixed, learned = config.upsampling == "fixed", config.upsampling == "learned"
        to_intermediate: nn.Module | None = None
        to_fine: nn.Module | None = None  # from the intermediate mesh
        direct: nn.Module | None = None  # from the coarse mesh
        if len(steps) == 2:
            fine, (intermediate, coarse) = steps[1].shape[0], steps[0].shape
            backend = config.attention
            to_intermediate = FixedUpsampling(steps[0], backend) if fixed else LearnedUpsampling(coarse, intermediate)
            if fixed:
                direct = FixedUpsampling(steps[1] @ steps[0], backend)
            else:
                to_fine = LearnedUpsampling(intermediate, fine) if learned else FixedUpsampling(steps[1], backend)
        elif len(steps) == 1:
            fine, coarse = steps[0].shape
            direct = LearnedUpsampling(coarse, fine) if learned else FixedUpsampling(steps[0], config.attention)
        else:
            direct = nn.Identity()
        self.coarse2intermediate_upsample = to_intermediate
        self.intermediate2fine_upsample = to_fine
        self.coarse2fine_upsample = direct
        if config.smpl_head:
            if len(steps) != 2:
                raise ValueError(
                    "smpl_head needs a mesh with an intermediate level between coarse and fine, as the body meshes "
                    f"have; {mesh.name!r} has {len(steps)} upsampling step(s)"
                )
            self.smpl_parameter_regressor = SMPLParameterRegressor(steps[0].shape[0], config.smpl_compat)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Recover meshes.

        Args:
            images: floating point [B, 3, H, W], normalised with the ImageNet mean and deviation; H = W = 224 as
                published. (Whatever the backbone takes.)

        Returns:
            Camera and coordinates in metres; x right, y down, z away from the camera, origin near the root joint.
            They are float32 even where the weights or autocast use half precision, float64 for float64:

            - ``pred_cam`` [B, 3]: scale s and shift (tx, ty) of the weak-perspective camera; a point projects to
              s (x + tx), s (y + ty) in the crop, whose sides are at -1 and 1.
            - ``pred_3d_joints`` [B, K, 3], ``pred_3d_vertices_coarse`` [B, N, 3],
              ``pred_3d_vertices_intermediate`` (meshes with two upsampling steps), ``pred_3d_vertices_fine``.
            - ``pred_rotmat`` [B, 24, 3, 3] and ``pred_betas`` [B, 10] with ``smpl_head``.

        Raises:
            ValueError: the backbone does not return [B, C, h, w] features with the expected C.
        """
        camera, mesh_tokens = self._encode(images)
        # Millimetres matter: half precision would round coordinates near 1 m to 0.5 mm (float16) or 4 mm (bfloat16).
        with torch.autocast(images.device.type, enabled=False):
            out = {"pred_cam": _precise_linear(self.cam_predictor, camera[:, 0])}
            coordinates = _precise_linear(self.xyz_regressor, mesh_tokens)
            out["pred_3d_joints"] = coordinates[:, : self.num_joints]
            out["pred_3d_vertices_coarse"] = coarse = coordinates[:, self.num_joints :]
            if self.coarse2intermediate_upsample is not None:
                out["pred_3d_vertices_intermediate"] = self.coarse2intermediate_upsample(coarse)
            if self.coarse2fine_upsample is not None:
                out["pred_3d_vertices_fine"] = self.coarse2fine_upsample(coarse)
            elif self.intermediate2fine_upsample is not None:
                out["pred_3d_vertices_fine"] = self.intermediate2fine_upsample(out["pred_3d_vertices_intermediate"])
        if self.config.smpl_head:
            # Trained on its own: no gradient from the parametric body to the vertices.
            vertices = out["pred_3d_vertices_intermediate"].detach()
            out["pred_rotmat"], out["pred_betas"] = self.smpl_parameter_regressor(vertices)
        return out

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Camera token [B, 1, C2] and joint and vertex tokens [B, K + N, C2] after both stages."""
        features = call_backbone(self.backbone, images)
        expected = self.conv_1x1.in_channels
        if features.dim() != 4 or features.shape[1] != expected:
            raise ValueError(
                f"the backbone must return features [B, {expected}, h, w] (its out_channels, or 2048 if it names "
                f"none), got {list(features.shape)}"
            )
        grid = (features.shape[2], features.shape[3])
        image_tokens = self.conv_1x1(features).flatten(2).transpose(1, 2)
        camera = self.cam_token_embed.weight.expand(features.shape[0], 1, -1)
        mesh_tokens = torch.cat([self.joint_token_embed.weight, self.vertex_token_embed.weight]).unsqueeze(0)

        camera, image_tokens, mesh_tokens = self.transformer_1(
            image_tokens, camera, mesh_tokens, self._position(1, grid), self.token_attention
        )
        camera, _, mesh_tokens = self.transformer_2(
            self.dim_reduce_enc_img(image_tokens),
            self.dim_reduce_enc_cam(camera),
            self.dim_reduce_dec(mesh_tokens),
            self._position(2, grid),
            self.token_attention,
        )
        return camera, mesh_tokens

    def _position(self, stage: int, grid: tuple[int, int]) -> Tensor:
        position: Tensor = self.get_buffer(f"position_{stage}")
        if grid == _GRID:
            return position
        width = self.config.widths[stage - 1]
        return sine_position_encoding(*grid, width, device=position.device).to(position.dtype)


def _reduction(width_1: int, width_2: int) -> nn.Module:
    return nn.Identity() if width_1 == width_2 else nn.Linear(width_1, width_2)


def _precise_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32, or in float64 if it is float64."""
    dtype = torch.promote_types(torch.float32, x.dtype)
    return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


def create_model(
    name: str,
    backbone: str | nn.Module | None = None,
    mesh: Mesh | str = "anny-body",
    upsampling: str = "fixed",
    attention: str = "auto",
    smpl_head: bool = False,
    *,
    masking: str = "all",
    dim_reduction: bool = True,
    dropout: float = 0.1,
    smpl_compat: bool = False,
) -> FastMETRO:
    """Build a FastMETRO network with random weights.

    Args:
        name: "fastmetro-s", "fastmetro-m", "fastmetro-l" (the paper) or "fastmetro-compact" (our own, for 16 MiB of
            bfloat16 weights); case does not matter.
        backbone: "resnet50", "hrnet-w64", "compact", or any module that maps images [B, 3, H, W] to features
            [B, C, h, w] with C = 2048 or its attribute ``out_channels``. Default: the compact trunk for the compact
            network, else ResNet-50.
        mesh: a mesh, or a name for ``fastmetro.load_mesh``.
        upsampling: "fixed", "released" or "learned"; see :class:`~fastmetro.models.config.FastMETROConfig`, also for
            the following.
        attention: "auto", "dense", "reference", "native" or "triton".
        smpl_head: add the SMPL parameter regressor.
        masking: "all", "half-heads" or "none".
        dim_reduction: False keeps the width of stage 1 in stage 2 (Table 4).
        dropout: in training.
        smpl_compat: the published determinant convention of the SMPL head.

    Raises:
        TypeError: ``backbone`` is neither a name nor a module.
        ValueError: an unknown name or option; the message lists what is accepted.
    """
    config = CONFIGS.get(name.lower())
    if config is None:
        raise ValueError(f"model name must be one of {', '.join(map(repr, CONFIGS))}, got {name!r}")
    config = replace(
        config,
        masking=masking,
        upsampling=upsampling,
        attention=attention,
        dropout=dropout,
        smpl_head=smpl_head,
        smpl_compat=smpl_compat,
    )
    if not dim_reduction:
        (width, _), (feedforward, _) = config.widths, config.feedforward
        config = replace(config, widths=(width, width), feedforward=(feedforward, feedforward))
    if backbone is None:
        backbone = DEFAULT_BACKBONES[config.name]
    if isinstance(backbone, str):
        backbone = create_backbone(backbone)
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a name or an nn.Module, got {type(backbone).__name__}")
    if isinstance(mesh, str):
        from fastmetro.meshes.mesh import load_mesh

        mesh = load_mesh(mesh)
    return FastMETRO(config, backbone, mesh)
