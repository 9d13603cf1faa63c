"""Training steps as CUDA graphs: what is put back, and what is refused. tests/gpu/test_graphed.py replays real graphs."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from gankern.training import GraphedStep, NotCaptured, graphed


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
            losses = [tuple(x.clone() for x in captured(*batch)) for batch in batches]
        else:
            losses = [tuple(x.detach() for x in step(*batch)) for batch in batches]
        networks.append((network.state_dict(), optimiser.state_dict()["state"], losses))
    # What the step reads on the host, as SGD's "is there a buffer", is no tensor.
    assert same(networks[0], networks[1])


def test_outputs_carry_no_graph_of_autograd(recorded):
    network, optimiser, step = player()
    captured = GraphedStep(step, (torch.randn(8, 3), torch.randn(8, 1)), (network,), (optimiser,))
    assert not any(x.requires_grad for x in captured(torch.randn(8, 3), torch.randn(8, 1)))


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_no_graph_of_an_earlier_call_is_alive_when_a_step_is_captured(recorded, norm):
    """A parameter's node in autograd's graph is of the stream of the call that made it: what keeps it alive from a call
    on the default stream, as the hook's `weight` does, has a backward within a capture wait for that stream."""
    network = nn.Sequential(norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 1))
    optimiser = torch.optim.SGD(network.parameters(), 1e-2)

    original = next(p for name, p in network[0].named_parameters() if "orig" in name)

    def step(x):
        optimiser.zero_grad()
        nodes.append(torch.autograd.graph.get_gradient_edge(original).node)
        loss = network(x).square().mean()
        loss.backward()
        optimiser.step()
        return loss.detach()

    nodes = []
    step(torch.randn(8, 3))
    nodes.pop().metadata["of the first call"] = True
    GraphedStep(step, (torch.randn(8, 3),), (network,), (optimiser,))
    assert len(nodes) == graphed.WARM_UP + 1
    assert not any("of the first call" in node.metadata for node in nodes)


def test_a_step_that_cannot_be_captured_changes_nothing(recorded, same, monkeypatch):
    network, optimiser, step = player()
    batch = (torch.randn(8, 3), torch.randn(8, 1))
    step(*batch)
    gradients = [p.grad for p in network.parameters()]
    before = [x.clone() for x in (*network.state_dict().values(), *gradients)]

    @contextmanager
    def refuse(graph, stream):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(NotCaptured, match="cannot be captured: operation not permitted(.|\n)*must not wait"):
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


def trained_while_it_changes(graph):
    """The state after steps whose inputs and loss depend on more than tensors."""
    network, optimiser, _ = player()
    wide, now = nn.Linear(6, 3), {"wide": False, "factor": 1.0}

    def step(x, y):
        optimiser.zero_grad()
        loss = (network(wide(x) if now["wide"] else x) - y).square().mean() * now["factor"]
        loss.backward()
        optimiser.step()
        return loss, x.mean()

    example = (torch.randn(8, 3), torch.randn(8, 1))
    train = step
    if graph:
        train = GraphedStep(step, example, (network, wide), [optimiser], depends_on=lambda: tuple(now.values()))
    torch.manual_seed(2)
    losses = []
    # The inputs grow, while the factor fades to a value a step, which is never captured; then both alternate.
    changes = [(False, 1.0)] * 4 + [(True, 0.1 * i) for i in range(1, 4)] + [(True, 1.0), (False, 1.0)] * 3
    for now["wide"], now["factor"] in changes:
        batch = (torch.randn(8, 6 if now["wide"] else 3), torch.randn(8, 1))
        losses.append(tuple(x.detach().clone() for x in train(*batch)))
    return network.state_dict(), optimiser.state_dict()["state"], losses


def test_a_graph_for_each_value_that_the_step_depends_on(recorded, same):
    """A value runs as it is when it is new, is captured when it comes again, and is replayed: the numbers are those of
    steps without graphs."""
    plain = trained_while_it_changes(graph=False)
    assert len(recorded) == 0
    assert same(plain, trained_while_it_changes(graph=True))
    assert len(recorded) == 2  # of each value that came again


def test_a_scale_is_put_back_in_place(recorded):
    network, optimiser, _ = player()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def step(x, y):
        optimiser.zero_grad()
        loss = (network(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        return (loss,)

    batch = (torch.randn(8, 3), torch.randn(8, 1))
    captured = GraphedStep(step, batch, (network,), (optimiser,), scalers=(scaler,))
    scale = scaler._scale
    assert scaler.get_scale() == 8.0 and scaler._growth_tracker.item() == 0  # which the warm-up had doubled
    captured(*batch)
    captured(*batch)
    assert scaler.get_scale() == 16.0 and scaler._scale is scale


def accumulated(graph):
    network, optimiser, _ = player()

    def step(x, y):
        optimiser.zero_grad()
        losses = [(network(p) - q).square().mean() / 2 for p, q in zip(x.chunk(2), y.chunk(2))]
        for loss in losses:
            loss.backward()
        optimiser.step()
        return (sum(losses),)

    batch = (torch.randn(8, 3, generator=torch.Generator().manual_seed(3)), torch.ones(8, 1))
    torch.manual_seed(4)
    train = GraphedStep(step, batch, (network,), (optimiser,)) if graph else step
    return [train(*batch)[0].detach().clone() for _ in range(3)]


def test_parts_of_a_batch_add_up_within_a_step(recorded, same):
    assert same(accumulated(graph=False), accumulated(graph=True))


def test_a_learning_rate_that_is_a_tensor_follows_its_schedule(recorded):
    network, _, _ = player()
    optimiser = torch.optim.Adam(network.parameters(), lr=torch.tensor(1e-2), capturable=False, foreach=False)

    def step(x, y):
        optimiser.zero_grad()
        loss = (network(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        return (loss,)

    batch = (torch.randn(8, 3), torch.randn(8, 1))
    train = GraphedStep(step, batch, (network,), (optimiser,))
    optimiser.param_groups[0]["lr"].fill_(0.0)
    before = [p.detach().clone() for p in network.parameters()]
    train(*batch)
    assert all(map(torch.equal, before, network.parameters()))
    optimiser.param_groups[0]["lr"].fill_(1e-2)
    train(*batch)
    assert not any(map(torch.equal, before, network.parameters()))
