"""Graphs and engines that are given up are freed at once: in a cycle they would wait for Python's collector."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from test_engine import pixels
from torch import Tensor

import fastmetro
from fastmetro.inference.engine.graphs import Graphs
from fastmetro.inference.engine.precision import TensorFloat32
from fastmetro.inference.pretrained import load_pretrained

CPU = torch.device("cpu")


def doubled(images: Tensor) -> dict[str, Tensor]:
    return {"doubled": 2 * images}


@pytest.mark.usefixtures("no_collector", "made_up_gpu")
def test_graphs_that_are_given_up() -> None:
    graphs = Graphs(doubled, CPU, torch.float32, 2, TensorFloat32.current())
    found: list[weakref.ref[Any]] = []
    for count in (1, 2, 3, 1, 4):
        graphs(torch.ones(count, 3, 8, 8))
        captured = next(reversed(graphs.kept.values()))
        found.append(weakref.ref(captured))
        found.append(weakref.ref(captured.outputs["doubled"]))
        del captured
    assert [ref() is not None for ref in found] == [False] * 6 + [True] * 4


@pytest.mark.usefixtures("no_collector", "made_up_gpu")
def test_engines_that_are_given_up() -> None:
    """Behind their last call, whose memory others may be given."""
    engine = fastmetro.compile(load_pretrained("fastmetro-compact"), 1)
    engine._graphs = Graphs(engine._work, CPU, torch.float32, 2, TensorFloat32.current())
    engine(pixels(1))
    captured = next(iter(engine._graphs.kept.values()))
    found = [weakref.ref(x) for x in (engine, engine._graphs, engine._backbone, engine._transformers, captured)]
    del captured
    gc.collect()  # once: what PyTorch imports while an engine is compiled leaves frames of that in a cycle
    last_call: Any = engine._graphs.done
    assert last_call.waits == 0
    del engine
    assert [ref() for ref in found] == [None] * 5 and last_call.waits == 1
