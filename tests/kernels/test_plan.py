"""The plan of the CUDA kernels, replayed step by step: rows are where the lists say, and the pattern is the mask."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from attention_cases import grid_faces, random_mask

from fastmetro_kernels import TokenTopology
from fastmetro_kernels.plan import (
    BACKWARD,
    FORWARD,
    FORWARD_NARROW,
    MAX_RESIDENT,
    MAX_SLOTS,
    Plan,
    Shape,
    build_plan,
    resident_shape,
)

MASKS = {
    "mesh": TokenTopology.from_faces(grid_faces(17, 19), num_hubs=14).mask(),
    "no_hubs": random_mask(120, 0, 0.03, True, True, 1),
    "asymmetric": random_mask(100, 20, 0.02, False, False, 2),
    "long_lists": random_mask(70, 5, 0.4, True, True, 3),
    "hubs_only": torch.ones(6, 6, dtype=torch.bool),
}


def _topology(name: str) -> TokenTopology:
    return TokenTopology.from_mask(MASKS[name])


SHAPES = {
    "forward": FORWARD,
    "forward_narrow": FORWARD_NARROW,
    "backward": BACKWARD,
    "resident": Shape(3, 400, resident=True),
}


def _plan(topology: TokenTopology, shape: Shape = FORWARD) -> Plan:
    plan = topology.make_plan(shape)
    assert plan is not None
    return plan


def _cache_at(plan: Plan, begin: int, end: int) -> list[dict[int, int]]:
    """Token of every slot during the steps of a block that works on steps begin to end - 1."""
    steps, loads, restarts = plan.steps.numpy(), plan.loads.numpy(), plan.restarts.numpy()
    first = restarts[steps[begin, 2] : steps[begin, 3]]
    cache = {int(slot): int(token) for token, slot, need, _ in first if need < end}
    states = [dict(cache)]
    for step in range(begin + 1, end):
        for token, slot in loads[steps[step, 0] : steps[step, 1]]:
            cache[int(slot)] = int(token)
        states.append(dict(cache))
    return states


def _slots_of_lists(lists: torch.Tensor, chunk: int) -> np.ndarray:
    return lists[chunk].numpy().T.ravel()


def _seen(plan: Plan, states: list[dict[int, int]], begin: int, transposed: bool, tokens: int) -> np.ndarray:
    """bool [tokens, tokens]: the pairs that windows (rows) compute with the tokens that lie in the listed slots."""
    extras, lists, masks = (
        (plan.t_extras, plan.t_lists, plan.t_masks) if transposed else (plan.extras, plan.lists, plan.masks)
    )
    seen = np.zeros((tokens, tokens), bool)
    for state, step in zip(states, plan.steps.numpy()[begin:], strict=False):
        for window in range(step[4], step[5]):
            rows = plan.rows[window].numpy()
            for row, slot in zip(rows, plan.row_slots[window].numpy(), strict=True):
                assert row < 0 or state[int(slot)] == row
            chunks = [window, *(len(plan.rows) + extra for extra in range(extras[window], extras[window + 1]))]
            for chunk in chunks:
                for key, slot in enumerate(_slots_of_lists(lists, chunk)):
                    token = state[int(slot)]  # also padding names a slot that holds a row
                    for number, row in enumerate(rows):
                        if row >= 0 and int(masks[chunk, number]) >> key & 1:
                            assert not seen[row, token], "no pair is computed twice"
                            seen[row, token] = True
    return seen


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("per_segment", [1, 2, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_replay(name: str, per_segment: int, shape: str) -> None:
    """However the steps are cut into segments, the listed slots hold the right tokens, and the pattern is complete."""
    topology = _topology(name)
    plan, mask, hubs = _plan(topology, SHAPES[shape]), MASKS[name].numpy(), topology.num_hubs
    steps = plan.steps.numpy()
    forward, transposed = np.zeros_like(mask), np.zeros_like(mask)
    hub_keys: list[int] = []
    for begin in range(0, len(steps), per_segment):
        end = min(begin + per_segment, len(steps))
        states = _cache_at(plan, begin, end)
        forward |= _seen(plan, states, begin, False, len(mask))
        transposed |= _seen(plan, states, begin, True, len(mask))
        for state, step in zip(states, steps[begin:end], strict=True):
            assert all(state[hub] == hub for hub in range(hubs))
            slots = np.concatenate(
                [np.zeros(0, int), *(_slots_of_lists(plan.lists, step[6] + i) for i in range(-(-step[7] // 64)))]
            )
            hub_keys += [state[int(slot)] for slot in slots[: step[7]]]
    assert np.array_equal(forward[hubs:], mask[hubs:]), "rows of vertices"
    assert np.array_equal(transposed[hubs:], mask.T[hubs:]), "columns of vertices"
    assert sorted(hub_keys) == (list(range(len(mask))) if hubs else []), "hubs meet every token once"


@pytest.mark.parametrize("name", MASKS)
def test_rows_are_replaced_only_when_nobody_needs_them(name: str) -> None:
    """The rows of a step are copied while the step before is computed: they go to slots that it does not use."""
    plan = _plan(_topology(name))
    steps, loads = plan.steps.numpy(), plan.loads.numpy()
    for number in range(1, len(steps)):
        used = {int(s) for w in range(*steps[number - 1, 4:6]) for s in plan.row_slots[w]}
        for extras, lists in ((plan.extras, plan.lists), (plan.t_extras, plan.t_lists)):
            for window in range(*steps[number - 1, 4:6]):
                for chunk in [window, *(len(plan.rows) + e for e in range(extras[window], extras[window + 1]))]:
                    used |= set(_slots_of_lists(lists, chunk).tolist())
        written = {int(slot) for _, slot in loads[slice(*steps[number, :2])]}
        assert not written & used
        assert min(written, default=plan.slots - 1) >= 0 and max(written, default=0) < plan.slots


@pytest.mark.parametrize("shape", SHAPES)
def test_limits(shape: str) -> None:
    """Steps have no more windows than the shape; the cache has its preferred size where the mesh allows it."""
    topology = _topology("mesh")
    plan = _plan(topology, SHAPES[shape])
    windows = plan.steps[:, 5] - plan.steps[:, 4]
    assert int(windows.max()) <= SHAPES[shape].windows == plan.windows and int(windows.sum()) == len(plan.rows)
    assert plan.slots == SHAPES[shape].slots + topology.num_hubs


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("hubs", [0, 14, 40, 64])
def test_resident_plan(hubs: int, backward: bool) -> None:
    """The cache holds the whole mesh, and every row is copied once: at the beginning, or while a step is computed."""
    topology = TokenTopology.from_faces(grid_faces(17, 25), num_hubs=hubs)
    shape = resident_shape(topology.num_vertices, hubs, backward)
    assert shape is not None and shape.slots == topology.num_vertices
    plan = _plan(topology, shape)
    steps = plan.steps.numpy()
    assert plan.slots == topology.num_tokens and len(steps) > 1
    assert int(steps[0, 3]) - int(steps[0, 2]) + len(plan.loads) - int(steps[0, 1]) == topology.num_tokens
    sizes = steps[:, 5] - steps[:, 4]
    assert (sizes[:-1] == shape.windows).all() and 0 < sizes[-1] <= shape.windows


def test_resident_steps_suit_four_schedulers() -> None:
    """27 windows: 15 and 12 in the forward, 10, 10 and 7 in the backward; smaller meshes need one step."""
    assert resident_shape(431, 14, backward=False) == Shape(15, 431, resident=True)
    assert resident_shape(431, 14, backward=True) == Shape(10, 431, resident=True)
    assert resident_shape(100, 0, backward=False) == Shape(7, 100, resident=True)
    assert resident_shape(0, 5, backward=True) == Shape(1, 0, resident=True)


def test_large_meshes_are_not_resident() -> None:
    """They are streamed through a smaller cache."""
    assert resident_shape(MAX_RESIDENT - 14, 14, backward=False) is not None
    assert resident_shape(MAX_RESIDENT - 13, 14, backward=False) is None


def test_scattered_pattern_has_no_plan() -> None:
    """A window that needs more rows than half the cache cannot be streamed; long lists of few tokens can."""
    vertices = MAX_SLOTS
    dense = torch.ones(vertices, vertices, dtype=torch.bool)
    assert TokenTopology.from_mask(dense, num_hubs=0).make_plan() is None
    assert _plan(_topology("long_lists")).slots <= MAX_SLOTS


def test_plan_is_deterministic_and_ignores_the_order_of_processing() -> None:
    """The plan follows the locality order, whatever order the topology asks Triton to take."""
    faces = grid_faces(17, 19)
    first, second = (
        _plan(TokenTopology.from_faces(faces, num_hubs=3, order=order)) for order in ("natural", "locality")
    )
    assert first[-2:] == second[-2:]
    assert all(torch.equal(a, b) for a, b in zip(first[:-2], second[:-2], strict=True))


def test_rows_are_read_hardly_more_than_once() -> None:
    """On a mesh of 2,500 vertices in a scrambled numbering."""
    faces = np.random.default_rng(0).permutation(2500)[grid_faces(50, 50)]
    topology = TokenTopology.from_faces(faces, num_hubs=14)
    assert len(_plan(topology).loads) < 1.15 * topology.num_vertices


def _pairs(plan: Plan, tokens: int) -> np.ndarray:
    """row * tokens + key of all pairs that windows compute, in any order, from a replay in one segment."""
    token_in = np.full(plan.slots, -1)
    steps, loads, restarts = plan.steps.numpy(), plan.loads.numpy(), plan.restarts.numpy()
    lists = plan.lists.numpy().transpose(0, 2, 1).reshape(len(plan.lists), -1)
    found = []
    first = restarts[: steps[0, 3]]
    token_in[first[:, 1]] = first[:, 0]
    for number, step in enumerate(steps):
        if number:
            new = loads[slice(*step[:2])]
            token_in[new[:, 1]] = new[:, 0]
        for window in range(step[4], step[5]):
            rows = plan.rows[window].numpy()
            assert np.array_equal(token_in[plan.row_slots[window].numpy()][rows >= 0], rows[rows >= 0])
            for chunk in [window, *range(*(len(plan.rows) + plan.extras[window : window + 2].numpy()))]:
                seen = plan.masks[chunk].numpy()[:, None] >> np.arange(64) & 1
                row, key = np.nonzero(seen)
                found.append(rows[row].astype(np.int64) * tokens + token_in[lists[chunk]][key])
    return np.concatenate(found)


def test_large_mesh_has_a_right_plan_in_little_time() -> None:
    """Nothing that grows faster than the mesh: that would take minutes, this takes about a second."""
    faces = np.random.default_rng(0).permutation(30_000)[grid_faces(150, 200)]
    topology = TokenTopology.from_faces(faces, num_hubs=14, order="locality")
    start = time.perf_counter()
    plan = _plan(topology)
    assert time.perf_counter() - start < 30
    assert len(plan.loads) < 1.25 * topology.num_vertices
    tokens = topology.num_tokens
    rows = np.concatenate([np.repeat(np.arange(14, tokens), 14), 14 + topology.rows().numpy()])
    keys = np.concatenate([np.tile(np.arange(14), tokens - 14), 14 + topology.columns.numpy().astype(np.int64)])
    assert np.array_equal(np.sort(_pairs(plan, tokens)), np.sort(rows * tokens + keys)), "every pair once"


@pytest.mark.parametrize("pairs", [0, 49_999])
def test_large_graphs_that_are_no_meshes_have_plans(pairs: int) -> None:
    """Isolated vertices, and a path."""
    edges = np.stack([np.arange(pairs), np.arange(pairs) + 1], axis=1)
    topology = TokenTopology.from_edges(edges, num_vertices=50_000, num_hubs=2, order="locality")
    start = time.perf_counter()
    plan = _plan(topology)
    assert time.perf_counter() - start < 30
    assert len(plan.loads) == topology.num_vertices


def test_conflicts_of_banks_are_rare() -> None:
    """Eight keys that are read together mostly start in different 16-byte columns of shared memory."""
    plan = _plan(_topology("mesh"))
    groups = plan.lists[: len(plan.masks)].numpy().transpose(0, 2, 1).reshape(-1, 8)
    passes = [np.bincount(np.unique(group) % 8, minlength=8).max() for group in groups]
    assert np.mean(passes) < 1.25


def test_asymmetric_schedules_are_used() -> None:
    """Lists of queries come from the transposed schedule."""
    topology = _topology("asymmetric")
    plan = build_plan(topology.schedule, topology.t_schedule, topology.num_hubs)
    assert plan is not None and not torch.equal(plan.masks, plan.t_masks)
