"""Penalties under DistributedDataParallel, in each way that torch has of it: every process has the gradients of one with
the joint batch, step for step, also where torch's own double backward by hand would raise."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gankern import penalties

STEPS = 4
METHODS = ("tangent", "double_backward")


def network(way):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten(),
        nn.Linear(64, 1),
    ).double()  # fmt: skip
    if way.startswith("spare"):  # such as of a head for classes
        net.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    return net


def samples(step):
    return torch.randn(2, 8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def tripled(module, args, output):
    """A forward hook."""
    return 3.0 * output


def difference(critic, real, fake):
    return critic(fake).mean() - critic(real).mean()


def penalty(critic, real, method):
    return penalties.r1_penalty(critic, real, weight=5.0, method=method)


def by_hand(critic, real):
    x = real.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return 2.5 * gradient.square().flatten(1).sum(1).mean() + 0 * critic(real).sum()


# A step's losses, each with a backward of its own.
def together(critic, real, fake, method, step):
    yield difference(critic, real, fake) + penalty(critic, real, method)


def alone(critic, real, fake, method, step):
    yield penalty(critic, real, method)


def penalty_first(critic, real, fake, method, step):
    """Then it is the penalty's forward in which DistributedDataParallel lays out its buckets anew."""
    yield penalty(critic, real, method) + difference(critic, real, fake)


def lazy(critic, real, fake, method, step):
    """A step of the penalty alone after each step without one."""
    yield penalty(critic, real, method) if step % 2 else difference(critic, real, fake)


def one_after_the_other(critic, real, fake, method, step):
    yield difference(critic, real, fake)
    yield penalty(critic, real, method)


def handwritten(critic, real, fake, method, step):
    yield by_hand(critic, real)


# Options of DistributedDataParallel, losses, and whether all but the last part of a step is without synchronisation.
WAYS = {
    "static graph": ({"static_graph": True}, together, False),
    "static graph, penalty alone": ({"static_graph": True}, alone, False),
    "gradients are views": ({"gradient_as_bucket_view": True}, together, False),
    "gradients are views, penalty alone": ({"gradient_as_bucket_view": True}, alone, False),
    "gradients are views, unused are found": (
        {"gradient_as_bucket_view": True, "find_unused_parameters": True}, lazy, False,
    ),
    "a backward of its own": ({}, one_after_the_other, False),
    "lazy": ({}, lazy, False),
    "lazy, unused are found": ({"find_unused_parameters": True}, lazy, False),
    "parts of a batch": ({}, together, True),
    "parts of a batch, penalty alone": ({}, alone, True),
    "parts of a batch, views": ({"gradient_as_bucket_view": True}, alone, True),
    "spare parameter": ({"find_unused_parameters": True}, together, False),
    "spare parameter, penalty first": ({"find_unused_parameters": True}, penalty_first, False),
    "spare parameter, penalty alone": ({"find_unused_parameters": True}, alone, True),
    "spare parameter, lazy": ({"find_unused_parameters": True}, lazy, False),
    "by hand": ({}, handwritten, False),
    # Here the wrapper's own forward has to run.
    "hooked": ({}, together, False),
    "hooked, penalty alone": ({}, alone, False),
    "hooked, unused are found": ({"find_unused_parameters": True}, lazy, False),
    "within a function": ({}, penalty_first, False),
    "within a function, unused are found": ({"find_unused_parameters": True}, penalty_first, False),
}  # fmt: skip


def methods(way):
    if way == "by hand":
        return METHODS[1:]
    return ("auto", *METHODS[1:]) if way.startswith(("hooked", "within")) else METHODS


CASES = [(way, method) for way in WAYS for method in methods(way)]


def train(critic, net, losses, method, parts, unsynchronised, zeros=False):
    """Gradients after each step, and the weights in the end. ``zeros``: in place of a gradient that is none."""
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    found = []
    for step in range(STEPS):
        optimiser.zero_grad()
        for number, part in enumerate(parts):
            last = number == len(parts) - 1 or not unsynchronised
            with contextlib.nullcontext() if last else critic.no_sync():
                for loss in losses(critic, *(x[part] for x in samples(step)), method, step):
                    (loss / len(parts)).backward()
        found.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None and zeros else p.grad
        optimiser.step()
    return found, [p.detach() for p in net.parameters()]


def run(rank, folder):
    """Of one process."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for way, method in CASES:
        options, losses, parted = WAYS[way]
        net = network(way)
        model = DistributedDataParallel(net, **options)
        if way.startswith("hooked"):
            model.register_forward_hook(tripled)
        parts = [slice(rank * 2 + i * 4, rank * 2 + i * 4 + 2) for i in range(2)] if parted else []
        try:
            results[way, method] = train(
                (lambda x, model=model: model(x)) if way.startswith("within") else model,
                net, losses, method, parts or [slice(4 * rank, 4 * rank + 4)], bool(parts),
            )  # fmt: skip
        except RuntimeError as error:
            results[way, method] = f"{type(error).__name__}: {error}"
        del model
    model = DistributedDataParallel(network(""), static_graph=True)
    with model.no_sync():
        try:
            penalty(model, samples(0)[0], "auto")
        except ValueError as error:
            results["first without synchronisation"] = str(error)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()  # gloo's threads may end only when nobody talks to them
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("way", "method"), CASES)
def test_each_process_has_the_gradients_of_the_joint_batch(results, way, method):
    options, losses, parted = WAYS[way]
    net = network(way)
    # Else it makes zeros of what is none, which an optimiser can tell.
    zeros = "find_unused_parameters" not in options and "static_graph" not in options
    parts = [slice(0, 4), slice(4, 8)] if parted else [slice(0, 8)]
    critic = (lambda x: tripled(net, (x,), net(x))) if way.startswith("hooked") else net
    gradients, weights = train(critic, net, losses, "double_backward", parts, False, zeros)
    for result in results:
        found = result[way, method]
        assert not isinstance(found, str), found
        for step, (ours, right) in enumerate(zip(found[0], gradients)):
            for a, b in zip(ours, right):
                # DistributedDataParallel may make zeros of a gradient that is none in one process.
                torch.testing.assert_close(
                    torch.zeros(()).double() if a is None else a,
                    torch.zeros_like(a) if b is None and a is not None else torch.zeros(()).double() if b is None else b,
                    rtol=1e-9, atol=1e-11, msg=lambda text, step=step: f"step {step}: {text}",
                )  # fmt: skip
        torch.testing.assert_close(found[1], weights, rtol=1e-9, atol=1e-11)


def test_a_static_graph_is_not_learned_without_synchronisation(results):
    """torch has no gradients then either."""
    for result in results:
        assert (
            "the first backward of a static graph cannot be within no_sync()" in result["first without synchronisation"]
        )


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
