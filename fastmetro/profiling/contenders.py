"""What is timed: the engine and the baselines of one case, all with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import fastmetro
from fastmetro.models import FastMETRO, create_model
from fastmetro.models.baselines import published_network, tuned_network
from fastmetro.models.checkpoints import weights_record
from fastmetro.profiling.latency import Call
from fastmetro.profiling.settings import FpsSettings

ENGINE = "engine"
Outputs = dict[str, Tensor]


@dataclass(eq=False)
class Contender:
    """Something that turns images into meshes.

    Attributes:
        name: "engine" or that of a baseline.
        description: what was done to it.
        run: normalised float32 images [B, 3, 224, 224] on the device -> the published keys.
        precision: "float32", "tf32", "float16" or "bfloat16".
        half_meshes: whether its upsampled meshes are in half precision, and so rounded.
        takes_pixels: whether `run` also takes uint8 [B, 224, 224, 3] and normalises them itself.
        parts: the parts that can be run alone; None where it has none.
    """

    name: str
    description: str
    run: Callable[[Tensor], Outputs]
    precision: str
    half_meshes: bool = False
    takes_pixels: bool = False
    parts: Callable[[], Mapping[str, Call]] | None = None

    @property
    def uses_tf32(self) -> bool:
        """Whether TF32 is allowed while it runs."""
        return self.precision == "tf32"


def build_model(settings: FpsSettings) -> tuple[FastMETRO, str]:
    """The network in float32 on the CPU in evaluation mode, and where its weights come from.

    Raises:
        ValueError: unknown names, or a checkpoint that does not fit.
        FileNotFoundError: there is no such checkpoint.
    """
    torch.manual_seed(0)
    if settings.checkpoint is None:
        model = _create(settings, settings.model or "fastmetro-s")
        settle_batch_norms(model.backbone)
        return model.eval(), "random"
    from fastmetro.inference.pretrained import SHIPPED, load_pretrained

    path = SHIPPED.get(settings.checkpoint, Path(settings.checkpoint))
    named = path.is_file() and "model" in weights_record(path)
    target = None if named and settings.model is None else _create(settings, settings.model or "fastmetro-s")
    return load_pretrained(settings.checkpoint, model=target), Path(settings.checkpoint).name


def _create(settings: FpsSettings, name: str) -> FastMETRO:
    return create_model(name, settings.backbone, settings.mesh, settings.upsampling)


@torch.no_grad()
def settle_batch_norms(backbone: nn.Module) -> None:
    """Give a random backbone batch norms as training leaves them: statistics of its features, and no zero gains.

    A fresh network's residual branches end in a gain of zero, which would hide whatever goes wrong in them, and
    without statistics the features of a deep one may leave the range of half precision.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.masked_fill_(norm.weight == 0, 0.5)
        norm.momentum = 1.0
    training = backbone.training
    noise = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    backbone.train()(noise.to(norms[0].weight.device))
    backbone.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def plain_model(model: FastMETRO, dtype: torch.dtype = torch.float32) -> FastMETRO:
    """A copy that runs on PyTorch's own operations alone."""
    plain = FastMETRO(replace(model.config, attention="dense"), copy.deepcopy(model.backbone), model.mesh)
    plain.load_state_dict(model.state_dict(), strict=True)
    return plain.to(model.xyz_regressor.weight.device, dtype).eval()


def build_contender(name: str, model: FastMETRO, batch: int, dtype: torch.dtype, compile_tuned: bool) -> Contender:
    """Build one of the contenders around a copy of `model`, on its device.

    Raises:
        ValueError: there is no such contender, or it cannot take this network.
    """
    precision = str(dtype).removeprefix("torch.")
    if name == ENGINE:
        return _engine(name, precision, model, batch, dtype, "auto")
    if name == "library":
        return _engine(name, f"{precision}, the library's convolutions", model, batch, dtype, "library")
    if name == "published":
        published = published_network(model).requires_grad_(False)
        on_gpu = model.xyz_regressor.weight.is_cuda
        return Contender(name, f"eager, float32{' with TF32' if on_gpu else ''}", published, "tf32")
    if name == "tuned":
        tuned = tuned_network(model, dtype, compile_tuned)
        return Contender(name, tuned.description, tuned, precision, half_meshes=dtype.itemsize < 4)
    if name == "plain":
        plain = plain_model(model, dtype).requires_grad_(False)
        return Contender(name, f"eager, {precision}", lambda images: plain(images.to(dtype)), precision)
    raise ValueError(f"contender must be 'engine', 'library', 'published', 'tuned' or 'plain', got {name!r}")


def _engine(
    name: str, description: str, model: FastMETRO, batch: int, dtype: torch.dtype, convolutions: str
) -> Contender:
    engine = fastmetro.compile(model, batch_size=batch, dtype=dtype, convolutions=convolutions)
    precision = str(dtype).removeprefix("torch.")
    return Contender(name, description, engine, precision, takes_pixels=True, parts=engine.parts)
