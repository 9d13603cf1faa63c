"""A tensor that torch keeps negated (a view of other values) is read as what it is, by Triton's kernels too."""

import pytest
import torch
from torch.autograd import grad

import gankern.functional as GF

F64 = torch.float64


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


FUNCTIONS = {
    "bias_act": lambda x, c, i: GF.bias_act(x, c, activation="silu", implementation=i),
    "pixel_norm": lambda x, c, i: GF.pixel_norm(x, implementation=i),
    "bias_act_pixel_norm": lambda x, c, i: GF.bias_act_pixel_norm(x, c, implementation=i),
    "batch_norm_act": lambda x, c, i: GF.batch_norm_act(x, None, None, c, c, True, implementation=i),
    "minibatch_stddev": lambda x, c, i: GF.minibatch_stddev(x, implementation=i),
    "virtual_batch_norm": lambda x, c, i: GF.virtual_batch_norm(x, c, c.square() + 1, 3, c, c, implementation=i),
    "upfirdn2d": lambda x, c, i: GF.upfirdn2d(x, c.detach()[:2], up=2, implementation=i),
    "minibatch_discrimination": lambda x, c, i: GF.minibatch_discrimination(x[:, :, 0, 0], x[0], implementation=i),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_negated_views(name, device):
    x, c = values(4, 4, 3, 3).to(device), values(4, seed=1).to(device)

    def run(x, c, implementation):
        x, c = x.requires_grad_(), c.requires_grad_()
        y = FUNCTIONS[name](x, c, implementation)
        g = torch._neg_view(-values(*y.shape, seed=2).to(device))
        first = grad(y, [x, c], g, create_graph=True, allow_unused=True)
        if name == "upfirdn2d":  # which is linear
            return [y, *first]
        return [y, *first, *grad(first[0].square().sum(), x, allow_unused=True)]

    ours = run(torch._neg_view(-x), torch._neg_view(-c), "triton")
    for a, b in zip(ours, run(x.clone(), c.clone(), "reference")):
        assert (a is None) == (b is None) or not (b if a is None else a).any()
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
