"""Every primitive under every transformation of programs that torch has: the numbers of the plain call, or the error
that the docs promise. The oracle is the eager call, differentiated once, row by row."""

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import gankern
import gankern.functional as GF
from gankern.core import native
from gankern.core.dispatch import Primitive
from gankern.measure import host

FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8


def values(*shape):
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


IMAGES = (4, 4, 6, 6)
MEAN, VAR = values(4), values(4).square() + 0.5
U, V = values(6), values(20)

# (function of tensors and the implementation, their shapes); the first one has the batch, and 4 of it.
CALLS = {
    "bias_act": (lambda x, b, i: GF.bias_act(x, b, activation="leaky_relu", clamp=1.5, implementation=i), IMAGES, (4,)),
    "bias_act silu": (lambda x, b, i: GF.bias_act(x, b, activation="silu", gain=2.0, implementation=i), IMAGES, (4,)),
    "bias_act tanh": (lambda x, b, i: GF.bias_act(x, b, activation="tanh", implementation=i), IMAGES, (4,)),
    "relu": (lambda x, i: GF.relu(x, implementation=i), IMAGES),
    "relu in place": (lambda x, i: GF.relu(x * 1, True, implementation=i), IMAGES),
    "leaky_relu": (lambda x, i: GF.leaky_relu(x, 0.3, implementation=i), IMAGES),
    "pixel_norm": (lambda x, i: GF.pixel_norm(x, implementation=i), IMAGES),
    "bias_act_pixel_norm": (lambda x, b, i: GF.bias_act_pixel_norm(x, b, implementation=i), IMAGES, (4,)),
    "batch_norm_act": (
        lambda x, w, b, i: GF.batch_norm_act(x, None, None, w, b, True, activation="leaky_relu", implementation=i),
        IMAGES,
        (4,),
        (4,),
    ),
    "batch_norm_act in evaluation": (
        lambda x, w, b, i: GF.batch_norm_act(x, MEAN.to(x), VAR.to(x), w, b, activation="relu", implementation=i),
        IMAGES,
        (4,),
        (4,),
    ),
    "group_norm_act": (
        lambda x, w, b, i: GF.group_norm_act(x, 2, w, b, activation="leaky_relu", implementation=i),
        IMAGES,
        (4,),
        (4,),
    ),
    "instance_norm_act": (
        lambda x, w, b, i: GF.instance_norm_act(x, None, None, w, b, activation="leaky_relu", implementation=i),
        IMAGES,
        (4,),
        (4,),
    ),
    "virtual_batch_norm": (
        lambda x, m, s, w, i: GF.virtual_batch_norm(
            x, m, m * m + s * s + 0.1, 8, w, activation="relu", implementation=i
        ),
        IMAGES,
        (4,),
        (4,),
        (4,),
    ),
    "virtual_batch_norm_statistics": (
        lambda x, i: torch.cat(GF.virtual_batch_norm_statistics(x, implementation=i)),
        IMAGES,
    ),
    "minibatch_stddev": (lambda x, i: GF.minibatch_stddev(x, group_size=2, implementation=i), IMAGES),
    "minibatch_discrimination": (
        lambda x, k, i: GF.minibatch_discrimination(x, 0.3 * k, implementation=i),
        (4, 3),
        (3, 2, 4),
    ),
    "l1_similarity": (lambda m, o, i: GF.l1_similarity(m, o, implementation=i), (4, 2, 3), (5, 2, 3)),
    "gradient_penalty": (lambda g, i: GF.gradient_penalty(g, implementation=i), (4, 3, 2)),
    "spectral_norm": (
        lambda w, i: GF.spectral_norm(w, U.to(w), V.to(w), training=False, dialect="biggan", implementation=i),
        (6, 4, 5),
    ),
    "self_attention2d": (
        lambda x, t, p, g, o, s, i: GF.self_attention2d(x, t, p, g, o, s, implementation=i),
        IMAGES,
        (2, 4),
        (2, 4),
        (3, 4),
        (4, 3),
        (),
    ),
    "upfirdn2d": (lambda x, i: GF.upfirdn2d(x, FILTER.to(x), 2, 3, (2, 1, 3, 1), implementation=i), IMAGES),
    "fir_upsample_conv2d": (
        lambda x, w, i: GF.fir_upsample_conv2d(x, w, None, FILTER.to(x), implementation=i),
        IMAGES,
        (3, 4, 3, 3),
    ),
    "conv2d": (
        lambda x, w, b, i: GF.conv2d(x, w, b, padding=1, weight_scale=0.5, implementation=i),
        IMAGES,
        (3, 4, 3, 3),
        (3,),
    ),
    "conv2d 1x1": (lambda x, w, i: GF.conv2d(x, w, implementation=i), (4, 8, 6, 6), (8, 8, 1, 1)),  # a matrix product
    "conv2d 4x4": (lambda x, w, i: GF.conv2d(x, w, None, 2, 1, implementation=i), IMAGES, (3, 4, 4, 4)),
    "conv_transpose2d": (lambda x, w, i: GF.conv_transpose2d(x, w, None, 2, 1, implementation=i), IMAGES, (4, 3, 4, 4)),
    "upsample_conv2d": (lambda x, w, i: GF.upsample_conv2d(x, w, implementation=i), IMAGES, (3, 4, 3, 3)),
    "conv2d_downsample": (lambda x, w, i: GF.conv2d_downsample(x, w, implementation=i), IMAGES, (3, 4, 3, 3)),
}
# A primitive without a call of its own: its case of the smallest tensors, four of its batch. What has the shape of the
# first tensor is made of it, and so has its batch.
CALLED = {"convolution": "conv2d"}  # by another name


