"""FastMETRO as the published code computes it, operation for operation: the yardstick for speed, and for training.

Cho et al., "Cross-Attention of Disentangled Modalities for 3D Human Mesh Recovery with Transformers", ECCV 2022, and
the code released with it. What that code does at every call is done here at every call, also where it need not be:

- tokens lie sequence first, [L, B, C], and the learned ones are repeated over the batch;
- `nn.MultiheadAttention` also returns the attention weights, averaged over the heads, and nobody reads them;
- encoder and cross-attention get a key padding mask that masks nothing, made anew in each transformer;
- the mask of the decoder's self-attention stays on the host and is moved to the device;
- zeros are added to the decoder's queries, and the positional encoding is computed for each sample;
- the constant upsampling is one sparse product per sample, in a Python loop, and a stack.

Nothing else is slowed down. Values, names and gradients are those of :class:`fastmetro.models.network.FastMETRO`.
"""

from __future__ import annotations

import copy
import math

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmetro.models.network import FastMETRO
from fastmetro.models.upsampling import LearnedUpsampling, check_steps


class PublishedEncoderLayer(nn.Module):
    """Self-attention among camera and image tokens, then the feed-forward block."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout, self.dropout1, self.dropout2 = (nn.Dropout(dropout) for _ in range(3))

    def forward(self, tokens: Tensor, padding: Tensor, position: Tensor) -> Tensor:
        """Update tokens [1 + S, B, C] with `padding` [B, 1 + S] and `position` [S, B, C] of all but the first."""
        x = self.norm1(tokens)
        query = key = torch.cat([x[:1], x[1:] + position])
        attended, _ = self.self_attn(query, key, x, key_padding_mask=padding)
        tokens = tokens + self.dropout1(attended)
        hidden = self.dropout(F.relu(self.linear1(self.norm2(tokens))))
        return tokens + self.dropout2(self.linear2(hidden))


class PublishedDecoderLayer(nn.Module):
    """Masked self-attention among joint and vertex tokens, cross-attention to the image, the feed-forward block."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout, self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(dropout) for _ in range(4))

    def forward(
        self, tokens: Tensor, memory: Tensor, blocked: Tensor, padding: Tensor, position: Tensor, query_position: Tensor
    ) -> Tensor:
        """Update the joint and vertex tokens.

        Args:
            tokens: [L, B, C].
            memory: encoded image tokens [S, B, C].
            blocked: bool [L, L], True where a token may not attend.
            padding: bool [B, S], the image tokens that are left out.
            position: [S, B, C], added to the keys of the cross-attention.
            query_position: [L, B, C], added to the queries (and the keys of the self-attention).
        """
        x = self.norm1(tokens)
        query = key = x + query_position
        attended, _ = self.self_attn(query, key, x, attn_mask=blocked)
        tokens = tokens + self.dropout1(attended)
        query = self.norm2(tokens) + query_position
        attended, _ = self.multihead_attn(query, memory + position, memory, key_padding_mask=padding)
        tokens = tokens + self.dropout2(attended)
        hidden = self.dropout(F.relu(self.linear1(self.norm3(tokens))))
        return tokens + self.dropout3(self.linear2(hidden))


