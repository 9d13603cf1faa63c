"""Maps of more than 2^31 elements, on a real GPU: `make gpu` runs this. Without one, the same checks on a small map."""

import pytest
import torch

import gankern.functional as GF

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPE = (33, 64, 1024, 1024) if CUDA else (5, 4, 6, 6)
NEEDED = 24 << 30  # of memory: a map in bfloat16 has 4.4 GB, and there are x, the result, and both gradients
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0], device=DEVICE) / 8


def _vector(seed):
    return torch.randn(SHAPE[1], generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# Whose results for a sample depend on that sample alone; a function of the map.
OF_A_SAMPLE = {
    "bias_act": lambda x: GF.bias_act(x, _vector(0).to(x.dtype)),
    "bias_act_pixel_norm": lambda x: GF.bias_act_pixel_norm(x, _vector(0).to(x.dtype)),
    "batch_norm_act in evaluation": lambda x: GF.batch_norm_act(
        x, _vector(1), _vector(2).abs() + 0.5, _vector(3), _vector(4), False, activation="leaky_relu"
    ),
    "instance_norm_act": lambda x: GF.instance_norm_act(x, None, None, _vector(3), _vector(4), activation="leaky_relu"),
    "group_norm_act": lambda x: GF.group_norm_act(x, 2, _vector(3), _vector(4), activation="leaky_relu"),
    "virtual_batch_norm": lambda x: GF.virtual_batch_norm(
        x, _vector(1), _vector(2).square() + 2, 8, _vector(3), _vector(4), activation="leaky_relu"
    ),
    "gradient_penalty": lambda x: GF.gradient_penalty(x)[:, None, None, None],
    "upfirdn2d": lambda x: GF.upfirdn2d(x, TAPS, padding=(2, 1, 2, 1)),
    "upfirdn2d, down": lambda x: GF.upfirdn2d(x, TAPS, down=2, padding=(1, 1, 1, 1)),
}


def _map(shape, channels_last):
    generator = torch.Generator(DEVICE).manual_seed(5)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=layout)
    for sample in x:
        sample.copy_(torch.randn(sample.shape, generator=generator, device=DEVICE))
    return x


def _gradient(function, x, cotangent_of=None):
    x = x.detach().requires_grad_()
    y = function(x)
    (gradient,) = torch.autograd.grad(y, x, (y.detach() if cotangent_of is None else cotangent_of(y)))
    return y.detach(), gradient


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU; the small map is tested without one")
def test_more_than_2_31_elements():
    if torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free GPU memory")
    _check_all(_map)


@pytest.mark.skipif(CUDA, reason="that is the same on a large map")
def test_the_check_itself_on_a_small_map():
    _check_all(_map)


def _check_all(make):
    """One after the other in one test: a second large map in another process would find no memory."""
    for channels_last in (False, True):
        x = make(SHAPE, channels_last)
        for name, function in OF_A_SAMPLE.items():
            y, gradient = _gradient(function, x)
            for sample in (0, SHAPE[0] - 1):  # the last one lies behind 2^31 elements
                alone = x[sample : sample + 1].clone(memory_format=torch.preserve_format)
                right_y, right_gradient = _gradient(function, alone)
                where = f"{name}, channels_last {channels_last}, sample {sample}"
                for mine, right in ((y, right_y), (gradient, right_gradient)):
                    mine = mine[sample : sample + 1]
                    torch.testing.assert_close(mine, right, rtol=2**-7, atol=2**-7, msg=lambda m, w=where: f"{w}: {m}")
            del y, gradient
        _check_batch_norm(x)
        _check_minibatch_stddev(x)
        del x


def _check_batch_norm(x):
    """Statistics of all samples, by their definition in double precision, channel by channel."""
    mean, var = torch.zeros(SHAPE[1], device=DEVICE), torch.ones(SHAPE[1], device=DEVICE)
    y = GF.batch_norm_act(x, mean, var, None, None, True, momentum=1.0, activation="leaky_relu")
    for channel in (0, SHAPE[1] - 1):
        values = x[:, channel].double()
        torch.testing.assert_close(mean[channel].double(), values.mean(), rtol=0, atol=1e-5)
        torch.testing.assert_close(var[channel].double(), values.var(), rtol=1e-5, atol=0)
        last = (values[-1] - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
        right = torch.where(last > 0, last, 0.2 * last)
        torch.testing.assert_close(y[-1, channel].double(), right, rtol=2**-8, atol=2**-8)


def _check_minibatch_stddev(x):
    """One group of all samples: its statistic, channel by channel; and the map before it, unchanged."""
    y = GF.minibatch_stddev(x, group_size=SHAPE[0])
    total = sum((x[:, c].double().var(0, correction=0) + 1e-8).sqrt().sum() for c in range(SHAPE[1]))
    right = total / (SHAPE[1] * SHAPE[2] * SHAPE[3])
    torch.testing.assert_close(y[-1, -1].double(), right.expand(SHAPE[2:]), rtol=2**-8, atol=0)
    assert torch.equal(y[-1, :-1], x[-1]) and torch.equal(y[0, :-1], x[0])