def of_case(case):
    first, *others = [tuple(x.shape) for x in case.make(torch.float64, "cpu")]

    def function(x, *given):
        *rest, implementation = given
        rest = iter(rest)
        return case.run(implementation, [x, *((x + 1).cos() if shape == first else next(rest) for shape in others)])

    return function, (4, *first[1:]), *(shape for shape in others if shape != first)


for _name in Primitive.registry.keys() - {CALLED.get(name, name) for name in CALLS} - CALLED.keys():
    CALLS[_name] = of_case(host.cases([_name])[0])
NAMES = list(CALLS)


def call(name, implementation=None):
    function, *_ = CALLS[name]
    return lambda *tensors: function(*tensors, implementation)


def tensors(name, **options):
    return tuple(values(*shape).to(**options) for shape in CALLS[name][1:])


def leaves(name):
    return tuple(x.requires_grad_() for x in tensors(name))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def jacobians(function, inputs):
    """Row by row, by eager backwards."""
    return torch.autograd.functional.jacobian(function, inputs)


def directions(name):
    return tuple(values(*shape, 1).squeeze(-1).cos() for shape in CALLS[name][1:])


def tangent(name):
    """The derivative of the result in that direction."""
    result = 0
    for jacobian, x, direction in zip(jacobians(call(name), tensors(name)), tensors(name), directions(name)):
        result = result + torch.tensordot(jacobian, direction, x.ndim)
    return result


def test_every_primitive_is_in_the_table():
    for name in NAMES:
        call(name, "reference")(*tensors(name))
    assert {CALLED.get(name, name) for name in Primitive.registry} <= {name.partition(" ")[0] for name in NAMES}


# ---- the transformations: each returns what it found and what is right ------------------------------------------


def traced(name):
    inputs = tensors(name)
    return torch.jit.trace(call(name), inputs)(*inputs), call(name)(*inputs)


def traced_for_gradients(name):
    traced = torch.jit.trace(call(name), leaves(name))
    found, expected = leaves(name), leaves(name)
    return gradients(traced, found), gradients(call(name), expected)


def gradients(function, inputs):
    y = function(*inputs)
    return y, *torch.autograd.grad((y * y.detach().cos()).sum(), inputs)


