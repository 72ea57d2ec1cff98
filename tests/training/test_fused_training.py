"""`fastmetro train --fused`: the losses of an ordinary run, also when it is resumed; what torch.compile sees of it."""

from __future__ import annotations

import csv
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastmetro import create_model
from fastmetro.cli import main
from fastmetro.models.backbones import overlap
from fastmetro.models.backbones.half_weights import kept_weights
from fastmetro.models.backbones.norm import fuse_batch_norms
from fastmetro.models.checkpoints import read_state_dict
from fastmetro.models.transformer import Decoder, Encoder
from fastmetro.training.fused import fuse_backbone, fuse_transformer
from fastmetro.training.optimizer import ClippedAdamW

OPTIONS = ["--batch-size", "4", "--image-size", "32", "--eval-count", "0", "--steps", "4", "--log-every", "1",
           "--no-photographs", "--dropout", "0.1"]  # fmt: skip


def losses(folder: Path) -> list[float]:
    with (folder / "log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_a_run(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels' gradients and the optimizer's updates, and stopped and resumed by the same."""
    updates: list[float] = []
    update = ClippedAdamW.step_clipped
    stopped_at = 4 + 4 + 2  # the second step of the third fused run, as by Ctrl-C

    def counted(self: ClippedAdamW, max_norm: float) -> torch.Tensor:
        updates.append(max_norm)
        if len(updates) == stopped_at:
            signal.raise_signal(signal.SIGINT)
        return update(self, max_norm)

    monkeypatch.setattr(ClippedAdamW, "step_clipped", counted)
    common = ["train", *OPTIONS, "--device", device.type, "--output"]
    # Fused dropout draws other numbers: what is compared with the plain run has none. At a higher rate the loss jumps
    # to four in the third step, and with it what rounding makes of it.
    alike = ["--dropout", "0", "--learning-rate", "2e-5"]
    assert main([*common, str(tmp_path / "plain"), *alike]) == 0 and not updates
    assert main([*common, str(tmp_path / "same"), *alike, "--fused"]) == 0 and len(updates) == 4
    plain, same = losses(tmp_path / "plain"), losses(tmp_path / "same")
    assert len(same) == 4 and same == pytest.approx(plain, rel=0.005)
    assert main([*common, str(tmp_path / "fused"), "--fused"]) == 0 and len(updates) == 8
    fused = losses(tmp_path / "fused")
    parts = [*common, str(tmp_path / "parts"), "--fused"]
    assert main(parts) == 0 and len(losses(tmp_path / "parts")) == 2
    assert main([*parts, "--resume"]) == 0
    expected = fused if device.type == "cpu" else pytest.approx(fused, rel=1e-3)
    assert losses(tmp_path / "parts") == expected
    names = {name: read_state_dict(tmp_path / name / "weights.safetensors").keys() for name in ("plain", "fused")}
    assert names["plain"] == names["fused"]


def test_what_is_fused() -> None:
    model = create_model("fastmetro-compact")
    fuse_backbone(model, "bf16")
    convolutions = [layer for layer in model.backbone.modules() if isinstance(layer, nn.Conv2d)]
    assert len(kept_weights(model.parameters())) == len(convolutions)
    assert all(getattr(layer, overlap._OWN_STEM) and getattr(layer, overlap._OVERLAPPED) for layer in convolutions)
    fuse_transformer(model, "bf16")
    stages = [layer for layer in model.modules() if isinstance(layer, (Encoder, Decoder))]
    matrices = [one for stage in stages for name, one in stage.named_parameters() if one.dim() == 2]
    assert len(kept_weights(model.parameters())) == len(convolutions) + len(matrices)
    model = create_model("fastmetro-compact")
    fuse_backbone(model, "fp32")  # gradients in half precision would be wrong there
    fuse_transformer(model, "fp32")
    assert not kept_weights(model.parameters())


def test_torch_compile_leaves_the_backbone_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only where gradients come from a second stream: in evaluation all is one graph."""
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = create_model("fastmetro-compact").train()
    fuse_batch_norms(model)
    overlap.overlap_weight_gradients(model.backbone)
    called: list[int] = []
    convolution = overlap._Convolution.apply
    monkeypatch.setattr(overlap._Convolution, "apply", lambda *given: (called.append(1), convolution(*given))[1])
    images = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    out = torch.compile(model, backend=backend)(images)
    sum(value.sum() for value in out.values()).backward()
    own = [layer for layer in model.backbone.modules() if isinstance(layer, nn.Conv2d)]
    assert len(called) == len(own) and all(layer.weight.grad is not None for layer in own)
    assert sum("linear" in name for name in traced) > 10
    norms = sum("batch_norm" in name for name in traced)
    assert norms == 0
    torch._dynamo.reset()
    traced.clear()
    model.eval()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(images)
    assert sum("conv" in name for name in traced) >= len(own)
