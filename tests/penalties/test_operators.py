"""torch's own operators with torch's own sample inputs, as the middle of a critic, through the tangent form against
double backward in fp64: with each subset of an operator's tensors computed from the critic's input, and the others
parameters, so that whatever rule an operator has is right whichever of its operands carry a tangent.

The operators that have rules of their own run always, two samples each; GANKERN_ALL_OPERATORS=1 runs all of torch's
operators, and more samples of each. A failing case is one line, which runs it again:

    python tests/penalties/test_operators.py nn.functional.linear functional 0 5
"""

import copy
import os
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db

import gankern.functional as GF
from gankern.tangent.method import NotCovered, penalty_gradients

ALL = bool(os.environ.get("GANKERN_ALL_OPERATORS"))
SAMPLES = 6 if ALL else 2

# Those with rules, sets or refusals of their own in gankern/tangent/rules.py, and their relatives.
COMMON = {
    *("nn.functional.conv1d", "nn.functional.conv2d", "nn.functional.conv3d", "nn.functional.conv_transpose2d"),
    *(
        "nn.functional.linear",
        "addmm",
        "mm",
        "bmm",
        "matmul",
        "mv",
        "dot",
        "vdot",
        "addmv",
        "addbmm",
        "baddbmm",
        "addr",
    ),
    *("mul", "div", "add", "sub", "rsub", "neg", "lerp", "addcmul", "addcdiv", "where", "maximum", "minimum", "clamp"),
    *("sum", "mean", "amax", "max", "min", "sort", "topk", "median", "kthvalue", "cumsum", "std", "var", "norm"),
    *("view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "t", "expand", "select", "narrow", "split"),
    *("split_with_sizes", "unbind", "chunk", "cat", "stack", "roll", "flip", "repeat", "diagonal", "unfold", "tril"),
    *("clone", "to", "constant_pad_nd", "nn.functional.pad", "as_strided", "slice_scatter", "select_scatter"),
    *("gather", "scatter", "scatter_add", "index_put", "index_add", "index_select", "index_copy", "index_fill"),
    *("masked_fill", "masked_scatter", "masked_select", "take", "take_along_dim", "put", "quantile", "__getitem__"),
    *("nn.functional.relu", "nn.functional.leaky_relu", "nn.functional.prelu", "nn.functional.hardtanh", "abs"),
    *("nn.functional.threshold", "nn.functional.relu6", "nn.functional.batch_norm", "nn.functional.instance_norm"),
    *("nn.functional.layer_norm", "nn.functional.group_norm", "native_batch_norm", "nn.functional.embedding"),
    *("nn.functional.max_pool2d", "nn.functional.avg_pool2d", "nn.functional.interpolate", "nn.functional.dropout"),
    *("nn.functional.bilinear", "nn.functional.softmax", "nn.functional.rrelu", "nn.functional.unfold"),
    *(
        "square",
        "pow",
        "ldexp",
        "polygamma",
        "float_power",
        "complex",
        "polar",
        "view_as_complex",
        "view_as_real",
        "real",
        "imag",
        "conj",
        "angle",
        "stft",
        "istft",
    ),
    *("fft.fft", "fft.ifft", "fft.rfft", "fft.irfft", "fft.rfft2", "fft.fftshift", "floor", "sign", "round", "frac"),
}


def _eligible(op) -> bool:
    names = {op.name, op.name.removeprefix("_refs.")}
    return op.supports_autograd and torch.float64 in op.supported_dtypes("cpu") and (ALL or names & COMMON)


OPERATORS = [op for op in op_db if _eligible(op)]


def _name(op) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


class Critic(nn.Module):
    """y = f(operands), each of which is a sample plus what depends linearly on the input, or a parameter; then a
    function of y that is linear, so that all curvature is the operator's, or quadratic, so that some lies above it."""

    quadratic = 0.0

    def __init__(self, function, arguments, keywords, active, floating):
        super().__init__()
        self.function, self.active = function, active
        self.arguments, self.keywords, self.floating = arguments, keywords, floating
        self.bases = nn.ParameterList(nn.Parameter(x.detach().clone()) for x in floating)
        self.weights = nn.ParameterList(
            nn.Parameter(0.01 * torch.randn(x.numel(), 6, dtype=torch.float64).to(x.dtype)) for x in floating
        )

    def forward(self, x):
        values = []
        for i, base in enumerate(self.bases):
            moved = self.weights[i] @ x.flatten().to(base.dtype)
            values.append(base + moved.reshape(base.shape) if self.active >> i & 1 else base)
        places = {id(old): new for old, new in zip(self.floating, values)}

        def put(value):
            if isinstance(value, torch.Tensor):
                return places.get(id(value), value)
            if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
                return type(value)(put(v) for v in value)
            return value

        result = self.function(*map(put, self.arguments), **{k: put(v) for k, v in self.keywords.items()})
        outputs = (result,) if isinstance(result, torch.Tensor) else result
        total = 0
        for k, y in enumerate(outputs):
            if isinstance(y, torch.Tensor) and (y.is_floating_point() or y.is_complex()) and y.requires_grad:
                for part in (y.real, y.imag) if y.is_complex() else (y,):
                    factors = torch.linspace(0.5, 1.5 + k, part.numel(), dtype=part.dtype).view(part.shape)
                    total = total + (part * factors).sum()
                    if self.quadratic:
                        total = total + self.quadratic * (part * part * factors).sum()
        return total


def penalty(gradients):
    (g,) = gradients
    return g.square().sum() + g.sum(), [2 * g + 1]


def expected(critic, x):
    """By double backward; None where plain torch has none, or no finite one."""
    x = x.detach().requires_grad_()
    try:
        output = critic(x)
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            return None
        (g,) = torch.autograd.grad(output, x, create_graph=True, allow_unused=True)
        if g is None:
            return None
        value = g.square().sum() + g.sum()
        parameters = list(critic.parameters())
        found = (
            torch.autograd.grad(value, parameters, allow_unused=True)
            if value.requires_grad
            else [None] * len(parameters)
        )
    except (RuntimeError, NotImplementedError):
        return None
    found = [torch.zeros_like(p) if f is None else f for p, f in zip(parameters, found)]
    return (value.detach(), found) if value.isfinite() and all(f.isfinite().all() for f in found) else None


def cases(op, variant):
    """(arguments, keywords, floating-point tensors among them, how many subsets) of each sample."""
    torch.default_generator.manual_seed(0)
    samples = op.sample_inputs("cpu", torch.float64, requires_grad=False)
    for number, sample in zip(range(SAMPLES if ALL else 12), samples):
        arguments, keywords = (sample.input, *sample.args), dict(sample.kwargs)
        floating = []
        for value in [*arguments, *keywords.values()]:
            for x in value if isinstance(value, (list, tuple)) else (value,):
                is_one = isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
                if is_one and x.layout == torch.strided and all(x is not y for y in floating):
                    floating.append(x)
        if floating and 0 < sum(x.numel() for x in floating) <= 3000:
            yield number, arguments, keywords, floating


def subsets(count):
    return range(1, 2**count) if count <= 4 else [1, 2, 2**count - 1]


def run(op, variant, number, arguments, keywords, floating, active) -> str | None:
    """None where it is right, refused, or plain torch has no answer; else what is wrong."""
    function = op.op if variant == "functional" else _in_place(op.inplace_variant)
    return compare(Critic(function, arguments, keywords, active, floating))


def compare(critic, covered: bool = False) -> str | None:
    """``covered``: neither a refusal nor the lack of an answer is right."""
    for critic.quadratic in (0.0, 0.1):
        problem = compare_one(critic, covered)
        if problem:
            return problem
    return None


def compare_one(critic, covered: bool) -> str | None:
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    torch.default_generator.manual_seed(1)
    want = expected(copy.copy(critic), x)
    if want is None:
        return "plain torch has no answer" if covered else None
    torch.default_generator.manual_seed(1)
    try:
        value, parameters, gradients = penalty_gradients(critic, [x], penalty)
    except NotCovered as error:
        return str(error) if covered else None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    found = dict(zip(parameters, gradients))
    scale = max(1e-6, max(f.abs().max().item() for f in want[1] if f.numel()))
    if abs(value - want[0]) > 1e-8 * (1 + abs(want[0])):
        return f"penalty {value.item()} for {want[0].item()}"
    for p, f in zip(critic.parameters(), want[1]):
        error = (found.get(p, torch.zeros_like(p)) - f).abs().max().item() if f.numel() else 0
        if not error <= 1e-7 * scale:
            return f"gradient wrong by {error:.2e} of {scale:.2e}"
    return None


def _in_place(function):
    def call(x, *arguments, **keywords):
        y = x.clone()
        return function(y, *arguments, **keywords)

    return call


def wrongs(op, variant, only=None):
    warnings.simplefilter("ignore")
    for done, (number, arguments, keywords, floating) in enumerate(cases(op, variant)):
        if only is None and done >= SAMPLES:
            break
        for active in subsets(len(floating)):
            if only is None or only == (number, active):
                problem = run(op, variant, number, arguments, keywords, floating, active)
                if problem:
                    yield f"python tests/penalties/test_operators.py {_name(op)} {variant} {number} {active}  # {problem}"


VARIANTS = [
    (op, variant)
    for op in OPERATORS
    for variant in ("functional", "in place")
    if variant == "functional" or op.inplace_variant is not None
]


@pytest.mark.parametrize(("op", "variant"), VARIANTS, ids=[f"{_name(op)}, {variant}" for op, variant in VARIANTS])
def test_operator(op, variant):
    lines = list(wrongs(op, variant))
    assert not lines, "\n".join(lines)


R = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=R)