class Module(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.function = call(name)

    def forward(self, *tensors):
        return self.function(*tensors)


def exported(name):
    inputs = tensors(name)
    program = torch.export.export(Module(name), inputs)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [o for o in operators if "gankern" in o]
    return program.module()(*inputs), call(name)(*inputs)


def vmapped(name):
    sets = tuple(torch.stack([x, x.sin(), 2 * x]) for x in tensors(name))
    return torch.func.vmap(call(name))(*sets), torch.stack([call(name)(*one) for one in zip(*sets)])


def per_set_gradients(name):
    sets = tuple(torch.stack([x, x.sin(), 2 * x]) for x in tensors(name))
    wanted = tuple(range(len(sets)))
    found = torch.func.vmap(torch.func.grad(lambda *x: call(name)(*x).square().sum(), wanted))(*sets)
    expected = []
    for one in zip(*sets):
        one = tuple(x.clone().requires_grad_() for x in one)
        expected.append(torch.autograd.grad(call(name)(*one).square().sum(), one))
    return found, tuple(torch.stack(x) for x in zip(*expected))


def reverse_jacobians(name):
    inputs = tensors(name)
    wanted = tuple(range(len(inputs)))
    return torch.func.jacrev(call(name), wanted)(*inputs), jacobians(call(name), inputs)


def forward_jacobians(name):
    inputs = tensors(name)
    return torch.func.jacfwd(call(name), tuple(range(len(inputs))))(*inputs), jacobians(call(name), inputs)


def hessian(name):
    """Forward over reverse, of the first input."""
    first, *others = tensors(name)

    def loss(x):
        return call(name)(x, *others).square().sum()

    found = torch.func.hessian(loss)(first)
    return found, torch.autograd.functional.hessian(loss, first)


def pushed(name):
    found = torch.func.jvp(call(name), tensors(name), directions(name))
    return found, (call(name)(*tensors(name)), tangent(name))


def dual(name):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(tensors(name), directions(name))]
        found = forward_ad.unpack_dual(call(name)(*duals)).tangent
    return found, tangent(name)


def batched_backward(name):
    """A backward of several gradients at once, of a graph that was made without any transformation."""
    inputs = leaves(name)
    y = call(name)(*inputs)
    grads = torch.stack([y.detach().cos(), y.detach().sin()])
    found = torch.autograd.grad(y, inputs, grads, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(call(name)(*inputs), inputs, g) for g in grads]
    return found, tuple(torch.stack(x) for x in zip(*one_by_one))


def batched_double_backward(name):
    inputs = leaves(name)

    def twice(**options):
        y = call(name)(*inputs)
        (first, *_) = torch.autograd.grad(y, inputs, y.detach().cos(), create_graph=True)
        return first, lambda g, **batched: torch.autograd.grad(first, inputs, g, allow_unused=True, **batched)

    first, pull = twice()
    if not first.requires_grad:
        pytest.skip("it has no second derivative")
    grads = torch.stack([first.detach().cos(), first.detach().sin()])
    found = pull(grads, is_grads_batched=True)
    rows = [twice()[1](g) for g in grads]
    return tuple(torch.zeros(()) if f is None else f for f in found), tuple(
        torch.zeros(()) if x[0] is None else torch.stack(x) for x in zip(*rows)
    )


def recorded_batched_backward(name):
    """Several gradients at once, which are differentiated further."""
    return recorded(name, lambda pull, grads: pull(grads, is_grads_batched=True))


def recorded_vmapped_backward(name):
    """The same as torch's page on Jacobians has it: the backward of a graph from outside, under vmap."""
    return recorded(name, lambda pull, grads: torch.func.vmap(pull)(grads))


def recorded(name, batched):
    inputs = leaves(name)

    def second(rows):
        y = call(name)(*inputs)
        grads = torch.stack([y.detach().cos(), y.detach().sin()])
        first = rows(lambda g, **options: torch.autograd.grad(y, inputs, g, create_graph=True, **options), grads)
        if not any(x.requires_grad for x in first):
            return first
        return *first, *torch.autograd.grad(sum(x.square().sum() for x in first), inputs, materialize_grads=True)

    expected = second(lambda pull, grads: tuple(torch.stack(x) for x in zip(*[pull(g) for g in grads])))
    return second(batched), expected


