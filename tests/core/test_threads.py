"""What is "for the time of a block" is one thread's, and nests; what is in evaluation is safe from many threads."""

import copy
import pickle
import threading
import time

import pytest
import torch
from common import in_threads
from torch import nn

import gankern
import gankern.functional as GF
import gankern.nn as gnn
from gankern import penalties
from gankern.core.threads import PerThread

BLOCKS = {
    "use_implementation": (gankern.use_implementation, ("reference", "cpu"), lambda: _implementation()),
    "convolution_precision": (
        gankern.convolution_precision, ("medium", "high"), gankern.get_convolution_precision
    ),
    "fast_double_backward": (
        lambda on: gankern.fast_double_backward(), (True, True), gankern.fast_double_backward.is_enabled
    ),
}  # fmt: skip


def _implementation():
    GF.pixel_norm(torch.randn(2, 3))
    return gankern.last_implementation("pixel_norm")


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_overlap_and_nest(name):
    block, (first, second), read = BLOCKS[name]
    before = read()
    entered, left, seen = threading.Event(), threading.Event(), {}

    def a():
        with block(first):
            seen["first"] = read()
            entered.set()
            left.wait()
            seen["first, after another's block"] = read()
        seen["out"] = read()

    def b():
        entered.wait()
        seen["beside"] = read()
        with block(second):
            seen["second"] = read()
            with block(first):
                seen["inner"] = read()
            seen["second again"] = read()
        left.set()

    in_threads(a, b)
    expected = {
        "first": first, "first, after another's block": first, "out": before, "beside": before,
        "second": second, "inner": first, "second again": second,
    }  # fmt: skip
    assert seen == expected
    assert read() == before


def test_precision_of_the_process():
    seen = []
    gankern.set_convolution_precision("high")
    try:
        with gankern.convolution_precision("medium"):
            in_threads(lambda: seen.append(gankern.get_convolution_precision()))
    finally:
        gankern.set_convolution_precision("highest")
    assert seen == ["high"]


def test_compiled_code_follows_its_thread():
    @torch.compile(backend="eager", fullgraph=True)
    def run(x):
        return GF.pixel_norm(x)

    x, seen = torch.randn(2, 3), []

    def ran(name):
        with gankern.use_implementation(name):
            run(x)
            seen.append(gankern.last_implementation("pixel_norm"))

    ran("cpu")
    in_threads(lambda: ran("reference"))
    ran("cpu")
    in_threads(lambda: ran("cpu"))
    assert seen == ["cpu", "reference", "cpu", "cpu"]


def test_copies_begin_anew():
    state = PerThread(list)
    state.value.append(1)
    assert copy.deepcopy(state).value == pickle.loads(pickle.dumps(state)).value == []


def with_reference_batch():
    layers = nn.Conv2d(4, 8, 3, 1, 1), gnn.VirtualBatchNorm2d(8, activation="relu"), nn.Conv2d(8, 3, 3, 1, 1)
    return gnn.set_reference_batch(nn.Sequential(*layers).eval(), torch.randn(8, 4, 8, 8))


def spectral(norm):
    return nn.Sequential(norm(nn.Conv2d(4, 8, 3, 1, 1)), nn.ReLU(), norm(nn.Conv2d(8, 3, 3, 1, 1))).eval()


NETWORKS = {
    "virtual batch norm": with_reference_batch,
    "spectral norm, grouped": lambda: gnn.utils.group_spectral_norm(spectral(gnn.utils.parametrizations.spectral_norm)),
    "spectral norm, hooks grouped": lambda: gnn.utils.group_spectral_norm(spectral(gnn.utils.spectral_norm)),
    "minibatch stddev": lambda: nn.Sequential(
        nn.Conv2d(4, 8, 3, 1, 1), gnn.MinibatchStdDev(2), nn.Conv2d(9, 3, 3)
    ).eval(),
    "minibatch discrimination": lambda: nn.Sequential(nn.Flatten(), gnn.MinibatchDiscrimination(256, 4, 3)).eval(),
    "accelerated": lambda: accelerated(),
}


def accelerated():
    class Block(nn.Module):
        """Calls both halves of two pairs by itself."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            h = self.first(nn.functional.interpolate(x, scale_factor=2))
            return nn.functional.avg_pool2d(self.second(nn.functional.leaky_relu(self.norm(h), 0.2)), 2)

    network = nn.Sequential(Block(), spectral(nn.utils.parametrizations.spectral_norm)[2:]).eval()
    network = nn.Sequential(network[0], nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 3, 3))).eval()
    gankern.accelerate(network)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_from_many_threads(name):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    inputs = [torch.randn(2, 4, 8, 8) for _ in range(48)]
    with torch.no_grad():
        expected = [network(x) for x in inputs]
    results = [None] * len(inputs)

    def work(first):
        with torch.no_grad():
            for i in range(first, len(inputs), 4):
                results[i] = network(inputs[i])

    in_threads(*[lambda i=i: work(i) for i in range(4)])
    for result, right in zip(results, expected):
        torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-6)


def test_a_block_beside_torchs_own_backward():
    """One thread is in a block of fast_double_backward, another runs torch's own double backward: as without the block."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1)).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def penalty():
        net, y = copy.deepcopy(layers), x.clone().requires_grad_()
        h = net[0](y)
        (g,) = torch.autograd.grad(net[1:](h).sum(), y, create_graph=True)
        of_h, *of_parameters = torch.autograd.grad(g.square().sum(), [h, *net.parameters()], allow_unused=True)
        return of_h, of_parameters

    inside, gradients = [], []

    def block():
        for _ in range(10):
            with gankern.fast_double_backward():
                inside.append(penalty()[0] is None)
                time.sleep(0)

    def beside():
        for _ in range(10):
            of_h, of_parameters = penalty()
            gradients.append((of_h is not None, of_parameters))

    in_threads(block, beside)
    assert all(inside), "the intermediate gradient of zeros is absent within the block"
    assert all(there for there, _ in gradients), "and is there beside it"
    for _, of_parameters in gradients[1:]:
        for a, b in zip(of_parameters, gradients[0][1]):
            assert (a is None and b is None) or torch.equal(a, b)


def test_penalties_from_many_threads():
    """Each thread has a critic of its own."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1)).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def gradients(method):
        mine = copy.deepcopy(critic)
        penalties.r1_penalty(mine, x, method=method).backward()
        return [p.grad for p in mine.parameters()]

    expected = gradients("double_backward")

    def work(method):
        for _ in range(10):
            for a, b in zip(gradients(method), expected):
                assert (a is None) == (b is None)
                assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-12)

    in_threads(*[lambda m=m: work(m) for m in ("tangent", "double_backward", "auto")])
