"""What only the Triton backend has: shares of hub rows and columns, which small inputs do not reach."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    RUNNERS,
    Result,
    Runner,
    assert_within_budget,
    graphs,
    keep_mask,
    measured,
    oracle,
    oracle_forward,
    plain,
    random_inputs,
    topology_of,
)
from torch import Tensor

from fastmetro_kernels.attention import topology_attention

TRITON_RUNNERS = [r for r in RUNNERS if r.backend == "triton"]


def results(runner: Runner, name: str, **options: object) -> tuple[Result, list[Tensor], list[Tensor]]:
    """(out, lse, dq, dk, dv) of the backend, the inputs, and the cotangents."""
    graph = graphs()[name]
    inputs = random_inputs(runner, 1, len(graph.mask), 2, 16)
    generator = torch.Generator().manual_seed(5)
    grad_out = torch.randn(inputs[0].shape, generator=generator).to(inputs[0])
    grad_lse = torch.randn(1, 2, len(graph.mask), generator=generator).to(runner.device)
    topology = topology_of(graph, runner.device)
    out, lse = topology_attention(*inputs, topology, return_lse=True, backend="triton", **options)
    return measured(out, lse, inputs, grad_out, grad_lse), inputs, [grad_out, grad_lse]


@pytest.mark.skipif(not TRITON_RUNNERS, reason="Triton does not run here")
@pytest.mark.parametrize("name", ["17_hubs", "mesh"])
@pytest.mark.parametrize("runner", TRITON_RUNNERS, ids=str)
def test_hub_work_split_into_shares(runner: Runner, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of 16 tokens, the last one incomplete, keep the accuracy, and one share of all is another code path."""
    from fastmetro_kernels.attention import triton as backend

    mask = graphs()[name].mask
    whole, inputs, cotangents = results(runner, name)
    monkeypatch.setattr(backend, "SPLIT_TOKENS", 16)
    split, _, _ = results(runner, name)
    assert_within_budget(split, oracle(inputs, mask, *cotangents), plain(inputs, mask, *cotangents))
    hubs = graphs()[name].num_hubs
    assert torch.equal(split.out[:, hubs:], whole.out[:, hubs:]), "vertex rows are not split"
    assert not torch.equal(split.lse[:, :, :hubs], whole.lse[:, :, :hubs]) or not torch.equal(split.dk, whole.dk)


@pytest.mark.skipif(not TRITON_RUNNERS, reason="Triton does not run here")
@pytest.mark.parametrize("runner", TRITON_RUNNERS, ids=str)
def test_dropout_of_shares_and_their_largest_number(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """With at most two shares allowed, 38 tokens make shares of 32; dropout bits do not depend on the share."""
    from fastmetro_kernels.attention import triton as backend

    monkeypatch.setattr(backend, "SPLIT_TOKENS", 16)
    monkeypatch.setattr(backend, "MAX_SPLITS", 2)
    p, mask = 0.4, graphs()["mesh"].mask
    result, inputs, cotangents = results(runner, "mesh", dropout_p=p, seed=77)
    keep = keep_mask(77, 1, 2, len(mask), p)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    dense, dense_lse, _ = oracle_forward(*leaves, mask.to(runner.device), 0.25, keep.to(runner.device), p)
    baseline = measured(dense, dense_lse.float(), leaves, *cotangents)
    assert_within_budget(result, oracle(inputs, mask, *cotangents, keep, p), baseline)
