"""Training steps as CUDA graphs: what is put back, and what is refused. tests/gpu/test_graphed.py replays real graphs."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from gankern.training import GraphedStep, graphed


@pytest.fixture
def recorded(monkeypatch):
    """Graphs that record which step is captured, and run it when replayed, on the CPU."""
    capturing = []

    class Graph:
        def replay(self):
            assert capturing == [self]
            for buffer, value in zip(self.buffers, self.step(*self.inputs)):
                buffer.data.copy_(value.data)

    @contextmanager
    def graph(graph):
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


def player(make=lambda parameters: torch.optim.Adam(parameters, 1e-2)):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimiser = make(network.parameters())

    def step(x, y):
        optimiser.zero_grad()
        loss = (network(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        return loss, x.mean()

    return network, optimiser, step


OPTIMISERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, 1e-2, amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-2, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2, initial_accumulator_value=0.5),
}


@pytest.mark.parametrize("trained_before", [0, 2])
@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_warm_up_leaves_no_trace(recorded, same, make, trained_before):
    batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(5)]
    networks = []
    for graph in (False, True):
        network, optimiser, step = player(make)
        torch.manual_seed(1)
        for _ in range(trained_before):
            step(*batches[0])
        if graph:
            captured = GraphedStep(step, batches[0], (network,), (optimiser,))
            captured.graph.step, captured.graph.inputs, captured.graph.buffers = step, captured.inputs, captured.outputs
            losses = [tuple(x.clone() for x in captured(*batch)) for batch in batches]
        else:
            losses = [tuple(x.detach() for x in step(*batch)) for batch in batches]
        networks.append((network.state_dict(), optimiser.state_dict()["state"], losses))
    # What the step reads on the host, as SGD's "is there a buffer", is no tensor.
    assert same(networks[0], networks[1])


def test_outputs_carry_no_graph_of_autograd(recorded):
    network, optimiser, step = player()
    captured = GraphedStep(step, (torch.randn(8, 3), torch.randn(8, 1)), (network,), (optimiser,))
    captured.graph.step, captured.graph.inputs, captured.graph.buffers = step, captured.inputs, captured.outputs
    assert not any(x.requires_grad for x in captured(torch.randn(8, 3), torch.randn(8, 1)))


def test_a_step_that_cannot_be_captured_changes_nothing(recorded, same, monkeypatch):
    network, optimiser, step = player()
    batch = (torch.randn(8, 3), torch.randn(8, 1))
    step(*batch)
    gradients = [p.grad for p in network.parameters()]
    before = [x.clone() for x in (*network.state_dict().values(), *gradients)]

    @contextmanager
    def refuse(graph):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(RuntimeError, match="cannot be captured: operation not permitted(.|\n)*must not wait"):
        GraphedStep(step, batch, (network,), (optimiser,))
    assert all(p.grad is gradient for p, gradient in zip(network.parameters(), gradients))
    assert same(before, [*network.state_dict().values(), *gradients])


def test_inputs_of_another_shape(recorded):
    network, optimiser, step = player()
    captured = GraphedStep(step, (torch.randn(8, 3), torch.randn(8, 1)), (network,), (optimiser,))
    with pytest.raises(ValueError, match=r"captured with 2 tensors, got 1"):
        captured(torch.randn(8, 3))
    with pytest.raises(ValueError, match=r"inputs\[1\].*\[8, 1\] torch.float32, got \[4, 1\].*GraphedStep of its own"):
        captured(torch.randn(8, 3), torch.randn(4, 1))
    with pytest.raises(ValueError, match=r"inputs\[0\].*got \[8, 3\] torch.float64"):
        captured(torch.randn(8, 3).double(), torch.randn(8, 1))


def test_what_is_no_cuda_tensor():
    network, optimiser, step = player()
    with pytest.raises(ValueError, match=r"inputs\[0\]: CUDA graphs need a CUDA tensor, got one on cpu"):
        GraphedStep(step, (torch.randn(8, 3),), (network,), (optimiser,))
    with pytest.raises(ValueError, match="inputs: at least one"):
        GraphedStep(step, (), (network,), (optimiser,))


def test_optimisers_that_wait_for_the_device(monkeypatch):
    class OnDevice:
        device = torch.device("cuda", 0)

    network = nn.Linear(2, 2)
    monkeypatch.setattr(network, "named_parameters", lambda: [("weight", OnDevice)])
    optimisers = (torch.optim.SGD([nn.Parameter(torch.ones(2))]), torch.optim.Adam([nn.Parameter(torch.ones(2))]))
    with pytest.raises(ValueError, match=r"optimisers\[1\]: this Adam's step.*capturable=True"):
        graphed._check((OnDevice,), (network,), optimisers)
    elsewhere = type("Elsewhere", (), {"device": torch.device("cuda", 1)})
    with pytest.raises(ValueError, match=r"networks\[0\].weight: all tensors must be on one device"):
        graphed._check((elsewhere,), (network,), ())
