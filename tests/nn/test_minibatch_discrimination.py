"""gnn.MinibatchDiscrimination: the layer, the authors' weight-normalised form, and several processes."""

import os
import subprocess
import sys

import pytest
import torch

import gankern
import gankern.functional as GF
from gankern.nn.modules.minibatch_discrimination import MinibatchDiscrimination


def test_appends_the_features():
    layer, x = MinibatchDiscrimination(6, 4, 3), torch.randn(5, 6)
    out = layer(x)
    assert torch.equal(out[:, :6], x)
    assert torch.equal(out[:, 6:], GF.minibatch_discrimination(x, layer.T))
    assert gankern.last_implementation("minibatch_discrimination") in ("cpu", "triton", "reference")


def test_parameters():
    layer = MinibatchDiscrimination(200, 30, 5)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {"T": (200, 30, 5)}
    assert abs(layer.T.std() - 1) < 0.02 and abs(layer.T.mean()) < 0.02
    authors = MinibatchDiscrimination(200, 30, 5, weight_norm=True)
    shapes = {"theta": (200, 30, 5), "log_weight_scale": (30, 5), "bias": (30,)}
    assert {name: tuple(p.shape) for name, p in authors.state_dict().items()} == shapes
    assert abs(authors.theta.std() - 0.05) < 0.001
    assert MinibatchDiscrimination(2, 3, 4, dtype=torch.float64).T.dtype == torch.float64


def test_the_kernel_of_the_weight_normalised_form():
    layer = MinibatchDiscrimination(6, 4, 3, weight_norm=True)
    torch.testing.assert_close(torch.linalg.vector_norm(layer.kernel(), dim=0), torch.ones(4, 3))
    with torch.no_grad():
        layer.log_weight_scale.fill_(1)
        layer.bias.fill_(5)
    torch.testing.assert_close(torch.linalg.vector_norm(layer.kernel(), dim=0), torch.full((4, 3), torch.e))
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x)[:, 6:], GF.minibatch_discrimination(x, layer.kernel()) + 5)


def test_data_dependent_initialisation():
    layer, x = MinibatchDiscrimination(6, 4, 3, weight_norm=True), 10 * torch.randn(50, 6)
    layer.initialize(x)
    torch.testing.assert_close(layer._nearest(x), torch.full((4,), 2.0))
    torch.testing.assert_close(layer(x)[:, 6:].mean(0), torch.zeros(4), rtol=0, atol=1e-5)


def test_trains():
    layer = MinibatchDiscrimination(6, 4, 3, weight_norm=True)
    x = torch.randn(5, 6, requires_grad=True)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *layer.parameters()])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MinibatchDiscrimination(0, 2, 3), "in_features is 0; it must be at least 1"),
        (lambda: MinibatchDiscrimination(4, 2, 0), "kernel_dim is 0"),
        (
            lambda: MinibatchDiscrimination(4, 2, 3, reduction="max"),
            "reduction is 'max'; accepted are 'sum', 'mean'",
        ),
        (lambda: MinibatchDiscrimination(4, 2, 3, process_group=object()), "process_group is for global_batch=True"),
        (
            lambda: MinibatchDiscrimination(4, 2, 3)(torch.zeros(5, 3)),
            r"x has shape \(5, 3\); it must be \[samples, 4\]",
        ),
        (
            lambda: MinibatchDiscrimination(4, 2, 3).initialize(torch.zeros(5, 4)),
            "initialize.. is for weight_norm=True",
        ),
        (
            lambda: MinibatchDiscrimination(4, 2, 3, weight_norm=True).initialize(torch.zeros(1, 4)),
            "needs 2 samples or more, got 1",
        ),
        (
            lambda: MinibatchDiscrimination(4, 2, 3, weight_norm=True).initialize(torch.zeros(5, 4)),
            "needs samples that differ",
        ),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=f"MinibatchDiscrimination: .*{says}"):
        make()


def test_a_global_batch_needs_processes():
    with pytest.raises(RuntimeError, match="needs an initialised torch.distributed"):
        MinibatchDiscrimination(4, 2, 3, global_batch=True)(torch.zeros(5, 4))


# ---- two processes ------------------------------------------------------------------------------------------

PROCESSES = 2
OPTIONS = [{}, {"reduction": "mean"}, {"include_self": True, "reduction": "mean"}]


def layer_and_batch(options):
    torch.manual_seed(0)
    layer = MinibatchDiscrimination(6, 4, 3, dtype=torch.float64, **options)
    return layer, torch.randn(PROCESSES * 5, 6, dtype=torch.float64) / 3


def losses(layer, x):
    """A loss and its gradient for x, and a gradient penalty and its gradients for x and the layer."""
    x = x.detach().requires_grad_()
    loss = layer(x)[:, 6:].square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    penalty = first.square().sum()
    return [loss, first, penalty, *torch.autograd.grad(penalty, [x, layer.T])]


def one_of_two_processes(rank, port):
    """Run in each process; raises where its part differs from that of a single process."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    for options in OPTIONS:
        layer, x = layer_and_batch({**options, "global_batch": True})
        whole, _ = layer_and_batch(options)
        own = slice(5 * rank, 5 * rank + 5)
        loss, first, penalty, second, kernel = [result.detach().clone() for result in losses(layer, x[own])]
        for sum_over_processes in (loss, penalty, kernel):
            torch.distributed.all_reduce(sum_over_processes)
        expected = [result.detach() for result in losses(whole, x)]
        parts = [expected[0], expected[1][own], expected[2], expected[3][own], expected[4]]
        torch.testing.assert_close([loss, first, penalty, second, kernel], parts)
        torch.testing.assert_close(layer(x[own]), whole(x)[own])

    try:
        layer(x[: 2 + rank])
    except ValueError as error:
        assert "they have [2, 3]" in str(error)
    else:
        raise AssertionError("unequal batches were accepted")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="gloo is not available"
)
def test_two_processes_are_one():
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = server.port
    del server  # frees the port for the group's own store
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('cases', {__file__!r})\n"
        "cases = importlib.util.module_from_spec(spec); spec.loader.exec_module(cases)\n"
        "cases.one_of_two_processes(int(sys.argv[1]), int(sys.argv[2]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    processes = [
        subprocess.Popen([*command, str(rank), str(port)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(PROCESSES)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, "\n".join(errors)
