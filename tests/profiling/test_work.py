"""The work that the profile counts is what PyTorch's own counter finds in the plain network, less what is folded."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmetro.models import create_model
from fastmetro.profiling.contenders import plain_model
from fastmetro.profiling.work import part_work


@pytest.mark.parametrize(
    "variant", [("fastmetro-s", "resnet50", "fixed"), ("fastmetro-l", "hrnet-w64", "released")], ids=str
)
def test_flop_are_those_of_the_plain_network_less_the_folded(variant: tuple[str, str, str]) -> None:
    model = create_model(*variant[:2], upsampling=variant[2]).eval()
    tokens, (wide, narrow), layers = model.num_joints + model.num_vertices, model.config.widths, model.config.layers
    allowed = int(model.token_attention.topology.mask().sum())
    plain = plain_model(model).requires_grad_(False)
    # The counter knows attention as two products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.zeros(1, 3, 224, 224))
    work = part_work(model, 1, 2)
    # The plain decoder makes the prefix, and attends everywhere; the counter does not see sparse products.
    prefix = 2 * tokens * 5 * wide**2 + 4 * tokens**2 * wide
    masked = 4 * (tokens**2 - allowed) * ((layers - 1) * wide + layers * narrow)
    sparse = sum(
        2 * 3 * step.matrix.nnz
        for step in (model.coarse2intermediate_upsample, model.intermediate2fine_upsample, model.coarse2fine_upsample)
        if hasattr(step, "matrix")
    )
    camera = 2 * narrow * 3
    counted = counter.get_total_flops() - prefix - masked + sparse - camera
    ours = sum(work[name].flop for name in ("backbone", "encoder", "decoder", "upsampling"))
    assert ours == pytest.approx(counted, rel=1e-3)
    assert work["after the backbone"].flop == pytest.approx(ours - work["backbone"].flop)


def test_bytes_are_weights_and_what_goes_in_and_out() -> None:
    model = create_model("fastmetro-s", "resnet50").eval()
    one, two = part_work(model, 1, 2), part_work(model, 2, 2)
    weights = sum(parameter.numel() for parameter in model.backbone.parameters())
    features = 3 * 224 * 224 + 49 * 2048
    assert two["backbone"].bytes - one["backbone"].bytes == 2 * features
    # Two per batch norm become one bias; the classifier is not part of the trunk.
    assert one["backbone"].bytes - 2 * features == pytest.approx(2 * weights, rel=2e-3)
    assert one["encoder"].intensity < two["encoder"].intensity
    float_32 = part_work(model, 1, 4)
    assert float_32["decoder"].bytes == 2 * one["decoder"].bytes and float_32["decoder"].flop == one["decoder"].flop
