"""When a call waits on the device for the call before: on made-up streams, whose work has ended or has not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmetro.inference.engine import graphs
from fastmetro.inference.engine.graphs import Graphs

DEFAULT, OTHER = 0, 4096


class Event:
    """Of the call before, and what it was asked."""

    def __init__(self) -> None:
        self.ended = False
        self.asked: list[str] = []

    def query(self) -> bool:
        self.asked.append("query")
        return self.ended

    def wait(self, stream: object) -> None:
        self.asked.append("wait")


def made(monkeypatch: pytest.MonkeyPatch) -> tuple[Graphs, Any, Event]:
    """Graphs without a GPU, and the current stream, whose address can be set."""
    current = SimpleNamespace(address=DEFAULT)
    monkeypatch.setattr(graphs, "_raw_stream", lambda index: current.address)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current)
    found: Any = object.__new__(Graphs)
    found.stream, found.done, found.device = None, Event(), SimpleNamespace(index=0)
    return found, current, found.done


def test_the_default_stream_keeps_its_order_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up, _, event = made(monkeypatch)
    made_up._follow()
    assert event.asked == ["query", "wait"]  # nobody knows what was before
    made_up._follow()
    made_up._follow()
    assert event.asked == ["query", "wait"]


def test_other_streams_ask_and_wait_for_what_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one, too: it may be another by now, at the address of one that was given up."""
    made_up, current, event = made(monkeypatch)
    for address in (DEFAULT, OTHER, OTHER, DEFAULT):
        current.address = address
        made_up._follow()
    assert event.asked == ["query", "wait"] * 4
    event.ended = True
    current.address = OTHER
    made_up._follow()
    assert event.asked[8:] == ["query"]


def test_without_the_address_every_call_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up, _, event = made(monkeypatch)
    monkeypatch.setattr(graphs, "_raw_stream", None)
    event.ended = True
    made_up._follow()
    made_up._follow()
    assert event.asked == ["query", "query"]
