"""What every primitive must do, as one table over the cases that `gankern verify` runs: a new primitive is held to it by
its file in gankern/measure/cases. What is a primitive's own is in the file of its name."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gankern
from gankern.core import native
from gankern.core.dispatch import FLOATING, Primitive, short
from gankern.core.native import NATIVE_MISSING
from gankern.measure import verification
from gankern.measure.cases import all_cases

CASES = [case for case in all_cases() if case.verify]
QUICK = [case for case in CASES if case.quick]

pytestmark = pytest.mark.skipif(bool(NATIVE_MISSING), reason="the native library was not built")
of_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.primitive}: {case.name}")
of_quick_cases = pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.primitive}: {case.name}")


def outputs_of(case, inputs, implementation="cpu"):
    outputs = case.run(implementation, inputs)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def of_every_order(case, inputs):
    """Outputs, gradients and gradients of gradients, for fixed cotangents."""
    outputs = outputs_of(case, inputs)
    leaves = [x for x in inputs if x.requires_grad]
    cotangents = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).requires_grad_() for y in outputs]
    first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    product = sum((g * torch.linspace(1, 2, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in first)
    second = torch.autograd.grad(product, [*leaves, *cotangents], allow_unused=True)
    return [x.detach().clone() for x in (*outputs, *first, *(g for g in second if g is not None))]


def test_every_primitive_has_cases():
    assert {case.primitive for case in QUICK} == set(Primitive.registry)


@of_cases
@pytest.mark.parametrize("dtype", FLOATING, ids=short)
def test_as_right_as_torch_in_every_dtype_and_order(case, dtype):
    checks = verification.check(case, "cpu", dtype, "cpu")  # which raises where another implementation ran
    assert [check for check in checks if not check.passed] == []


# Spectral norm's vectors are constants to its gradient and move on in the forward: its own file has what is exact.
@pytest.mark.parametrize(
    "case", [c for c in QUICK if c.primitive != "spectral_norm"], ids=lambda case: f"{case.primitive}: {case.name}"
)
def test_gradients_are_exact(case):
    inputs = case.make(torch.float64, "cpu")
    leaves = [i for i, x in enumerate(inputs) if x.requires_grad]

    def run(*tensors):
        given = [x.clone() for x in inputs]  # buffers move on: each call has its own
        for i, x in zip(leaves, tensors):
            given[i] = x
        return tuple(y for y in outputs_of(case, given) if y.requires_grad)

    tensors = [inputs[i] for i in leaves]
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True, atol=1e-6)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True, atol=1e-6)
    assert gankern.last_implementation(case.primitive) == "cpu"


@of_quick_cases
def test_what_is_differentiated_is_not_written(case):
    inputs = case.make(torch.float32, "cpu")
    before = [(x.detach().clone(), x._version) for x in inputs]
    of_every_order(case, inputs)
    for x, (value, version) in zip(inputs, before):
        assert not x.requires_grad or (x._version == version and torch.equal(x, value))


def _doubled_in_part(y):
    y[:1].mul_(2) if y.ndim else y.mul_(2)
    return y


# What overwrites a result, and the same without.
IN_PLACE = {
    "leaky_relu_": (lambda y: F.leaky_relu(y, 0.2, inplace=True), lambda y: F.leaky_relu(y, 0.2)),
    "mul_": (lambda y: y.mul_(2), lambda y: 2 * y),
    "add_": (lambda y: y.add_(1), lambda y: y + 1),
    "a view": (_doubled_in_part, lambda y: torch.cat([2 * y[:1], y[1:]]) if y.ndim else 2 * y),
}
# They keep their result, in place of what came before it, which torch's formulation keeps (docs/bias_act.md and
# docs/pixel_norm.md), or return both statistics as views. What is overwritten is then refused.
NORMS = {"batch_norm_act", "instance_norm_act", "group_norm_act", "pixel_norm", "virtual_batch_norm"}
KEEP_THEIR_RESULT = {"bias_act"} | NORMS
REFUSALS = ("modified by an inplace operation", "is a view and is being modified inplace")


@of_quick_cases
@pytest.mark.parametrize("gradients_of", ["nodes", "python"])
@pytest.mark.parametrize("change", IN_PLACE)
def test_a_result_that_is_overwritten(change, gradients_of, case):
    """As behind the formula; or torch's error, from the primitives that are known to keep what they return."""

    def run(implementation):
        inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in case.make(torch.float64, "cpu")]
        outputs = [
            IN_PLACE[change][implementation == "reference"](y)
            for y in outputs_of(case, inputs, implementation)
            if y.requires_grad
        ]
        leaves = [x for x in inputs if x.requires_grad]
        cotangents = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in outputs]
        first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
        product = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(product, leaves, allow_unused=True) if product.requires_grad else ()
        return [*outputs, *first, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, second))]

    right = run("reference")
    with native.python_gradients() if gradients_of == "python" else contextlib.nullcontext():
        try:
            ours = run("cpu")
        except RuntimeError as error:
            assert any(words in str(error) for words in REFUSALS)
            assert case.primitive in KEEP_THEIR_RESULT
            return
    for a, b in zip(ours, right):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@of_quick_cases
