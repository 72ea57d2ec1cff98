"""What only the Triton backend has: tiles of every size, and shares of hub rows and columns."""

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
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastmetro_kernels.attention import topology_attention
from fastmetro_kernels.attention.configs import (
    MAX_SPLITS,
    PASSES,
    WHOLE,
    Config,
    TritonConfig,
    hub_split,
    pinned,
    problem,
)
from fastmetro_kernels.schedule import WINDOW_SIZES

TRITON_RUNNERS = [r for r in RUNNERS if r.backend == "triton"]


def results(runner: Runner, name: str, batch: int = 1, **options: object) -> tuple[Result, list[Tensor], list[Tensor]]:
    """(out, lse, dq, dk, dv) of the backend, the inputs, and the cotangents."""
    graph = graphs()[name]
    inputs = random_inputs(runner, batch, len(graph.mask), 2, 16)
    generator = torch.Generator().manual_seed(5)
    grad_out = torch.randn(inputs[0].shape, generator=generator).to(inputs[0])
    grad_lse = torch.randn(batch, 2, len(graph.mask), generator=generator).to(runner.device)
    topology = topology_of(graph, runner.device)
    out, lse = topology_attention(*inputs, topology, return_lse=True, backend="triton", **options)
    return measured(out, lse, inputs, grad_out, grad_lse), inputs, [grad_out, grad_lse]


triton_runner = pytest.mark.parametrize("runner", TRITON_RUNNERS, ids=str)
needs_triton = pytest.mark.skipif(not TRITON_RUNNERS, reason="Triton does not run here")


def configured(monkeypatch: pytest.MonkeyPatch, forward: TritonConfig, backward: TritonConfig) -> None:
    """These configurations in place of the pinned and the measured ones."""
    from fastmetro_kernels.attention import dispatch
    from fastmetro_kernels.attention import triton as backend

    chosen = {"forward": forward, "backward": backward}
    monkeypatch.setattr(dispatch.choice, "ranking", lambda *question: ())
    monkeypatch.setattr(backend, "pinned", lambda pass_name, element_size, dim: chosen[pass_name])


def same_tiles(rows: int, keys: int, share: int = 0) -> tuple[TritonConfig, TritonConfig]:
    """Forward and backward with equal tiles in all kernels."""
    tile = Config(rows, keys, 4, 1)
    return TritonConfig((tile,), share=share), TritonConfig((tile, tile), share=share)