# This library's primitives, by the names of their cases: a function and its operands.
PRIMITIVES = {
    **{
        f"bias_act, {activation}": (
            lambda x, b, a=activation: GF.bias_act(x, b, activation=a),
            randn(3, 4, 5),
            randn(4),
        )
        for activation in ("linear", "relu", "leaky_relu", "tanh", "silu", "softplus")
    },
    "bias_act, clamped": (lambda x, b: GF.bias_act(x, b, activation="leaky_relu", clamp=0.5), randn(3, 4), randn(4)),
    "batch_norm_act, evaluation": (
        lambda x, w, b: GF.batch_norm_act(
            x, torch.zeros(4).to(x), torch.ones(4).to(x), w, b, training=False, activation="leaky_relu"
        ),
        *(randn(2, 4, 3, 3), randn(4), randn(4)),
    ),
    "pixel_norm": (GF.pixel_norm, randn(2, 4, 3, 3)),
    "minibatch_stddev": (lambda x: GF.minibatch_stddev(x, group_size=2), randn(4, 3, 3, 3)),
    "minibatch_discrimination": (GF.minibatch_discrimination, randn(4, 5), randn(5, 3, 2)),
    "self_attention2d": (
        GF.self_attention2d,
        *(randn(2, 4, 4, 6), randn(2, 4), randn(2, 4), randn(3, 4), randn(4, 3), randn(1)),
    ),
    "conv2d": (lambda x, w, b: GF.conv2d(x, w, b, padding=1), randn(2, 3, 6, 6), randn(4, 3, 3, 3), randn(4)),
    "conv2d, strided": (lambda x, w, b: GF.conv2d(x, w, b, 2, 1), randn(2, 3, 8, 8), randn(4, 3, 4, 4), randn(4)),
    "conv_transpose2d": (
        lambda x, w, b: GF.conv_transpose2d(x, w, b, 2, 1),
        *(randn(2, 3, 4, 4), randn(3, 4, 4, 4), randn(4)),
    ),
    "a convolution by a row of the engine": (
        lambda x, w, b: GF.conv2d(x, w, b, padding=1, implementation="cpu"),
        *(randn(2, 8, 8, 8), randn(8, 8, 3, 3), randn(8)),
    ),
    "upfirdn2d": (lambda x: GF.downsample2d(x, torch.tensor([1.0, 3, 3, 1]).to(x)), randn(2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(name):
    function, *operands = PRIMITIVES[name]
    problems = []
    for active in subsets(len(operands)):
        torch.default_generator.manual_seed(0)
        critic = Critic(function, operands, {}, active, operands)
        problems.append(compare(critic, covered=True))
    assert not any(problems), problems


if __name__ == "__main__":
    name, variant, number, active = sys.argv[1:]
    (op,) = [op for op in op_db if _name(op) == name]
    print(*wrongs(op, variant, (int(number), int(active))) or ["right, refused, or not differentiable twice"], sep="\n")
