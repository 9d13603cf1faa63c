"""The Triton kernels of batch normalisation with an activation against torch's own in fp64.

A result may differ from fp64 by twice what plain PyTorch differs in the same dtype, plus one unit in the last place of
the result, plus one of the accumulation dtype times the square root of the reduction's length.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

import gankern
import gankern.functional as GF
from gankern.triton import batch_norm_act as batch_norm_act_kernels
from gankern.triton.launch import recorded

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# NumPy's, about the interpreter: loops whose bound is known at run time, and statistics of one value.

# A block is 1024 values of a channel, or 32 rows of 32 channels; a range is 16 blocks. Of (2, 2, 26, 41), a sample has two
# blocks of a channel, or three ranges of rows; of (1, 1, 130, 140) a channel has two ranges.
SHAPES = [(7, 3), (2, 40, 3, 5), (2, 2, 26, 41), (2, 3, 2, 3, 4), (1, 1, 130, 140)]


def textbook(x, weight, bias, running, slope):
    mean, var = (None, None) if running is None else (r.to(torch.promote_types(x.dtype, r.dtype)) for r in running)
    conditional = weight is not None and weight.ndim == 2
    own = (None, None) if conditional else (weight, bias)
    y = F.batch_norm(x, mean, var, *own, training=running is None)
    if conditional:
        over = (...,) + (None,) * (x.ndim - 2)
        y = y * weight[over] + bias[over]
    return (y if slope == 1 else y.relu() if slope == 0 else F.leaky_relu(y, slope)).to(x.dtype)


def triton(x, weight, bias, running, slope):
    activation = {1.0: None, 0.0: "relu"}.get(slope, "leaky_relu")
    mean, var = (None, None) if running is None else running
    return GF.batch_norm_act(
        x,
        mean,
        var,
        weight,
        bias,
        running is None,
        activation=activation,
        negative_slope=slope,
        implementation="triton",
    )


def random(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype).to(device)


def results(function, x, weight, bias, running, slope, dtype):
    """The result, the first-order gradients, and the gradients of those."""
    inputs = [v.detach().requires_grad_() for v in (x, weight, bias) if v is not None]
    given = iter(inputs)
    out = function(*[None if v is None else next(given) for v in (x, weight, bias)], running, slope)
    g = random(*out.shape, seed=3, dtype=dtype).to(out).requires_grad_()
    first = grad(out, inputs, g, create_graph=True)
    hs = [random(*v.shape, seed=4 + i, dtype=dtype).to(v) for i, v in enumerate(first)]
    second = grad(first, [*inputs, g], hs, allow_unused=True)
    return [out, *first, *[torch.zeros_like(v) if s is None else s for s, v in zip(second, [*inputs, g])]]


def check(x, affine, training, slope):
    accumulation = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = bias = running = None
    if affine != "none":
        size = x.shape[:2] if affine == "sample" else x.shape[1:2]
        weight, bias = (random(*size, dtype=accumulation, device=x.device, seed=s) for s in (10, 11))
    if not training:
        running = tuple(
            random(x.shape[1], dtype=accumulation, device=x.device, seed=s).square() + 0.1 for s in (20, 21)
        )
    ours = results(triton, x, weight, bias, running, slope, x.dtype)
    assert gankern.last_implementation("batch_norm_act") == "triton"
    plain = results(textbook, x, weight, bias, running, slope, x.dtype)
    wide = [None if v is None else v.double() for v in (x, weight, bias)]
    exact = results(textbook, *wide, running and tuple(r.double() for r in running), slope, x.dtype)
    length = math.sqrt(x.numel() / x.shape[1])
    for i, (mine, theirs, right) in enumerate(zip(ours, plain, exact)):
        assert mine.dtype == theirs.dtype and mine.shape == right.shape
        largest = max(1.0, right.abs().max().item())
        floor = (torch.finfo(mine.dtype).eps + torch.finfo(accumulation).eps * length) * largest
        plain_error = (theirs.double() - right).abs().max().item()
        # In fp64 plain PyTorch is the exact result itself: the floor, once for it as that and twice for it as the peer.
        allowed = 4 * floor if x.dtype == torch.float64 else floor
        if x.dtype != torch.float64 and math.isfinite(plain_error):
            allowed += 2 * plain_error
        error = (mine.double() - right).abs().max().item()
        assert error <= allowed, (i, error, allowed)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_order(shape, dtype, training, device):
    for affine, slope in (("none", 1.0), ("channel", 0.2), ("sample", 0.0)):
        x = random(*shape, dtype=dtype, device=device)
        # Where a channel's values are neighbours, many channels are the same program many times, up to the last launch,
        # of those that sums of each sample need.
        if shape[1] < 32 or affine == "sample":
            check(x, affine, training, slope)
        last = x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
        if last.stride() != x.stride():
            check(last, affine, training, slope)


def test_strides_formats_and_nothing_written(device):
    x = random(3, 8, 5, 6, device=device)
    before = x.clone()
    check(x[:, ::2, :, ::2], "channel", True, 0.2)
    check(x.permute(2, 1, 0, 3), "sample", True, 0.2)
    assert torch.equal(x, before)
    last = x.contiguous(memory_format=torch.channels_last)
    assert triton(last, None, None, None, 0.2).stride() == last.stride()
    leaf = x.clone().requires_grad_()
    g = torch.ones(1, dtype=x.dtype, device=device).expand(x.shape)
    torch.testing.assert_close(*[grad(f(leaf, None, None, None, 0.2), leaf, g)[0] for f in (triton, textbook)])


def test_running_statistics_far_from_zero_and_nan(device):
    x = random(4, 3, 20, 20, dtype=torch.float32, device=device) + 1e4
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    GF.batch_norm_act(x, mean, var, training=True, momentum=1.0, implementation="triton")
    exact = x.double().var((0, 2, 3))
    assert ((var - exact) / exact).abs().max() < 1e-5
    x[0, 1, 2, 3] = float("nan")
    y = triton(x, None, None, None, 0.0)
    assert y[:, 1].isnan().all() and y[:, [0, 2]].isfinite().all()


# One range a channel, and several, by three launches.
@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (2, 3, 100, 170)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_of_evaluation_stay_where_they_are(shape, bad, device):
    """No value depends on another one: a gradient that is not finite spoils its own place alone, in both orders."""
    given = [random(*shape, dtype=torch.float32, device=device, seed=seed) for seed in range(3)]
    given[1][1, 1, 3, 3] = given[2][1, 0, 2, 2] = bad
    running, bias = (torch.zeros(3, device=device), torch.ones(3, device=device)), torch.zeros(3, device=device)
    found = []
    for function in (triton, textbook):
        x, g, h = (t.clone() for t in given)
        x.requires_grad_(), g.requires_grad_()
        weight = torch.full((3,), 1.5, device=device, requires_grad=True)
        first = grad(function(x, weight, bias, running, 0.2), (x, weight), g, create_graph=True)
        found.append((*first, *grad(first[0], (g, weight), h)))
    for mine, other in zip(*found):
        torch.testing.assert_close(mine, other, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_empty_batch_and_missing_gradients(device):
    x = torch.zeros(0, 3, 4, 4, device=device, requires_grad=True)
    weight = torch.ones(3, device=device, requires_grad=True)
    y = triton(x, weight, None, None, 0.2)
    first = grad(y.sum(), [x, weight], create_graph=True)
    assert y.shape == first[0].shape == x.shape and not first[1].any()

    x = random(4, 3, 2, 2, device=device).requires_grad_()
    weight = random(3, device=device).requires_grad_()
    running = torch.zeros(3, dtype=x.dtype, device=device), torch.ones(3, dtype=x.dtype, device=device)
    (first,) = grad(triton(x, weight, None, running, 0.2).sum(), x, create_graph=True)
    # x is a leaf: zeros, as torch has them there.
    second = grad(first.sum(), [x, weight], allow_unused=True)
    assert torch.equal(second[0], torch.zeros_like(x)) and second[1].any()


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched, and with how many blocks of channels ahead."""
    found, launch = [], batch_norm_act_kernels.launch

    def recorded(kernel, programs, *arguments, **options):
        found.append((kernel.__name__, arguments[-1]))
        return launch(kernel, programs, *arguments, **options)

    monkeypatch.setattr(batch_norm_act_kernels, "launch", recorded)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_many_ranges(dtype, device, monkeypatch):
    """A program of those that add up ranges takes fewer channels, and all ranges of them at once."""
    monkeypatch.setattr(batch_norm_act_kernels, "VALUES", 1)  # blocks of a range: 36 ranges
    x = random(2, 10, 8, 9, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    with batch_norm_act_kernels.BLOCKS.use({"TILE": 16, "CHANNELS": 4, "DEEP": 1, "num_warps": 4, "AHEAD": 0}):
        check(x, "channel", True, 0.2)
        with recorded() as launches:
            GF.batch_norm_act(x, None, None, None, None, True, implementation="triton")
    (own,) = [launch.constants for launch in launches if launch.kernel.__name__ == "_settle_moments_kernel"]
    assert (own["BLOCK_C"], own["PARTS"]) == batch_norm_act_kernels._settled(batch_norm_act_kernels.MANY + 1)


WOVEN = {"TILE": 16, "CHANNELS": 4, "DEEP": 2, "num_warps": 4, "AHEAD": 1}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("groups", "shape", "ahead"),
    [
        (None, (2, 3, 12, 13), (2**20, 312 * 4 * 4 * 4)),  # all blocks of channels ahead, and as few as can be
        (1, (2, 4, 17, 18), (306 * 4 * 4 * 4 * 3,)),  # statistics of four channels
        (2, (1, 4, 17, 18), (306 * 4 * 4 * 4 * 3,)),  # of two: in channels_last, two of a block
    ],
)
def test_sums_and_values_woven_in_one_launch(groups, shape, ahead, last, device, launched, monkeypatch):
    """Ranges are summed up before, and others have their values made, by tickets: in every order."""
    x = random(*shape, dtype=torch.float32, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, bias = (random(shape[1], dtype=torch.float32, device=device, seed=s) for s in (1, 2))
    given = {"activation": "leaky_relu", "negative_slope": 0.2, "implementation": "triton"}

    def ours(x, weight, bias, running, slope):
        if groups is None:
            return GF.batch_norm_act(x, None, None, weight, bias, True, **given)
        return GF.group_norm_act(x, groups, weight, bias, **given)

    def theirs(x, weight, bias, running, slope):
        y = F.batch_norm(x, None, None, weight, bias, True) if groups is None else F.group_norm(x, groups, weight, bias)
        return F.leaky_relu(y, slope)

    right = results(theirs, x.double(), weight.double(), bias.double(), None, 0.2, torch.float32)
    for bytes_ahead in ahead:
        monkeypatch.setattr(batch_norm_act_kernels, "MEGABYTE", bytes_ahead)
        launched.clear()
        with batch_norm_act_kernels.BLOCKS.use(WOVEN), batch_norm_act_kernels.GROUPS.use(WOVEN):
            mine = results(ours, x, weight, bias, None, 0.2, torch.float32)
        kernels = [name for name, _ in launched]
        assert kernels.count("_together_kernel") == 3 and not {"_moments_kernel", "_apply_kernel"} & {*kernels}
        assert all(blocks >= 1 for name, blocks in launched if name == "_together_kernel")
        for one, exact in zip(mine, right, strict=True):
            torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_a_program_has_a_channel_of_few_values_to_itself(device, launched):
    """One launch in place of three, where a channel's values are one range."""
    x, weight = random(2, 3, 5, 5, dtype=torch.float32, device=device), random(3, dtype=torch.float32, device=device)
    results(triton, x, weight, weight, None, 0.2, torch.float32)
    assert launched == [("_together_kernel", 0)] * 3
    launched.clear()
    with batch_norm_act_kernels.BLOCKS.use({**WOVEN, "AHEAD": 0}):
        results(triton, x.tile(1, 1, 3, 3), weight, weight, None, 0.2, torch.float32)
    assert not any(name == "_together_kernel" for name, _ in launched)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_bits_every_time():
    x = random(64, 100, 32, 32, dtype=torch.float32, device="cuda")
    runs = [results(triton, x, None, None, None, 0.2, x.dtype) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("shape", [(7, 3), (2, 40, 3, 5), (2, 2, 26, 40)], ids=str)
@pytest.mark.parametrize("of_each", [False, True], ids=["of all", "of each sample"])
@pytest.mark.parametrize("name", ["batch_norm_act", "instance_norm_act", "bias_act"])
def test_prelu_in_every_order(shape, name, of_each):
    """``of_each``: affine values are each sample's own, beside a slope that all have in common."""
    if (len(shape) < 3 and name == "instance_norm_act") or (of_each and name == "bias_act"):
        pytest.skip("there is nothing of the kind")
    function = {
        "batch_norm_act": lambda i, x, w, b, a: GF.batch_norm_act(
            x, None, None, w, b, True, activation="prelu", slope=a, implementation=i
        ),
        "instance_norm_act": lambda i, x, w, b, a: GF.instance_norm_act(
            x, None, None, w, b, activation="prelu", slope=a, implementation=i
        ),
        "bias_act": lambda i, x, w, b, a: GF.bias_act(
            x, b, activation="prelu", slope=a, gain=1.5, clamp=0.9, implementation=i
        ),
    }[name]
    channels = shape[1]
    for last, slopes in ((False, channels), (len(shape) > 2, 1)):
        x = random(*shape)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        affine = shape[:2] if of_each else (channels,)
        tensors = [x, random(*affine, seed=1), random(*affine, seed=2), random(slopes, seed=3)]
        sides = []
        for implementation in ("triton", "reference"):
            leaves = [t.detach().requires_grad_() for t in tensors]
            if name == "bias_act":
                leaves[1].requires_grad_(False)
            y = function(implementation, *leaves)
            assert gankern.last_implementation(name) == implementation
            needed = [t for t in leaves if t.requires_grad]
            g = random(*y.shape, seed=4).requires_grad_()
            first = grad(y, needed, g, create_graph=True)
            hs = [random(*f.shape, seed=5 + i) for i, f in enumerate(first)]
            second = grad(first, [g, *needed], hs, allow_unused=True)
            zeros = [torch.zeros_like(t) for t in (g, *needed)]
            sides.append([y, *first, *(z if s is None else s for s, z in zip(second, zeros))])
        for mine, right in zip(*sides, strict=True):
            assert (mine - right).abs().max() <= 1e-9 * max(1.0, right.abs().max().item())
