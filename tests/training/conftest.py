"""What tests of training share."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves

from gankern.training import GraphedStep, graphed


@pytest.fixture
def recorded(monkeypatch):
    """Graphs that record which step is captured, and run it when replayed, on the CPU."""
    capturing, steps = [], []

    class Graph:
        def replay(self):
            assert self in capturing
            step, captured = next((s.step, c) for s in steps for c in s.captured.values() if c and c.graph is self)
            for buffer, value in zip(tree_leaves(captured.outputs), tree_leaves(step(*captured.inputs))):
                buffer.data.copy_(value.data)

    @contextmanager
    def graph(graph, stream):
        capturing.append(graph)
        yield

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    @contextmanager
    def stream(stream):
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))
    monkeypatch.setattr(graphed, "_check", lambda *arguments: None)
    made = GraphedStep.__init__
    monkeypatch.setattr(GraphedStep, "__init__", lambda self, *a, **k: (steps.append(self), made(self, *a, **k))[1])
    return capturing
