"""One table of activations: C++, Triton, the reference and every function and layer agree with it."""

import re
from pathlib import Path

import pytest
import torch

import gankern.functional as GF
import gankern.nn as gnn
from gankern.core import activations
from gankern.reference import bias_act as reference

ROOT = Path(__file__).parents[2]
NAMES = [row.name for row in activations.KERNELS]


def test_the_header_has_the_same_rows():
    """csrc/cpu/activation.h: the enumeration, its count, and for each row whether the input is kept and a second
    derivative exists."""
    header = (ROOT / "csrc/cpu/activation.h").read_text()
    rows = re.findall(r"k(\w+)", re.search(r"enum class Activation \{(.*?)\};", header, re.DOTALL)[1])
    assert [re.sub(r"(?<!^)(?=[A-Z])", "_", row).lower() for row in rows] == NAMES
    assert int(re.search(r"kActivations = (\d+)", header)[1]) == len(NAMES)
    structs = {
        name: (base, dict(re.findall(r"(k\w+) = (true|false)", body)))
        for name, base, body in re.findall(
            r"struct Act<Activation::k(\w+), A>(?: : Act<Activation::k(\w+), A>)? \{(.*?)\n\};", header, re.DOTALL
        )
    }

    def said(name):
        base, own = structs[name]
        return (said(base) if base else {}) | own

    for i, (row, name) in enumerate(zip(activations.KERNELS, rows, strict=True)):
        expected = {"kOfInput": str(row.keeps_input).lower(), "kSecond": str(row.curved).lower()}
        assert said(name) == expected and row.index == i, name


def test_triton_has_the_same_rows():
    pytest.importorskip("triton")
    from gankern.triton import bias_act

    assert list(bias_act.ACTIVATIONS) == NAMES
    source = (ROOT / "gankern/triton/bias_act.py").read_text()
    assert set(re.findall(r'ACT == "(\w+)"', source)) <= set(NAMES)


def test_the_reference_and_the_public_list_have_the_same_rows():
    assert tuple(reference.ACTIVATIONS) == GF.ACTIVATIONS == tuple(NAMES[:-2]) == tuple(activations.ACTIVATIONS)
    assert NAMES[-2:] == [activations.LEAKY_RELU_OF_INPUT.name, activations.PRELU.name]
    for row in activations.ACTIVATIONS.values():  # and the second derivative is there where the table says so
        z = torch.tensor([-1.5, 0.5], dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(reference.ACTIVATIONS[row.name](z, 0.2).sum(), z, create_graph=True)
        second = torch.autograd.grad(first.sum(), z, allow_unused=True)[0] if first.requires_grad else None
        assert (second is not None and bool(second.any())) == row.curved, row.name


X, VECTOR = torch.linspace(-2, 3, 24).reshape(2, 3, 4), torch.ones(3)
TAKE_AN_ACTIVATION = {
    "bias_act": lambda **o: GF.bias_act(X, VECTOR, **o),
    "bias_act_pixel_norm": lambda **o: GF.bias_act_pixel_norm(X, VECTOR, **o),
    "batch_norm_act": lambda **o: GF.batch_norm_act(X, None, None, **o),
    "virtual_batch_norm": lambda **o: GF.virtual_batch_norm(X, VECTOR, 2 * VECTOR, 4, **o),
    "BiasAct": lambda **o: gnn.BiasAct(3, **o)(X),
    "BiasActPixelNorm": lambda **o: gnn.BiasActPixelNorm(3, **o)(X),
    "BatchNormAct1d": lambda **o: gnn.BatchNormAct1d(3, **o)(X),
    "ConditionalBatchNorm2d": lambda **o: gnn.ConditionalBatchNorm2d(3, 2, **o)(X[..., None], torch.tensor([0, 1])),
    "VirtualBatchNorm1d": lambda **o: _with_reference(gnn.VirtualBatchNorm1d(3, **o))(X),
}


def _with_reference(layer):
    torch.nn.init.ones_(layer.weight)
    gnn.set_reference_batch(layer, X + 1)
    return layer


@pytest.mark.parametrize("function", TAKE_AN_ACTIVATION)
def test_none_and_linear_are_the_same_everywhere(function):
    call = TAKE_AN_ACTIVATION[function]
    none, linear, relu = (call(activation=a) for a in (None, "linear", "relu"))
    assert torch.equal(none, linear) and none.min() < 0 <= relu.min()
    rest = {} if function[0].isupper() else {"implementation": "reference"}
    torch.testing.assert_close(call(activation="linear", **rest), none)
    torch.testing.assert_close(call(activation=None, **rest), none)


@pytest.mark.parametrize("function", TAKE_AN_ACTIVATION)
def test_one_text_for_what_is_no_activation(function):
    with pytest.raises(
        ValueError, match=rf"^{function}: activation is 'gelu'; accepted are 'linear', 'relu', 'leaky_relu'"
    ):
        TAKE_AN_ACTIVATION[function](activation="gelu")
    with pytest.raises(TypeError, match=f"^{function}: negative_slope is 'steep'; it must be a number"):
        TAKE_AN_ACTIVATION[function](activation="leaky_relu", negative_slope="steep")
