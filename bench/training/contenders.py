"""Ways to make a training step. All minimise the same losses with AdamW and clip at 0.3; weights start equal.

published   the published network eager in float32 with TF32, channels first, AdamW as PyTorch has it by default, and
            five values read back in every step, as the published loop does.
compiled    the strongest plain PyTorch: this network on PyTorch's own operations (SDPA under an additive mask in
            bfloat16, dense upsampling), torch.compile of it and of the losses, channels_last, bfloat16 autocast, fused
            AdamW, and the whole step in one CUDA graph. "compiled, boolean mask" is the same with the mask as it is.
ours        this network with the kernels of this project, the same around it: torch.compile and one CUDA graph.
ours, not compiled    without torch.compile.
ours, fused norms     with `fastmetro_kernels.batch_norm` in the backbone; also "not compiled".
ours, two streams     and with the gradients of the backbone's weights on a second stream; the backbone is not compiled.
ours, all             and with the weights of the backbone and of the transformers' layers in bfloat16 beside the
                      float32 ones, AdamW with clipping in three launches, and in the transformers
                      `fastmetro_kernels.residual_norm` and `relu_dropout`, with biases; also "not compiled".
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from fastmetro.data.labels import MeshLabels
from fastmetro.models import FastMETRO
from fastmetro.models.backbones.norm import fuse_batch_norms
from fastmetro.models.backbones.overlap import overlap_weight_gradients
from fastmetro.models.baselines import published_network
from fastmetro.models.baselines.tuned import DenseTokenAttention, DenseUpsampling
from fastmetro.models.upsampling import FixedUpsampling, check_steps
from fastmetro.training.fused import fuse_backbone, fuse_transformer
from fastmetro.training.losses import MeshRecoveryLoss
from fastmetro.training.objective import Objective
from fastmetro.training.schedule import make_optimizer
from fastmetro.training.step import CapturedStep, TrainingStep

CLIP, RATE = 0.3, 1e-4
OURS = "ours"


@dataclass(frozen=True)
class Contender:
    """Attributes: name; run, one step, returns the loss and more as a tensor; tf32, whether TF32 is allowed."""

    name: str
    run: Callable[[], Tensor]
    tf32: bool


def build(name: str, model: FastMETRO, images: Tensor, labels: MeshLabels, eager: bool = False) -> Contender:
    """A contender around a copy of the model, on its device; with `eager` neither compiled nor captured.

    Raises:
        ValueError: there is no such contender.
    """
    if name == "published":
        return Contender(name, _published(model, images, labels), tf32=True)
    two_streams = functools.partial(_two_streams, model)
    networks: dict[str, tuple[Callable[[], FastMETRO], bool]] = {
        OURS: (lambda: copy.deepcopy(model), True),
        "ours, not compiled": (lambda: copy.deepcopy(model), False),
        "ours, fused norms": (functools.partial(_fused, model), True),
        "ours, fused norms, not compiled": (functools.partial(_fused, model), False),
        "ours, two streams": (two_streams, True),
        "ours, two streams, not compiled": (two_streams, False),
        "ours, all": (lambda: copy.deepcopy(model), True),
        "ours, all, not compiled": (lambda: copy.deepcopy(model), False),
        "compiled": (functools.partial(_plain, model, "bias"), True),
        "compiled, boolean mask": (functools.partial(_plain, model, "bool"), True),
    }
    if name not in networks:
        raise ValueError(f"contender must be 'published' or one of {list(networks)}, got {name!r}")
    make, compiled = networks[name]
    step = _tuned_step(name, make(), model, images, labels, compiled and not eager, images.is_cuda and not eager)
    return Contender(name, step, tf32=False)


NAMES = (
    "published", "compiled", "compiled, boolean mask", "ours, not compiled", "ours, fused norms",
    "ours, fused norms, not compiled", "ours, two streams", "ours, two streams, not compiled", "ours, all",
    "ours, all, not compiled", OURS,
)  # fmt: skip


def _objective(model: FastMETRO, device: torch.device, plain: bool = False) -> Objective:
    """The losses; `plain`: the joints of the mesh by one dense product for the batch instead of a sparse one."""
    objective = Objective(MeshRecoveryLoss(model.mesh)).to(device)
    regression, regressor = objective.meshes.regression, model.mesh.joint_regressor
    assert not regression.centred and regressor is not None
    if plain:
        regression.product = DenseUpsampling(regressor, torch.float32, device)
    return objective


def _published(model: FastMETRO, images: Tensor, labels: MeshLabels) -> Callable[[], Tensor]:
    network = published_network(model)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-4)
    objective = _objective(model, images.device, plain=True)
    step = TrainingStep(network, network, objective, optimizer, clip=CLIP, precision="fp32")
    ordinary = images.contiguous()

    def run() -> Tensor:
        values = step(ordinary, labels)
        for value in values[:5]:
            value.item()
        return values

    return run


def _fused(model: FastMETRO) -> FastMETRO:
    """With the batch norms of its backbone fused with what stands behind them."""
    fused = copy.deepcopy(model)
    fuse_batch_norms(fused)
    return fused


def _two_streams(model: FastMETRO) -> FastMETRO:
    """The same, and the gradients of the backbone's weights on a second stream, which torch.compile cannot trace."""
    network = _fused(model)
    overlap_weight_gradients(network.backbone)
    return network


def _plain(model: FastMETRO, mask: str) -> FastMETRO:
    """The network on PyTorch's own operations."""
    plain = FastMETRO(replace(model.config, attention="dense"), copy.deepcopy(model.backbone), model.mesh)
    plain.load_state_dict(model.state_dict(), strict=True)
    device = model.xyz_regressor.weight.device
    plain.to(device)
    attention: Any = DenseTokenAttention(plain.token_attention, mask, torch.bfloat16)
    plain.token_attention = attention
    steps = check_steps(model.mesh.upsampling, plain.num_vertices)
    matrices = {"coarse2intermediate_upsample": steps[0], "coarse2fine_upsample": steps[-1] @ steps[0]} if steps else {}
    for name, matrix in matrices.items():
        if isinstance(getattr(plain, name), FixedUpsampling):
            setattr(plain, name, DenseUpsampling(matrix, torch.float32, device))
    return plain.train()


def _tuned_step(
    name: str, network: FastMETRO, model: FastMETRO, images: Tensor, labels: MeshLabels, compiled: bool, captured: bool
) -> Callable[[], Tensor]:
    own, plain = name.startswith("ours, all"), name.startswith("compiled")
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if own:
        fuse_backbone(network, "bf16")
        fuse_transformer(network, "bf16")
    optimizer = make_optimizer(network, RATE, 1e-4, capturable=captured, fused="project" if own else "torch")
    run, objective = network, _objective(model, images.device, plain)
    if compiled:
        run, objective = torch.compile(network), cast(Objective, torch.compile(objective))
    step: Callable[[Tensor, MeshLabels], Tensor]
    step = training = TrainingStep(network, run, objective, optimizer, clip=CLIP, precision="bf16")
    if captured:
        step = CapturedStep(training, images, labels)
    return functools.partial(step, images, labels)
