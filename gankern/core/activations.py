"""The activations, in one table: what every kernel, rule and check knows of them stands here.

A row's place is its number in all kernels: in csrc/cpu/activation.h, which has the formulas, and in
gankern/triton/bias_act.py. A test holds them together.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Activation:
    name: str
    index: int  # in every kernel's table
    keeps_input: bool  # for the backward; else the result, which costs nothing where the next layer keeps it anyway
    curved: bool  # whether it has a second derivative


_ROWS = (
    # name, keeps_input, curved
    ("linear", False, False),
    ("relu", False, False),
    ("leaky_relu", False, False),
    ("tanh", False, True),
    ("sigmoid", False, True),
    ("elu", False, True),
    ("selu", False, True),
    ("softplus", False, True),
    ("silu", True, True),
    # Of a negative slope: the result's sign does not tell that of the input. No name of the public's.
    ("leaky_relu_of_input", True, False),
    # Its slope is a tensor, with a gradient: operators of its own.
    ("prelu", True, False),
)
KERNELS = tuple(Activation(name, index, *row) for index, (name, *row) in enumerate(_ROWS))
ACTIVATIONS = {row.name: row for row in KERNELS[:-2]}  # what a number says; "prelu" takes a tensor
LEAKY_RELU_OF_INPUT, PRELU = KERNELS[-2:]
PIECEWISE = ("linear", "relu", "leaky_relu")  # what can stand behind a normalisation, in its pass: one slope says it


def row(activation: str, negative_slope: float) -> Activation:
    """The row whose kernels compute the activation.

    >>> row("leaky_relu", 0.2).name, row("leaky_relu", -0.2).name
    ('leaky_relu', 'leaky_relu_of_input')
    """
    return LEAKY_RELU_OF_INPUT if activation == "leaky_relu" and negative_slope < 0 else ACTIVATIONS[activation]


def slope(activation: str | None, negative_slope: float) -> float:
    """The derivative for negative arguments, of an activation that is one of ``PIECEWISE``, or None. That of "prelu" is
    a tensor's to say.

    >>> slope(None, 0.2), slope("relu", 0.2), slope("leaky_relu", 0.2)
    (1.0, 0.0, 0.2)
    """
    return float({None: 1.0, "linear": 1.0, "relu": 0.0, "leaky_relu": negative_slope, "prelu": 1.0}[activation])
