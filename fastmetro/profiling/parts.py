"""The time of backbone, encoder, decoder and upsampling, each alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmetro.models import FastMETRO
from fastmetro.profiling.latency import Call, milliseconds, synchronize

WHOLE = "after the backbone"
"""Name that an engine gives to all parts behind the backbone in one: there they may run beside each other, and take
less time than one after the other."""
_GRAPH_CALLS = 20
_REPEATS = 15


def plain_parts(model: FastMETRO, images: Tensor) -> dict[str, Call]:
    """Calls that run one part of a network each, on what the other parts made of `images`.

    "backbone" is the convolutional trunk; "encoder" the 1 x 1 convolution and the encoders of both stages with the
    reductions between them; "decoder" the same of the decoders; "upsampling" the two regressors and the way from the
    coarse to the fine mesh.

    Args:
        model: in evaluation mode.
        images: [B, 3, 224, 224] in the model's dtype and on its device.
    """
    first, second = model.transformer_1, model.transformer_2
    position_1, position_2 = (model.get_buffer(f"position_{stage}") for stage in (1, 2))
    attend = model.token_attention
    batch, joints = images.shape[0], model.num_joints
    mesh_tokens = torch.cat([model.joint_token_embed.weight, model.vertex_token_embed.weight]).unsqueeze(0)

    def encode(features: Tensor) -> tuple[Tensor, Tensor]:
        camera = model.cam_token_embed.weight.expand(batch, 1, -1)
        tokens = torch.cat([camera, model.conv_1x1(features).flatten(2).transpose(1, 2)], dim=1)
        once = first.encoder(tokens, F.pad(position_1, (0, 0, 1, 0)))
        reduced = [model.dim_reduce_enc_cam(once[:, :1]), model.dim_reduce_enc_img(once[:, 1:])]
        return once, second.encoder(torch.cat(reduced, dim=1), F.pad(position_2, (0, 0, 1, 0)))

    def decode(once: Tensor, twice: Tensor) -> Tensor:
        tokens = first.decoder(mesh_tokens, once[:, 1:], position_1, attend)
        return second.decoder(model.dim_reduce_dec(tokens), twice[:, 1:], position_2, attend)

    def upsample(camera: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        precise = torch.promote_types(torch.float32, tokens.dtype)  # as the network does
        regress = (
            F.linear(x.to(precise), layer.weight.to(precise), layer.bias.to(precise))
            for layer, x in ((model.cam_predictor, camera), (model.xyz_regressor, tokens))
        )
        out = {"pred_cam": next(regress)}
        out["pred_3d_joints"], coarse = next(regress).split([joints, model.num_vertices], dim=1)
        out["pred_3d_vertices_coarse"] = finer = coarse
        if model.coarse2intermediate_upsample is not None:
            finer = out["pred_3d_vertices_intermediate"] = model.coarse2intermediate_upsample(coarse)
        if model.coarse2fine_upsample is not None:
            out["pred_3d_vertices_fine"] = model.coarse2fine_upsample(coarse)
        elif model.intermediate2fine_upsample is not None:
            out["pred_3d_vertices_fine"] = model.intermediate2fine_upsample(finer)
        return out

    features = model.backbone(images)
    once, twice = encode(features)
    decoded = decode(once, twice)
    return {
        "backbone": lambda: model.backbone(images),
        "encoder": lambda: encode(features),
        "decoder": lambda: decode(once, twice),
        "upsampling": lambda: upsample(twice[:, 0], decoded),
    }


def part_times(parts: Mapping[str, Call], device: torch.device) -> dict[str, float]:
    """Milliseconds of each part: on a GPU device time inside a CUDA graph of many calls, elsewhere wall time.

    A part that cannot be captured into a graph, because it launches one of its own or copies to the host, is called in
    a loop instead, which counts what its launches cost; its name then ends in " (loop)".
    """
    times: dict[str, float] = {}
    for name, call in parts.items():
        for _ in range(3):
            call()
        if device.type != "cuda":
            times[name] = statistics.median(milliseconds(call, device) for _ in range(_REPEATS))
        elif (graph := _capture(call, device)) is not None:
            times[name] = _device_time(graph.replay, device) / _GRAPH_CALLS
        else:
            times[f"{name} (loop)"] = _device_time(lambda call=call: _repeat(call), device) / _GRAPH_CALLS  # type: ignore[misc]
    return times


def _repeat(call: Call) -> None:
    for _ in range(_GRAPH_CALLS):
        call()


def _capture(call: Call, device: torch.device) -> torch.cuda.CUDAGraph | None:
    """A graph of several calls, or None where the call cannot be captured."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            _repeat(call)
    except RuntimeError:
        synchronize(device)
        return None
    return graph


def _device_time(call: Call, device: torch.device) -> float:
    """Median milliseconds between events around a call."""
    times = []
    with torch.cuda.device(device):
        for _ in range(_REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            call()  # so that submitting the timed one does not count
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times)