class _Stack(nn.Module):
    """Layers and a final norm, under the names of the checkpoints."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, *others: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, *others)
        return self.norm(tokens)


class PublishedTransformer(nn.Module):
    """One of the two stages (paper, section 3.2); weights start Xavier-uniform (section 4)."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, layers: int) -> None:
        super().__init__()
        sizes = (width, heads, feedforward, dropout)
        self.encoder = _Stack([PublishedEncoderLayer(*sizes) for _ in range(layers)], width)
        self.decoder = _Stack([PublishedDecoderLayer(*sizes) for _ in range(layers)], width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, image_tokens: Tensor, camera_token: Tensor, mesh_tokens: Tensor, position: Tensor, blocked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens [S, B, C], camera token [1, B, C], mesh tokens [L, B, C] -> camera, image, mesh tokens."""
        count, batch, _ = image_tokens.shape
        padding = torch.zeros((batch, count), dtype=torch.bool, device=image_tokens.device)
        camera_padding = torch.zeros((batch, 1), dtype=torch.bool, device=image_tokens.device)
        encoded = self.encoder(
            torch.cat([camera_token, image_tokens]), torch.cat([camera_padding, padding], dim=1), position
        )
        camera, memory = encoded.split([1, count])
        query_position = torch.zeros_like(mesh_tokens)
        return camera, memory, self.decoder(mesh_tokens, memory, blocked, padding, position, query_position)


class PublishedFastMETRO(nn.Module):
    """The published network around a model's configuration, mesh and backbone, with random weights of its own.

    Input, outputs and parameter names as :class:`fastmetro.models.network.FastMETRO`. All computation is in the dtype
    of the weights; on a GPU the published code fails in half precision, where its sparse product does not exist.

    Args:
        model: the network to follow; its backbone is copied.

    Raises:
        ValueError: the model has an option that the published code has not: masking other than "all", or our SMPL
            head, which batches the published one's loop.
    """

    coarse2intermediate_upsample: nn.Linear | None
    intermediate2fine_upsample: nn.Linear | None
    coarse2fine_upsample: nn.Linear | None
    to_intermediate: Tensor | None
    to_fine: Tensor | None

    def __init__(self, model: FastMETRO) -> None:
        super().__init__()
        config = model.config
        if config.masking != "all":
            raise ValueError(f"model: the published network has masking='all' only, got {config.masking!r}")
        if config.smpl_head:
            raise ValueError("model: smpl_head=True is not covered by the published baseline; build it without")
        self.num_joints, self.num_vertices = model.num_joints, model.num_vertices
        self.backbone = copy.deepcopy(model.backbone)
        (width_1, width_2), dtype = config.widths, model.xyz_regressor.weight.dtype
        self.conv_1x1 = nn.Conv2d(model.conv_1x1.in_channels, width_1, 1)
        self.cam_token_embed = nn.Embedding(1, width_1)
        self.joint_token_embed = nn.Embedding(self.num_joints, width_1)
        self.vertex_token_embed = nn.Embedding(self.num_vertices, width_1)
        self.transformer_1, self.transformer_2 = (
            PublishedTransformer(width, config.heads, feedforward, config.dropout, config.layers)
            for width, feedforward in zip(config.widths, config.feedforward, strict=True)
        )
        self.dim_reduce_enc_cam, self.dim_reduce_enc_img, self.dim_reduce_dec = (
            nn.Identity() if width_1 == width_2 else nn.Linear(width_1, width_2) for _ in range(3)
        )
        self.xyz_regressor, self.cam_predictor = nn.Linear(width_2, 3), nn.Linear(width_2, 3)
        # No buffer: it stays on the host when the network moves.
        self.attention_mask = ~model.token_attention.topology.mask().cpu()
        self._add_upsampling(model, dtype)
        self.to(dtype)

    def _add_upsampling(self, model: FastMETRO, dtype: torch.dtype) -> None:
        steps = check_steps(model.mesh.upsampling, self.num_vertices)
        for name in ("coarse2intermediate_upsample", "intermediate2fine_upsample", "coarse2fine_upsample"):
            ours = getattr(model, name)
            learned = isinstance(ours, LearnedUpsampling)
            setattr(self, name, nn.Linear(ours.in_features, ours.out_features) if learned else None)
        to_intermediate = to_fine = None
        if len(steps) == 2 and self.coarse2intermediate_upsample is None:
            to_intermediate, to_fine = steps[0], steps[1] @ steps[0]
        elif steps and self.intermediate2fine_upsample is None and self.coarse2fine_upsample is None:
            to_fine = steps[-1]
        self.register_buffer("to_intermediate", _sparse(to_intermediate, dtype), persistent=False)
        self.register_buffer("to_fine", _sparse(to_fine, dtype), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Recover meshes from images [B, 3, H, W], as :meth:`fastmetro.models.network.FastMETRO.forward`."""
        batch, device = images.shape[0], images.device
        camera = self.cam_token_embed.weight.unsqueeze(1).repeat(1, batch, 1)
        embedded = torch.cat([self.joint_token_embed.weight, self.vertex_token_embed.weight])
        mesh_tokens = embedded.unsqueeze(1).repeat(1, batch, 1)
        blocked = self.attention_mask.to(device)

        features = self.backbone(images)
        height, width = features.shape[2:]
        image_tokens = self.conv_1x1(features).flatten(2).permute(2, 0, 1)
        position_1 = sine_positions(batch, height, width, image_tokens.shape[2], device).to(image_tokens.dtype)
        reduced_width = self.xyz_regressor.in_features
        position_2 = sine_positions(batch, height, width, reduced_width, device).to(image_tokens.dtype)

        camera, image_tokens, mesh_tokens = self.transformer_1(image_tokens, camera, mesh_tokens, position_1, blocked)
        camera, image_tokens = self.dim_reduce_enc_cam(camera), self.dim_reduce_enc_img(image_tokens)
        mesh_tokens = self.dim_reduce_dec(mesh_tokens)
        camera, _, mesh_tokens = self.transformer_2(image_tokens, camera, mesh_tokens, position_2, blocked)

        coordinates = self.xyz_regressor(mesh_tokens.transpose(0, 1))
        out = {"pred_cam": self.cam_predictor(camera).view(batch, 3)}
        out["pred_3d_joints"] = coordinates[:, : self.num_joints]
        out["pred_3d_vertices_coarse"] = coordinates[:, self.num_joints :]
        self._upsample(out)
        return out

    def _upsample(self, out: dict[str, Tensor]) -> None:
        """Add the finer meshes to `out`."""
        vertices = out["pred_3d_vertices_coarse"]
        if self.coarse2intermediate_upsample is not None:
            vertices = self.coarse2intermediate_upsample(vertices.transpose(1, 2)).transpose(1, 2)
            out["pred_3d_vertices_intermediate"] = vertices
        elif self.to_intermediate is not None:
            # Neither paper nor code has this mesh on the way of the fixed matrix; ours returns it. It is added at the
            # least cost, one product for the whole batch, so that it does not weigh on what is compared.
            columns = vertices.transpose(0, 1).flatten(1)
            product = torch.sparse.mm(self.to_intermediate, columns)
            out["pred_3d_vertices_intermediate"] = product.unflatten(1, (-1, 3)).transpose(0, 1)
        learned = self.intermediate2fine_upsample or self.coarse2fine_upsample
        if learned is not None:
            out["pred_3d_vertices_fine"] = learned(vertices.transpose(1, 2)).transpose(1, 2)
        elif self.to_fine is not None:
            out["pred_3d_vertices_fine"] = torch.stack([torch.sparse.mm(self.to_fine, sample) for sample in vertices])
        else:
            out["pred_3d_vertices_fine"] = vertices


def sine_positions(
    batch: int, height: int, width: int, channels: int, device: torch.device, temperature: float = 10000.0
) -> Tensor:
    """DETR's sine encoding (Carion et al., ECCV 2020), computed for each sample as the published code does.

    Values as :func:`fastmetro.models.position_encoding.sine_position_encoding`; float32 [height * width, batch, C].
    """
    half = channels // 2
    grid = torch.ones((batch, height, width), dtype=torch.bool, device=device)
    rows, columns = (grid.cumsum(axis, dtype=torch.float32) for axis in (1, 2))
    rows = rows / (rows[:, -1:, :] + 1e-6) * (2 * math.pi)
    columns = columns / (columns[:, :, -1:] + 1e-6) * (2 * math.pi)
    channel = torch.arange(half, dtype=torch.float32, device=device)
    scale = temperature ** (2 * (channel // 2) / half)
    encoded = []
    for axis in (rows, columns):
        angles = axis[..., None] / scale
        encoded.append(torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=4).flatten(3))
    return torch.cat(encoded, dim=3).permute(0, 3, 1, 2).flatten(2).permute(2, 0, 1)


def _sparse(matrix: sp.csr_array | None, dtype: torch.dtype) -> Tensor | None:
    """A coalesced COO tensor, as the published sampler keeps its matrices."""
    if matrix is None:
        return None
    coo = matrix.tocoo()
    indices = torch.stack([torch.from_numpy(axis.astype("int64")) for axis in (coo.row, coo.col)])
    values = torch.from_numpy(coo.data).to(dtype)
    return torch.sparse_coo_tensor(indices, values, coo.shape, check_invariants=True).coalesce()


def published_network(model: FastMETRO) -> PublishedFastMETRO:
    """The published network with the weights of `model`, on its device, in its dtype and mode.

    Everything is copied: training one leaves the other alone.

    Raises:
        ValueError: see :class:`PublishedFastMETRO`.
    """
    network = PublishedFastMETRO(model)
    network.load_state_dict(model.state_dict(), strict=True)
    return network.to(model.xyz_regressor.weight.device).train(model.training)