def on_meta(name):
    y = call(name)(*tensors(name, device="meta"))
    assert y.device.type == "meta"
    expected = call(name)(*tensors(name))
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    return (), ()


def fake(name):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(x) for x in tensors(name)]
        y = call(name)(*inputs)
    expected = call(name)(*tensors(name))
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    return (), ()


def autocast(name):
    inputs = tensors(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = call(name)(*inputs), call(name, "reference")(*inputs)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    return (), ()


def checkpointed(name, **options):
    inputs = leaves(name)
    y = checkpoint(call(name), *inputs, **options)
    (y * y.detach().cos()).sum().backward()
    return (y, *(x.grad for x in inputs)), gradients(call(name), leaves(name))


def checkpointed_reentrant(name):
    return checkpointed(name, use_reentrant=True)


def checkpointed_not_reentrant(name):
    return checkpointed(name, use_reentrant=False)


def deepcopied(name):
    """Of the module, and of the graph's leaves."""
    return copy.deepcopy(Module(name))(*copy.deepcopy(leaves(name))), call(name)(*leaves(name))


def compiled(name):
    torch._dynamo.reset()
    run = torch.compile(call(name), fullgraph=True, backend="aot_eager")
    return gradients(run, leaves(name)), gradients(call(name), leaves(name))


def compiled_vmap(name):
    """A transform within torch.compile."""
    torch._dynamo.reset()
    sets = tuple(torch.stack([x, x.sin()]) for x in tensors(name))
    run = torch.compile(torch.func.vmap(call(name)), fullgraph=True, backend="eager")
    return run(*sets), torch.stack([call(name)(*one) for one in zip(*sets)])


TRANSFORMATIONS = [
    traced,
    traced_for_gradients,
    exported,
    vmapped,
    per_set_gradients,
    reverse_jacobians,
    forward_jacobians,
    hessian,
    pushed,
    dual,
    batched_backward,
    batched_double_backward,
    recorded_batched_backward,
    recorded_vmapped_backward,
    on_meta,
    fake,
    autocast,
    checkpointed_reentrant,
    checkpointed_not_reentrant,
    deepcopied,
    compiled,
    compiled_vmap,
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS, ids=lambda f: f.__name__)
def test_transformation(transformation, name):
    found, expected = transformation(name)
    close(found, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "transformation", [f for f in TRANSFORMATIONS if "batched" in f.__name__ or "vmapped_b" in f.__name__]
)
def test_gradients_at_once_without_the_nodes(transformation, name):
    with native.python_gradients():
        found, expected = transformation(name)
    close(found, expected)


@pytest.mark.parametrize("gradients_of", ["nodes", "python"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_inside_of_inference_mode(name, gradients_of):
    """torch's operators record nothing there, whatever the grad mode: `set_grad_enabled(self.training)` in a forward."""
    expected = call(name)(*tensors(name))
    with native.python_gradients() if gradients_of == "python" else contextlib.nullcontext():
        with torch.inference_mode(), torch.set_grad_enabled(True):
            inputs = [x * 1 for x in leaves(name)]  # made there
            found = [call(name)(*each) for each in (leaves(name), inputs)]
    for result in found:
        first, right = (y[0] if isinstance(y, (tuple, list)) else y for y in (result, expected))
        assert first.is_inference() and not first.requires_grad
        close(first.clone(), right)


# ---- what is asked for by name ----------------------------------------------------------------------------------

NATIVE = Primitive.registry["bias_act"].refusals("cpu", torch.float64)["cpu"] is None
needs_native = pytest.mark.skipif(not NATIVE, reason="the native library was not built")

REFUSED = {
    "torch.func.vmap": lambda f, x: torch.func.vmap(f, randomness="same")(*(t[None] for t in x)),
    "torch.func.jvp": lambda f, x: torch.func.jvp(f, x, x),
    "torch.jit.trace": lambda f, x: torch.jit.trace(f, x, check_trace=False),
    "forward-mode differentiation": lambda f, x: in_dual_level(f, x),
    "torch.export": lambda f, x: torch.export.export(wrapped(f), x),
}


def in_dual_level(function, inputs):
    with forward_ad.dual_level():
        return function(*(forward_ad.make_dual(x, x) for x in inputs))


def wrapped(function):
    module = nn.Module()
    module.forward = function
    return module


def operand(name):
    """The primitive's name."""
    name = name.partition(" ")[0]
    others = {
        "fir_upsample_conv2d": "upfirdn2d",
        "bias_act_pixel_norm": "pixel_norm",
        "l1_similarity": "minibatch_discrimination",
        "virtual_batch_norm_statistics": "virtual_batch_norm",
    }
    return others.get(name, "convolution" if "conv" in name else name)


@needs_native
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", [n for n in NAMES if "relu" not in n.partition(" ")[0]])
@pytest.mark.parametrize("transformation", REFUSED)
def test_a_kernel_asked_for_by_name_is_refused_with_the_way_out(transformation, name):
    with pytest.raises(ValueError, match="implementation='reference'") as error:
        REFUSED[transformation](lambda *x: call(name, "cpu")(*x), tensors(name))
    assert str(error.value).startswith(f"{operand(name)}: ")
    assert transformation in str(error.value)


@needs_native
@pytest.mark.parametrize("name", [n for n in NAMES if "relu" not in n.partition(" ")[0]])
def test_gradients_of_torch_func_by_kernels(name):
    inputs = tensors(name)
    found = torch.func.grad(lambda *x: call(name, "cpu")(*x).square().sum())(*inputs)
    close(found, torch.func.grad(lambda *x: call(name, "reference")(*x).square().sum())(*inputs))


def test_outside_of_a_transformation_kernels_run_again():
    x = values(3, 4)
    before = (GF.bias_act(x), gankern.last_implementation("bias_act"))[1]
    torch.func.vmap(GF.bias_act)(x[None])
    assert gankern.last_implementation("bias_act") == "reference"
    assert (GF.bias_act(x), gankern.last_implementation("bias_act"))[1] == before


# ---- other batch sizes, and programs in files -------------------------------------------------------------------

# Whose results depend on nothing but the sample, or on the batch in a way that a program can follow.
BATCHED = [n for n in NAMES if n not in ("spectral_norm", "minibatch_stddev")]


def grown(name):
    first, *others = tensors(name)
    return (torch.cat([first, first.flip(0).sin(), first[:1]]), *others)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", BATCHED)
def test_a_trace_takes_another_batch(name):
    program = torch.jit.trace(call(name), tensors(name))
    close(program(*grown(name)), call(name)(*grown(name)))


@pytest.mark.parametrize("name", BATCHED)
def test_an_exported_program_takes_another_batch(name):
    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = tensors(name)
    shapes = (({0: batch}, *(None for _ in inputs[1:])),)
    program = torch.export.export(Module(name), inputs, dynamic_shapes=shapes, strict=False)
    close(program.module()(*grown(name)), call(name)(*grown(name)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_programs_in_files_need_no_gankern(tmp_path):
    script = ["import sys, torch"]
    for i, name in enumerate(NAMES):
        inputs = tensors(name)
        torch.jit.trace(call(name), inputs).save(str(tmp_path / f"{i}.pt"))
        torch.export.save(torch.export.export(Module(name), inputs, strict=False), tmp_path / f"{i}.pt2")
        torch.save((inputs, call(name)(*inputs)), tmp_path / f"{i}.tensors")
    script += [
        f"for i in range({len(NAMES)}):",
        f"    inputs, expected = torch.load(f'{tmp_path}/{{i}}.tensors')",
        f"    for program in (torch.jit.load(f'{tmp_path}/{{i}}.pt'), "
        f"torch.export.load(f'{tmp_path}/{{i}}.pt2').module()):",
        "        torch.testing.assert_close(program(*inputs), expected, rtol=1e-9, atol=1e-9)",
        "assert 'gankern' not in sys.modules",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(script)], check=True, cwd=tmp_path)