def test_any_strides(case):
    """Each input apart with gaps between its values, and starting behind others."""
    expected = of_every_order(case, case.make(torch.float64, "cpu"))
    for i in range(len(case.make(torch.float64, "cpu"))):
        inputs = case.make(torch.float64, "cpu")
        x = inputs[i]
        if x.ndim == 0 or not x.is_floating_point():
            continue
        gaps = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        strided = gaps[..., 1::2]
        strided.copy_(x.detach())
        inputs[i] = strided.requires_grad_(x.requires_grad)
        for a, b in zip(of_every_order(case, inputs), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def _close(a, b):
    return (a - b).abs().max() <= 1e-5 * b.abs().max()


@of_cases
def test_the_number_of_threads_does_not_matter(case):
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(of_every_order(case, case.make(torch.float32, "cpu")))
    finally:
        torch.set_num_threads(before)
    # Around attention are torch's convolutions: of the operator alone, see test_self_attention2d.py.
    same = _close if case.primitive == "self_attention2d" else torch.equal
    for run in runs[1:]:
        assert all(same(a, b) for a, b in zip(runs[0], run, strict=True))


def test_every_instruction_set(instruction_set):
    script = (
        "import torch\n"
        "from gankern.measure import verification\n"
        "from gankern.measure.cases import all_cases\n"
        "for case in all_cases():\n"
        "    for dtype in (torch.float64, torch.float32, torch.bfloat16) if case.verify and case.quick else ():\n"
        "        checks = verification.check(case, 'cpu', dtype, 'cpu')\n"
        "        assert all(check.passed for check in checks), checks\n"
        "from gankern import _C\n"
        "print(_C.instruction_set())\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instruction_set, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if instruction_set == "default":
        assert "avx" not in done.stdout.lower()


@of_quick_cases
def test_what_is_exact_to_second_order_refuses_the_third(case):
    (kernel,) = (i for i in Primitive.registry[case.primitive].implementations if i.name == "cpu")
    inputs = case.make(torch.float64, "cpu")
    leaves = [x for x in inputs if x.requires_grad]
    found = [y for y in outputs_of(case, inputs) if y.requires_grad]
    refused = pytest.raises(RuntimeError, match=r"order 2|implementation='reference'")
    with refused if kernel.gradient_order == 2 else contextlib.nullcontext():
        for _ in range(3):
            grads = torch.autograd.grad(sum((y * y).sum() for y in found), leaves, create_graph=True, allow_unused=True)
            found = [g for g in grads if g is not None]


@of_quick_cases
def test_compiles_to_one_graph(case):
    def run(*tensors):
        return tuple(outputs_of(case, tensors, None))

    torch._dynamo.reset()
    with torch.no_grad():
        expected = run(*case.make(torch.float32, "cpu"))
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(*case.make(torch.float32, "cpu"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# Files of a primitive's own tests that say what it computes of shapes that are shared out to threads in every way.
SHARED_OUT = [file for file in sorted(Path(__file__).parent.glob("test_*.py")) if "\ndef all_bits(" in file.read_text()]


@pytest.mark.parametrize("file", SHARED_OUT, ids=lambda file: file.stem)
def test_larger_shapes_have_the_same_bits_on_every_number_of_threads(file, same_bits):
    spec = importlib.util.spec_from_file_location(f"{file.stem}_bits", file)
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    same_bits(tests.all_bits)
