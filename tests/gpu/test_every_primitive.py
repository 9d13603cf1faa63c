"""What every primitive must do on a real GPU, on the cases that `gankern verify` has: `make gpu` runs this.

Right against fp64 in every order and dtype, the same bits every time, on any stream, and within a CUDA graph.
"""

import pytest
import torch

from gankern.core.dispatch import FLOATING, Primitive, last_implementation
from gankern.measure import verification
from gankern.measure.cases import all_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]

DEVICE = "cuda"
CASES = [
    pytest.param(case, implementation.name, id=f"{case.primitive}-{case.name}-{implementation.name}")
    for case in all_cases()
    for implementation in Primitive.registry[case.primitive].implementations
    if case.verify and implementation.name in ("triton", "cuda") and implementation.name not in case.without
]


def skip_unless_it_can(case, implementation, dtype):
    refusal = Primitive.registry[case.primitive].refusals(DEVICE, dtype)[implementation]
    if refusal:
        pytest.skip(refusal)


def step_of(case, implementation, dtype=torch.float32):
    """A function that runs forward and backward on fixed inputs and returns the outputs and the gradients."""
    inputs = case.make(dtype, DEVICE)
    buffers = [(x, x.detach().clone()) for x in inputs if not x.requires_grad]
    leaves = [x for x in inputs if x.requires_grad]

    def step():
        for buffer, first in buffers:
            buffer.copy_(first)
        outputs = case.run(implementation, inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        # A cotangent that is no constant: a kernel that reads the wrong element would show.
        cotangents = [torch.linspace(-1, 1, y.numel(), device=DEVICE).to(y.dtype).view(y.shape) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]

    return step


def copies(tensors):
    return [x.detach().clone() for x in tensors]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("case", "implementation"), CASES)
def test_every_order_against_fp64(case, implementation, dtype):
    skip_unless_it_can(case, implementation, dtype)
    for check in verification.check(case, implementation, dtype, DEVICE):
        assert check.passed, f"{check.mode}: error {check.error:.3g}, allowed {check.bound:.3g}"


@pytest.mark.parametrize(("case", "implementation"), CASES)
def test_same_bits_every_time(case, implementation, same_bits):
    skip_unless_it_can(case, implementation, torch.float32)
    step = step_of(case, implementation)
    first = copies(step())
    assert last_implementation(case.primitive) == implementation
    for _ in range(10):
        same_bits(copies(step()), first)


@pytest.mark.parametrize(("case", "implementation"), CASES)
def test_other_stream(case, implementation, same_bits):
    """Behind a long wait on a stream of its own: a kernel launched elsewhere would come too early."""
    skip_unless_it_can(case, implementation, torch.float32)
    step = step_of(case, implementation)
    expected = copies(step())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        results = copies(step())
    stream.synchronize()
    same_bits(results, expected)


@pytest.mark.parametrize(("case", "implementation"), CASES)
def test_two_streams_at_once(case, implementation, same_bits):
    """The same operator on two streams, each with inputs of its own, call by call in turn: whatever a kernel kept
    outside of its arguments, the other one's would overwrite."""
    skip_unless_it_can(case, implementation, torch.float32)
    steps = [step_of(case, implementation), step_of(case, implementation)]
    expected = [copies(step()) for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream in streams:  # both begin behind a wait, so that they run side by side
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
    results = [[], []]
    for _ in range(5):
        for stream, step, found in zip(streams, steps, results):
            with torch.cuda.stream(stream):
                found.append(copies(step()))
    torch.cuda.synchronize()
    for found, right in zip(results, expected):
        for one in found:
            same_bits(one, right)


@pytest.mark.parametrize(("case", "implementation"), CASES)
def test_cuda_graph(case, implementation, same_bits):
    """Forward and backward captured once; a replay gives what eager execution gives, also for new values."""
    skip_unless_it_can(case, implementation, torch.float32)
    step = step_of(case, implementation)
    expected = copies(step())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for x in captured:
            x.detach().zero_()
        graph.replay()
        torch.cuda.synchronize()
        same_bits(copies(captured), expected)