@needs_triton
@pytest.mark.parametrize("name", ["17_hubs", "mesh"])
@triton_runner
def test_hub_work_split_into_shares(runner: Runner, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of 16 tokens, the last one incomplete, keep the accuracy, and one share of all is another code path."""
    mask = graphs()[name].mask
    configured(monkeypatch, *same_tiles(16, 16, share=WHOLE))
    whole, inputs, cotangents = results(runner, name)
    configured(monkeypatch, *same_tiles(16, 16, share=16))
    split, _, _ = results(runner, name)
    assert_within_budget(split, oracle(inputs, mask, *cotangents), plain(inputs, mask, *cotangents))
    hubs = graphs()[name].num_hubs
    assert torch.equal(split.out[:, hubs:], whole.out[:, hubs:]), "vertex rows are not split"
    assert not torch.equal(split.lse[:, :, :hubs], whole.lse[:, :, :hubs]) or not torch.equal(split.dk, whole.dk)


def check_dropout(runner: Runner, name: str) -> None:
    """Outputs and gradients with dropout are those of the published rule."""
    p, mask = 0.4, graphs()[name].mask
    result, inputs, cotangents = results(runner, name, dropout_p=p, seed=77)
    keep = keep_mask(77, 1, 2, len(mask), p)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    dense, dense_lse, _ = oracle_forward(*leaves, mask.to(runner.device), 0.25, keep.to(runner.device), p)
    baseline = measured(dense, dense_lse.float(), leaves, *cotangents)
    assert_within_budget(result, oracle(inputs, mask, *cotangents, keep, p), baseline)


@needs_triton
@triton_runner
def test_dropout_of_shares(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """38 tokens make shares of 32; dropout bits do not depend on the share."""
    configured(monkeypatch, *same_tiles(16, 16, share=32))
    check_dropout(runner, "mesh")


TILES = [(rows, keys) for rows in WINDOW_SIZES for keys in (16, 32, 64, 128)]


@needs_triton
@pytest.mark.parametrize(("rows", "keys"), TILES)
@triton_runner
def test_every_tile(runner: Runner, rows: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of every size with lists shorter and longer than a tile, more hubs than 16, and hubs that are split."""
    names = ["asymmetric", "17_hubs", "one_long_row", "isolated_without_hubs", "nothing_allowed"]
    if runner.interpreted and runner.dtype != torch.float32:
        names = ["asymmetric"]
    for name in names:
        mask = graphs()[name].mask
        configured(monkeypatch, *same_tiles(rows, keys))
        result, inputs, cotangents = results(runner, name)
        assert_within_budget(result, oracle(inputs, mask, *cotangents), plain(inputs, mask, *cotangents))
    if not runner.interpreted or runner.dtype == torch.float32:
        check_dropout(runner, "asymmetric")


@needs_triton
@triton_runner
def test_kernels_with_tiles_of_their_own(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes over rows and over columns may have windows of different size, also where the mask is asymmetric."""
    mask = graphs()["asymmetric"].mask
    for tile, t_tile in ((Config(64, 32, 4, 1), Config(16, 16, 4, 1)), (Config(32, 16, 4, 1), Config(64, 64, 4, 1))):
        configured(monkeypatch, TritonConfig((tile,)), TritonConfig((tile, t_tile)))
        result, inputs, cotangents = results(runner, "asymmetric")
        assert_within_budget(result, oracle(inputs, mask, *cotangents), plain(inputs, mask, *cotangents))


@needs_triton
@triton_runner
def test_programs_in_either_order(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether programs run over the batch first or over the mesh first changes no bit of the windows' rows."""
    from fastmetro_kernels.attention import triton as backend

    found = []
    for long_first in (False, True):
        monkeypatch.setattr(backend, "slots_first", lambda *sizes, answer=long_first: answer)
        found.append(results(runner, "mesh", batch=2)[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@needs_triton
@triton_runner
def test_impossible_configurations_are_named(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    good, backward = same_tiles(16, 16)
    for tile, message in (
        (Config(48, 16, 4, 1), "rows must be one of 16, 32, 64"),
        (Config(16, 48, 4, 1), "keys must"),
    ):
        configured(monkeypatch, TritonConfig((tile,)), backward)
        with pytest.raises((ValueError, RuntimeError), match=message):
            results(runner, "mesh")
    configured(monkeypatch, good._replace(precision="tf32"), backward)
    with pytest.raises(RuntimeError, match="precision must be one of ieee, tf32x3"):
        results(runner, "mesh")


def test_hub_split_is_fine_for_few_programs_and_coarse_for_many() -> None:
    """431 vertices: at batch 1 a share is one tile; at batch 32 hubs are not split. 6,890: between the two."""
    assert hub_split(8, 445, 14, 7, 128, True, 0) == (4, 128)
    assert hub_split(256, 445, 14, 7, 128, True, 0) == (1, 512)
    splits, share = hub_split(256, 6904, 14, 108, 128, False, 0)
    assert 1 < splits < 54 and splits * share >= 6904 > (splits - 1) * share


@given(
    batch_heads=st.integers(1, 10**6),
    tokens=st.integers(1, 10**6),
    hubs=st.integers(0, 64),
    keys=st.sampled_from([16, 64, 128]),
    long_first=st.booleans(),
    share=st.sampled_from([0, 1, 100, WHOLE]),
)
def test_shares_cover_all_tokens_once(
    batch_heads: int, tokens: int, hubs: int, keys: int, long_first: bool, share: int
) -> None:
    splits, length = hub_split(batch_heads, tokens, hubs, -(-tokens // 16), keys, long_first, share)
    assert 1 <= splits <= MAX_SPLITS and length % keys == 0
    assert (splits - 1) * length < tokens <= splits * length


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("pass_name", PASSES)
def test_pinned_configurations_are_possible(pass_name: str, element_size: int) -> None:
    for dim in range(8, 129):
        assert problem(pinned(pass_name, element_size, dim), pass_name) is None
