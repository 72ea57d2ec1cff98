"""Everything behind the backbone, folded: both transformer stages, the heads and the upsampling."""

from __future__ import annotations

import copy

import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmetro.inference.engine.folding import (
    Affine,
    affine,
    fold_memory_projection,
    fold_norm_affine,
    fold_prefix,
    join,
    linear,
)
from fastmetro.inference.engine.layers import Folded, FoldedDecoderLayer, FoldedEncoderLayer
from fastmetro.inference.engine.products import Tokens, joined, read, update
from fastmetro.inference.engine.streams import ParallelStreams
from fastmetro.models.network import FastMETRO
from fastmetro.models.transformer import DecoderLayer, EncoderLayer, Transformer
from fastmetro.models.upsampling import FixedUpsampling


class FoldedStage(Folded):
    """One stage. What reads the encoder's tokens (`read`) is one product for all its readers.

    Args:
        model: the network.
        stage: 1 or 2.
    """

    def __init__(self, model: FastMETRO, stage: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        config = model.config
        self.stage = stage
        self.encoder = nn.ModuleList(FoldedEncoderLayer(dtype, device, config.heads) for _ in range(config.layers))
        self.decoder = nn.ModuleList(FoldedDecoderLayer(dtype, device, config.heads) for _ in range(config.layers))
        self.width = config.widths[stage - 1]

    def fold(self, model: FastMETRO, further: list[Affine]) -> None:
        """Take the constants; `further`: layers that read the normalised image tokens beside the cross-attention."""
        source: Transformer = getattr(model, f"transformer_{self.stage}")
        position: Tensor = model.get_buffer(f"position_{self.stage}")
        padded = F.pad(position, (0, 0, 1, 0))  # the camera token has no position
        self.encoder_epsilon, self.decoder_epsilon = source.encoder.norm.eps, source.decoder.norm.eps
        for folded, layer in zip(self.encoder, source.encoder.layers, strict=True):
            assert isinstance(folded, FoldedEncoderLayer) and isinstance(layer, EncoderLayer)
            folded.fold(layer, padded)
        for number, (folded, layer) in enumerate(zip(self.decoder, source.decoder.layers, strict=True)):
            assert isinstance(folded, FoldedDecoderLayer) and isinstance(layer, DecoderLayer)
            if self.stage == 1 and number == 0:
                folded.fold_cross(layer)
            else:
                folded.fold(layer)
        memory = fold_memory_projection(source.decoder, source.encoder.norm, position)
        shared = [Affine(one.weight, one.bias.expand(len(position), -1)) for one in further]
        self.put_affine("read", join([memory, *shared]), behind_norm=True)

    def encode(self, tokens: Tokens) -> Tokens:
        """Camera and image tokens -> the same, in front of the last norm, which is with their readers."""
        for layer in self.encoder:
            tokens = layer(tokens)
        return tokens

    def read(self, encoded: Tokens) -> Tensor:
        """[B, S, layers * 2 C + further]: keys and values for every decoder layer, and what else reads the tokens."""
        return read(encoded.part(slice(1, None)), self.affine("read"), self.encoder_epsilon)

    def memory(self, read: Tensor, layer: int) -> Tensor:
        """Keys and values [B, S, 2 C] of a decoder layer."""
        return read[..., 2 * self.width * layer : 2 * self.width * (layer + 1)]


class FoldedTransformers(Folded):
    """From the backbone's features to camera, joints and vertices; what ``FastMETRO.forward`` does behind it.

    Args:
        model: the network, whose parameters are copied; it stays as it is.
        dtype: of weights and activations; the heads and the upsampling are float32, as in the network.
        device: of the weights.
    """

    def __init__(self, model: FastMETRO, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self.config = model.config
        self.num_joints, self.num_vertices = model.num_joints, model.num_vertices
        self.heads_dtype = torch.promote_types(torch.float32, dtype)
        self.stage_1 = FoldedStage(model, 1, dtype, device)
        self.stage_2 = FoldedStage(model, 2, dtype, device)
        self.attend = copy.deepcopy(model.token_attention).to(device)
        self.to_intermediate = _moved(model.coarse2intermediate_upsample, device, self.heads_dtype)
        self.to_fine = _moved(model.intermediate2fine_upsample, device, self.heads_dtype)
        self.direct = _moved(model.coarse2fine_upsample, device, self.heads_dtype)
        self.to_both = _stacked(model.coarse2intermediate_upsample, model.coarse2fine_upsample, device)
        self.num_intermediate = 0 if self.to_both is None else model.mesh.upsampling[0].shape[0]
        self.streams = ParallelStreams()
        self.fold(model)

    @torch.no_grad()
    def fold(self, model: FastMETRO) -> None:
        """Take all constants from the parameters of `model`; again: over those that are there."""
        bias = model.conv_1x1.bias
        assert bias is not None
        self.put_affine("embed", affine(model.conv_1x1.weight.flatten(1), bias))
        self.put("camera_token", model.cam_token_embed.weight.detach().double().unsqueeze(0))
        encoder_norm, decoder_norm = model.transformer_1.encoder.norm, model.transformer_1.decoder.norm
        image, camera, mesh = (
            fold_norm_affine(norm, _reduction(layer, model.config.widths[0]))
            for norm, layer in (
                (encoder_norm, model.dim_reduce_enc_img),
                (encoder_norm, model.dim_reduce_enc_cam),
                (decoder_norm, model.dim_reduce_dec),
            )
        )
        self.stage_1.fold(model, [image])
        self.stage_2.fold(model, [])
        self.put_affine("reduce_camera", camera, behind_norm=True)
        self.put_affine("reduce_mesh", mesh, behind_norm=True)
        learned = torch.cat([model.joint_token_embed.weight, model.vertex_token_embed.weight])
        first = model.transformer_1.decoder.layers[0]
        assert isinstance(first, DecoderLayer)
        prefix = fold_prefix(first, learned, self.attend)
        self.put("prefix_tokens", prefix.tokens.unsqueeze(0))
        self.put("prefix_query", prefix.query.unsqueeze(0))
        xyz = fold_norm_affine(model.transformer_2.decoder.norm, linear(model.xyz_regressor))
        self.put_affine("xyz", xyz, self.heads_dtype, behind_norm=True)
        predictor = fold_norm_affine(model.transformer_2.encoder.norm, linear(model.cam_predictor))
        self.put_affine("camera", predictor, self.heads_dtype, behind_norm=True)
        for name in ("to_intermediate", "to_fine", "direct"):
            _refresh(getattr(self, name), getattr(model, _UPSAMPLINGS[name]))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Backbone features [B, C, h, w] -> outputs as of ``FastMETRO.forward``, without the SMPL head's."""
        encoded, memory = self.encode_first(features)
        # The second encoder needs nothing of the first decoder.
        tokens, (camera, memory_2) = self.streams.run(
            features.device, [lambda: self.decode_first(memory), lambda: self.encode_again(encoded, memory)]
        )
        return {"pred_cam": camera} | self.place(self.decode_second(tokens, memory_2))

    def encode_first(self, features: Tensor) -> tuple[Tokens, Tensor]:
        """Camera and image tokens of the first stage's encoder, and what reads them."""
        camera = self.get_buffer("camera_token").expand(len(features), -1, -1)
        tokens = update(features.flatten(2).transpose(1, 2), self.affine("embed"), leading=camera)
        encoded = self.stage_1.encode(tokens)
        return encoded, self.stage_1.read(encoded)

    def encode_again(self, encoded: Tokens, first_read: Tensor) -> tuple[Tensor, Tensor]:
        """Camera parameters, and what reads the image tokens, of the second stage's encoder."""
        camera = read(encoded.part(slice(1)), self.affine("reduce_camera"), self.stage_1.encoder_epsilon)
        tokens = Tokens(joined(camera, first_read[..., -self.stage_2.width :]))
        encoded = self.stage_2.encode(tokens)
        predicted = read(encoded.part(slice(1)), self.affine("camera"), self.stage_2.encoder_epsilon)
        return predicted[:, 0], self.stage_2.read(encoded)

    def decode_first(self, memory: Tensor) -> Tokens:
        """Mesh tokens behind the decoder of stage 1, reduced to the width of stage 2; of what `encode_first` read."""
        stage = self.stage_1
        first = stage.decoder[0]
        assert isinstance(first, FoldedDecoderLayer)
        constant = Tokens(self.get_buffer("prefix_tokens"), constant=True)
        tokens = first.cross(constant, self.get_buffer("prefix_query"), stage.memory(memory, 0))
        for number, layer in enumerate(list(stage.decoder)[1:], start=1):
            tokens = layer(tokens, stage.memory(memory, number), self.attend)
        return Tokens(read(tokens, self.affine("reduce_mesh"), stage.decoder_epsilon))

    def decode_second(self, tokens: Tokens, memory: Tensor) -> Tokens:
        """Mesh tokens behind the decoder of stage 2, not yet normalised."""
        for number, layer in enumerate(self.stage_2.decoder):
            tokens = layer(tokens, self.stage_2.memory(memory, number), self.attend)
        return tokens

    def place(self, tokens: Tokens) -> dict[str, Tensor]:
        """Coordinates of joints and of vertices at all levels, in float32."""
        coordinates = read(tokens, self.affine("xyz"), self.stage_2.decoder_epsilon)
        coarse = coordinates[:, self.num_joints :]
        out = {"pred_3d_joints": coordinates[:, : self.num_joints], "pred_3d_vertices_coarse": coarse}
        if self.to_both is not None and len(coarse) == 1:  # of more images the parts would not be in one piece
            both = self.to_both(coarse)
            out["pred_3d_vertices_intermediate"] = both[:, : self.num_intermediate]
            out["pred_3d_vertices_fine"] = both[:, self.num_intermediate :]
            return out
        if self.to_intermediate is not None:
            out["pred_3d_vertices_intermediate"] = self.to_intermediate(coarse)
        if self.direct is not None:
            out["pred_3d_vertices_fine"] = self.direct(coarse)
        elif self.to_fine is not None:
            out["pred_3d_vertices_fine"] = self.to_fine(out["pred_3d_vertices_intermediate"])
        return out


_UPSAMPLINGS = {
    "to_intermediate": "coarse2intermediate_upsample",
    "to_fine": "intermediate2fine_upsample",
    "direct": "coarse2fine_upsample",
}


def _moved(module: nn.Module | None, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    return None if module is None else copy.deepcopy(module).to(device=device, dtype=dtype).requires_grad_(False)


def _stacked(first: nn.Module | None, second: nn.Module | None, device: torch.device) -> FixedUpsampling | None:
    """Both in one product: a launch less, where the two do not wait for one another. None where they are not fixed."""
    if not (isinstance(first, FixedUpsampling) and isinstance(second, FixedUpsampling)):
        return None
    rows = scipy.sparse.vstack([first.matrix.to_scipy(), second.matrix.to_scipy()], format="csr")
    return FixedUpsampling(rows, first.backend).to(device)


def _refresh(module: nn.Module | None, source: nn.Module | None) -> None:
    if module is not None and source is not None:
        module.load_state_dict(source.state_dict())


def _reduction(layer: nn.Module, width: int) -> Affine:
    """The linear layer between the stages; where widths are equal there is none, which is the identity."""
    if isinstance(layer, nn.Linear):
        return linear(layer)
    return Affine(torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
