"""Calls of functions and penalties with one argument that is wrong: a ValueError or TypeError that names it, and never a crash."""

from __future__ import annotations

import inspect
import math

import torch
from drawing import Draw, Problem

import gankern.functional as GF
import gankern.penalties as gp

# By what an argument is. Torch's own options of convolutions are torch's to check.
WRONG = {
    "Tensor": (None, "x", 3, [1.0], 1.5),
    "Tensor | None": ("x", 3, [1.0], torch.ones(2, 3, 4, 5, 6, 7, 8), torch.ones((), dtype=torch.int64)),
    "float": (None, "x", [1.0], math.nan, math.inf),
    "str": (None, "not one", 3),
    "str | None": ("not one", 3),
    "float | None": ("x", [1.0], math.nan),
    "int": (None, "x", [1], 1.5),
}
EXAMPLES = {
    "bias_act": lambda x, c: (x, c),
    "bias_act_pixel_norm": lambda x, c: (x, c),
    "pixel_norm": lambda x, c: (x,),
    "relu": lambda x, c: (x,),
    "leaky_relu": lambda x, c: (x,),
    "minibatch_stddev": lambda x, c: (x,),
    "l1_similarity": lambda x, c: (x[..., 0],),
    "minibatch_discrimination": lambda x, c: (x[:, :, 0, 0], x[0, :, :, :]),
    "gradient_penalty": lambda x, c: (x,),
    "self_attention2d": lambda x, c: (x, x[:, :, 0, 0], x[:, :, 0, 0], x[:, :, 0, 0], x[:, :, 0, 0].mT, c[0]),
    "batch_norm_act": lambda x, c: (x, c, c.square() + 1, c, c),
    "virtual_batch_norm": lambda x, c: (x, c, c.square() + 1, 3, c, c),
    "virtual_batch_norm_statistics": lambda x, c: (x,),
    "upfirdn2d": lambda x, c: (x, c[:2]),
    "upsample2d": lambda x, c: (x, c[:2]),
    "downsample2d": lambda x, c: (x, c[:2]),
    "filter2d": lambda x, c: (x, c[:2]),
    "fir_upsample_conv2d": lambda x, c: (x, x[:, :, :3, :3], c, c),
    "fir_downsample_conv2d": lambda x, c: (x, x[:, :, :3, :3], c, c),
    "spectral_norm": lambda x, c: (x, c, x[0].flatten()),
    "conv2d": lambda x, c: (x, x[:, :, :3, :3], c),
    "conv_transpose2d": lambda x, c: (x, x[:, :, :4, :4], c),
    "group_norm_act": lambda x, c: (x, 1, c, c),
    "instance_norm_act": lambda x, c: (x, c, c.square() + 1, c, c),
    "spectral_norm_group": lambda x, c: ([x], [c], [x[0].flatten()]),
    "upsample_conv2d": lambda x, c: (x, x[:, :, :3, :3], c),
    "conv2d_downsample": lambda x, c: (x, x[:, :, :3, :3], c),
}
PENALTIES = {
    name: lambda x, c: (_critic, x, x + 1)
    for name in ("gradient_penalty", "zero_centered", "lipschitz")
} | {name: lambda x, c: (_critic, x) for name in ("r1_penalty", "r2_penalty", "dragan")}  # fmt: skip


def _critic(x: torch.Tensor) -> torch.Tensor:
    return x.square().flatten(1).sum(1)


def case(seed: int) -> Problem:
    draw = Draw(seed)
    of, examples = draw.choice(((GF, EXAMPLES), (GF, EXAMPLES), (gp, PENALTIES)))
    name = draw.choice(tuple(examples))
    function = getattr(of, name)
    # Four of everything, so that one set of tensors fits all.
    given = examples[name](draw.values((4, 4, 6, 6)), draw.values((4,)))
    parameters = inspect.signature(function).parameters
    arguments = dict(zip(parameters, given))
    changeable = [p for p, q in parameters.items() if q.annotation in WRONG]
    changed = draw.choice(changeable)
    values = WRONG[parameters[changed].annotation]
    if changed in ("up", "down"):
        values = (None, "x", 0, 1.5)  # lists are pairs
    value = draw.choice(values)
    text = f"{name}({changed}={value!r})"
    if torch.is_tensor(value):
        text = f"{name}({changed}=a tensor of {tuple(value.shape)})"
    try:
        function(**{**arguments, changed: value})
    except (ValueError, TypeError) as error:
        return None if changed in str(error) else f"{text}: its message does not name it: {error}"
    except RuntimeError as error:  # torch's own, of its convolutions
        return None if name.startswith("conv") and changed in str(error) else f"{text}: RuntimeError: {error}"
    except Exception as error:
        return f"{text}: {type(error).__name__}: {error}"
    return f"{text}: accepted"
