"""The Triton kernel that collapses a 3x3 kernel with a resampling, against the plain form of gankern/ops/convolution.py."""

import pytest
import torch

import gankern.functional as GF
from gankern.ops import convolution as ops
from gankern.triton.convolution import window_sums

FORMS = {"weight": (3, ops._collapse, True), "its gradient": (4, ops._uncollapse, False)}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "turned": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:, :1].expand_as(x),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["upsample", "downsample"])
@pytest.mark.parametrize("form", FORMS)
def test_window_sums(form, kind, layout, dtype, device):
    """To the bit; in half precision, which is rounded once, within a unit in the last place: the interpreter cuts off."""
    taps, python, grow = FORMS[form]
    for first, second in ((24, 17), (1, 5), (5, 1), (1, 1)):
        x = LAYOUTS[layout](torch.randn(first, second, taps, taps).to(device, dtype))
        wide = torch.float32 if dtype.itemsize < 4 else dtype
        y, right = window_sums(x, kind == "upsample", grow), python(kind, x.to(wide)).to(dtype)
        fake = ops._fake_window_sums(x, kind == "upsample", grow)
        assert torch.equal(y, right) if wide == dtype else torch.allclose(y, right, rtol=torch.finfo(dtype).eps, atol=0)
        assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)
        last = layout == "channels_last" and second > 1
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 3e38])
def test_values_that_are_no_usual_ones(special, device):
    x = torch.randn(2, 3, 3, 3, device=device)
    x[1, 2, 0, 1] = special
    for kind in ("upsample", "downsample"):
        y, right = window_sums(x, kind == "upsample", True), ops._collapse(kind, x)
        torch.testing.assert_close(y, right, rtol=0, atol=0, equal_nan=True)


def test_nothing(device):
    for up, size in ((True, (0, 2, 4, 4)), (False, (2, 0, 4, 4))):
        assert window_sums(torch.empty(2, 0, 3, 3, device=device), up, True).shape == size


@pytest.mark.parametrize("function", [GF.upsample_conv2d, GF.conv2d_downsample], ids=lambda f: f.__name__)
def test_one_launch_a_kernel(function, device):
    """What resampling convolutions on a GPU call it for."""
    if device == "cpu":
        pytest.skip("the CPU's convolutions have kernels of their own")
    x = torch.randn(2, 4, 8, 8, device=device, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 4, 3, 3, device=device, dtype=torch.float64, requires_grad=True)
    out, right = function(x, w), function(x.cpu(), w.cpu())
    torch.testing.assert_close(out.cpu(), right)
    assert torch.autograd.gradgradcheck(function, (x, w))
