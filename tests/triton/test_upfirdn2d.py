"""The Triton kernel of up, FIR filter, down against plain PyTorch in fp64.

A result may differ from fp64 by twice what plain PyTorch differs in the same dtype, plus one unit in the last place of
the sum's terms.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch.autograd import grad, gradgradcheck

import gankern
import gankern.functional as GF
from gankern.triton import launch, upfirdn2d
from gankern.triton.upfirdn2d import BLOCKS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

ROWS, COLUMNS = BLOCKS.variants[0]["ROWS"], BLOCKS.variants[0]["COLUMNS"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]

# Shape, taps (rows of them: 0 for a separable filter), options; a tile is 4 rows of 128 columns.
CASES = [
    ((1, 1, 1, 1), (0, 1), {}),
    ((2, 3, 5, 7), (0, 4), {"up": 2, "padding": (2, 1, 2, 1), "gain": 4}),
    ((2, 3, 8, 6), (0, 4), {"down": 2, "padding": 1}),
    ((1, 2, ROWS + 1, COLUMNS + 1), (0, 3), {"padding": 1, "flip_filter": True}),
    ((2, 2, 6, 7), (3, 5), {"up": (3, 2), "down": (2, 3), "padding": (4, 1, -1, 2), "gain": 1 / 3}),
    ((1, 2, 9, 8), (2, 1), {"up": (1, 4), "down": (3, 1), "padding": (-2, 3, 5, -1), "flip_filter": True}),
]


def values(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def make_filter(taps, device):
    return values(*(taps[1:] if taps[0] == 0 else taps), device=device, seed=1)


def results(implementation, x, filter, options):
    """The result, its gradient, and the gradient of that."""
    x = x.detach().requires_grad_()
    out = GF.upfirdn2d(x, filter, **options, implementation=implementation)
    g = values(*out.shape, seed=2).to(out).requires_grad_()
    (first,) = grad(out, x, g, create_graph=True)
    (second,) = grad(first, g, values(*x.shape, seed=3).to(x))
    return [out, first, second]


# Every case in float64, in both layouts in turn; the other dtypes, which differ in nothing but loads and stores, in one.
@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [(case, torch.float64, LAYOUTS[i % 2]) for i, case in enumerate(CASES)]
    + [(CASES[1], dtype, LAYOUTS[1]) for dtype in DTYPES[1:]]
    + [(CASES[4], torch.float32, LAYOUTS[1])],
    ids=str,
)
def test_every_order(case, dtype, layout, device):
    shape, taps, options = case
    x = values(*shape, dtype=dtype, device=device).to(memory_format=layout)
    filter = make_filter(taps, device)
    ours = results("triton", x, filter, options)
    assert gankern.last_implementation("upfirdn2d") == "triton"
    plain, exact = results("reference", x, filter, options), results("reference", x.double(), filter, options)
    # The largest sum of its terms' sizes, and what their order can do to it.
    length = max(1, taps[0]) * taps[1]
    largest = filter.abs().sum().item() ** (2 if filter.ndim == 1 else 1) * options.get("gain", 1) * 4
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for mine, theirs, right in zip(ours, plain, exact):
        assert mine.dtype == dtype and mine.shape == right.shape
        floor = torch.finfo(dtype).eps * right.abs().max().item() + accumulation * math.sqrt(length) * largest
        plain_error = (theirs.double() - right).abs().max().item()
        assert (mine.double() - right).abs().max().item() <= 2 * plain_error + floor
    channels_last = layout == torch.channels_last and shape[1] > 1
    assert ours[0].is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_second_order_is_exact(device):
    x, filter = values(1, 1, 2, 2, device=device).requires_grad_(), make_filter((0, 3), device)
    assert gradgradcheck(lambda x: GF.upsample2d(x, filter, implementation="triton"), x)


def test_any_strides_and_nothing_written(device):
    base = values(4, 9, 3, 10, device=device)
    x = base.permute(1, 2, 3, 0)[::2, :, ::3]
    filter = make_filter((0, 4), device)
    ours = GF.downsample2d(x, filter, implementation="triton")
    torch.testing.assert_close(ours, GF.downsample2d(x, filter, implementation="reference"))
    assert torch.equal(base, values(4, 9, 3, 10, device=device))


def test_empty(device):
    filter = make_filter((0, 4), device)
    assert GF.upsample2d(torch.zeros(0, 3, 4, 4, device=device), filter, implementation="triton").shape == (0, 3, 8, 8)
    assert GF.upsample2d(torch.zeros(2, 0, 4, 4, device=device), filter, implementation="triton").shape == (2, 0, 8, 8)


def check_of_its_own(kernel, flag, x, filter, every_options):
    """A kernel of its own, which the variants with this flag take, against the one for all factors."""

    def launched(*options):
        with launch.recorded() as launches:
            upfirdn2d.forward(x, filter, *options)
        return [one.kernel for one in launches]

    own = [variant for variant in BLOCKS.variants if variant[flag]]
    plain = next(variant for variant in BLOCKS.variants if not variant[flag])
    for number, options in enumerate(every_options):
        with BLOCKS.use(plain):
            assert launched(*options) == [upfirdn2d._upfirdn2d_kernel]
            right = upfirdn2d.forward(x, filter, *options)
        with BLOCKS.use(own[number % len(own)]):
            assert launched(*options) == [kernel]
            torch.testing.assert_close(upfirdn2d.forward(x, filter, *options), right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_two_by_two_outputs_a_lane(taps, layout, device):
    """Up by 2: for every parity and sign of the start. It is what runs where nothing was measured."""
    assert BLOCKS.variants[0]["DOUBLING"]
    x = values(2, 3, 5, 7, device=device).contiguous(memory_format=layout)
    filter, size = values(taps, device=device, seed=1), [9, 13] if taps % 2 else [10, 14]
    starts = [0, 0], [1, 2], [2, 1], [3, 3], [-1, -2], [-3, 4]
    options = [([2, 2], [1, 1], start, size, n % 2 == 0, 1.5) for n, start in enumerate(starts)]
    check_of_its_own(upfirdn2d._doubling_kernel, "DOUBLING", x, filter, options)


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_four_outputs_a_lane(taps, layout, device):
    """Not up, down by 1 or 2 on either axis."""
    x = values(1, 2, 9, 11, device=device).contiguous(memory_format=layout)
    filter = values(taps, device=device, seed=1)
    ways = ([0, 1], [1, 1]), ([3, 2], [2, 2]), ([-1, -2], [1, 2]), ([2, -3], [2, 1])
    options = [([1, 1], down, start, [9, 5 + n], n % 2 == 0, 1.5) for n, (start, down) in enumerate(ways)]
    check_of_its_own(upfirdn2d._strip_kernel, "STRIPS", x, filter, options)


@triton.jit
def _line_kernel(out, columns, channels, INDEX: tl.constexpr):
    tl.store(out, upfirdn2d._line(columns, channels, INDEX))


def test_a_line_of_more_than_2_31_values_is_counted_in_64_bits(device):
    """Of channels_last images; columns and channels are 32-bit numbers each."""
    out = torch.zeros(1, dtype=torch.int64, device=device)
    _line_kernel[(1,)](out, 2**20, 2**12 + 1, launch.index_type(2**32))
    assert out.item() == 2**20 * (2**12 + 1)


def test_places_beyond_32_bits_between_few_samples(device):
    """Outputs that are few, and lie 2^30 samples apart; and samples with 2^30 zeros between them."""
    x = torch.ones(1, device=device).expand(1, 1, 3 << 30, 1)  # of one value in memory
    one = torch.ones(1, device=device)
    out = upfirdn2d.forward(x, one, [1, 1], [1 << 30, 1], [0, 0], [3, 1], False, 1.0)
    assert out.flatten().tolist() == [1.0, 1.0, 1.0]
    few = torch.tensor([1.0, 2.0, 3.0], device=device)[None, None, :, None]
    out = upfirdn2d.forward(few, one, [1 << 30, 1], [1 << 30, 1], [0, 0], [3, 1], False, 1.0)
    assert out.flatten().tolist() == [1.0, 2.0, 3.0]
