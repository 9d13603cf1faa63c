"""The Triton kernels of minibatch standard deviation against plain PyTorch in fp64.

A result may differ from fp64 by twice what plain PyTorch differs in the same dtype, plus one unit in the last place
times the square root of the reduction's length.
"""

import math

import pytest
import torch
from torch.autograd import grad

import gankern
import gankern.functional as GF
from gankern.reference.minibatch_stddev import minibatch_stddev as reference
from gankern.triton import minibatch_stddev
from gankern.triton.launch import _unplanned, recorded

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


# A program has 512 positions, and keeps all values of them of up to four samples; of more than 1,024 gradients of a
# feature it adds up parts.
SHAPES = [
    ((4, 1), 4, 1), ((6, 4, 3, 5), 3, 2), ((4, 3, 13, 17), 4, 1), ((3, 2, 5), 3, 2), ((10, 6, 9, 11), 5, 3),
    ((4, 2, 16, 32), 4, 1), ((4, 4, 23, 29), 4, 2),
]  # fmt: skip


def sample(shape, dtype, device, memory_format=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)
    return x.contiguous(memory_format=memory_format) if x.ndim == 4 else x


def results(function, x):
    x = x.detach().requires_grad_()
    out = function(x)
    g = sample(out.shape, torch.float64, x.device, seed=1).to(out.dtype).requires_grad_()
    (first,) = grad(out, x, g, create_graph=True)
    return [out, first, *grad(first, [x, g], sample(x.shape, torch.float64, x.device, seed=2).to(x.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(("shape", "group", "channels"), SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["strided", "contiguous"])
def test_every_order(shape, group, channels, layout, memory_format, dtype, device):
    x = sample(shape, dtype, device, memory_format)
    unbiased = layout == "contiguous"

    def triton(x):
        return GF.minibatch_stddev(
            x, group_size=group, num_channels=channels, layout=layout, unbiased=unbiased, implementation="triton"
        )

    def plain(x):
        return reference(x, group, channels, layout == "strided", unbiased, 1e-8)

    ours = results(triton, x)
    assert gankern.last_implementation("minibatch_stddev") == "triton"
    assert x.ndim != 4 or ours[0].is_contiguous(memory_format=memory_format)
    for mine, theirs, right in zip(ours, results(plain, x), results(plain, x.double())):
        assert mine.dtype == dtype and mine.shape == right.shape
        error, plain_error = ((y.double() - right).abs().max().item() for y in (mine, theirs))
        units = 8 if dtype == torch.float64 else 1
        assert error <= 2 * plain_error + units * torch.finfo(dtype).eps * math.sqrt(x[0].numel()) * right.abs().max()


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_parts_that_are_many(memory_format, device, monkeypatch):
    """Whether each program of the channel's adds them up, or another kernel before, the channel is the same."""
    x = sample((4, 4, 23, 29), torch.float32, device, memory_format)
    options = 4, 2, True, False, 1e-8
    kernels, channels = [], []
    for most in (minibatch_stddev.AGAIN, 0):
        monkeypatch.setattr(minibatch_stddev, "AGAIN", most)
        with recorded() as launches:
            minibatch_stddev.forward(x, *options)
        kernels.append([launch.kernel.__name__ for launch in launches])
        with _unplanned():
            channels.append(minibatch_stddev.forward(x, *options)[:, 4:])
    assert kernels == [["_held_kernel", "_channel_kernel"], ["_held_kernel", "_parts_kernel", "_channel_kernel"]]
    torch.testing.assert_close(*channels)


def test_empty_and_strides(device):
    assert GF.minibatch_stddev(torch.zeros(0, 2, 3, device=device), implementation="triton").shape == (0, 3, 3)
    x = sample((5, 3, 8), torch.float64, device).transpose(0, 2)[:, ::2]
    before = x.clone()
    torch.testing.assert_close(GF.minibatch_stddev(x, implementation="triton"), reference(x, 4, 1, True, False, 1e-8))
    assert torch.equal(x, before)
