"""Launches that C++ makes by plans, on a real GPU; tests/triton/cpp_plan_checks.py has what needs none."""

import array

import pytest
import torch

import gankern.functional  # noqa: F401  (defines the operators)
from gankern.core import native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(native.NODES_MISSING is not None, reason=str(native.NODES_MISSING)),
    pytest.mark.skipif(torch.version.hip is not None, reason="C++ launches by CUDA's driver"),
]
OPTIONS = 1, 2, 0.2, 1.0, None  # along the channels, a leaky ReLU


@pytest.fixture
def known():
    """The launcher of bias_act, its arguments, and the key of their plan."""
    from gankern.triton import bias_act

    given = torch.randn(2, 6, 5, 7, device="cuda"), torch.randn(6, device="cuda"), *OPTIONS
    bias_act.forward(*given)
    return bias_act.forward, given, native.nodes.signature(given, False)


def test_this_triton_launches_as_cpp_does(known):
    launcher, given, key = known
    assert launcher.plans[key].native is not None


def test_a_plan_gives_what_python_gives(known, same_bits):
    from gankern.triton import launch

    launcher, given, key = known
    other = [(torch.randn_like(given[0]), torch.randn_like(given[1]), *OPTIONS) for _ in range(3)]
    with launch._unplanned():
        right = [launcher(*arguments) for arguments in other]
    by_plan = [native.nodes.by_plan(launcher.plans, arguments, False) for arguments in other]
    assert all(type(found) is tuple for found in by_plan)
    same_bits([y for (y,) in by_plan], right)
    operator = torch.ops.gankern.bias_act.default
    for _ in range(2):
        same_bits([operator(*arguments) for arguments in other], right)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = [operator(*arguments) for arguments in other]
    stream.synchronize()
    same_bits(ours, right)


def test_errors_of_the_driver_are_raised(known):
    launcher, given, key = known
    # The handle of a kernel, with more threads than any device has.
    from gankern.triton import launch

    handle = next(iter(launch._handles.values()))
    of_kernel = array.array("q", (handle.function, 1, 1, 1, 1 << 20, 0, 0)).tobytes()
    plan = native.nodes.plan(given[0].get_device(), 2, b"", of_kernel, array.array("q", (1, 0)).tobytes())
    with pytest.raises(RuntimeError, match=r"Triton Error \[CUDA\]: \w"):
        native.nodes.by_plan({key: launcher.plans[key]._replace(native=plan)}, given, False)
    torch.testing.assert_close(launcher(*given), launcher(*given))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device_than_the_current_one_is_pythons(known, same_bits):
    launcher, given, _ = known
    elsewhere = given[0].to("cuda:1"), given[1].to("cuda:1"), *OPTIONS
    right = launcher(*given).cpu()
    for _ in range(3):
        y = launcher(*elsewhere)
        assert y.get_device() == 1
        same_bits([y.cpu()], [right])
    assert type(native.nodes.by_plan(launcher.plans, elsewhere, False)) is not tuple
    with torch.cuda.device(1):
        same_bits([launcher(*elsewhere).cpu()], [right])
